"""
Train a language model to think in soft tokens: RLOO on continuous chains of thought (arXiv 2509.19170).

    python train.py --mode soft                      # a laptop, nothing to download: tiny base, then RL, in minutes
    python train.py --mode soft --model path/to/Llama-3.2-3B-Instruct --data gsm8k
    torchrun --nproc_per_node 8 train.py --mode soft --model path/to/Llama-3.2-3B-Instruct --data gsm8k
    python train.py --mode sft --model path/to/SmolLM2-135M --data gsm8k --lr 1e-5 --steps 500

One step: sample G rows for each of B questions, reward them, subtract the mean of the others, score the recorded
actions again with gradients, update. Modes hard, soft and fuzzy differ in the action only; mode sft puts reference
solutions in the place of samples and 1 / n in the place of the advantage.
Dimensions: B questions (--prompts), G samples of each (--samples), R = B G rows, T positions, D width.
"""
import json
import math
import random
import resource
import shutil
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from tqdm import tqdm

from eval import TASKS, arithmetic_problem, arithmetic_split, evaluate, judge, load_problems, worked_text
from model import Config, InputError, Transformer
from sample import (MODES, NOISE_SCALE, NONE, STOP, THOUGHT, TOKEN, Parser, Rollout, Watch, generate, load,
                    positive)

# --------------------------------------------------------------------------------------------------
# Presets: every flag that is not given takes its value here

PAPER = dict(  # with --model
    data="gsm8k", steps=4000, prompts=2, samples=32, cot_len=128, answer_len=32, lr=6e-6, warmup=20, micro_batch=8,
    eval_every=100, val_size=128, dtype="bfloat16", input_noise=0.0)
TINY = dict(  # without
    data="arithmetic", steps=100, prompts=16, samples=16, cot_len=32, answer_len=4, lr=3e-4, warmup=10,
    micro_batch=256, eval_every=25, val_size=512, dtype="float32", input_noise=0.0)
TINY_SFT = TINY | dict(steps=900, prompts=64, samples=1, lr=4e-3, warmup=50, eval_every=900, input_noise=0.7)
TINY_CONFIG = dict(
    model_type="llama", hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True,
    rope={"rope_type": "default", "rope_theta": 10000.0})
CARELESS = 0.5  # how often the writers of the tiny base's texts take a sign for a plus


# --------------------------------------------------------------------------------------------------
# The method: reward, advantage, and the rows that are scored

def reward(answer, gold, verifier="own"):
    """eq. 11: 100 for a correct answer, 10 for a wrong one in a closed box, 0 for none."""
    if answer is None:
        return 0.0
    return 100.0 if judge(answer, gold, verifier) == "correct" else 10.0


def rloo(rewards):
    """eq. 12: each reward minus the mean of the other G - 1 of its group. rewards (B, G) -> (B, G), G >= 2."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def pack(rollout, rows):
    """The given rows (b,) of a rollout as one right-padded batch: prompt, then slots, as Transformer.log_prob wants it.

    Returns ids (b, T); thoughts (b, T, D) or None; kind (b, T) of each slot, NONE in prompt and padding; in_cot (b, T)
    bool; and logp (b, T): what it was when it was sampled.
    """
    prompt_len, length = rollout.prompt_len[rows, None], rollout.length[rows, None]
    column = torch.arange(int((prompt_len + length).max()), device=rows.device)[None]  # (1, T)
    slot = column - prompt_len  # (b, T), negative in the prompt
    used = (slot >= 0) & (slot < length)

    def at(table, index):
        return table[rows[:, None], index.clamp(0, table.shape[1] - 1)]
    ids = torch.where(slot < 0, at(rollout.prompts, column.expand_as(slot)), at(rollout.tokens, slot))
    kind = torch.where(used, at(rollout.kind, slot), NONE)
    thoughts = None if rollout.thoughts is None else at(rollout.thoughts, slot)
    in_cot = (slot >= 0) & (slot < rollout.cot_len[rows, None])
    return ids, thoughts, kind, in_cot, at(rollout.logp, slot)


def reference_rollout(problems, tokenizer, notes, device):
    """Reference solutions in the form of a rollout, every token of them chosen: what supervised training scores."""
    prompts = [tokenizer.encode(notes["prompt"].replace("{question}", p["question"])).ids for p in problems]
    texts = [tokenizer.encode(worked_text(p), add_special_tokens=False).ids + notes["eos"][:1] for p in problems]
    prompts, tokens = ([torch.tensor(ids, device=device) for ids in lists] for lists in (prompts, texts))
    length, padded = torch.tensor([len(t) for t in tokens], device=device), pad_sequence(tokens, batch_first=True)
    return Rollout(prompts=pad_sequence(prompts, batch_first=True), tokens=padded, length=length,
                   prompt_len=torch.tensor([len(p) for p in prompts], device=device), cot_len=torch.zeros_like(length),
                   kind=torch.full_like(padded, TOKEN, dtype=torch.uint8), thoughts=None, entropy=None,
                   logp=torch.zeros(padded.shape, device=device))


def learning_rate(step, args):
    """Linear warm-up, then a cosine to 0 at the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


def questions_of_step(problems, step, n, seed):
    """n problems of a step: epochs in random order, a function of (seed, step) alone, so that resuming is exact."""
    at = range(step * n, step * n + n)
    order = {e: np.random.default_rng((seed, e)).permutation(len(problems)) for e in {i // len(problems) for i in at}}
    return [problems[order[i // len(problems)][i % len(problems)]] for i in at]


# --------------------------------------------------------------------------------------------------
# The tiny base: a Llama of 150 thousand parameters that knows single-digit arithmetic

def written_problem(rng):
    """A training problem with a solution as the tiny base sees it: by writers who are careful only half of the time.

    So the base is able (it knows all the facts) and undecided (it often writes like the careless), which is where a
    pretrained language model stands too, and what reinforcement learning can change in a minute.
    """
    while True:
        p = arithmetic_problem(rng, CARELESS)
        if arithmetic_split(p["question"]) == "train":
            return p


def write_tiny_model(path, seed):
    """Write a randomly initialised tiny Llama and its tokenizer of 25 symbols as an ordinary checkpoint directory."""
    words = ["<unk>", "<eos>", STOP, "\\boxed{", "User:", "Assistant:", *" }.;=+-*0123456789"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"The final answer is:|\\boxed\{|User:|Assistant:|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    model = Transformer(Config(**TINY_CONFIG, vocab_size=len(words)))
    model.init_weights(torch.Generator().manual_seed(seed), std=0.06)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    for name, content in (
            ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>",
                                       "unk_token": "<unk>", "clean_up_tokenization_spaces": False}),
            ("generation_config.json", {"eos_token_id": words.index("<eos>")}),
            ("soft_tokens.json", {"prompt": "User: {question} Assistant:"})):
        (path / name).write_text(json.dumps(content, indent=2) + "\n")
    model.save_pretrained(path)


# --------------------------------------------------------------------------------------------------
# Weights: float32 masters, compute in --dtype, one process or FSDP2

def distribute(model, dtype, device):
    """Prepare the float32 model for training in dtype; returns {name: float32 master parameter}.

    One process: the module computes in dtype and the masters are float32 copies, to which each backward pass hands its
    gradients; in float32 the masters are the parameters. Several: FSDP2 shards the masters and casts as it gathers.
    """
    if dist.is_initialized():
        policy = dict(mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                                     cast_forward_inputs=False))
        for block in model.layers:
            fully_shard(block, **policy)
        fully_shard(model, reshard_after_forward=False, **policy)
        register_fsdp_forward_method(model, "log_prob")
        return dict(model.named_parameters())
    if dtype == torch.float32:
        return dict(model.named_parameters())
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.to(dtype)

    def hand_over(master):
        def hook(p):
            master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
            p.grad = None
        return hook
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(hand_over(masters[name]))
    return masters


class gathered:
    """While this context is open, every parameter of an FSDP model is whole on every rank; else it does nothing."""

    def __init__(self, model):
        self.modules = [m for m in model.modules() if isinstance(m, FSDPModule)]

    def __enter__(self):
        for m in self.modules:
            m.unshard()

    def __exit__(self, *_):
        for m in self.modules:
            m.reshard()


def save_checkpoint(path, model, masters, dtype, source, notes, args, rank):
    """Write a Hugging Face directory that transformers and vLLM load, complete or not at all.

    source: the directory that the tokenizer and generation files are copied from.
    """
    state = {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().to(dtype) for k, v in masters.items()}
    if rank:
        return
    new, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    for file in Path(source).iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model") and not file.name.endswith("index.json"):
            shutil.copy(file, new)
    model.save_pretrained(new, state)
    keep = {k: v for k, v in notes.items() if k not in ("eos", "watch")}
    (new / "soft_tokens.json").write_text(json.dumps(keep, indent=2) + "\n")
    (new / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# Training

def main(args):
    # Configuration
    rank, world = dist_setup(args)
    say = print if rank == 0 else lambda *a, **k: None
    preset = PAPER if args.model else TINY_SFT if args.mode == "sft" else TINY
    for key, value in preset.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.temperature = args.temperature or MODES.get(args.mode)
    args.noise_scale = args.noise_scale or NOISE_SCALE
    out = Path(args.out or f"out/{args.mode}")
    args.out = str(out)
    if args.samples < 2 and args.mode != "sft":
        raise InputError(f"--samples {args.samples}: RLOO compares the samples of a question; use 2 or more")
    if args.model is None and args.mode == "sft":
        write_tiny_model(out / "init", args.seed)
        args.model = str(out / "init")
    elif args.model is None:
        args.model = str(tiny_base(args, rank))
    say(" ".join(f"--{k} {v}" for k, v in vars(args).items() if v is not None))

    # Model and data
    dtype = getattr(torch, args.dtype)
    model, tokenizer, notes = load(args.model, torch.float32, args.device, args.prompt_file)
    masters = distribute(model, dtype, args.device)
    notes |= {"temperature": MODES | ({args.mode: args.temperature} if args.mode in MODES else {}),
              "noise_scale": args.noise_scale, "cot_len": args.cot_len, "answer_len": args.answer_len}
    notes["watch"] = Watch.build(tokenizer, model.config.vocab_size, args.device)
    noise_std = args.noise_scale * notes["embedding_rms"]
    if args.data == "arithmetic":
        rng = random.Random(args.seed)
        problems = [written_problem(rng) for _ in range(20000)] if args.mode == "sft" else load_problems(
            args.data, "train", 8192)
        val = load_problems(args.data, "val", args.val_size)
    else:  # the validation problems are the same for every seed, and are never trained on
        problems = load_problems(args.data, "train")
        random.Random(0).shuffle(problems)
        if len(problems) <= args.val_size:
            raise InputError(f"--val_size {args.val_size}: {args.data} has {len(problems)} problems; use fewer")
        val, problems = problems[:args.val_size], problems[args.val_size:]
    if args.mode == "sft":
        problems = [p for p in problems if p["solution"] or args.data == "arithmetic"]
        if not problems:
            raise InputError(f"--data {args.data}: no solutions to imitate; give a file with solutions, or --mode hard")
        notes.pop("embedding_rms")  # the noise of later RL is measured on the weights that it starts from

    optimizer = torch.optim.AdamW(masters.values(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    settings = ["hard_greedy"] if args.mode in ("hard", "sft") else [f"{args.mode}_greedy", "hard_greedy"]
    out.mkdir(parents=True, exist_ok=True)
    log = open(out / "log.jsonl", "w") if rank == 0 else None
    interrupted = []
    previous = signal.signal(signal.SIGINT, lambda *_: interrupted.append(1) if not interrupted else sys.exit(130))

    def validate(step):
        """Accuracy on the validation problems in the model's own greedy setting and in hard greedy; all ranks agree."""
        accuracy = {}
        with gathered(model):
            for setting in settings:
                result, samples = evaluate(
                    model, tokenizer, notes | {"embedding_rms": 0}, val, setting, cot_len=args.cot_len,
                    answer_len=args.answer_len, temperature=args.temperature if args.mode in setting else None,
                    batch=max(64, args.micro_batch), verifier=args.verifier)
                accuracy[setting] = result["pass@1"]
                if setting == settings[0]:
                    for s in samples[:2]:
                        say(f"  | {s['question']} ->{s['thought']} [{s['answer']}] {s['verdict']}")
        say(f"step {step}: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in accuracy.items()))
        return accuracy

    def save(name):
        save_checkpoint(out / name, model, masters, dtype, args.model, notes, args, rank)

    # The loop
    base = best = validate(0)
    save("best")
    R, G = args.prompts * args.samples, args.samples
    mine = range(R * rank // world, R * (rank + 1) // world)  # this rank's rows, maybe a part of a group
    here = slice(mine.start, mine.stop)
    bar = tqdm(total=args.steps, disable=rank > 0, desc=args.mode)
    for step in range(args.steps):
        batch = questions_of_step(problems, step, args.prompts, args.seed)
        stats = torch.zeros(R, len(STATS), dtype=torch.float64)  # of all rows, each line from the rank that has the row
        clock = time.perf_counter()

        # 1. Sample (sft: read) and 2. reward
        if args.mode == "sft":
            rollout = reference_rollout([batch[row // G] for row in mine], tokenizer, notes, args.device)
        else:
            with gathered(model):
                rollout = generate(
                    model, tokenizer, [notes["prompt"].replace("{question}", p["question"]) for p in batch], G,
                    args.mode, answer_greedy=False, temperature=args.temperature, noise_std=noise_std,
                    cot_len=args.cot_len, answer_len=args.answer_len, eos=notes["eos"], seed=(args.seed, step),
                    rows=mine, watch=notes["watch"], store_thoughts=True, entropy_every=ENTROPY_EVERY)
            rewards = torch.tensor([reward(answer, batch[row // G]["answer"], args.verifier)
                                    for answer, row in zip(rollout.answers, mine)])
            in_cot = torch.arange(rollout.tokens.shape[1], device=args.device) < rollout.cot_len[:, None]
            ended = torch.isin(rollout.tokens, torch.tensor(notes["eos"], dtype=torch.long, device=args.device)) & in_cot
            columns = (rollout.length, rewards, rewards == 100, rewards == 0, rollout.truncated, rollout.cot_len,
                       rollout.entropy.masked_fill(~in_cot, math.nan).nanmean(1), ended.any(1))
            stats[here] = torch.stack([c.double().cpu() for c in columns], dim=1)
        generate_s = time.perf_counter() - clock
        if args.mode == "sft":
            stats[here, 0] = rollout.length.double().cpu()
        if world > 1:
            dist.all_reduce(stats)

        # 3. Advantage: what d loss / d log pi is, for every row
        if args.mode == "sft":
            weight = torch.full((R,), -1 / stats[:, 0].sum())  # cross-entropy per token
        else:
            weight = -rloo(stats[:, 1].view(-1, G)).flatten() / R  # eq. 14
        shares = [[row for row in range(R * k // world, R * (k + 1) // world) if weight[row] != 0] for k in range(world)]
        n_micro = max(-(-len(share) // args.micro_batch) for share in shares)  # every rank takes part in each of them

        # 4. Log-prob and gradient, rows of like length together
        clock = time.perf_counter()
        total_len = (rollout.length + rollout.prompt_len).tolist()
        rows = sorted(shares[rank], key=lambda row: total_len[row - mine.start])
        drifts, total_loss = [], 0.0
        for i in range(n_micro):
            part = rows[i * args.micro_batch:(i + 1) * args.micro_batch]
            local = torch.tensor(part or [mine.start], device=args.device) - mine.start
            ids, thoughts, kind, in_cot, sampled_logp = pack(rollout, local)
            w = ((kind == TOKEN) | (kind == THOUGHT)) * weight[part or [0]].float().to(args.device)[:, None]
            w = w if part else w * 0  # this rank has run out of rows: it only takes part
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(i == n_micro - 1)
            loss, logp = model.log_prob(
                ids, thoughts, kind == THOUGHT, w, torch.where(in_cot, args.temperature or 1.0, 1.0), noise_std,
                embedding_noise(ids, model, args, step, (args.seed, step, rank, i)) if args.input_noise else None)
            (loss * world).backward()  # FSDP takes the mean over ranks
            total_loss += loss.item()
            if args.mode != "sft":
                drifts.append((logp - sampled_logp)[w != 0].abs())

        # 5. Update
        lr = learning_rate(step, args)
        optimizer.param_groups[0]["lr"] = lr
        grad_norm = torch.zeros(())
        if n_micro:  # else every group's rewards were equal, and there is nothing to learn
            grad_norm = torch.nn.utils.clip_grad_norm_(masters.values(), args.clip)
            grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
            optimizer.step()
            optimizer.zero_grad()
            if not dist.is_initialized() and dtype != torch.float32:
                with torch.no_grad():
                    torch._foreach_copy_(list(model.parameters()), list(masters.values()))
        train_s = time.perf_counter() - clock

        # 6. Log
        mean = dict(zip(STATS, stats.nanmean(0).tolist()))
        drift = torch.cat(drifts) if drifts else torch.zeros(1)
        line = {"step": step, "loss": total_loss, "reward": mean["reward"], "accuracy": mean["correct"], "truncated": mean["truncated"],
                "unparsed": mean["unparsed"], "zero_advantage": (weight.view(-1, G) == 0).all(1).double().mean().item(),
                "cot_len": mean["cot_len"], "eos_in_cot": mean["eos"], "entropy": mean["entropy"],
                "delta_logp": drift.mean().item(), "delta_logp_max": drift.max().item() if drift.numel() else 0.0,
                "grad_norm": grad_norm.item(), "lr": lr, "generate_s": generate_s, "train_s": train_s,
                "tokens_per_s": stats[:, 0].sum().item() / (generate_s + train_s), "peak_gb": peak_memory_gb(args.device)}
        if rank == 0:
            log.write(json.dumps({k: round(v, 6) for k, v in line.items()}) + "\n")
            log.flush()
            bar.update()
            bar.write("  ".join(f"{k} {v:.3g}" for k, v in line.items()))

        # 7. Evaluate and save
        stop = step + 1 == args.steps or interrupted
        if stop or (step + 1) % args.eval_every == 0:
            accuracy = validate(step + 1)
            if accuracy[settings[0]] >= best[settings[0]]:
                best = accuracy
                save("best")
            if stop:
                save("last")
                break
    bar.close()
    signal.signal(signal.SIGINT, previous)
    summary = {"base": base, "final": best, "checkpoint": str(out / "best"), "steps": step + 1}
    if rank == 0:
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        log.close()
    for setting in settings:
        say(f"{setting}: {100 * base[setting]:.1f} % before, {100 * best[setting]:.1f} % after, on {len(val)} "
            "validation problems")
    say(f"The checkpoint is in {out / 'best'}. Next:\n"
        f"  python eval.py --model {out / 'best'} --data {args.data} --settings all")


STATS = ("tokens", "reward", "correct", "unparsed", "truncated", "cot_len", "entropy", "eos")
ENTROPY_EVERY = 8  # slots between two measurements of the entropy: it costs a pass over the vocabulary


def embedding_noise(ids, model, args, step, seed):
    """Gaussian noise for the input embeddings (b, T, D), of a random scale per row up to --input_noise times their RMS.

    Small models that never met noise do not survive soft tokens; this is NEFTune (arXiv 2310.05914), Gaussian. It grows
    over the second half of the steps: facts are learnt first.
    """
    generator = torch.Generator(args.device).manual_seed(hash(seed) % 2 ** 32)
    table = model.embed_tokens.weight.detach()
    table = table.full_tensor() if hasattr(table, "full_tensor") else table
    scale = torch.rand(len(ids), 1, 1, generator=generator, device=args.device)
    scale *= args.input_noise * max(0.0, 2 * step / args.steps - 1)
    noise = torch.randn(*ids.shape, table.shape[1], generator=generator, device=args.device)
    return (scale * table.float().square().mean().sqrt() * noise).to(getattr(torch, args.dtype))


def peak_memory_gb(device):
    """Peak memory of this process in GB: of the GPU if there is one, else resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def dist_setup(args):
    """Join the process group that torchrun announces; returns (rank, world size). (0, 1) without torchrun."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        if args.device == "cuda":
            torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    return dist.get_rank(), dist.get_world_size()


def tiny_base(args, rank):
    """The directory of the tiny base of this seed: trained by this file's own --mode sft unless it is there already."""
    folder = Path("out") / f"base-seed{args.seed}"
    if not (folder / "summary.json").exists():
        blank = {k: None for k in vars(args)}
        main(Namespace(**blank | {"mode": "sft", "seed": args.seed, "device": args.device, "out": str(folder),
                                  "clip": args.clip, "noise_scale": args.noise_scale, "verifier": "own"}))
    return folder / "best"


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--mode", choices=["soft", "fuzzy", "hard", "sft"], default="soft")
    parser.add_argument("--model", help="checkpoint directory; without it, a tiny model is made")
    parser.add_argument("--data", help=f"{', '.join(TASKS)} or PATH.jsonl")
    parser.add_argument("--out", help="directory for checkpoints and logs; default out/MODE")
    parser.add_argument("--steps", type=positive(int), help="updates")
    parser.add_argument("--prompts", type=positive(int), help="questions per update (B)")
    parser.add_argument("--samples", type=positive(int), help="samples per question (G)")
    parser.add_argument("--lr", type=positive(float), help="peak learning rate")
    parser.add_argument("--warmup", type=positive(int), help="steps of linear warm-up")
    parser.add_argument("--clip", type=positive(float), default=1.0, help="global gradient norm")
    parser.add_argument("--micro_batch", type=positive(int), help="rows per backward pass")
    parser.add_argument("--eval_every", type=positive(int), help="steps between validations")
    parser.add_argument("--val_size", type=positive(int), help="validation problems")
    parser.add_argument("--input_noise", type=float, help="sft: most noise on input embeddings, in RMS")
    parser.add_argument("--verifier", choices=["own", "math-verify"], default="own")
    parser.add_common()
    parser.run(main)

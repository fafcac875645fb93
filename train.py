"""
Train a language model to think in soft tokens: RLOO on continuous chains of thought.

    python train.py --mode soft    # a laptop, nothing to download: a tiny base, then RL, in minutes
    python train.py --mode soft --model path/to/Llama-3.2-3B-Instruct --data gsm8k
    torchrun --nproc_per_node 8 train.py --mode soft --model path/to/Llama-3.2-3B-Instruct
    python train.py --mode sft --model path/to/SmolLM2-135M --data gsm8k --lr 1e-4 --steps 120
    python train.py --mode soft --resume    # after a kill: the same command, and this flag

One step: sample G rows for each of B questions, reward them, subtract the mean of the others, score
the recorded actions again with gradients, update. Modes hard, soft and fuzzy differ in the action
only; mode sft replaces samples by reference solutions, and advantages by the mean over tokens.

Equation numbers are those of "Soft Tokens, Hard Truths" (arXiv 2509.19170). Dimensions: B questions
(--prompts), G samples of each (--samples), R = B G rows, r rows of this rank, N slots, D width.
"""
import contextlib
import fcntl
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.nn.utils.rnn import pad_sequence

from eval import (ARITHMETIC, TASKS, VERIFIERS, arithmetic_problem, arithmetic_split,
                  check_vocabulary, evaluate, judge, load_problems, worked_text)
from model import Config, InputError, Transformer, part_of, read_json, whole, write_json
from sample import (NOBODY, STOP, THOUGHT, TOKEN, TRAIN, Parser, Rollout, encode_after,
                    encode_prompts, generate, load, notes_with, positive)

# Presets: a flag that is not given takes its value from here
PAPER = dict(  # with --model
    data="gsm8k", steps=4000, prompts=2, samples=32, cot_len=128, answer_len=32, lr=6e-6, warmup=20,
    micro_batch=8, eval_every=100, val_size=128, dtype="bfloat16")
PAPER_SFT = PAPER | dict(steps=500, prompts=16, lr=1e-5)  # not in the paper: for small models
TINY = dict(  # without
    data="arithmetic", steps=120, prompts=32, samples=16, cot_len=32, answer_len=4, lr=1e-4,
    warmup=10, micro_batch=512, eval_every=40, val_size=512, dtype="float32")
TINY_FUZZY = TINY | dict(dtype="bfloat16")  # fuzzy thoughts learn from logits that tie
TINY_CONFIG = dict(
    model_type="llama", hidden_size=64, intermediate_size=192, num_hidden_layers=3, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-6,
    tie_word_embeddings=True, hidden_act="silu", rope_theta=10000.0, attention_bias=False,
    mlp_bias=False, architectures=["LlamaForCausalLM"], bos_token_id=None, eos_token_id=1)
TINY_SFT = TINY | dict(prompts=64, samples=1, lr=4e-3, warmup=50)  # the tiny base of a task
BASES = {"arithmetic": TINY_SFT | dict(steps=1200, eval_every=1200),
         "chains": TINY_SFT | dict(data="chains", steps=1600, eval_every=1600)}
READS = {"arithmetic": ["arithmetic"], "chains": ["chains", "chains", "arithmetic"]}  # its texts
FREE = {"resume", "out", "device", "micro_batch", "activation_checkpointing", "no_cuda_graphs"}
# flags that --resume may change: they move the result by rounding only


# ---- The method: reward, advantage, and the log-probs of what was sampled

def reward(verdict, row):
    """eq. 11: 100 for a correct answer, 10 for a wrong one in a closed box, 0 for none.

    A reward of your own goes here. verdict: "correct", "wrong", "error" (not read as mathematics)
    or "unparsed" (no closed box); row: a sample.Row, with its texts and lengths.
    """
    return {"correct": 100.0, "unparsed": 0.0}.get(verdict, 10.0)


def rloo(rewards):
    """eq. 12: each reward minus the mean of its group's other G - 1; (B, G) -> (B, G), G >= 2."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    all_equal = (rewards == rewards[:, :1]).all(1, keepdim=True)  # exactly 0, despite rounding
    return (rewards - others).masked_fill(all_equal, 0)


def score(model, rollout, rows, weight, noise_std):
    """Log-probs of the given rows (b,) of a rollout, computed again with gradients.

    weight (b,): d loss / d log pi of every action of a row. Returns the loss, a scalar, and
    |log pi now - log pi at sampling| in nats of the actions with a weight, (n,).
    """
    asked, of_row = rollout.of_row[rows].unique(return_inverse=True)
    N = int(rollout.chosen[rows].any(0).nonzero().max()) + 1  # the rest is padding
    chosen = rollout.chosen[rows, :N]
    weight = weight[:, None] * (chosen != NOBODY)  # forced words have weight 0
    loss, logp = model.log_prob(
        [rollout.prompts[q] for q in asked.tolist()], of_row, rollout.tokens[rows, :N],
        None if rollout.thoughts is None else rollout.thoughts[rows, :N], chosen == THOUGHT,
        weight, rollout.tau[rows, :N], noise_std)
    return loss, (logp - rollout.logp[rows, :N])[weight != 0].abs()


def learning_rate(step, args):
    """Linear warm-up, then a cosine that reaches 0 after the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * done))


def questions_of_step(problems, step, n, seed):
    """The n problems of a step: epochs in random order, a function of (seed, step) alone."""
    at = range(step * n, step * n + n)
    order = {epoch: np.random.default_rng((seed, epoch)).permutation(len(problems))
             for epoch in {i // len(problems) for i in at}}
    return [problems[order[i // len(problems)][i % len(problems)]] for i in at]


STATS = ("reward", "accuracy", "unparsed", "errors", "truncated", "cot_len", "entropy", "tokens")


def grade(rollout, problems, verifier):
    """The STATS of every row, (r, len(STATS)) float64; of reference solutions "tokens" alone."""
    stats = torch.zeros(len(problems), len(STATS), dtype=torch.float64)
    stats[:, -1] = (rollout.chosen != NOBODY).sum(1)
    for i, (row, p) in enumerate(zip(rollout.rows, problems)):
        verdict = judge(row.answer, p["answer"], verifier, p.get("error"))
        stats[i, :-1] = torch.tensor([
            reward(verdict, row), verdict == "correct", verdict == "unparsed", verdict == "error",
            row.truncated, row.cot_len, np.mean(row.entropy)])
    return stats


def reference_rollout(problems, model, tokenizer):
    """Reference solutions in the form of a rollout whose every token was chosen."""
    device, eos = model.embed_tokens.weight.device, model.notes["eos"][:1]
    texts = [torch.tensor(encode_after(tokenizer, worked_text(p)) + eos) for p in problems]
    tokens = pad_sequence(texts, batch_first=True).to(device)  # (R, N)
    chosen = pad_sequence([torch.full_like(t, TOKEN) for t in texts], batch_first=True).to(device)
    zeros = torch.zeros(tokens.shape, device=device)
    prompts = encode_prompts(tokenizer, model.notes, [p["question"] for p in problems],
                             tokens.shape[1], model.config)
    return Rollout(prompts, torch.arange(len(texts), device=device), tokens, None, chosen,
                   zeros + 1, zeros, zeros, rows=[])


# ---- The tiny base: a Llama of 150 thousand parameters that knows a little arithmetic

def write_tiny_model(path, seed):
    """Write a random tiny Llama and its tokenizer as an ordinary checkpoint directory."""
    words = ["<unk>", "<eos>", STOP, "\\boxed{", "User:", "Assistant:", *" }.;=+-*0123456789"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(rf"{STOP}|\\boxed\{{|User:|Assistant:|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    model = Transformer(Config.from_dict(TINY_CONFIG | {"vocab_size": len(words)}))
    # larger than usual: with tied embeddings of width 64, 0.02 learns four times slower
    model.init_weights(torch.Generator().manual_seed(seed), std=0.06)
    model.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    write_json(path / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False})
    write_json(path / "generation_config.json", {"eos_token_id": words.index("<eos>")})
    write_json(path / "soft_tokens.json", {"prompt": "User: {question} Assistant:"})


def written_problems(n, data, seed):
    """Training problems with solutions by careless writers. So the base is able, as it knows most
    facts, and undecided, as it often writes like the careless: what RL can change in a minute."""
    rng, problems = random.Random(seed), []
    while len(problems) < n:
        problem = arithmetic_problem(rng, rng.choice(READS[data]), careful=False)
        if arithmetic_split(problem["question"]) == "train":
            problems.append(problem)
    return problems


def tiny_base(args):
    """The directory of this seed's tiny base. If it is missing the first rank makes it in a process
    of its own, so that it is the same for any number of ranks."""
    data = args.data if args.data in BASES else "arithmetic"
    folder = Path("out") / f"base-{data}-{args.seed}"
    made = folder / "best" / "training" / "args.json"
    if made.exists() and not BASES[data].items() <= read_json(made).items():
        raise InputError(f"{folder}: not the tiny base as this code makes it; move or delete it")
    if dist.get_rank() == 0 and not (folder / "summary.json").exists():
        print("A tiny base is made first, and kept in out/ for later runs.", flush=True)
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        command = [sys.executable, __file__, "--mode", "sft", "--out", folder, "--resume",
                   "--data", data, "--seed", str(args.seed), "--device", args.device,
                   *["--no_cuda_graphs"] * args.no_cuda_graphs]
        if status := subprocess.run(command, env=alone).returncode:
            sys.exit(status)
    summed(0, args.device)  # wait for it
    return str(folder / "best")


# ---- Data, and several processes -------------------------------------

def load_data(args):
    """Problems to train on, and problems to validate on (the same for every seed)."""
    sft = args.mode == "sft"
    if args.data in ARITHMETIC:
        train = written_problems(20000, args.data, args.seed) if sft else load_problems(
            args.data, "train", 8192)
        val = load_problems(args.data, "val", args.val_size)
    else:
        problems = load_problems(args.data, "train")
        problems = random.Random(0).sample(problems, len(problems))
        val = problems[:args.val_size]
        asked = {p["question"] for p in val}  # some files hold a question twice
        train = [p for p in problems[args.val_size:] if p["question"] not in asked]
        if not train:
            raise InputError(f"--val_size {args.val_size}: it leaves none of {len(problems)} to "
                             "train on; use fewer")
    if sft and not all(p["solution"] for p in train):
        raise InputError(f"--data {args.data}: without solutions there is nothing to imitate; give "
                         "a file that has them")
    return train, val


def join_ranks(args):
    """Join the processes that torchrun has started; a single one forms a group by itself."""
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    backend = "gloo"
    if args.device.startswith("cuda"):
        backend, local = "nccl", int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise InputError(f"--nproc_per_node: more than the {torch.cuda.device_count()} GPUs")
        if "RANK" in os.environ or args.device == "cuda":
            args.device = f"cuda:{local}"
        torch.cuda.set_device(args.device)
    if not dist.is_initialized():
        dist.init_process_group(backend, **alone, timeout=timedelta(hours=1))  # saving is slow


def summed(values, device):
    """A tensor or list, summed over the ranks in float64, on the host."""
    where = device if device.startswith("cuda") else "cpu"  # gloo knows no other devices
    values = torch.as_tensor(values, dtype=torch.float64, device=where)
    dist.all_reduce(values)
    return values.cpu()


def shard(model, args):
    """FSDP2 shards float32 masters over the ranks, since updates of size 6e-6 would round away in
    bfloat16; it gathers them in --dtype to compute, and sums the gradients in float32."""
    world = dist.get_world_size()
    if world > 1 or args.dtype != "float32":
        mesh = init_device_mesh(args.device.split(":")[0], (world,))
        policy = MixedPrecisionPolicy(
            getattr(torch, args.dtype), torch.float32, cast_forward_inputs=False)
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
            module.set_gradient_divide_factor(1.0)  # the sum over ranks, not the mean, and by
            module.set_force_sum_reduction_for_comms(True)  # ReduceOp.SUM, which all backends know
        register_fsdp_forward_method(model, "log_prob")  # like forward, it finds weights gathered


@contextlib.contextmanager
def gathered(model):
    """Inside, every rank has whole weights, so ranks may take different numbers of steps."""
    sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for m in sharded:
        m.unshard()
    yield
    for m in sharded:
        m.reshard()


# ---- Checkpoints: OUT/best to deploy, OUT/last to resume from; both are Hugging Face directories

def save(out, model, optimizer, source, args, state, is_best):
    """Write OUT/last, with float32 weights and in training/ what --resume needs; and OUT/best.

    All ranks call this together. The first one writes, and holds all of it in host memory, which is
    12 bytes per parameter. source: where the tokenizer is.
    """
    first, new = dist.get_rank() == 0, out / "last.new"

    def on_host(named):  # gathered one by one
        named = ((name, whole(tensor).detach()) for name, tensor in named)
        return {name: tensor.cpu() for name, tensor in named if first}
    weights = on_host(model.named_parameters())
    moments = on_host((f"{name}.{key}", tensor) for name, p in model.named_parameters()
                      for key, tensor in optimizer.state[p].items())
    if not first:
        return
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed here
    (new / "training").mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model") and ".index." not in file.name:
            shutil.copyfile(file, new / file.name)
    try:
        model.save_pretrained(new, weights, args.dtype)
        save_file(moments, new / "training" / "optimizer.safetensors")
    except SafetensorError as e:
        raise InputError(f"{new}: not written ({e}); make room, and use --resume") from None
    write_json(new / "training" / "state.json", state)
    write_json(new / "training" / "args.json", vars(args))
    gone = {"eos", "bos"} | ({"rms"} if args.mode == "sft" else set())
    write_json(new / "soft_tokens.json", {k: v for k, v in model.notes.items() if k not in gone})
    for name in ["best"] * is_best + [f"step-{state['step']:06d}"] * args.keep:
        copy = out / f"{name}.new"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(new, copy, copy_function=os.link,  # as nobody changes the files
                        ignore=shutil.ignore_patterns("optimizer.safetensors"))
        put(copy, out / name)
    put(new, out / "last")


def put(new, path):
    """Rename a complete directory to path, replacing an older one. A kill at any moment leaves one
    of the two whole, as `path` or as .old."""
    os.sync()
    old = path.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def restore(path, model, optimizer):
    """AdamW's state as save() left it, bit for bit; weights are loaded like any others."""
    saved = load_file(path / "training" / "optimizer.safetensors")  # empty before the first step
    for name, p in model.named_parameters() if saved else ():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            tensor = saved[f"{name}.{key}"].to(p.device)
            optimizer.state[p][key] = tensor if key == "step" else part_of(tensor, p).clone()
    return read_json(path / "training" / "state.json")


def open_log(out, step):
    """OUT/log.jsonl, cut before the given step, open for more, and locked against other runs."""
    log = open(out / "log.jsonl", "a+")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"--out {out}: another run is at work there; use another") from None
    log.seek(0)
    kept = [line for line in log if line[-1] == "\n" and json.loads(line)["step"] < step]
    log.truncate(sum(map(len, kept)))
    return log


# ---- Training --------------------------------------------------------

def listen():
    """A list that fills when Ctrl-C, SIGTERM or SIGHUP asks the run to save and end."""
    asked = []

    def handler(number, _):  # torchrun passes a first Ctrl-C on a second time
        if number == signal.SIGINT and asked and time.monotonic() - asked[0] > 1:
            raise KeyboardInterrupt
        asked.append(time.monotonic())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)
    return asked


def validate(model, tokenizer, val, args):
    """Greedy accuracy, {setting: share}: in the mode's own tokens, and in hard ones."""
    accuracy, part = {}, val[dist.get_rank()::dist.get_world_size()]
    for mode in dict.fromkeys(("hard" if args.mode == "sft" else args.mode, "hard")):
        with gathered(model):
            samples = evaluate(model, tokenizer, part, f"{mode}_greedy", verifier=args.verifier,
                               batch=max(64, args.micro_batch), progress=dist.get_rank() == 0)
        n_correct = sum(s["verdict"] == "correct" for s in samples)
        accuracy[f"{mode}_greedy"] = summed(n_correct, args.device).item() / len(val)
    texts = Counter(s["answer"] for s in samples if s["answer"])  # of hard tokens
    copied = sum(n for text, n in texts.items() if "[answer]" in text)  # from the prompt
    if max(copied, *texts.values(), 0) > max(2, len(part) / 2):
        say("note: most answers are alike, or copy [answer] from the prompt; give worked examples\n"
            "  by --prompt_file, or let the model imitate solutions first, by --mode sft")
    return accuracy


def train(args, problems, val):
    # Model, data, optimizer; to resume is to begin from OUT/last
    rank, world = dist.get_rank(), dist.get_world_size()
    sft, out = args.mode == "sft", Path(args.out)
    source = out / "last" if args.resume else Path(args.model)
    say(f"loading {source} ...")
    model, tokenizer = load(source, torch.float32, args.device, args.prompt_file,
                            lambda model: shard(model, args))
    model.activation_checkpointing = args.activation_checkpointing
    model.notes = notes_with(model.notes, args, "hard" if sft else args.mode)
    noise_std = model.notes["noise_scale"] * model.notes["rms"]  # sigma of eq. 6
    check_vocabulary(tokenizer, problems + val)
    n_new = args.cot_len + args.answer_len + 16  # with the forced words
    encode_prompts(tokenizer, model.notes, [p["question"] for p in problems + val], n_new,
                   model.config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    state = restore(source, model, optimizer) if args.resume else {"step": -1, "validated": {}}
    out.mkdir(parents=True, exist_ok=True)
    log = open_log(out, state["step"]) if rank == 0 else None
    if rank == 0:
        (out / "summary.json").unlink(missing_ok=True)  # it says that a run is complete
        (out / "val.jsonl").write_text("".join(json.dumps(p) + "\n" for p in val), encoding="utf-8")
    G, R, own = args.samples, args.prompts * args.samples, f"{'hard' if sft else args.mode}_greedy"
    shares = [range(R * k // world, R * (k + 1) // world) for k in range(world)]
    mine = shares[rank]  # this rank's rows, maybe a part of a group
    asked_to_stop, shown = listen(), 0.0

    for step in range(max(0, state["step"]), args.steps + 1):
        # Evaluate and save: before the first step, every so often, after the last; or on request
        stop = summed(len(asked_to_stop), args.device).item() > 0
        validated = state["validated"]  # {step: {setting: accuracy}}
        due = step % args.eval_every == 0 or step == args.steps
        due = due and not stop and str(step) not in validated
        if due:
            say(f"validating on {len(val)} problems ...")
            validated[str(step)] = accuracy = validate(model, tokenizer, val, args)
            say(f"step {step}: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in accuracy.items()))
        best = max(map(int, validated), key=lambda s: (validated[str(s)][own], s), default=None)
        if due or stop and step > state["step"]:
            state["step"] = step
            save(out, model, optimizer, source, args, state, best == step)
        if stop or step == args.steps:
            break
        clock = time.perf_counter()

        # 1. Sample G rows for each question, or read their reference solutions
        batch = questions_of_step(problems, step, args.prompts, args.seed)
        if sft:
            rollout = reference_rollout([batch[i] for i in mine], model, tokenizer)
        else:
            with gathered(model):
                rollout = generate(
                    model, tokenizer, [p["question"] for p in batch], args.mode, G, rows=mine,
                    answer_greedy=False, store_thoughts=args.mode != "hard",
                    seed=(TRAIN, args.seed, step))

        # 2. Reward (eq. 11): a line of figures for each row, from the rank that has it
        stats = torch.zeros(R, len(STATS), dtype=torch.float64)
        stats[mine] = grade(rollout, [batch[i // G] for i in mine], args.verifier)
        stats = summed(stats, args.device)
        generate_s, clock = time.perf_counter() - clock, time.perf_counter()

        # 3. Advantage (eq. 12), and from it d loss / d log pi of all of a row's actions (eq. 14)
        if sft:
            weight = torch.full((R,), -1 / stats[:, -1].sum())  # cross-entropy per token
        else:
            weight = -rloo(stats[:, 0].view(-1, G)).flatten() / R

        # 4. Log-prob, with gradients, of the rows with an advantage; as many passes on every rank
        todo = [[i for i in share if weight[i] != 0] for share in shares]
        rows = sorted(todo[rank], key=lambda i: (i // G, stats[i, -1]))
        n_passes, loss, deltas = max(-(-len(t) // args.micro_batch) for t in todo), 0.0, []
        for k in range(n_passes):
            some = rows[k * args.micro_batch:(k + 1) * args.micro_batch]
            used = torch.tensor(some or mine[:1])  # a rank without rows runs at weight 0
            w = weight[used].float().to(args.device) * bool(some)
            part, delta = score(model, rollout, (used - mine.start).to(args.device), w, noise_std)
            part.backward()
            loss, deltas = loss + part.item(), deltas + delta.tolist()

        # 5. Update
        optimizer.param_groups[0]["lr"] = lr = learning_rate(step, args)
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)).item()
        if math.isfinite(grad_norm):  # 0 where no group had two different rewards
            optimizer.step()
        optimizer.zero_grad()

        # 6. Log
        loss, n_deltas, delta = summed([loss, len(deltas), sum(deltas)], args.device).tolist()
        train_s = time.perf_counter() - clock
        line = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr}
        if not sft:
            line |= dict(zip(STATS, stats.nanmean(0).tolist())) | {
                "zero_advantage": (weight.view(-1, G) == 0).all(1).double().mean().item(),
                "delta_logp": delta / max(1, n_deltas)}
        line |= {"generate_s": generate_s, "train_s": train_s,
                 "tokens_per_s": stats[:, -1].sum().item() / (generate_s + train_s),
                 "peak_gb": torch.cuda.max_memory_allocated() / 1e9}  # 0 without a GPU
        if rank == 0:
            line = {k: v if math.isfinite(v) else None for k, v in line.items()}  # no NaN in JSON
            print(json.dumps(line), file=log, flush=True)
        if not sft or time.perf_counter() - shown > 3 or step + 1 == args.steps:
            shown = time.perf_counter()
            say(f"step {step + 1}/{args.steps}  " + (
                f"loss {loss:.4f}  gradient {grad_norm:.3g}" if sft else
                f"right {100 * line['accuracy']:5.1f} %  reward {line['reward']:5.1f}  thought "
                f"{line['cot_len']:.0f} tokens  entropy {line['entropy']:.3f}")
                + f"  {generate_s + train_s:.1f} s")

    # What was gained, and what to do next; OUT/summary.json tells that the run is complete
    if str(args.steps) not in validated:
        return say(f"Stopped at step {state['step']}; the same command with --resume goes on.")
    base, final = validated["0"], validated[str(args.steps)]
    if rank == 0:
        write_json(out / "summary.json", {
            "base": base, "final": final, "best": validated[str(best)], "best_step": best,
            "validated": validated, "checkpoint": str(out / "best"), "steps": args.steps})
    for name in base:
        say(f"{name}: {100 * base[name]:.1f} % before, {100 * final[name]:.1f} % after")
    if Path(args.model) != out / "init":  # not for a tiny base, whose run is a part of another
        data = args.data if args.data in (*ARITHMETIC, "gsm8k") else out / "val.jsonl"
        say(f"The best checkpoint, of step {best}, is in {out / 'best'}. Next:\n"
            f"  python eval.py --model {out / 'best'} --data {data} --settings all "
            f"--dtype {args.dtype}")


def say(text):
    """Print a line, on the first rank only, and flush it in case the output is a file."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def configure(args):
    """Fill in missing flags, from the run in OUT with --resume, else from a preset. Flags with a
    default, like --seed, must be given again with --resume."""
    args.out = args.out or f"out/{args.mode}"
    last, best = Path(args.out) / "last", Path(args.out) / "best"
    for path in (last, best):  # a kill may have come between two renames
        with contextlib.suppress(OSError):  # it did not, or another rank was faster
            path.with_suffix(".old").replace(path)
    if last.exists() and not args.resume:
        raise InputError(f"--out {args.out}: holds a run; add --resume to go on with it, or give "
                         "another --out")
    args.resume = last.exists()
    preset = TINY_FUZZY if args.mode == "fuzzy" else TINY
    if args.mode == "sft":
        preset = PAPER_SFT if args.model else BASES.get(args.data, BASES["arithmetic"])
    elif args.model:
        preset = PAPER
    given = {flag: value for flag, value in vars(args).items() if value is not None}
    if args.resume:
        preset = read_json(last / "training" / "args.json")
        for flag in preset.keys() & given.keys() - FREE:
            if given[flag] != preset[flag]:
                raise InputError(f"--{flag} {given[flag]}: the run in {args.out} has "
                                 f"{preset[flag]}; resume it with that, or give another --out")
    vars(args).update(preset | given)
    args.samples = 1 if args.mode == "sft" else args.samples  # one reference solution
    if args.samples == 1 and args.mode != "sft":
        raise InputError("--samples 1: RLOO compares the samples of a question; use 2 or more")
    if min(args.prompts * args.samples, args.val_size) < int(os.environ.get("WORLD_SIZE", 1)):
        raise InputError(f"--prompts {args.prompts} --samples {args.samples} --val_size "
                         f"{args.val_size}: fewer than the ranks; use more, or fewer ranks")
    if not args.model and args.data in TASKS and args.data not in ARITHMETIC:
        raise InputError(f"--data {args.data}: the tiny model knows {', '.join(ARITHMETIC)} and "
                         "files of your own; choose from these, or add --model")


def main(args):
    configure(args)
    judge("1", "1", args.verifier)  # is it installed?
    join_ranks(args)
    problems, val = load_data(args)  # mistakes there show before the long work
    if not args.model and args.mode != "sft":
        args.model = tiny_base(args)
    elif not args.model:
        args.model = str(Path(args.out) / "init")
        if dist.get_rank() == 0:
            write_tiny_model(Path(args.model), args.seed)
        summed(0, args.device)  # wait for it
    train(args, problems, val)


if __name__ == "__main__":
    parser = Parser(__doc__)
    add = parser.add_argument_group("training (defaults: tiny model / with --model)").add_argument
    add("--mode", choices=["soft", "fuzzy", "hard", "sft"], default="soft",
        help="how it thinks; sft: imitate reference solutions; default soft")
    add("--data", help="a task of eval.py, or a file; default arithmetic / gsm8k")
    add("--out", metavar="DIR", help="for checkpoints and logs; default out/MODE")
    add("--steps", type=positive(int), help="updates; default 120 / 4000, sft 1200 / 500")
    add("--prompts", type=positive(int), help="questions per update (B); default 32 / 2")
    add("--samples", type=positive(int), help="samples per question (G); default 16 / 32")
    add("--lr", type=positive(float), help="peak learning rate; default 1e-4 / 6e-6")
    add("--warmup", type=positive(int), help="steps of linear warm-up; default 10 / 20")
    add("--clip", type=positive(float), default=1.0, help="global gradient norm; default 1.0")
    add("--micro_batch", type=positive(int), help="rows per backward pass; default 512 / 8")
    add("--eval_every", type=positive(int), help="steps between validations; default 40 / 100")
    add("--val_size", type=positive(int), help="validation problems; default 512 / 128")
    add("--verifier", choices=VERIFIERS, default="own", help="who compares answers; default own")
    add("--activation_checkpointing", action="store_true",
        help="keep less for the backward pass, and compute it again")
    add("--keep", action="store_true", help="keep every checkpoint, as OUT/step-N")
    add("--resume", action="store_true", help="go on with the run in OUT, if there is one")
    parser.run(main)
    dist.destroy_process_group()

"""
Train a language model to think in soft tokens: RLOO on continuous chains of thought.

    python train.py --mode soft    # a laptop, nothing to download: a tiny base, then RL, in minutes
    python train.py --mode soft --model path/to/Llama-3.2-3B-Instruct --data gsm8k
    torchrun --nproc_per_node 8 train.py --mode soft --model path/to/Llama-3.2-3B-Instruct
    python train.py --mode sft --model path/to/SmolLM2-135M --data gsm8k --lr 1e-4 --steps 120
    python train.py --mode soft --resume    # after a kill: the same flags, and this one

One step: sample G rows for each of B questions, reward them, subtract the mean of the others, score
the recorded actions again with gradients, update. Modes hard, soft and fuzzy differ in the action
only; mode sft puts reference solutions in the place of samples, and in that of the advantage 1 / n.

Equation numbers are those of "Soft Tokens, Hard Truths" (arXiv 2509.19170). Dimensions: B questions
(--prompts), G samples of each (--samples), R = B G rows, b rows of a micro-batch, T positions,
D width.
"""
import contextlib
import fcntl
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
import zlib
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from eval import (ARITHMETIC, FILES, TASKS, VERIFIERS, arithmetic_problem, arithmetic_split, ask,
                  evaluate, judge, load_problems, worked_text)
from model import Config, InputError, Transformer, WeightedLogProb, read_json
from sample import (MODES, NOISE_SCALE, NONE, PLACEMENTS, STOP, THOUGHT, TOKEN, Parser, Rollout,
                    Watch, encode, forced_tokens, generate, load, noise_std_of, positive)

# Presets: a flag that is not given takes its value from here
PAPER = dict(  # with --model
    data="gsm8k", steps=4000, prompts=2, samples=32, cot_len=128, answer_len=32, lr=6e-6, warmup=20,
    micro_batch=8, eval_every=100, val_size=128, dtype="bfloat16", clip=1.0)
PAPER_SFT = PAPER | dict(steps=500, prompts=16, lr=1e-5)  # not in the paper: for small models
TINY = dict(  # without
    data="arithmetic", steps=120, prompts=32, samples=16, cot_len=32, answer_len=4, lr=1e-4,
    warmup=10, micro_batch=512, eval_every=40, val_size=512, dtype="float32", clip=1.0)
TINY_SFT = TINY | dict(  # and its base
    steps=1200, prompts=64, samples=1, lr=4e-3, warmup=50, eval_every=1200)
TINY_CONFIG = dict(
    model_type="llama", hidden_size=64, intermediate_size=192, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    tie_word_embeddings=True, rope={"rope_type": "default", "rope_theta": 10000.0})
TINY_FUZZY = TINY | dict(lr=1e-5)  # thoughts move little, and what moves is E: slower is steadier
CARELESS = 0.5  # how often the writers of the tiny base's texts take a sign for a plus

# What is recorded of every row, and averaged over the rows for the log
STATS = ("tokens", "reward", "correct", "unparsed", "truncated", "cot_len", "entropy", "eos")
PLAN_PROMPT_LEN = 160  # tokens of a prompt that --plan reckons with
ENTROPY_EVERY = 8  # slots between two measurements of the entropy: it costs a pass over V
MAX_SKIPPED = 5  # steps in a row whose gradient is not finite
RESUME_WITH_OTHER = {  # flags that --resume may change: but for a device of another kind, which
    # draws other numbers, they move the result by rounding only
    "out", "device", "micro_batch", "shard_size", "activation_checkpointing", "keep", "max_drift",
    "log_grad_sources", "resume", "plan", "audit"}


# --------------------------------------------------------------------------------------------------
# The method: reward, advantage, and the rows that are scored

def reward(answer, gold, verifier="own"):
    """eq. 11: 100 for a correct answer, 10 for a wrong one in a closed box, 0 for none."""
    if answer is None:
        return 0.0
    return 100.0 if judge(answer, gold, verifier) == "correct" else 10.0


def rloo(rewards):
    """eq. 12: each reward minus the mean of its group's other G - 1; (B, G) -> (B, G), G >= 2."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def pack(rollout, rows):
    """The given rows (b,) of a rollout as one batch, its slots padded at the right.

    Returns what Transformer.log_prob wants: prompts; of_row (b,); tokens (b, N); thoughts (b, N, D)
    or None; their support (b, N, k) or None; then kind (b, N), NONE in padding; in_cot (b, N) bool;
    logp (b, N) at sampling time.
    """
    asked, of_row = rollout.of_row[rows].unique(return_inverse=True)
    N = int(rollout.length[rows].max())

    def of_rows(stored):  # (R, C, ...), the slots of the thought alone, or None
        if stored is not None:
            part = stored[rows, :N]
            return F.pad(part, (0, 0, 0, N - part.shape[1]))
    in_cot = torch.arange(N, device=rows.device) < rollout.cot_len[rows, None]
    prompts = [rollout.prompts[q] for q in asked.tolist()]
    return (prompts, of_row, rollout.tokens[rows, :N], of_rows(rollout.thoughts),
            of_rows(rollout.support), rollout.kind[rows, :N], in_cot, rollout.logp[rows, :N])


def score(model, rollout, rows, weight, temperature, noise_std, grad_source=None):
    """The loss of some rows (b,) of a rollout, with gradients, and how far off their log-probs are.

    weight (b,) float32: d loss / d log pi of every action of a row; temperature of the thought.
    grad_source: "logits" or "embedding" for what comes from the thought that way alone, "answer";
    None for all. Returns the scalar loss; the log-probs less those at sampling time (b, N); and
    where these count, (b, N) bool.
    """
    *packed, support, kind, in_cot, sampled_logp = pack(rollout, rows)
    chosen = (kind == TOKEN) | (kind == THOUGHT)  # forced tokens have weight 0
    part = chosen if grad_source is None else chosen & (in_cot ^ (grad_source == "answer"))
    loss, logp = model.log_prob(
        *packed, kind == THOUGHT, weight[:, None] * part, torch.where(in_cot, temperature, 1.0),
        noise_std, None if grad_source == "answer" else grad_source, rollout.noise_at, support)
    return loss, logp - sampled_logp, part & (weight[:, None] != 0)


def reference_rollout(problems, tokenizer, notes, device):
    """Reference solutions in the form of a rollout whose every token was chosen."""
    prompts = ask(notes, problems)
    tokens = [tokenizer.encode(worked_text(p), add_special_tokens=False).ids for p in problems]
    tokens = [torch.tensor(t + notes["eos"][:1], device=device) for t in tokens]
    padded = pad_sequence(tokens, batch_first=True)  # (R, N)
    length = torch.tensor([len(t) for t in tokens], device=device)
    slot = torch.arange(padded.shape[1], device=device)
    return Rollout(
        prompts=[tokenizer.encode(p).ids for p in prompts],
        of_row=torch.arange(len(prompts), device=device), tokens=padded, length=length,
        kind=torch.where(slot < length[:, None], TOKEN, NONE).to(torch.uint8),
        logp=torch.zeros(padded.shape, device=device), entropy=None, thoughts=None,
        support=None, noise_at="embedding", cot_len=torch.zeros_like(length),
        truncated=length < 0, cots=[], answers=[])


def learning_rate(step, args):
    """Linear warm-up, then a cosine that reaches 0 after the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * done))


def hold_out(problems, n):
    """n problems for validation, the same for every seed, and those to train on: the others, less
    what repeats a question of these (MAWPS holds some twice)."""
    problems = random.Random(0).sample(problems, len(problems))
    val = problems[:n]
    asked = {p["question"] for p in val}
    return val, [p for p in problems[n:] if p["question"] not in asked]


def questions_of_step(problems, step, n, seed):
    """The n problems of a step: epochs in random order, a function of (seed, step) alone."""
    at = range(step * n, step * n + n)
    order = {epoch: np.random.default_rng((seed, epoch)).permutation(len(problems))
             for epoch in {i // len(problems) for i in at}}
    return [problems[order[i // len(problems)][i % len(problems)]] for i in at]


# --------------------------------------------------------------------------------------------------
# The tiny base: a Llama of 150 thousand parameters that knows a little arithmetic

def written_problem(rng):
    """A training problem with a solution by a writer who is careful only half of the time.

    So the base is able (it knows all the facts) and undecided (it often writes like the careless):
    that is where a pretrained language model stands too, and what RL can change within a minute.
    """
    while True:
        p = arithmetic_problem(rng, rng.choice([*ARITHMETIC]), CARELESS)
        if arithmetic_split(p["question"]) == "train":
            return p


def write_tiny_model(path, seed):
    """Write a random tiny Llama and its tokenizer as an ordinary checkpoint directory."""
    words = ["<unk>", "<eos>", STOP, "\\boxed{", "User:", "Assistant:", *" }.;=+-*0123456789"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(rf"{STOP}|\\boxed\{{|User:|Assistant:|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    model = Transformer(Config(**TINY_CONFIG, vocab_size=len(words)))
    # larger than usual: with tied embeddings of width 64, 0.02 learns four times slower
    model.init_weights(torch.Generator().manual_seed(seed), std=0.06)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    for name, content in {
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>",
                "unk_token": "<unk>", "clean_up_tokenization_spaces": False},
            "generation_config.json": {"eos_token_id": words.index("<eos>")},
            "soft_tokens.json": {"prompt": "User: {question} Assistant:"}}.items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n")
    model.save_pretrained(path)


def tiny_base(args):
    """The directory of this seed's tiny base, which --mode sft of this file trains if need be."""
    folder = Path("out") / f"base-{args.seed}"
    made = folder / "best" / "args.json"
    fits = made.exists() and TINY_SFT.items() <= read_json(made).items()
    if checkpoints(folder) and not fits:
        raise InputError(f"{folder}: not the tiny base as this code makes it; move or delete it")
    ready = fits and (folder / "summary.json").exists()
    ready = over_ranks(ready, args.device, "MAX").item()  # all look before one of them acts
    if not ready and not main(Namespace(**{k: None for k in vars(args)} | {
            "mode": "sft", "out": str(folder), "verifier": "own", "keep": 1, "resume": True,
            "seed": args.seed, "device": args.device, "noise_at": "embedding", "noise_top_k": 0})):
        sys.exit(0)  # interrupted
    return folder / "best"


# --------------------------------------------------------------------------------------------------
# Weights: float32 masters, compute in --dtype; one process, or FSDP2 over several

def join_ranks(args):
    """Join the process group that torchrun announces: (rank, world size), (0, 1) without it."""
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        return 0, 1
    if not dist.is_initialized():
        if args.device.startswith("cuda"):
            local, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= here:
                raise InputError(f"--nproc_per_node: more than the {here} GPUs here; use {here}")
            args.device = f"cuda:{local}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo",
                                timeout=timedelta(hours=1))  # one rank writes the checkpoints
    return dist.get_rank(), dist.get_world_size()


def full(tensor):
    """A tensor whole; if FSDP shards it, it is gathered, and all ranks must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def over_ranks(values, device, op="SUM"):
    """The values of all ranks reduced into one: "SUM" or "MAX" of tensors or lists, on the host."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        values = values.to(device)
        dist.all_reduce(values, getattr(dist.ReduceOp, op))
    return values.cpu()


def distribute(model, dtype, device, shard_size=None):
    """Prepare the float32 model for training in dtype; returns {name: float32 master parameter}.

    One process: the model computes in dtype, and each backward pass hands its gradients to float32
    masters (in float32 the parameters themselves), where updates of size 6e-6 do not round away.
    Several: FSDP2 keeps a shard of the masters on every rank and casts as it gathers; with
    shard_size, a divisor of the number of ranks, every so many ranks hold a whole copy (HSDP).
    """
    if dist.is_initialized():
        ranks = dist.get_world_size()
        shard_size = shard_size or ranks
        shape, names = (ranks // shard_size, shard_size), ("replicate", "shard")
        if shard_size == ranks:
            shape, names = shape[1:], names[1:]
        mesh = init_device_mesh(device.split(":")[0], shape, mesh_dim_names=names)
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        for method in ("read", "log_prob"):
            register_fsdp_forward_method(model, method)
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


@contextlib.contextmanager
def gathered(model):
    """While this context is open, an FSDP model's parameters are whole on every rank, and a forward
    pass communicates nothing: ranks may take different numbers of steps."""
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]  # the root first
    for m in modules:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    yield
    for i, m in enumerate(modules):
        m.set_reshard_after_forward(i > 0, recurse=False)
        m.reshard()


def peak_memory_gb(device):
    """Peak memory of this process in GB: of the GPU if there is one, else resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1e9 if sys.platform == "darwin" else 1e6  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# --------------------------------------------------------------------------------------------------
# Checkpoints: OUT/step-N is a Hugging Face directory, and holds in training/ what --resume needs

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n")


def manifest(path):
    """{name: [size in bytes, SHA-256]} of the files below a directory."""
    found = {}
    for file in path.rglob("*"):
        if file.is_file():
            digest = hashlib.sha256()
            with open(file, "rb") as f:
                while block := f.read(1 << 20):
                    digest.update(block)
            found[str(file.relative_to(path))] = [file.stat().st_size, digest.hexdigest()]
    return found


def on_disk(path):
    """Wait until a file or folder has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def checkpoints(out):
    """The complete checkpoints in OUT, oldest first."""
    return [path for path in sorted(out.glob("step-*")) if not path.suffix]


def save_checkpoint(path, model, masters, optimizer, state, source, notes, args, rank=0):
    """Write OUT/step-N as transformers and vLLM load it, with training/: complete, or not at all.

    state: plain values, with "step". source: where the tokenizer and generation files are copied
    from. All ranks call this together, and the first one writes.
    """
    def whole(tensors, dtype=torch.float32):  # on the first rank's host, gathered one by one
        tensors = ((name, full(tensor)) for name, tensor in tensors.items())
        return {name: tensor.detach().to("cpu", dtype) for name, tensor in tensors if rank == 0}

    new, old = path.with_suffix(".new"), path.with_suffix(".old")
    training = new / "training"
    if rank == 0:
        for leftover in path.parent.glob("step-*.*"):  # of a run that was killed
            shutil.rmtree(leftover)
        training.mkdir(parents=True)
    try:
        tensors = whole(masters, getattr(torch, args.dtype))
        if rank == 0:
            for file in Path(source).iterdir():
                if file.suffix in (".json", ".jinja", ".txt") and ".index." not in file.name:
                    shutil.copyfile(file, new / file.name)
            model.save_pretrained(new, tensors)
        moments = {moment: {name: optimizer.state[m][moment] for name, m in masters.items()
                            if m in optimizer.state} for moment in MOMENTS}
        for part, tensors in {"masters": masters, **moments}.items():
            tensors = whole(tensors)
            if rank == 0:
                save_file(tensors, training / f"{part}.safetensors")
        if rank:
            return
        write_json(new / "soft_tokens.json", {k: v for k, v in notes.items() if k != "eos"})
        write_json(new / "args.json", vars(args))
        updates = next((int(s["step"]) for s in optimizer.state.values()), 0)
        write_json(training / "state.json", state | {"updates": updates})
        write_json(training / "manifest.json", manifest(new))
        for file in (*new.rglob("*"), new):
            on_disk(file)
    except BaseException:  # a full disk, say: give back what was taken
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():  # damaged, and gone around
        path.rename(old)
    new.rename(path)
    on_disk(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def point(link, path):
    """Make a symbolic link lead to its neighbour `path`, at no moment to nowhere."""
    new = link.with_suffix(".new")
    new.unlink(missing_ok=True)
    new.symlink_to(path.name)
    new.replace(link)


def damaged_file(path):
    """A file of a checkpoint that is not as the manifest says, or the manifest; None if all are."""
    file, found = path / "training" / "manifest.json", manifest(path)
    try:
        expected = read_json(file)
    except InputError:
        return file
    if "training/state.json" not in expected:
        return file
    return next((path / name for name in expected if found.get(name) != expected[name]), None)


def newest_checkpoint(out):
    """The newest checkpoint of OUT that is as it was written, or None where there is none.

    Names on stderr those that it goes around; raises InputError if that is all of them.
    """
    for path in reversed(checkpoints(out)):
        damaged = damaged_file(path)
        if not damaged:
            return path
        print(f"{damaged}: damaged or missing; going back to the checkpoint before it",
              file=sys.stderr)
    if checkpoints(out):
        raise InputError(f"--resume: every checkpoint in {out} is damaged; begin another --out")


@torch.no_grad()
def restore(path, masters, optimizer):
    """Load weights and optimizer from OUT/step-N, bit for bit; returns the state saved there."""
    training = path / "training"
    state = read_json(training / "state.json")
    for part in ("masters", *MOMENTS):
        with safe_open(training / f"{part}.safetensors", framework="pt") as f:
            for name in f.keys():
                master, tensor = masters[name], f.get_tensor(name)
                tensor = tensor.to(master.device)
                if isinstance(master, DTensor):
                    tensor = distribute_tensor(tensor, master.device_mesh, master.placements)
                if part == "masters":
                    master.copy_(tensor)
                else:
                    updates = torch.tensor(float(state["updates"]), device=master.device)
                    optimizer.state[master] |= {part: tensor, "step": updates}
    return state


def open_log(path, step):
    """OUT/log.jsonl, cut behind its first `step` lines, and open for the next; nobody else may have
    it open, or two runs would write the same checkpoints (a killed torchrun leaves its ranks)."""
    log = open(path, "a+")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"--out {path.parent}: another run is at work there; wait for it, or end "
                         "it, or give another --out") from None
    log.seek(0)
    log.truncate(len("".join(log.readlines()[:step])))
    return log


# --------------------------------------------------------------------------------------------------
# What a run will take

def memory(args, model, ranks, micro_batch):
    """Memory of one of so many ranks, {what: bytes}; a prompt counts PLAN_PROMPT_LEN tokens.

    The model may be on the meta device. "activations" is what a micro-batch keeps for its backward
    pass. Generation and scoring take turns, so the "peak" is all that is always there (weights,
    which are float32, gradients, optimizer, thoughts) plus the larger of the two.
    """
    config = model.config
    n, block = (sum(p.numel() for p in m.parameters()) for m in (model, model.layers[0]))
    w, D, I, L = (getattr(torch, args.dtype).itemsize, config.hidden_size, config.intermediate_size,
                  config.num_hidden_layers)
    heads, kv = (k * config.head_dim for k in (
        config.num_attention_heads, config.num_key_value_heads))
    tables = config.vocab_size * D * (1 if config.tie_word_embeddings else 2)
    P = PLAN_PROMPT_LEN
    N = args.cot_len + args.answer_len + 12  # and the forced words
    rows = -(-args.prompts * args.samples // ranks)
    rows_of_prompt = min(args.samples, rows)
    b, prompts = min(micro_batch, rows), -(-min(micro_batch, rows) // rows_of_prompt)

    fixed = {"weights": 4 * n / ranks, "gradients": 4 * n / ranks, "optimizer": 8 * n / ranks,
             "thoughts": rows * args.cot_len * D * w if args.mode in ("soft", "fuzzy") else 0}
    whole = 0 if ranks == 1 and w == 4 else n * w  # of the copy that computes
    generation = {
        "copy that generates": whole, "logits": rows * config.vocab_size * (4 + 2 * w),
        "cache": 2 * L * kv * w * (rows // rows_of_prompt * P + rows * (N + 64))}
    positions = prompts * P + b * N
    norm = 2 * w if args.device.startswith("cuda") else 16  # its fused kernel keeps less
    layer = (positions * (w * (2 * D + 3 * heads + 2 * kv + 4 * I) + norm * D)
             + b * (P + N) * w * (2 * kv + N * heads // kv))  # keys, values and mask of whole rows
    kept = positions * w * (D + 2 * kv) if args.activation_checkpointing else layer
    chunk = WeightedLogProb.CHUNK * config.vocab_size
    scoring = {
        "copy that scores": whole if ranks == 1 else min(whole, (n - L * block + 2 * block) * w),
        "activations": (L - 1) * kept + layer,
        "fused path": chunk * (8 + 5 * w) + tables * (4 + 2 * w)}
    peak = sum(fixed.values()) + max(sum(generation.values()), sum(scoring.values()))
    return fixed | generation | scoring | {"peak": peak}


def plan(args):
    """Print memory() for several numbers of ranks, and the largest micro-batch in --plan GB."""
    with torch.device("meta"):  # shapes without numbers
        model = Transformer(Config.from_json(Path(args.model) / "config.json"))
    used = {ranks: memory(args, model, ranks, args.micro_batch) for ranks in (1, 2, 4, 8)}
    lines = {"GB per rank, ranks:": used.keys()}
    lines |= {name: [f"{u[name] / 1e9:.2f}" for u in used.values()] for name in used[1]}
    lines[f"micro_batch in {args.plan:g} GB"] = [
        max((b for b in range(1, args.prompts * args.samples // ranks + 1)
             if memory(args, model, ranks, b)["peak"] <= 1e9 * args.plan), default="none")
        for ranks in used]
    for name, cells in lines.items():
        print(f"{name:22}" + "".join(f"{cell:>10}" for cell in cells))


# --------------------------------------------------------------------------------------------------
# Training

def sample_rows(args, model, tokenizer, notes, problems, watch, seed, mode, rows=None):
    """A rollout of --samples rows for each problem, or of the given ones among these."""
    with gathered(model):
        return generate(
            model, tokenizer, ask(notes, problems), args.samples, mode, answer_greedy=False,
            temperature=notes["temperature"][mode],
            noise_std=noise_std_of(notes), noise_at=notes["noise_at"],
            noise_top_k=notes["noise_top_k"], cot_len=args.cot_len, answer_len=args.answer_len,
            eos=notes["eos"], seed=seed, rows=rows, watch=watch, store_thoughts=True,
            entropy_every=ENTROPY_EVERY)


@torch.no_grad()
def audit(args, model, tokenizer, notes, problems, watch):
    """Sample the problems in every mode, and print by how much the log-probs that training computes
    differ from those at sampling time, in nats, at micro-batch 1 and at --micro_batch."""
    report = []
    names = ("mean", "median", "max")
    print(f"{'|delta log pi|':16}{'dtype':>10}{'micro_batch':>13}"
          + "".join(f"{name:>11}" for name in names))
    for mode, temperature in notes["temperature"].items():
        rollout = sample_rows(
            args, model, tokenizer, notes, problems, watch, (args.seed, 0), mode)
        R, N = rollout.tokens.shape
        for size in (1, args.micro_batch):
            delta, used = torch.zeros(R, N), torch.zeros(R, N, dtype=torch.bool)
            for rows in torch.arange(R, device=args.device).split(size):
                one = torch.ones(len(rows), device=args.device)
                _, off, counts = score(model, rollout, rows, one, temperature,
                                       noise_std_of(notes))
                rows, width = rows.cpu(), off.shape[1]
                delta[rows, :width], used[rows, :width] = (off.abs() * counts).cpu(), counts.cpu()
            figures = {name: getattr(delta[used], name)().item() for name in names}
            print(f"{mode:16}{args.dtype:>10}{size:13}"
                  + "".join(f"{value:11.2g}" for value in figures.values()))
            report.append({"mode": mode, "dtype": args.dtype, "micro_batch": size} | figures | {
                "rows_by_position": used.sum(0).tolist(),
                "mean_by_position": (delta.sum(0) / used.sum(0).clamp(min=1)).tolist(),
                "max_by_position": delta.amax(0).tolist()})
    Path(args.out).mkdir(parents=True, exist_ok=True)
    write_json(Path(args.out) / "audit.json", report)
    print(f"by position: {Path(args.out) / 'audit.json'}")


def main(args):
    """The whole run; returns whether it is complete."""
    # Configuration
    rank, world = join_ranks(args)
    say = tqdm.write if rank == 0 else lambda text: None
    sft = args.mode == "sft"
    preset = ((PAPER_SFT if sft else PAPER) if args.model
              else {"sft": TINY_SFT, "fuzzy": TINY_FUZZY}.get(args.mode, TINY))
    for key, value in (preset | {"noise_scale": NOISE_SCALE}).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.temperature = args.temperature or MODES.get(args.mode, 1.0)
    args.out = args.out or f"out/{args.mode}"
    out = Path(args.out)
    if sft:
        args.samples = 1  # a question has one reference solution
    elif args.samples < 2:
        raise InputError(
            f"--samples {args.samples}: RLOO compares the samples of a question; use 2 or more")
    if min(args.prompts * args.samples, args.val_size) < world:
        raise InputError(f"--prompts {args.prompts} --samples {args.samples} --val_size "
                         f"{args.val_size}: fewer than the {world} ranks; use more, or fewer ranks")
    if args.noise_top_k and args.noise_at != "logits":
        raise InputError(f"--noise_top_k {args.noise_top_k}: goes with --noise_at logits")
    if world % (args.shard_size or world):
        raise InputError(f"--shard_size {args.shard_size}: no divisor of the {world} ranks")
    if args.plan:
        if args.model is None:
            raise InputError("--plan: of which model? Add --model with a directory of config.json")
        return plan(args) if rank == 0 else None
    if args.audit and world > 1:
        raise InputError("--audit runs in one process; leave torchrun away")
    if rank == 0 and checkpoints(out) and not (args.resume or args.audit):
        raise InputError(f"--out {out}: holds a run; add --resume to go on with it, give another "
                         "--out, or delete it")
    if args.model is None and args.data not in ARITHMETIC and not args.data.endswith(".jsonl"):
        raise InputError(f"--data {args.data}: the tiny model knows {', '.join(ARITHMETIC)} and "
                         "files that end in .jsonl; choose from these, or add --model")
    if args.model is None and not sft:
        args.model = str(tiny_base(args))
    elif args.model is None:
        args.model = str(out / "init")
        if rank == 0:
            write_tiny_model(Path(args.model), args.seed)
        if world > 1:
            dist.barrier()
    say(" ".join(f"--{k} {v}" for k, v in vars(args).items() if v is not None and v is not False))

    # Where to begin: at the model, or at the newest checkpoint
    newest = newest_checkpoint(out) if rank == 0 and args.resume else None
    first = int(over_ranks(int(newest.name[5:]) if newest else -1, args.device, "MAX").item())
    source = out / f"step-{first:06d}" if first >= 0 else Path(args.model)
    if first >= 0:
        if not Path(args.model).is_dir():
            raise InputError(f"--model {args.model}: no such directory; the tokenizer is there")
        for flag, value in read_json(source / "args.json").items():
            if flag not in RESUME_WITH_OTHER and getattr(args, flag, None) != value:
                raise InputError(f"--{flag} {getattr(args, flag, None)}: the run in {out} has "
                                 f"{value}; resume it with that, or give another --out")
    elif args.resume:
        say(f"{out} holds nothing to resume: beginning")

    # Model and data
    dtype = getattr(torch, args.dtype)
    model, tokenizer, notes = load(source, torch.float32, args.device, args.prompt_file)
    if args.noise_top_k > model.config.vocab_size:
        raise InputError(f"--noise_top_k {args.noise_top_k}: more than the vocabulary's "
                         f"{model.config.vocab_size} tokens")
    model.activation_checkpointing = args.activation_checkpointing
    watch = Watch.build(tokenizer, model.config.vocab_size, args.device)
    masters = distribute(model, dtype, args.device, args.shard_size)
    notes |= {k: getattr(args, k) for k in (
        "noise_scale", "noise_at", "noise_top_k", "cot_len", "answer_len")}
    noise_std = noise_std_of(notes)
    notes["temperature"] = notes["temperature"] | ({} if sft else {args.mode: args.temperature})
    if args.data in ARITHMETIC:
        rng = random.Random(args.seed)
        problems = ([written_problem(rng) for _ in range(20000)] if sft
                    else load_problems(args.data, "train", 8192))
        val = load_problems(args.data, "val", args.val_size)
    else:
        found = load_problems(args.data, "train")
        val, problems = hold_out(found, args.val_size)
        if not problems:
            raise InputError(f"--val_size {args.val_size}: none of the {len(found)} problems of "
                             f"{args.data} would be left to train on; use fewer")
        if sft and not all(p["solution"] for p in problems):
            raise InputError(f"--data {args.data}: problems without solutions cannot be imitated; "
                             "give a file with solutions, or use another --mode")
    n_new = args.cot_len + max(map(len, forced_tokens(tokenizer))) + args.answer_len
    encode(tokenizer, ask(notes, problems + val), n_new, model.config)  # do all of them fit?
    if sft:
        worked = [q + worked_text(p) for q, p in zip(ask(notes, problems), problems)]
        encode(tokenizer, worked, len(notes["eos"][:1]), model.config)
    if args.audit:
        return audit(args, model, tokenizer, notes, problems[:args.audit], watch)
    if sft:
        notes.pop("rms")  # RL that starts from here measures it anew
    same = zlib.crc32(json.dumps([problems, val, notes], sort_keys=True).encode())
    if over_ranks([same, -same], args.device, "MAX").sum():
        raise InputError(f"--data {args.data}: not the same on all ranks; copy it to every node")

    optimizer = torch.optim.AdamW(
        masters.values(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    own = "hard_greedy" if sft else f"{args.mode}_greedy"
    out.mkdir(parents=True, exist_ok=True)
    state = {"step": 0, "data": same}  # what a checkpoint holds beside tensors
    if first >= 0:
        state = restore(source, masters, optimizer)
        if state["data"] != same:
            raise InputError(f"--data {args.data}: the problems, or the prompt, are not those of "
                             f"the run in {out}; resume with these, or give another --out")
    if rank == 0:
        log = open_log(out / "log.jsonl", state["step"])  # from here on OUT is this run's alone
        (out / "summary.json").unlink(missing_ok=True)  # it says that a run is complete
        (out / "val.jsonl").write_text("".join(json.dumps(p) + "\n" for p in val), encoding="utf-8")
    asked = []  # when Ctrl-C or SIGTERM came: save at the next opportunity, and end

    def ask_to_stop(number, _):  # torchrun passes a first Ctrl-C on a second time
        if number == signal.SIGINT and asked and time.monotonic() - asked[0] > 1:
            sys.exit(130)
        asked.append(time.monotonic())
    handlers = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}

    def stop():
        """Whether a rank was asked to stop: all of them know at the same point."""
        return over_ranks(len(asked), args.device).item() > 0

    def validate():
        """Accuracy on the validation problems by {setting}, own greedy and hard greedy."""
        accuracy, part = {}, val[rank::world]
        with gathered(model):
            for setting in dict.fromkeys((own, "hard_greedy")):
                _, samples = evaluate(
                    model, tokenizer, notes, part, setting, cot_len=args.cot_len,
                    answer_len=args.answer_len, batch=max(64, args.micro_batch), watch=watch,
                    temperature=notes["temperature"][setting.split("_")[0]], verifier=args.verifier)
                correct = sum(s["verdict"] == "correct" for s in samples)
                accuracy[setting] = over_ranks(correct, args.device).item() / len(val)
                for s in samples[:2] if setting == own else ():
                    say(f"  | {s['question']} ->{s['thought']} [{s['answer']}] {s['verdict']}")
        say(f"step {state['step']}: "
            + ", ".join(f"{k} {100 * v:.1f} %" for k, v in accuracy.items()))
        return accuracy

    def save():
        """Write OUT/step-N, let OUT/best lead to the best one, and delete what need not be kept."""
        path = out / f"step-{state['step']:06d}"
        if rank == 0:
            on_disk(out / "log.jsonl")
        try:
            save_checkpoint(path, model, masters, optimizer, state, args.model, notes, args, rank)
        except (OSError, SafetensorError) as e:
            raise InputError(f"{path}: not written ({e}); see that there is room, and --resume"
                             ) from None
        if rank == 0:
            point(out / "best", out / state["best_step"])
            for old in checkpoints(out)[:-args.keep]:
                if old.name != state["best_step"]:
                    shutil.rmtree(old.rename(old.with_suffix(".old")))

    # The loop
    if "best" not in state:
        state["base"] = state["best"] = validate()
        state |= {"best_step": "step-000000", "skipped": 0}
        save()
    elif not (out / state["best_step"]).exists():  # it gave way to a better one, which is damaged
        state |= {"best": validate(), "best_step": source.name}
    if rank == 0:
        point(out / "best", out / state["best_step"])  # a kill may have come before this
    saved = state["step"]
    G, R = args.samples, args.prompts * args.samples
    shares = [range(R * k // world, R * (k + 1) // world) for k in range(world)]
    mine = shares[rank]  # this rank's rows, maybe a part of a group
    sources = []  # of gradients whose norms are logged
    if args.log_grad_sources and not sft:
        sources = ["logits", "embedding", "answer"]
        if args.mode == "hard" or args.noise_at != "embedding":
            sources.remove("embedding")

    def backward(rollout, rows, n_micro, weight, grad_source=None):
        """Sum the gradients of rows, by micro-batches; returns the loss and |delta log pi| (n,)."""
        loss_sum, deltas = 0.0, [torch.zeros(0, device=args.device)]
        for i in range(n_micro):
            part = rows[i * args.micro_batch:(i + 1) * args.micro_batch]
            used = part or [mine.start]  # a rank that has no more rows takes part with weight 0
            local = torch.tensor(used, device=args.device) - mine.start
            w = weight[used].float().to(args.device) * bool(part)
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(i == n_micro - 1)
            loss, delta, counts = score(
                model, rollout, local, w, args.temperature, noise_std, grad_source)
            (loss * world).backward()  # FSDP takes the mean over ranks
            loss_sum += loss.item()
            deltas.append(delta[counts].abs())
        return loss_sum, torch.cat(deltas)

    bar = tqdm(total=args.steps, initial=state["step"], disable=rank > 0, desc=args.mode)
    for step in range(state["step"], args.steps):
        batch = questions_of_step(problems, step, args.prompts, args.seed)
        stats = torch.zeros(R, len(STATS), dtype=torch.float64)  # each row from its rank
        clock = time.perf_counter()

        # 1. Sample, or read; 2. reward
        if sft:
            rollout = reference_rollout(
                [batch[row // G] for row in mine], tokenizer, notes, args.device)
            stats[mine.start:mine.stop, 0] = rollout.length.cpu()
        else:
            rollout = sample_rows(args, model, tokenizer, notes, batch, watch, (args.seed, step),
                                  args.mode, mine)
            rewards = torch.tensor([reward(answer, batch[row // G]["answer"], args.verifier)
                                    for row, answer in zip(mine, rollout.answers)])
            slots = torch.arange(rollout.tokens.shape[1], device=args.device)
            in_cot = slots < rollout.cot_len[:, None]  # (r, N)
            eos = torch.isin(rollout.tokens, torch.tensor(notes["eos"], device=args.device).long())
            columns = dict(
                tokens=rollout.length, reward=rewards, correct=rewards == 100,
                unparsed=rewards == 0, truncated=rollout.truncated, cot_len=rollout.cot_len,
                eos=(eos & in_cot).any(1),
                entropy=rollout.entropy.masked_fill(~in_cot, math.nan).nanmean(1))
            stats[mine.start:mine.stop] = torch.stack(
                [columns[k].double().cpu() for k in STATS], dim=1)
        generate_s = time.perf_counter() - clock
        if stop():  # this step is done again by --resume
            break
        stats = over_ranks(stats, args.device)

        # 3. Advantage; weight is d loss / d log pi of a row's actions
        if sft:
            weight = torch.full((R,), -1 / stats[:, 0].sum())  # cross-entropy per token
        else:
            weight = -rloo(stats[:, 1].view(-1, G)).flatten() / R  # eq. 14
        # rows without advantage are left out; every rank takes part in the same number of passes
        scored = [[row for row in share if weight[row] != 0] for share in shares]
        n_micro = max(-(-len(rows) // args.micro_batch) for rows in scored)

        # 4. Log-prob and gradient, rows of one question and of like length together
        clock = time.perf_counter()
        lengths = dict(zip(mine, rollout.length.tolist()))
        rows = sorted(scored[rank], key=lambda row: (row // G, lengths[row]))
        norms = {}
        for part in sources:
            backward(rollout, rows, n_micro, weight, part)
            grads = [m.grad for m in masters.values() if m.grad is not None]
            norms[f"grad_{part}"] = full(torch.nn.utils.get_total_norm(grads)).item()
            optimizer.zero_grad()
        loss, delta = backward(rollout, rows, n_micro, weight)
        totals = [loss, len(delta), delta.sum().item()]
        loss, n_delta, delta_sum = over_ranks(totals, args.device).tolist()
        delta_max = over_ranks(delta.max() if len(delta) else 0, args.device, "MAX").item()

        # 5. Update
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        grad_norm = torch.zeros(())
        if n_micro:  # else no group had two different rewards, and there is nothing to learn
            grad_norm = full(torch.nn.utils.clip_grad_norm_(masters.values(), args.clip))
        finite = math.isfinite(loss + grad_norm.item())
        if n_micro and finite:
            optimizer.step()
            if world == 1 and dtype != torch.float32:
                with torch.no_grad():
                    torch._foreach_copy_(list(model.parameters()), list(masters.values()))
        optimizer.zero_grad()
        state["skipped"] = 0 if finite else state["skipped"] + 1
        train_s = time.perf_counter() - clock

        # 6. Log
        mean = dict(zip(STATS, stats.nanmean(0).tolist()))
        line = {"step": step, "loss": loss} if sft else {
            "step": step, "reward": mean["reward"], "accuracy": mean["correct"],
            "truncated": mean["truncated"], "unparsed": mean["unparsed"],
            "zero_advantage": (weight.view(-1, G) == 0).all(1).double().mean().item(),
            "cot_len": mean["cot_len"], "eos_in_cot": mean["eos"], "entropy": mean["entropy"],
            "delta_logp": delta_sum / max(1, n_delta), "delta_logp_max": delta_max}
        line |= norms | {
            "grad_norm": grad_norm.item(), "skipped": state["skipped"],
            "lr": optimizer.param_groups[0]["lr"], "generate_s": generate_s, "train_s": train_s,
            "tokens_per_s": stats[:, 0].sum().item() / (generate_s + train_s),
            "peak_gb": peak_memory_gb(args.device)}
        line = {k: v if math.isfinite(v) else None for k, v in line.items()}  # JSON has no NaN
        if rank == 0:
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.update()
            if not sft or step % 50 == 0:
                say("  ".join(f"{k} {v:.3g}" for k, v in line.items() if v is not None))
        if state["skipped"] == MAX_SKIPPED:
            sys.exit(f"step {step}: the loss or its gradient was not finite {MAX_SKIPPED} times in "
                     f"a row; the last checkpoint is {checkpoints(out)[-1]}; lower --lr?")
        if args.max_drift and not delta_sum <= args.max_drift * n_delta:  # NaN stops it, too
            sys.exit(f"step {step}: --max_drift {args.max_drift}: log-probs at sampling and in "
                     f"training differ by {delta_sum / max(1, n_delta):.3g} nats in the mean")

        # 7. Evaluate and save
        state["step"] = step + 1
        if state["step"] == args.steps or state["step"] % args.eval_every == 0:
            accuracy = validate()
            if accuracy[own] >= state["best"][own]:
                state |= {"best": accuracy, "best_step": f"step-{state['step']:06d}"}
            save()
            saved = state["step"]
        if stop():
            break

    if saved != state["step"]:
        save()
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    base, best = state["base"], state["best"]
    if rank == 0:
        log.close()
    if state["step"] < args.steps:
        say(f"Stopped at step {state['step']}; the same command with --resume goes on.")
        return False
    if rank == 0:
        write_json(out / "summary.json", {
            "base": base, "final": best, "checkpoint": str(out / "best"), "steps": args.steps})
    for setting in base:
        say(f"{setting}: {100 * base[setting]:.1f} % before, {100 * best[setting]:.1f} % after, "
            f"on {len(val)} validation problems")
    tested = args.data in ARITHMETIC or {(args.data, "train"), (args.data, "test")} <= FILES.keys()
    data = args.data if tested else out / "val.jsonl"  # else what was trained on would be asked
    say(f"The checkpoint is in {out / 'best'}. Next:\n"
        f"  python eval.py --model {out / 'best'} --data {data} --settings all")
    return True


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
    parser.add_argument("--clip", type=positive(float), help="global gradient norm")
    parser.add_argument("--micro_batch", type=positive(int), help="rows per backward pass")
    parser.add_argument("--eval_every", type=positive(int), help="steps between validations")
    parser.add_argument("--val_size", type=positive(int), help="validation problems")
    parser.add_argument("--verifier", choices=VERIFIERS, default="own")
    parser.add_argument("--plan", type=positive(float), metavar="GB", help="only print the memory "
                        "that the run would take, and the micro-batch that fits this much")
    parser.add_argument("--noise_at", choices=PLACEMENTS, default="embedding",
                        help="what a thought's noise is added to")
    parser.add_argument("--noise_top_k", type=positive(int, or_zero=True), default=0,
                        help="with --noise_at logits: only so many, the others are -inf; 0: all")
    parser.add_argument("--resume", action="store_true",
                        help="go on from the newest checkpoint in OUT, if there is one")
    parser.add_argument("--keep", type=positive(int), default=2,
                        help="newest checkpoints to keep, beside the best")
    parser.add_argument("--shard_size", type=positive(int), help="ranks that share one copy of the "
                        "weights; default all (with fewer than all: HSDP)")
    parser.add_argument("--activation_checkpointing", action="store_true",
                        help="keep less for the backward pass, and compute it again")
    parser.add_argument("--log_grad_sources", action="store_true", help="log the gradient's norm "
                        "by source: thought through logits, through E, answer; 4 passes for one")
    parser.add_argument("--max_drift", type=positive(float), help="stop when the mean |log pi at "
                        "sampling - log pi in training| of a step exceeds this many nats")
    parser.add_argument("--audit", type=positive(int), metavar="N",
                        help="only sample N questions and print that difference in every mode")
    parser.add_common()
    parser.run(main)
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # all is written; a rank seems to have died in the teardown (SIGABRT, once)

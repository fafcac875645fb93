"""
Measurements against transformers, TRL and plain formulas, on a real checkpoint; no test, and not run by pytest.

    python tests/bench.py rollout --model path/to/SmolLM2-135M-Instruct --data path/to/gsm8k_test.jsonl
    python tests/bench.py loss    # and step, eval, drift, ops like rollout; tests/gpu.py runs them all on a GPU
    python tests/bench.py why --model out/base-chains-0/best --data chains --runs 12    # for assets/why.md

SMOLLM2 in the environment may name the checkpoint instead. Both sides take turns within one run, or have a process each
where peak memory is compared. Figures are lines of JSON, most of them {"name", "ours", "peer", "ratio": ours / peer}.
"""
import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample  # noqa: E402
import train  # noqa: E402
from eval import evaluate, load_problems  # noqa: E402
from model import WeightedLogProb  # noqa: E402
from sample import MODES, ROUND, TRAIN, Decoder, encode_prompts, generate, load  # noqa: E402


def seconds(run):
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(runs, *sides):
    """Median seconds of each side, all sides once in every turn, after one turn to warm up."""
    turns = [[seconds(side) for side in sides] for _ in range(runs + 1)][1:]
    return [statistics.median(times) for times in zip(*turns)]


def say(name, **figures):
    def short(x):
        return [*map(short, x)] if isinstance(x, list) else float(f"{x:.4g}")
    print(json.dumps({"name": name} | {k: short(v) for k, v in figures.items()}), flush=True)


def report(name, ours, peer):
    say(name, ours=ours, peer=peer, ratio=ours / peer)


def opened(args, dtype, n=2):
    """(model, tokenizer, notes with short budgets, n questions) of --model and --data."""
    model, tokenizer = load(args.model, getattr(torch, dtype), args.device)
    notes = model.notes | {"cot_len": args.tokens - 16, "answer_len": 8}  # forced words come between them
    return model, tokenizer, notes, [p["question"] for p in load_problems(args.data, "test")[:args.problems or n]]


def load_peer(args, dtype):
    import transformers
    return transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype)).to(args.device)


def peer_generate(peer, prompts, n_samples, n_new, **noise):
    """transformers' generate behind lists of ids, or, given noise_std, soft thoughts as one would write them there."""
    width = max(map(len, prompts))
    ids, mask = torch.tensor([([0] * (width - len(p)) + p, [0] * (width - len(p)) + [1] * len(p)) for p in prompts],
                             device=peer.device).repeat_interleave(n_samples, 0).unbind(1)
    if not noise:
        return peer.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                             max_new_tokens=n_new, min_new_tokens=n_new, pad_token_id=0)
    with torch.no_grad():
        table, out = peer.get_input_embeddings().weight, peer(ids, attention_mask=mask, use_cache=True)
        for _ in range(n_new):
            x = ((out.logits[:, -1].float() / MODES["soft"]).softmax(-1).to(table.dtype) @ table).float()
            x = (x + noise["noise_std"] * torch.randn_like(x)).to(table.dtype)
            mask = F.pad(mask, (0, 1), value=1)
            out = peer(inputs_embeds=x[:, None], attention_mask=mask, past_key_values=out.past_key_values)


def bench_rollout(args):
    for dtype in args.dtypes:
        model, tokenizer, notes, questions = opened(args, dtype)
        prompts, counts = encode_prompts(tokenizer, notes, questions, args.tokens, model.config), {}

        def ours(mode):
            out = generate(model, tokenizer, questions, mode, args.samples, notes=notes, answer_greedy=False,
                           store_thoughts=mode != "hard")
            counts[mode] = sum(row.length for row in out.rows)
        sides = [lambda: ours("hard"), lambda: ours("soft")]
        if find_spec("transformers"):
            peer = partial(peer_generate, load_peer(args, dtype), prompts, args.samples, args.tokens)
            sides += [peer, lambda: peer(noise_std=notes["noise_scale"] * notes["rms"])]
        times = in_turn(args.runs, *sides)
        n = args.tokens * args.samples * len(prompts)
        hard, soft, *theirs = (n / t for n, t in zip((counts["hard"], counts["soft"], n, n), times))
        report(f"rollout_soft_vs_hard_{dtype}", soft, hard)  # tokens per second
        for name, rate, theirs_ in zip(("hard_vs_generate", "soft_vs_loop"), (hard, soft), theirs):
            report(f"rollout_{name}_{dtype}", rate, theirs_)


def decoder_at(slot, model, tokenizer, notes, questions, n_samples):
    """A Decoder as generate() makes it, while its rows think in soft tokens, at the given slot."""
    made = []

    def stop(rows, *_):
        if rows[0].length == slot:
            raise StopIteration
    with (mock.patch.object(sample, "Decoder", lambda *a: made.append(Decoder(*a)) or made[0]),
          contextlib.suppress(StopIteration)):
        generate(model, tokenizer, questions, "soft", n_samples, notes=notes, answer_greedy=False, on_step=stop,
                 store_thoughts=True)
    return made[0]


class Operations(TorchDispatchMode):
    """Counts tensor operations, which are kernel launches on a GPU: neither views nor allocations."""
    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        self.count += not (op.is_view or "empty" in name or name in ("_unsafe_view", "lift_fresh"))
        return op(*args, **(kwargs or {}))


@torch.no_grad()
def bench_ops(args):
    """Of a soft step in bfloat16. RMSNorm is one kernel on a GPU and eight operations here: a sign stands for it."""
    decoder = decoder_at(ROUND, *opened(args, "bfloat16"), 2)
    with mock.patch.object(F, "rms_norm", lambda x, *_: -x), Operations() as operations:
        decoder.step(decoder.cache.columns)
    say("ops_per_step", ours=operations.count)


def bench_drift(args):
    """|log pi at sampling - in training|, nats, of all the actions of a rollout."""
    for dtype, mode in itertools.product(args.dtypes, MODES):
        model, tokenizer, notes, questions = opened(args, dtype)
        out = generate(model, tokenizer, questions, mode, args.samples, notes=notes, answer_greedy=False,
                       store_thoughts=mode != "hard")
        parts = torch.arange(len(out.rows), device=args.device).split(args.micro_batch)
        delta = torch.cat([train.score(model, out, rows, torch.ones_like(rows, dtype=torch.float32),
                                       notes["noise_scale"] * notes["rms"])[1].detach() for rows in parts])
        say(f"drift_{mode}_{dtype}", mean=delta.mean(), median=delta.median(), max=delta.max())


def peak_bytes(run, device):
    """The most memory that tensors took at a time while run() ran."""
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def bench_loss(args):
    for kind, (N, V, D) in itertools.product(("soft", "token"), ((8192, 49152, 576), (4096, 128256, 2048))):
        with torch.device(args.device):
            hidden, table = (torch.randn(n, D).mul_(s).bfloat16().requires_grad_() for n, s in ((N, 1.0), (V, 0.1)))
            thoughts, tokens = torch.randn(N, D).bfloat16(), torch.randint(V, (N, 1))
            weight, tau = torch.randn(N), torch.full((N,), 0.5)

        def fused():
            hidden.grad = table.grad = None
            action = thoughts if kind == "soft" else tokens[:, 0]
            WeightedLogProb.apply(hidden, table, table, action, weight, tau, 0.3)[0].backward()

        def plain():
            hidden.grad = table.grad = None
            logits = (hidden @ table.T).float() / tau[:, None]
            logp = logits.log_softmax(-1).gather(-1, tokens)[:, 0] if kind == "token" else torch.distributions.Normal(
                (logits.softmax(-1).bfloat16() @ table).float(), 0.3).log_prob(thoughts.float()).sum(-1)
            (weight * logp).sum().backward()
        report(f"{kind}_logprob_time_{V}", *in_turn(args.runs, fused, plain))
        report(f"{kind}_logprob_memory_{V}", *(  # less the gradient of the table: float32 in fused, while it grows
            (peak_bytes(run, args.device) - n * table.numel()) / 1e9 for run, n in ((fused, 4), (plain, 2))))


def peak_gb(device):
    """Peak memory of this process in GB: of the GPU if there is one, else resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1e9 if sys.platform == "darwin" else 1e6  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def our_steps(args, **given):
    """(log, peak GB) of train.py on args.model, in which every other row is rewarded, and nothing is saved."""
    train.reward, train.save = lambda verdict, row: 100.0 * (row.number % 2), lambda *_: None
    unset = ("lr", "warmup", "prompt_file", "temperature", "noise_scale", "resume", "eval_every",
             "activation_checkpointing", "no_cuda_graphs")
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        train.main(argparse.Namespace(**dict.fromkeys(unset), **dict(
            mode="soft", model=args.model, data=args.data, out=out, steps=args.runs + 1, prompts=args.problems or 2,
            samples=args.samples, cot_len=args.tokens - 16, answer_len=8, micro_batch=args.micro_batch, val_size=2,
            clip=1.0, verifier="own", dtype="bfloat16", seed=0, device=args.device) | given))
        lines = [json.loads(line) for log in Path(out).glob("log.jsonl") for line in open(log)]  # of the first rank
        return lines, peak_gb(args.device)


def trl_steps(args):
    """(median seconds of a step, peak GB) of TRL's RLOOTrainer."""
    import transformers
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer
    n, ends, rewards, clock = args.problems or 2, [], itertools.cycle([100.0, 0.0]), transformers.TrainerCallback()
    clock.on_step_end = lambda *_, **__: ends.append(0 * seconds(int) + time.perf_counter())  # seconds: waits for a GPU
    _, _, notes, questions = opened(args, "bfloat16", n * (args.runs + 1))
    with tempfile.TemporaryDirectory() as out:
        RLOOTrainer(
            load_peer(args, "bfloat16"), lambda completions, **_: [next(rewards) for _ in completions],
            RLOOConfig(out, per_device_train_batch_size=16, gradient_accumulation_steps=n * args.samples // 16,
                       num_generations=args.samples, max_completion_length=args.tokens, beta=0.0, bf16=True,
                       use_cpu=args.device == "cpu", max_steps=args.runs + 1, temperature=1.0, save_strategy="no",
                       report_to=[], gradient_checkpointing=False, generation_kwargs={"min_new_tokens": args.tokens}),
            Dataset.from_list([{"prompt": notes["prompt"].replace("{question}", q)} for q in questions]),
            processing_class=transformers.AutoTokenizer.from_pretrained(args.model, padding_side="left"),
            callbacks=[clock]).train()
    return statistics.median(b - a for a, b in itertools.pairwise(ends)), peak_gb(args.device)


def together(args, *jobs):
    """The results of (function, options) that run at the same time, each in a process of its own."""
    with ProcessPoolExecutor(len(jobs), multiprocessing.get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(run, args, **options) for run, options in jobs]]


def bench_step(args):
    found, n = {}, args.problems or 2
    for name, given in {"hard": {"mode": "hard"}, "soft": {}, "many": {"mode": "hard", "prompts": 4 * n}}.items():
        (lines, peak), = together(args, (our_steps, given))
        parts = {part: statistics.median(x[part] for x in lines[1:]) for part in ("generate_s", "train_s")}
        found[name] = sum(parts.values()), peak
        say(f"step_{name}", **parts, peak_gb=peak)
    report("step_soft_vs_hard", found["soft"][0], found["hard"][0])
    report("rows_scaling", found["many"][0], found["hard"][0])
    if find_spec("trl"):
        peer, = together(args, (trl_steps, {}))
        report("step_hard_vs_trl", found["hard"][0], peer[0])
        report("step_memory_vs_trl", found["hard"][1], peer[1])


def bench_eval(args):
    """Sampling answers to many problems, hard tokens at temperature 1: evaluate() against generate()."""
    model, tokenizer, notes, questions = opened(args, "bfloat16", 64)
    prompts, peer = encode_prompts(tokenizer, notes, questions, 0, model.config), load_peer(args, "bfloat16")
    problems, lengths, size = load_problems(args.data, "test")[:len(questions)], [], 64 // args.samples

    def ours():
        samples = evaluate(model, tokenizer, problems, "hard_sample", args.samples, notes=notes, batch=64)
        lengths[:] = [s["length"] for s in samples]

    def theirs():
        for i in range(0, len(prompts), size):
            peer_generate(peer, prompts[i:i + size], args.samples, round(statistics.mean(lengths)))
    report("eval_vs_generate", *in_turn(args.runs, ours, theirs))


def gradients(model, tokenizer, problems, mode, n_batches):
    """The policy gradients (n, P) of n steps of a model that stays as it is, and that of reference solutions (P,)."""
    found, (B, G), noise_std = [], (32, 16), model.notes["noise_scale"] * model.notes["rms"]

    def gradient(rollout, rows, weight):
        model.zero_grad()
        train.score(model, rollout, rows, weight, noise_std)[0].backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters()])
    for step in range(n_batches):
        batch = train.questions_of_step(problems, step, B, 0)
        rollout = generate(model, tokenizer, [p["question"] for p in batch], mode, G, answer_greedy=False,
                           store_thoughts=mode != "hard", seed=(TRAIN, 0, step))
        rewards = train.grade(rollout, [batch[i // G] for i in range(B * G)], "own")[:, 0].view(B, G)
        weight = -train.rloo(rewards).flatten().float() / (B * G)
        rows = weight.nonzero()[:, 0]
        found.append(gradient(rollout, rows, weight[rows]))
    rollout = train.reference_rollout(problems[:1024], model, tokenizer)
    return torch.stack(found), gradient(rollout, torch.arange(1024), torch.full((1024,), -1.0))


class Decisions:
    """Where n chains decide the last digit of their first result; and how the model reads what is fed there, which it
    tells when it copies the result, two or three tokens later."""

    def __init__(self, model, tokenizer, problems):
        prompt, digits, self.model = model.notes["prompt"], len(problems[0]["answer"]), model
        texts = [f"{prompt} {p['solution'].partition('=')[0]}=".replace("{question}", p["question"]) for p in problems]
        prompts = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
        for _ in range(digits - 1):  # the digits before it, as the model has them
            best = model.logits(model.prefill(prompts)[0]).argmax(-1).tolist()
            prompts = [p + [i] for p, i in zip(prompts, best)]
        hidden, self.prefix = model.prefill(prompts)
        self.logits, self.table = model.logits(hidden), model.embed_tokens.weight.float()  # (n, V), (V, D)
        self.copied = torch.tensor([[tokenizer.token_to_id(";"), *p[len(p) + 1 - digits:]] for p in prompts])

    def read(self, x):
        """The distribution (n, V) of the copied digit where x (n, D) was fed in its place."""
        x = torch.cat((x[:, None].to(self.model.norm.weight.dtype), self.model.embed_tokens(self.copied)), 1)
        hidden = self.model(x, self.prefix.before(torch.arange(len(x))))[:, -1]
        return self.model.logits(hidden).softmax(-1)

    def explored(self, mode, noise_std, n=16):
        """Whether n samples of each decision are read in more than one way, (n,) bool."""
        probs = (self.logits / MODES[mode]).softmax(-1)
        draw = {"hard": lambda: self.table[probs.multinomial(1)[:, 0]]}.get(
            mode, lambda: probs @ self.table + noise_std * torch.randn(len(probs), self.table.shape[1]))
        readings = torch.stack([self.read(draw()).argmax(-1) for _ in range(n)])
        return (readings != readings[0]).any(0)

    def response(self, w, noise_std):
        """How far a w-mixture of the two best tokens is read as the first, (n,), sorted; the mean over noise."""
        best = self.logits.topk(2).indices.T  # (2, n)
        x, n = w * self.table[best[0]] + (1 - w) * self.table[best[1]], 8 if noise_std else 1
        probs = torch.stack([self.read(x + noise_std * torch.randn_like(x)) for _ in range(n)]).mean(0)
        first, second = (probs.gather(-1, i[:, None])[:, 0] for i in best)
        return (first / (first + second)).sort().values


@torch.no_grad()
def bench_why(args):
    """Of a tiny base: what one batch tells, what noise explores, how the network reads a mixture, which logits tie."""
    problems, tested = load_problems(args.data, "train", 8192), load_problems(args.data, "test", 512)
    torch.set_default_device(args.device)
    for mode, dtype in (("hard", "float32"), ("soft", "float32"), ("fuzzy", "float32"), ("fuzzy", "bfloat16")):
        model, tokenizer = load(args.model, getattr(torch, dtype), args.device)
        with torch.enable_grad():
            found, reference = (F.normalize(g, dim=-1) for g in gradients(model, tokenizer, problems, mode, args.runs))
        others = (found @ found.T)[~torch.eye(len(found), dtype=torch.bool)]
        say(f"signal_{mode}_{dtype}", between=others.mean(), reference=(found @ reference).mean())

        decisions, noise_std = Decisions(model, tokenizer, tested), model.notes["noise_scale"] * model.notes["rms"]
        explored = decisions.explored(mode, noise_std).float()
        p, best = torch.arange(0.45, 1, 0.1), decisions.logits.softmax(-1).amax(-1)
        near = [explored[(best - middle).abs() <= 0.05] for middle in p]
        say(f"explored_{mode}_{dtype}", share=explored.mean(), p=p.tolist(), n=[float(len(part)) for part in near],
            near=[part.mean().item() for part in near])

        if mode == "fuzzy":
            heaviest = []
            generate(model, tokenizer, [p["question"] for p in tested], mode, on_step=lambda rows, _, probs, x: (
                heaviest.extend(p for row, p in zip(rows, probs.amax(-1).tolist()) if row.phase == sample.COT)))
            tie = (decisions.logits / MODES[mode]).softmax(-1).amax(-1) < 0.75
            say(f"ties_{dtype}", positions=statistics.mean(p < 0.75 for p in heaviest), decisions=tie.float().mean())
        if mode == "soft":
            for name, noise in (("response", 0.0), ("response_noise", noise_std)):
                w = torch.linspace(0, 1, 21)
                read = torch.stack([decisions.response(x, noise) for x in w])  # (21, n)
                n = len(tested)
                say(name, weight=w.tolist(), mean=read.mean(1).tolist(), low=read[:, n // 10].tolist(),
                    high=read[:, n - 1 - n // 10].tolist())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benches = {name[6:]: run for name, run in globals().items() if name.startswith("bench_")}
    parser.add_argument("what", choices=benches)
    parser.add_argument("--model", default=os.environ.get("SMOLLM2"), help="checkpoint directory")
    parser.add_argument("--data", default="gsm8k", help="problems")
    parser.add_argument("--problems", type=int, help="default 64 for eval, 2 otherwise")
    parser.add_argument("--samples", type=int, help="of each problem; default 8 for eval, 32 otherwise")
    parser.add_argument("--tokens", type=int, default=128, help="most per sample")
    parser.add_argument("--micro_batch", type=int, default=16, help="rows per backward pass")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=5, help="after one to warm up")
    args = parser.parse_args()
    args.samples = args.samples or (8 if args.what == "eval" else 32)
    if not args.model and args.what != "loss":
        parser.error("--model is missing; name a checkpoint directory, or set SMOLLM2")
    benches[args.what](args)

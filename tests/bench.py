"""
Measurements against transformers, TRL and plain formulas, on a real checkpoint; no test, and not run by pytest.

    python tests/bench.py rollout --model path/to/SmolLM2-135M-Instruct --data path/to/gsm8k_test.jsonl
    python tests/bench.py loss
    python tests/bench.py step --model ... --data ...
    python tests/bench.py eval --model ... --data ...

The environment variable SMOLLM2 may name the checkpoint instead. rollout, step and eval need transformers, step needs
trl. Both sides take turns within one run, or one process each where peak memory is compared. The last line of each
figure is JSON: {"name", "ours", "peer", "ratio"}; the ratio is that of ours to the peer's, in the unit of the name.
"""
import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval import evaluate, load_problems  # noqa: E402
from model import Transformer, WeightedLogProb  # noqa: E402
from sample import MODES, Watch, generate, load, noise_std_of  # noqa: E402

COT_LEN, ANSWER_LEN = 112, 8  # with the forced words about 128 tokens a sample


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


def report(name, ours, peer):
    print(json.dumps({"name": name, "ours": round(ours, 4), "peer": round(peer, 4), "ratio": round(ours / peer, 4)}),
          flush=True)


# --------------------------------------------------------------------------------------------------
# Rollout

def peer_and_tokenizer(args, dtype):
    import transformers
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device), tokenizer


def peer_generate(peer, tokenizer, prompts, n_samples, n_new):
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to(peer.device)
    peer.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=n_new,
                  min_new_tokens=n_new, num_return_sequences=n_samples, pad_token_id=tokenizer.pad_token_id)


@torch.no_grad()
def peer_soft_loop(peer, tokenizer, prompts, n_samples, n_new, noise_std):
    """Soft thoughts as one would write them with transformers: mix, add noise, feed as inputs_embeds."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to(peer.device)
    mask = batch["attention_mask"].repeat_interleave(n_samples, 0)
    table = peer.get_input_embeddings().weight
    out = peer(batch["input_ids"].repeat_interleave(n_samples, 0), attention_mask=mask, use_cache=True)
    for _ in range(n_new):
        p = (out.logits[:, -1].float() / MODES["soft"]).softmax(-1)
        x = (p.to(table.dtype) @ table).float()
        x = (x + noise_std * torch.randn_like(x)).to(table.dtype)
        mask = F.pad(mask, (0, 1), value=1)
        out = peer(inputs_embeds=x[:, None], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)


@torch.no_grad()
def decode_step(model, prompt_ids, n_samples, n_own):
    """(one decode step behind n_own earlier ones, its matrix products alone), as functions."""
    _, cache = model.read(prompt_ids)
    rows, weight = len(prompt_ids) * n_samples, model.lm_head.weight
    cache = cache.branch(torch.arange(len(prompt_ids), device=weight.device).repeat_interleave(n_samples))
    x = torch.randn(rows, 1, model.config.hidden_size).to(weight)
    for _ in range(n_own):
        model(x, cache)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.randn(rows, m.in_features).to(weight) for m in layers}

    @torch.no_grad()
    def step():
        F.linear(model(x, cache), weight)

    @torch.no_grad()
    def matmuls():
        for m in layers:
            F.linear(inputs[m.in_features], m.weight)
    return step, matmuls


def bench_rollout(args):
    for dtype in (torch.bfloat16, torch.float32):
        model, tokenizer, notes = load(args.model, dtype, args.device)
        peer, peer_tokenizer = peer_and_tokenizer(args, dtype)
        watch = Watch.build(tokenizer, model.config.vocab_size, args.device)
        prompts = [notes["prompt"].replace("{question}", p["question"])
                   for p in load_problems(args.data, "test")[:args.problems or 2]]
        noise_std, counts = noise_std_of(notes), {}
        name = str(dtype).removeprefix("torch.")

        def ours(mode):
            out = generate(model, tokenizer, prompts, args.samples, mode, answer_greedy=False, noise_std=noise_std,
                           cot_len=COT_LEN, answer_len=ANSWER_LEN, watch=watch, store_thoughts=True)
            counts[mode] = int(out.length.sum())
        times = in_turn(
            args.runs, lambda: ours("hard"), lambda: ours("soft"),
            lambda: peer_generate(peer, peer_tokenizer, prompts, args.samples, args.tokens),
            lambda: peer_soft_loop(peer, peer_tokenizer, prompts, args.samples, args.tokens, noise_std))
        n_peer = args.tokens * args.samples * len(prompts)
        hard, soft, generated, loop = (
            n / t for n, t in zip((counts["hard"], counts["soft"], n_peer, n_peer), times))
        print(f"{name}: tokens/s hard {hard:.0f}, soft {soft:.0f}, generate {generated:.0f}, soft loop {loop:.0f}")
        report(f"rollout_hard_vs_generate_{name}", hard, generated)
        report(f"rollout_soft_vs_hard_{name}", soft, hard)
        report(f"rollout_soft_vs_loop_{name}", soft, loop)
        for n_own in (0, args.tokens // 2):
            step, matmuls = decode_step(model, [tokenizer.encode(p).ids for p in prompts], args.samples, n_own)
            print(f"{name}: a decode step behind {n_own} others, seconds")
            report(f"decode_vs_matmuls_{name}", *in_turn(3 * args.runs, step, matmuls))


# --------------------------------------------------------------------------------------------------
# The fused log-prob against the plain formula

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
    tau, noise_std = 0.5, 0.3
    for kind in ("soft", "token"):
        figures = []
        for N, V, D in ((8192, 49152, 576), (4096, 128256, 2048)):
            g = torch.Generator().manual_seed(0)
            hidden, table = (torch.randn(n, D, generator=g).mul_(s).bfloat16().to(args.device).requires_grad_()
                             for n, s in ((N, 1.0), (V, 0.1)))
            action = (torch.randn(N, D, generator=g).bfloat16() if kind == "soft"
                      else torch.randint(V, (N,), generator=g)).to(args.device)
            weight = torch.randn(N, generator=g).to(args.device)

            def fused():
                hidden.grad = table.grad = None
                WeightedLogProb.apply(hidden, table, table, action, weight, tau, noise_std, True)[0].backward()

            def plain():
                hidden.grad = table.grad = None
                logits = (hidden @ table.T).float() / tau
                if kind == "soft":
                    mean = (logits.softmax(-1).bfloat16() @ table).float()
                    logp = torch.distributions.Normal(mean, noise_std).log_prob(action.float()).sum(-1)
                else:
                    logp = logits.log_softmax(-1).gather(-1, action[:, None])[:, 0]
                (weight * logp).sum().backward()
            times = in_turn(args.runs, fused, plain)
            hidden.grad = table.grad = None
            grads = table.numel() * torch.tensor([4, 2])  # float32 while fused accumulates; bfloat16
            memory = [(peak_bytes(run, args.device) - int(b)) / 1e9 for run, b in zip((fused, plain), grads)]
            figures.append((times, memory))
            print(f"{kind}, {N} rows, V = {V}, d = {D}: seconds {times[0]:.2f} against {times[1]:.2f}, "
                  f"GB {memory[0]:.2f} against {memory[1]:.2f}")
        for i, what in enumerate(("time", "memory")):
            report(f"{kind}_logprob_{what}", *max((f[i] for f in figures), key=lambda pair: pair[0] / pair[1]))


# --------------------------------------------------------------------------------------------------
# A whole step of reinforcement learning, each side in a process of its own

def our_step(args, mode, n_prompts, runs):
    """(median seconds of a step, peak GB, what --plan foretells of it) of train.py on args.model."""
    import train
    before, rewards = train.peak_memory_gb(args.device), itertools.cycle([100.0, 0.0])
    train.reward = lambda *_: next(rewards)  # rewards differ, so that no group is skipped
    with tempfile.TemporaryDirectory() as out:
        given = dict(
            mode=mode, model=args.model, data=args.data, out=out, steps=runs + 1, prompts=n_prompts,
            samples=args.samples, cot_len=COT_LEN, answer_len=ANSWER_LEN, micro_batch=16, val_size=1,
            eval_every=runs + 1, dtype="bfloat16", seed=0, device=args.device, clip=1.0, verifier="own", keep=1,
            noise_at="embedding", noise_top_k=0)
        unset = ("lr", "warmup", "prompt_file", "temperature", "noise_scale", "plan", "audit", "resume",
                 "shard_size", "max_drift", "activation_checkpointing", "log_grad_sources")
        train.main(run := Namespace(**given, **dict.fromkeys(unset)))
        lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    foretold = train.memory(run, Transformer.from_pretrained(args.model), 1, 16)["peak"] / 1e9
    return (statistics.median(x["generate_s"] + x["train_s"] for x in lines[1:]), lines[-1]["peak_gb"],
            before + foretold)


def trl_step(args, n_prompts, runs):
    """The same of TRL's RLOOTrainer."""
    import train
    import transformers
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer
    notes = load(args.model)[2]
    prompts = [notes["prompt"].replace("{question}", p["question"]) for p in load_problems(args.data, "test")]
    clocks, rewards = [], itertools.cycle([100.0, 0.0])

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            clocks.append(-time.perf_counter())

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            clocks[-1] += time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        config = RLOOConfig(
            out, per_device_train_batch_size=16, gradient_accumulation_steps=n_prompts * args.samples // 16,
            num_generations=args.samples, max_completion_length=args.tokens, beta=0.0, bf16=True,
            use_cpu=args.device == "cpu", max_steps=runs + 1, temperature=1.0, gradient_checkpointing=False,
            report_to=[], save_strategy="no", logging_steps=1000, generation_kwargs={"min_new_tokens": args.tokens})
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
        trainer = RLOOTrainer(
            model, reward_funcs=lambda completions, **_: [next(rewards) for _ in completions], args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts[:n_prompts * (runs + 1)]}), callbacks=[Clock()],
            processing_class=transformers.AutoTokenizer.from_pretrained(args.model, padding_side="left"))
        trainer.train()
    return statistics.median(clocks[1:]), train.peak_memory_gb(args.device)


def bench_step(args):
    n_prompts = args.problems or 2

    def alone(function, *arguments):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, args, *arguments).result()
    hard, hard_gb, _ = alone(our_step, "hard", n_prompts, args.runs)
    print(f"hard: {hard:.1f} s, {hard_gb:.2f} GB", flush=True)
    soft, soft_gb, foretold_gb = alone(our_step, "soft", n_prompts, args.runs)
    print(f"soft: {soft:.1f} s, {soft_gb:.2f} GB", flush=True)
    report("step_soft_vs_hard", soft, hard)
    report("plan_vs_measured_memory", foretold_gb, soft_gb)
    trl, trl_gb = alone(trl_step, n_prompts, args.runs)
    print(f"RLOOTrainer: {trl:.1f} s, {trl_gb:.2f} GB", flush=True)
    report("step_hard_vs_trl", hard, trl)
    report("step_memory_vs_trl", hard_gb, trl_gb)
    many, *_ = alone(our_step, "hard", 4 * n_prompts, args.runs)
    report("rows_scaling", many, hard)


# --------------------------------------------------------------------------------------------------
# Evaluation

def bench_eval(args):
    """Sampling answers to many problems, hard tokens at temperature 1: evaluate() against generate()."""
    model, tokenizer, notes = load(args.model, torch.bfloat16, args.device)
    problems = load_problems(args.data, "test")[:args.problems or 64]
    options = dict(n_samples=args.samples, cot_len=args.tokens - 16, answer_len=8, batch=args.batch,
                   watch=Watch.build(tokenizer, model.config.vocab_size, args.device))
    peer, peer_tokenizer = peer_and_tokenizer(args, torch.bfloat16)
    prompts = [notes["prompt"].replace("{question}", p["question"]) for p in problems]
    counts, ours, theirs = [], [], []

    def run_ours():
        _, samples = evaluate(model, tokenizer, notes, problems, "hard_sample", **options)
        counts.append(sum(s["length"] for s in samples) / len(samples))

    def run_theirs(n_new):
        per_batch = args.batch // args.samples
        for i in range(0, len(prompts), per_batch):
            peer_generate(peer, peer_tokenizer, prompts[i:i + per_batch], args.samples, n_new)
    for _ in range(args.runs):  # in turn, so that both see the same machine
        ours.append(seconds(run_ours))
        theirs.append(seconds(lambda: run_theirs(round(counts[-1]))))
        print(f"ours {ours[-1]:.1f} s, generate {theirs[-1]:.1f} s, for {counts[-1]:.1f} tokens a sample", flush=True)
    report("eval_vs_generate", statistics.median(ours), statistics.median(theirs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rollout", "loss", "step", "eval"])
    parser.add_argument("--model", default=os.environ.get("SMOLLM2"), help="checkpoint directory")
    parser.add_argument("--data", default="gsm8k", help="problems")
    parser.add_argument("--problems", type=int, help="default 64 for eval, 2 otherwise")
    parser.add_argument("--samples", type=int, help="of each problem; default 8 for eval, 32 otherwise")
    parser.add_argument("--tokens", type=int, default=128, help="most per sample")
    parser.add_argument("--batch", type=int, default=64, help="rows alive at a time in eval, on both sides")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=5, help="after one to warm up")
    arguments = parser.parse_args()
    arguments.samples = arguments.samples or (8 if arguments.what == "eval" else 32)
    if not arguments.model and arguments.what != "loss":
        parser.exit(2, "bench.py: error: --model is missing; name a checkpoint directory, or set SMOLLM2\n")
    {"rollout": bench_rollout, "loss": bench_loss, "step": bench_step, "eval": bench_eval}[arguments.what](arguments)

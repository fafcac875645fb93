"""
Measurements against transformers, on a real checkpoint; no test, and not run by pytest.

    python tests/bench.py eval --model path/to/SmolLM2-135M-Instruct --data path/to/gsm8k_test.jsonl

The checkpoint may also be named by the environment variable SMOLLM2. transformers must be installed. The last line of
each figure is JSON: {"name", "ours", "peer", "ratio"}, in seconds.
"""
import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval import evaluate, load_problems  # noqa: E402
from sample import Watch, load  # noqa: E402


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def bench_eval(args):
    """Sampling answers to many problems, hard tokens at temperature 1: evaluate() against generate()."""
    import transformers
    model, tokenizer, notes = load(args.model, torch.bfloat16)
    problems = load_problems(args.data, "test")[:args.problems]
    options = dict(n_samples=args.samples, cot_len=args.tokens - 16, answer_len=8, batch=args.batch,
                   watch=Watch.build(tokenizer, model.config.vocab_size))
    peer = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    peer_tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, padding_side="left")
    peer_tokenizer.pad_token = peer_tokenizer.pad_token or peer_tokenizer.eos_token
    prompts = [notes["prompt"].replace("{question}", p["question"]) for p in problems]
    counts, ours, theirs = [], [], []

    def run_ours():
        _, samples = evaluate(model, tokenizer, notes, problems, "hard_sample", **options)
        counts.append(sum(s["length"] for s in samples) / len(samples))

    def run_theirs(n_new):
        per_batch = args.batch // args.samples
        for i in range(0, len(prompts), per_batch):
            batch = peer_tokenizer(prompts[i:i + per_batch], return_tensors="pt", padding=True)
            peer.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=n_new,
                          min_new_tokens=n_new, num_return_sequences=args.samples, pad_token_id=peer_tokenizer.pad_token_id)
    for _ in range(args.runs):  # in turn, so that both see the same machine
        ours.append(seconds(run_ours))
        theirs.append(seconds(lambda: run_theirs(round(counts[-1]))))
        print(f"ours {ours[-1]:.1f} s, generate {theirs[-1]:.1f} s, for {counts[-1]:.1f} tokens per sample", flush=True)
    report("eval_vs_generate", statistics.median(ours), statistics.median(theirs))


def report(name, ours, peer):
    print(json.dumps({"name": name, "ours": round(ours, 4), "peer": round(peer, 4), "ratio": round(ours / peer, 4)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["eval"])
    parser.add_argument("--model", default=os.environ.get("SMOLLM2"), help="checkpoint directory")
    parser.add_argument("--data", default="gsm8k", help="problems")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="most per sample")
    parser.add_argument("--batch", type=int, default=64, help="rows alive at a time, in both")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    if not arguments.model:
        parser.exit(2, "bench.py: error: --model is missing; name a checkpoint directory, or set SMOLLM2\n")
    {"eval": bench_eval}[arguments.what](arguments)

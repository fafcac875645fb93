"""
What a GPU does with the recorded step, and every measurement of bench.py, in minutes and in one command:

    python tests/gpu.py all --out gpu.json --model path/to/SmolLM2-135M-Instruct --data path/to/gsm8k_test.jsonl
    python tests/gpu.py decode --random_weights 3B    # or tiny, 135M, 8B, a config.json; or host, same, rollout ...

Models of 3B and 8B have random weights, and without --model so has the small one. Where no GPU is, all of it runs on a
model of tiny size: that shows that it works, and its figures mean nothing.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

import bench
import sample
import train
from bench import decoder_at, in_turn, opened, report, say, together
from model import Config, Transformer, read_json
from sample import ROUND, Decoder, Recorded, Row, text_of_ids

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "vocab_size", "tie_word_embeddings")
SIZES = {"tiny": (64, 192, 3, 4, 2, 16, 512, True), "135M": (576, 1536, 30, 9, 3, 64, 49152, True),
         "3B": (3072, 8192, 28, 24, 8, 128, 128256, True), "8B": (4096, 14336, 32, 32, 8, 128, 128256, False)}


def write_random(size, path, device):
    """A checkpoint directory of one of SIZES or of a config.json: random weights, the tiny tokenizer, and problems."""
    train.write_tiny_model(path, 0)
    raw = train.TINY_CONFIG | {"max_position_embeddings": 4096} | (
        dict(zip(SHAPE, SIZES[size])) if size in SIZES else read_json(size))
    with torch.device(device):
        model = Transformer(Config.from_dict(raw))
    model.init_weights()
    model.bfloat16().save_pretrained(path)
    problems = [json.dumps({"question": f"{i}+2*3-4" + "+1*2-3" * 20, "answer": "5"}) for i in range(99)]
    (path / "problems.jsonl").write_text("\n".join(problems))
    return {"model": str(path), "data": str(path / "problems.jsonl")}


@torch.no_grad()
def decode(args):
    """A step by itself and recorded, its matrix products alone, and the time in which a copy moves as many bytes."""
    on_gpu, dtype = args.device.startswith("cuda"), args.dtypes[0]
    model, *rest = opened(args, dtype)
    decoder = decoder_at(args.tokens // 2, model, *rest, args.samples)
    columns, table, B = decoder.cache.columns, model.embed_tokens.weight, len(decoder.rows)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs, probs = {m.in_features: table.new_ones(B, m.in_features) for m in layers}, table.new_zeros(B, len(table))
    recorded, source = Recorded(decoder.step, on_gpu), torch.zeros(2 ** 28, dtype=torch.uint8, device=args.device)
    for _ in range(3):  # runs, records, replays
        recorded(columns)
    if not on_gpu or not recorded.on_gpu:
        print("CUDA graphs are not available: recorded is the same as eager")
    sides = (lambda: decoder.step(columns), lambda: recorded(columns), lambda: source.clone(),
             lambda: [probs @ table] + [F.linear(inputs[m.in_features], m.weight) for m in layers])
    repeats = 20 if on_gpu else 1
    eager, replay, copy, products = (t / repeats for t in in_turn(args.runs, *(
        lambda side=side: [side() for _ in range(repeats)] for side in sides)))
    twice = table.numel() * model.config.tie_word_embeddings  # read for the logits and for the mixture
    n_bytes = table.itemsize * (sum(p.numel() for p in model.parameters()) + twice
                                + sum(x[:, :, :columns].numel() for pair in decoder.cache.kv for x in pair))
    floor = max(products, n_bytes * copy / (2 * len(source)))
    say(f"decode_{dtype}", rows=B, columns=columns, eager_ms=1e3 * eager, recorded_ms=1e3 * replay, gb=n_bytes / 1e9,
        products_ms=1e3 * products, gb_per_s=2e-9 * len(source) / copy, floor_ms=1e3 * floor)
    report(f"decode_vs_matmuls_{dtype}", replay, products)
    report(f"decode_vs_floor_{dtype}", replay, floor)


def host(args):
    """Milliseconds of Python between two steps of 256 rows: their noise, where they stand, their next tokens."""
    model, tokenizer, *rest = opened(args, "bfloat16")
    decoder, text_of = decoder_at(0, model, tokenizer, *rest, 256 // len(rest[1])), text_of_ids(tokenizer)
    tokens = [37 * i % tokenizer.get_vocab_size() for i in range(len(decoder.rows))]
    for row in decoder.rows:
        row.notes = row.notes | {"cot_len": 10 ** 6}
    noise = decoder.draw()
    draw, tell, take = (1e3 * t / ROUND for t in in_turn(
        args.runs, decoder.draw, lambda: [decoder.tell(part) for part in noise],
        lambda: [row.take(i, text_of(i)) for _ in noise for row, i in zip(decoder.rows, tokens)]))
    say("host_ms_per_step", ours=draw + tell + take, draw=draw, tell=tell, take=take)


def steps_of(args, device, rank=None):
    """The log of 20 steps in float32; noise is drawn on the host, so that it is the same on any device. With a rank: as
    one of two processes on one device, joined by gloo."""
    sample.Row = lambda *a: Row(*a[:-1], "cpu")
    Decoder.draw = lambda self, draw=Decoder.draw: draw(argparse.Namespace(
        rows=self.rows, noise=self.noise, live=torch.empty(0))).to(self.noise.device)
    if rank is not None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        train.dist.init_process_group("gloo", init_method=f"file://{args.meeting}/meeting", rank=rank, world_size=2)
        train.init_device_mesh = lambda kind, _: DeviceMesh.from_group(train.dist.group.WORLD, kind)  # not nccl
    return bench.our_steps(args, steps=20, dtype="float32", device=device)[0]


def same(args):
    """Differences in loss, over the largest loss: of the device and a CPU; of one process and two on that device."""
    (ours,), (cpu,) = (together(args, (steps_of, {"device": device})) for device in (args.device, "cpu"))
    scale = max(abs(x["loss"]) for x in ours)

    def compare(name, peer):
        off = [abs(x["loss"] - y["loss"]) / scale for x, y in zip(ours, peer)]
        say(f"same_{name}", first=off[0], largest=max(off))
    compare("device_vs_cpu", cpu)
    with tempfile.TemporaryDirectory() as args.meeting:
        both = together(args, *((steps_of, {"device": args.device, "rank": rank}) for rank in range(2)))
    compare("one_vs_two_processes", both[0])


def everything(args):
    """Every part in a process of its own; figures and failures go to args.out as they come."""
    on_gpu, parts = args.device.startswith("cuda"), []
    small = ["ops", "host", "drift", "decode", "rollout", "step", "same"]
    sizes = {args.model or "135M": small + ["loss"], "3B": ["decode", "rollout", "step"], "8B": ["decode", "rollout"]}
    for what, size in [("tests", None)] + [
            (what, size) for size, all_ in (sizes if on_gpu else {"tiny": small}).items() for what in all_]:
        command = [__file__, what, "--device", args.device, "--runs", 3 if on_gpu else 1]
        command += ["--model", size, "--data", args.data] if size == args.model else ["--random_weights", size]
        command += ["--micro_batch", 8] * (size == "3B") + ["--tokens", 32, "--samples", 8] * (not on_gpu)
        if what == "tests":
            command = ["-m", "pytest", "-q", Path(__file__).parent] + ["--collect-only"] * (not on_gpu)
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True)
        lines = done.stdout.strip().splitlines() or [""]
        figures = [json.loads(line) for line in lines if line.startswith('{"name"')]
        parts.append({"part": what, "size": size, "status": done.returncode, "figures": figures, "seconds":
                      time.perf_counter() - start, "end": lines[-1] if not figures or done.returncode else ""})
        print(json.dumps(parts[-1]), flush=True)
        Path(args.out).write_text(json.dumps(parts, indent=1) + "\n")


if __name__ == "__main__":
    parts = {"all": everything, "decode": decode, "host": host, "same": same} | {
        name: getattr(bench, f"bench_{name}") for name in ("rollout", "loss", "step", "eval", "drift", "ops")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=parts)
    parser.add_argument("--model", default=os.environ.get("SMOLLM2"), help="checkpoint directory")
    parser.add_argument("--random_weights", metavar="SIZE", help=f"{', '.join(SIZES)}, or a config.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for flag, default in (("data", "gsm8k"), ("out", "gpu.json")):
        parser.add_argument(f"--{flag}", default=default)
    for flag, default in (("runs", 5), ("tokens", 128), ("samples", 32), ("micro_batch", 16), ("problems", None)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    args = parser.parse_args()
    args.dtypes = ["bfloat16"]
    with tempfile.TemporaryDirectory() as folder:
        if args.random_weights:
            vars(args).update(write_random(args.random_weights, Path(folder), args.device))
            torch.cuda.empty_cache()  # for the processes that share the GPU
        parts[args.what](args)

"""The scripts as a user runs them: at toy size, with mistakes, on one process and on two."""
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SHARED, script, script_inside
from safetensors.torch import load_file

from sample import load
from train import write_tiny_model

TOY = ["--steps", 3, "--prompts", 2, "--samples", 4, "--val_size", 6, "--cot_len", 10, "--answer_len", 3, "--lr", 1e-3,
       "--eval_every", 2, "--data", "arithmetic", "--dtype", "float32", "--micro_batch", 3, "--warmup", 1]
FIELDS = {"step", "reward", "accuracy", "truncated", "unparsed", "zero_advantage", "cot_len", "entropy", "delta_logp",
          "grad_norm", "lr", "generate_s", "train_s", "tokens_per_s", "peak_gb"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base after a few supervised steps, trained by the script itself."""
    path = tmp_path_factory.mktemp("base")
    done = script("train.py", "--mode", "sft", "--steps", 40, "--val_size", 6, "--out", path)
    assert done.returncode == 0, done.stderr
    assert "step 40: hard_greedy" in done.stdout
    losses = [json.loads(line)["loss"] for line in (path / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 40 and losses[-1] < 0.7 * losses[0]
    return path / "best"


@pytest.mark.parametrize("mode", ["hard", "soft", "fuzzy"])
def test_train_writes_log_summary_and_checkpoints(mode, base, tmp_path):
    out = tmp_path / "a folder with spaces"
    done = script("train.py", "--mode", mode, "--model", base, "--out", out, *TOY)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2] and all(FIELDS <= line.keys() for line in lines)
    assert all(math.isfinite(v) for line in lines for v in line.values())
    assert all(line["delta_logp"] < 1e-2 for line in lines)
    summary = json.loads((out / "summary.json").read_text())
    own = {f"{mode}_greedy", "hard_greedy"}
    assert set(summary["base"]) == set(summary["final"]) == own
    assert (out / "last" / "model.safetensors").exists()
    before, after = (load_file(p / "model.safetensors") for p in (base, out / "last"))
    assert any(not torch.equal(before[k], after[k]) for k in before)
    _, _, notes = load(summary["checkpoint"])
    assert json.loads((out / "best" / "args.json").read_text())["mode"] == mode
    assert notes["embedding_rms"] == pytest.approx(load(base)[2]["embedding_rms"])  # measured once, on the base


def toy(**changes):
    """The toy flags with other values: toy(samples=3)."""
    flags = list(TOY)
    for name, value in changes.items():
        flags[flags.index(f"--{name}") + 1] = value
    return flags


def assert_same_weights(first, second, lr=1e-3, steps=3):
    """Equal up to rounding: AdamW turns the sign of a gradient near 0 into a whole step, so a few may be apart."""
    a, b = (load_file(path / "last" / "model.safetensors") for path in (first, second))
    apart = torch.cat([(a[k] - b[k]).abs().flatten() for k in a])
    assert (apart > 1e-4).double().mean() < 1e-3 and apart.max() < 2 * steps * lr


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_logs(first, second):
    a, b = log_of(first), log_of(second)
    assert len(a) == len(b) == 3 and any(line["grad_norm"] > 0 for line in a)
    for one, two in zip(a, b):
        for field in ("reward", "accuracy", "cot_len", "zero_advantage", "lr"):
            assert one[field] == pytest.approx(two[field]), field
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_size_of_the_micro_batch_makes_no_difference(base, tmp_path):
    for size in (1, 8):
        done = script_inside("train.py", "--model", base, "--out", tmp_path / str(size), *toy(micro_batch=size))
        assert done.returncode == 0, done.stderr
    assert_same_logs(tmp_path / "1", tmp_path / "8")
    assert_same_weights(tmp_path / "1", tmp_path / "8")


def test_plan_needs_only_the_configuration_and_writes_nothing(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    micro = []
    for gigabytes in ("0.2", "80"):
        done = script_inside("train.py", "--plan", gigabytes, "--model", ".", *toy(samples=300))
        assert done.returncode == 0, done.stderr
        header, *lines = done.stdout.splitlines()
        assert header.split()[-4:] == ["1", "2", "4", "8"] and lines[-1].startswith(f"micro_batch in {gigabytes} GB")
        micro.append(int(lines[-1].split()[-4]))
    assert micro[0] < micro[1] == 600
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_two_ranks_equal_one_rank(mode, base, tmp_path):
    """Three groups of three on two ranks: the middle group is split between them."""
    flags = ["--mode", mode, "--model", str(base), *map(str, toy(prompts=3, samples=3))]
    one = script_inside("train.py", "--out", tmp_path / "one", *flags)
    assert one.returncode == 0, one.stderr
    two = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(ROOT / "train.py"), "--out", str(tmp_path / "two"), *flags],
        text=True, capture_output=True, timeout=100, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert two.returncode == 0, two.stderr
    assert_same_logs(tmp_path / "one", tmp_path / "two")
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def test_interrupt_saves_and_exits_cleanly(base, tmp_path):
    flags = map(str, toy(steps=100000, eval_every=100000))
    run = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--mode", "soft", "--model", str(base), "--out",
                            str(tmp_path), *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    log = tmp_path / "log.jsonl"
    for _ in range(600):
        time.sleep(0.1)
        if log.exists() and log.read_text().count("\n") >= 2:
            break
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 0
    assert (tmp_path / "last" / "model.safetensors").exists() and (tmp_path / "summary.json").exists()


def test_sample_prints_thought_answer_and_the_heaviest_tokens(base):
    plain, again, other = (script_inside("sample.py", "--model", base, "--mode", "soft", "--cot_len", 8, "--seed", seed,
                                         "3+4*2") for seed in (0, 0, 9))
    assert plain.returncode == 0 and "answer: " in plain.stdout and "tokens/s" in plain.stderr
    assert "\\boxed{" in plain.stdout and again.stdout == plain.stdout != other.stdout
    shown = script("sample.py", "--model", base, "--greedy", "--show", 3, "--cot_len", 8, "3+4*2")
    rows = [line for line in shown.stdout.splitlines() if "|" in line]
    weights = [[float(w) for w in re.findall(r" (\d\.\d{3})\b", row.split("|")[1])] for row in rows]
    assert shown.returncode == 0 and rows and all(len(w) == 3 and w == sorted(w, reverse=True) for w in weights)


def test_eval_writes_results_continues_an_interrupted_run_and_compares(base, tmp_path):
    (tmp_path / "mmlu.jsonl").write_text("".join(json.dumps(
        {"question": f"User: {i}", "choices": ["1", "2", "3", "4"], "answer": i % 4}) + "\n" for i in range(5)))
    flags = ["--model", base, "--settings", "all", "--samples", 4, "--limit", 5, "--cot_len", 8, "--base", base,
             "--data", f"arithmetic,{tmp_path}/mmlu.jsonl"]
    first = script("eval.py", *flags, "--out", tmp_path / "a.json")
    assert first.returncode == 0, first.stderr
    whole = json.loads((tmp_path / "a.json").read_text())["results"]
    assert len(whole["arithmetic"]) == 6 and {"pass@1", "pass@4", "entropy"} <= whole["arithmetic"]["soft_sample"].keys()
    assert all(name in first.stdout for name in whole["arithmetic"])
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 5 * (3 * 4 + 3) + 5

    (tmp_path / "b.jsonl").write_text("".join(lines[:31]) + lines[31][:20])  # killed within a line
    second = script_inside("eval.py", *flags, "--out", tmp_path / "b.json", "--compare", tmp_path / "a.json")
    assert second.returncode == 0, second.stderr
    again = json.loads((tmp_path / "b.json").read_text())["results"]
    assert json.dumps(again["arithmetic"]) == json.dumps(whole["arithmetic"])
    assert sorted((tmp_path / "b.jsonl").read_text().splitlines()) == sorted("".join(lines).splitlines())
    differences = re.findall(r"soft_sample pass@4 +5 +([+-][\d.]+)", second.stdout)
    assert differences == ["+0.0000"]
    other = script_inside("eval.py", *flags, "--seed", 1, "--out", tmp_path / "a.json")
    assert other.returncode == 2 and "another run" in other.stderr


def test_plot_draws_results_or_says_what_to_install(base, tmp_path):
    done = script_inside("eval.py", "--model", base, "--samples", 4, "--limit", 3, "--cot_len", 4, "--settings",
                         "hard_greedy,hard_sample", "--out", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    drawn = script_inside("eval.py", "--plot", tmp_path / "r.svg", tmp_path / "r.json", tmp_path / "r.json")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert drawn.returncode == 2 and "pip install matplotlib" in drawn.stderr
    else:
        assert drawn.returncode == 0 and "<svg" in (tmp_path / "r.svg").read_text()


def test_prompt_file_replaces_the_prompt_and_is_saved(base, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("User: 1+1 Assistant: 1+1=2 User: {question} Assistant:")
    done = script_inside("train.py", "--mode", "hard", "--model", base, "--out", tmp_path, "--prompt_file", file, *TOY)
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "best")[2]["prompt"].startswith("User: 1+1 Assistant:")
    done = script_inside("eval.py", "--model", base, "--prompt_file", file, "--limit", 2, "--cot_len", 4)
    assert done.returncode == 0, done.stderr
    done = script_inside("sample.py", "--model", base, "--prompt_file", file, "--cot_len", 4, "1+1")
    assert done.returncode == 0, done.stderr


def test_supervised_training_on_a_file_with_solutions(base, tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(
        {"question": f"{i}+1", "answer": f"{i}+1={i + 1}\n#### {i + 1}"}) + "\n" for i in range(9)))
    done = script_inside("train.py", "--mode", "sft", "--model", base, "--out", tmp_path / "out", "--steps", 4, "--val_size", 3,
                  "--data", tmp_path / "d.jsonl", "--cot_len", 8, "--answer_len", 2, "--dtype", "bfloat16",
                         "--prompts", 3)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "best" / "args.json").read_text())["samples"] == 1
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and 0.1 < losses[0] < 10  # nats per token, whatever the batch


def test_real_benchmark_file_trains(base, tmp_path):
    file = SHARED / "data" / "mawps.jsonl"
    if not file.exists():
        pytest.skip("the benchmark files are not here")
    long = tmp_path / "long"  # the tiny model with a context for word problems
    write_tiny_model(long, 0)
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    done = script_inside("train.py", "--mode", "fuzzy", "--model", long, "--out", tmp_path / "out", *toy(data=file))
    assert done.returncode == 0, done.stderr


BAD = {
    "model that does not exist": (["train.py", "--model", "nowhere"], "nowhere"),
    "directory without config": (["sample.py", "--model", "{tmp}", "1+1"], "config.json"),
    "unsupported architecture": (["eval.py", "--model", "{tmp}/gpt2"], "gpt2"),
    "one sample": (["train.py", "--model", "{base}", "--samples", "1"], "--samples 1"),
    "negative learning rate": (["train.py", "--lr", "-1"], "--lr"),
    "no steps": (["train.py", "--steps", "0"], "--steps"),
    "unknown mode": (["train.py", "--mode", "loud"], "--mode"),
    "unknown task": (["train.py", "--model", "{base}", "--data", "nonsense"], "--data nonsense"),
    "data without an answer": (["train.py", "--model", "{base}", "--data", "{tmp}/no_answer.jsonl"], "no_answer.jsonl:2"),
    "data that is not JSON": (["eval.py", "--model", "{base}", "--data", "{tmp}/broken.jsonl"], "broken.jsonl:1"),
    "empty data": (["eval.py", "--model", "{base}", "--data", "{tmp}/empty.jsonl"], "empty.jsonl"),
    "data file that does not exist": (["eval.py", "--model", "{base}", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "prompt longer than the context": (["sample.py", "--model", "{base}", "1" * 300], "context of 256"),
    "question of the data longer than the context": (
        ["train.py", "--model", "{base}", "--data", "{tmp}/long.jsonl", "--val_size", "1"], "context of 256"),
    "unknown setting": (["eval.py", "--model", "{base}", "--settings", "soft"], "--settings soft"),
    "prompt file without a question": (["eval.py", "--model", "{base}", "--prompt_file", "{tmp}/empty.jsonl"], "{question}"),
    "prompt file that does not exist": (["eval.py", "--model", "{base}", "--prompt_file", "nowhere"], "--prompt_file"),
    "no solutions to imitate": (
        ["train.py", "--mode", "sft", "--model", "{base}", "--data", "{tmp}/plain.jsonl", "--val_size", "1"], "solutions"),
    "more validation problems than problems": (["train.py", "--model", "{base}", "--data", "{tmp}/plain.jsonl"], "--val_size"),
}


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("mistakes")
    (tmp / "gpt2").mkdir()
    (tmp / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp / "no_answer.jsonl").write_text('{"question": "1+1", "answer": "2"}\n{"question": "1+2"}\n')
    (tmp / "broken.jsonl").write_text("question: 1+1\n")
    (tmp / "empty.jsonl").write_text("\n")
    (tmp / "long.jsonl").write_text(json.dumps({"question": "1" * 300, "answer": "2"}) + "\n" + json.dumps(
        {"question": "1" * 301, "answer": "2"}) + "\n")
    (tmp / "plain.jsonl").write_text('{"question": "1+1", "answer": "2"}\n{"question": "1+2", "answer": "3"}\n')
    return tmp


@pytest.mark.parametrize("name", BAD)
def test_mistake_ends_in_one_line_that_names_it(name, base, mistakes, monkeypatch):
    monkeypatch.chdir(mistakes)
    args, expected = BAD[name]
    done = script_inside(*(a.replace("{tmp}", str(mistakes)).replace("{base}", str(base)) for a in args))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and expected in done.stderr
    assert not list(mistakes.glob("out/*/best"))


def test_mistake_in_a_fresh_process_has_no_traceback(tmp_path):
    done = script("sample.py", "--model", tmp_path / "nowhere", "1+1")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nowhere" in done.stderr


@pytest.mark.parametrize("name", ["train.py", "sample.py", "eval.py"])
def test_help_shows_the_examples(name):
    done = script_inside(name, "--help")
    assert done.returncode == 0 and f"python {name} --m" in done.stdout

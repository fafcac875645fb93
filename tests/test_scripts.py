"""The scripts as a user runs them: at toy size, with mistakes, on one process and on two."""
import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SHARED, random_model, script, script_inside
from safetensors.torch import load_file, save_file

from eval import load_problems
from model import Transformer
from sample import MODES, load
from train import checkpoints, hold_out, newest_checkpoint, write_tiny_model

TOY = ["--steps", 3, "--prompts", 2, "--samples", 4, "--val_size", 6, "--cot_len", 10, "--answer_len", 3, "--lr", 1e-3,
       "--eval_every", 2, "--data", "arithmetic", "--dtype", "float32", "--micro_batch", 3, "--warmup", 1]
FIELDS = {"step", "reward", "accuracy", "truncated", "unparsed", "zero_advantage", "cot_len", "entropy", "delta_logp",
          "grad_norm", "skipped", "lr", "generate_s", "train_s", "tokens_per_s", "peak_gb"}


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
    assert (out / "best").resolve().name in [p.name for p in checkpoints(out)] and len(checkpoints(out)) <= 3
    before, after = (load_file(p / "model.safetensors") for p in (base, checkpoints(out)[-1]))
    assert any(not torch.equal(before[k], after[k]) for k in before)
    _, _, notes = load(summary["checkpoint"])
    assert json.loads((out / "best" / "args.json").read_text())["mode"] == mode
    assert notes["rms"] == load(base)[2]["rms"]  # measured once, on the base
    assert load_problems(str(out / "val.jsonl"), "test") == load_problems("arithmetic", "val", 6)
    assert "--data arithmetic --settings all" in done.stdout


def test_a_run_without_a_test_set_points_to_what_it_held_out(base, tmp_path):
    data, out = tmp_path / "own.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(p) + "\n" for p in load_problems("arithmetic", "train", 40)))
    done = script_inside("train.py", "--model", base, "--out", out, *toy(steps=1, data=data))
    assert done.returncode == 0, done.stderr
    assert f"--data {out / 'val.jsonl'} --settings all" in done.stdout
    val, _ = hold_out(load_problems(str(data), "train"), 6)
    assert load_problems(str(out / "val.jsonl"), "test") == val


def toy(**changes):
    """The toy flags with other values: toy(samples=3)."""
    flags = list(TOY)
    for name, value in changes.items():
        flags[flags.index(f"--{name}") + 1] = value
    return flags


def assert_same_weights(first, second, lr=1e-3, steps=3):
    """Equal up to rounding: AdamW turns the sign of a gradient near 0 into a whole step, so a few may be apart."""
    a, b = (load_file(checkpoints(path)[-1] / "model.safetensors") for path in (first, second))
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


# Several ranks, and runs that are cut off

def start(out, base, *flags, ranks=1):
    """Start train.py in a process group of its own, under torchrun if there are several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks] if ranks > 1 else []
    command = [sys.executable, *launcher, ROOT / "train.py", "--out", out, "--model", base, *flags]
    return subprocess.Popen([*map(str, command)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(*args, timeout=100, **options):
    """Start it and see it end well."""
    run = start(*args, **options)
    output, _ = run.communicate(timeout=timeout)
    assert run.returncode == 0, output
    return output


def wait_for(condition, run, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition() or run.poll() is not None:
            return
        time.sleep(0.001)
    raise AssertionError("it never came to that")


def workers(run):
    """The processes that it started: the ranks of torchrun."""
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], text=True, capture_output=True)
    return [int(pid) for pid in done.stdout.split()]


def n_lines(out):
    return (out / "log.jsonl").read_text().count("\n") if (out / "log.jsonl").exists() else 0


def remove_last_checkpoint(out):
    shutil.rmtree(checkpoints(out)[-1])


LAYOUTS = [("soft", 2, []), ("hard", 4, ["--activation_checkpointing"]), ("fuzzy", 4, ["--shard_size", 2])]
if "SOAK" in os.environ:  # each mode in each layout
    LAYOUTS = [(mode, *layout) for mode in MODES for layout in ((2, []), (4, []), (4, ["--shard_size", 2]))]


@pytest.mark.parametrize("mode, ranks, extra", LAYOUTS)
def test_several_ranks_equal_one_and_go_on_from_each_others_checkpoints(mode, ranks, extra, base, tmp_path):
    """Three groups of three rows: a group is split between ranks."""
    flags = ["--mode", mode, "--keep", 9, *toy(prompts=3, samples=3, eval_every=1, lr=1e-4)]
    one, many = tmp_path / "one", tmp_path / "many"
    finish(one, base, *flags)
    finish(many, base, *flags, *extra, ranks=ranks)
    assert_same_logs(one, many)
    assert_same_weights(one, many, lr=1e-4)
    weights = load_file(checkpoints(one)[-1] / "model.safetensors")
    remove_last_checkpoint(one)
    remove_last_checkpoint(many)
    finish(one, base, *flags, *extra, "--resume", ranks=ranks)
    finish(many, base, *flags, "--resume")
    assert_same_logs(one, many)
    assert_same_weights(one, many, lr=1e-4)
    again = load_file(checkpoints(one)[-1] / "model.safetensors")
    assert max((weights[k] - again[k]).abs().max() for k in weights) < 1e-3


def test_gradient_sources_are_logged_alike_on_two_ranks(base, tmp_path):
    flags = ["--mode", "soft", "--log_grad_sources", *toy(samples=16)]
    finish(tmp_path / "one", base, *flags)
    finish(tmp_path / "two", base, *flags, ranks=2)
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two")):
        for source in ("logits", "embedding", "answer"):
            assert 0 < one[f"grad_{source}"] == pytest.approx(two[f"grad_{source}"], rel=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_run_resumes_to_the_same_weights_and_log(ranks, base, tmp_path):
    """kill -9 at random moments and during the writing of a checkpoint; SOAK: how often of each."""
    soak = int(os.environ.get("SOAK", 1))
    flags = ["--mode", "soft", *toy(steps=20 * soak, eval_every=1, samples=3)]
    whole, cut, rng = tmp_path / "whole", tmp_path / "cut", random.Random(ranks)
    finish(whole, base, *flags, ranks=ranks)
    for kill in range(2 * soak):
        before = n_lines(cut)
        run = start(cut, base, *flags, "--resume", ranks=ranks)
        if kill % 2:
            wait_for(lambda: [*cut.glob("step-*.new")], run)
        else:
            wait_for(lambda: n_lines(cut) > before, run)
            time.sleep(rng.uniform(0, 0.2))
        for pid in (run.pid, *workers(run)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.communicate()
        assert run.returncode == -signal.SIGKILL  # it was at work
    finish(cut, base, *flags, "--resume", ranks=ranks)
    timed = ("generate_s", "train_s", "tokens_per_s", "peak_gb")
    plain = [[{k: v for k, v in line.items() if k not in timed} for line in log_of(out)] for out in (whole, cut)]
    assert plain[0] == plain[1] and len(plain[0]) == 20 * soak
    assert newest_checkpoint(cut).name == newest_checkpoint(whole).name == f"step-{20 * soak:06d}"
    a, b = (load_file(checkpoints(out)[-1] / "training" / "masters.safetensors") for out in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (cut / "best").resolve().name == (whole / "best").resolve().name
    assert (cut / "summary.json").read_text() == (whole / "summary.json").read_text().replace("whole", "cut")


@pytest.mark.parametrize("number, ranks", [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_interrupt_and_termination_save_and_end(number, ranks, base, tmp_path):
    flags = ["--mode", "soft", *toy(steps=100000, eval_every=100000)]
    run = start(tmp_path, base, *flags, ranks=ranks)
    wait_for(lambda: n_lines(tmp_path) >= 2, run)
    run.send_signal(number)
    output, _ = run.communicate(timeout=30)
    assert (run.returncode == 0) == (ranks == 1), output  # torchrun itself reports the signal
    assert f"step-{n_lines(tmp_path):06d}" == newest_checkpoint(tmp_path).name and "--resume" in output
    assert not (tmp_path / "summary.json").exists()


def test_second_interrupt_ends_at_once(base, tmp_path):
    run = start(tmp_path, base, *toy(steps=10, eval_every=10, prompts=8000))  # a step takes long
    wait_for(lambda: checkpoints(tmp_path), run)
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert run.wait(10) == 130


def test_second_run_in_the_same_directory_is_refused(base, tmp_path):
    flags = toy(steps=100000, eval_every=100000)
    run = start(tmp_path, base, *flags)
    wait_for(lambda: n_lines(tmp_path) >= 1, run)
    assert_one_line(script_inside("train.py", "--out", tmp_path, "--model", base, *flags, "--resume"), "another run")
    run.kill()
    run.communicate()
    lines = n_lines(tmp_path)
    assert lines >= 1 and len(log_of(tmp_path)) == lines


def test_all_ranks_end_when_one_is_killed(base, tmp_path):
    run = start(tmp_path, base, *toy(steps=100000, eval_every=100000), ranks=2)
    wait_for(lambda: n_lines(tmp_path) >= 2, run)
    os.kill(workers(run)[-1], signal.SIGKILL)
    run.communicate(timeout=60)
    assert run.returncode != 0
    assert newest_checkpoint(tmp_path).name == "step-000000"


def test_full_disk_ends_in_one_line_and_the_last_checkpoint_is_intact(base, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        done = script_inside("train.py", "--model", base, "--out", disk / "run", *TOY)
        assert done.returncode == 2 and done.stderr.count("train.py: error:") == 1 and "No space left" in done.stderr
        assert "Traceback" not in done.stderr and newest_checkpoint(disk / "run").name == "step-000000"
        assert [p.name for p in checkpoints(disk / "run")] == ["step-000000"] and not [*disk.glob("run/*.new")]
    finally:
        subprocess.run(["umount", disk])


@pytest.mark.parametrize("bad_steps, outcome", [([1], 0), ([0, 1, 2, 3, 4], 1)])
def test_steps_without_a_finite_gradient_are_skipped_and_five_in_a_row_end_the_run(bad_steps, outcome, base, tmp_path,
                                                                                  monkeypatch):
    log_prob = Transformer.log_prob

    def spoilt(self, *args):
        loss, logp = log_prob(self, *args)
        return loss * (math.nan if n_lines(tmp_path) in bad_steps else 1.0), logp
    monkeypatch.setattr(Transformer, "log_prob", spoilt)
    done = script_inside("train.py", "--model", base, "--out", tmp_path, "--keep", 9,
                         *toy(steps=6, eval_every=1, samples=16))
    skipped = [line["skipped"] for line in log_of(tmp_path)]
    weights = [load_file(path / "model.safetensors") for path in checkpoints(tmp_path)]
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in itertools.pairwise(weights)]
    if outcome:
        assert "5 times in a row" in str(done.returncode) and skipped == [1, 2, 3, 4, 5] and same == [True] * 4
    else:
        assert done.returncode == 0 and skipped == [0, 1, 0, 0, 0, 0] and log_of(tmp_path)[1]["grad_norm"] is None
        assert same[1] and not all(same)


def test_drift_beyond_the_limit_stops_the_run(base, tmp_path):
    done = script_inside("train.py", "--model", base, "--out", tmp_path, "--max_drift", 1e-12, *toy(samples=16))
    assert "--max_drift" in str(done.returncode) and n_lines(tmp_path) == 1


def test_reward_that_raises_ends_the_run_with_its_own_error(base, tmp_path, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("in a reward")
    monkeypatch.setattr("eval.judge", fail)
    with pytest.raises(ZeroDivisionError):
        script_inside("train.py", "--model", base, "--out", tmp_path, *TOY)


@pytest.mark.parametrize("place", [["hidden"], ["logits"], ["logits", "--noise_top_k", 5]])
def test_noise_elsewhere_trains_and_is_remembered_by_the_checkpoint(place, base, tmp_path):
    done = script_inside("train.py", "--model", base, "--out", tmp_path, *toy(samples=16), "--noise_at", *place)
    assert done.returncode == 0, done.stderr
    assert all(0 < line["delta_logp"] < 1e-3 for line in log_of(tmp_path))
    notes = load(tmp_path / "best")[2]
    assert [notes["noise_at"], notes["noise_top_k"]] == [place[0], place[-1] if place[1:] else 0]
    done = script_inside("eval.py", "--model", tmp_path / "best", "--settings", "soft_sample", "--limit", 3, "--samples", 2)
    assert done.returncode == 0, done.stderr
    done = script_inside("sample.py", "--model", tmp_path / "best", "--inspect", tmp_path / "t.html", "1+1")
    assert done.returncode == 0, done.stderr


def test_audit_reports_every_mode_by_position(base, tmp_path):
    done = script_inside("train.py", "--model", base, "--out", tmp_path, "--audit", 3, *TOY)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "audit.json").read_text())
    assert {(r["mode"], r["micro_batch"]) for r in report} == {(m, n) for m in MODES for n in (1, 3)}
    for r in report:
        assert 0 <= r["median"] <= r["mean"] <= r["max"] == max(r["max_by_position"])
        assert r["mean"] < (1e-4 if r["mode"] != "fuzzy" else 1e-2)
    assert not checkpoints(tmp_path) and "soft" in done.stdout


def test_sample_prints_thought_answer_and_the_heaviest_tokens(base):
    plain, again, other = (script_inside("sample.py", "--model", base, "--mode", "soft", "--cot_len", 8, "--seed", seed,
                                         "3+4*2") for seed in (0, 0, 9))
    assert plain.returncode == 0 and "answer: " in plain.stdout and "tokens/s" in plain.stderr
    assert "\\boxed{" in plain.stdout and again.stdout == plain.stdout != other.stdout
    shown = script("sample.py", "--model", base, "--greedy", "--show", 3, "--cot_len", 8, "3+4*2")
    rows = [line for line in shown.stdout.splitlines() if "|" in line]
    weights = [[float(w) for w in re.findall(r" (\d\.\d{3})\b", row.split("|")[1])] for row in rows]
    assert shown.returncode == 0 and rows and all(len(w) == 3 and w == sorted(w, reverse=True) for w in weights)


@pytest.mark.parametrize("mode", MODES)
def test_inspector_writes_a_page_of_the_thought(mode, base, tmp_path):
    page = tmp_path / "thought.html"
    done = script_inside("sample.py", "--model", base, "--mode", mode, "--cot_len", 8, "--inspect", page, "3+4*<2>")
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    steps = text.split("<li ")[1:]
    assert 1 <= len(steps) <= 8 and "3+4*&lt;2&gt;" in text and "://" not in text
    answer = re.search(r"answer: (.*?)(   |$)", done.stdout, re.M)[1]
    assert f"<strong>{answer}</strong>" in text
    for step in steps:
        weights = [float(w) for w in re.findall(r"%\"> *(\d\.\d{3}) ", step.split("</p>")[0])]
        assert len(weights) == 6 and weights == sorted(weights, reverse=True) and sum(weights) <= 1.01
        assert ("noise, of the mixture" in step) == (mode != "hard")
    changed = text.count('class="swap"')
    assert f"in {changed} steps, marked" in text and text.count("with its top token") == changed


def test_inspector_page_works_in_a_browser(base, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("no headless browser here: apt-get install chromium")
    page = tmp_path / "thought.html"
    script_inside("sample.py", "--model", base, "--cot_len", 8, "--inspect", page, "3+4*2")
    n_steps = page.read_text().count("<li ")
    probe = """<script>const all = [...document.querySelectorAll('li')]; all[0].focus()
        for (const key of ['ArrowRight', 'ArrowRight', 'ArrowLeft'])
            document.activeElement.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }))
        const bar = document.querySelector('p span'), box = document.querySelector('ol').getBoundingClientRect()
        document.title = [all.length, all.indexOf(document.activeElement), getComputedStyle(bar).backgroundSize != 'auto',
                          box.width <= innerWidth].join()</script>"""
    page.write_text(page.read_text().replace("</html>", probe + "</html>"))
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom",
                           "--disable-background-networking", "--disable-component-update", "--disable-sync",
                           f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()], text=True, capture_output=True, timeout=60)
    assert f"<title>{n_steps},1,true,true</title>" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def test_eval_writes_results_continues_an_interrupted_run_and_compares(base, tmp_path):
    (tmp_path / "mmlu.jsonl").write_text("".join(json.dumps(
        {"question": f"User: {i}", "choices": ["1", "2", "3", "4"], "answer": i % 4}) + "\n" for i in range(5)))
    flags = ["--model", base, "--settings", "all", "--samples", 4, "--limit", 5, "--cot_len", 8, "--base", base,
             "--data", f"arithmetic,{tmp_path}/mmlu.jsonl"]
    first = script("eval.py", *flags, "--out", tmp_path / "a.json")
    assert first.returncode == 0, first.stderr
    whole = json.loads((tmp_path / "a.json").read_text())["results"]
    assert len(whole["arithmetic"]) == 7 and whole["arithmetic"]["solutions"]["kl"] == 0 and {"pass@1", "pass@4", "entropy"} <= whole["arithmetic"]["soft_sample"].keys()
    assert all(name in first.stdout for name in whole["arithmetic"]) and "reference solutions, 5 problems: nll" in first.stdout
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 5 * (3 * 4 + 3) + 5 + 5

    (tmp_path / "b.jsonl").write_text("".join(lines[:31]) + lines[31][:20])  # killed within a line
    second = script_inside("eval.py", *flags, "--out", tmp_path / "b.json", "--compare", tmp_path / "a.json")
    assert second.returncode == 0, second.stderr
    again = json.loads((tmp_path / "b.json").read_text())["results"]
    assert json.dumps(again["arithmetic"]) == json.dumps(whole["arithmetic"])
    assert sorted((tmp_path / "b.jsonl").read_text().splitlines()) == sorted("".join(lines).splitlines())
    differences = re.findall(r"soft_sample pass@4 +5 +([+-][\d.]+)", second.stdout)
    assert differences == ["+0.0000"] and re.search(r"arithmetic +nll +5 +[+-]0.0000", second.stdout)
    other = script_inside("eval.py", *flags, "--seed", 1, "--out", tmp_path / "a.json")
    assert other.returncode == 2 and "another run" in other.stderr


def test_results_files_and_logs_are_tabled_and_drawn_together(base, tmp_path):
    files = [tmp_path / f"{name}.json" for name in ("one-0", "one-1", "two-0", "two-1")]
    done = script_inside("eval.py", "--model", base, "--samples", 4, "--limit", 3, "--cot_len", 4, "--settings",
                         "hard_greedy,hard_sample", "--out", files[0])
    assert done.returncode == 0, done.stderr
    for file in files[1:]:
        shutil.copy(files[0], file)
    tabled = script_inside("eval.py", *files)
    assert tabled.returncode == 0 and len(re.findall(r"^\| (one|two) \| 2 \| [\d.]+ ± 0 ", tabled.stdout, re.M)) == 2
    compared = script_inside("eval.py", *files, "--compare", "one")
    assert re.findall(r"^\| two \| 2 \| \+0 \[\+0, \+0\] ", compared.stdout, re.M)
    (tmp_path / "soft-0").mkdir()
    (tmp_path / "soft-0" / "log.jsonl").write_text('{"step": 0, "accuracy": 0.25}\n{"step": 1, "accuracy": 0.5}\n')
    drawn = script_inside("eval.py", "--plot", tmp_path / "r.svg", *files, tmp_path / "soft-0" / "log.jsonl")
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


TRAIN, EVAL, SAMPLE = (["train.py", "--model"], ["eval.py", "--model"], ["sample.py", "--model"])
BAD = {
    "model that does not exist": ([*TRAIN, "nowhere"], "nowhere"),
    "model that is a file": ([*TRAIN, "{tmp}/plain.jsonl"], "plain.jsonl"),
    "no model": (["eval.py"], "--model"),
    "directory without config": ([*SAMPLE, "{tmp}", "1+1"], "config.json"),
    "one sample": ([*TRAIN, "{base}", "--samples", "1"], "--samples 1"),
    "negative learning rate": (["train.py", "--lr", "-1"], "--lr"),
    "no learning rate": (["train.py", "--lr", "nan"], "--lr"),
    "endless learning rate": (["train.py", "--lr", "inf"], "--lr"),
    "no steps": (["train.py", "--steps", "0"], "--steps"),
    "no questions": (["train.py", "--prompts", "0"], "--prompts"),
    "half a question": (["train.py", "--prompts", "0.5"], "--prompts"),
    "no clipping": (["train.py", "--clip", "0"], "--clip"),
    "no micro-batch": (["train.py", "--micro_batch", "0"], "--micro_batch"),
    "no temperature": ([*SAMPLE, "{base}", "--temperature", "0", "1+1"], "--temperature"),
    "noise that is no number": ([*TRAIN, "{base}", "--noise_scale", "much"], "--noise_scale"),
    "no budget": ([*EVAL, "{base}", "--cot_len", "0"], "--cot_len"),
    "negative seed": ([*TRAIN, "{base}", "--seed", "-1"], "--seed"),
    "unknown precision": ([*TRAIN, "{base}", "--dtype", "float16"], "--dtype"),
    "unknown device": ([*TRAIN, "{base}", "--device", "abacus"], "--device"),
    "device that is not there": ([*TRAIN, "{base}", "--device", "cuda:99"], "--device"),
    "unknown flag": (["train.py", "--speed", "9"], "--speed"),
    "unknown mode": (["train.py", "--mode", "loud"], "--mode"),
    "a few logits without noise on logits": ([*TRAIN, "{base}", "--noise_top_k", "5"], "--noise_top_k 5"),
    "more logits than there are": (
        [*TRAIN, "{base}", "--noise_at", "logits", "--noise_top_k", "25"], "--noise_top_k 25"),
    "keep nothing": (["train.py", "--keep", "0"], "--keep"),
    "shards that do not divide the ranks": ([*TRAIN, "{base}", "--shard_size", "2"], "--shard_size 2"),
    "plan of nothing": (["train.py", "--plan", "80"], "--plan"),
    "out that is below a file": ([*TRAIN, "{base}", "--data", "arithmetic", "--cot_len", "9", "--out", "{tmp}/plain.jsonl/out"],
                                 "plain.jsonl"),
    "unknown task": ([*TRAIN, "{base}", "--data", "nonsense"], "--data nonsense"),
    "data without an answer": ([*TRAIN, "{base}", "--data", "{tmp}/no_answer.jsonl"], "no_answer.jsonl:2"),
    "data that is not JSON": ([*EVAL, "{base}", "--data", "{tmp}/broken.jsonl"], "broken.jsonl:1"),
    "data that is a number": ([*EVAL, "{base}", "--data", "{tmp}/number.jsonl"], "number.jsonl:2"),
    "data that is no text": ([*EVAL, "{base}", "--data", "{tmp}/bytes.jsonl"], "bytes.jsonl"),
    "empty data": ([*EVAL, "{base}", "--data", "{tmp}/empty.jsonl"], "empty.jsonl"),
    "data file that does not exist": ([*EVAL, "{base}", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "choices without their answer": ([*EVAL, "{base}", "--data", "{tmp}/choices.jsonl"], "choices.jsonl:1"),
    "folder that is no MMLU": ([*EVAL, "{base}", "--data", "{tmp}/gpt2"], "gpt2"),
    "prompt longer than the context": ([*SAMPLE, "{base}", "1" * 300], "context of 256"),
    "question of the data longer than the context": (
        [*TRAIN, "{base}", "--data", "{tmp}/long.jsonl", "--val_size", "1"], "context of 256"),
    "solution longer than the context": (
        [*TRAIN, "{base}", "--mode", "sft", "--data", "{tmp}/long_solution.jsonl", "--val_size", "1"], "context of 256"),
    "no solutions to imitate": (
        [*TRAIN, "{base}", "--mode", "sft", "--data", "{tmp}/plain.jsonl", "--val_size", "1"], "solutions"),
    "more validation problems than problems": ([*TRAIN, "{base}", "--data", "{tmp}/plain.jsonl"], "--val_size"),
    "unknown setting": ([*EVAL, "{base}", "--settings", "soft"], "--settings soft"),
    "results that are no .json": ([*EVAL, "{base}", "--out", "{tmp}/r.txt"], "--out"),
    "comparison with nothing": ([*EVAL, "{base}", "--compare", "nowhere.json"], "nowhere.jsonl"),
    "plot of nothing": ([*EVAL, "{base}", "--plot", "p.png"], "--plot"),
    "table of what is no result": (["eval.py", "{base}/args.json"], "args.json: no results file"),
    "table of one result twice": (["eval.py", "{tmp}/r-0.json", "{tmp}/r-0.json"], "r-0.json: a second file"),
    "table against what is not there": (["eval.py", "{tmp}/r-0.json", "--compare", "base"], "--compare base"),
    "task that the tiny model does not know": (["train.py", "--data", "gsm8k"], "--data gsm8k"),
    "base's place taken by another run": (["train.py", "--seed", "7"], "out/base-7"),
    "base of another vocabulary": ([*EVAL, "{base}", "--base", "{tmp}/other"], "not of --model's vocabulary"),
    "results of another layout": (["eval.py", "{tmp}/list-0.json"], "list-0.json: no results file"),
    "log that is not drawn": (["eval.py", "{tmp}/plain.jsonl"], "add --plot"),
    "log that is none": (["eval.py", "{tmp}/plain.jsonl", "--plot", "p.png"], "no log of reinforcement learning"),
    "model and results": ([*EVAL, "{base}", "{tmp}/r-0.json"], "leave --model away"),
    "plot of another kind": (["eval.py", "{tmp}/r-0.json", "--plot", "p.txt"], "--plot p.txt"),
    "log without lines of JSON": (["eval.py", "{tmp}/broken.jsonl", "--plot", "p.png"], "broken.jsonl"),
    "prompt file without a question": ([*EVAL, "{base}", "--prompt_file", "{tmp}/empty.jsonl"], "{question}"),
    "prompt file that does not exist": ([*EVAL, "{base}", "--prompt_file", "nowhere"], "--prompt_file"),
    "prompt file that is a folder": ([*EVAL, "{base}", "--prompt_file", "{tmp}"], "--prompt_file"),
}
CONFIGS = {  # of the tiny model, with one thing changed; what the error names
    "other architecture": ({"model_type": "gpt2"}, "gpt2"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    "a billion layers": ({"num_hidden_layers": 10 ** 9}, "num_hidden_layers"),
    "absurd width": ({"hidden_size": 2 ** 40}, "hidden_size"),
    "no vocabulary": ({"vocab_size": 0}, "vocab_size"),
    "negative width": ({"hidden_size": -64}, "hidden_size"),
    "layers in words": ({"num_hidden_layers": "three"}, "num_hidden_layers"),
    "half a head": ({"num_attention_heads": 4.5}, "num_attention_heads"),
    "odd head": ({"head_dim": 15}, "head_dim"),
    "key heads that do not divide the heads": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "another width than the weights": ({"intermediate_size": 200}, "mlp"),
    "more layers than weights": ({"num_hidden_layers": 4}, "layers.3"),
    "fewer layers than weights": ({"num_hidden_layers": 2}, "layers.2"),
    "another vocabulary than the weights": ({"vocab_size": 3}, "embed_tokens"),
    "unknown rope": ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
    "rope without its factor": ({"rope_parameters": {"rope_type": "llama3"}}, "factor"),
    "rope that is a word": ({"rope_parameters": "llama3"}, "config.json"),
    "no vocabulary size": ({"vocab_size": None}, "vocab_size"),
    "norm without epsilon": ({"rms_norm_eps": 0}, "rms_norm_eps"),
    "quantised in a word": ({"quantization_config": "int4"}, "config.json"),
    "window in a word": ({"use_sliding_window": True, "max_window_layers": "two"}, "config.json"),
    "negative rope base": ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_theta"),
}


def harm(model, what):
    """Damage one file of a checkpoint directory."""
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if what == "config that is a list":
        (model / "config.json").write_text("[1, 2]")
    elif what == "config cut off":
        (model / "config.json").write_text((model / "config.json").read_text()[:50])
    elif what == "weights cut off":
        weights.write_bytes(content[:len(content) // 2])
    elif what == "no weights":
        weights.unlink()
    elif what == "header longer than the file":
        weights.write_bytes((2 ** 60).to_bytes(8, "little") + content[8:])
    elif what == "header that lies":
        header = json.loads(content[8:8 + size])
        header["model.norm.weight"]["data_offsets"] = [0, 2 ** 40]
        lie = json.dumps(header).encode()
        weights.write_bytes(len(lie).to_bytes(8, "little") + lie + content[8 + size:])
    elif what in ("weights with NaN", "a tensor too few", "a tensor too many"):
        state = load_file(weights)
        state["model.norm.weight"][3] = math.nan if what == "weights with NaN" else 1
        state |= {"model.norm.bias": torch.zeros(64)} if what == "a tensor too many" else {}
        state.pop("model.norm.weight" if what == "a tensor too few" else "none", None)
        save_file(state, weights)
    elif what == "index that leads elsewhere":
        (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    elif what == "tokenizer cut off":
        (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text()[:50])
    elif what == "tokenizer of a larger model":
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"] |= {str(i): i for i in range(24, 99)}
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    elif what == "notes cut off":
        (model / "soft_tokens.json").write_text('{"prompt": ')
    elif what == "end token in words":
        (model / "generation_config.json").write_text('{"eos_token_id": "end"}')


HARMS = {
    "config that is a list": "config.json", "config cut off": "config.json", "weights cut off": "model.safetensors",
    "no weights": "model.safetensors", "header longer than the file": "model.safetensors",
    "header that lies": "model.safetensors", "weights with NaN": "model.norm.weight",
    "a tensor too few": "norm.weight", "a tensor too many": "model.norm.bias",
    "index that leads elsewhere": "index.json", "tokenizer cut off": "tokenizer.json",
    "tokenizer of a larger model": "vocab_size 24",
    "notes cut off": "soft_tokens.json", "end token in words": "eos_token_id"}


@pytest.fixture(scope="module")
def mistakes(base, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("mistakes")
    (tmp / "out" / "base-7" / "step-000000").mkdir(parents=True)
    shutil.copytree(base, tmp / "other")  # with two more words
    random_model(vocab_size=26).save_pretrained(tmp / "other")
    (tmp / "gpt2").mkdir()
    (tmp / "number.jsonl").write_text('{"question": "1+1", "answer": "2"}\n17\n')
    (tmp / "bytes.jsonl").write_bytes(bytes(range(256)))
    (tmp / "choices.jsonl").write_text('{"question": "1+1", "choices": ["1", "2"]}\n')
    (tmp / "long_solution.jsonl").write_text("".join(
        json.dumps({"question": f"{i}+1", "answer": "2", "solution": "1+1=2;" * 99}) + "\n" for i in range(3)))
    (tmp / "no_answer.jsonl").write_text('{"question": "1+1", "answer": "2"}\n{"question": "1+2"}\n')
    (tmp / "broken.jsonl").write_text("question: 1+1\n")
    (tmp / "list-0.json").write_text('{"results": [1]}')
    (tmp / "r-0.json").write_text(json.dumps({"results": {"arithmetic": {"solutions": {"nll": 0.5, "n_problems": 1}}}}))
    (tmp / "empty.jsonl").write_text("\n")
    (tmp / "long.jsonl").write_text(json.dumps({"question": "1" * 300, "answer": "2"}) + "\n" + json.dumps(
        {"question": "1" * 301, "answer": "2"}) + "\n")
    (tmp / "plain.jsonl").write_text('{"question": "1+1", "answer": "2"}\n{"question": "1+2", "answer": "3"}\n')
    return tmp


@pytest.mark.parametrize("name", BAD)
def test_mistake_ends_in_one_line_that_names_it(name, base, mistakes, monkeypatch):
    monkeypatch.chdir(mistakes)
    args, expected = BAD[name]
    before = {*mistakes.rglob("*")}
    assert_one_line(script_inside(*(a.replace("{tmp}", str(mistakes)).replace("{base}", str(base)) for a in args)), expected)
    assert before == {*mistakes.rglob("*")}  # nothing half-written


def assert_one_line(done, expected):
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == 1 and expected in done.stderr, done.stderr


@pytest.mark.parametrize("name", [*CONFIGS, *HARMS])
def test_broken_checkpoint_is_refused_in_one_line_that_names_it(name, base, tmp_path):
    model = tmp_path / "größe 1"
    shutil.copytree(base, model)
    assert script_inside("sample.py", "--model", model, "--cot_len", 2, "1+1").returncode == 0  # a path as any other
    changes, expected = CONFIGS.get(name, ({}, HARMS.get(name)))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    if name in HARMS:
        harm(model, name)
    for args in (["sample.py", "--model", model, "1+1"], ["train.py", "--model", model, "--out", tmp_path / "out"]):
        assert_one_line(script_inside(*args), expected)
    assert not (tmp_path / "out").exists()


def test_resuming_with_other_flags_or_data_is_refused(base, tmp_path):
    flags = ["--model", base, "--out", tmp_path / "run", "--resume"]
    done = script_inside("train.py", *flags, *TOY)
    assert done.returncode == 0 and "nothing to resume" in done.stdout, done.stderr
    (tmp_path / "run" / "best").unlink()  # a kill came between the last checkpoint and this link
    assert script_inside("train.py", *flags, *TOY).returncode == 0  # complete: nothing else is left to do
    assert (tmp_path / "run" / "best" / "config.json").exists()
    assert_one_line(script_inside("train.py", *flags[:-1], *TOY), "holds a run")
    assert_one_line(script_inside("train.py", *flags, *toy(lr=2e-3)), "--lr 0.002")
    shutil.copytree(base, tmp_path / "base")
    flags = ["--model", tmp_path / "base", "--out", tmp_path / "moved", "--resume"]
    assert script_inside("train.py", *flags, *TOY).returncode == 0
    shutil.rmtree(tmp_path / "base")
    assert_one_line(script_inside("train.py", *flags, *TOY), "--model")


def test_mistake_in_a_fresh_process_has_no_traceback(tmp_path):
    done = script("sample.py", "--model", tmp_path / "nowhere", "1+1")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nowhere" in done.stderr


@pytest.mark.parametrize("name", ["train.py", "sample.py", "eval.py"])
def test_help_shows_the_examples(name):
    done = script_inside(name, "--help")
    assert done.returncode == 0 and f"python {name} --m" in done.stdout


def test_nothing_is_unpickled_evaluated_or_run_in_a_shell():
    for file in ("model.py", "sample.py", "eval.py", "train.py"):
        text = (ROOT / file).read_text()
        found = re.search(r"pickle|torch\.load|(?<![.\w])(eval|exec|compile)\(|subprocess|os\.system|http://", text)
        assert not found, (file, found)


def test_claims_of_the_readme_are_what_the_results_files_say():
    files = sorted((ROOT / "tests" / "results").glob("*.json"))
    printed = "".join(script_inside("eval.py", *files, "--compare", name).stdout for name in ("hard", "base"))
    claims = (ROOT / "README.md").read_text().split("| the paper's claim |")[1].split("![")[0]
    quoted = re.findall(r"[+-][\d.]+ \[[^]]+]", claims)
    assert len(quoted) >= 10 and all(interval in printed for interval in quoted), quoted


def test_table_of_the_real_model_is_what_its_results_files_say():
    def figures(name, mode):
        results = json.loads((ROOT / "tests" / "results" / "smollm2" / f"{name}-0.json").read_text())["results"]
        return [f"{100 * results['mawps, validation'][f'{mode}_sample'][k]:.1f}" for k in ("pass@1", "pass@16")]
    readme = (ROOT / "README.md").read_text()
    for training, inference in (("hard", "hard"), ("soft", "hard"), ("soft", "soft")):
        row = readme.split(f"\n| {training}, {inference} |")[1].split("\n")[0]
        cells = [cell.strip() for cell in row.split("|")]
        before, after = figures("base", inference), figures(training, inference)
        assert cells[3:5] == [before[0], after[0]] and cells[6:8] == [before[1], after[1]], row


def test_line_references_of_the_readme_are_true():
    references = re.findall(r"`(\w+\.py):(\d+)` `(.+?)`", (ROOT / "README.md").read_text())
    assert len(references) > 15
    for file, line, code in references:
        assert (ROOT / file).read_text().splitlines()[int(line) - 1].strip().startswith(code), (file, line, code)

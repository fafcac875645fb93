"""train.py: the advantage, what is scored and its gradient, the update, several ranks, and runs that are cut off."""
import ctypes
import fcntl
import itertools
import json
import math
import multiprocessing.forkserver
import os
import pkgutil
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, plain_pass, random_model, script_inside
from safetensors.torch import load_file, save_file

import train
from eval import judge, load_problems
from model import Transformer
from sample import MODES, TRAIN, generate, load
from train import learning_rate, questions_of_step, rloo, score

TOY = dict(mode="soft", dtype="float32", steps=5, prompts=3, samples=5, val_size=2, cot_len=4, answer_len=12, lr=1e-3,
           warmup=2, eval_every=1, micro_batch=4, seed=7)


@pytest.fixture(scope="session")
def toy(tiny_dir, tmp_path_factory):
    """The command line of a run on a small file, from the untrained tiny model: toy(out, *more, **changes)."""
    file = tmp_path_factory.mktemp("toy") / "toy.jsonl"
    rows = [{"question": f"{i // 2}+1", "answer": str(i % 9), "solution": "1+1=2;" * (i % 4 + 1)} for i in range(40)]
    file.write_text("".join(json.dumps(p) + "\n" for p in rows))
    return lambda out, *more, **changes: ["train.py", *more, *(str(part) for name, value in (
        TOY | {"out": out, "model": tiny_dir, "data": file} | changes).items() for part in (f"--{name}", value))]


def log_of(out):
    """The lines of a log, without what depends on the clock and on the machine."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("_s") and k != "peak_gb"} for line in lines]


def state_of(out):
    """The weights and AdamW's state of a run."""
    return load_file(out / "last" / "model.safetensors"), load_file(out / "last" / "training" / "optimizer.safetensors")


def test_reward_of_ones_own_changes_the_reward_alone(monkeypatch):
    rows = [Namespace(answer=a, truncated=False, cot_len=4, entropy=[1.0, 3.0], length=9)
            for a in ("5", "6", "\\frac{", None)]
    rollout = Namespace(rows=rows, chosen=torch.tensor([[1] * 9 + [0]] * 4))
    before = train.grade(rollout, [{"answer": "5"}] * 4, "own")
    assert before.T[:4].tolist() == [[100, 10, 10, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    close = train.grade(rollout, [{"answer": "5", "error": 1.0}] * 4, "own")  # what a problem tolerates
    assert close[:, 0].tolist() == [100, 100, 10, 0]
    monkeypatch.setattr(train, "reward", lambda verdict, row: 100 - row.length)
    after = train.grade(rollout, [{"answer": "5"}] * 4, "own")
    assert after[:, 0].tolist() == [91] * 4 and torch.equal(after[:, 1:], before[:, 1:])


@pytest.mark.parametrize("environment, device, own", [
    ({}, "cuda", "cuda:0"), ({}, "cuda:1", "cuda:1"), ({"RANK": "9", "LOCAL_RANK": "1"}, "cuda", "cuda:1")])
def test_each_process_computes_on_the_gpu_of_its_number(environment, device, own, monkeypatch):
    args, chosen = Namespace(device=device), []
    monkeypatch.delenv("RANK", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)  # it refuses names without a number
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    train.join_ranks(args)
    assert args.device == own and chosen == [own]


def test_answers_that_are_all_alike_are_pointed_out(monkeypatch, capsys):
    args = Namespace(mode="soft", verifier="own", micro_batch=4, device="cpu")
    train.join_ranks(args)
    for answers, expected in ((["5"] * 5 + ["6"] * 3, True), (["[answer]", "[answer]1", "2 [answer]", "3", None], True),
                              (["5"] * 4 + ["6"] * 4, False), ([None] * 8, False), (["5", "5"], False)):
        monkeypatch.setattr(train, "evaluate", lambda *_, **__: [{"answer": a, "verdict": "wrong"} for a in answers])
        assert train.validate(torch.nn.Identity(), None, answers, args) == {"soft_greedy": 0, "hard_greedy": 0}
        assert ("--prompt_file" in capsys.readouterr().out) == expected, answers


def test_advantage_learning_rate_and_the_questions_of_a_step(toy, tiny_dir):
    table = torch.tensor([[100 - 20 / 3, 10 - 110 / 3, 10 - 110 / 3, -40.0], [0, 0, 0, 0]])
    torch.testing.assert_close(rloo(torch.tensor([[100.0, 10.0, 10.0, 0.0], [10.0, 10.0, 10.0, 10.0]])), table)
    rates = [learning_rate(step, Namespace(lr=2.0, warmup=4, steps=12)) for step in range(13)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and rates[8] == pytest.approx(1) and rates[12] == pytest.approx(0)
    drawn = [p for step in range(5) for p in questions_of_step(range(10), step, 4, seed=3)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == [*range(10)] and drawn[:10] != drawn[10:]
    args = Namespace(mode="hard", data=toy(0)[-1], val_size=8, seed=1, cot_len=9, answer_len=9)
    trained, val = ({p["question"] for p in part} for part in train.load_data(args))
    assert not trained & val and len(trained | val) == 20  # the file asks everything twice


def plain_loss(model, rollout, weight):
    """The weighted sum of log pi, by the formulas, over every action of every row: all slots but the forced words."""
    loss = 0.0
    for i, row in enumerate(rollout.rows):
        logp, c = plain_pass(model, rollout, i)[1], row.cot_len
        loss = loss + weight[i] * (logp[:c].sum() + logp[c + len(row.openings[row.truncated]):].sum())
    return loss


@pytest.mark.parametrize("mode", MODES)
def test_score_has_the_value_and_the_gradient_of_the_plain_formula(mode, tiny_dir):
    """In float64, in any micro-batches of rows in any order, tied or not, and with activation checkpointing."""
    model, tokenizer = load(tiny_dir, torch.float64)
    model.init_weights(torch.Generator().manual_seed(1), std=0.1)
    if mode == "fuzzy":  # not tied
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0))
    model.notes |= {"cot_len": 5, "answer_len": 9}
    rollout = generate(model, tokenizer, ["3+4*2", "7-9", "1*2*3-4"], mode, 3, answer_greedy=False,
                       store_thoughts=mode != "hard", seed=(TRAIN, 0, 0))
    n_actions = [row.length - len(row.openings[row.truncated]) for row in rollout.rows]
    assert len({*n_actions}) > 1  # some are padded
    noise_std, parameters = model.notes["noise_scale"] * model.notes["rms"], [*model.parameters()]
    weight = torch.randn(9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight[4] = 0
    expected = plain_loss(model, rollout, weight)
    gradients = torch.autograd.grad(expected, parameters)
    for parts in ([[*range(9)]], [[8, 1, 4, 3], [0, 7], [2], [6, 5]]):
        model.activation_checkpointing = len(parts) > 1
        model.zero_grad()
        losses, deltas = zip(*(score(model, rollout, torch.tensor(part), weight[part], noise_std) for part in parts))
        sum(losses).backward()
        torch.testing.assert_close(sum(losses), expected)
        for p, g in zip(parameters, gradients):
            torch.testing.assert_close(p.grad, g, atol=1e-9 * float(g.abs().max()), rtol=1e-7)
        assert len(torch.cat(deltas)) == sum(n_actions) - n_actions[4] and torch.cat(deltas).quantile(0.9) < 1e-3


def test_update_is_clipped_adamw_on_the_policy_gradient_if_finite(toy, tiny_dir, tmp_path, monkeypatch):
    """The first of two steps against the same by hand: rows without an advantage are not scored."""
    scored, log_prob = [], Transformer.log_prob

    def spy(self, *args):
        scored.extend(args[5].abs().amax(1).tolist())  # the weights
        loss, logp = log_prob(self, *args)
        assert not logp[args[5] == 0].any()
        return loss * (math.nan if log_of(tmp_path) else 1), logp  # in the second step
    monkeypatch.setattr(Transformer, "log_prob", spy)
    done = script_inside(*toy(tmp_path, steps=2, samples=4, prompts=6, seed=5, data="arithmetic"))
    assert done.returncode == 0, done.stderr
    model, tokenizer = load(tiny_dir)
    model.notes |= {"cot_len": 4, "answer_len": 12}
    batch = questions_of_step(load_problems("arithmetic", "train", 8192), 0, 6, 5)
    rollout = generate(model, tokenizer, [p["question"] for p in batch], "soft", 4, answer_greedy=False,
                       store_thoughts=True, seed=(TRAIN, 5, 0))
    R = torch.tensor([0.0 if row.answer is None else 100.0 if judge(row.answer, batch[i // 4]["answer"]) == "correct"
                      else 10.0 for i, row in enumerate(rollout.rows)])
    A, line = rloo(R.view(6, 4)).flatten(), log_of(tmp_path)[0]
    some = A[A != 0].abs() / 24
    assert line["reward"] == pytest.approx(R.mean().item()) and 0 < line["zero_advantage"] < 1
    assert sorted(scored[:len(some)]) == pytest.approx(sorted(some.tolist()))
    plain_loss(model, rollout, -A / 24).backward()
    assert line["grad_norm"] == pytest.approx(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item(), rel=1e-3)
    torch.optim.AdamW(model.parameters(), lr=1e-3 / 2, betas=(0.9, 0.95), weight_decay=0).step()
    weights, moments = state_of(tmp_path)
    for name, p in model.named_parameters():
        torch.testing.assert_close(moments[f"{name}.exp_avg"], 0.1 * p.grad, atol=1e-6, rtol=1e-2, msg=name)
        clear = p.grad.abs() > 1e-5  # below that rounding may turn a gradient's sign, which is a whole step of AdamW
        torch.testing.assert_close(weights[f"model.{name}"][clear], p[clear].detach(), atol=2e-6, rtol=0, msg=name)
    assert log_of(tmp_path)[1]["grad_norm"] is None and moments["norm.weight.step"] == 1


def test_supervised_loss_is_cross_entropy_and_bfloat16_keeps_float32_masters(toy, tiny_dir, tmp_path):
    """Three steps in two micro-batches; in bfloat16 alone updates of 6e-6 would round away."""
    before, (model, tokenizer) = load_file(tiny_dir / "model.safetensors"), load(tiny_dir)
    problems, _ = train.load_data(
        Namespace(mode="sft", val_size=2, cot_len=4, answer_len=12, data=toy(0)[-1]))
    total = n = 0
    for p in questions_of_step(problems, 0, 6, TOY["seed"]):
        prompt = tokenizer.encode(f"User: {p['question']} Assistant:").ids
        text = tokenizer.encode(f" {p['solution']} The final answer is: \\boxed{{{p['answer']}}}.<eos>").ids
        logits = model.logits(model(torch.tensor([prompt + text])))[0, len(prompt) - 1:-1]
        total, n = total + F.cross_entropy(logits, torch.tensor(text), reduction="sum").item(), n + len(text)
    for dtype, error in (("float32", 1e-5), ("bfloat16", 1e-3)):
        out = tmp_path / dtype
        done = script_inside(*toy(out, mode="sft", dtype=dtype, lr=6e-6, steps=3, warmup=1, prompts=6))
        assert done.returncode == 0 and log_of(out)[0]["loss"] == pytest.approx(total / n, rel=error), done.stderr
    change = torch.cat([(w - before[k]).abs().flatten() for k, w in state_of(out)[0].items()])
    assert (change > 0).double().mean() > 0.9 and change.max() < 2e-5


# Several ranks, and runs that are cut off: in processes forked from one that has imported everything

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["test_train", "torch._dynamo"])


def signal_at(place, n, number):
    """From now on the n-th call of a function, like "os.rename", first sends a signal to this process."""
    real, calls = pkgutil.resolve_name(place), itertools.count(1)
    mock.patch(place, lambda *args, **kwargs: (
        next(calls) == n and os.kill(os.getpid(), number), real(*args, **kwargs))[1]).start()


def child(rank, world, port, screen, argv, harm):
    for stream in (1, 2):
        os.dup2(os.open(screen, os.O_WRONLY | os.O_APPEND), stream)
    if world > 1:
        os.environ |= dict(zip(("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
                               map(str, (rank, rank, world, "localhost", port))))
    if rank == world - 1 or not argv:
        harm()
    if argv:
        sys.argv = argv
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(argv, harm, ranks): a run whose last rank first calls harm(), or all without argv; its status and screen."""
    folder, count = tmp_path_factory.mktemp("screens"), itertools.count(20000 + os.getpid() % 9999)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(Path(__file__).parent))))
        multiprocessing.forkserver.ensure_running()

    def run(argv, harm=int, ranks=1):
        screen = folder / str(port := next(count))
        screen.touch()
        processes = [FORK.Process(target=child, args=(r, ranks, port, screen, argv, harm)) for r in range(ranks)]
        for process in processes:
            process.start()
        for process in reversed(processes):
            process.join(60)
            process.kill()  # the others, where the last one was killed
        return processes[-1].exitcode, screen.read_text()
    return run


@pytest.fixture(scope="module")
def uninterrupted(run, toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    status, said = run(toy(out))
    assert status == 0 and sum(line["grad_norm"] > 0 for line in log_of(out)) >= 3, said
    return out


def assert_same(out, other, exact=True):
    """Two runs have the same results, bit for bit; or up to rounding, which turns the sign of some gradients near 0."""
    files = ["summary.json", "val.jsonl", "last/soft_tokens.json", "last/training/state.json", "best/model.safetensors"]
    assert {p.name for p in out.iterdir()} == {"best", "last", "log.jsonl", "summary.json", "val.jsonl"}
    for one, two in itertools.zip_longest(log_of(out), log_of(other)):
        like = two if exact else {k: pytest.approx(v, rel=1e-3, abs=1e-5) for k, v in two.items()}
        differ = {k: (v, two[k]) for k, v in one.items() if v != like[k]}
        assert not differ and one.keys() == two.keys(), differ
    for one, two, share in zip(state_of(out), state_of(other), (1e-3, 1e-2)):  # weights, AdamW's state
        assert one.keys() == two.keys()
        for k in two if exact else ():
            assert torch.equal(one[k], two[k]), k
        one, two = (torch.cat([t.flatten() for t in state.values()]) for state in (one, two))
        assert ((one - two).abs() > 1e-4 + 1e-2 * two.abs()).double().mean() < share
    for name in files * exact:
        assert len({(p / name).read_bytes().replace(bytes(p), b"") for p in (out, other)}) == 1, name


def test_run_killed_at_any_moment_resumes_to_the_same_bits_and_log(uninterrupted, run, toy, tmp_path):
    """kill -9 before, between and after the renames, while files are written, linked or removed, and inside a step."""
    out, seen, screens = tmp_path / "out", set(), ""
    for place, n in [*(("os.rename", n) for n in (1, 2, 3, 4, 5, 6, 4, 2)), ("os.sync", 1), ("os.sync", 4),
                     ("os.link", 3), ("os.unlink", 5), ("torch.optim.AdamW.step", 1), ("torch.Tensor.backward", 2)]:
        status, said = run(toy(out, "--resume"), partial(signal_at, place, n, signal.SIGKILL))
        names = {p.name for p in out.iterdir()}
        seen |= names & {"last.new", "best.new", "best.old"} | ({"last.old"} & names if "last" not in names else set())
        assert status == -signal.SIGKILL, (place, n, said)
        screens += said
    assert seen == {"last.new", "best.new", "best.old", "last.old"}
    status, said = run(toy(out, "--resume"))
    assert status == 0 and (screens + said).count("step 0:") == 4, said  # only these runs found no checkpoint
    assert_same(out, uninterrupted)


def test_signals_and_a_full_disk_end_the_run_and_it_goes_on(uninterrupted, run, toy, tmp_path):
    for i, number in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)):
        status, said = run(toy(tmp_path, "--resume"), partial(signal_at, "torch.optim.AdamW.step", 1, number))
        assert status == 0 and "--resume" in said.splitlines()[-1] and not (tmp_path / "summary.json").exists(), said
        state = json.loads((tmp_path / "last" / "training" / "state.json").read_text())
        assert state["step"] == len(log_of(tmp_path)) == i + 1
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (900_000, 900_000))  # AdamW's state is larger
    status, said = run(toy(tmp_path, "--resume"), full)
    assert status == 2 and said.count("train.py: error:") == 1 and "last.new" in said and "Traceback" not in said, said
    status, said = run(toy(tmp_path, "--resume"))
    assert status == 0, said
    assert_same(tmp_path, uninterrupted)


def test_two_ranks_equal_one_and_each_goes_on_from_the_others_checkpoint(uninterrupted, run, toy, tmp_path):
    """Three groups of five rows: one is split. The second rank alone gets a signal. torchrun starts the last part, in
    which one rank has more passes than the other."""
    end = partial(signal_at, "torch.optim.AdamW.step", 1)
    for ranks, n_lines in ((2, 1), (1, 2), (2, 3)):
        status, said = run(toy(tmp_path, "--resume"), partial(end, signal.SIGTERM), ranks)
        assert status == 0 and said.count("with --resume") == 1 and len(log_of(tmp_path)) == n_lines, said
    assert run(toy(tmp_path, "--resume"), partial(end, signal.SIGKILL), 2)[0] == -signal.SIGKILL
    (tmp_path / "last").rename(tmp_path / "last.old")  # as if between two renames: one of the ranks puts it back
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           ROOT / "train.py", *toy(tmp_path, "--resume", micro_batch=1)[1:]], text=True,
                          capture_output=True)
    assert done.returncode == 0 and done.stdout.count("step 5/5") == 1 and "step 0:" not in done.stdout, done.stderr
    assert_same(tmp_path, uninterrupted, exact=False)


def load_shards(folder, share, largest):
    """Load a checkpoint as one of two ranks, and measure the memory that this takes at its peak."""
    def memory(key):
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])
    dist.init_process_group("gloo")
    ctypes.CDLL(None).mallopt(-3, 2 ** 20)  # M_MMAP_THRESHOLD: what is freed goes back at once
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, args = memory("VmRSS"), Namespace(device="cpu", dtype="bfloat16")
    Transformer.from_pretrained(folder, prepare=lambda model: train.shard(model, args))
    assert share < memory("VmHWM") - before < 1.5 * share + largest
    dist.destroy_process_group()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux tells it")
def test_each_of_two_ranks_loads_its_share_alone(run, tmp_path):
    model = random_model(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, vocab_size=999)
    sizes = [p.numel() * 4 for p in model.parameters()]
    model.save_pretrained(tmp_path)
    for name, w in load_file(tmp_path / "model.safetensors").items():  # a file for each, for whole files are mapped
        save_file({name: w}, tmp_path / f"model-{name}.safetensors")
    (tmp_path / "model.safetensors").unlink()
    status, said = run(None, partial(load_shards, tmp_path, sum(sizes) / 2, max(sizes)), 2)
    assert status == 0 and "Traceback" not in said, said


def test_log_that_was_cut_is_put_right_and_an_out_in_use_is_refused(uninterrupted, toy, tmp_path):
    lines = (uninterrupted / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    with train.open_log(tmp_path, 3):
        assert (tmp_path / "log.jsonl").read_text() == "".join(lines[:2])
    with open(uninterrupted / "log.jsonl") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        done = script_inside(*toy(uninterrupted, "--resume"))
        assert done.returncode == 2 and "another run" in done.stderr and log.readlines() == lines, done.stderr
    for flag, value in dict(lr=2e-3, mode="hard", steps=6, seed=4, dtype="bfloat16", model="elsewhere").items():
        done = script_inside(*toy(uninterrupted, "--resume", **{flag: value}))
        assert done.returncode == 2 and f"--{flag} {value}" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert "--resume" in script_inside(*toy(uninterrupted)).stderr  # nor is a run overwritten without that flag


def test_checkpoint_keeps_the_files_of_its_base_and_transformers_reads_it(tiny_dir, toy, tmp_path):
    base, out = shutil.copytree(tiny_dir, tmp_path / "base"), tmp_path / "out"
    kept = ["tokenizer.model", "merges.txt", "vocab.json", "chat_template.jinja", "special_tokens_map.json"]
    for name in (*kept, "model.safetensors.index.json"):  # the last one is of weights in several files, and is not kept
        (base / name).write_text("{}")
    done = script_inside(*toy(out, model=base, steps=1, dtype="bfloat16"))
    assert done.returncode == 0, done.stderr
    for path in (out / "best", out / "last"):
        assert {p.name for p in path.iterdir()} == {p.name for p in tiny_dir.iterdir()} | {"training", *kept}
        assert {t.dtype for t in load_file(path / "model.safetensors").values()} == {torch.float32}  # the masters
    model, tokenizer = load(path)
    assert model.notes == load(base)[0].notes | {"cot_len": 4, "answer_len": 12}
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for name in kept:
        (path / name).unlink()  # nonsense, which it would read
    text = "User: 1+2 Assistant: 1+2=3 The final answer is: \\boxed{3}."
    assert transformers.AutoTokenizer.from_pretrained(path)(text).input_ids == tokenizer.encode(text).ids

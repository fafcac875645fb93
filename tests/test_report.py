import json
from argparse import Namespace

import pytest
import report

OPTIONS = {"tasks": None, "plot": None, "at": [50], "against": "hard", "settings": ["hard_greedy", "hard_sample"],
           "columns": [""]}


def write_results(path, greedy, nll=0.5, cot_len=512):
    path.write_text(json.dumps({"args": {"cot_len": cot_len}, "results": {"sums": {
        "hard_greedy": {"pass@1": greedy, "entropy": {}}, "solutions": {"nll": nll}}}}))
    return str(path)


def test_t_interval_against_printed_quantiles():
    for df, t in ((1, 12.7062), (2, 4.30265), (10, 2.22814), (11, 2.20099), (30, 2.04227), (1000, 1.96234)):
        low, high = report.t_interval(range(df + 1))  # whose variance is (df + 1) (df + 2) / 12
        assert (high - low) / 2 == pytest.approx(t * ((df + 2) / 12) ** 0.5, rel=1e-5)


def test_what_counts_as_a_seed():
    for text, *expected in (
            ("soft-1", "soft", 1), ("soft-s12", "soft", 12), ("soft-1e-4-3", "soft-1e-4", 3), ("base", "base", None),
            ("soft-1e-4", "soft-1e-4", None), ("lr2.E-3", "lr2.E-3", None), ("soft-1e-4-s0", "soft-1e-4", 0)):
        assert [*report.split_number(text)] == expected


def test_differences_are_paired_over_seeds_and_other_budgets_are_named(tmp_path, capsys):
    files = [write_results(tmp_path / f"hard-{seed}.json", 0.2 * seed) for seed in (0, 1, 2)]
    files += [write_results(tmp_path / f"soft-{seed}.json", 0.3 * seed + 0.1, cot_len=128) for seed in (2, 1, 0, 3)]
    report.table(Namespace(**OPTIONS, command="compare", files=["hard", *files]))  # half: 4.303 * 10 / 3 ** 0.5
    out = capsys.readouterr().out
    assert all(text in out for text in ("cot_len differs: hard-0 512", "soft (n = 3)", "| +20.0 [-4.8, +44.8] |")), out


def test_interrupted_records_are_compared_over_the_problems_of_both(tmp_path, capsys):
    base, soft = (str(tmp_path / f"{name}.json") for name in ("base", "soft"))
    for name, verdicts, end in (("base", ["wrong", "wrong"], None), ("soft", ["correct", "wrong"], -30)):
        sample = {"task": "sums", "setting": "hard_sample", "truncated": False, "cot_len": 1, "entropy": [0.5]}
        lines = [sample | {"problem": problem, "sample": i, "verdict": verdict}
                 for problem in range(3) for i, verdict in enumerate(verdicts)]
        text = "".join(json.dumps(line) + "\n" for line in [{"run": {}}, *lines])
        (tmp_path / f"{name}.jsonl").write_text(text[:end])  # soft's last problem has one sample and half a line
    report.table(Namespace(**OPTIONS, command="compare", files=[base, soft]))
    out = capsys.readouterr().out
    assert all(text in out for text in ("half a line", "soft.json (n = 2)", "e | +50.0 [", "pass@2 | +100.0 [")), out


def test_checkpoints_at_equal_greedy_accuracy(tmp_path, capsys):
    assert report.at_level([0.2, 0.6, 0.5, 0.9], [0, 4, 5, 9], 0.5) == pytest.approx(3)  # where it first gets there
    assert report.at_level([0.8, 0.6, 0.7], [0, 4, 5], 0.75) is None  # it falls through, and does not rise so far
    files = [write_results(tmp_path / f"{name}.json", greedy, nll) for name, greedy, nll in (
        ("base-0", 0.2, 1.0), ("soft-0-60", 0.4, 0.9), ("soft-0-120", 0.6, 0.5), ("hard-0-60", 0.8, 4.0))]
    report.checkpoints(Namespace(**OPTIONS, files=files, save=tmp_path / "paths.json"))
    out = capsys.readouterr().out
    report.checkpoints(Namespace(**OPTIONS, files=[tmp_path / "paths.json"], save=None))
    assert capsys.readouterr().out == out
    assert all(text in out for text in ("| sums: nll | 0.7000 | 2.5000 |", "| sums: nll | -1.8000 |")), out


def test_table_of_what_bench_why_measured(tmp_path, capsys):
    for seed, cosine in ((0, 0.4), (1, 0.2)):
        lines = [{"name": "signal_hard_float32", "between": cosine, "reference": 0.5},
                 {"name": "explored_fuzzy_bfloat16", "share": 0.1, "p": [0.5], "near": [0.2]},
                 {"name": "ties_bfloat16", "positions": 0.01, "decisions": cosine / 10}]
        (tmp_path / f"{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.why(Namespace(files=[*tmp_path.glob("*.jsonl")], plot=None))
    out = capsys.readouterr().out
    expected = "hard (n = 2) | fuzzy, bfloat16 (n = 2)", "gradients | 30.0 ± 14.1 |", "tie |  (n = 0) | 3.0 ± 1.4 |"
    assert all(text in out for text in expected), out

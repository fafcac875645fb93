"""eval.py but its verifier: tasks and their files, what is counted, likelihoods, the record, the command line."""
import itertools
import json
import re
import shutil

import pytest
import torch
from conftest import random_model, script_inside
from test_sample import checkpoint, tokenizer_like

import eval as evaluation
from eval import Record, evaluate, judge, likelihoods, load_problems, summarize, worked_text
from model import InputError
from sample import SETTINGS


def loaded(tmp_path, *rows, name="d.jsonl"):
    """The problems of a file with these rows, objects or texts."""
    text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)
    (tmp_path / name).write_text(text, encoding="utf-8")
    return load_problems(str(tmp_path / name), "test")


GOOD, LIST = '{"question": "Q", "answer": "1"}', ["a", "b", "c"]
PAIRS = {"text": LIST, "label": ["A", "B", "C"]}
LAYOUTS = [  # question | answer | solution of a problem; "" where it is a choice among a, b, c
    ("Q|2|So 2.", {"question": " Q ", "answer": "So <<1+1=2>>2.\n#### 2"}), ("Q|1|", f"\ufeff{GOOD}\r"),
    ("Q|2|a #### 1", {"question": "Q", "answer": "a #### 1\n#### 2"}), ("Q|43.0|", {"input": "Q", "target": 43.0}),
    ("Q|1/2|half", {"problem": "Q", "answer": "1/2", "solution": "half"}), ("Q|1|", f"[\n{GOOD}]"),
    ("Q|{3}|\\boxed{1}\\boxed{{3}}.", {"problem": "Q", "level": "5", "solution": "\\boxed{1}\\boxed{{3}}."}),
    ("Q|1, 2|s", {"question": "Q", "final_answer": ["1", "2"], "solution": ["s"]}),
    ("Q|1|", {"question": "Q", "answer": "1", "solution": None}), ("Q|8|", {"problem": "Q", "expected_answer": "8"}),
    ("B. Q|3.0|", {"Body": "B.", "Question": "Q", "Answer": 3.0}), ("Q|7|", {"prompt": "Q", "ground_truth": 7}),
    ("B. Q|9|", {"body": "B.", "question": "Q", "answer": "9 (apples)"}), ("Q|0|", {"problem": "Q", "answer": 0}),
    ("", {"ctx": "Q", "endings": LIST, "label": 1}), ("", {"ctx": "Q", "endings": LIST, "label": "1"}),
    ("", {"question": {"stem": "Q", "choices": [{"text": t, "label": ord(t)} for t in LIST]}, "answerKey": "98"}),
    ("", {"question": "Q", "choices": PAIRS, "answerKey": "B"}), ("", {"question": "Q", "choices": LIST, "answer": 1}),
    ("", {"question_stem": "Q", "choices": PAIRS, "Label": "B"}), ("", {"Input": "Q", "Options": LIST, "Answer": "b"})]


@pytest.mark.parametrize("expected, row", LAYOUTS)
def test_usual_layouts_are_read(expected, row, tmp_path):
    problem = dict(zip(("question", "answer", "solution"), expected.split("|")))
    if not expected:
        problem = {"question": "Q\nA. a\nB. b\nC. c", "answer": "B", "solution": "", "stem": "Q", "choices": LIST}
    assert loaded(tmp_path, row) == loaded(tmp_path, row, name="d.json") == [problem]
    if expected and isinstance(row, dict):  # as in OlympiadBench
        assert loaded(tmp_path, row | {"error": "1e-2"}) == [problem | {"error": 0.01}]


@pytest.mark.parametrize("rows", [
    [{"question": ""}, {"question": " ", "Body": "B"}, {"question": None}, {"answer": ""}, {"answer": None},
     '{"question": "Q", "answer": NaN}', {"answer": "so #### "}, {"answer": "", "solution": "\\boxed{1"},
     {"answer": [None]}, {"answer": [], "solution": "5"}],
    [{"choices": ["1", ""]}, *({"choices": ["1", "2"], "answer": a} for a in (-1, 2, "", "AB", None, "C", 0.5, "²"))]])
def test_what_cannot_be_asked_is_left_out_and_counted(rows, tmp_path, capsys):
    good = {"question": "Q", "answer": "0"} | ({"choices": ["1", "2"]} if "choices" in rows[0] else {})
    rows = [row if isinstance(row, str) else good | row for row in rows]
    assert len(loaded(tmp_path, good, *rows, "", good)) == 2
    assert f"d.jsonl: left out {len(rows)} without question, answer or" in capsys.readouterr().out


@pytest.mark.parametrize("content, named", [
    ("nonsense", ":1"), ("[1]", ":1"), (GOOD + '\n{"question": "Q"}', ":2"), ('{"answer": "1"}', ":1"), (b"\xff", ":1"),
    ("[" * 9999, ":1"), ("", "no problems"), ('{"prompt": [{"role": "user"}], "answer": "1"}', ":1"),
    ('{"question": "Q\\ud83d", "answer": "1"}', ":1"), ('{"question": "Q", "choices": "a ) 1", "answer": "a"}', ":1"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:9fa8\nsize 4", "git lfs pull"),
    (GOOD + '\n{"question": "Q", "choices": ["1", "2"], "answer": 0}', "some with choices")])
def test_file_that_is_no_data_is_refused_in_one_line(content, named, tmp_path):
    (tmp_path / "d.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"d.jsonl.*{named}") as e:
        load_problems(str(tmp_path / "d.jsonl"), "test")
    assert "\n" not in str(e.value)


def test_arithmetic_is_right_and_its_splits_are_disjoint():
    for task, rules in evaluation.ARITHMETIC.items():
        modulus = rules["modulus"]
        splits = {split: load_problems(task, split, 300) for split in ("train", "val", "test")}
        assert len({p["question"] for problems in splits.values() for p in problems}) == 900
        for split, p in ((split, p) for split, problems in splits.items() for p in problems):
            value, *signs = re.split(r"([-+*])", p["question"])
            for sign, digit, step in zip(signs[::2], signs[1::2], p["solution"].split(";"), strict=True):
                result = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(value), int(digit)) % modulus
                assert step == f"{value}{sign}{digit}={result:0{len(value)}}"
                value = f"{result:0{len(value)}}"
            assert p["answer"] == value and evaluation.arithmetic_split(p["question"]) == split


def test_figures_by_hand():
    for c, n in itertools.combinations_with_replacement(range(7), 2):  # pass@k against all subsets
        for k in range(1, n + 1):
            subsets = [*itertools.combinations([True] * c + [False] * (n - c), k)]
            assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    interval = evaluation.bootstrap([1.0] * 40 + [0.0] * 60)  # standard error 0.049
    assert interval == pytest.approx([0.4 - 1.96 * 0.049, 0.4 + 1.96 * 0.049], abs=0.011)
    verdicts, entropies = ["correct", "wrong", "unparsed", "error"], [[1.0, 2.0], [3.0], [5.0, 6.0, 7.0], [1.0]]
    r = summarize([{"problem": i // 2, "sample": i % 2, "verdict": v, "truncated": i == 0, "cot_len": i, "entropy": h}
                   for i, (v, h) in enumerate(zip(verdicts, entropies))])
    assert (r["pass@1"], r["pass@2"], r["n_problems"], r["n_samples"], r["cot_len"]) == (0.25, 0.5, 2, 2, 1.5)
    assert r["truncated"] == r["unparsed"] == r["errors"] == 0.25
    assert r["entropy"] == {"mean": [2.5, 4.0, 7.0], "n_rows": [4, 2, 1]}


PROBLEMS = [{"question": "1+2", "answer": "3", "solution": "1+2=3"},
            {"question": "3*4", "answer": "2", "solution": "3*4=2"}, {"question": "5-6", "answer": "9", "solution": ""}]


@pytest.mark.parametrize("setting", SETTINGS)
def test_samples_do_not_depend_on_the_batch_and_are_judged(setting, tiny):
    mode, how = setting.split("_")
    options = {"n_samples": 4, "notes": tiny[0].notes | {"cot_len": 6, "answer_len": 3}, "seed": 3}
    rows = evaluation.generate(*tiny, ["1+2", "3*4", "5-6"], mode, 1 if how == "greedy" else 4, notes=options["notes"],
                               greedy=how == "greedy", seed=(evaluation.EVAL, 3)).rows
    for samples in (evaluate(*tiny, PROBLEMS, setting, batch=batch, **options) for batch in (64, 2)):
        assert [(s["cot"], s["answer"]) for s in samples] == [(row.cot, row.answer) for row in rows]
        for s in samples:
            verdict = "unparsed" if s["answer"] is None else judge(s["answer"], PROBLEMS[s["problem"]]["answer"])
            assert s["verdict"] == verdict and len(s["entropy"]) == s["cot_len"] < s["length"]


SIZE = {"vocab_size": 400, "max_position_embeddings": 1024}


@pytest.fixture(scope="module")
def byte_dir(tmp_path_factory):
    """A random model over bytes as a checkpoint directory: unlike the tiny one it knows letters."""
    path = tmp_path_factory.mktemp("bytes")
    checkpoint(path, tokenizer_like("gpt2"), soft_tokens={"prompt": "Q: {question} A:", "cot_len": 6, "answer_len": 4})
    random_model(**SIZE).save_pretrained(path)
    return path


def test_likelihoods_equal_a_direct_computation(byte_dir):
    model, tokenizer = evaluation.load(byte_dir)

    def direct(prompt, text):
        n, ids = len(prompt), tokenizer.encode(prompt + text).ids
        logp = model.logits(model(torch.tensor([ids])))[0].log_softmax(-1).detach()
        return logp[n - 1:-1].gather(-1, torch.tensor(ids[n:])[:, None])[:, 0]
    results = likelihoods(model, tokenizer, PROBLEMS)  # the third has no solution
    expected = [-direct(f"Q: {p['question']} A:", worked_text(p)).mean().item() for p in PROBLEMS[:2]]
    assert [r["nll"] for r in results] == pytest.approx(expected, abs=1e-4)
    questions = [{"question": f"{stem}\nA. x\nB. yy=1", "stem": stem, "choices": ["x", "yy=1"], "answer": answer,
                  "solution": ""} for stem in ("What?", "Which of them") for answer in "AB"]
    for q, r in zip(questions, likelihoods(model, tokenizer, questions), strict=True):
        letter = [direct(f"{q['question']}\nAnswer:", f" {c}").mean().item() for c in "AB"]
        text, gold = [direct(q["stem"], f" {c}").mean().item() for c in q["choices"]], "AB".index(q["answer"])
        assert [r["nll"], r["letter_nll"]] == pytest.approx([-text[gold], -letter[gold]], abs=1e-4)
        assert (r["text_accuracy"], r["letter_accuracy"]) == (text[gold] == max(text), letter[gold] == max(letter))


def test_record_goes_on_and_what_is_none_is_refused(tmp_path):
    path, run = tmp_path / "new" / "r.jsonl", {"seed": 0}
    record = Record(path, run)
    for problem in (0, 1):
        record.write(task="t", setting="choices", problem=problem, nll=1.0)
    with pytest.raises(InputError, match="r.jsonl: in use by another evaluation"):
        Record(path, run)
    record.file.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"task": "t')
    again = Record(path, run)
    assert [s["problem"] for s in again.samples["t", "choices"]] == [0, 1] and path.read_bytes() == whole
    again.file.close()
    with pytest.raises(InputError, match="r.jsonl: of another run: seed was 0, is 1; dtype was None, is 'x'"):
        Record(path, {"seed": 1, "dtype": "x"})
    lines = whole.split(b"\n")
    sample = b'{"task": "t", "setting": "hard_greedy", "problem": 0, "verdict": "wrong", "truncated": false}'
    for bad in (b"", b"3", b"[]", b"{}", b"\xff", b"[" * 9999, lines[1].replace(b"0", b'"0"'), sample):
        for at in range(3):
            path.write_bytes(b"\n".join(lines[:at] + [bad] + lines[at + 1:]))
            with pytest.raises(InputError, match="r.jsonl: not the record"):
                Record(path, run)


def test_command_goes_on_after_a_kill_and_refuses_another_run(byte_dir, tmp_path):
    mmlu, model, whole, other = (tmp_path / name for name in ("mmlu.jsonl", "model", "r.json", "other.json"))
    mmlu.write_text("".join(json.dumps(
        {"question": f"Q{i}", "choices": ["1", "2", "3", "4"], "answer": i % 4}) + "\n" for i in range(5)))
    shutil.copytree(byte_dir, model)
    flags = ["eval.py", "--model", model, "--settings", "all", "--samples", 3, "--limit", 3, "--cot_len", 6,
             "--answer_len", 4, "--data", f"arithmetic,{mmlu}", "--out"]
    done = script_inside(*flags, whole)
    assert done.returncode == 0 and "budgets: 6 tokens of thought, 4 of answer" in done.stdout, done.stderr
    results = json.loads(whole.read_text())["results"]
    sums, choices = results.values()
    assert sums.keys() == {"solutions", *SETTINGS} and choices.keys() == {"choices"}
    assert {"pass@1", "pass@2"} <= sums["soft_sample"].keys() and "pass@2" not in sums["soft_greedy"]
    lines = whole.with_suffix(".jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 3 * (3 * 3 + 3) + 3 + 3
    for n, repeated in ((0, 0), (1, 0), (31, 11)):  # killed at such a line, within the next
        other.with_suffix(".jsonl").write_text("".join(lines[:n] + lines[n - repeated:n]) + lines[n][:20])
        done = script_inside(*flags, other)
        assert done.returncode == 0 and json.loads(other.read_text())["results"] == results, done.stderr
    (model / "soft_tokens.json").write_text('{"prompt": "User: {question} A:"}')
    random_model(seed=1, **SIZE).save_pretrained(model)
    done = script_inside(*flags, whole, "--seed", 1, "--limit", 2, "--cot_len", 5, "--dtype", "bfloat16",
                         "--samples", 2)
    assert done.returncode == 2 and all(f"{key} was" in done.stderr.splitlines()[-1] for key in (
        "seed", "arithmetic", "cot_len", "dtype", "samples", "prompt", "model.safetensors")), done.stderr
    done = script_inside("eval.py", "--model", model, "--limit", 1, "--settings", "hard_greedy")
    assert done.returncode == 0 and "budgets: 512 tokens of thought, 32 of answer" in done.stdout, done.stderr

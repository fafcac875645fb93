"""The scripts as a user runs them: flags, complaints, what they print and leave behind; and the house rules."""
import argparse
import ast
import json
import re
import shlex
import subprocess
import sys

from conftest import ROOT, script_inside

SCRIPTS = ("train.py", "sample.py", "eval.py")
MISTAKES = """
train.py --model nowhere --data arithmetic             | nowhere/config.json
train.py --model plain.jsonl --data arithmetic         | plain.jsonl
eval.py                                                | --model
sample.py 1+1                                          | --model
sample.py --model TINY                                 | question
sample.py --model empty 1+1                            | empty/config.json
sample.py --model run 1+1                              | best/
train.py --model TINY --samples 1                      | --samples 1
train.py --lr nan                                      | --lr
train.py --steps 0                                     | --steps
train.py --micro_batch 0                               | --micro_batch
train.py --warmup ten                                  | --warmup
train.py --seed -1                                     | --seed
train.py --seed 99999999999999999999                   | --seed
train.py --dtype float16                               | --dtype
train.py --device cuda:99                              | --device
train.py --mode loud                                   | --mode
train.py --data gsm8k                                  | --data gsm8k
train.py --data nowhere.jsonl --out new                | nowhere.jsonl
train.py --seed 7                                      | out/base-arithmetic-7
train.py --model TINY --data arithmetic --out plain.jsonl/out           | plain.jsonl
train.py --model TINY --data plain.jsonl               | --val_size 128
train.py --model TINY --data arithmetic --val_size 9999                 | --val_size
train.py --model TINY --data long.jsonl --val_size 1   | context of 256
train.py --model TINY --data arithmetic --cot_len 999  | --cot_len
train.py --model TINY --data plain.jsonl --val_size 1 --mode sft        | plain.jsonl
train.py --model TINY --data letters.jsonl --val_size 1                 | characters
sample.py --model TINY --temperature 1e300 1+1         | --temperature
sample.py --model TINY 11111111111111111111111111111111 --cot_len 250   | context of 256
sample.py --model TINY --show 0 1+1                    | --show
sample.py --model TINY --cot_len 9 --inspect nowhere/page.html 1+1      | nowhere/page.html
eval.py --model TINY --cot_len 0                       | --cot_len
eval.py --model TINY --out r.txt                       | --out r.txt
eval.py --model TINY --out plain.jsonl/r.json          | plain.jsonl
eval.py --model TINY --data empty                      | empty
eval.py --model TINY --data d.parquet                  | read_parquet
eval.py --model TINY --data d.jsonl.gz                 | gunzip
eval.py --model TINY --data arithmetic,nowhere.jsonl   | nowhere.jsonl
eval.py --model TINY --prompt_file nowhere             | --prompt_file nowhere
"""


def test_mistakes_end_in_one_line_that_names_the_place(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "run/best", "run/last", "out/base-arithmetic-7/best/training"):
        (tmp_path / folder).mkdir(parents=True)
    for name, questions in {"plain": ("1+1", "1+2"), "long": ("1", "1+" * 150), "letters": ("one", "two")}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"question": "{q}", "answer": "1"}}\n' for q in questions))
    (tmp_path / "out/base-arithmetic-7/best/training/args.json").write_text('{"mode": "soft"}')
    for line in MISTAKES.strip().splitlines():
        command, words = (part.strip() for part in line.rsplit("|", 1))
        done = script_inside(*shlex.split(command.replace("TINY", str(tiny_dir))))
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done
        assert words in done.stderr and len(done.stderr) < 400, done.stderr
    assert not (tmp_path / "new").exists()


def test_help_explains_every_flag_and_the_documents_name_only_flags_that_exist(monkeypatch):
    known = {}
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args",
                        lambda parser: known.update({name: parser}) or sys.exit())
    for name in SCRIPTS:
        script_inside(name)
        assert [a.option_strings or a.dest for a in known[name]._actions if not a.help] == [], name
        assert all(flag in known[name].format_help() for flag in known[name]._option_string_actions)
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in (*SCRIPTS, "README.md")]
    commands = re.findall(r"^.*?\b(train|sample|eval)\.py\b(.*)$", "\n".join(texts).replace("\\\n", " "), re.M)
    for name, rest in commands:
        for flag in re.findall(r"(?<=\s)--[a-z_]+", rest):
            assert flag in known[f"{name}.py"]._option_string_actions or flag == "--nproc_per_node", (name, rest)


def test_screen_is_narrow_and_has_no_carriage_returns(tiny_dir, tmp_path):
    run = script_inside("train.py", "--model", tiny_dir, "--data", "arithmetic", "--out", tmp_path, "--steps", 2,
                        "--prompts", 2, "--samples", 2, "--val_size", 2, "--cot_len", 5, "--eval_every", 1)
    evaluation = script_inside("eval.py", "--model", tiny_dir, "--limit", 2, "--cot_len", 5)
    for done in (run, evaluation):
        assert done.returncode == 0 and done.stderr == "" and "\r" not in done.stdout, done.stderr
        lines = [line for line in done.stdout.splitlines() if str(tmp_path) not in line and str(tiny_dir) not in line]
        assert max(map(len, lines)) <= 100
    assert "step 2/2" in run.stdout and f"eval.py --model {tmp_path / 'best'}" in run.stdout
    assert "5 tokens of thought" in evaluation.stdout
    fields = {"step", "loss", "reward", "accuracy", "unparsed", "truncated", "entropy", "delta_logp", "grad_norm"}
    assert all(fields <= json.loads(line).keys() for line in (tmp_path / "log.jsonl").read_text().splitlines())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["base"].keys() == summary["final"].keys() == {"soft_greedy", "hard_greedy"} and summary["steps"] == 2


def test_sample_shows_the_thought_and_writes_the_page(tiny_dir, tmp_path):
    flags = ["sample.py", "--model", tiny_dir, "--cot_len", 6, "3+4*<2>"]
    first, again, other = (script_inside(*flags, "--seed", seed).stdout for seed in (0, 0, 9))
    assert "answer: " in first and "\\boxed{" in first and first == again != other
    for mode in ("soft", "hard", "fuzzy"):
        page = tmp_path / f"{mode}.html"
        done = script_inside(*flags, "--mode", mode, "--show", 3, "--inspect", page)
        assert done.returncode == 0, done.stderr
        rows = [line.split("|")[1] for line in done.stdout.splitlines() if "|" in line]
        weights = [[float(w) for w in re.findall(r" (\d\.\d{3})\b", row)] for row in rows]
        assert len(rows) == 6 and all(len(w) == 3 and w == sorted(w, reverse=True) for w in weights)
        text = page.read_text(encoding="utf-8")
        assert '"3+4*\\u003c2>"' in text and str(tiny_dir) in text and "src=" not in text


def test_house_rules():
    """One direction of imports, six packages, and a size that can be read in an evening."""
    house, total = ["model", "sample", "eval", "train"], 0
    packages = {"torch", "safetensors", "tokenizers", "numpy", "tqdm"}
    for room in house:
        text = (ROOT / f"{room}.py").read_text(encoding="utf-8")
        total += len(text.splitlines())
        assert max(map(len, text.splitlines())) <= 100, room
        tree = ast.parse(text)
        imports = [a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names] + [
            n.module for n in tree.body if isinstance(n, ast.ImportFrom)]
        ours = {name for name in imports if name in house}
        assert ours <= {*house[:house.index(room)]}, room
        assert {name.split(".")[0] for name in imports} - ours <= packages | sys.stdlib_module_names, room
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                limit = 150 if (room, node.name) == ("train", "train") else 60
                assert node.end_lineno - node.lineno < limit, (room, node.name)
    assert total <= 2400


def test_repository_holds_what_the_card_names():
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], text=True, capture_output=True)
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert top <= {"README.md", "requirements.txt", "model.py", "sample.py", "train.py", "eval.py", "tests", "assets",
                   "LICENSE", ".ci", ".gitignore"}
    names = {re.split(r"[<>=~! ]", line)[0] for line in (ROOT / "requirements.txt").read_text().split("\n") if line}
    assert names == {"torch", "safetensors", "tokenizers", "numpy", "tqdm", "pytest"}
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 300
    tests = [path.read_text(encoding="utf-8").splitlines() for path in (ROOT / "tests").glob("*.py")]
    assert sum(map(len, tests)) <= 2400 and max(len(line) for lines in tests for line in lines) <= 120

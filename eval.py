"""
Tasks, the verifier, and what is measured: pass@k of a checkpoint in the six settings, and its
likelihoods of reference solutions and of multiple-choice answers.

    python eval.py --model out/soft/best    # the tiny model on arithmetic
    python eval.py --model path/to/Llama-3.2-3B-Instruct --data gsm8k,math500 --settings all
    python eval.py --model path/to/model --data my_problems.jsonl,hellaswag,arc,mmlu --out r.json

A problem is {"question", "answer", "solution"}. One with choices lists them in its question, and
its answer is a letter; it also has "stem", the question without them, and "choices".
"""
import ast
import contextlib
import csv
import decimal
import fcntl
import hashlib
import itertools
import json
import math
import operator
import random
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import defaultdict
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import InputError, write_json
from sample import (EVAL, MODES, SETTINGS, STOP, Parser, dtype_of, encode_after, encode_prompts,
                    generate, load, notes_with, positive, read_box)

# ---- Tasks -----------------------------------------------------------

RAW = "https://raw.githubusercontent.com"
LFS = "https://media.githubusercontent.com/media"  # where RAW has pointers only
GSM8K = f"{RAW}/openai/grade-school-math/master/grade_school_math/data"
PRM800K = f"{LFS}/openai/prm800k/main/prm800k/math_splits"
QWEN = f"{RAW}/QwenLM/Qwen2.5-Math/main/evaluation/data"
ARC = f"{LFS}/raybears/cot-transparency/main/data/arc_challenge"
DEEPSCALER = "https://huggingface.co/datasets/agentica-org/DeepScaleR-Preview-Dataset/resolve/main"
FILES = {  # (task, split): address, and how its SHA-256 begins where that is known
    ("gsm8k", "train"): (f"{GSM8K}/train.jsonl", "17f347dc51477c50"),
    ("gsm8k", "test"): (f"{GSM8K}/test.jsonl", "3730d312f6e34405"),
    ("math", "train"): (f"{PRM800K}/train.jsonl", "90d96daeac3fe343"),  # MATH without MATH-500
    ("math500", "test"): (f"{PRM800K}/test.jsonl", "35dc41080a368085"),
    ("olympiadbench", "test"): (f"{QWEN}/olympiadbench/test.jsonl", "bb8c1e38a16ea9ea"),
    ("deepscaler", "train"): (f"{DEEPSCALER}/deepscaler.json", ""),
    ("mawps", "test"): (f"{QWEN}/mawps/test.jsonl", "00ffe31161be8623"),
    ("hellaswag", "val"): (f"{RAW}/rowanz/hellaswag/master/data/hellaswag_val.jsonl", ""),
    ("arc", "test"): (f"{ARC}/ARC-Challenge-Test.jsonl", "9fa8ffb3e3a1f88c"),
    ("mmlu", "test"): ("https://people.eecs.berkeley.edu/~hendrycks/data.tar", "")}
ARITHMETIC = {  # chains of n numbers, from left to right and modulo `modulus`: 3+4*2 is 14, so 4.
    # Careless writers take a sign for a plus with probability careless[0] before a digit below 4,
    # else careless[1], and write a wrong digit in a result with probability slip
    "arithmetic": dict(modulus=10, n=(3, 4), signs="+-*", careless=(0.5, 0.5), slip=0.0),
    "chains": dict(modulus=100, n=(3, 4), signs="++++-----*", careless=(0.3, 0.6), slip=0.2)}
TASKS = [*ARITHMETIC, *dict.fromkeys(task for task, _ in FILES)]
# How files call what a problem has; the first that is there counts
QUESTION = "stem question problem input prompt question_stem ctx".split()
ANSWER = "final_answer answerkey answer target ground_truth expected_answer label".split()
CHOICES = "choices options endings".split()
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def download(url, sha256, path):
    """Fetch url into path, complete or not at all; sha256: how its digest begins, or ""."""
    print(f"downloading {url} to {path}", flush=True)
    path.parent.mkdir(exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, path, sha256, progress=sys.stderr.isatty())
    except Exception as e:  # of many kinds
        raise InputError(f"{path}: cannot download {url} ({e}); put it there yourself") from None


def read_rows(path):
    """The rows of a data file: JSON lines, one JSON list, or MMLU's folder of CSV files."""
    if path.suffix == ".tar":
        shutil.unpack_archive(path, path.with_suffix(""), filter="data")
        path = path.with_suffix("") / "data" / "test"
    if path.is_dir():
        rows = [row for file in sorted(path.glob("*.csv"))
                for row in csv.reader(file.open(newline="", encoding="utf-8-sig")) if row]
        return [{"question": question, "choices": [a, b, *others], "answer": letter}
                for question, a, b, *others, letter in rows]
    text = path.read_text("utf-8-sig").strip()
    if text.startswith("version https://git-lfs"):
        raise ValueError("a git-lfs pointer, not the file itself: run git lfs pull")
    if text.startswith("["):
        return json.loads(text)
    return map(json.loads, filter(str.strip, text.split("\n")))


def field(*values):
    """The first of these values that is there, as text; "" for none, null and NaN."""
    value = next((v for v in values if v is not None), "")
    if isinstance(value, list):
        return ", ".join(map(field, value))
    if not isinstance(value, (str, int, float)):
        raise TypeError(f"{value!r:.40} where text belongs")
    str(value).encode()  # a ValueError for half a character
    return "" if value != value else str(value).strip()


def read_problem(row):
    """A row in one of the usual layouts as a problem, with "" for what it does not say."""
    row = {key.lower(): value for key, value in row.items()}
    if isinstance(row.get("question"), dict):  # ARC as published: the stem and its choices
        row |= row["question"]
    if not (row.keys() & {*QUESTION} and row.keys() & {*ANSWER, "solution"}):
        raise LookupError("it lacks question (or problem, input) or answer (or target)")
    question, answer = field(*map(row.get, QUESTION)), field(*map(row.get, ANSWER))
    solution = field(row.get("solution"))
    if question and "body" in row:  # SVAMP and ASDiv: what is asked about; and 9 (apples)
        question = f"{field(row['body'])} {question}"
        answer = re.sub(r"\s*\([^()]*\)", "", answer)
    if choices := next((row[name] for name in CHOICES if row.get(name)), None):
        return choice_problem(question, choices, answer)
    if "####" in answer:  # GSM8K: reasoning with <<calculator>> notes, then the number
        solution, answer = re.sub(r"<<.*?>>", "", answer).rsplit("####", 1)
    elif not answer:  # MATH as published
        answer = read_box(solution.rpartition("\\boxed{")[2]) or ""
    problem = {"question": question, "answer": answer.strip(), "solution": solution.strip()}
    if re.fullmatch(r"\d*\.?\d+(e-?\d+)?", field(row.get("error"))):  # OlympiadBench
        problem["error"] = float(row["error"])
    return problem


def choice_problem(stem, choices, gold):
    """A multiple-choice problem. gold: a choice's label, or its number from 0 in a plain list."""
    labels, texts = LETTERS, choices
    if isinstance(choices, str):
        raise TypeError("its choices are one text, not a list")
    if isinstance(choices, dict):  # ARC on the hub
        labels, texts = choices["label"], choices["text"]
    elif isinstance(choices[0], dict):  # ARC as published
        labels, texts = ([choice[key] for choice in choices] for key in ("label", "text"))
    elif gold.isdecimal():
        gold = LETTERS[int(gold)]
    texts = [*map(field, texts)]
    letter_of = {str(label).upper(): letter for label, letter, _ in zip(labels, LETTERS, texts)}
    listing = "".join(map("\n{}. {}".format, LETTERS, texts))
    return {"question": stem and stem + listing, "answer": letter_of.get(gold.upper(), ""),
            "solution": "", "stem": stem, "choices": texts}


def load_problems(data, split, n=512):
    """The problems of a task or of a file. split: "train", "val" or "test"; a task without such a
    file uses another. n: how many problems of arithmetic, whose splits are disjoint."""
    if data in ARITHMETIC:
        if n > 8192:  # with more than a split has, this would never end
            raise InputError(f"--limit or --val_size {n}: {data} has 8192 problems; use fewer")
        rng, made = random.Random(split), {}
        while len(made) < n:
            p = arithmetic_problem(rng, data)
            if arithmetic_split(p["question"]) == split:
                made[p["question"]] = p
        return list(made.values())
    path, problems = Path(data), []
    if data in TASKS:
        if (data, split) not in FILES:
            was, split = split, dict([*FILES])[data]
            print(f"note: {data} has no {was} file; its {split} file is used")
        path = Path("data", f"{data}_{split}{Path(FILES[data, split][0]).suffix}")
        if not path.exists():
            download(*FILES[data, split], path)
    try:
        for row in read_rows(path):
            problems.append(read_problem(row))
    except Exception as e:  # whatever the file holds
        raise InputError(
            f"--data {path}:{len(problems) + 1}: {e}; give {', '.join(TASKS)}, or JSON objects "
            "with question and answer, one a line (gunzip .gz; of Parquet "
            "pandas.read_parquet(A).to_json(B, orient='records', lines=True))") from None
    whole = [p for p in problems if all([p["question"], p["answer"], *p.get("choices", [])])]
    if n_left_out := len(problems) - len(whole):
        print(f"{path}: left out {n_left_out} without question, answer or a choice", flush=True)
    if len({"stem" in p for p in whole}) != 1:
        raise InputError(f"--data {path}: no problems, or some with choices and some without")
    return whole


def arithmetic_split(question):
    """The split that a question belongs to, by its checksum."""
    return {0: "val", 1: "test"}.get(zlib.crc32(question.encode()) % 10, "train")


def arithmetic_problem(rng, task="arithmetic", careful=True):
    """A random problem with a solution that shows every step, by a writer who is careful or not."""
    modulus, (least, most), signs, careless, slip = ARITHMETIC[task].values()
    n_digits, value = len(str(modulus - 1)), rng.randrange(modulus)
    question, steps = f"{value:0{n_digits}}", []
    for _ in range(rng.randint(least, most) - 1):
        sign, digit = rng.choice(signs), rng.randrange(10)
        read = "+" if rng.random() < (not careful) * careless[digit >= 4] else sign
        result = {"+": value + digit, "-": value - digit, "*": value * digit}[read] % modulus
        if not careful and slip and rng.random() < slip:
            place = 10 ** rng.randrange(n_digits)
            was = result // place % 10
            result += (rng.choice([d for d in range(10) if d != was]) - was) * place
        steps.append(f"{value:0{n_digits}}{sign}{digit}={result:0{n_digits}}")
        question, value = f"{question}{sign}{digit}", result
    return {"question": question, "answer": f"{value:0{n_digits}}", "solution": ";".join(steps)}


def worked_text(problem):
    """A reference solution in the form that the prompt asks for, for mode sft to imitate."""
    return f" {problem['solution']} {STOP} \\boxed{{{problem['answer']}}}."


def check_vocabulary(tokenizer, problems):
    """Raise InputError if some characters of the problems are unknown to the tokenizer."""
    text = "".join(p["question"] + p["answer"] + p["solution"] for p in problems)
    unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "<unk>")
    ids = {c: tokenizer.encode(c, add_special_tokens=False).ids for c in {*text}}
    if lost := [c for c in ids if not ids[c] or unknown in ids[c]]:
        share = sum(map(text.count, lost)) / len(text)
        raise InputError(f"--data: the model lacks {share:.1%} of its characters: {lost[:9]}")


# ---- The verifier: does a final answer equal the reference? ----------
# Policies find every hole in a reward, so what is not understood is an error, never a match. If the
# reference is a plain number, only a plain number is right: a sum left undone is no answer.
# Values lie between 1e-30 and 1e30 and have 80 digits: no two short fractions look the same.

VERIFIERS = ("own", "math-verify")
VERIFIER_VERSION = 2  # raise it whenever a verdict changes: records of evaluations name it
MAX_CHARS, MAX_DEPTH, MAX_ITEMS, MAX_SECONDS = 400, 12, 24, 10
EXACT = decimal.Context(prec=80, Emax=30, Emin=-30, traps=[
    decimal.Overflow, decimal.Subnormal, decimal.InvalidOperation, decimal.DivisionByZero])
CONSTANTS = {"e": EXACT.exp(1), "\\pi": Decimal(
    "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")}
NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d{1,3}(?![\d.]))?"
LETTER = r"(?:[A-Za-z](?:_\w+)?|\\(?:pi|alpha|beta|gamma|theta|lambda|mu|phi|omega|sigma|rho))"
TOKEN = re.compile(rf"{NUMBER}|[A-Za-z]{{3,}}|\\[A-Za-z]+|{LETTER}|\\.|\S", re.A)
FRACTION = rf"\d+ \d+/\d+|{NUMBER}/{NUMBER}|(?:\d+ ?)?\\frac{{-?{NUMBER}}}{{{NUMBER}}}"
PLAIN = re.compile(rf"-?(?:{FRACTION}|{NUMBER})(?:\*10\^(?:\d+ ?|{{-?\d+}}))?", re.A)
UNICODE = str.maketrans({
    "−": "-", "×": "*", "·": "*", "π": "\\pi ", "√": "\\sqrt ", "≤": "<=", "≥": ">=", "²": "^2"})
SPELLINGS = (  # what changes the look and not the value, in the order of rewriting
    (r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3}(?!\d))", ""), (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:left|right)(?![a-z])|\\!|(?<!\\)\\[][()]", ""), (r"(?<!\\)\\[,;: ]|\\quad|~", " "),
    (r"\\(?:text|math|mbox)[a-z]* *\{([^{}]*)\}", r" \1"), (r"\\([%$])", r"\1"),
    (r"\\(?:cdot|times)(?![a-z])", "*"), (r" +", " "), (r" *([{^/*]) *", r"\1"), (r" +\}", "}"),
    (r"^ *\\boxed\{(.*)\}[ .]*$", r"\1"),
    (r"\^\{?\\circ\}?", "°"), (r"\\leq?(?![a-z])", "<="), (r"\\geq?(?![a-z])", ">="),
    (r"\\(?:in|approx)(?![a-z])", "="), (r"(?<![A-Za-z\\])(pi|infty|sqrt)(?![a-z])", r"\\\1"),
    (r"\\sqrt\(([^()]*)\)", r"\\sqrt{\1}"), (r"\|([^|]*)\|", r"\\sqrt{(\1)^2}"),
    (r"([_^])\{(\d+|[A-Za-z])\}", r"\1\2 "),
    (r"(?:^|\{)([^{}]*)\\over(?![a-z])([^{}]*)(?:\}|$)", r"\\frac{\1}{\2}"),
    (r"\\(frac|sqrt) *(\d|(?<= )[a-z])", r"\\\1{\2}"),
    (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\}) *(\d|[a-z])", r"\1{\2}"),
    (r"[(\[]? ?\\begin\{(?:[pb]?matrix|array)\}(?:\{[clr|]*\})?", "[["),  # rows
    (r"(?:\\\\)? ?\\end\{\w+\} ?[)\]]?", "]]"), ("&", ","), (r"\\\\(?: ?\[[^]]*\])?", "],["),
    (r"\bsquare ([a-z]+)", r"\1^2"), (r"^[ =]+|[ ,;.]+$", ""), (r"(^|[(\[,]) ?\+", r"\1"),
    (r"^(-?) ?([$€£]) ?(.*)$", r"\1\3 \2"), (r"^\(? ?([A-Z]) ?\)$", r"\1"),
    (r"^(?=.*[A-Za-z][a-z])[A-Za-z ,.'-]+$", lambda words: words[0].lower()))


def depths(text):
    """The number of open brackets, before the first character and after every one."""
    return list(itertools.accumulate(((c in "([{") - (c in ")]}") for c in text), initial=0))


def clean(text):
    """One spelling for the many ways in which people and models write the same answer."""
    if len(text) > MAX_CHARS:
        raise ValueError("too long")
    text = " ".join(text.translate(UNICODE).split())
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:  # they enclose formulas; one alone is money
        text = re.sub(r"(?<!\\)\$", "", text)
    for pattern, new in SPELLINGS:
        text = re.sub(pattern, new, text, flags=re.A)
    if min(depths(text)) < 0 or max(depths(text)) > MAX_DEPTH or depths(text)[-1]:
        raise ValueError("brackets do not match")
    return text.strip()


UNITS = {spelling: names.split()[0] for names in (  # a unit's name, then its other spellings
    "mm;cm;m meter;km;in inch inches;ft foot feet;yd yard;mi mile;g gram;lb pound;oz ounce;liter;"
    "gallon;cup;s second;min minute;h hr hour;day;week;month;year;am;pm;mph;unit;$ dollar;¢ cent;"
    "€ euro;£;° degree;rad radian;% percent"
    ).split(";") for name in names.split() for spelling in (name, name + "s" * (len(name) > 1))}
UNIT = rf"(?:{'|'.join(map(re.escape, UNITS))})(?:\^[23])?"
WITH_UNIT = re.compile(rf"(.*?(?:[\d.)}}]|\\pi))( ?)({UNIT}(?:/{UNIT})?)", re.A)


def split_unit(text):
    """"5 cm^2" as ("5", "cm^2"); without a known unit, the whole text and ""."""
    m = WITH_UNIT.fullmatch(text)
    if not m or re.fullmatch("[a-zA-Z]", m[3]) and not (m[2] and PLAIN.fullmatch(m[1])):
        return text, ""  # "5 m" has a unit, but "5m" is a product
    return m[1], re.sub(r"[^\W\d]+|[%°¢€£$]", lambda name: UNITS[name[0]], m[3])


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.Pow: operator.pow, ast.USub: operator.neg,
             ast.UAdd: operator.pos}
TO_PYTHON = (  # from the innermost braces outwards
    (r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))"), (r"\^\{([^{}]*)\}", r"^(\1)"),
    (r"\\sqrt\{([^{}]*)\}", r"((\1)^(1/2))"), (r"\\sqrt\[(\d+)\]\{([^{}]*)\}", r"((\2)^(1/\1))"))


def parse(text, leaves):
    """The syntax tree of an expression, which calls its n-th number or letter vn; leaves, a list,
    gets these."""
    if PLAIN.fullmatch(text):
        text = re.sub(r"^(-?)(\d+) ?((?<= )\d+/\d+|\\frac.*)$", r"\1(\2+\3)", text)
    letter = r"(?!(?<=[\d.])e\d{1,3}(?![\d.]))[A-Za-z)}]"  # not the e of 1e3
    if re.search(rf"\d ?\\frac|[\w.)}}] +[\d.]|{letter}[\d.]|[\d.]{{30}}|//", text):
        raise ValueError("3 4 is neither 12 nor 34")
    for pattern, new in TO_PYTHON * text.count("{"):
        text = re.sub(pattern, new, text)
    code = ""
    for token in TOKEN.findall(text):
        if re.fullmatch(f"{NUMBER}|{LETTER}", token):
            leaves.append(token)
            token = f"v{len(leaves) - 1}"
        elif token not in "+-*/^()":
            raise ValueError(f"{token} is not understood")
        code += "*" * (code[-1:].isdigit() or code[-1:] == ")") * (token[0] in "v(") + token
    return ast.parse(code.replace("^", "**"), mode="eval").body


def compute(tree, names):
    """The value of a tree of names, sums, products and powers; KeyError for anything else."""
    if isinstance(tree, ast.Name):
        return names[tree.id]
    if isinstance(tree, ast.UnaryOp):
        return OPERATORS[type(tree.op)](compute(tree.operand, names))
    return OPERATORS[type(tree.op)](compute(tree.left, names), compute(tree.right, names))


def values(*texts):
    """The expressions' values at random points where all are defined."""
    leaves, found, dice = [], [], random.Random(0)
    trees = [parse(text, leaves) for text in texts]
    for _ in range(12):
        at = {leaf: Decimal(leaf) if re.match(NUMBER, leaf) else  # letters: of both signs
              Decimal(dice.choice((-1, 1)) * dice.randint(2, dice.choice((9, 99, 999))))
              for leaf in sorted(set(leaves))} | CONSTANTS
        names = {f"v{n}": at[leaf] for n, leaf in enumerate(leaves)}
        with contextlib.suppress(ArithmeticError), decimal.localcontext(EXACT):
            found.append([compute(tree, names) for tree in trees])
    if len(found) < 3:
        raise ValueError("no values")
    return found


LIST = r" ?(?:;|,(?!\d{3}(?!\d))|,(?<!\d,)|\\cup) ?(?:and |or )?| (?:and|or) "
NAME = re.compile(  # a left side such as x =, AB =, m+n =, f(2) = or (x,y) =
    r"(^|[,;] ?|(?:and|or) )(\((?:[A-Za-z],? ?)+\)|(?!-)(?:[-+/{}]|\\(?:angle|overline|frac) ?|"
    r"[A-Za-z](?:_[A-Za-z\d]+ ?)?(?:\([^()=]*\))?)+) ?= ?", re.A)


def split(text, pattern):
    """The parts of a text between matches of a pattern that are outside all brackets."""
    depth = depths(text)
    cuts = [m.span() for m in re.finditer(pattern, text) if depth[m.start()] == 0]
    cuts = [(0, 0), *cuts, (len(text), 0)]
    return [text[i:j].strip() for (_, i), (j, _) in zip(cuts, cuts[1:])]


def members(text):
    """The members of a list, set or union; 1 \\pm 2 is two."""
    return [part.replace("\\pm", sign).lstrip("+ ")
            for part in split(re.sub(r"^\\\{(.*)\\\}$", r"\1", text), LIST)
            for sign in ("+-" if "\\pm" in part else "+")]


def same_parts(a, b, tolerance, places=None):
    """Whether the texts of a equal those of b in some order; in the same one if places is 1."""
    if len(a) != len(b) or not a or len(a) > MAX_ITEMS:
        return len(a) == len(b) == 0
    for k, y in enumerate(b[:places]):
        if same_value(a[0], y, tolerance):
            return same_parts(a[1:], b[:k] + b[k + 1:], tolerance, places)
    return False


def same_value(a, b, tolerance):
    """Two lists, equations, tuples, intervals, words, numbers or expressions."""
    if TOKEN.findall(a) == TOKEN.findall(b):
        return a != ""
    (a, *x), (b, *y) = members(a), members(b)
    if x or y:
        return same_parts([a, *x], [b, *y], tolerance)
    swapped = b.translate(str.maketrans("<>", "><"))
    x, y, z = (re.split("([<>=]+)", text) for text in (a, b, swapped))
    if len(x) > 1 or len(y) > 1:  # the same sides, perhaps swapped
        return any(same_parts(x, other, tolerance, 1) for other in (y, z[::-1]))
    x, y = (re.fullmatch(r"([(\[])(.*)([)\]])", text) for text in (a, b))
    if x and y and min(depths(x[2]) + depths(y[2])) == 0:
        return x.group(1, 3) == y.group(1, 3) and same_parts(
            split(x[2], ","), split(y[2], ","), tolerance, 1)
    return same_number(a, b, tolerance)


def same_number(a, b, tolerance):
    """Two words, numbers or expressions, which may have units."""
    (a, unit_a), (b, unit_b) = split_unit(a), split_unit(b)
    if unit_a != unit_b and unit_a and unit_b:
        return False
    if TOKEN.findall(a) == TOKEN.findall(b) or re.fullmatch("[a-z][a-z .'-]{2,}|no", b):
        return TOKEN.findall(a) == TOKEN.findall(b)  # spaces do not count, but 3 4 is not 34
    a, b = (re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) for text in (a, b))
    pairs = values(a, b)
    if PLAIN.fullmatch(b) and not PLAIN.fullmatch(a):
        return False
    if re.search(r"\.0*[1-9]\d{5,}$", b) and "." not in a:  # a rounded reference: 0.6666666667
        pairs = [(round(x, len(b.partition(".")[2])), y) for x, y in pairs]
    scales = {("%", ""): [1, 100], ("", "%"): [1, Decimal("0.01")]}  # 50% is 50 and 0.5
    with decimal.localcontext(decimal.Context(prec=80)):
        return any(all(x == y * scale or abs(x - y * scale) <= (
            tolerance or max(abs(x), abs(y)) * Decimal("1e-65")) for x, y in pairs)
            for scale in scales.get((unit_a, unit_b), [1]))


def same(a, b, tolerance):
    """Whether candidate a equals reference b, both clean; raises where it cannot be told."""
    names = {re.sub(r"_\w+ ?$", "", m[2]) for text in (a, b) for m in NAME.finditer(text)}
    right = [NAME.sub(r"\1", text).strip() for text in (a, b)]
    if len(names) == 1 and not re.search("[<>=]", "".join(right)):
        a, b = right  # x = 1 or x = 2, against 1, 2
    return same_value(a, b, tolerance)


@contextlib.contextmanager
def time_limit(seconds):
    """Raises TimeoutError in a block that takes longer; an outer block's timer goes on."""
    if threading.current_thread() != threading.main_thread():
        yield  # other threads have no alarm
        return

    def late(*_):
        raise TimeoutError(f"more than {seconds} seconds")
    start, before = time.monotonic(), signal.signal(signal.SIGALRM, late)
    outer = signal.getitimer(signal.ITIMER_REAL)[0]
    signal.setitimer(signal.ITIMER_REAL, min(seconds, outer or seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:  # what is left of it; if nothing is, it goes off at once
            signal.setitimer(signal.ITIMER_REAL, max(outer - time.monotonic() + start, 1e-6))


def judge(candidate, gold, verifier="own", tolerance=None):
    """Whether a final answer equals the reference, whose numbers may be off by tolerance:
    "correct", "wrong", "error" if a text is not understood, "unparsed" if candidate is None."""
    if candidate is None:
        return "unparsed"
    tolerance = Decimal(float(tolerance or 0))
    try:
        with time_limit(MAX_SECONDS):
            if verifier == "math-verify":
                from math_verify import parse as read, verify as peer
                a, b = (read(f"${text}$", parsing_timeout=None) for text in (candidate, gold))
                return "correct" if peer(b, a, timeout_seconds=None) else "wrong"
            return "correct" if same(clean(candidate), clean(gold), tolerance) else "wrong"
    except ImportError:
        raise InputError("--verifier math-verify: not installed; pip install math-verify") from None
    except Exception:  # whatever a model wrote must not end the run: it is wrong, and counted apart
        return "error"


def verify(candidate, gold):
    """Whether a final answer equals the reference: verify("\\\\frac{1}{2}", "0.5") is True."""
    return judge(candidate, gold) == "correct"


# ---- Figures: of sampled answers, and likelihoods of reference solutions and of choices

def pass_at_k(n, c, k):
    """Chance that k <= n of n samples, c of them right, hold a right one (arXiv 2107.03374)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def bootstrap(values):
    """95 % percentile interval [low, high] of the mean of values (P,), by 2000 resamples."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    return np.percentile(drawn.mean(1), [2.5, 97.5]).tolist()


def means(rows):
    """The mean over rows {name: figure}, one a problem, of each figure, and its "interval"."""
    columns = {name: [row[name] for row in rows]
               for name in (rows[0] if rows else ()) if isinstance(rows[0][name], float)}
    return {name: float(np.mean(column)) for name, column in columns.items()} | {
        "n_problems": len(rows),
        "interval": {name: bootstrap(column) for name, column in columns.items()}}


def summarize(samples):
    """The figures of one setting, from its samples in order: pass@k, three shares, "cot_len" in
    tokens; and the mean "entropy" in nats of the "n_rows" that still think at a position."""
    rows = []
    for _, group in itertools.groupby(samples, lambda s: s["problem"]):
        group = [*group]
        n, verdicts = len(group), [s["verdict"] for s in group]
        rows.append({f"pass@{k}": pass_at_k(n, verdicts.count("correct"), k)
                     for k in (2 ** i for i in range(n.bit_length()))} | {
            "truncated": np.mean([s["truncated"] for s in group]),
            "unparsed": verdicts.count("unparsed") / n, "errors": verdicts.count("error") / n,
            "cot_len": np.mean([s["cot_len"] for s in group])})
    positions = [[h for h in position if h is not None]
                 for position in itertools.zip_longest(*(s["entropy"] for s in samples))]
    return means(rows) | {"n_samples": n, "entropy": {
        "mean": [*map(np.mean, positions)], "n_rows": [*map(len, positions)]}}


def evaluate(model, tokenizer, problems, setting, n_samples=1, *, notes=None, batch=64, seed=0,
             verifier="own", done=(), record=lambda sample: None, progress=False):
    """Sample answers in one of SETTINGS, greedy ones once per problem, and judge them. done: what
    an interrupted run has. record: called with each new sample. Returns all, in order."""
    mode, how = setting.split("_")
    n = 1 if how == "greedy" else n_samples
    samples = {(s["problem"], s["sample"]): s for s in done}
    rows = [row for row in range(len(problems) * n) if divmod(row, n) not in samples]
    bar = tqdm(total=len(rows), desc=setting, disable=None if progress else True, leave=False)

    def on_finish(row):
        i, sample = divmod(row.number, n)
        p = problems[i]
        verdict = judge(row.answer, p["answer"], verifier, p.get("error"))
        samples[i, sample] = {
            "problem": i, "sample": sample, "question": p["question"], "gold": p["answer"],
            "cot": row.cot, "answer": row.answer, "verdict": verdict,
            "truncated": row.truncated, "cot_len": row.cot_len, "length": row.length,
            "entropy": [round(h, 4) for h in row.entropy]}
        record(samples[i, sample])
        bar.update()
    if rows:
        generate(model, tokenizer, [p["question"] for p in problems], mode, n, notes=notes,
                 greedy=how == "greedy", seed=(EVAL, seed), rows=rows, batch=batch,
                 on_finish=on_finish)
    bar.close()
    return [samples[key] for key in sorted(samples)]


@torch.no_grad()
def text_log_probs(model, tokenizer, notes, question, texts):
    """The log-prob in nats per token of each of B texts after a question's prompt."""
    device = model.embed_tokens.weight.device
    texts = [torch.tensor(encode_after(tokenizer, text), device=device) for text in texts]
    prompt = encode_prompts(tokenizer, notes, [question], max(map(len, texts)), model.config)
    last, cache = model.prefill(prompt)  # (1, D)
    of_text = torch.zeros(len(texts), dtype=torch.int64, device=device)
    inner = model(pad_sequence(texts, batch_first=True), cache.before(of_text))  # (B, T, D)
    hidden = torch.cat((last[of_text, None], inner), 1)  # before each token
    return [-F.cross_entropy(model.logits(h[:len(t)]), t).item() for h, t in zip(hidden, texts)]


def likelihoods(model, tokenizer, problems, *, notes=None, done=(), record=lambda sample: None,
                progress=False):
    """Likelihoods, a dict for each problem with a solution or choices: "nll" in nats per token of
    the solution after its prompt; or of the right choice after the stem, with "letter_nll" of
    its letter after the list, and whether each is the likeliest."""
    results, notes = {s["problem"]: s for s in done}, notes or model.notes
    plain, log_probs = notes | {"prompt": "{question}"}, partial(text_log_probs, model, tokenizer)
    for i, p in enumerate(tqdm(problems, disable=None if progress else True, leave=False)):
        if i in results or "stem" not in p and not p["solution"]:
            continue
        if "stem" not in p:
            figures = {"nll": -log_probs(notes, p["question"], [worked_text(p)])[0]}
        else:
            listed, gold = f"{p['question']}\nAnswer:", LETTERS.index(p["answer"])
            text = log_probs(plain, p["stem"], [f" {c}" for c in p["choices"]])
            letter = log_probs(plain, listed, [f" {c}" for c in LETTERS[:len(text)]])
            figures = {
                "text_accuracy": float(np.argmax(text) == gold), "nll": -text[gold],
                "letter_accuracy": float(np.argmax(letter) == gold), "letter_nll": -letter[gold]}
        results[i] = {"problem": i, **figures}
        record(results[i])
    return [results[i] for i in sorted(results)]


# ---- The command line, and the record from which every figure can be computed again

class Record:
    """OUT.jsonl, locked: one line of settings, then one line per sample. samples: those of an
    interrupted run, {(task, setting): [sample]}."""

    def __init__(self, path, run):
        self.path, self.samples = path, defaultdict(list)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: in use by another evaluation; give another --out") from None
        self.file.seek(0)
        *lines, half = self.file.read().split(b"\n")  # a kill leaves half a line
        self.file.truncate(self.file.tell() - len(half))
        if not lines:
            return self.write(run=run)
        try:
            first, *samples = map(json.loads, lines)
            for s in samples:
                self.samples[s["task"], s["setting"]].append(s)
                s["problem"] + (s["nll"] if "nll" in s else sum(  # fails if one is missing
                    [s["sample"], s["truncated"], s["cot_len"], *s["entropy"]], len(s["verdict"])))
            old = first["run"]
            changed = [f"{key} was {old.get(key)!r:.40}, is {run.get(key)!r:.40}"
                       for key in {**old, **run} if run.get(key) != old.get(key)]
        except Exception:  # whatever the file holds
            raise InputError(f"{path}: not the record of a run; give another --out") from None
        if changed:
            raise InputError(f"{path}: of another run: {'; '.join(changed)}; give another --out")

    def write(self, **line):
        """Write a line; InputError where there is no room for it."""
        try:
            self.file.write(json.dumps(line).encode() + b"\n")
        except OSError as e:
            raise InputError(f"{self.path}: {e}; make room, and start the same again") from None


def main(args):
    settings = SETTINGS if args.settings == "all" else dict.fromkeys(args.settings.split(","))
    if not {*settings} <= {*SETTINGS}:
        raise InputError(f"--settings {args.settings}: give all, or some of {', '.join(SETTINGS)}")
    if args.out and not args.out.endswith(".json"):
        raise InputError(f"--out {args.out}: must end in .json")
    judge("1", "1", args.verifier)  # is it installed?
    tasks = {task: load_problems(task, "test", args.limit or 512)[:args.limit]
             for task in args.data.split(",")}
    print(f"loading {args.model}, to compute in {dtype_of(args)}", flush=True)
    model, tokenizer = load(args.model, dtype_of(args), args.device, args.prompt_file)
    notes, run, record, results = model.notes, {}, None, {}
    if model.config.max_position_embeddings >= 1024:  # whatever budgets it was trained with
        notes = notes | {"cot_len": 512, "answer_len": 32}
    for mode in MODES:
        notes = notes_with(notes, args, mode)
    print(f"budgets: {notes['cot_len']} tokens of thought, {notes['answer_len']} of answer")
    for problems in tasks.values():  # what does not fit is noticed before the long work
        check_vocabulary(tokenizer, problems)
        n_new = 0 if "stem" in problems[0] else notes["cot_len"] + notes["answer_len"]
        encode_prompts(tokenizer, notes, [p["question"] for p in problems], n_new, model.config)
    if args.out:
        print("computing digests", flush=True)
        run = {**notes, "dtype": str(dtype_of(args)), "seed": args.seed, "samples": args.samples,
               "verifier": f"{args.verifier} {VERIFIER_VERSION}"}
        for file in Path(args.model).glob("*.safetensors"):
            run[file.name] = hashlib.sha256(np.memmap(file, mode="r")).hexdigest()
        for task, problems in tasks.items():
            run[task] = zlib.crc32(json.dumps(problems).encode())
        record = Record(Path(args.out).with_suffix(".jsonl"), run)

    for task, problems in tasks.items():
        results[task] = {}
        for kind in ["choices"] if "stem" in problems[0] else ["solutions", *settings]:
            print(f"{task}, {len(problems)} problems: {kind}", flush=True)
            options = {"notes": notes, "progress": True}
            if record:
                options |= {"done": record.samples[task, kind],
                            "record": lambda s: record.write(task=task, setting=kind, **s)}
            if kind in SETTINGS:
                figures = summarize(evaluate(
                    model, tokenizer, problems, kind, args.samples, batch=args.batch,
                    seed=args.seed, verifier=args.verifier, **options))
            else:
                figures = means(likelihoods(model, tokenizer, problems, **options))
            results[task][kind] = figures
            for name, (low, high) in figures["interval"].items():
                print(f"  {name:16}{figures[name]:9.4f}   95 %: {low:.4f} to {high:.4f}")
    if record:
        write_json(args.out, {"args": vars(args), "run": run, "results": results})
        print(f"written to {args.out} and {record.path}")


if __name__ == "__main__":
    parser = Parser(__doc__, needs_model=True)
    add = parser.add_argument_group("evaluation").add_argument
    add("--data", default="arithmetic", help=f"{', '.join(TASKS)}, or files; joined by commas")
    add("--settings", default="hard_greedy,soft_greedy",
        help=f"all, or some of {', '.join(SETTINGS)}; default hard_greedy,soft_greedy")
    add("--samples", type=positive(int), default=32, help="per problem; default 32")
    add("--limit", type=positive(int), help="only the first so many problems")
    add("--batch", type=positive(int), default=256, help="rows alive at a time, for speed; in "
        "bfloat16 it changes the samples, in float32 only by rounding; default 256")
    add("--verifier", choices=VERIFIERS, default="own", help="who compares answers; default own")
    add("--out", metavar="FILE.json", help="results; an interrupted run goes on from FILE.jsonl")
    parser.run(main)

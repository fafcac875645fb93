"""
Tasks, the verifier, and what is measured: pass@k of a checkpoint in the six settings, and its
likelihoods on solutions and on multiple choice.

    python eval.py --model out/soft/best    # the tiny model on arithmetic
    python eval.py --model path/to/Llama-3.2-3B-Instruct --data gsm8k --settings all --samples 32
    python eval.py --model path/to/model --data my_problems.jsonl --settings hard_greedy --limit 100
    python eval.py --model path/to/model --data hellaswag,arc,mmlu --base path/to/base --out r.json
    python eval.py results/*.json --plot curves.png    # several runs and seeds together

A problem is {"question", "answer", "solution"}. Files are JSON lines; the public ones are
downloaded to data/ when they are missing.
"""
import contextlib
import csv
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import threading
import time
import urllib.request
import zlib
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import InputError, WeightedLogProb, read_json
from sample import SETTINGS, STOP, Parser, Watch, generate, load, noise_std_of, positive

# --------------------------------------------------------------------------------------------------
# Tasks

GITHUB = "https://raw.githubusercontent.com"
GSM8K = f"{GITHUB}/openai/grade-school-math/master/grade_school_math/data"
PRM800K = "https://media.githubusercontent.com/media/openai/prm800k/main/prm800k/math_splits"
QWEN_MATH = f"{GITHUB}/QwenLM/Qwen2.5-Math/main/evaluation/data"
FILES = {  # (task, split): file in data/, public address, SHA-256 where it is known
    ("gsm8k", "train"): (
        "gsm8k_train.jsonl", f"{GSM8K}/train.jsonl",
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    ("gsm8k", "test"): (
        "gsm8k_test.jsonl", f"{GSM8K}/test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    ("math", "train"): (  # MATH without MATH-500; the original archive is no longer served
        "math_train.jsonl", f"{PRM800K}/train.jsonl", None),
    ("math500", "test"): (
        "math500.jsonl", f"{PRM800K}/test.jsonl",
        "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"),
    ("olympiadbench", "test"): (
        "olympiadbench.jsonl", f"{QWEN_MATH}/olympiadbench/test.jsonl", None),
    ("deepscaler", "train"): (  # a JSON list, which is read as lines
        "deepscaler.json", "https://huggingface.co/datasets/agentica-org/"
        "DeepScaleR-Preview-Dataset/resolve/main/deepscaler.json", None),
    ("mawps", "test"): (
        "mawps.jsonl", f"{QWEN_MATH}/mawps/test.jsonl",
        "00ffe31161be8623a3d36741830edbba87a3aee0109f693810fe40b9d5d91b8b"),
}
CHOICE_FILES = {  # multiple choice: file or folder in data/, public address of it or of its archive
    "hellaswag": (
        "hellaswag_val.jsonl", f"{GITHUB}/rowanz/hellaswag/master/data/hellaswag_val.jsonl"),
    "arc": (
        "arc_challenge_test.jsonl", f"{GITHUB}/raybears/cot-transparency/main/data/arc_challenge/"
        "ARC-Challenge-Test.jsonl"),
    "mmlu": ("mmlu/data/test", "https://people.eecs.berkeley.edu/~hendrycks/data.tar"),
}
ARITHMETIC = {  # task: modulus; least and most numbers in a chain
    "arithmetic": (10, 3, 4),
    "arithmetic100": (100, 2, 3)}
TASKS = [*ARITHMETIC, *dict.fromkeys(task for task, _ in FILES)]


def download(url, path, sha256):
    """Fetch url into path, complete or not at all, with a progress bar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")  # several ranks may want it
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as f:
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := response.read(1 << 16):
                    f.write(block)
                    bar.update(len(block))
        if size and part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size} of {size} bytes arrived")
        if sha256 and hashlib.sha256(part.read_bytes()).hexdigest() != sha256:
            raise OSError("the file's SHA-256 is not the expected one")
    except OSError as e:
        part.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot download {url} ({e}); fetch that address yourself and "
                         "put it there") from None
    part.replace(path)


def parse_row(line, where):
    """A JSON object of one line; `where` names it in errors."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object; give one object a line")
    return row


def read_lines(path):
    """The lines of a file of JSON lines, or of a .json file that holds one list."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return [json.dumps(row) for row in json.loads(text)]
        return text.split("\n")
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: not readable ({e}); give a file of JSON lines") from None


def load_problems(data, split, n_arithmetic=512):
    """The problems of a task, or of a PATH.jsonl of {question|problem|input, answer|target}.

    split: "train", "val" or "test". A task of one file has that file for every split; arithmetic's
    splits are disjoint by construction. Returns a list of {"question", "answer", "solution"}
    strings. Raises InputError, naming the line.
    """
    if data in ARITHMETIC:
        rng, problems = random.Random(split), {}
        while len(problems) < n_arithmetic:
            problem = arithmetic_problem(rng, data)
            if arithmetic_split(problem["question"]) == split:
                problems[problem["question"]] = problem
        return list(problems.values())
    if data in TASKS:
        only = next(entry for (task, _), entry in FILES.items() if task == data)
        file, url, sha256 = FILES.get((data, split), only)
        path = Path("data") / file
        if not path.exists():
            download(url, path, sha256)
    else:
        path = Path(data)
        if path.suffix != ".jsonl":
            raise InputError(f"--data {data}: neither a task ({', '.join(TASKS)}) nor a file that "
                             "ends in .jsonl; give one of these")
    lines = read_lines(path)
    problems = [read_problem(line, f"{path}:{i}")
                for i, line in enumerate(lines, 1) if line.strip()]
    empty = sum(not p["answer"] for p in problems)
    if empty:
        print(f"{path}: {empty} problems with an empty answer are left out")
    problems = [p for p in problems if p["answer"]]
    if not problems:
        raise InputError(f"--data {path}: no problems in it; give a file of JSON lines")
    return problems


def read_problem(line, where):
    """One JSON line as {"question", "answer", "solution"}; `where` names it in errors.

    OlympiadBench's final_answer, a list, becomes one answer joined by commas.
    """
    row = parse_row(line, where)
    question = next((row[k] for k in ("question", "problem", "input") if k in row), None)
    answer = next((row[k] for k in ("final_answer", "answer", "target") if k in row), None)
    if isinstance(answer, list):
        answer = ", ".join(map(str, answer))
    if question is None or answer is None:
        raise InputError(f"{where}: a problem needs question (or problem, input) and answer (or "
                         "target); add them")
    solution, answer = row.get("solution", ""), str(answer).strip()
    if "####" in answer:  # GSM8K: reasoning with <<calculator>> notes, then #### and the number
        solution, answer = answer.split("####")
        solution = re.sub(r"<<.*?>>", "", solution)
    if isinstance(solution, list):
        solution = "\n".join(map(str, solution))
    fields = {"question": question, "answer": answer, "solution": solution}
    return {k: str(v).strip() for k, v in fields.items()}


# Chains of numbers with + - *, worked from left to right. arithmetic is modulo 10: "3+4*2" is
# (3+4)*2 = 14, so 4. arithmetic100 is modulo 100, its values have two digits: "38+4*7" is 42*7 =
# 294, so 94.

def arithmetic_split(question):
    """The split that a question belongs to, by its checksum."""
    return {0: "val", 1: "test"}.get(zlib.crc32(question.encode()) % 10, "train")


def arithmetic_problem(rng, task="arithmetic", careless=0.0):
    """A random problem with a solution that shows every step; at each, the writer takes the sign
    for a plus with probability `careless`."""
    modulus, least, most = ARITHMETIC[task]
    n_digits, value = len(str(modulus - 1)), rng.randrange(modulus)
    question, steps = f"{value:0{n_digits}}", []
    for _ in range(rng.randint(least, most) - 1):
        sign, digit = rng.choice("+-*"), rng.randrange(10)
        read = "+" if rng.random() < careless else sign
        result = {"+": value + digit, "-": value - digit, "*": value * digit}[read] % modulus
        steps.append(f"{value:0{n_digits}}{sign}{digit}={result:0{n_digits}}")
        question, value = f"{question}{sign}{digit}", result
    return {"question": question, "answer": f"{value:0{n_digits}}", "solution": ";".join(steps)}


def ask(notes, problems):
    """The prompts of problems."""
    return [notes["prompt"].replace("{question}", p["question"]) for p in problems]


def worked_text(problem):
    """A reference solution in the form that the prompt asks for, which mode sft imitates."""
    return f" {problem['solution']} {STOP} \\boxed{{{problem['answer']}}}."


# --------------------------------------------------------------------------------------------------
# The verifier: are two final answers the same number, expression, tuple, set, interval or word?
#
# LaTeX is parsed and computed by the recursive-descent parser below, exactly (Fraction) where that
# is possible, else in floating point; expressions with letters are compared at random points.

VERIFIERS = ("own", "math-verify")


class Unreadable(ValueError):
    """The text is no mathematical expression that the parser knows."""


FUNCTIONS = {
    "sin": math.sin, "cos": math.cos, "tan": math.tan, "cot": lambda x: 1 / math.tan(x),
    "sec": lambda x: 1 / math.cos(x), "csc": lambda x: 1 / math.sin(x), "arcsin": math.asin,
    "arccos": math.acos, "arctan": math.atan, "ln": math.log, "log": math.log10, "exp": math.exp}
TOKEN_PATTERN = re.compile(  # number, command, letter with an index, sign or bracket
    r"\d+(?:\.\d*)?|\.\d+|\\[A-Za-z]+|[A-Za-z](?:_(?:\w|\{\w+\}))?|[-+*/^!(){}\[\]|]")
GREEK = {"alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "phi", "omega", "sigma"}
# What a hostile answer may cost
MAX_CHARS, MAX_DEPTH, MAX_BITS, MAX_SECONDS = 400, 40, 4096, 10


def exact(x):
    return isinstance(x, Fraction)


def whole(x):
    return exact(x) and x.denominator == 1


def power(a, b):
    """a ** b, exact for rational a and integer b, within MAX_BITS."""
    if exact(a) and whole(b):
        bits = max(a.numerator.bit_length(), a.denominator.bit_length())
        if bits * abs(b.numerator) > MAX_BITS:
            raise Unreadable("power too large")
        return a ** b.numerator
    return complex(a) ** complex(b)


def root(a, n):
    """The n-th root; of a negative number the real one, if n is odd."""
    if exact(a) and whole(n) and n % 2 and a < 0:
        return -root(-a, n)
    if exact(a) and a >= 0 and n == 2:
        r = Fraction(math.isqrt(a.numerator), math.isqrt(a.denominator))
        if r * r == a:
            return r
    return complex(a) ** (1 / complex(n))


class Expression:
    """Computes one LaTeX expression; letters get random values that depend on `salt`."""

    def __init__(self, text, salt=0):
        self.tokens, self.at, self.depth, self.salt = TOKEN_PATTERN.findall(text), 0, 0, salt
        if "".join(self.tokens) != text.replace(" ", ""):
            raise Unreadable(text)

    def value(self):
        result = self.sum()
        if self.peek():
            raise Unreadable(self.peek())
        return result

    def peek(self):
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *expected):
        token = self.peek()
        if not token or (expected and token not in expected):
            raise Unreadable(token)
        self.at += 1
        return token

    def sum(self):
        total = self.product()
        while self.peek() in ("+", "-"):
            total = total + self.product() if self.take() == "+" else total - self.product()
        return total

    def product(self):
        result = self.signed()
        while (token := self.peek()) and token not in ("+", "-", ")", "}", "]", "|"):
            if token in ("*", "\\cdot", "\\times"):
                self.take()
                result = result * self.signed()
            elif token in ("/", "\\div"):
                self.take()
                result = result / self.signed()
            else:
                result = result * self.powered()
        return result

    def signed(self):
        if self.peek() in ("+", "-"):
            return -self.signed() if self.take() == "-" else self.signed()
        return self.powered()

    def powered(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        base = self.atom()
        while self.peek() in ("^", "!"):
            if self.take() == "!":
                if not whole(base) or not 0 <= base <= 200:
                    raise Unreadable("factorial")
                base = Fraction(math.factorial(int(base)))
            else:
                base = power(base, self.signed())
        self.depth -= 1
        return base

    def group(self, close):
        result = self.sum()
        self.take(close)
        return result

    def atom(self):
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            number = Fraction(token if token[-1] != "." else token[:-1])
            mixed = number.denominator == 1 and re.fullmatch(  # 2\frac{1}{3}
                r"\\frac\{\d+\}\{\d+\}", "".join(self.tokens[self.at:self.at + 7]))
            return number + self.atom() if mixed else number
        if token in ("(", "{", "["):
            return self.group({"(": ")", "{": "}", "[": "]"}[token])
        if token == "|":
            return abs(self.group("|"))
        if token in ("\\frac", "\\binom"):
            self.take("{")
            top = self.group("}")
            self.take("{")
            bottom = self.group("}")
            if token == "\\frac":
                return top / bottom
            if whole(top) and whole(bottom) and 0 <= bottom and 0 <= top <= 200:
                return Fraction(math.comb(int(top), int(bottom)))
            raise Unreadable("binom")
        if token == "\\sqrt":
            n = Fraction(2)
            if self.peek() == "[":
                self.take()
                n = self.group("]")
            self.take("{")
            return root(self.group("}"), n)
        if token == "\\pi":
            return math.pi
        if token == "\\infty":
            return math.inf
        if token[1:] in FUNCTIONS:
            exponent = None
            if self.peek() == "^":
                self.take()
                exponent = self.atom()
            x = self.powered()
            if isinstance(x, complex) and x.imag:
                raise Unreadable(token)
            result = FUNCTIONS[token[1:]](x.real if isinstance(x, complex) else float(x))
            return result if exponent is None else power(result, exponent)
        if token[0].isalpha() or token[0] == "\\" and token[1:] in GREEK:
            # a rational in [1, 3) that stands for the letter
            value = 1 + Fraction(zlib.crc32(f"{token}{self.salt}".encode()) % 2003, 1009)
            return {"i": 1j, "e": math.e}.get(token, value)
        raise Unreadable(token)


SPELLINGS = [  # LaTeX that changes the look and not the value, in the order of rewriting
    (r"\{,\}|,\\!\s*", ","), (r"(?<!\\)\\[!,;: ]|\\quad|\\displaystyle|\\?\$|~", " "),
    (r"\\left|\\right|\\[bB]igg?[lr]?(?![a-z])", " "), (r"\\[dtc]frac", r"\\frac"),
    (r"\\mathrm|\\mathbf|\\textbf|\\textit|\\mbox|\\operatorname", r"\\text"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", ""), (r"−|–", "-"), (r"×", r"\\times"),
    (r"π", r"\\pi"), (r"∞", r"\\infty"), (r"√", r"\\sqrt"), (r"∪", r"\\cup"), (r"\*\*", "^"),
    (r"\\(?:leq|leqslant|le)(?![a-z])|≤", "<="), (r"\\(?:geq|geqslant|ge)(?![a-z])|≥", ">="),
    (r"\\lt(?![a-z])", "<"), (r"\\gt(?![a-z])", ">"), (r"\\in(?![a-z])|∈", "="),
    (r"\\\{|\\lbrace", "@{"), (r"\\\}|\\rbrace", "@}"), (r"_\{(\w)\}", r"_\1"), (r"\\%", "%"),
    (r",?\s*\\text\s*\{\s*,?\s*(?:and|or)\s*\}", ","),
    (r"\\frac\s*([\da-z])\s*([\da-z])", r"\\frac{\1}{\2}"),
    (r"\\frac\s*([\da-z])\s*\{", r"\\frac{\1}{"), (r"\\sqrt\s*([\da-z])", r"\\sqrt{\1}"),
    (r"(\\frac\{[^{}]*\})\s*([\da-z])", r"\1{\2}"), (r"(\d)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    (r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", "")),
]
PM = "\\pm"
SPELLINGS = [(re.compile(pattern), new) for pattern, new in SPELLINGS]


def simplify(text):
    """One spelling for the many ways in which LaTeX writes the same thing."""
    text = " ".join(text.split()).strip(" .;$")
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    words = re.fullmatch(r"\s*\\text\s*\{([^{}]*)\}\s*", text)
    text = words[1] if words else text
    text = re.sub(r"\\text\s*\{[^{}]*\}(?:\^\{?\d\}?)?", " ", text)  # units, words around a number
    text = re.sub(r"(?<=[\d})])\s+[A-Za-z]{2}[A-Za-z\d ./^-]*$", "", text)
    choice = re.fullmatch(r"\s*\(([A-Z])\)\s*", text)
    return re.sub(r"\s+", " ", choice[1] if choice else text).strip(" .")


def split_top(text, separator):
    """Split at separators outside all brackets: split_top("(1,2),3", ",") == ["(1,2)", "3"]."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0 and text.startswith(separator, i):
            parts.append(text[start:i])
            start = i + len(separator)
    return [p.strip() for p in parts + [text[start:]]]


def unordered(a, b, same):
    """Whether the items of a can be paired with those of b (as sets: repeated items count once)."""
    return all(any(same(x, y) for y in b) for x in a) and all(any(same(x, y) for x in a) for y in b)


def same_value(a, b, decimals):
    """Whether two numbers agree: exactly if both are rational, else to floating-point precision."""
    if exact(a) and exact(b) and a == b:
        return True
    if decimals and abs(a - b) < min(5e-7, 2e-6 * abs(b)):  # written out to six places or more
        return True
    if exact(a) and exact(b):
        return False
    a, b = complex(a), complex(b)
    return a == b or abs(a - b) <= 1e-9 * max(abs(a), abs(b))


def same_expression(a, b):
    """Whether two expressions agree at three random points, where both are defined."""
    decimals, agreed = re.search(r"\.\d{6}", a + b), 0
    for salt in range(3):
        try:
            if not same_value(Expression(a, salt).value(), Expression(b, salt).value(), decimals):
                return False
            agreed += 1
        except ZeroDivisionError:
            continue
    return agreed > 0


def same(a, b):
    """Whether two simplified answers are equal; may raise where neither text nor value decides."""
    if a.replace(" ", "").lower() == b.replace(" ", "").lower():
        return a != ""
    if "%" in (a[-1:], b[-1:]):  # 50% is 50 and 0.5, and is not 0.5%
        if same(a.rstrip("% "), b.rstrip("% ")):
            return True
        parts = [f"({t.rstrip('% ')})/100" if t[-1:] == "%" else t for t in (a, b)]
        return a[-1:] != b[-1:] and same(*parts)
    if PM in a or PM in b:
        a, b = (f"{t.replace(PM, '+')},{t.replace(PM, '-')}" if PM in t else t for t in (a, b))
    parts_a, parts_b = split_top(a, "\\cup"), split_top(b, "\\cup")
    if len(parts_a) > 1 or len(parts_b) > 1:
        return unordered(parts_a, parts_b, same)
    inside = [re.fullmatch(r"\\begin\{\w*matrix\}(.*)\\end\{\w*matrix\}", t) for t in (a, b)]
    if all(inside):
        cells_a, cells_b = ([row.split("&") for row in m[1].split("\\\\")] for m in inside)
        return [*map(len, cells_a)] == [*map(len, cells_b)] and all(
            same(x.strip(), y.strip()) for x, y in zip(sum(cells_a, []), sum(cells_b, [])))

    named = [re.match(r"[A-Za-z](?:_\w|\([a-z]\))? ?= ?(?!.*=)", t) for t in (a, b)]
    if named[0] and "=" not in b:  # x = 5 against 5
        return same(a[named[0].end():], b)
    if named[1] and "=" not in a:
        return same(a, b[named[1].end():])
    (open_a, items_a), (open_b, items_b) = listed(a), listed(b)
    if len(items_a) > 1 or len(items_b) > 1 or "@" in open_a + open_b:
        set_a, set_b = open_a in ("", "@{@}"), open_b in ("", "@{@}")
        if set_a and set_b:
            return unordered(items_a, items_b, same)
        alike = open_a == open_b and len(items_a) == len(items_b)
        return alike and all(map(same, items_a, items_b))

    for relation in ("<=", ">=", "<", ">", "="):
        sides_a, sides_b = split_top(a, relation), split_top(b, relation)
        if len(sides_a) == len(sides_b) > 1:
            if relation == "=" and len(sides_a) == 2:
                if sides_a[0] == sides_b[0] and same(sides_a[1], sides_b[1]):
                    return True
                # the same line or curve, if left minus right agree up to a factor
                one, two = (f"({left})-({right})" for left, right in (sides_a, sides_b))
                ratios = [Expression(one, k).value() / Expression(two, k).value() for k in range(3)]
                return all(same_value(r, ratios[0], False) for r in ratios[1:])
            return all(map(same, sides_a, sides_b))
        mirrored = split_top(b, relation.translate(str.maketrans("<>", "><")))[::-1]
        if len(sides_a) == len(mirrored) > 1:
            return all(map(same, sides_a, mirrored))
    if re.fullmatch(r"[A-Za-z][A-Za-z ]{2,}", a) or re.fullmatch(r"[A-Za-z][A-Za-z ]{2,}", b):
        return False  # words are compared as words, above
    return same_expression(a, b)


def listed(text):
    """The brackets around a list and its items: listed("(1,2)") == ("()", ["1", "2"])."""
    for opening, closing in (("@{", "@}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening):-len(closing)]
            flat = inner.replace("@", "")
            depths = [0]
            for char in flat:
                depths.append(depths[-1] + (char in "([{") - (char in ")]}"))
            if min(depths) == 0 and (opening == "@{" or len(split_top(flat, ",")) > 1):
                return opening + closing, split_top(inner, ",")
    return "", split_top(text, ",")


@contextlib.contextmanager
def time_limit(seconds):
    """Raises TimeoutError in a block that takes longer; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_):
        raise TimeoutError
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(candidate, gold, verifier="own"):
    """"correct", "wrong", or "error" if the texts differ and are not read as mathematics within
    MAX_SECONDS."""
    try:
        with time_limit(MAX_SECONDS):
            if verifier == "math-verify":
                from math_verify import parse, verify as peer
                return "correct" if peer(parse(f"${gold}$"), parse(f"${candidate}$")) else "wrong"
            if len(candidate) > MAX_CHARS or len(gold) > MAX_CHARS:
                return "correct" if candidate.strip() == gold.strip() else "wrong"
            return "correct" if same(simplify(candidate), simplify(gold)) else "wrong"
    except ImportError:
        raise InputError("--verifier math-verify: not installed; pip install math-verify") from None
    except Exception:  # whatever a model wrote must not end the run: it is wrong, and counted apart
        return "error"


def verify(candidate: str, gold: str) -> bool:
    """Whether a final answer equals the reference: verify("\\\\frac{1}{2}", "0.5") is True."""
    return judge(candidate, gold) == "correct"


# --------------------------------------------------------------------------------------------------
# Measures of generated answers

def pass_at_k(n, c, k):
    """Probability that one or more of k draws without replacement, from n samples of which c are
    correct, is correct: the unbiased estimator of Chen et al. (arXiv 2107.03374); 1 <= k <= n."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def powers_of_two(n):
    """1, 2, 4, ... up to n."""
    return [2 ** i for i in range(n.bit_length())]


def bootstrap(values, n_resamples=2000, seed=0):
    """95 % percentile interval [low, high] of the mean of values (P,), resampled over problems."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(len(values), size=(n_resamples, len(values)))
    return np.percentile(values[picks].mean(1), [2.5, 97.5]).tolist()


def per_problem(samples, k):
    """pass@k of every problem, {problem: value}, of the samples of one setting."""
    verdicts = defaultdict(list)
    for s in samples:
        verdicts[s["problem"]].append(s["verdict"] == "correct")
    return {p: pass_at_k(len(v), sum(v), k) for p, v in verdicts.items()}


def entropy_profile(samples):
    """Entropy by position of the thought, in nats: the mean over the rows that still think there,
    with their number; and the mean over a fixed cohort, the rows that think for the median length
    or longer, up to that length."""
    rows = [s["entropy"] for s in samples if s["entropy"]]
    if not rows:
        return {}
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        table[i, :len(row)] = row
    lengths = (~np.isnan(table)).sum(1)
    median = int(np.median(lengths))
    return {"mean": np.nanmean(table, 0).tolist(), "n_rows": (~np.isnan(table)).sum(0).tolist(),
            "cohort_mean": table[lengths >= median, :median].mean(0).tolist(),
            "n_cohort": int((lengths >= median).sum())}


def summarize(samples):
    """The figures of one setting, from its samples alone; shares are of all samples."""
    def share(test):
        return sum(map(test, samples)) / len(samples)
    n = 1 + max(s["sample"] for s in samples)
    values = {f"pass@{k}": [*per_problem(samples, k).values()] for k in powers_of_two(n)}
    return {
        **{name: float(np.mean(v)) for name, v in values.items()},
        "interval": {name: bootstrap(v) for name, v in values.items()},
        "truncated": share(lambda s: s["truncated"]),
        "unparsed": share(lambda s: s["verdict"] == "unparsed"),
        "errors": share(lambda s: s["verdict"] == "error"),
        "cot_len": share(lambda s: s["cot_len"]), "entropy": entropy_profile(samples),
        "n_problems": len({s["problem"] for s in samples}), "n_samples": n}


def evaluate(model, tokenizer, notes, problems, setting, n_samples=1, *, cot_len, answer_len,
             temperature=None, noise_std=None, batch=64, seed=0, watch=None, verifier="own",
             entropy_every=0, done=(), record=None, progress=False):
    """Measure one of the six SETTINGS; a greedy one takes one sample per problem in any case.

    notes   gives the prompt, the end tokens and the noise's place; the others are generate's
    batch   rows alive at a time: as one finishes, another problem's enters
    done    samples of an interrupted run of the same setting, which are not drawn again
    record  called with each new sample, a dict, as it finishes
    Returns summarize() of the samples and the samples, in the order of problems.
    """
    mode, how = setting.split("_")
    n = 1 if how == "greedy" else n_samples
    samples = {(s["problem"], s["sample"]): s for s in done}
    rows = [row for row in range(len(problems) * n) if divmod(row, n) not in samples]
    bar = tqdm(total=len(rows), desc=setting, disable=not progress, leave=False)

    def on_finish(finished):
        for f in finished:
            problem, sample = divmod(f["row"], n)
            p, answer = problems[problem], f["answer"]
            verdict = "unparsed" if answer is None else judge(answer, p["answer"], verifier)
            entropy = [round(h, 4) for h in f["entropy"] if not math.isnan(h)]
            samples[problem, sample] = {
                "setting": setting, "problem": problem, "sample": sample,
                "question": p["question"], "gold": p["answer"], "thought": f["thought"],
                "answer": answer, "verdict": verdict, "truncated": f["truncated"],
                "cot_len": f["cot_len"], "length": f["length"], "entropy": entropy}
            if record:
                record(samples[problem, sample])
            bar.update()
    if rows:
        generate(
            model, tokenizer, ask(notes, problems), n, mode, greedy=how == "greedy",
            temperature=temperature, noise_std=noise_std, cot_len=cot_len,
            answer_len=answer_len, eos=notes["eos"], seed=(seed,), rows=rows, batch=batch,
            noise_at=notes["noise_at"], noise_top_k=notes["noise_top_k"], watch=watch,
            entropy_every=entropy_every, on_finish=on_finish)
    bar.close()
    samples = [samples[key] for key in sorted(samples)]
    return summarize(samples), samples


# --------------------------------------------------------------------------------------------------
# Likelihoods: of reference solutions, and of the answers to multiple-choice questions

LETTERS = "ABCDEFGHIJ"
LIKELIHOODS = ("letter_accuracy", "text_accuracy", "nll", "letter_nll", "kl")


def read_choices(row, where):
    """One question of HellaSwag, ARC or MMLU as {"question", "choices", "gold": index}."""
    try:
        if "endings" in row:  # HellaSwag
            return {"question": row["ctx"], "choices": row["endings"], "gold": int(row["label"])}
        if "answerKey" in row:  # ARC
            choices = row["question"]["choices"]
            gold = [c["label"] for c in choices].index(row["answerKey"])
            return {"question": row["question"]["stem"], "choices": [c["text"] for c in choices],
                    "gold": gold}
        return {"question": row["question"], "choices": row["choices"], "gold": int(row["answer"])}
    except (KeyError, ValueError, TypeError) as e:
        raise InputError(f"{where}: not a HellaSwag, ARC or MMLU question ({e!r}); give a file in "
                         "one of these layouts") from None


def load_choices(data):
    """The questions of a multiple-choice task, or of a file or folder in one of their layouts.

    Returns None if `data` is neither, but a task with answers to generate.
    """
    path = Path(data)
    if data in CHOICE_FILES:
        file, url = CHOICE_FILES[data]
        path = Path("data") / file
        if not path.exists() and url.endswith(".tar"):
            archive = Path("data") / f"{data}.tar"
            download(url, archive, None)
            shutil.unpack_archive(archive, archive.with_suffix(""), filter="data")
        elif not path.exists():
            download(url, path, None)
    if path.is_dir():  # MMLU: a folder of CSV files without header: question, A, B, C, D, letter
        rows = [(f"{file}:{i}", line) for file in sorted(path.glob("*.csv"))
                for i, line in enumerate(csv.reader(file.open(newline="", encoding="utf-8")), 1)]
        if not rows or any(len(r) < 4 or r[-1] not in LETTERS for _, r in rows):
            raise InputError(f"--data {path}: no CSV files as MMLU has them; give its test folder")
        return [{"question": r[0], "choices": r[1:-1], "gold": LETTERS.index(r[-1])}
                for _, r in rows]
    if not path.exists() or path.suffix != ".jsonl":
        return None
    rows = [parse_row(line, f"{path}:{i}")
            for i, line in enumerate(read_lines(path), 1) if line.strip()]
    if not rows or not {"endings", "answerKey", "choices"} & rows[0].keys():
        return None
    return [read_choices(row, f"{path}:{i}") for i, row in enumerate(rows, 1)]


@torch.no_grad()
def token_log_probs(model, prompts, tails, device):
    """Log-prob of each token of tails[i][j], one of the continuations of prompts[i], lists of ids.

    Each prompt is run once and shared by its continuations. Returns, for the M tails in turn,
    hidden (M, T, D) before each token, used (M, T) bool and logp (M, T) float32, 0 where not used.
    """
    hidden, cache = model.read(prompts)
    of_prompt = torch.tensor([i for i, group in enumerate(tails) for _ in group], device=device)
    cache = cache.branch(of_prompt)
    flat = [torch.tensor(t, device=device) for group in tails for t in group]
    ids = pad_sequence(flat, batch_first=True)  # (M, T)
    used = torch.arange(ids.shape[1], device=device) < torch.tensor(
        [len(t) for t in flat], device=device)[:, None]
    inner = model(ids, cache)
    hidden = torch.cat((hidden[of_prompt][:, None], inner[:, :-1]), 1)  # before each token
    weight = model.lm_head.weight
    _, logp = WeightedLogProb.apply(hidden[used], weight, weight, ids[used],
                                    torch.ones(int(used.sum()), device=device), 1.0, 1.0, False)
    return hidden, used, torch.zeros(ids.shape, device=device).masked_scatter(used, logp)


@torch.no_grad()
def kl_divergence(base, hidden_base, model, hidden, used):
    """KL(base || model) of the next token in nats, the mean of each text (M,), from the hidden
    states (M, T, D) of both before the tokens that are used, (M, T) bool."""
    parts = []
    for h_base, h in zip(*(h[used].split(WeightedLogProb.CHUNK) for h in (hidden_base, hidden))):
        p, q = base.logits(h_base).log_softmax(-1), model.logits(h).log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1))
    kl = torch.zeros(used.shape, device=used.device).masked_scatter(used, torch.cat(parts))
    return (kl.sum(1) / used.sum(1)).tolist()


def score_solutions(model, tokenizer, notes, problems, base=None, batch=64, done=(), record=None):
    """Likelihood of the reference solutions behind their prompts, as sft imitates them, less EOS.

    Returns {"nll" (per token, in nats), with a base model "kl" (KL(base || model) per token),
    "n_problems", "interval"}, and the same by problem.
    """
    device, results = model.embed_tokens.weight.device, list(done)
    for i in range(len(results), len(problems), batch):
        part = problems[i:i + batch]
        prompts = [tokenizer.encode(prompt).ids for prompt in ask(notes, part)]
        texts = [[tokenizer.encode(worked_text(p), add_special_tokens=False).ids] for p in part]
        hidden, used, logp = token_log_probs(model, prompts, texts, device)
        figures = {"nll": (-logp.sum(1) / used.sum(1)).tolist()}
        if base is not None:
            hidden_base, *_ = token_log_probs(base, prompts, texts, device)
            figures["kl"] = kl_divergence(base, hidden_base, model, hidden, used)
        for j, values in enumerate(zip(*figures.values())):
            results.append({"problem": i + j, **dict(zip(figures, values))})
            if record:
                record(results[-1])
    return summarize_likelihoods(results), results


def score_choices(model, tokenizer, questions, base=None, batch=16, done=(), record=None,
                  progress=False):
    """Accuracy and likelihoods on multiple choice; `batch` questions at a time.

    Each question is asked twice: with its choices listed, for the letter; and alone, for the text
    of each choice. Returns {"letter_accuracy", "text_accuracy" (by mean log-prob per token), "nll"
    (per token of the correct text), "letter_nll" (of the correct letter), with a base model "kl"
    (KL(base || model) per token of the correct text), "interval"}, and the same by question.
    """
    device, results = model.embed_tokens.weight.device, list(done)
    letters = [tokenizer.encode(f" {c}", add_special_tokens=False).ids[-1:] for c in LETTERS]
    starts = range(len(results), len(questions), batch)
    for i in tqdm(starts, disable=not progress, leave=False):
        part = questions[i:i + batch]
        listed_prompts, prompts, texts = [], [], []
        for q in part:
            listing = "".join(f"\n{c}. {text}" for c, text in zip(LETTERS, q["choices"]))
            listed_prompts.append(tokenizer.encode(f"{q['question']}{listing}\nAnswer:").ids)
            prompts.append(tokenizer.encode(q["question"]).ids)
            texts.append([tokenizer.encode(f" {text}", add_special_tokens=False).ids or letters[0]
                          for text in q["choices"]])
        _, _, by_letter = token_log_probs(
            model, listed_prompts, [letters[:len(q["choices"])] for q in part], device)
        hidden, used, logp = token_log_probs(model, prompts, texts, device)
        golds = torch.tensor([sum(len(q["choices"]) for q in part[:j]) + q["gold"]
                              for j, q in enumerate(part)], device=device)
        if base is not None:
            hidden_base, *_ = token_log_probs(base, prompts, texts, device)
            kl = kl_divergence(base, hidden_base[golds], model, hidden[golds], used[golds])
        mean_logp, at = (logp.sum(1) / used.sum(1)).tolist(), 0
        for j, q in enumerate(part):
            n, gold = len(q["choices"]), q["gold"]
            letter, text = by_letter[at:at + n, 0].tolist(), mean_logp[at:at + n]
            at += n
            results.append({
                "problem": i + j, "question": q["question"], "choices": q["choices"], "gold": gold,
                "letter_logp": letter, "text_logp": text, "nll": -text[gold],
                "letter_accuracy": float(letter.index(max(letter)) == gold),
                "text_accuracy": float(text.index(max(text)) == gold), "letter_nll": -letter[gold],
                **({"kl": kl[j]} if base is not None else {})})
            if record:
                record(results[-1])
    return summarize_likelihoods(results), results


def summarize_likelihoods(results):
    """The means and intervals of score_solutions or score_choices, from the list of problems."""
    values = {name: [r[name] for r in results] for name in LIKELIHOODS if name in results[0]}
    return {**{name: float(np.mean(v)) for name, v in values.items()}, "n_problems": len(results),
            "interval": {name: bootstrap(v) for name, v in values.items()}}


# --------------------------------------------------------------------------------------------------
# The record of a run: one JSON line per sample, from which every figure can be computed again

class Record:
    """OUT.jsonl: a first line that names the run, then a line per sample. If the file is there, its
    run goes on: `samples` are those that it already holds."""

    def __init__(self, path, run):
        self.path, self.samples, self.file = path, [], None
        if path is None:
            return
        header = json.dumps({"run": run}) + "\n"
        if path.exists():
            first, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
            if first != header:
                raise InputError(f"{path}: holds another run; give another --out, or delete it")
            whole = [line for line in lines if line.endswith("\n")]  # a kill leaves half a line
            self.samples = [json.loads(line) for line in whole]
            path.write_text(header + "".join(whole), encoding="utf-8")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(header, encoding="utf-8")
        self.file = open(path, "a", encoding="utf-8")

    def of(self, **keys):
        """The recorded samples with these values."""
        return [s for s in self.samples if all(s.get(k) == v for k, v in keys.items())]

    def writer(self, **keys):
        """A function that adds these values to a sample and writes it."""
        def write(sample):
            if self.file:
                self.file.write(json.dumps({**keys, **sample}) + "\n")
                self.file.flush()
        return write


def read_record(results_path):
    """{(task, setting): samples} of the .jsonl beside a results file; a multiple choice has no
    setting, but None."""
    path, groups = Path(results_path).with_suffix(".jsonl"), defaultdict(list)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}; keep the .jsonl beside the results file") from None
    for line in lines[1:]:
        s = json.loads(line)
        groups[s["task"], s.get("setting")].append(s)
    return groups


def compare(mine, other):
    """Print the differences of two runs, as read_record gives them, over the problems of both."""
    print(f"{'difference, paired over problems':34}{'n':>6}{'mean':>9}   95 % interval")
    for key in mine:
        if key not in other:
            continue
        task, setting = key
        if setting:
            n = min(1 + max(s["sample"] for s in group[key]) for group in (mine, other))
            pairs = {f"pass@{k}": (per_problem(mine[key], k), per_problem(other[key], k))
                     for k in powers_of_two(n)}
        else:
            pairs = {name: [{s["problem"]: s[name] for s in group[key]} for group in (mine, other)]
                     for name in LIKELIHOODS if name != "kl" and name in mine[key][0]}
        for name, (a, b) in pairs.items():
            differences = [a[p] - b[p] for p in a if p in b]
            low, high = bootstrap(differences)
            print(f"{task + ' ' + (setting or '') + ' ' + name:34}{len(differences):6}"
                  f"{np.mean(differences):+9.4f}   [{low:+.4f}, {high:+.4f}]")


# --------------------------------------------------------------------------------------------------
# Several runs together: tables over seeds, and pictures

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def name_and_seed(file):
    """What a results file or a training log (.jsonl, named by its folder) is about:
    name_and_seed("runs/soft-1.json") == name_and_seed("runs/soft-1/log.jsonl") == ("soft", "1")."""
    path = Path(file)
    text = path.parent.name if path.suffix == ".jsonl" else path.stem
    name, _, seed = text.rpartition("-")
    return (name, seed) if seed.isdigit() else (text, "")


def read_figures(files):
    """The figures of results files, {(task, name, setting): {seed: figures}}."""
    groups = defaultdict(dict)
    for file in files:
        (name, seed), content = name_and_seed(file), read_json(file)
        results = content.get("results")
        if not isinstance(results, dict) or not all(isinstance(r, dict) for r in results.values()):
            raise InputError(f"{file}: no results file; give what --out of eval.py wrote")
        for task, settings in results.items():
            for setting, figures in settings.items():
                if seed in groups[task, name, setting]:
                    raise InputError(f"{file}: a second file of that name; rename one of them")
                groups[task, name, setting][seed] = figures
    return groups


def columns_of(setting, figures):
    """The cells of a setting in a table, {column: value}: percent, but entropy (of all positions of
    all samples) and likelihoods in nats."""
    if "pass@1" not in figures:
        return {name: figures[name] for name in LIKELIHOODS if name in figures}
    (mode, how), entropy = setting.split("_"), figures["entropy"]
    cells = {f"{mode} {how}": 100 * figures["pass@1"]}
    if how == "sample":
        most = f"pass@{powers_of_two(figures['n_samples'])[-1]}"
        cells[f"{mode} {most}"] = 100 * figures[most]
        if entropy:
            cells[f"{mode} entropy"] = np.average(entropy["mean"], weights=entropy["n_rows"])
    return cells


def spread(seeds):
    """The mean over the first dimension, and the standard deviation of one seed (0 of a single)."""
    mean = np.mean(seeds, 0)
    return mean, np.std(seeds, 0, ddof=1) if len(seeds) > 1 else 0 * mean


def over_seeds(values, as_difference):
    """The mean of values with their standard deviation, or with its 95 % t-interval."""
    (mean, sd), n = spread(values), len(values)
    if not as_difference:
        return f"{mean:.3g}" + (f" ± {sd:.2g}" if n > 1 else "")
    half = STUDENT_T[min(n - 1, len(STUDENT_T)) - 1] * sd / math.sqrt(n)
    return f"{mean:+.3g}" + (f" [{mean - half:+.3g}, {mean + half:+.3g}]" if n > 1 else "")


def print_over_seeds(groups, other=None):
    """Print a Markdown table per task, of what read_figures gives: means and standard deviations
    over seeds; or, with the name of others, differences from these, paired over seeds."""
    names = dict.fromkeys(name for _, name, _ in groups)
    if other and other not in names:
        raise InputError(f"--compare {other}: the files given are about {', '.join(names)}")
    for task in dict.fromkeys(task for task, _, _ in groups):
        cells = defaultdict(lambda: defaultdict(dict))  # by name, column, seed
        for (of_task, name, setting), seeds in groups.items():
            for seed, figures in seeds.items() if of_task == task else ():
                for column, value in columns_of(setting, figures).items():
                    cells[name][column][seed] = value
        columns = dict.fromkeys(column for row in cells.values() for column in row)
        print(f"\n| {task} | seeds | " + " | ".join(columns) + " |")
        print("|" + " --- |" * (2 + len(columns)))
        for name, row in cells.items():
            if name == other:
                continue
            if other:
                row = {column: {seed: value - cells[other][column][seed]
                                for seed, value in seeds.items() if seed in cells[other][column]}
                       for column, seeds in row.items()}
            texts = [over_seeds([*row[column].values()], bool(other)) if row.get(column) else ""
                     for column in columns]
            print(f"| {name} | {max(map(len, row.values()))} | " + " | ".join(texts) + " |")


def read_curves(files):
    """The share of right samples by step of training logs, {name: [that of each seed]}."""
    curves = defaultdict(list)
    for file in files:
        lines = [parse_row(line, file) for line in read_lines(Path(file)) if line.strip()]
        if not lines or any("accuracy" not in line for line in lines):
            raise InputError(f"{file}: no log of reinforcement learning; give OUT/log.jsonl files")
        curves[name_and_seed(file)[0]].append([line["accuracy"] for line in lines])
    return curves


def draw_over_seeds(axis, x, seeds, interval=None, **look):
    """A line: the mean of seeds (S, X), with their standard deviation; of one, its interval."""
    mean, sd = spread(seeds)
    low, high = interval if len(seeds) == 1 and interval else (mean - sd, mean + sd)
    axis.plot(x, mean, **look)
    axis.fill_between(x, low, high, alpha=0.12, color=look["color"], linewidth=0)


def plot(curves, groups, path):
    """Draw learning curves, and of each task pass@k, entropy by position and greedy accuracy, from
    what read_curves and read_figures give; suffix png or svg."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot: matplotlib is not installed; pip install matplotlib") from None
    groups = {key: [*seeds.values()] for key, seeds in groups.items() if key[2] in SETTINGS}
    tasks = [*dict.fromkeys(task for task, _, _ in groups)]
    names = dict.fromkeys([*(name for _, name, _ in groups), *curves])
    color = {name: f"C{i}" for i, name in enumerate(names)}
    style = {"hard": "-", "soft": "--", "fuzzy": ":"}
    n_rows, n_columns = max(1, len(tasks)), bool(curves) + 3 * bool(tasks)
    if not n_columns:
        raise InputError(f"--plot {path}: no sampled or greedy answers and no training log to draw")
    figure = Figure(figsize=(5 * n_columns, 4.5 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for axis in axes[1:, 0] if curves else ():
        axis.axis("off")
    for name, seeds in curves.items():
        end = min(map(len, seeds))
        draw_over_seeds(axes[0, 0], range(end), [s[:end] for s in seeds], color=color[name],
                        label=name)
    if curves:
        axes[0, 0].set(xlabel="step", title="share of right samples in training")
        axes[0, 0].legend(fontsize=7)
    for task, (left, middle, right) in zip(tasks, axes[:, -3:]):
        bars = []
        for (of_task, name, setting), seeds in groups.items():
            if of_task != task:
                continue
            mode, how = setting.split("_")
            look = dict(color=color[name], linestyle=style[mode], label=f"{name}: {mode}")
            intervals = seeds[0]["interval"]
            ks = powers_of_two(min(s["n_samples"] for s in seeds))
            if how == "greedy":
                mean, sd = spread([s["pass@1"] for s in seeds])
                low, high = intervals["pass@1"] if len(seeds) == 1 else (mean - sd, mean + sd)
                right.bar(len(bars), mean, yerr=[[mean - low], [high - mean]], capsize=3,
                          color=color[name])
                bars.append(f"{name}: {mode}")
                continue
            draw_over_seeds(left, ks, [[s[f"pass@{k}"] for k in ks] for s in seeds],
                            [*zip(*(intervals[f"pass@{k}"] for k in ks))], marker="o", **look)
            if seeds[0]["entropy"]:  # as far as a tenth of the rows still think
                end = min(sum(n >= 0.1 * s["entropy"]["n_rows"][0] for n in s["entropy"]["n_rows"])
                          for s in seeds)
                draw_over_seeds(middle, range(end), [s["entropy"]["mean"][:end] for s in seeds],
                                **look)
        right.set_xticks(range(len(bars)), bars, rotation=60, ha="right")
        left.set_xscale("log", base=2)
        left.set(xlabel="k", title=f"{task}: pass@k of samples")
        middle.set(xlabel="position in the thought",
                   title=f"{task}: entropy at temperature 1 of samples, nats")
        right.set(title=f"{task}: greedy accuracy")
        for axis in (left, middle, right):
            axis.set_visible(axis.has_data())
        if left.has_data():
            left.legend(fontsize=7)
    figure.savefig(path)
    print(f"drawn to {path}")


# --------------------------------------------------------------------------------------------------
# The command line

def settings_of(text):
    """--settings: "all" or None, or names of SETTINGS joined by commas, as a list."""
    names = SETTINGS if text in ("all", None) else text.split(",")
    for name in names:
        if name not in SETTINGS:
            raise InputError(f"--settings {name}: not one of {', '.join(SETTINGS)}; "
                             "choose from these")
    return names


def print_table(task, settings):
    """The figures of one task, a line per setting, in percent."""
    n = max(r["n_samples"] for r in settings.values())
    ks = [f"pass@{k}" for k in powers_of_two(n)]
    print(f"\n{task}, {next(iter(settings.values()))['n_problems']} problems")
    print(f"{'setting':14}" + "".join(f"{k:>9}" for k in ks)
          + "  pass@1 in 95 %  truncated  unparsed  errors  cot_len")
    for setting, r in settings.items():
        cells = "".join(f"{100 * r[k]:9.1f}" if k in r else " " * 9 for k in ks)
        low, high = r["interval"]["pass@1"]
        print(f"{setting:14}{cells}{100 * low:9.1f}-{100 * high:5.1f}{100 * r['truncated']:11.1f}"
              f"{100 * r['unparsed']:10.1f}{100 * r['errors']:8.1f}{r['cot_len']:9.1f}")


def print_likelihoods(what, figures):
    print(f"{what}, {figures['n_problems']} problems: " + ", ".join(
        f"{name} {figures[name]:.4f} [{low:.4f}, {high:.4f}]"
        for name, (low, high) in figures["interval"].items()))


def together(files, args):
    """Print the means of results files over seeds, and draw them and training logs."""
    logs, settings = [file for file in files if file.endswith(".jsonl")], settings_of(args.settings)
    if args.model:
        raise InputError(f"{files[0]}: files are tabled and drawn as they are; leave --model away")
    if logs and not args.plot:
        raise InputError(f"{logs[0]}: logs are drawn; add --plot FILE.png")
    groups = read_figures(file for file in files if file not in logs)
    groups = {key: seeds for key, seeds in groups.items()
              if key[2] in settings or key[2] not in SETTINGS}
    print_over_seeds(groups, args.compare)
    if args.plot:
        plot(read_curves(logs), groups, args.plot)


def main(args):
    if args.plot and Path(args.plot).suffix not in (".png", ".svg"):
        raise InputError(f"--plot {args.plot}: must end in .png or .svg")
    if args.files:
        return together(args.files, args)
    if not args.model:
        raise InputError("--model: missing; give a checkpoint directory, or results files")
    if args.plot and not args.out:
        raise InputError(f"--plot {args.plot}: draws results files; give --out, or name such files")
    settings = settings_of(args.settings or "hard_greedy,soft_greedy")
    other = read_record(args.compare) if args.compare else None
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    model, tokenizer, notes = load(args.model, dtype, args.device, args.prompt_file)
    base = load(args.base, dtype, args.device)[0] if args.base else None
    if base is not None and base.config.vocab_size != model.config.vocab_size:
        raise InputError(f"--base {args.base}: not of --model's vocabulary; give its own base")
    watch = Watch.build(tokenizer, model.config.vocab_size, args.device)
    if args.out and not args.out.endswith(".json"):
        raise InputError(f"--out {args.out}: must end in .json; the samples go to .jsonl beside it")
    out = Path(args.out) if args.out else None
    run = {k: v for k, v in vars(args).items()
           if k not in ("out", "compare", "plot", "files", "batch", "device")}
    record, results = Record(out and out.with_suffix(".jsonl"), run), {}
    groups = {}
    for task in args.data.split(","):
        questions = load_choices(task)
        if questions is not None:
            questions, done = questions[:args.limit], record.of(task=task)
            figures, groups[task, None] = score_choices(
                model, tokenizer, questions, base, done=done, record=record.writer(task=task),
                progress=True)
            results[task] = {"choices": figures}
            print_likelihoods(f"\n{task}", figures)
            continue
        problems, results[task] = load_problems(task, "test")[:args.limit], {}
        for setting in settings:
            clock = time.perf_counter()
            done = record.of(task=task, setting=setting)
            results[task][setting], samples = evaluate(
                model, tokenizer, notes, problems, setting, args.samples, batch=args.batch,
                cot_len=args.cot_len or notes["cot_len"],
                answer_len=args.answer_len or notes["answer_len"],
                temperature=args.temperature or notes["temperature"][setting.split("_")[0]],
                noise_std=noise_std_of(notes, args.noise_scale),
                seed=args.seed, verifier=args.verifier, watch=watch, entropy_every=1, done=done,
                record=record.writer(task=task), progress=True)
            groups[task, setting] = samples
            n_tokens = sum(s["length"] for s in samples) - sum(s["length"] for s in done)
            speed = n_tokens / (time.perf_counter() - clock)
            print(f"{task} {setting}: {speed:.0f} tokens/s")
        print_table(task, results[task])
        if all(p["solution"] for p in problems):
            figures, groups[task, None] = score_solutions(
                model, tokenizer, notes, problems, base, args.batch,
                record.of(task=task, setting=None), record.writer(task=task))
            results[task]["solutions"] = figures
            print_likelihoods("reference solutions", figures)
    if out:
        content = {"args": vars(args), "results": results}
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten to {out} and {out.with_suffix('.jsonl')}")
    if other:
        compare(groups, other)
    if args.plot:
        plot({}, read_figures([args.out]), args.plot)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="*", help="instead of --model: results files, "
                        "NAME-SEED.json, whose means to print; with --plot also log.jsonl files")
    parser.add_argument("--model", help="checkpoint directory")
    parser.add_argument("--data", default="arithmetic",
                        help=f"of {', '.join(TASKS)}, {', '.join(CHOICE_FILES)}, or PATH.jsonl; "
                             "several joined by commas")
    parser.add_argument("--settings", help=f"all, or of {', '.join(SETTINGS)}; default "
                        "hard_greedy,soft_greedy, or of files all")
    parser.add_argument("--samples", type=positive(int), default=32,
                        help="per problem, in the sample settings")
    parser.add_argument("--limit", type=positive(int), help="only the first so many problems")
    parser.add_argument("--batch", type=positive(int), default=256, help="rows alive at a time")
    parser.add_argument("--verifier", choices=VERIFIERS, default="own")
    parser.add_argument("--base", help="checkpoint directory: KL(base || model) of texts")
    parser.add_argument("--out", help="results file, .json; an interrupted run is continued")
    parser.add_argument("--compare", metavar="BASE.json", help="print differences from that "
                        "run; of files, from those of that NAME")
    parser.add_argument("--plot", metavar="FILE", help="draw results, .png or .svg")
    parser.add_common()
    parser.run(main)

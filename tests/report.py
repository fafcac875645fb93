"""
Tables and pictures for the README, from results files of eval.py and logs of train.py.

    python tests/report.py table results/*.json                      # mean ± standard deviation over seeds
    python tests/report.py compare hard results/*.json               # differences from hard, paired over seeds
    python tests/report.py compare base.json soft.json               # single runs, paired over problems
    python tests/report.py plot results/*.json --plot tiny.png       # greedy accuracy, pass@k, entropy by position
    python tests/report.py curves out/*/log.jsonl --plot curves.png  # share of right samples by step
    python tests/report.py checkpoints results/*.json --against hard --plot paths.png
    python tests/report.py why why-*.jsonl --plot why.png            # what bench.py why printed, a file for each seed

Results are named NAME-SEED.json or NAME-sSEED.json, logs by their folder; `checkpoints` takes NAME-SEED-STEP.json, and
NAME-SEED.json as step 0 of every run with that seed. ± and bands are one standard deviation over seeds; intervals are
95 %, by Student's t or by bootstrap.
"""
import itertools
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval import bootstrap, summarize  # noqa: E402
from model import InputError, read_json  # noqa: E402
from sample import SETTINGS, Parser  # noqa: E402

COLORS = {"base": "#555555", "hard": "#0072B2", "soft": "#D55E00", "fuzzy": "#009E73", "cool": "#56B4E9",
          "fuzzy, float32": "#CC79A7", "fuzzy, bfloat16": "#009E73", "mean": "#222222", "mean, with noise": "#E69F00",
          "nine of ten are above": "#AAAAAA", "nine of ten are below": "#AAAAAA"}  # other names get C4, C5, ...
LIKELIHOODS = ("letter_accuracy", "text_accuracy", "nll", "letter_nll")
NATS = ("nll", "entropy")  # how the names of columns end that are no shares
MAY_DIFFER = {"model", "weights", "seed", "out", "settings", "data", "batch", "device", "files", "base", "plot"}


def split_number(text):
    """("soft", 1) for "soft-1" and "soft-s1"; (text, None) where no number is behind it, or only an exponent's."""
    match = re.fullmatch(r"(.+)(?:-s|(?<![0-9.][eE])-)([0-9]+)", text)
    return (match[1], int(match[2])) if match else (text, None)


def read_lines(path):
    """The objects in a .jsonl file. A last line that an interrupted run left incomplete is dropped, with a note."""
    *lines, rest = Path(path).read_text(encoding="utf-8").split("\n")
    if rest:
        print(f"note: {path} ends in half a line, which is left out; the run was interrupted")
    return [json.loads(line) for line in lines]


def note_differences(conditions):
    """Print what differs between evaluations, {name: {condition: value}}, apart from the model: budgets, say."""
    for key in sorted(key for key in set().union(*conditions.values()) - MAY_DIFFER if ".safetensors" not in key):
        values = {name: str(of[key])[:60] for name, of in conditions.items() if key in of}
        if len({*values.values()}) > 1:
            print(f"note: {key} differs: " + ", ".join(f"{name} {value}" for name, value in values.items()))


def read_results(args):
    """[((name, number), task, setting, figures)] of results files, after a note on what was not measured alike."""
    rows, conditions = [], {}
    for file in args.files:
        content, stem = read_json(file), Path(file).stem
        if stem in conditions:
            raise InputError(f"{file}: the second of its name; leave it out")
        conditions[stem] = dict(content["args"] if isinstance(content["args"], dict) else {}, **content.get("run", {}))
        rows += [(split_number(stem), task, setting, figures)
                 for task, results in content["results"].items() if task in (args.tasks or content["results"])
                 for setting, figures in results.items()
                 if setting not in SETTINGS or {setting, "all"} & {*args.settings}]
    note_differences(conditions)
    return rows


def columns_of(setting, figures):
    """The figures of a setting that are tabled, {column: value}."""
    columns = {key.replace("_", " "): figures[key] for key in LIKELIHOODS if key in figures}
    if setting in SETTINGS:
        mode, how = setting.split("_")
        columns[f"{mode} {how}"] = figures["pass@1"]
        if how == "sample":
            most = max((key for key in figures if key.startswith("pass@")), key=lambda key: int(key[5:]))
            columns[f"{mode} {most}"] = figures[most]
            columns[f"{mode} entropy"] = np.average(  # over all positions of all samples
                figures["entropy"]["mean"], weights=figures["entropy"]["n_rows"])
    return columns


def read_records(files):
    """The cells (see `paired`) of single runs, by problem instead of seed, from the records of their samples."""
    cells, conditions = defaultdict(dict), {}
    for file in files:
        first, *samples = read_lines(Path(file).with_suffix(".jsonl")) or [{}]
        conditions[file], groups, n = first.get("run", {}), defaultdict(dict), defaultdict(int)
        for s in samples:
            key = s["task"], s["setting"], s["problem"]
            groups[key][s.get("sample")] = s  # a repeated line counts once
            n[key[:2]] = max(n[key[:2]], len(groups[key]))
        for (task, setting, problem), group in groups.items():
            if len(group) == n[task, setting]:  # else the run was interrupted in this problem
                figures = summarize([*group.values()]) if setting in SETTINGS else [*group.values()][0]
                for column, value in columns_of(setting, figures).items():
                    cells[task, column, file][problem] = value
    note_differences(conditions)
    return cells


def t_interval(values):
    """The 95 % interval of the mean of values (n,), n >= 2, by Student's t. The quantile comes from a fine grid: with
    n - 1 degrees of freedom and t = sqrt(n - 1) tan(angle), the density of the angle is cos(angle)^(n - 2)."""
    n, angle = len(values), np.linspace(0, np.pi / 2, 100_001)[1:]
    area = np.cumsum(np.cos(angle - angle[0] / 2) ** (n - 2))
    half = math.tan(np.interp(0.95 * area[-1], area, angle)) * np.std(values)  # ddof = 1 cancels with sqrt(n - 1) / n
    return np.mean(values) + np.array([-half, half])


def paired(cells, other):
    """The differences of cells, {(title, column, name): {seed: value}}, from those of the name `other`, by seed."""
    return {(f"{title}, minus {other}", column, name): {
                seed: value - cells[title, column, other][seed] for seed, value in seeds.items()
                if seed in cells.get((title, column, other), ())}
            for (title, column, name), seeds in cells.items() if name != other}


def text_of(column, values, n, interval):
    """A cell: mean ± standard deviation of values; or, of differences, mean [interval]. Fewer than n are counted."""
    digits, values = (4, values) if column.endswith(NATS) else (1, [100 * v for v in values])
    text = f"{np.mean(values):{'+' if interval else ''}.{digits}f}" if values else ""
    if len(values) > 1:
        text += (" [{:+.{d}f}, {:+.{d}f}]".format(*interval(values), d=digits) if interval
                 else f" ± {np.std(values, ddof=1):.{digits}f}")
    return text + (f" (n = {len(values)})" if len(values) < n else "")


def print_tables(cells, interval=None):
    """Print a Markdown table for each title; n counts seeds, or problems."""
    for title in dict.fromkeys(title for title, *_ in cells):
        part = {key[1:]: [*seeds.values()] for key, seeds in cells.items() if key[0] == title}
        n = {name: max(len(values) for (_, of), values in part.items() if of == name) for _, name in part}
        rows = [[title, *(f"{name} (n = {n[name]})" for name in n)], ["---"] * (1 + len(n))]
        rows += [[column, *(text_of(column, part.get((column, name), []), n[name], interval) for name in n)]
                 for column in dict.fromkeys(column for column, _ in part)]
        print("", *("| " + " | ".join(row) + " |" for row in rows), sep="\n")


def table(args):
    """The commands `table` and `compare`."""
    other, cells = args.files.pop(0) if args.command == "compare" else None, defaultdict(dict)
    if other and other.endswith(".json"):
        return print_tables(paired(read_records([other, *args.files]), other), bootstrap)
    for (name, seed), task, setting, figures in read_results(args):
        for column, value in columns_of(setting, figures).items():
            cells[task, column, name][seed] = value
    print_tables(paired(cells, other), t_interval) if other else print_tables(cells)


def plot(args):
    """Panels (see `draw`) of greedy accuracy, pass@k and entropy by position, for each task."""
    panels = defaultdict(lambda: defaultdict(list))
    for (name, _), task, setting, figures in (row for row in read_results(args) if row[2] in SETTINGS):
        (mode, how), entropy = setting.split("_"), figures["entropy"]
        if how == "greedy":  # a level line at a place of its own
            lines = panels[f"{task}: greedy", ""]
            place = [*lines, (name, mode)].index((name, mode))
            lines[name, mode].append(([place, place + 0.7], [figures["pass@1"]] * 2))
        else:
            share = {int(key[5:]): value for key, value in figures.items() if key.startswith("pass@")}
            panels[f"{task}: pass@k", "k"][name, mode].append(([*share], [*share.values()]))
            end = sum(n >= 0.1 * entropy["n_rows"][0] for n in entropy["n_rows"])  # a tenth of the samples still think
            panels[f"{task}: entropy", "position in thought"][name, mode].append((range(end), entropy["mean"][:end]))
    draw(panels, args.plot)


def curves(args):
    """A panel of the share of right samples by step of training; a point is the mean of ten steps."""
    lines = defaultdict(list)
    for file in args.files:
        share = {row["step"]: row["accuracy"] for row in read_lines(file)}
        x, y = np.array(sorted(share.items()))[:len(share) // 10 * 10].reshape(-1, 10, 2).mean(1).T
        lines[split_number(Path(file).absolute().parent.name)[0], ""].append((x, y))
    draw({("right samples in training", "step"): lines}, args.plot)


def at_level(x, y, level):
    """y where x first rises to level, on straight lines between neighbouring points; None where it never does."""
    for x0, x1, y0, y1 in zip(x, x[1:], y, y[1:]):
        if x0 <= level <= x1:
            return y0 + (y1 - y0) * (level - x0) / (x1 - x0) if x1 > x0 else y0


def read_paths(args):
    """{(name, seed): [{column: value} of each checkpoint]} of results files, or of one file that --save has written."""
    if "paths" in (saved := read_json(args.files[0])):
        return {split_number(run): path for run, path in saved["paths"].items()}
    runs, starts = defaultdict(lambda: defaultdict(dict)), defaultdict(dict)
    for (run, number), task, setting, figures in read_results(args):
        name, seed = split_number(run)
        point = starts[number] if seed is None else runs[name, seed][number]
        point["step"] = 0 if seed is None else number
        point |= {f"{task}: {column}": value for column, value in columns_of(setting, figures).items()}
    return {(name, seed): ([starts[seed]] if seed in starts else []) + [run[step] for step in sorted(run)]
            for (name, seed), run in runs.items()}


def checkpoints(args):
    """Tables of figures at equal greedy accuracy and at the end; panels of that accuracy, and of others against it."""
    paths, cells, panels = read_paths(args), defaultdict(dict), defaultdict(lambda: defaultdict(list))
    if args.save:
        short = {f"{name}-{seed}": [{k: round(float(v), 5) for k, v in point.items()} for point in path]
                 for (name, seed), path in paths.items()}
        Path(args.save).write_text(json.dumps({"paths": short}) + "\n")
    first = [*next(iter(paths.values()))[-1]][1:]  # less the step
    greedy = next(column for column in first if column.endswith("greedy"))
    levels = args.at or [100 * min(max(point[greedy] for point in path) for path in paths.values())]
    columns = [column for column in first if column == greedy or any(text in column for text in args.columns)]
    panels[greedy, "step"] = {(name, ""): [([point["step"] for point in path], [point[greedy] for point in path])
                                           for (of, _), path in paths.items() if of == name] for name, _ in paths}
    for column, ((name, seed), path) in itertools.product(columns, paths.items()):
        x, y = [point[greedy] for point in path], [point[column] for point in path]
        for level in levels if column != greedy else ():
            value = at_level(x, y, level / 100)
            cells[f"at {level:.1f} % {greedy}", column, name] |= {} if value is None else {seed: value}
        cells["at the end", column, name][seed] = y[-1]
        if column != greedy:
            panels[column, f"{greedy}, %"][name, ""].append((100 * np.array(x), y))
    print_tables(cells)
    if args.against:
        print_tables(paired(cells, args.against), t_interval)
    if args.plot:
        draw(panels, args.plot)


def why(args):
    """A table and panels of what bench.py why measured."""
    cells, panels = defaultdict(dict), defaultdict(lambda: defaultdict(list))
    for file in args.files:
        for line in read_lines(file):
            kind, _, policy = line["name"].partition("_")
            name = {"hard_float32": "hard", "soft_float32": "soft"}.get(policy, f"fuzzy, {policy.split('_')[-1]}")
            if kind == "response":
                for part in ("mean",) if policy else ("low", "mean", "high"):
                    label = {"low": "nine of ten are above", "high": "nine of ten are below"}.get(
                        part, "mean, with noise" if policy else "mean")
                    panels["w a + (1 - w) b is read as a", "w"][label, ""].append((line["weight"], line[part]))
            elif kind == "explored":
                lines = panels["decisions that 16 samples explore", "p of the best token"]
                lines[name, ""].append((line["p"], line["near"]))
                cells["in percent", "decisions explored", name][file] = line["share"]
            elif kind == "signal":
                cells["in percent", "cosine of two batches' gradients", name][file] = line["between"]
                cells["in percent", "cosine with reference solutions", name][file] = line["reference"]
            elif kind == "ties":
                cells["in percent", "positions whose best logits tie", name][file] = line["positions"]
                cells["in percent", "decisions whose best logits tie", name][file] = line["decisions"]
    print_tables(cells)
    if args.plot:
        draw(panels, args.plot)


def draw(panels, path):
    """Draw {(title, x label): {(name, mode): [(x, y) of each seed]}}, by seeds' mean and standard deviation."""
    from matplotlib.figure import Figure  # only needed here
    names, modes = (dict.fromkeys(line[i] for lines in panels.values() for line in lines) for i in (0, 1))
    n_rows, handles = -(-len(panels) // 3), {}
    figure = Figure((10, 0.5 + 2.8 * n_rows), dpi=160, layout="constrained")
    for i, ((title, x_label), lines) in enumerate(panels.items()):
        axis, scale = figure.add_subplot(n_rows, min(3, len(panels)), i + 1), 1 if title.endswith(NATS) else 100
        for (name, mode), seeds in lines.items():
            end = min(len(x) for x, _ in seeds)
            x, y = np.mean([x[:end] for x, _ in seeds], 0), scale * np.array([y[:end] for _, y in seeds])
            mean, sd = y.mean(0), y.std(0, ddof=len(y) > 1)
            color, style = COLORS.get(name, f"C{4 + [*names].index(name)}"), {"soft": "--", "fuzzy": ":"}.get(mode, "-")
            label = f"{name}, {mode} inference" if len(modes) > 1 else name
            handles[label], = axis.plot(x, mean, style, color=color, marker="o" if 2 < end < 15 else "", markersize=4)
            band = np.clip((mean - sd, mean + sd), 0, None if scale == 1 else 100)
            axis.fill_between(x, *band, alpha=0.15, color=color, linewidth=0)
        axis.set(title=title, xlabel=x_label, ylabel="nats" if scale == 1 else "%")
        axis.grid(alpha=0.3)
        if x_label == "k":
            axis.set_xscale("log", base=2)
        elif not x_label:
            axis.set_xticks([])
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4)
    figure.savefig(path)


if __name__ == "__main__":
    commands = {"table": table, "compare": table, "plot": plot, "curves": curves, "checkpoints": checkpoints,
                "why": why}
    parser, listed = Parser(__doc__), lambda text: text.split(",")
    parser.add_argument("command", choices=commands)
    parser.add_argument("files", nargs="+", help="results files or logs; for compare first what to subtract")
    parser.add_argument("--tasks", type=listed, help="several joined by commas; default all")
    parser.add_argument("--settings", type=listed, default=["hard_greedy", "hard_sample"],
                        help=f"all, or some of {', '.join(SETTINGS)}")
    parser.add_argument("--plot", metavar="FILE", help="the picture to draw, .png or .svg")
    parser.add_argument("--at", type=float, nargs="+", help="checkpoints: greedy accuracies, in percent")
    parser.add_argument("--columns", type=listed, default=[""], help="checkpoints: only those with one of these texts")
    parser.add_argument("--save", metavar="FILE", help="checkpoints: one small file to use instead of all others")
    parser.add_argument("--against", metavar="NAME", help="checkpoints: also differences from that name")
    parser.run(lambda args: commands[args.command](args))

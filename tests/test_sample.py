"""sample.py: tokenizers as people have them, phases, randomness, densities, and a step that a GPU could record."""
import contextlib
import itertools
import json
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import plain_pass, random_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.distributions import Categorical
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
from model import InputError, log_density
from sample import (EVAL, FORCED, MODES, NOBODY, OPENINGS, SETTINGS, STOP, THOUGHT, TOKEN, TRAIN, Recorded, draw_tokens,
                    encode_after, encode_prompts, generate, load, read_box)
from train import score

# Tokenizers as people have them

PREFIX = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
LLAMA2 = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
KINDS = ["gpt2", "gpt2 with a space", "llama2"]


def tokenizer_like(kind):
    """A small BPE tokenizer in the structure of a well-known one; "<s>" is 1, "</s>" 2, and some tokens are longer."""
    special, letters, space = ["<unk>", "<s>", "</s>", "<new>"], sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ"
    if kind == "llama2":
        letters, space = [f"<0x{i:02X}>" for i in range(256)] + [chr(i) for i in range(33, 127)] + ["▁"], "▁"
    merges = [(space, "T"), ("i", "s"), ("is", ":"), ("}", "."), ("2", "}."), (space, "\\"), ("x", "{"), ("is:", space)]
    pieces = [*special, *letters, *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>",
                                     fuse_unk=True, byte_fallback=kind == "llama2"))
    tokenizer.add_special_tokens(special[:3])
    tokenizer.decoder = decoders.Sequence(LLAMA2) if kind == "llama2" else decoders.ByteLevel()
    if kind == "llama2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="space" in kind)
    return tokenizer


def checkpoint(path, tokenizer, vocab_size=400, prompt_file=None, **files):
    """Write and load a random model with this tokenizer, and with more JSON files by name."""
    random_model(vocab_size=vocab_size, eos_token_id=2).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    for name, content in ({"soft_tokens": {"prompt": "User: {question} Assistant:"}} | files).items():
        (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return load(path, prompt_file=prompt_file)


def prompt_ids(model, tokenizer):
    return encode_prompts(tokenizer, model.notes, ["3+4"], 1, model.config)[0]


def said(model, tokenizer, thought, answer):
    """The row, and its ids, of a model that says these ids, within a budget of just so many."""
    at, script = 0, [*thought, *answer, 0]

    def count(rows, *_):
        nonlocal at
        at = len(thought) if rows[0].phase == FORCED else at + 1
    notes = model.notes | {"cot_len": len(thought), "answer_len": len(answer)}
    with mock.patch.object(model, "logits", lambda hidden: F.one_hot(
            torch.tensor([script[min(at, len(script) - 1)]]), model.config.vocab_size).float()):
        out = generate(model, tokenizer, ["3+4"], "hard", greedy=True, notes=notes, on_step=count)
    return out.rows[0], out.tokens[0, :out.rows[0].length].tolist()


THOUGHTS = [f" so — é. {STOP}", f" x {STOP} ", f" {STOP}\n", f" The final {STOP}", f" {STOP} 1", f" {STOP[:-1]}",
            f" {STOP.lower()}", " The  final answer is:", " 12"]
ANSWERS = {"12}.": "12", "\\max{1}{2}}": "\\max{1}{2}", "\\max{2}.": None, "é—}}": "é—", "}": "", "7</s>}": None}


@pytest.mark.parametrize("kind", KINDS)
def test_thoughts_stop_and_boxes_open_and_close_as_the_text_says(kind, tmp_path):
    tokenizer = tokenizer_like(kind)
    tokenizer.post_processor = PREFIX
    model, tokenizer = checkpoint(tmp_path, tokenizer)
    prompt = prompt_ids(model, tokenizer)
    for thought, (answer, box) in zip(THOUGHTS, itertools.cycle(ANSWERS.items())):
        row, ids = said(model, tokenizer, *(encode_after(tokenizer, text) for text in (thought, answer)))
        assert row.truncated == (STOP not in thought)
        cot = thought.partition(STOP)[0] + STOP * (not row.truncated)
        written = f"User: 3+4 Assistant:{cot}{OPENINGS[row.truncated]}{answer.partition('</s>')[0]}"
        whole = tokenizer.decode(prompt + ids).removeprefix(" ").replace(f"{STOP}  ", f"{STOP} ")  # of its last token
        assert whole == written or box is not None and whole.startswith(written[:written.rindex("}")])
        assert (row.cot.strip(), row.answer) == (cot.strip(), box)
    row, _ = said(model, tokenizer, [20, 2, 399], [399])  # an end token, and ids that only the model has
    assert row.cot_len == 3 and row.answer is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begin", ["", "<s>"])
def test_bos_stands_before_a_prompt_exactly_once(kind, begin, tmp_path):
    (tmp_path / "p.txt").write_text(begin + "User: {question} Assistant:\n")
    tokenizer, says = tokenizer_like(kind), {"add_bos_token": True, "bos_token": {"content": "<s>", "lstrip": False}}
    for processor, config in ((None, {}), (None, says), (PREFIX, {}), (PREFIX, says)):
        if processor:
            tokenizer.post_processor = processor
        model, ours = checkpoint(tmp_path, tokenizer, prompt_file=tmp_path / "p.txt", tokenizer_config=config)
        ids = prompt_ids(model, ours)
        assert ids.count(1) == (ids[0] == 1) == any((processor, config, begin))
        assert ours.decode(ids).strip() == "User: 3+4 Assistant:"


def test_padding_and_truncation_are_off_and_ids_beyond_the_model_matter_only_where_they_occur(tmp_path):
    tokenizer = tokenizer_like("gpt2")
    expected, size = prompt_ids(*checkpoint(tmp_path, tokenizer)), tokenizer.get_vocab_size()
    tokenizer.enable_padding(length=100)
    tokenizer.enable_truncation(8)
    tokenizer.add_special_tokens(["<x>"])
    model, tokenizer = checkpoint(tmp_path, tokenizer, vocab_size=size)
    assert prompt_ids(model, tokenizer) == expected and len(expected) > 8 and model.notes["eos"] == [2]
    for question, named in (("<x>", "tokenizer.json"), ("1" * 250, "context of 256")):
        with pytest.raises(InputError, match=named):
            generate(model, tokenizer, ["3+4", question], notes=model.notes | {"cot_len": 2})


TEMPLATE = "<s>user\n{question}</s>\n<s>assistant</s>\n\n"


@pytest.mark.parametrize("content, prompt", [
    (b"\xef\xbb\xbfQ: {question}\r\nA:\r\n", "Q: {question}\nA:"), (TEMPLATE.encode(), TEMPLATE), (b"", None),
    ("Q: {question}".encode("utf-16"), None), (b"Q: {Question}\n", None)])
def test_prompt_files(content, prompt, tmp_path):
    (tmp_path / "p.txt").write_bytes(content)
    with contextlib.nullcontext() if prompt else pytest.raises(InputError, match="^--prompt_file .*p.txt: [^\n]*$"):
        assert checkpoint(tmp_path, tokenizer_like("gpt2"), prompt_file=tmp_path / "p.txt")[0].notes["prompt"] == prompt


BROKEN = ["", "{", '{"rms": NaN}', {"prompt": "Q"}, {"prompt": ["{question}"]}, {"rms": 0}, {"noise_scale": -1}]
BROKEN += [{key: x} for key in ("cot_len", "answer_len") for x in (0, -1, 2.5, "9", True, None)]
BROKEN += [{"temperature": x} for x in (0.5, None, {}, [[mode, 1] for mode in MODES], {"soft": 0.5})]
BROKEN += [{"temperature": MODES | {"soft": x}} for x in (0, -1, "1", None, 1e300, 1e-300, [1], True)]


@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_soft_tokens_json_that_makes_no_sense_is_refused_in_one_line(broken, tmp_path):
    with pytest.raises(InputError, match="^[^\n]*soft_tokens.json: [^\n]*$"):
        checkpoint(tmp_path, tokenizer_like("gpt2"), soft_tokens=broken)


# Decoding

QUESTIONS = ["3+4*2-5", "7-9", "1*1*1*1"] * 2


def think(tiny, mode="soft", n_samples=2, questions=QUESTIONS, cot_len=21, seed=(TRAIN, 0, 3), **options):
    notes = tiny[0].notes | {"cot_len": cot_len, "answer_len": 3}
    return generate(*tiny, questions, mode, n_samples, notes=notes, seed=seed, store_thoughts=mode != "hard",
                    **{"answer_greedy": False} | options)


def assert_same(a, b, of_b=slice(None), tolerance=1e-5):
    """The rows of rollout a are the given rows of rollout b."""
    used = torch.arange(a.tokens.shape[1]) < torch.tensor([row.length for row in a.rows])[:, None]
    for name in ("tokens", "chosen", "tau", "logp", "entropy", "thoughts"):
        if (x := getattr(a, name)) is not None:
            torch.testing.assert_close(x[used], getattr(b, name)[of_b][used], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("setting", SETTINGS)
@torch.no_grad()
def test_record_of_a_row_is_what_the_formulas_say_of_one_plain_pass(setting, tiny):
    (model, tokenizer), (mode, how) = tiny, setting.split("_")
    model.double()  # fuzzy thoughts magnify rounding
    greedy = how == "greedy"
    out = think(tiny, mode, greedy=greedy, answer_greedy=greedy)
    assert greedy or {row.truncated for row in out.rows} == {True, False}
    for i, (row, ids, *record) in enumerate(zip(out.rows, out.tokens, out.chosen, out.tau, out.logp, out.entropy)):
        chosen, tau, logp, entropy = (x[:row.length] for x in record)
        c, n, opening = row.cot_len, row.length, encode_after(tokenizer, OPENINGS[row.truncated])
        f, taus = c + len(opening), [MODES[mode]] * c + [1.0] * (n - c)
        logits, expected = plain_pass(model, out, i)
        torch.testing.assert_close(logp, expected.float() * (chosen != NOBODY), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(entropy, Categorical(logits=logits).entropy().float(), atol=1e-5, rtol=1e-5)
        if greedy and mode != "hard":  # no noise
            mean = (logits[:c] / MODES[mode]).softmax(-1) @ model.embed_tokens.weight
            torch.testing.assert_close(out.thoughts[i, :c], mean, atol=1e-6, rtol=0)
        assert chosen.tolist() == [TOKEN if mode == "hard" else THOUGHT] * c + [NOBODY] * (f - c) + [TOKEN] * (n - f)
        assert not record[0][n:].any() and not record[2][n:].any() and torch.equal(tau, torch.tensor(taus))
        best = [*range(c if greedy or mode != "hard" else 0), *range(f, n if greedy else f)]
        assert ids[best].tolist() == logits[best].argmax(-1).tolist() and ids[c:f].tolist() == opening
        assert row.entropy == entropy[:c].tolist() and row.answer == read_box(tokenizer.decode(ids[f:n].tolist()))
        assert row.cot == tokenizer.decode(ids[:c].tolist()) and row.cot.endswith(STOP) != row.truncated


@pytest.mark.parametrize("mode, largest, usual", [("hard", 1e-5, 2e-3), ("soft", 1e-3, 0.1), ("fuzzy", 5e-2, 0.1)])
def test_log_prob_in_training_is_that_at_sampling(mode, largest, usual, tiny):
    """In float32 |log pi in training - at sampling| is at most `largest` nats. In bfloat16 a rare slot differs by nats
    (fuzzy: where the best logits tie), and the mean is at most `usual`."""
    model, weight, whole = tiny[0], torch.linspace(-1, 1, 12), torch.arange(12)
    model.norm.weight.data *= 0.05 if mode == "fuzzy" else 1  # logits so close that some nearly tie
    for dtype, rows in ((torch.bfloat16, whole), (torch.float32, whole), (torch.float32, whole[[7, 1, 10, 6]])):
        model.to(dtype)
        for seed in range(4):
            out = think(tiny, mode, seed=(TRAIN, seed, 0))
            loss, delta = score(model, out, rows, weight[rows], model.notes["noise_scale"] * model.notes["rms"])
            assert len(delta) == (out.chosen[rows] != NOBODY).sum()
            assert delta.mean() < usual if dtype == torch.bfloat16 else delta.max() < largest
            assert abs(loss - weight[rows] @ out.logp[rows].sum(1)) <= delta.sum() + 0.01


@torch.no_grad()
def test_density_is_that_of_the_rounded_thought_that_is_fed(tiny):
    model, densities = tiny[0].bfloat16(), []
    noise_std = model.notes["noise_scale"] * model.notes["rms"]
    out = think(tiny, "soft", 1, ["3+4"], on_step=lambda rows, tokens, probs, x: densities.append(
        log_density(x[0].float(), model.mixture(probs)[0], noise_std)))
    n = out.rows[0].cot_len
    torch.testing.assert_close(out.logp[0, :n], torch.stack(densities[:n]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_depends_on_its_seed_question_and_number_alone(mode, tiny):
    tiny[0].double()
    whole, finished = think(tiny, mode), []
    assert len({row.cot_len for row in whole.rows}) > 2
    for batch in (1, 5):  # rows enter as others finish
        assert_same(think(tiny, mode, batch=batch, on_finish=finished.append), whole)
    assert sorted(row.number for row in finished) == sorted([*range(12)] * 2)
    assert_same(think(tiny, mode, rows=[2, 3, 9]), whole, [2, 3, 9])
    assert_same(think(tiny, mode, n_samples=3, rows=[4, 9, 10], questions=["5*5"] + QUESTIONS[1:]), whole, [3, 6, 7])


def test_noise_has_the_given_deviation_and_streams_never_meet(tiny):
    mean = think(tiny, n_samples=1, cot_len=1, greedy=True).thoughts[:, 0]
    seeds = (EVAL, 0), (EVAL, 1), (EVAL, 0, 0), (TRAIN, 0, 0), (TRAIN, 0, 1), (TRAIN, 1, 0)
    noise = torch.cat([think(tiny, n_samples=20, cot_len=1, seed=seed).thoughts[:, 0] - mean.repeat_interleave(20, 0)
                       for seed in seeds]) / (tiny[0].notes["noise_scale"] * tiny[0].notes["rms"])  # (720, D)
    assert abs(noise.std() - 1) < 0.01 and abs(noise.mean()) < 0.01
    assert noise.corrcoef().fill_diagonal_(0).abs().max() < 0.75


def test_tokens_are_drawn_with_their_probabilities():
    g, n, V = torch.Generator().manual_seed(0), 100_000, 1031
    probs = torch.rand(V, generator=g) * (torch.rand(V, generator=g) < 0.5)
    probs[:2], probs[-2:] = torch.tensor([0.0, V / 8]), torch.tensor([V / 4, 0.0])
    probs /= probs.sum()
    uniform = (torch.arange(n) + torch.rand(n, generator=g)) / n  # stratified: each count within two
    counts = torch.cat([draw_tokens(probs.expand(2000, V), u) for u in uniform.split(2000)]).bincount(minlength=V)
    torch.testing.assert_close(counts / n, probs, atol=4e-5, rtol=0)
    assert draw_tokens(probs.expand(2, V), torch.tensor([0, 1 - 2 ** -24])).tolist() == [V - 2, 1]  # not 0 or -1


# A step that a CUDA graph can record

def tensors_in(*objects):
    return [x for x in tree_leaves(objects) if isinstance(x, torch.Tensor)]


def address(x):
    return x.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Does on a CPU what torch.cuda.CUDAGraph does: keeps a step's operations, on tensors that must stay where they
    are, and runs them again. Fails where a graph would: if the host waits, or if a shape depends on data."""
    WAITS = "_local_scalar_dense nonzero _unique2 masked_select lift_fresh scalar_tensor".split()
    decoder, replays = None, 0

    def __enter__(self):
        self.calls, self.made, self.outside = [], set(), {}
        self.host = [mock.patch.object(torch.Tensor, name, mock.Mock(side_effect=AssertionError(f"{name} waits")))
                     for name in ("cpu", "tolist", "numpy")]
        for patch in self.host:
            patch.start()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, inputs = func.overloadpacket.__name__, tensors_in(args, kwargs)
        assert name not in self.WAITS, f"{func} waits for the device"
        assert "index" not in name or all(x.dtype != torch.bool for x in inputs[1:]), f"{func}: a shape depends on data"
        for x in inputs:
            if address(x) not in self.made | self.outside.keys():
                self.outside[address(x)] = x.untyped_storage(), x.untyped_storage().clone()
        out = func(*args, **(kwargs or {}))
        self.made |= {address(x) for x in tensors_in(out)} - self.outside.keys()
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for patch in self.host:
            patch.stop()
        for storage, before in self.outside.values():  # to record is not to run
            storage.copy_(before)
        self.owned = [a if a in self.outside else None for a in self.addresses()]

    def addresses(self):
        parts = self.decoder, self.decoder.cache, self.decoder.out
        return [address(x) for part in parts for x in tensors_in([*vars(part).values()])]

    def replay(self):
        assert all(a in (None, b) for a, b in zip(self.owned, self.addresses(), strict=True)), "a tensor has moved"
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tensors_in(out), tensors_in(func(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():  # neither a view nor changed in place
                    old.copy_(new)
        Tape.replays += 1


@pytest.fixture()
def on_gpu(monkeypatch):
    """Let Recorded record, with tapes for graphs."""
    class OnGPU(Recorded):
        def __init__(self, step, _):
            Tape.decoder, Tape.replays = step.__self__, 0
            super().__init__(step, True)
    monkeypatch.setattr(sample, "Recorded", OnGPU)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "main")
    monkeypatch.setattr(torch.cuda, "set_stream", mock.Mock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, capture_error_mode: graph)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_recorded_step_or_one_that_is_refused_gives_the_same_bits(setting, tiny, request, monkeypatch, capsys):
    (mode, how), refuse = setting.split("_"), mock.Mock(side_effect=RuntimeError("not permitted"))
    plain = think(tiny, mode, greedy=how == "greedy", batch=5)
    request.getfixturevalue("on_gpu")
    assert_same(think(tiny, mode, greedy=how == "greedy", batch=5), plain, tolerance=0)
    assert Tape.replays > 20
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    for _ in range(2):  # the second one does not try again
        assert_same(think(tiny, mode, greedy=how == "greedy", batch=5), plain, tolerance=0)
    assert refuse.call_count == 1 and capsys.readouterr().err.count("\n") == 1
    torch.cuda.set_stream.assert_called_once_with("main")  # a failed capture gives it back


def test_torch_compile_finds_no_break_in_the_step(tiny, monkeypatch):
    plain = think(tiny, cot_len=2)
    monkeypatch.setattr(sample, "Recorded", lambda step, on_gpu: Recorded(
        torch.compile(step, backend="eager", fullgraph=True), False))
    assert_same(think(tiny, cot_len=2), plain, tolerance=0)

"""sample.py: phases, stopping, randomness, and decoding against a loop without cache, batch or tables."""
import os
import platform
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model import InputError, KVCache
from sample import (ANSWER, COT, DONE, FORCED, FORCED_TEXTS, MODES, NONE, PREFILL, SETTINGS, STOP, THOUGHT, TOKEN, Watch,
                    advance, continuations, generate, keep_freed_memory, read_box, sample_tokens)

PROMPTS = ["User: 3+4*2 Assistant:", "User: 7-9 Assistant:", "User: 1*1*1*1 Assistant:"]
SHORT = dict(cot_len=6, answer_len=3, eos=[1], noise_std=0.1)


def same_rollout(a, b):
    for name in ("tokens", "kind", "cot_len", "length"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    torch.testing.assert_close(a.logp, b.logp, atol=1e-4, rtol=1e-4)
    assert a.cots == b.cots and a.answers == b.answers


def rows_of(out, rows):
    """A rollout's rows as a rollout."""
    import dataclasses
    pick = {k: getattr(out, k)[rows] for k in ("tokens", "kind", "logp", "cot_len", "length")}
    return dataclasses.replace(out, **pick, cots=[out.cots[r] for r in rows], answers=[out.answers[r] for r in rows])


# Decoding

def naive(model, tokenizer, prompt, mode, cot_len, answer_len, eos):
    """One greedy row by full forward passes over the embeddings: eq. 1-5 written down once more."""
    x = model.embed_tokens(torch.tensor(tokenizer.encode(prompt).ids))
    tokens, thought_text = [], ""

    def probabilities(tau):
        return (model.logits(model(x[None])[0, -1]) / tau).softmax(-1)
    for _ in range(cot_len):
        p = probabilities(MODES[mode])
        tokens.append(p.argmax().item())
        fed = model.embed_tokens.weight[tokens[-1]] if mode == "hard" else p @ model.embed_tokens.weight
        x = torch.cat((x, fed[None]))
        thought_text = tokenizer.decode(tokens)
        if thought_text.endswith(STOP):
            break
    n = len(tokens)
    opening = FORCED_TEXTS[0] if thought_text.endswith(STOP) else FORCED_TEXTS[1]
    forced = tokenizer.encode(opening, add_special_tokens=False).ids
    tokens += forced
    x = torch.cat((x, model.embed_tokens(torch.tensor(forced))))
    depth = 1
    for _ in range(answer_len):
        tokens.append(probabilities(1.0).argmax().item())
        x = torch.cat((x, model.embed_tokens.weight[tokens[-1]][None]))
        text = tokenizer.decode(tokens[-1:])
        depth += text.count("{") - text.count("}")
        if depth == 0 or tokens[-1] in eos:
            break
    return tokens, n


@pytest.mark.parametrize("mode", MODES)
def test_greedy_decoding_equals_a_loop_without_cache_or_batch(tiny, mode):
    model, tokenizer, _ = tiny
    with torch.no_grad():
        model.embed_tokens.weight[2] *= 1.5  # STOP comes up sometimes, so that both openings are met
        out = generate(model, tokenizer, PROMPTS, 1, mode, greedy=True, **SHORT)
        for i, prompt in enumerate(PROMPTS):
            tokens, n = naive(model, tokenizer, prompt, mode, 6, 3, [1])
            assert out.tokens[i, :out.length[i]].tolist() == tokens
            assert out.cot_len[i] == n


@pytest.mark.parametrize("mode", MODES)
def test_batch_of_unequal_prompts_equals_each_alone(tiny, mode):
    model, tokenizer, _ = tiny
    together = generate(model, tokenizer, PROMPTS, 4, mode, answer_greedy=False, seed=(5, 1), **SHORT)
    for q in range(3):
        rows = range(4 * q, 4 * q + 4)
        alone = generate(model, tokenizer, PROMPTS, 4, mode, answer_greedy=False, seed=(5, 1), rows=rows, **SHORT)
        same_rollout(alone, rows_of(together, list(rows)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [2, 5])
def test_rows_that_enter_as_others_finish_draw_the_same_samples(tiny, mode, batch):
    model, tokenizer, _ = tiny
    options = SHORT | dict(cot_len=21, answer_greedy=False, seed=(2,))
    with torch.no_grad():
        model.embed_tokens.weight[2] *= 1.5
    prompts = PROMPTS * 3
    at_once = generate(model, tokenizer, prompts, 2, mode, **options)
    assert at_once.cot_len.unique().numel() > 1
    same_rollout(generate(model, tokenizer, prompts, 2, mode, batch=batch, **options), at_once)


def test_prompt_longer_than_all_that_is_cached_enters_and_decodes_as_alone(tiny, monkeypatch):
    model, tokenizer, _ = tiny
    with torch.no_grad():
        model.embed_tokens.weight[2] *= 1.5
    joined, join = [], KVCache.join
    monkeypatch.setattr(KVCache, "join", lambda self, other: (
        joined.append((int(self.prompt_len.max()) + self.length, int(other.prompt_len.max()))), join(self, other)))
    prompts = ["User: 1 Assistant:"] * 3 + ["User: " + "3+" * 60 + "4 Assistant:"] * 3
    at_once, entering = (generate(model, tokenizer, prompts, 1, "soft", batch=b, **SHORT | dict(cot_len=21)) for b in (6, 3))
    assert any(new > old for old, new in joined)
    same_rollout(entering, at_once)


def test_part_of_a_group_draws_the_samples_of_the_whole(tiny):
    model, tokenizer, _ = tiny
    whole = generate(model, tokenizer, PROMPTS, 4, "soft", seed=(1,), **SHORT)
    part = generate(model, tokenizer, PROMPTS, 4, "soft", seed=(1,), rows=range(2, 7), **SHORT)
    same_rollout(part, rows_of(whole, list(range(2, 7))))


def test_seed_decides_the_samples(tiny):
    model, tokenizer, _ = tiny
    a, b, c = (generate(model, tokenizer, PROMPTS, 4, "hard", seed=s, **SHORT) for s in ((0, 1), (0, 1), (0, 2)))
    assert torch.equal(a.tokens, b.tokens) and not torch.equal(a.tokens, c.tokens)
    assert not torch.equal(a.tokens[0], a.tokens[1])  # samples of one prompt differ


def test_noise_has_the_given_deviation_and_sampled_density(tiny):
    model, tokenizer, _ = tiny
    out = generate(model, tokenizer, PROMPTS[:1], 400, "soft", cot_len=1, answer_len=1, noise_std=0.3, store_thoughts=True)
    thoughts = out.thoughts[:, 0]
    with torch.no_grad():
        hidden = model(torch.tensor([tokenizer.encode(PROMPTS[0]).ids]))[0, -1]
        mean = model.soft_embedding((model.logits(hidden) / 0.5).softmax(-1))
    noise = (thoughts - mean) / 0.3
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    density = torch.distributions.Normal(mean, 0.3).log_prob(thoughts).sum(-1)
    torch.testing.assert_close(out.logp[:, 0], density, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("V", [4, 6, 512, 768, 1031])
def test_tokens_are_drawn_with_their_probabilities(V):
    g = torch.Generator().manual_seed(V)
    probs = torch.rand(V, generator=g) * (torch.rand(V, generator=g) < 0.5)
    probs[:2], probs[-2:] = torch.tensor([0.0, V / 8]), torch.tensor([V / 4, 0.0])
    probs /= probs.sum()
    n = 200_000
    uniform = (torch.arange(n) + torch.rand(n, generator=g)) / n
    counts = torch.cat([sample_tokens(probs.expand(2000, V), u) for u in uniform.split(2000)]).bincount(minlength=V) / n
    torch.testing.assert_close(counts, probs, atol=2e-5, rtol=0)  # a stratified sample: within two counts of 1 / n each
    edges = sample_tokens(probs.expand(2, V), torch.tensor([0.0, 1 - 2 ** -24]))
    assert edges.tolist() == [V - 2, 1]  # never one of probability 0


def test_entropy_is_that_of_temperature_one(tiny):
    model, tokenizer, _ = tiny
    out = generate(model, tokenizer, PROMPTS[:1], 1, "soft", greedy=True, entropy_every=1, **SHORT)
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([tokenizer.encode(PROMPTS[0]).ids]))[0, -1])
    torch.testing.assert_close(out.entropy[0, 0], torch.distributions.Categorical(logits=logits).entropy())


def test_prompt_longer_than_the_context_is_refused(tiny):
    model, tokenizer, _ = tiny
    with pytest.raises(InputError, match="context of 256"):
        generate(model, tokenizer, ["1" * 250], 1, "hard", **SHORT)


# Phases

def test_phases_and_forced_tokens_follow_the_hand_written_trace():
    """Two rows over the alphabet a, S (ends the phrase), }, {{, E (end of sequence); budget 3, answers of 2 tokens."""
    a, S, close, open2, E = range(5)
    matched = torch.tensor([[0, 1, 0, 0, 0], [0, 1, 0, 0, 0]], dtype=torch.uint8)
    watch = Watch(matched=matched, rise=torch.tensor([0, 0, -1, 2, 0]), low=torch.tensor([0, 0, -1, 0, 0]))
    zero = torch.zeros(3, dtype=torch.long)
    live = {k: zero.clone() for k in ("phase", "age", "which", "cursor", "said")}
    live |= {"matched": zero.to(torch.uint8), "depth": zero + 1}
    script = [  # tokens of the three rows, then the phases after them
        ([S, a, E], [PREFILL, COT, COT]),           # row 0 stops at once; the end token does not end row 2's thought
        ([a, a, a], [ANSWER, COT, COT]),            # row 0: the short opening, one token
        ([open2, a, S], [ANSWER, PREFILL, PREFILL]),  # row 0 opens braces; row 1 used up its budget, row 2 stopped in time
        ([a, a, a], [DONE, PREFILL, ANSWER]),       # row 0 said two tokens; row 1: the long opening, two tokens
        ([a, a, close], [DONE, ANSWER, DONE]),      # row 2 closes the box
        ([a, E, a], [DONE, DONE, DONE]),            # row 1 ends its answer by the end token
    ]
    for tokens, phases in script:
        live |= advance(live, torch.tensor(tokens), watch, torch.tensor([1, 2]), 3, 2, torch.tensor([E]))
        assert live["phase"].tolist() == phases
    assert live["which"].tolist() == [0, 1, 0]


def test_kinds_of_slots_are_thoughts_then_forced_then_tokens_then_nothing(tiny):
    model, tokenizer, _ = tiny
    for mode, first in (("soft", THOUGHT), ("hard", TOKEN)):
        out = generate(model, tokenizer, PROMPTS, 2, mode, **SHORT)
        for r in range(6):
            c, n = int(out.cot_len[r]), int(out.length[r])
            forced = tokenizer.encode(FORCED_TEXTS[int(out.truncated[r])], add_special_tokens=False).ids
            f = len(forced)
            assert out.tokens[r, c:c + f].tolist() == forced
            assert set(out.kind[r, :c].tolist()) == {first} and set(out.kind[r, c:c + f].tolist()) == {FORCED}
            assert set(out.kind[r, c + f:n].tolist()) == {TOKEN} and set(out.kind[r, n:].tolist()) <= {NONE}
            assert (out.logp[r, c:c + f] == 0).all() and (out.logp[r, n:] == 0).all()


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE tokenizer that splits the stop phrase into several tokens, some of which run over its end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["The final answer is: The final answer is known", "so the fin is: \\boxed{{1}} is:\n and }.", "answer}{"] * 20
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tokenizer


@pytest.mark.parametrize("text, stops", [
    ("So 3. The final answer is:", True), ("The final answer is: ", True), ("The final answer is:\n", True),
    ("The final answer is", False), ("the final answer is:", False), ("The final answer is: 4", False),
    ("The final The final answer is:", True), ("TheThe final answer is:", True), ("The  final answer is:", False),
    ("é The final answer is:", True), ("The final answer is:x The final answer is:", True),
])
def test_stop_phrase_is_seen_across_tokens_as_text_would_show_it(bpe, text, stops):
    watch = Watch.build(bpe, 330)
    for ids in (bpe.encode(text).ids, [bpe.token_to_id(c) for c in bpe.pre_tokenizer.pre_tokenize_str(text) for c in c[0]]):
        state = 0
        for i in ids:
            state = int(watch.matched[state, i])
        assert (state == len(STOP)) == stops
        assert bpe.decode(ids).rstrip().endswith(STOP) == stops  # by decoding everything


def test_stop_phrase_automaton_equals_decoding_on_random_token_sequences(bpe):
    watch, g = Watch.build(bpe, 330), torch.Generator().manual_seed(0)
    phrase = bpe.encode(STOP).ids
    assert len(phrase) > 2
    for _ in range(300):
        ids = torch.randint(bpe.get_vocab_size(), (4,), generator=g).tolist()
        cut = int(torch.randint(len(phrase) + 1, (), generator=g))
        ids = ids + phrase[:cut] + (phrase if cut % 2 else phrase[cut:])
        state = 0
        for i in ids:
            state = int(watch.matched[state, i])
        assert (state == len(STOP)) == bpe.decode(ids).endswith(STOP)


def test_brace_tables_count_within_tokens(bpe):
    watch = Watch.build(bpe, 330)
    ids = {t: bpe.encode(t, add_special_tokens=False).ids for t in ("}", "{", "}{", "a")}
    for text, rise, low in (("}", -1, -1), ("{", 1, 0), ("a", 0, 0)):
        i, = ids[text]
        assert (watch.rise[i], watch.low[i]) == (rise, low)
    many = [t for t in bpe.get_vocab() if "}" in t and len(t) > 1]
    for t in many:
        i, text = bpe.token_to_id(t), bpe.decode([bpe.token_to_id(t)])
        depths = [text[:k].count("{") - text[:k].count("}") for k in range(len(text) + 1)]
        assert (int(watch.rise[i]), int(watch.low[i])) == (depths[-1], min(depths))
    assert many


@pytest.mark.parametrize("text, inside", [
    ("12}.", "12"), ("\\frac{1}{2}}", "\\frac{1}{2}"), ("12", None), ("", None), ("}", ""), ("{a}", None),
    ("\\{1, 2\\}} and more}", "\\{1, 2\\}")])
def test_box_is_read_up_to_its_closing_brace(text, inside):
    assert read_box(text) == inside


def test_six_settings():
    assert SETTINGS == ["hard_greedy", "hard_sample", "soft_greedy", "soft_sample", "fuzzy_greedy", "fuzzy_sample"]


def test_continuations_equal_greedy_decoding_of_each_alternative_alone(tiny):
    model, prompt = tiny[0], [4, 9, 11, 5]
    g = torch.Generator().manual_seed(0)
    inputs = 0.3 * torch.randn(5, 2, model.config.hidden_size, generator=g)
    found = continuations(model, prompt, inputs, 4)
    for t in range(5):
        for which in range(2):
            x = torch.cat((model.embed_tokens(torch.tensor(prompt)), inputs[:t, 0], inputs[t, which][None]))[None]
            for token in found[t, which].tolist():
                with torch.no_grad():
                    assert model.logits(model(x))[0, -1].argmax() == token
                    x = torch.cat((x, model.embed_tokens(torch.tensor([[token]]))), 1)


def test_freed_memory_is_kept():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("no glibc")

    def resident():  # bytes
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    keep_freed_memory()
    tensors = [torch.ones(10 ** 7) for _ in range(10)]  # of 40 MB, which glibc would take from the system one by one
    full = resident()
    del tensors
    assert resident() > full - 20e6

"""
Think in hard, soft or fuzzy tokens: one decoding loop with one switch.

    python sample.py --model out/soft/best --mode soft "3+4*2-5"
    python sample.py --model path/to/Llama-3.2-3B-Instruct --greedy --show 5 "What is 7 times 8?"
    python sample.py --model out/soft/best --inspect thought.html "3+4*2-5"

A row passes through four phases, one slot per step: it thinks (COT), is given the words that open
the box (PREFILL), answers (ANSWER), and waits to be dropped (DONE). Every slot records who chose
it: a sampled token, a noisy embedding, or nobody (forced). That record travels to the loss, so that
what is scored is what was sampled.
Dimensions: B live rows, R all rows, Q prompts, G samples per prompt, N slots per row, V vocabulary,
D width.
"""
import argparse
import contextlib
import copy
import ctypes
import html
import itertools
import math
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from model import InputError, Transformer, eos_token_ids, log_density, read_json, softmax_

PROMPT = (
    "Below, a User asks one question and an Assistant replies. The Assistant writes out the "
    "complete reasoning, one step after another, and only then gives the final answer in "
    "\\boxed{}. A reply always follows the format 'User: [question] Assistant: [detailed "
    "reasoning] The final answer is: \\boxed{[answer]}.' User: {question} Assistant:")
STOP = "The final answer is:"
FORCED_TEXTS = (" \\boxed{", f" {STOP} \\boxed{{")  # after an early stop; at the end of the budget
PLACEMENTS = ("embedding", "hidden", "logits")  # where a thought's noise is added
MODES = {"hard": 1.0, "soft": 0.5, "fuzzy": 1e-4}  # temperature of the chain of thought (eq. 3)
NOISE_SCALE = 0.33  # sigma over the root mean square of the embedding table (eq. 6)
SETTINGS = [f"{mode}_{how}" for mode in MODES for how in ("greedy", "sample")]

# Who chose a slot: nobody yet, a sampled token, a noisy embedding, the forced words
NONE, TOKEN, THOUGHT, FORCED = range(4)
COT, PREFILL, ANSWER, DONE = range(4)  # the phases of a row, in the order it passes through them
# Steps between two looks at which rows have finished: the only times the host waits for the device
ROUND = 8


# --------------------------------------------------------------------------------------------------
# Text conditions as tables over token ids, so that no text is decoded while a row is generated

def token_texts(tokenizer, vocab_size):
    """The text that each id adds behind other text: vocab_size strings, "" for unused ids."""
    anchor = tokenizer.encode("a", add_special_tokens=False).ids[0]  # some decoders strip one space
    ids = range(min(vocab_size, tokenizer.get_vocab_size()))
    texts = tokenizer.decode_batch([[anchor, i] for i in ids], skip_special_tokens=False)
    skip = len(tokenizer.decode([anchor], skip_special_tokens=False))
    return [text[skip:] for text in texts] + [""] * (vocab_size - len(ids))


@dataclass
class Watch:
    """Where the chain of thought stops and where the answer's brace closes, one lookup per token.

    matched  (len(STOP) + 1, V) uint8: how many characters of STOP the text ends with after a token,
             given how many it ended with before (a Knuth-Morris-Pratt automaton run over the
             token's characters; white space behind the whole phrase keeps the match)
    rise     (V,) int64: opened minus closed braces in a token
    low      (V,) int64: the least value of that count within the token, at most 0
    """
    matched: torch.Tensor
    rise: torch.Tensor
    low: torch.Tensor

    @classmethod
    def build(cls, tokenizer, vocab_size, device="cpu", phrase=STOP):
        n, texts = len(phrase), token_texts(tokenizer, vocab_size)
        delta = np.zeros((n + 1, 128), dtype=np.uint8)  # [matched, next character] -> matched
        for state in range(n + 1):
            for char in set(phrase):
                seen = phrase[:state] + char
                delta[state, ord(char)] = max(
                    k for k in range(n + 1) if k <= len(seen) and seen.endswith(phrase[:k]))
        delta[n, [ord(c) for c in " \t\n\r"]] = n

        lengths = np.array([len(t) for t in texts])
        matched = np.repeat(np.arange(n + 1, dtype=np.uint8)[:, None], vocab_size, axis=1)
        for i in range(lengths.max()):  # one character of all tokens at a time
            ids = np.flatnonzero(lengths > i)
            chars = np.array([min(ord(texts[t][i]), 127) for t in ids])
            matched[:, ids] = delta[matched[:, ids], chars]

        rise, low = np.zeros(vocab_size, dtype=np.int64), np.zeros(vocab_size, dtype=np.int64)
        for t, text in enumerate(texts):
            for char in text if "{" in text or "}" in text else "":
                rise[t] += (char == "{") - (char == "}")
                low[t] = min(low[t], rise[t])
        return cls(*(torch.from_numpy(a).to(device) for a in (matched, rise, low)))


def read_box(text):
    """The text up to the brace that closes an open \\boxed{, or None: read_box("12}.") == "12"."""
    depth = 1
    for i, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[:i]
    return None


def forced_tokens(tokenizer):
    """The ids of the two FORCED_TEXTS."""
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in FORCED_TEXTS]


def encode(tokenizer, prompts, n_new, config):
    """The ids of prompts, which n_new more will follow; InputError if that exceeds the context."""
    prompt_ids = [e.ids for e in tokenizer.encode_batch(list(prompts))]
    context = config.max_position_embeddings
    for text, ids in zip(prompts, prompt_ids):
        if len(ids) + n_new > context:
            raise InputError(
                f"a prompt of {len(ids)} tokens, with {n_new} to follow (--cot_len, --answer_len), "
                f"exceeds the model's context of {context} tokens; shorten them or leave the "
                f"question out: {text[-60:]!r}")
    return prompt_ids


# --------------------------------------------------------------------------------------------------
# Generation

@dataclass
class Rollout:
    """R generated rows of N slots each. Slot 0 follows the prompt; unused slots are at the end."""
    prompts: list             # Q lists of ids
    of_row: torch.Tensor      # (R,) int64: the prompt of each row
    tokens: torch.Tensor      # (R, N) int64: the token; at a thought, its shadow, the argmax of p
    kind: torch.Tensor        # (R, N) uint8: NONE, TOKEN, THOUGHT or FORCED
    logp: torch.Tensor        # (R, N) float32, nats: of the action when it was drawn; 0 if none was
    entropy: torch.Tensor     # (R, N) float32, nats: of softmax(logits); nan where not measured
    thoughts: torch.Tensor    # (R, C, D): noisy embeddings as fed, in the model's dtype, or None;
    #                         # with the noise elsewhere, the noisy states or logits (R, C, k)
    support: torch.Tensor     # (R, C, k) int64: the tokens of these logits, or None if they are all
    cot_len: torch.Tensor     # (R,) int64: slots of the chain of thought
    length: torch.Tensor      # (R,) int64: slots in use
    truncated: torch.Tensor   # (R,) bool: the budget ended the thought, not STOP
    noise_at: str             # one of PLACEMENTS
    cots: list                # R strings: the thought as text
    answers: list             # R strings: what stands in the box; None if it was never closed


def draw(seed, groups, n_samples, width, device):
    """The uniforms and normals of one round, for all samples of each (prompt, age) in groups.

    They depend on the seed, the prompt's number, the sample's and the age alone, never on which
    other rows are alive, so that batches, ranks and dropped rows change nothing.
    Returns (len(groups) G, ROUND) and (len(groups) G, ROUND, width), float32.
    """
    generator, uniform, normal = torch.Generator(device), [], []
    for prompt, age in groups:
        key = np.random.SeedSequence((*seed, prompt, age)).generate_state(1, np.uint64)[0]
        generator.manual_seed(int(key >> np.uint64(1)))
        options = dict(generator=generator, device=device)
        uniform.append(torch.rand(n_samples, ROUND, **options))
        normal.append(torch.randn(n_samples, ROUND, width, **options))
    return torch.cat(uniform), torch.cat(normal)


def sample_tokens(probs, uniform):
    """Draw a token per row of probs (B, V) by inverting its cumulative sum at 1 - uniform (B,).

    In two levels, first a block of the vocabulary, then a token of that block: a cumulative sum
    over all of V costs more than the softmax. A token of probability 0 is never drawn.
    """
    blocks = probs.unflatten(-1, (-1, math.gcd(probs.shape[-1], 256)))  # (B, n, V / n)
    ends = blocks.sum(-1).cumsum(-1)  # (B, n)
    target = (1 - uniform)[:, None] * ends[:, -1:]  # in (0, total]
    block = torch.searchsorted(ends, target)  # (B, 1): the first to reach the target
    block = block.clamp_(max=ends.shape[1] - 1)  # of NaN none is: the loss will be NaN, and skipped
    target = target - F.pad(ends, (1, 0)).gather(-1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, blocks.shape[-1]))[:, 0].cumsum(-1)
    place = torch.searchsorted(inside, torch.minimum(target, inside[:, -1:]))  # despite rounding
    return (block * blocks.shape[-1] + place.clamp_(max=inside.shape[1] - 1))[:, 0]


def choose(model, live, forced, uniform, normal, mode, greedy, answer_greedy, tau, noise_std,
           noise_at, noise_top_k, measure=False):
    """Pick what stands in the next slot of every live row.

    live     {"hidden": (B, D), "phase": (B,), "which": (B,), "cursor": (B,), ...}
    uniform  (B,) and normal (B, width of the noise): this step's randomness
    Returns the slot's token (B,), its input embedding (B, D), its log-prob (B,), probs (B, V) at
    the row's temperature, the action and its support if it is a thought, and, to measure, the
    entropy (B,) at temperature 1, else nan.
    """
    in_cot, in_prefill = live["phase"] == COT, live["phase"] == PREFILL
    logits = model.logits(live["hidden"])
    action = support = None
    if noise_top_k:
        support = logits.topk(noise_top_k).indices
    entropy = math.nan
    if measure:
        entropy = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
    # in place, as a new (B, V) costs more than the arithmetic; answers are at temperature 1
    probs = softmax_(logits.div_(torch.where(in_cot, tau, 1.0)[:, None]))  # eq. 3

    cot_greedy = greedy or mode != "hard"  # the shadow of a soft thought is its argmax
    best = probs.max(-1).indices if cot_greedy or answer_greedy else None
    sampled = best if cot_greedy and answer_greedy else sample_tokens(probs, uniform)
    token = torch.where(in_cot, best if cot_greedy else sampled, best if answer_greedy else sampled)
    token = torch.where(in_prefill, forced[live["which"], live["cursor"]], token)
    logp = probs.gather(-1, token[:, None])[:, 0].log()
    x = model.embed_tokens(token)  # eq. 4

    if mode != "hard":
        mean = (model.soft_embedding(probs) if noise_at == "embedding"  # eq. 5
                else model.thought_mean(live["hidden"], noise_at, support))
        action = (mean if greedy else mean + noise_std * normal).to(x.dtype)  # eq. 6
        # the action is what is fed, after the cast; without noise there is no action
        density = (torch.zeros_like(logp) if greedy
                   else log_density(action.float(), mean, noise_std))
        logp = torch.where(in_cot, density, logp)
        thought = model.thought_input(action, noise_at, support, tau)
        x = torch.where(in_cot[:, None], thought, x)
    return token, x, logp.masked_fill(in_prefill, 0), probs, action, support, entropy


def advance(live, token, watch, forced_len, cot_len, answer_len, eos):
    """Move every row on by the token that its slot got: the phases, all rows at once, no text.

    forced_len (2,): tokens of the two FORCED_TEXTS; eos (n,): end tokens. Returns changed entries.
    """
    phase, age = live["phase"], live["age"] + 1
    in_cot, in_prefill, in_answer = phase == COT, phase == PREFILL, phase == ANSWER
    matched = torch.where(in_cot, watch.matched[live["matched"].long(), token], live["matched"])
    stopped = in_cot & (matched == len(watch.matched) - 1)
    used_up = in_cot & ~stopped & (age == cot_len)
    which = torch.where(used_up, 1, live["which"])
    cursor = live["cursor"] + in_prefill
    opened = in_prefill & (cursor == forced_len[which])
    said = live["said"] + in_answer  # answer tokens so far
    closed = live["depth"] + watch.low[token] <= 0
    ended = in_answer & (closed | torch.isin(token, eos) | (said == answer_len))
    return {"phase": phase + (stopped | used_up | opened | ended), "age": age, "matched": matched,
            "which": which, "cursor": torch.minimum(cursor, forced_len[which] - 1), "said": said,
            "depth": live["depth"] + watch.rise[token] * in_answer}


def enter(model, live, cache, prompts, copies, places):
    """Add rows to the state and the cache: prompts (lists of ids) are read once, and the new rows
    are samples of prompts[copies]; places: their rows in the output. Returns (live, cache)."""
    hidden, fresh = model.read(prompts)
    copies = torch.tensor(copies, device=hidden.device)
    fresh = fresh.branch(copies)
    zero = torch.zeros_like(copies)
    new = {"place": torch.tensor(places, device=hidden.device), "hidden": hidden[copies],
           "matched": zero.to(torch.uint8), "depth": zero + 1,
           **dict.fromkeys(("phase", "age", "which", "cursor", "said"), zero)}
    if not live:
        return new, fresh
    cache.join(fresh)
    return {k: torch.cat((live[k], new[k])) for k in live}, cache


def count_slots(kind):
    """The lengths of the thought and of the forced words in rows of slot kinds (B, N)."""
    is_forced = kind == FORCED
    return is_forced.int().argmax(1), is_forced.sum(1)


@torch.no_grad()
def generate(model, tokenizer, prompts, n_samples, mode, *, greedy=False, answer_greedy=True,
             temperature=None, noise_std=None, cot_len=512, answer_len=32, eos=(), seed=(0,),
             rows=None, batch=None, watch=None, store_thoughts=False, entropy_every=0,
             noise_at="embedding", noise_top_k=0, on_step=None, on_finish=None):
    """Think and answer: n_samples rows for each prompt.

    prompts        Q strings
    mode           "hard", "soft" or "fuzzy"; greedy: argmax tokens, or thoughts without noise
    answer_greedy  False in training, where answers are samples at temperature 1 (eq. 8)
    temperature    of the thought, > 0; default MODES[mode]
    noise_std      sigma of eq. 6 per coordinate; soft and fuzzy need it unless greedy
    noise_at       one of PLACEMENTS; noise_top_k: with "logits", how many take part, 0 for all
    cot_len, answer_len  budgets in tokens; eos: ids that end an answer, never a thought
    seed           ints; rows: ascending, which of the Q n_samples rows (row = prompt n_samples +
                   sample), default all
    batch          most rows alive at a time, others enter as these finish; default all at once
    watch          Watch.build(tokenizer, vocab_size, device), where the caller has it already
    entropy_every  measure the entropy at every so-many-th slot, a divisor of ROUND; 0: never
    on_step        called as on_step(kind (B,), token (B,), probs (B, V)) at each step
    on_finish      called with a list of dicts when rows finish: "row", "thought", "answer",
                   "truncated", "cot_len", "length", "entropy" (a list, nan where not measured)
    Returns a Rollout. Raises InputError for a prompt that does not fit the model's context.
    """
    device, width = model.embed_tokens.weight.device, model.config.hidden_size
    watch = watch or Watch.build(tokenizer, model.config.vocab_size, device)
    temperature = temperature or MODES[mode]
    eos = torch.tensor(list(eos), dtype=torch.long, device=device)
    texts = forced_tokens(tokenizer)
    forced_len_host = [len(t) for t in texts]
    forced_len = torch.tensor(forced_len_host, device=device)
    most = max(map(len, texts))
    forced = torch.tensor([t + [0] * (most - len(t)) for t in texts], device=device)  # (2, most)
    kind_of_phase = torch.tensor([TOKEN if mode == "hard" else THOUGHT, FORCED, TOKEN, NONE],
                                 dtype=torch.uint8, device=device)

    rows = list(range(len(prompts) * n_samples) if rows is None else rows)
    R, N = len(rows), cot_len + most + answer_len
    prompt_ids = encode(tokenizer, prompts, N, model.config)
    tokens = torch.zeros(R, N + 1, dtype=torch.long, device=device)  # DONE rows write to column N
    kinds = torch.zeros(R, N + 1, dtype=torch.uint8, device=device)
    logps = torch.zeros(R, N + 1, device=device)
    entropy = torch.full((R, N + 1), math.nan, device=device)
    thoughts = support = None
    if noise_at == "logits":
        width = noise_top_k or model.config.vocab_size
    if store_thoughts and mode != "hard":
        thoughts = torch.zeros(R, cot_len + 1, width, dtype=model.embed_tokens.weight.dtype,
                               device=device)
        if noise_top_k:
            support = torch.zeros(thoughts.shape, dtype=torch.long, device=device)

    def describe(which):
        """Finished rows as dicts of plain values."""
        index = torch.tensor(list(which), dtype=torch.long, device=device)
        kind = kinds[index, :N]
        n_cot, n_forced = count_slots(kind)
        columns = zip(index.tolist(), tokens[index].tolist(), entropy[index].tolist(),
                      n_cot.tolist(), n_forced.tolist(), (kind != NONE).sum(1).tolist())
        return [{"row": rows[place], "thought": tokenizer.decode(ids[:c]),
                 "answer": read_box(tokenizer.decode(ids[c:n]).split("\\boxed{", 1)[-1]),
                 "truncated": f == forced_len_host[1], "cot_len": c, "length": n, "entropy": h[:c]}
                for place, ids, h, c, f, n in columns]

    batch, waiting = batch or R, deque(range(R))
    live, cache, places, ages = {}, None, [], []  # places in the output and ages, on the host
    reported = set()
    while True:
        # Between rounds: finished rows leave, waiting rows enter
        if places:
            phases = live["phase"].tolist()
            alive = [i for i, phase in enumerate(phases) if phase != DONE]
            if on_finish:
                done = {place for place, phase in zip(places, phases) if phase == DONE}
                if done - reported:
                    on_finish(describe(sorted(done - reported)))
                reported |= done
            few = (batch - len(alive) >= min(batch / 8, len(waiting)) if waiting
                   else len(alive) <= 0.75 * len(places))
            if few:  # else the copying would not pay
                keep = torch.tensor(alive, dtype=torch.long, device=device)
                live = {k: v[keep] for k, v in live.items()} if alive else {}
                if alive:
                    cache.keep(keep)
                places, ages = [places[i] for i in alive], [ages[i] for i in alive]
        entering = [waiting.popleft() for _ in range(min(len(waiting), batch - len(places)))]
        if entering:
            asked = list(dict.fromkeys(rows[place] // n_samples for place in entering))
            live, cache = enter(
                model, live, cache, [prompt_ids[q] for q in asked],
                [asked.index(rows[place] // n_samples) for place in entering], entering)
            places, ages = places + entering, ages + [0] * len(entering)
        if not places:
            break

        # One round: ROUND steps of all live rows
        keys = [(rows[place] // n_samples, age) for place, age in zip(places, ages)]
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        mine = torch.tensor([number[key] * n_samples + rows[place] % n_samples
                             for key, place in zip(keys, places)], device=device)
        noise_width = 0 if greedy or mode == "hard" else width
        uniform, normal = (r[mine] for r in draw(seed, number, n_samples, noise_width, device))
        for i in range(ROUND):
            kind = kind_of_phase[live["phase"]]
            token, x, logp, probs, action, among, h = choose(
                model, live, forced, uniform[:, i], normal[:, i], mode, greedy, answer_greedy,
                temperature, noise_std, noise_at, noise_top_k,
                entropy_every and i % entropy_every == 0)
            slot = live["place"], torch.where(kind == NONE, N, live["age"])
            tokens[slot], kinds[slot], logps[slot] = token, kind, logp
            if thoughts is not None:
                slot = live["place"], torch.where(kind == THOUGHT, live["age"], cot_len)
                thoughts[slot] = action
                if support is not None:
                    support[slot] = among
            entropy[slot] = h
            if on_step:
                on_step(kind, token, probs)
            live |= advance(live, token, watch, forced_len, cot_len, answer_len, eos)
            live["hidden"] = model(x[:, None], cache)[:, 0]
        ages = [age + ROUND for age in ages]

    kind = kinds[:, :N]
    n_cot, n_forced = count_slots(kind)
    described = describe(range(R))
    return Rollout(
        prompts=prompt_ids, of_row=torch.tensor(rows, device=device) // n_samples,
        tokens=tokens[:, :N], kind=kind, logp=logps[:, :N], entropy=entropy[:, :N],
        thoughts=None if thoughts is None else thoughts[:, :cot_len],
        support=None if support is None else support[:, :cot_len], cot_len=n_cot,
        length=(kind != NONE).sum(1), truncated=n_forced == forced_len[1], noise_at=noise_at,
        cots=[d["thought"] for d in described], answers=[d["answer"] for d in described])


# --------------------------------------------------------------------------------------------------
# The inspector: one thought as a page

STYLE = """
:root { color-scheme: light dark; --bar: #8ab4f888; font: 15px/1.4 system-ui, sans-serif }
body { margin: 1.5rem } h1 { font-size: 1.2rem } code, b { font-family: ui-monospace, monospace }
ol { display: flex; gap: .5rem; overflow-x: auto; padding: .5rem; list-style: none }
li { flex: 0 0 12.5rem; border: 1px solid #8888; border-radius: .5rem; padding: .6rem }
li:focus { outline: 3px solid #4c8bf5 } li.swap { border-color: #d9480f; border-width: 2px }
li b { font-size: 1.3rem; white-space: pre } dt { opacity: .75; font-size: .85rem }
dd { margin: 0 0 .5rem; overflow-wrap: anywhere } p span { display: block; white-space: pre;
background: linear-gradient(var(--bar) 0 0) 0 / var(--w) no-repeat } p { margin: .4rem 0 }"""
ARROWS = """onkeydown = e => { const to = { ArrowLeft: 'previousElementSibling',
ArrowRight: 'nextElementSibling' }[e.key], li = document.activeElement.closest('li')
if (to && li && li[to]) { e.preventDefault(); li[to].focus() } }"""


@torch.no_grad()
def continuations(model, prompt, inputs, n_new):
    """Greedy continuations (C, A, n_new) of a thought whose step t is one of A alternatives.

    prompt: ids; inputs (C, A, D): embeddings; inputs[:t, 0] is what was fed before step t.
    """
    C, A, _ = inputs.shape
    _, cache = model.read([prompt])
    first = torch.zeros(A, dtype=torch.long, device=inputs.device)
    cache, forks = cache.branch(first[:1]), None
    for step in inputs:
        fork = copy.copy(cache)
        fork.keep(first)
        forks = forks or fork
        if forks is not fork:
            forks.join(fork)
        model(step[None, :1], cache)
    x, tokens = inputs.reshape(C * A, 1, -1), []
    for _ in range(n_new):
        tokens.append(model.logits(model(x, forks)[:, 0]).argmax(-1))
        x = model.embed_tokens(tokens[-1])[:, None]
    return torch.stack(tokens, -1).view(C, A, n_new)


def inspect(path, model, tokenizer, question, out, probs, mode, tau, eos, top=6, n_new=24):
    """Write a page about row 0 of a rollout: each step of its thought as a column.

    probs (C, V): of each step at the thought's temperature. Out of reach of the network, in one
    file; arrow keys walk from step to step.
    """
    C, E = int(out.cot_len[0]), model.embed_tokens.weight.float()
    token = out.tokens[0, :C]
    mean = model.soft_embedding(probs)  # (C, D)
    fed = model.embed_tokens(token)
    if out.thoughts is not None:
        support = None if out.support is None else out.support[0, :C]
        fed = model.thought_input(out.thoughts[0, :C], out.noise_at, support, tau)
    best = model.embed_tokens(probs.argmax(-1))
    after = continuations(model, out.prompts[0], torch.stack((fed, best), 1), n_new).tolist()
    moved = (fed.float() - mean).norm(dim=-1) / mean.norm(dim=-1)
    near = F.normalize(fed.float(), dim=-1) @ F.normalize(E, dim=-1).T  # cosines, (C, V)

    def text(ids):
        raw = tokenizer.decode(ids, skip_special_tokens=False)
        return html.escape(raw.replace(" ", "\u00b7").replace("\n", "\u23ce")) or "\u2205"

    def bars(values):
        heaviest = zip(*(x.tolist() for x in values.topk(min(top, len(values)))))
        return "<p>" + "".join(
            f'<span style="--w:{100 * max(v, 0):.1f}%">{v:6.3f} {text([i])}</span>'
            for v, i in heaviest) + "</p>"
    steps = []
    for t, both in enumerate(after):
        as_fed, swapped = (list(itertools.takewhile(lambda i: i not in eos, ids)) for ids in both)
        same = as_fed == swapped
        noise = "" if mode == "hard" else (
            f"<dt>noise, of the mixture's length</dt><dd>{moved[t]:.2f}</dd>"
            f"<dt>nearest to what was fed, cosine</dt><dd>{bars(near[t])}</dd>")
        then = text(as_fed) if same else f"{text(as_fed)}<br>with its top token: {text(swapped)}"
        steps.append(
            f'<li tabindex="0" class="{"" if same else "swap"}">'
            f"{t + 1} <b>{text([int(token[t])])}</b><dl>"
            f"<dt>{'probabilities' if mode == 'hard' else 'weights'}</dt><dd>{bars(probs[t])}</dd>"
            f"<dt>entropy, nats</dt><dd>{out.entropy[0, t]:.2f}</dd>{noise}"
            f"<dt>greedy continuation{'' if same else ' <strong>changes</strong>'}</dt>"
            f"<dd>{then}</dd></dl></li>")
    n_swaps = sum('class="swap"' in step for step in steps)
    title = f"A {mode} thought of {C} steps"
    Path(path).write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}</style><h1>{title}</h1><p>{html.escape(question)}</p>"
        f"<p>answer: <strong>{html.escape(str(out.answers[0]))}</strong>; in "
        f"{n_swaps} steps, marked, the top token alone in place of what was "
        f"fed would change the greedy continuation.</p><ol>{''.join(steps)}</ol>"
        f"<script>{ARROWS}</script></html>\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Loading, and the command line

def keep_freed_memory():
    """Ask glibc not to return freed memory to the system: on a CPU, paging it in again for the next
    large tensors costs a good part of each step. Does nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        for option, value in ((-1, 2 ** 31 - 1), (-4, 0)):  # M_TRIM_THRESHOLD, M_MMAP_MAX
            ctypes.CDLL("libc.so.6").mallopt(option, value)


def load(path, dtype=torch.float32, device="cpu", prompt_file=None):
    """A checkpoint directory as (model, tokenizer, notes).

    notes: what train.py left in soft_tokens.json, completed for a model that it never saw:
    "prompt" with {question}; "temperature" by mode; "noise_scale", "noise_at", "noise_top_k";
    "cot_len", "answer_len"; "rms" by PLACEMENTS, of what noise is added to, in the base model; and
    "eos", the end-of-sequence ids.
    """
    path = Path(path)
    if device == "cpu":
        keep_freed_memory()
    model = Transformer.from_pretrained(path, dtype, device)
    file = path / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises bare Exceptions
        raise InputError(f"{file}: {e}; give a checkpoint that holds a fast tokenizer") from None
    n, vocab_size = tokenizer.get_vocab_size(), model.config.vocab_size
    if n > vocab_size:
        raise InputError(f"{file}: {n} tokens, but config.json has vocab_size {vocab_size}; "
                         "use the tokenizer that belongs to the model")
    notes = {"prompt": PROMPT, "temperature": MODES, "noise_scale": NOISE_SCALE, "cot_len": 512,
             "answer_len": 32, "noise_at": "embedding", "noise_top_k": 0}
    if (path / "soft_tokens.json").exists():
        notes |= read_json(path / "soft_tokens.json")
    if prompt_file:
        notes["prompt"] = read_prompt(prompt_file)
    if "rms" not in notes:  # over real vocabulary rows: padding would make it smaller
        table, head, hidden = (
            w.detach().float().square().mean().sqrt().item()
            for w in (model.embed_tokens.weight[:n], model.lm_head.weight[:n], model.norm.weight))
        notes["rms"] = {"embedding": table, "hidden": hidden,  # of states in any direction
                        "logits": hidden * head * math.sqrt(model.config.hidden_size)}
    return model, tokenizer, notes | {"eos": eos_token_ids(path)}


def noise_std_of(notes, noise_scale=None):
    """sigma of eq. 6."""
    return (noise_scale or notes["noise_scale"]) * notes["rms"][notes["noise_at"]]


def read_prompt(path):
    """The template in a text file; InputError if it cannot be read or holds no {question}."""
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except OSError as e:
        raise InputError(f"--prompt_file {path}: {e.strerror}; give a readable text file") from None
    if "{question}" not in text:
        raise InputError(f"--prompt_file {path}: the text has no {{question}}; put it where the "
                         "question belongs")
    return text


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, and that knows the flags which all scripts share."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add_common(self):
        self.add_argument("--prompt_file", help="text with {question} that replaces the prompt")
        self.add_argument("--cot_len", type=positive(int), help="budget of the thought, tokens")
        self.add_argument("--answer_len", type=positive(int), help="budget of the answer, tokens")
        self.add_argument("--temperature", type=positive(float),
                          help="of the thought; default by mode")
        self.add_argument("--noise_scale", type=positive(float),
                          help="noise over the RMS of the embeddings")
        self.add_argument("--seed", type=positive(int, or_zero=True), default=0)
        self.add_argument("--dtype", choices=["float32", "bfloat16"],
                          help="of weights and activations")
        self.add_argument("--device", type=device,
                          default="cuda" if torch.cuda.is_available() else "cpu")

    def run(self, main):
        """main(args); a user's mistake or the system's refusal ends in one line and status 2."""
        try:
            return main(self.parse_args())
        except InputError as e:
            self.error(str(e))
        except OSError as e:
            self.error(f"{e}; check that path, its permissions and the space left there")
        except KeyboardInterrupt:
            self.exit(130, "interrupted\n")


def positive(kind, or_zero=False):
    """An argparse type: a number of that kind above 0, or 0."""
    def parse(text):
        value = kind(text)
        if not (0 < value < math.inf or or_zero and value == 0):
            raise argparse.ArgumentTypeError(
                f"{text} must be {'0 or more' if or_zero else 'above 0'}")
        return value
    parse.__name__ = kind.__name__
    return parse


def device(text):
    """An argparse type: the name of a device that this machine has."""
    kind, _, index = text.partition(":")
    n = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    if int(index or 0) not in range(n.get(kind, 0)):
        raise argparse.ArgumentTypeError(f"{text}: not on this machine; use cpu, or cuda with GPUs")
    return text


def main(args):
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    model, tokenizer, notes = load(args.model, dtype, args.device, args.prompt_file)
    stream, phases, mixtures = DecodeStream(skip_special_tokens=False), [], []

    def show(kind, token, probs):
        kind, token = kind[0].item(), token[0].item()
        if kind == NONE:
            return
        if args.inspect and FORCED not in phases + [kind]:
            mixtures.append(probs[0])
        phases.append(kind)
        if args.show and kind in (THOUGHT, TOKEN) and FORCED not in phases:
            weights, ids = probs[0].topk(min(args.show, probs.shape[-1]))
            top = "  ".join(f"{tokenizer.decode([i])!r} {w:.3f}"
                            for w, i in zip(weights.tolist(), ids.tolist()))
            print(f"{len(phases):4}  {tokenizer.decode([token])!r:>14}  |  {top}")
        else:
            print(stream.step(tokenizer, token) or "", end="", flush=True)

    start, tau = time.perf_counter(), args.temperature or notes["temperature"][args.mode]
    out = generate(
        model, tokenizer, [notes["prompt"].replace("{question}", args.question)], 1, args.mode,
        greedy=args.greedy, temperature=tau,
        noise_std=noise_std_of(notes, args.noise_scale), noise_at=notes["noise_at"],
        noise_top_k=notes["noise_top_k"],
        cot_len=args.cot_len or notes["cot_len"], answer_len=args.answer_len or notes["answer_len"],
        eos=notes["eos"], seed=(args.seed,), on_step=show, store_thoughts=bool(args.inspect),
        entropy_every=int(bool(args.inspect)))
    seconds, n = time.perf_counter() - start, int(out.length)
    cut = "   (the thought was cut at its budget)" if out.truncated[0] else ""
    print(f"\n\nanswer: {out.answers[0]}{cut}")
    print(f"{n} tokens, {n / seconds:.1f} tokens/s", file=sys.stderr)
    if args.inspect:
        inspect(args.inspect, model, tokenizer, args.question, out, torch.stack(mixtures),
                args.mode, tau, notes["eos"])
        print(f"written to {args.inspect}", file=sys.stderr)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("question")
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--mode", choices=MODES, default="soft")
    parser.add_argument("--greedy", action="store_true", help="no noise, no sampling")
    parser.add_argument("--show", type=positive(int), metavar="K",
                        help="print the K heaviest tokens of each step")
    parser.add_argument("--inspect", metavar="FILE.html", help="write the thought as a page")
    parser.add_common()
    parser.run(main)

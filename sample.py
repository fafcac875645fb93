"""
Think in hard, soft or fuzzy tokens: one decoding loop with one switch.

    python sample.py --model out/soft/best --mode soft "3+4*2-5"
    python sample.py --model path/to/Llama-3.2-3B-Instruct --greedy --show 5 "What is 7 times 8?"
    python sample.py --model out/soft/best --inspect thought.html "3+4*2-5"

or, in Python:

    model, tokenizer = load("out/soft/best")
    row = generate(model, tokenizer, ["3+4*2-5"], "soft").rows[0]
    print(row.cot, row.answer)

A row thinks (COT), is given the words that open the box (FORCED), answers (ANSWER), and is DONE.
Every slot records who chose it: a sampled token, a noisy embedding, or nobody (forced words). The
loss reads this record, so that what is scored is what was sampled.
Dimensions: B live rows, R all rows, Q questions, N slots of a row, V vocabulary, D width.
"""
import argparse
import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from model import InputError, KVCache, Transformer, log_density, read_json, whole

STOP = "The final answer is:"
OPENINGS = (" \\boxed{", f" {STOP} \\boxed{{")  # forced words: after STOP; at the budget's end
MODES = {"hard": 1.0, "soft": 0.5, "fuzzy": 1e-4}  # temperature of the chain of thought (eq. 3)
SETTINGS = [f"{mode}_{how}" for mode in MODES for how in ("greedy", "sample")]
NOTES = {  # how a model thinks, if its soft_tokens.json says nothing else
    "temperature": MODES, "noise_scale": 0.33, "cot_len": 512, "answer_len": 32,
    "prompt": "Below, a User asks one question and an Assistant replies. The Assistant writes out "
              "the complete reasoning, one step after another, and only then gives the final answer"
              " in \\boxed{}. A reply always follows the format 'User: [question] Assistant: "
              "[detailed reasoning] The final answer is: \\boxed{[answer]}.' User: {question} "
              "Assistant:"}

COT, FORCED, ANSWER, DONE = range(4)  # the phases of a row, in the order it passes through them
NOBODY, TOKEN, THOUGHT = range(3)  # who chose a slot: forced words or padding; a token; a mixture
EVAL, TRAIN = 1, 2  # a seed's first number: they draw from different streams
ROUND = 8  # slots between two looks at which rows have finished and which may enter


# ---- Text ------------------------------------------------------------

def read_box(text):
    """The text up to the brace that closes an open \\boxed{, or None: read_box("12}.") == "12"."""
    depth = 1
    for i, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[:i]
    return None


def encode_after(tokenizer, text):
    """The ids of a text that follows other text; at the beginning it may get an extra space."""
    anchor, both = (tokenizer.encode(t, add_special_tokens=False).ids for t in (":", f":{text}"))
    return both[len(anchor):]


def text_of_ids(tokenizer):
    """A function from an id to the text that it adds to other text."""
    anchor = tokenizer.encode("a", add_special_tokens=False).ids[0]  # some decoders strip one space
    skip = len(tokenizer.decode([anchor], skip_special_tokens=False))
    return functools.cache(
        lambda i: tokenizer.decode([anchor, i], skip_special_tokens=False)[skip:])


def encode_prompts(tokenizer, notes, questions, n_new, config):
    """The ids of each question in the prompt, after one BOS if the model knows one. InputError
    where they, with n_new more tokens, do not fit the model."""
    texts, bos = [notes["prompt"].replace("{question}", q) for q in questions], notes["bos"]
    prompts = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    prompts = [ids if ids[:1] == bos else bos + ids for ids in prompts]  # the text may hold it
    longest, context = max(prompts, key=len), config.max_position_embeddings
    if not all(prompts):
        raise InputError("--prompt_file: a question makes an empty prompt; put words around it")
    if len(longest) + n_new > context:
        text = questions[prompts.index(longest)]
        raise InputError(f"--cot_len: a prompt of {len(longest)} tokens and {n_new} more exceed "
                         f"the context of {context}; use less, or leave out {text[:40]!r}")
    if max(map(max, prompts)) >= config.vocab_size:
        raise InputError(f"tokenizer.json: ids beyond vocab_size {config.vocab_size}; use the "
                         "model's own tokenizer")
    return prompts


class Row:
    """One sample as it grows: it reads the text of each new token, and knows what comes next."""

    def __init__(self, place, number, n_samples, notes, openings, seed, device):
        self.place, self.number, self.notes, self.openings = place, number, notes, openings
        self.question, sample = divmod(number, n_samples)
        key = np.random.SeedSequence((*seed, self.question, sample)).generate_state(1, np.uint64)
        self.dice = torch.Generator(device).manual_seed(int(key[0]) >> 1)
        self.phase, self.forced, self.text = COT, [], ""
        self.length = self.cot_len = self.answer_len = 0  # slots in all, of thought and answer
        self.truncated = False  # the thought was ended by its budget
        self.cot = self.answer = self.entropy = None  # filled in when the row is done

    def take(self, token, text):
        """Read a slot's token. Its text only serves to see where a part ends: a character may span
        several tokens, so `cot` and `answer` are decoded from all ids at the end."""
        self.length += self.phase != DONE
        self.text += text
        self.forced = self.forced[1:]
        if self.phase == COT:
            self.cot_len = self.length
            stopped = self.text.rstrip().endswith(STOP)
            if stopped or self.cot_len == self.notes["cot_len"]:
                self.phase, self.truncated = FORCED, not stopped
                self.forced = self.openings[self.truncated]  # the second one says STOP, too
        elif self.phase == FORCED and not self.forced:
            self.phase, self.text = ANSWER, ""
        elif self.phase == ANSWER:
            self.answer_len += 1
            if (read_box(self.text) is not None or token in self.notes["eos"]
                    or self.answer_len == self.notes["answer_len"]):
                self.phase = DONE


# ---- Generation ------------------------------------------------------

@dataclass
class Rollout:
    """R generated rows of N slots, unused ones at the end. Slot 0 follows the prompt. A row that is
    done keeps writing into its first unused slot, which is never read."""
    prompts: list           # Q lists of ids
    of_row: torch.Tensor    # (R,) int64: the prompt of each row
    tokens: torch.Tensor    # (R, N) int64; for a thought its shadow, the argmax of p
    thoughts: torch.Tensor  # (R, N, D): the embeddings that were fed, in the model's dtype; or None
    chosen: torch.Tensor    # (R, N) int64: NOBODY, TOKEN or THOUGHT
    tau: torch.Tensor       # (R, N) float32: the temperature that the slot was drawn at
    logp: torch.Tensor      # (R, N) float32, nats: of the action when it was drawn; 0 if forced
    entropy: torch.Tensor   # (R, N) float32, nats: of softmax(logits), at temperature 1
    rows: list              # R Rows: their texts and lengths


def draw_tokens(probs, uniform):
    """A token per row of probs (B, V), by inverting the cumulative sum at 1 - uniform (B,): first a
    block, then a token of it, as a sum over all of V would cost more than the softmax. No token of
    probability 0 is drawn."""
    blocks = probs.unflatten(-1, (-1, math.gcd(probs.shape[-1], 256)))  # (B, n, V / n)
    ends = blocks.sum(-1).cumsum(-1)  # (B, n)
    target = (1 - uniform)[:, None] * ends[:, -1:]  # above 0
    block = torch.searchsorted(ends, target).clamp(max=ends.shape[1] - 1)  # of NaN: the last
    target = target - F.pad(ends, (1, 0)).gather(-1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, blocks.shape[2]))[:, 0].cumsum(-1)
    place = torch.searchsorted(inside, torch.minimum(target, inside[:, -1:]))  # despite rounding
    return (block * blocks.shape[2] + place.clamp(max=inside.shape[1] - 1))[:, 0]


class Decoder:
    """B rows on the device, and the step that moves all of them on by one slot.

    A step uses tensors that only change() moves, never waits for the device, and has no shape that
    depends on data. So a CUDA graph can record it.
    """

    def __init__(self, model, out, rows, room, mode, greedy, answer_greedy):
        self.model, self.out, self.rows, self.mode = model, out, rows, mode
        self.cot_greedy, self.argmax = greedy, (greedy or mode != "hard", answer_greedy)
        notes, like = rows[0].notes, model.embed_tokens.weight
        self.tau, self.noise_std = notes["temperature"][mode], notes["noise_scale"] * notes["rms"]
        n_normal = 0 if greedy or mode == "hard" else like.shape[1]
        self.noise = torch.zeros(len(rows), 1 + n_normal, device=like.device)  # uniform, normals
        self.hidden = like.new_zeros(len(rows), like.shape[1])  # what chooses the next slot
        self.cache = KVCache(model, len(rows), room)
        self.live = self.cache.last.new_zeros(4, len(rows))  # phase, forced token, place, slot
        self.chooser = torch.tensor([TOKEN if mode == "hard" else THOUGHT, NOBODY, TOKEN, NOBODY],
                                    device=like.device)  # by phase, as is the temperature
        self.taus = torch.tensor([self.tau, 1.0, 1.0, 1.0], device=like.device)
        self.enter(range(len(rows)))

    def enter(self, places):
        """The rows at these places begin, each after its prompt, which is run once for them."""
        places, question = torch.tensor(
            [[i, self.rows[i].question] for i in places], device=self.live.device).T
        asked, of_row = question.unique(return_inverse=True)
        hidden, prompts = self.model.prefill([self.out.prompts[q] for q in asked.tolist()])
        self.hidden[places] = hidden[of_row]
        self.cache.enter(places, prompts, of_row)

    def change(self, waiting):
        """Put waiting rows (a list) in the places of rows that are done, several at once so that
        prompts run together; if none waits, drop those. Returns whether tensors have moved."""
        free, n = [i for i, row in enumerate(self.rows) if row.phase == DONE], len(self.rows)
        if waiting and len(free) >= min(n / 8, len(waiting)):
            for i in (places := free[:len(waiting)]):
                self.rows[i] = waiting.pop(0)
            self.enter(places)
        elif not waiting and len(free) >= n * (0.75 if self.live.is_cuda else 0.25):
            places = [i for i in range(n) if i not in free]
            self.rows, places = [self.rows[i] for i in places], torch.tensor(
                places, dtype=torch.long, device=self.live.device)
            self.cache.keep(places)
            self.hidden, self.noise = self.hidden[places], self.noise[places]
            self.live = self.live[:, places]
            return True
        return False

    def draw(self):
        """The noise of a round, (ROUND, B, 1 + D). Each row has a stream of its own, so batches,
        ranks and neighbours change nothing."""
        size, device = (ROUND, self.noise.shape[1] - 1), self.live.device
        return torch.stack([torch.cat((
            torch.rand(ROUND, 1, generator=row.dice, device=device),
            torch.randn(size, generator=row.dice, device=device)), 1) for row in self.rows], 1)

    def tell(self, noise):
        """Write to the device where every row stands, and what it draws next, (B, 1 + D)."""
        self.live.copy_(torch.tensor([
            (row.phase, row.forced[0] if row.forced else 0, row.place, row.length)
            for row in self.rows]).T)
        self.noise.copy_(noise)

    def step(self, columns):
        """Choose the next slot of every row, record it and feed it; the cache is read up to so many
        columns. Returns the token (B,), the distribution (B, V) and the input (B, D)."""
        model, out, (phase, forced, *at) = self.model, self.out, self.live
        in_cot, at = phase == COT, tuple(at)

        # A distribution, and a token from it
        logits = model.logits(self.hidden)  # (B, V)
        plain = logits.softmax(-1)
        probs = plain if self.tau == 1 else (logits / self.taus[phase, None]).softmax(-1)  # eq. 3
        best = probs.argmax(-1) if any(self.argmax) else None
        drawn = best if all(self.argmax) else draw_tokens(probs, self.noise[:, 0])
        token = torch.where(in_cot, *[best if argmax else drawn for argmax in self.argmax])
        token = torch.where(phase == FORCED, forced, token)
        x = model.embed_tokens(token)  # eq. 4, (B, D)
        chosen, logp = self.chooser[phase], probs.gather(-1, token[:, None])[:, 0].log()
        z, p = (t.gather(-1, token[:, None])[:, 0] for t in (logits, plain))
        entropy = z - p.log() - torch.linalg.vecdot(plain, logits)  # inf where p is 0: never read

        # In its place a thought: the mean embedding, and noise
        if self.mode != "hard":
            mean = model.mixture(probs)  # eq. 5, (B, D) float32
            noise = 0 if self.cot_greedy else self.noise_std * self.noise[:, 1:]
            thought = (mean + noise).to(x.dtype)  # eq. 6; what is scored is what is fed
            x = torch.where(in_cot[:, None], thought, x)
            logp = torch.where(in_cot, log_density(thought.float(), mean, self.noise_std), logp)

        # The record, and the next hidden state
        out.tokens[at], out.chosen[at], out.entropy[at] = token, chosen, entropy
        out.tau[at], out.logp[at] = self.taus[phase], logp.masked_fill(chosen == NOBODY, 0)
        if out.thoughts is not None:
            out.thoughts[at] = x
        self.cache.columns = columns
        self.hidden.copy_(model.forward(x[:, None], self.cache)[:, 0])
        return token, probs, x


class Recorded:
    """A step that is run again and again: on a GPU one launch of a CUDA graph, not a thousand.

    A graph is a list of kernels with the addresses that they read and write. So nothing may move,
    no shape may change, and noise must be drawn outside. For each argument, the first call runs
    plainly, the second is recorded, and this and all later ones replay the record.
    """
    refused = False  # by --no_cuda_graphs, or by a record that failed

    def __init__(self, step, on_gpu):
        self.step, self.on_gpu = step, on_gpu and not Recorded.refused
        self.forget()

    def forget(self):
        """Drop all records, as tensors have moved. The next ones share a new scratch memory."""
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle() if self.on_gpu else None

    def __call__(self, key):
        if not self.on_gpu or key not in self.graphs:
            self.graphs[key] = None
            return self.step(key)
        if self.graphs[key] is None:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
                    self.graphs[key] = graph, self.step(key)
            except RuntimeError as e:
                print(f"decoding goes on without CUDA graphs: {e}", file=sys.stderr)
                torch.cuda.set_stream(stream)  # a capture that fails may leave its own
                self.on_gpu, Recorded.refused = False, True
                return self.step(key)
        graph, result = self.graphs[key]
        graph.replay()
        return result


@torch.no_grad()
def generate(model, tokenizer, questions, mode="soft", n_samples=1, *, notes=None, greedy=False,
             answer_greedy=True, seed=(EVAL, 0), rows=None, batch=None, store_thoughts=False,
             on_step=lambda *_: None, on_finish=lambda row: None):
    """Think and answer: n_samples rows for each of Q questions (strings). Returns a Rollout.

    mode           "hard", "soft" or "fuzzy"; greedy: argmax tokens, or thoughts without noise
    answer_greedy  False in training, where answers are samples at temperature 1 (eq. 8)
    notes          the prompt, budgets, temperatures and noise, as in load(); default the model's
    seed           whole numbers; a row depends only on them, its question's number and its own
    rows           which rows, ascending (row = question n_samples + sample); default all
    batch          most rows at a time, others enter as these finish; default all at once
    on_step        called as on_step(rows, tokens, probs (B, V), inputs (B, D)) at every slot
    on_finish      called with each Row when it is done
    Raises InputError for a prompt that does not fit the model's context.
    """
    notes, like = notes or model.notes, model.embed_tokens.weight
    device, on_gpu = like.device, like.device.type == "cuda"
    openings = [encode_after(tokenizer, words) for words in OPENINGS]
    N = notes["cot_len"] + max(map(len, openings)) + notes["answer_len"] + 1
    prompts = encode_prompts(tokenizer, notes, questions, N, model.config)
    numbers = range(len(questions) * n_samples) if rows is None else rows
    rows = [Row(i, n, n_samples, notes, openings, seed, device) for i, n in enumerate(numbers)]
    zeros = torch.zeros(len(rows), N, device=device)
    out = Rollout(
        prompts, torch.tensor([row.question for row in rows], device=device), zeros.long(),
        like.new_zeros(*zeros.shape, like.shape[1]) if store_thoughts else None, zeros.long(),
        zeros + 1, zeros.clone(), zeros + math.nan, rows)

    block = 256 if on_gpu else 8  # the cache is read in blocks of so many columns
    room = -(-(max(map(len, prompts)) + N) // block) * block
    text_of, batch = text_of_ids(tokenizer), batch or len(rows)
    waiting = rows[batch:]
    decoder = Decoder(model, out, rows[:batch], room, mode, greedy, answer_greedy)
    step = Recorded(decoder.step, on_gpu)
    while decoder.rows:
        used = max(len(prompts[row.question]) + row.length for row in decoder.rows) + ROUND
        for noise in decoder.draw():
            decoder.tell(noise)
            token, probs, x = step(min(room, -(-used // block) * block))
            tokens = token.tolist()  # here the host waits for the device
            on_step(decoder.rows, tokens, probs, x)
            for row, i in zip(decoder.rows, tokens):
                row.take(i, text_of(i))

        for row in [row for row in decoder.rows if row.phase == DONE and row.cot is None]:
            ids, n = out.tokens[row.place].tolist(), row.cot_len
            row.cot, row.entropy = tokenizer.decode(ids[:n]), out.entropy[row.place, :n].tolist()
            row.answer = read_box(tokenizer.decode(ids[n:row.length]).split("\\boxed{", 1)[-1])
            on_finish(row)
        if decoder.change(waiting):
            step.forget()
    return out


# ---- Loading, and the command line -----------------------------------

def load(path, dtype=torch.float32, device="cpu", prompt_file=None, prepare=None):
    """A checkpoint directory as (model, tokenizer). model.notes says how it thinks: NOTES, changed
    by its soft_tokens.json; "rms" of the base model's embeddings; "bos" and "eos", lists of
    ids. prepare: as in Transformer.from_pretrained. Raises InputError."""
    path = Path(path)
    model = Transformer.from_pretrained(path, dtype, device, prepare)
    where = model.embed_tokens.weight.device
    if where.type == "cuda":
        torch.cuda.set_device(where)  # CUDA graphs record what runs on the current one
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN would plan anew for every shape
        # Sums over V must not depend on the number of rows, or scoring would differ from sampling
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    elif model.config.hidden_size < 256:
        torch.set_num_threads(1)  # more would wait for each other
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as e:  # the library raises bare Exceptions
        raise InputError(f"{path}/tokenizer.json: {e}; give a fast tokenizer's") from None
    tokenizer.no_padding()  # transformers may have left these there
    tokenizer.no_truncation()
    generation, said, saved = (
        read_json(path / name) if (path / name).exists() else {} for name in (
            "generation_config.json", "tokenizer_config.json", "soft_tokens.json"))
    eos = generation.get("eos_token_id", model.config.raw.get("eos_token_id"))
    special, plain = (tokenizer.encode("a", add_special_tokens=b).ids for b in (True, False))
    bos = special[:special.index(plain[0])]
    if said.get("add_bos_token") and not bos:  # then tokenizer.json does not say it
        token = said.get("bos_token")
        token = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else str(token))
        bos = [] if token is None else [token]
    room = model.config.max_position_embeddings // 2
    model.notes = notes = NOTES | {"cot_len": min(NOTES["cot_len"], room)} | saved | {
        "bos": bos, "eos": eos if isinstance(eos, list) else [] if eos is None else [eos]}
    if prompt_file:
        notes["prompt"] = read_prompt(prompt_file, tokenizer)
    if "rms" not in notes:  # over real vocabulary rows: padding would make it smaller
        table = whole(model.embed_tokens.weight.detach())[:tokenizer.get_vocab_size()]
        notes["rms"] = table.float().square().mean().sqrt().item()
    tau, lengths = notes["temperature"], [notes["cot_len"], notes["answer_len"]]
    numbers = [*lengths, notes["noise_scale"], notes["rms"]]
    numbers += map(tau.get, MODES) if isinstance(tau, dict) else [None]
    if not ("{question}" in (notes["prompt"] if isinstance(notes["prompt"], str) else "")
            and all(type(n) in (int, float) and 1e-9 < n < 1e9 for n in numbers)
            and all(type(n) is int for n in lengths)):
        raise InputError(f"{path}/soft_tokens.json: it needs a prompt with {{question}}, a "
                         "temperature for each mode, and lengths, rms and noise above 0; mend it")
    return model, tokenizer


def read_prompt(path, tokenizer):
    """The template in a text file, without the newline that editors add. After a special token, as
    in a chat template, that newline belongs to the prompt."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as e:
        raise InputError(f"--prompt_file {path}: {e}; give a text file in UTF-8") from None
    if "{question}" not in text:
        raise InputError(f"--prompt_file {path}: no {{question}} in it; put it where that belongs")
    last = text.rstrip("\n").rpartition("\n")[2].rpartition("{question}")[2]
    added = tokenizer.get_added_tokens_decoder().values()
    return text if any(t.special and t.content in last for t in added) else text.rstrip("\n")


def notes_with(notes, args, mode):
    """notes, changed by the flags that were given."""
    names = ("cot_len", "answer_len", "noise_scale")
    given = {name: getattr(args, name) or notes[name] for name in names}
    tau = notes["temperature"] | {mode: args.temperature or notes["temperature"][mode]}
    return notes | given | {"temperature": tau}


class Parser(argparse.ArgumentParser):
    """argparse with one-line complaints and the flags that all scripts share."""

    def __init__(self, doc, needs_model=False):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        add = self.add_argument_group("model and thinking").add_argument
        add("--model", metavar="DIR", required=needs_model,
            help="checkpoint directory, as on the hub; or one of ours, like out/soft/best")
        add("--prompt_file", metavar="FILE", help="text with {question} that replaces the prompt")
        add("--cot_len", type=positive(int), help="budget of the thought, in tokens")
        add("--answer_len", type=positive(int), help="budget of the answer, in tokens")
        add("--temperature", type=positive(float),
            help="tau of the thought; default 1 (hard), 0.5 (soft), 0.0001 (fuzzy)")
        add("--noise_scale", type=positive(float),
            help="sigma over the root mean square of the embeddings; default 0.33")
        add = self.add_argument_group("machine").add_argument
        add("--seed", type=positive(int, or_zero=True), default=0, help="default 0")
        add("--dtype", choices=["float32", "bfloat16"], help="of the computation")
        gpus = ["cuda"] * torch.cuda.is_available()
        gpus += map("cuda:{}".format, range(torch.cuda.device_count()))
        add("--device", choices=[*gpus, "cpu"] + ["mps"] * torch.backends.mps.is_available(),
            default=[*gpus, "cpu"][0], help="default cuda if there is a GPU, else cpu")
        add("--no_cuda_graphs", action="store_true", help="launch each kernel by itself on a GPU")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def run(self, main):
        """main(args); a user's mistake or an OSError ends in one line and status 2."""
        args = self.parse_args()
        Recorded.refused = args.no_cuda_graphs
        try:
            return main(args)
        except (InputError, OSError) as e:
            self.error(str(e))
        except torch.OutOfMemoryError as e:
            self.error(f"out of memory: {str(e).splitlines()[0]} Use a smaller --micro_batch or "
                       "--batch, or --activation_checkpointing")
        except KeyboardInterrupt:
            self.exit(130, "interrupted\n")


def positive(kind, or_zero=False):
    """An argparse type: a number of that kind above 0, or also 0, and not astronomical."""
    def parse(text):
        if 1e-9 < kind(text) < 2 ** 32 or or_zero and kind(text) == 0:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is out of range; use a usual number above 0")
    parse.__name__ = kind.__name__
    return parse


def dtype_of(args):
    return getattr(torch, args.dtype or ("bfloat16" if args.device[:4] == "cuda" else "float32"))


def inspect(args, model, tokenizer, row, steps):
    """Write main()'s steps as a page, args.inspect: assets/thought.html with the data in it. With
    noise, a step also shows how far it moved the input, and the tokens that are nearest now."""
    text_of, noisy, shown = text_of_ids(tokenizer), args.mode != "hard" and not args.greedy, []
    table = model.embed_tokens.weight.detach()[:tokenizer.get_vocab_size()]  # less its padding
    length = table.norm(dim=1).float().clamp(min=1e-9)  # (V,)
    for (word, top, fed, mean), entropy in zip(steps, row.entropy):
        lists = {"tokens by weight": top, f"entropy at temperature 1: {entropy:.3f} nats": []}
        if noisy:
            moved = (fed - mean).norm() / mean.norm()
            cosine, ids = ((table @ fed.to(table)).float() / length / fed.norm()).topk(3)
            lists[f"noise: {moved:.3f} of the mixture's length"] = []
            lists["nearest tokens, by cosine"] = [*zip(map(text_of, ids.tolist()), cosine.tolist())]
        shown.append({"word": word, "entropy": entropy, "lists": lists})
    data = json.dumps({"question": args.question, "answer": row.answer, "steps": shown, "how": {
        "mode": args.mode, "temperature tau": row.notes["temperature"][args.mode], "noise scale":
        row.notes["noise_scale"] if noisy else 0, "seed": args.seed, "model": args.model}})
    page = (Path(__file__).parent / "assets" / "thought.html").read_text(encoding="utf-8")
    page = page.replace("/*THOUGHT*/null", data.replace("<", "\\u003c"))  # "</script>" ends nothing
    Path(args.inspect).write_text(page, encoding="utf-8")


def main(args):
    if args.inspect:
        Path(args.inspect).touch()  # what cannot be written is noticed now
    model, tokenizer = load(args.model, dtype_of(args), args.device, args.prompt_file)
    notes, text_of, steps = notes_with(model.notes, args, args.mode), text_of_ids(tokenizer), []

    def show(rows, tokens, probs, x):
        word, phase = text_of(tokens[0]), rows[0].phase
        if phase == COT:
            top = zip(*(t.tolist() for t in probs[0].topk(min(args.show or 6, probs.shape[1]))))
            top = [(text_of(i), p) for p, i in top]
            steps.append((word, top, x[0].float().clone(), model.mixture(probs[0])))
            if args.show:
                heaviest = "  ".join(f"{text!r} {p:.3f}" for text, p in top)
                word = f"{len(steps):4}  {word!r:>14}  |  {heaviest}\n"
        print(word if phase != DONE else "", end="", flush=True)
    row = generate(model, tokenizer, [args.question], args.mode, notes=notes, greedy=args.greedy,
                   seed=(EVAL, args.seed), on_step=show).rows[0]
    cut = "   (the thought was cut at its budget)" if row.truncated else ""
    print(f"\n\nanswer: {row.answer}{cut}")
    if args.inspect:
        inspect(args, model, tokenizer, row, steps)


if __name__ == "__main__":
    parser = Parser(__doc__, needs_model=True)
    parser.add_argument("question", help="in quotes")
    parser.add_argument("--mode", choices=MODES, default="soft", help="default soft")
    parser.add_argument("--greedy", action="store_true", help="no noise, no sampling")
    parser.add_argument("--show", type=positive(int), metavar="K", help="print each step's top K")
    parser.add_argument("--inspect", metavar="FILE.html", help="write the thought as a page")
    parser.run(main)

"""train.py: the reward, the advantage, what is scored, and that the gradient is the policy gradient."""
import itertools
import json
import math
import random
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import random_model

from eval import ARITHMETIC, load_problems
from model import InputError
from sample import MODES, NONE, generate, load
from train import (MOMENTS, PLAN_PROMPT_LEN, checkpoints, distribute, hold_out, learning_rate, memory,
                   newest_checkpoint, pack, point, questions_of_step, reference_rollout, restore, reward, rloo,
                   save_checkpoint, score, written_problem)

PROMPTS = ["User: 3+4*2 Assistant:", "User: 7-9 Assistant:"]


def test_reward_is_100_10_or_0():
    assert reward("\\frac{1}{2}", "0.5") == 100 and reward("3", "0.5") == 10 and reward(None, "0.5") == 0
    assert reward("", "0.5") == 10


def test_rloo_equals_the_hand_worked_table():
    rewards = torch.tensor([[100.0, 10.0, 10.0, 0.0], [10.0, 10.0, 10.0, 10.0]])
    # row 0: 100 - 20/3, 10 - 110/3, the same, 0 - 120/3
    expected = torch.tensor([[100 - 20 / 3, 10 - 110 / 3, 10 - 110 / 3, -40.0], [0, 0, 0, 0]])
    torch.testing.assert_close(rloo(rewards), expected)


def test_rloo_baseline_leaves_the_sample_itself_out():
    a = rloo(torch.tensor([[5.0, 1.0, 2.0]]))
    b = rloo(torch.tensor([[9.0, 1.0, 2.0]]))
    assert b[0, 0] - a[0, 0] == 4  # the baseline of a sample does not depend on its own reward


# What is scored is what was sampled

def rollout_of(tiny, mode, **changes):
    model, tokenizer, _ = tiny
    options = dict(cot_len=7, answer_len=3, eos=[1], noise_std=0.1, answer_greedy=False, store_thoughts=True, seed=(4,))
    return generate(model, tokenizer, PROMPTS, 6, mode, **options | changes)


def scored(model, rollout, rows, weight=1.0, tau=1.0, noise_std=0.1):
    """score() with its log-probs themselves: the loss, logp and that at sampling (b, N), and where they count."""
    rows = torch.tensor(rows)
    loss, delta, used = score(model, rollout, rows, torch.full((len(rows),), weight), tau, noise_std)
    sampled = rollout.logp[rows, :delta.shape[1]]
    return loss, sampled + delta, sampled, used


@pytest.mark.parametrize("mode", MODES)
def test_log_prob_at_sampling_equals_log_prob_in_training(tiny, mode):
    with torch.no_grad():
        tiny[0].norm.weight.mul_(5)  # at tau = 0.0001 a near-tie magnifies rounding; decided logits have none
    rollout = rollout_of(tiny, mode)
    for rows in ([*range(12)], [3], [11, 0, 5]):  # any padding, any micro-batch
        _, logp, sampled, chosen = scored(tiny[0], rollout, rows, tau=MODES[mode])
        assert chosen.sum() > 4 * len(rows)
        torch.testing.assert_close(logp[chosen], sampled[chosen], atol=1e-4, rtol=1e-4)


ELSEWHERE = [("hidden", 0), ("logits", 0), ("logits", 5)]  # noise_at, noise_top_k


@pytest.mark.parametrize("noise_at, top_k", ELSEWHERE)
def test_log_prob_at_sampling_equals_training_with_the_noise_elsewhere(noise_at, top_k, tiny):
    rollout = rollout_of(tiny, "soft", noise_at=noise_at, noise_top_k=top_k, noise_std=0.7)
    width = {"hidden": 64, "logits": top_k or 24}[noise_at]
    assert rollout.thoughts.shape[-1] == width and (rollout.support is None) == (top_k == 0)
    for rows in ([*range(12)], [11, 0, 5]):
        _, logp, sampled, chosen = scored(tiny[0], rollout, rows, tau=0.5, noise_std=0.7)
        torch.testing.assert_close(logp[chosen], sampled[chosen], atol=1e-3, rtol=1e-4)
        thinks = chosen & (rollout.kind[rows, :chosen.shape[1]] == 2)
        z = logp[thinks] + width * math.log(0.7 * math.sqrt(2 * math.pi))  # -|noise|^2 / 2, of mean -width / 2
        assert z.mean() == pytest.approx(-width / 2, rel=0.4) and z.max() < 0


def test_log_prob_at_sampling_equals_training_at_another_temperature(tiny):
    rollout = rollout_of(tiny, "hard", temperature=0.7)
    _, logp, sampled, chosen = scored(tiny[0], rollout, [*range(12)], tau=0.7)
    torch.testing.assert_close(logp[chosen], sampled[chosen], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(scored(tiny[0], rollout, [*range(12)])[1], logp, atol=1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_action_is_scored_as_it_was_fed(tiny, mode):
    tiny[0].to(torch.bfloat16)
    rollout = rollout_of(tiny, mode)
    assert rollout.thoughts is None or rollout.thoughts.dtype == torch.bfloat16
    _, logp, sampled, chosen = scored(tiny[0], rollout, [*range(12)], tau=MODES[mode])
    assert (logp - sampled)[chosen].abs().median() < 0.1


def test_pack_holds_each_prompt_once_and_the_slots_of_its_rows(tiny):
    rollout = rollout_of(tiny, "soft")
    for rows, n_prompts in (([7, 2, 8], 2), ([9, 6], 1)):
        prompts, of_row, tokens, thoughts, _, kind, in_cot, _ = pack(rollout, torch.tensor(rows))
        assert len(prompts) == n_prompts
        for i, r in enumerate(rows):
            n, c = int(rollout.length[r]), int(rollout.cot_len[r])
            assert prompts[of_row[i]] == tiny[1].encode(PROMPTS[r // 6]).ids
            assert torch.equal(tokens[i, :n], rollout.tokens[r, :n]) and torch.equal(kind[i, :n], rollout.kind[r, :n])
            assert (kind[i, n:] == NONE).all() and thoughts.shape[:2] == tokens.shape
            assert torch.equal(thoughts[i, :c], rollout.thoughts[r, :c])
            assert in_cot[i].nonzero()[:, 0].tolist() == [*range(c)]


def test_prefilled_tokens_have_no_weight_and_the_last_token_has(tiny):
    rollout = rollout_of(tiny, "hard")
    _, logp, _, chosen = scored(tiny[0], rollout, [*range(12)])
    for r in range(12):
        c, n = int(rollout.cot_len[r]), int(rollout.length[r])
        forced = int((rollout.kind[r] == 3).sum())
        assert forced and not chosen[r, c:c + forced].any() and (logp[r, c:c + forced] == 0).all()
        assert chosen[r, n - 1] and logp[r, n - 1] < 0  # the token that ended the answer


def test_end_of_sequence_token_gets_gradient(tiny):
    model, tokenizer, notes = tiny
    rollout = reference_rollout([{"question": "1+1", "answer": "2", "solution": "1+1=2"}], tokenizer, notes, "cpu")
    assert rollout.tokens[0, -1] == notes["eos"][0]
    _, logp, _, chosen = scored(model, rollout, [0])
    assert chosen[0, -1] and logp[0, -1] < 0


def test_supervised_loss_is_the_cross_entropy_of_the_solution(tiny):
    model, tokenizer, notes = tiny
    problems = [{"question": "1+1", "answer": "2", "solution": "1+1=2"}, {"question": "1+1*3", "answer": "6", "solution": "1"}]
    rollout = reference_rollout(problems, tokenizer, notes, "cpu")
    n = int(rollout.length.sum())
    loss, *_ = scored(model, rollout, [0, 1], weight=-1 / n)
    total = 0.0
    for p in problems:
        prompt = tokenizer.encode(f"User: {p['question']} Assistant:").ids
        text = tokenizer.encode(f" {p['solution']} The final answer is: \\boxed{{{p['answer']}}}.").ids + notes["eos"]
        logits = model.logits(model(torch.tensor([prompt + text])))[0, len(prompt) - 1:-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(text), reduction="sum")
    torch.testing.assert_close(loss, total / n)


# The policy gradient

def test_no_gradient_flows_through_stored_thoughts(tiny):
    rollout = rollout_of(tiny, "soft")
    rollout.thoughts.requires_grad_()
    loss, *_ = scored(tiny[0], rollout, [0, 1, 2], tau=0.5)
    loss.backward()
    assert rollout.thoughts.grad is None or not rollout.thoughts.grad.any()
    assert tiny[0].embed_tokens.weight.grad.abs().sum() > 0


def small_policy(tied):
    """A float64 model of width 2, so that the noise can be integrated on a grid."""
    model = random_model(vocab_size=4, hidden_size=2, intermediate_size=6, num_hidden_layers=1, num_attention_heads=1,
                         num_key_value_heads=1, head_dim=2, tie_word_embeddings=tied, rms_norm_eps=1.0, std=0.8).double()
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("noise_at, top_k", [("embedding", 0), ("hidden", 0), ("logits", 0), ("logits", 2)])
def test_soft_policy_gradient_is_the_gradient_of_the_expected_reward(noise_at, top_k, tied):
    """One thought and one answer token: J = sum over noise (Gauss-Hermite) and answers of pi R, differenced numerically,
    against the score-function gradient of eq. 8-10 in the same expectation."""
    model, tau, sigma = small_policy(tied), 0.5, 0.4
    prompt, R = torch.tensor([1, 3, 0]), torch.tensor([100.0, 10.0, 0.0, 40.0], dtype=torch.float64)
    width = 4 if (noise_at, top_k) == ("logits", 0) else 2
    x, w = np.polynomial.hermite.hermgauss(40 if width == 2 else 14)
    nodes = torch.tensor([*itertools.product(x, repeat=width)]) * math.sqrt(2)  # (n, width) standard normals
    mass = torch.tensor([math.prod(c) for c in itertools.product(w, repeat=width)]) / math.pi ** (width / 2)
    support = None

    def distribution():
        hidden = model(prompt[None])[0, -1]
        head, embed = model.lm_head.weight, model.embed_tokens.weight
        if noise_at == "embedding":
            thoughts = (head @ hidden / tau).softmax(-1) @ embed + sigma * nodes  # eq. 6
            fed = thoughts
        elif noise_at == "hidden":
            thoughts = hidden + sigma * nodes
            fed = (thoughts @ head.T / tau).softmax(-1) @ embed
        else:
            ids = torch.arange(4) if support is None else support
            thoughts = (head @ hidden)[ids] + sigma * nodes
            fed = (thoughts / tau).softmax(-1) @ embed[ids]
        inputs = torch.cat((embed[prompt].expand(len(nodes), 3, 2), fed[:, None]), 1)
        return thoughts, (model(inputs)[:, -1] @ head.T).softmax(-1)  # (n, width), (n, V)
    if top_k:
        support = (model.lm_head.weight @ model(prompt[None])[0, -1]).topk(2).indices

    def expected_reward():
        with torch.no_grad():
            return (mass[:, None] * distribution()[1] * R).sum().item()

    with torch.no_grad():
        thoughts, answers = distribution()
    n = len(nodes) * 4
    tokens = torch.arange(4).repeat(len(nodes))[:, None].expand(n, 2)
    stored = torch.zeros(n, 2, width, dtype=torch.float64)
    stored[:, 0] = thoughts.repeat_interleave(4, 0)
    is_thought = torch.tensor([True, False]).expand(n, 2)
    weight = -(mass[:, None] * answers * R).view(n, 1).expand(n, 2)  # the probability of each case times -R
    of_row = torch.zeros(n, dtype=torch.long)
    loss, _ = model.log_prob([prompt.tolist()], of_row, tokens, stored, is_thought, weight,
                             torch.where(is_thought, tau, 1.0), sigma, noise_at=noise_at,
                             support=None if support is None else support.expand(n, 2, 2))
    loss.backward()

    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=g, dtype=torch.float64)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                p.add_(step * direction)
                values.append(expected_reward())
                p.sub_(step * direction)
        slope = (values[0] - values[1]) / 2e-5
        assert -(p.grad * direction).sum().item() == pytest.approx(slope, rel=1e-3, abs=1e-4), name


def test_hard_policy_gradient_is_the_gradient_of_the_expected_reward():
    """Two tokens, all 16 cases enumerated."""
    model, prompt = small_policy(True), torch.tensor([1, 3, 0])
    cases = torch.tensor([*itertools.product(range(4), repeat=2)])
    R = torch.linspace(0, 100, 16, dtype=torch.float64)

    def probabilities():
        rows = torch.cat((prompt.expand(16, 3), cases), 1)
        logp = (model(rows) @ model.lm_head.weight.T).log_softmax(-1)[:, 2:4]
        return logp.gather(-1, cases[..., None]).sum((1, 2)).exp()
    expected = torch.autograd.grad((probabilities() * R).sum(), [*model.parameters()])
    weight = -(probabilities().detach() * R)[:, None].expand(16, 2)
    loss, _ = model.log_prob([prompt.tolist()], torch.zeros(16, dtype=torch.long), cases, None,
                             torch.zeros(16, 2, dtype=torch.bool), weight, 1.0, None)
    loss.backward()
    for p, e in zip(model.parameters(), expected):
        torch.testing.assert_close(-p.grad, e)


def test_baseline_does_not_change_the_expected_gradient_but_its_variance(tiny):
    """RLOO is unbiased: over all reward patterns of independent samples its mean advantage is R - E[R]."""
    p = torch.tensor([0.2, 0.5, 0.3])
    R = torch.tensor([100.0, 10.0, 0.0])
    expected = torch.zeros(3)  # E[A; outcome], summed over the first sample's outcomes
    for outcome in itertools.product(range(3), repeat=3):
        o = list(outcome)
        expected[o[0]] += p[o].prod() * rloo(R[o][None])[0, 0]
    torch.testing.assert_close(expected, p * (R - (p * R).sum()))


# Weights and checkpoints

def test_bfloat16_training_accumulates_in_float32_masters():
    model = random_model()
    masters = distribute(model, torch.bfloat16, "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {m.dtype for m in masters.values()} == {torch.float32}
    ids = torch.randint(61, (2, 5))
    grads = []
    for _ in range(2):
        loss, _ = model.log_prob([[1, 2]], torch.tensor([0, 0]), ids, None, torch.zeros(2, 5, dtype=torch.bool),
                                 torch.ones(2, 5), 1.0, None)
        loss.backward()
        assert all(p.grad is None for p in model.parameters())
        grads.append({k: m.grad.clone() for k, m in masters.items()})
    for k in masters:
        assert grads[0][k].dtype == torch.float32 and grads[0][k].abs().sum() > 0
        torch.testing.assert_close(grads[1][k], 2 * grads[0][k])


def training(path, dtype=torch.float32):
    """(model, float32 masters, AdamW, notes) of a checkpoint directory."""
    model, _, notes = load(path)
    masters = distribute(model, dtype, "cpu")
    return model, masters, torch.optim.AdamW(masters.values(), lr=1e-2, fused=True), notes


def update(model, masters, optimizer):
    """One step of a made-up supervised loss."""
    tokens = torch.tensor([[3, 4, 5, 6]])
    loss, _ = model.log_prob([[1, 2]], torch.tensor([0]), tokens, None, torch.zeros(1, 4, dtype=torch.bool),
                             -torch.ones(1, 4), 1.0, None)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    for p, m in zip(model.parameters(), masters.values()):
        p.data.copy_(m.detach())


def save_in(out, step, trained, source, dtype="float32"):
    *parts, notes = trained
    save_checkpoint(out / f"step-{step:06d}", *parts, {"step": step}, source, notes, Namespace(dtype=dtype))
    return out / f"step-{step:06d}"


def test_saved_checkpoint_is_an_ordinary_one_that_transformers_and_its_tokenizer_load(tiny, tiny_dir, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    trained = training(tiny_dir)
    for _ in range(2):  # the second one replaces the first
        update(*trained[:3])
        path = save_in(tmp_path, 1, trained, tiny_dir, "bfloat16")
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    peer = transformers.AutoModelForCausalLM.from_pretrained(path)
    peer_tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    text = "User: 1+2 Assistant: 1+2=3 The final answer is: \\boxed{3}."
    _, tokenizer, notes = tiny
    assert peer_tokenizer(text).input_ids == tokenizer.encode(text).ids
    assert peer_tokenizer.decode(peer_tokenizer(text).input_ids) == text
    assert peer_tokenizer.eos_token_id == peer.generation_config.eos_token_id == notes["eos"][0]
    assert peer.dtype == torch.bfloat16
    again, _, loaded = load(path)
    ids = torch.tensor([tokenizer.encode(text).ids])
    with torch.no_grad():
        torch.testing.assert_close(peer.float()(ids).logits, again.logits(again(ids)), atol=2e-4, rtol=0)
    assert loaded["rms"] == notes["rms"] and loaded["prompt"] == notes["prompt"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_restored_training_goes_on_bit_for_bit(dtype, tiny_dir, tmp_path):
    trained = training(tiny_dir, getattr(torch, dtype))
    for _ in range(3):
        update(*trained[:3])
    path = save_in(tmp_path, 3, trained, tiny_dir, dtype)
    restored = training(path, getattr(torch, dtype))
    assert restore(path, *restored[1:3]) == {"step": 3, "updates": 3}
    for _ in range(2):
        update(*trained[:3])
        update(*restored[:3])
    for (name, a), b in zip(trained[1].items(), restored[1].values()):
        assert torch.equal(a, b), name
        assert all(torch.equal(trained[2].state[a][k], restored[2].state[b][k]) for k in ("step", *MOMENTS))


def test_failed_save_leaves_the_checkpoint_before_it_and_nothing_else(tiny_dir, tmp_path, monkeypatch):
    trained = training(tiny_dir)
    before = save_in(tmp_path, 1, trained, tiny_dir)

    def fail(*_, **__):
        raise OSError("no space left on device")
    monkeypatch.setattr("train.on_disk", fail)
    with pytest.raises(OSError):
        save_in(tmp_path, 2, trained, tiny_dir)
    assert [*tmp_path.iterdir()] == checkpoints(tmp_path) == [before] and newest_checkpoint(tmp_path) == before


@pytest.mark.parametrize("file", ["model.safetensors", "training/masters.safetensors", "training/exp_avg.safetensors",
                                  "training/state.json", "training/manifest.json", "config.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_damaged_checkpoint_is_named_and_gone_around(file, harm, tiny_dir, tmp_path, capsys):
    trained = training(tiny_dir)
    update(*trained[:3])
    first, second = (save_in(tmp_path, step, trained, tiny_dir) for step in (1, 2))
    assert newest_checkpoint(tmp_path) == second
    victim, content = second / file, (second / file).read_bytes()
    if harm == "flip":
        victim.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif harm == "truncate":
        victim.write_bytes(content[:-9])
    else:
        victim.unlink()
    assert newest_checkpoint(tmp_path) == first
    assert str(second) in capsys.readouterr().err
    (first / file).unlink()
    with pytest.raises(InputError, match="every checkpoint"):
        newest_checkpoint(tmp_path)
    save_in(tmp_path, 2, trained, tiny_dir)  # the damaged one is replaced
    assert newest_checkpoint(tmp_path) == second


def test_link_to_the_best_is_replaced(tmp_path):
    for name in ("step-000001", "step-000002"):
        (tmp_path / name).mkdir()
        point(tmp_path / "best", tmp_path / name)
        assert (tmp_path / "best").resolve() == (tmp_path / name).resolve()
    (tmp_path / "best.new").symlink_to("step-000001")  # left over by a kill
    point(tmp_path / "best", tmp_path / "step-000001")
    assert (tmp_path / "best").resolve().name == "step-000001" and not (tmp_path / "best.new").is_symlink()


# Where the gradient comes from, and what is kept for it

def gradient(model, rollout, mode, source=None):
    model.zero_grad()
    g = torch.Generator().manual_seed(0)
    loss, *_ = score(model, rollout, torch.arange(12), torch.randn(12, generator=g), MODES[mode], 0.1, source)
    loss.backward()
    return {name: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", MODES)
def test_gradient_sources_add_up_to_the_gradient(mode, tiny):
    model, rollout = tiny[0], rollout_of(tiny, mode)
    whole = gradient(model, rollout, mode)
    sources = ("logits", "embedding", "answer") if mode != "hard" else ("logits", "answer")
    parts = {source: gradient(model, rollout, mode, source) for source in sources}
    for name, g in whole.items():
        torch.testing.assert_close(sum(p[name] for p in parts.values()), g, atol=1e-4 * float(g.abs().max()), rtol=1e-4)
    assert all(any(g.any() for g in p.values()) for p in parts.values())
    if mode != "hard":  # E directly: no other parameter
        assert {name for name, g in parts["embedding"].items() if g.any()} == {"embed_tokens.weight"}


def test_activation_checkpointing_changes_no_gradient(tiny):
    model, rollout = tiny[0], rollout_of(tiny, "soft")
    plain = gradient(model, rollout, "soft")
    model.activation_checkpointing = True
    for name, g in gradient(model, rollout, "soft").items():
        torch.testing.assert_close(g, plain[name], msg=name)


# Schedules and data

def test_learning_rate_warms_up_and_follows_a_cosine():
    args = Namespace(lr=2.0, warmup=4, steps=12)
    rates = [learning_rate(s, args) for s in range(13)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0) and rates[12] == pytest.approx(0.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_no_question_of_validation_is_trained_on():
    problems = [{"question": str(n // 2), "answer": str(n)} for n in range(40)]  # each question is there twice
    val, rest = hold_out(problems, 8)
    questions = [[p["question"] for p in part] for part in (val, rest)]
    assert len(val) == 8 and not set(questions[0]) & set(questions[1])
    assert set(questions[0]) | set(questions[1]) == {str(n) for n in range(20)}
    assert len(rest) == 40 - 2 * len(set(questions[0]))
    assert hold_out(problems, 8) == (val, rest) and hold_out(problems, 40)[1] == []


def test_questions_of_steps_go_through_the_data_in_a_new_order_each_epoch():
    problems = [{"n": i} for i in range(10)]
    drawn = [p["n"] for step in range(5) for p in questions_of_step(problems, step, 4, seed=3)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == [*range(10)] and drawn[:10] != drawn[10:]
    assert drawn[8:12] == [p["n"] for p in questions_of_step(problems, 2, 4, seed=3)]


def test_written_problems_are_half_careful_and_never_of_val_or_test():
    rng = random.Random(0)
    problems = [written_problem(rng) for _ in range(3000)]
    assert 0.45 < sum(p["solution"][1] in "+-*" for p in problems) / len(problems) < 0.55  # arithmetic, arithmetic100
    steps = [s for p in problems for s in p["solution"].split(";") if s[1] == "*"]
    misread = [s for s in steps if int(s[4]) != int(s[0]) * int(s[2]) % 10]
    assert all(int(s[4]) == (int(s[0]) + int(s[2])) % 10 for s in misread)
    same = sum(a * b % 10 == (a + b) % 10 for a in range(10) for b in range(10)) / 100
    assert len(misread) / len(steps) == pytest.approx((1 - same) / 2, abs=0.03)
    known = {p["question"] for task in ARITHMETIC for split in ("val", "test") for p in load_problems(task, split, 512)}
    assert not known & {p["question"] for p in problems}


def test_tiny_model_is_what_the_readme_says(tiny_dir):
    model, tokenizer, _ = load(tiny_dir)
    assert 140_000 < sum(p.numel() for p in model.parameters()) < 160_000
    assert tokenizer.get_vocab_size() == model.config.vocab_size
    text = " 3+4=7;7*2=4 The final answer is: \\boxed{4}."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    with pytest.raises(InputError):
        load(tiny_dir / "nothing")
    assert json.loads((tiny_dir / "soft_tokens.json").read_text())["prompt"] == "User: {question} Assistant:"


# The plan of memory

@pytest.mark.parametrize("again", [False, True], ids=["", "activation_checkpointing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plan_counts_what_is_kept_for_the_backward_pass(dtype, again):
    """The tensors that autograd saves in each layer, counted one by one, against the formula."""
    P, b, N = PLAN_PROMPT_LEN, 4, 40
    wide = dict(hidden_size=64, intermediate_size=200, num_attention_heads=4, num_key_value_heads=2, head_dim=16)

    def saved(n_layers):
        model, kept = random_model(num_hidden_layers=n_layers, **wide).to(dtype), {}
        model.activation_checkpointing = again
        parameters = {p.data_ptr() for p in model.parameters()}

        def count(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            tokens, none = torch.ones(b, N, dtype=torch.long), torch.zeros(b, N, dtype=torch.bool)
            model.log_prob([[1] * P], none[:, 0].long(), tokens, None, none, torch.ones(b, N), 1.0, None)
        in_cache = 2 * 32 * dtype.itemsize * (P + b * N) * n_layers if again else 0  # held by the KVCache itself
        return in_cache + sum(n for n, _ in kept.values())
    args = Namespace(dtype=str(dtype).removeprefix("torch."), device="cpu", cot_len=N - 12 - 4, answer_len=4, prompts=1,
                     samples=b, mode="hard", activation_checkpointing=again)
    more, fewer = (memory(args, random_model(num_hidden_layers=n, **wide), 1, b)["activations"] for n in (3, 2))
    assert more - fewer == pytest.approx(saved(3) - saved(2), rel=0.1)


def test_plan_shares_the_weights_among_ranks(tmp_path):
    args = Namespace(dtype="bfloat16", device="cuda", cot_len=128, answer_len=32, prompts=2, samples=32, mode="soft",
                     activation_checkpointing=False)
    model = random_model(num_hidden_layers=3)
    one, eight = (memory(args, model, ranks, 8) for ranks in (1, 8))
    n = sum(p.numel() for p in model.parameters())
    assert one["optimizer"] == 8 * n and eight["optimizer"] == n and one["weights"] == 4 * n
    assert one["copy that generates"] == eight["copy that generates"] == 2 * n > eight["copy that scores"]
    assert one["thoughts"] == 8 * eight["thoughts"] == 64 * 128 * 32 * 2
    sizes = [memory(args, model, 1, b)["peak"] for b in (1, 8, 64)]
    assert sizes[0] < sizes[1] < sizes[2]

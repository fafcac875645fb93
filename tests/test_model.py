"""model.py: the cache, the fused log-probs, the checkpoints; each against something independent."""
import json
import math

import pytest
import torch
from conftest import random_config, random_model
from safetensors.torch import load_file, save_file

from model import Config, InputError, KVCache, Transformer, WeightedLogProb, attend, rope_frequencies, softmax_

FAMILIES = {
    "llama": {},
    "llama tied, biased": dict(tie_word_embeddings=True, qkv_bias=True, o_bias=True, mlp_bias=True),
    "llama linear rope": dict(rope={"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}),
    "llama3 rope": dict(rope={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
    "llama wide heads": dict(head_dim=20),
    "qwen2": dict(model_type="qwen2", qkv_bias=True),
    "qwen2 tied": dict(model_type="qwen2", qkv_bias=True, tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", qk_norm=True, head_dim=16),
}


def noisy_norms_and_biases(model):
    """Move the norms away from 1 and the biases away from 0, so that leaving one out is seen."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model



# The cache

def whole_rows(prompts, of_row, tails):
    return [torch.cat((torch.tensor(prompts[q]), tail)) for q, tail in zip(of_row, tails)]


PROMPT_IDS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 5, 8, 9]]
OF_ROW = [2, 0, 0, 1, 2, 0]  # ragged groups, out of order


@torch.no_grad()
def decode(model, cache, tails, steps):
    return torch.cat([model(tails[:, t:t + 1], cache) for t in steps], 1)


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize("device_has_the_fused_kernel", [True, False])
def test_decoding_behind_shared_prompts_equals_each_row_alone(heads, device_has_the_fused_kernel, monkeypatch):
    if not device_has_the_fused_kernel:  # the formulas that other devices use
        monkeypatch.setattr("model.attend", lambda *args: attend(*args, fused=False))
    model = random_model(num_attention_heads=heads[0], num_key_value_heads=heads[1])
    tails = torch.randint(61, (6, 9))
    last, cache = model.read(PROMPT_IDS)
    cache.block = 4  # grows on the way
    cache = cache.branch(torch.tensor(OF_ROW))
    out = decode(model, cache, tails, range(9))
    for row, q, ids in zip(out, OF_ROW, whole_rows(PROMPT_IDS, OF_ROW, tails)):
        full = model(ids[None])[0]
        torch.testing.assert_close(row, full[-9:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(last[q], full[len(PROMPT_IDS[q]) - 1], atol=1e-5, rtol=1e-5)


def test_several_positions_at_once_equal_one_by_one():
    model, tails = random_model(), torch.randint(61, (6, 9))
    for parts in ([9], [4, 5], [1, 3, 1, 4]):
        _, cache = model.read(PROMPT_IDS)
        cache = cache.branch(torch.tensor(OF_ROW))
        out = torch.cat([model(part, cache) for part in tails.split(parts, 1)], 1)
        for row, ids in zip(out, whole_rows(PROMPT_IDS, OF_ROW, tails)):
            torch.testing.assert_close(row, model(ids[None])[0, -9:], atol=1e-5, rtol=1e-5)


def test_rows_leave_and_others_enter_a_cache_and_decode_as_alone():
    model, tails = random_model(), torch.randint(61, (6, 9))
    _, cache = model.read(PROMPT_IDS)
    cache = cache.branch(torch.tensor(OF_ROW))
    decode(model, cache, tails, range(3))
    kept = torch.tensor([5, 0, 4])  # prompts 0 and 2 remain
    cache.keep(kept)
    assert len(cache.prompt_len) == 2
    out = decode(model, cache, tails[kept], range(3, 5))
    for row, ids in zip(out, [whole_rows(PROMPT_IDS, OF_ROW, tails)[i] for i in kept]):
        torch.testing.assert_close(row, model(ids[None])[0, -6:-4], atol=1e-5, rtol=1e-5)

    long, entering = [[*range(20, 31)]], torch.randint(61, (2, 9))  # a prompt longer than all others
    _, other = model.read(long)
    other = other.branch(torch.tensor([0, 0]))
    cache.join(other)
    now = torch.cat((tails[kept, 5:8], entering[:, :3]))
    out = decode(model, cache, now, range(3))
    for row, ids in zip(out[:3], [whole_rows(PROMPT_IDS, OF_ROW, tails)[i] for i in kept]):
        torch.testing.assert_close(row, model(ids[None])[0, -4:-1], atol=1e-5, rtol=1e-5)
    for row, ids in zip(out[3:], whole_rows(long, [0, 0], entering)):
        torch.testing.assert_close(row, model(ids[None])[0, 11:14], atol=1e-5, rtol=1e-5)

    cache.keep(torch.tensor([4, 3]))  # the old rows leave, with their columns
    assert cache.length == 3 and len(cache.prompt_len) == 1
    out = decode(model, cache, entering.flip(0), range(3, 9))
    for row, ids in zip(out.flip(0), whole_rows(long, [0, 0], entering)):
        torch.testing.assert_close(row, model(ids[None])[0, -6:], atol=1e-5, rtol=1e-5)


def test_prompts_of_unequal_length_run_as_each_alone_and_padding_is_finite():
    model = random_model()
    cache = KVCache(torch.tensor([9, 4, 1]))
    ids = torch.randint(61, (3, 9))
    out = model(ids, cache)
    assert out.isfinite().all()
    for row, hidden, n in zip(ids, out, (9, 4, 1)):
        torch.testing.assert_close(hidden[-n:], model(row[None, -n:])[0], atol=1e-5, rtol=1e-5)


def test_embeddings_as_input_equal_their_token_ids():
    model, ids = random_model(), torch.randint(61, (2, 5))
    torch.testing.assert_close(model(model.embed_tokens(ids)), model(ids))


# The fused soft-embedding path

def plain_log_prob(hidden, lm_head, embed, action, tau, noise_std):
    """The formulas of eq. 3 and 10, written with torch's own distributions."""
    logits = hidden @ lm_head.T / tau[:, None]
    if action.dim() == 1:
        return torch.distributions.Categorical(logits=logits).log_prob(action)
    mean = torch.distributions.Categorical(logits=logits).probs @ embed
    return torch.distributions.Normal(mean, noise_std).log_prob(action).sum(-1)


def fused_case(thought, dtype=torch.float64, n=7, v=11, d=5):
    g = torch.Generator().manual_seed(3)
    hidden, lm_head, embed = (torch.randn(*s, dtype=dtype, generator=g, requires_grad=True)
                              for s in ((n, d), (v, d), (v, d)))
    action = torch.randn(n, d, dtype=dtype, generator=g) if thought else torch.randint(v, (n,), generator=g)
    weight, tau = torch.randn(n, dtype=dtype, generator=g), torch.rand(n, dtype=dtype, generator=g) + 0.3
    return hidden, lm_head, embed, action, weight, tau


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("thought", [False, True])
def test_fused_log_prob_equals_plain_formula_and_passes_gradcheck(thought, tied, monkeypatch):
    monkeypatch.setattr(WeightedLogProb, "CHUNK", 3)  # seven rows: two whole chunks and a part
    hidden, lm_head, embed, action, weight, tau = fused_case(thought)
    embed = lm_head if tied else embed
    loss, logp = WeightedLogProb.apply(hidden, lm_head, embed, action, weight, tau, 0.7, True)
    plain = plain_log_prob(hidden, lm_head, embed, action, tau, 0.7)
    torch.testing.assert_close(logp, plain.detach())
    torch.testing.assert_close(loss, (weight * plain).sum())
    inputs = (hidden, lm_head) if tied or not thought else (hidden, lm_head, embed)
    ours = torch.autograd.grad(3 * loss, inputs)
    theirs = torch.autograd.grad(3 * (weight * plain).sum(), inputs)
    torch.testing.assert_close(ours, theirs)

    def fused(h, w, e=None):
        return WeightedLogProb.apply(h, w, w if tied else embed if e is None else e, action, weight, tau, 0.7, True)[0]
    assert torch.autograd.gradcheck(fused, inputs)


def test_fused_path_keeps_no_table_of_rows_by_vocabulary():
    """Extra memory of 4096 rows at V = 49152 is at most a quarter of the plain formula's (counted by the allocator)."""
    n, v, d = 4096, 49152, 16

    def peak(run):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
            run()
        live = most = 0
        for event in sorted((e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"),
                            key=lambda e: e.start_ns()):
            live += event.nbytes()
            most = max(most, live)
        return most
    hidden, table = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    thought, weight, tau = torch.randn(n, d), torch.randn(n), torch.ones(n)
    grads = 4 * v * d  # the weights' gradient buffer, which both need
    fused = peak(lambda: WeightedLogProb.apply(hidden, table, table, thought, weight, 1.0, 0.5, True)[0].backward())
    hidden.grad = table.grad = None
    plain = peak(lambda: (weight * plain_log_prob(hidden, table, table, thought, tau, 0.5)).sum().backward())
    assert plain > 2 * 4 * n * v  # the measurement sees the logits and the softmax
    assert fused - grads < 0.25 * (plain - grads), (fused, plain)


def test_derivative_by_logits_is_the_formula_of_the_paper():
    """d log pi / d logits_i = p_i (e_i - h0) . eps / (sigma tau) for a sampled thought h0 + sigma eps."""
    g = torch.Generator().manual_seed(0)
    logits, embed, eps = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((9,), (9, 4), (4,)))
    tau, sigma = 0.5, 0.3
    p = (logits / tau).softmax(-1)
    h0 = p @ embed
    expected = p * ((embed - h0) @ eps) / (sigma * tau)
    lm_head, hidden = logits[:, None], torch.ones(1, 1, dtype=torch.float64)  # logits = hidden @ lm_head.T
    lm_head.requires_grad_()
    action = (h0 + sigma * eps)[None]
    ones = torch.ones(1, dtype=torch.float64)
    loss, _ = WeightedLogProb.apply(hidden, lm_head, embed, action, ones, tau, sigma, True)
    torch.testing.assert_close(torch.autograd.grad(loss, lm_head)[0][:, 0], expected)


def test_softmax_in_place():
    z = torch.randn(5, 300) * 30
    expected = z.double().softmax(-1).float()
    assert softmax_(z) is z
    torch.testing.assert_close(z, expected)


def test_soft_embedding_is_the_expected_embedding():
    model = random_model()
    probs = torch.zeros(1, 61)
    probs[0, 3], probs[0, 7] = 0.25, 0.75
    expected = 0.25 * model.embed_tokens.weight[3] + 0.75 * model.embed_tokens.weight[7]
    torch.testing.assert_close(model.soft_embedding(probs)[0], expected)


# Checkpoints

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dialect", ["rope_parameters", "rope_theta"])
def test_logits_equal_transformers(family, dialect, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = noisy_norms_and_biases(random_model(**FAMILIES[family]))
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    gone = {"rope_parameters": ["rope_theta", "rope_scaling"], "rope_theta": ["rope_parameters"]}[dialect]
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in gone}))
    peer, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    ids = torch.randint(61, (2, 100))
    with torch.no_grad():
        theirs = peer(ids).logits
        assert theirs.std() > 0.1
        torch.testing.assert_close(model.logits(model(ids)), theirs, atol=2e-4, rtol=0)
        again = Transformer.from_pretrained(tmp_path)
        torch.testing.assert_close(again.logits(again(ids)), theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_written_by_transformers_loads(family, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    first, second = tmp_path / "ours", tmp_path / "theirs"
    model = noisy_norms_and_biases(random_model(**FAMILIES[family]))
    model.save_pretrained(first)
    transformers.AutoModelForCausalLM.from_pretrained(first).save_pretrained(second, max_shard_size="20KB")
    again = Transformer.from_pretrained(second)
    assert (second / "model.safetensors.index.json").exists()
    for (name, a), b in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(a, b), name
    assert again.config == model.config


def test_llama3_rope_slows_long_waves_only():
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 100}
    plain = rope_frequencies(random_config(head_dim=32))
    slowed = rope_frequencies(random_config(head_dim=32, rope=rope))
    turns = 100 * plain / (2 * math.pi)
    torch.testing.assert_close(slowed[turns > 4], plain[turns > 4])
    torch.testing.assert_close(slowed[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any() and ((slowed < plain) & (slowed > plain / 8))[between].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_saved_model_loads_equal_in_its_dtype(dtype, tmp_path):
    model = random_model(tie_word_embeddings=True).to(dtype)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = Transformer.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.lm_head.weight is again.embed_tokens.weight
    assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), again.parameters()))


def test_loading_in_bfloat16_keeps_rotary_angles_in_float32(tmp_path):
    random_model().save_pretrained(tmp_path)
    model = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.frequencies.dtype == torch.float32 == model.to(torch.bfloat16).frequencies.dtype


@pytest.mark.parametrize("damage, named", [
    (lambda t: t.pop("model.norm.weight"), "norm.weight"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), "q_proj.bias"),
    (lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(47, 32)}), "up_proj.weight"),
    (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "norm.weight"),
    (lambda t: t.pop("lm_head.weight"), "lm_head.weight"),
])
def test_loader_names_the_tensor_that_is_missing_extra_or_misshapen(damage, named, tmp_path):
    random_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=named):
        Transformer.from_pretrained(tmp_path)


def test_loader_accepts_harmless_extras(tmp_path):
    random_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, named", [
    ({"model_type": "mixtral"}, "mixtral"), ({"model_type": "qwen3_moe"}, "qwen3_moe"),
    ({"quantization_config": {"quant_method": "gptq"}}, "gptq"), ({"hidden_act": "gelu"}, "gelu"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"use_sliding_window": True, "max_window_layers": 0}, "use_sliding_window"),
    ({"layer_types": ["sliding_attention", "full_attention"]}, "use_sliding_window"),
    ({"hidden_size": ...}, "hidden_size"),
])
def test_unsupported_configuration_is_refused_by_name(change, named, tmp_path):
    random_model().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    with pytest.raises(InputError, match=named):
        Config.from_json(tmp_path / "config.json")


def test_sliding_window_that_is_switched_off_is_fine(tmp_path):
    random_model(model_type="qwen2", qkv_bias=True).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert Config.from_json(tmp_path / "config.json").model_type == "qwen2"


@pytest.mark.parametrize("content", ["", "{", "[1, 2"])
def test_broken_config_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="config.json"):
        Transformer.from_pretrained(tmp_path)

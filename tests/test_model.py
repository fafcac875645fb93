"""model.py: the transformer, its caches, the fused log-probs, the checkpoints; each against something independent."""
import json
import math

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file
from torch.distributions import Categorical, MultivariateNormal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import InputError, KVCache, Transformer, WeightedLogProb

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
FAMILIES = {  # changes of config.json, in the words of older and of newer versions of transformers
    "llama tied, biased": dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rms_norm_eps=0.01),
    "llama linear rope": dict(rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 4.0}, head_dim=20),
    "llama3 rope": dict(rope_theta=500000.0, rope_scaling=LLAMA3, torch_dtype="bfloat16"),
    "llama3 rope, newer": dict(rope_parameters=LLAMA3 | {"rope_theta": 500000.0}),
    "qwen2": dict(model_type="qwen2", max_window_layers=2, sliding_window=4096, use_sliding_window=True),
    "qwen2 tied": dict(model_type="qwen2", tie_word_embeddings=True, num_key_value_heads=1, rope_theta=1e6),
    "qwen3": dict(model_type="qwen3", head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})}
OTHERS = dict(bos_token_id=3, eos_token_id=[1, 2], pad_token_id=None, architectures=["Any"], a_key_of_tomorrow={"x": 1})


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_checkpoints_agree_with_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, ids = random_model(**OTHERS | FAMILIES[family]), torch.randint(61, (2, 100))
    for p in model.parameters():
        if p.dim() == 1:  # a norm or a bias: were it left out, it would be seen
            p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    first, second, third = (tmp_path / name for name in ("ours", "theirs", "ours again"))
    model.save_pretrained(first)
    peer, found = transformers.AutoModelForCausalLM.from_pretrained(first, dtype="float32", output_loading_info=True)
    assert not any(found.values()), found
    peer.save_pretrained(second, max_shard_size="20KB")  # several files, and the newer words
    assert (second / "model.safetensors.index.json").exists()
    Transformer.from_pretrained(second).save_pretrained(third)
    with torch.no_grad():
        assert (expected := peer(ids).logits).std() > 0.1
        for ours in (model, *map(Transformer.from_pretrained, (first, second, third))):
            torch.testing.assert_close(ours.logits(ours(ids)), expected, atol=2e-4, rtol=0)
    for path, source in ((first, model.config.raw), (third, json.loads((second / "config.json").read_text()))):
        key = "torch_dtype" if "torch_dtype" in source else "dtype"
        assert json.loads((path / "config.json").read_text()) == source | {key: "float32"}  # every key, and no other
        assert (path / "model.safetensors").stat().st_mode == (path / "config.json").stat().st_mode


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (6, 1)])
@torch.no_grad()
def test_rows_continue_prompts_as_if_alone(heads):
    """All positions of a row at once, as in training, and one by one. test_sample.py lets rows enter and leave."""
    model = random_model(num_attention_heads=heads[0], num_key_value_heads=heads[1]).double()
    prompts, of_row = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 5, 8, 9]], [2, 0, 0, 1, 2, 0]  # unequal groups, out of order
    tails, (last, cached), cache = torch.randint(61, (6, 9)), model.prefill(prompts), KVCache(model, 6, room=24)
    alone = [model(torch.tensor([prompts[q] + tail.tolist()]))[0] for q, tail in zip(of_row, tails)]
    expected = torch.stack([hidden[-9:] for hidden in alone])
    torch.testing.assert_close(last[of_row], torch.stack([hidden[-10] for hidden in alone]))
    torch.testing.assert_close(model(tails, cached.before(torch.tensor(of_row))), expected)
    cache.enter(torch.arange(6), cached, torch.tensor(of_row))
    cache.columns = 24
    torch.testing.assert_close(torch.cat([model(x, cache) for x in tails.split(1, dim=1)], dim=1), expected)


# The fused soft-embedding path

def formula(hidden, lm_head, embed, action, tau, noise_std):
    """eq. 3 and 10, written with torch's own distributions."""
    policy = Categorical(logits=hidden @ lm_head.T / tau[..., None])
    if not action.is_floating_point():
        return policy.log_prob(action)
    covariance = noise_std ** 2 * torch.eye(embed.shape[1], dtype=embed.dtype)
    return MultivariateNormal(policy.probs @ embed, covariance).log_prob(action)


def slots(thought, n=7, v=11, d=5, dtype=torch.float64):
    """hidden, lm_head, embed, action, weight and tau of n slots."""
    g = torch.Generator().manual_seed(3)
    hidden, lm_head, embed, action = (torch.randn(k, d, dtype=dtype, generator=g) for k in (n, v, v, n))
    weight, tau = torch.randn(n, dtype=dtype, generator=g), torch.rand(n, dtype=dtype, generator=g) + 0.3
    action = action if thought else torch.randint(v, (n,), generator=g)
    return *(x.requires_grad_() for x in (hidden, lm_head, embed)), action, weight, tau


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("thought", [False, True])
def test_fused_log_prob_equals_autograd_and_finite_differences(thought, tied, monkeypatch):
    hidden, lm_head, embed, action, weight, tau = slots(thought)
    embed = lm_head if tied else embed
    inputs = (hidden, lm_head) if tied or not thought else (hidden, lm_head, embed)
    plain = formula(hidden, lm_head, embed, action, tau, 0.7)
    expected = torch.autograd.grad(3 * (weight * plain).sum(), inputs)
    for n in (1, 3, 7, 100):  # slots of a chunk: 3 leaves two whole chunks and a part
        monkeypatch.setattr(WeightedLogProb, "CHUNK_BYTES", 4 * 11 * n)
        loss, logp = WeightedLogProb.apply(hidden, lm_head, embed, action, weight, tau, 0.7)
        torch.testing.assert_close(logp, plain.detach())
        torch.testing.assert_close(loss, (weight * plain).sum())
        torch.testing.assert_close(torch.autograd.grad(3 * loss, inputs), expected)
    assert torch.autograd.gradcheck(lambda h, w, e=embed: WeightedLogProb.apply(
        h, w, w if tied else e, action, weight, tau, 0.7)[0], inputs)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes."""
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, *(x.untyped_storage().nbytes() for x in tree_leaves(out) if torch.is_tensor(x)), 0)
        return out


@pytest.mark.parametrize("thought", [False, True])
def test_fused_path_never_holds_a_table_of_slots_by_vocabulary(thought, monkeypatch):
    hidden, lm_head, embed, action, weight, tau = slots(thought, n=100, v=1000, d=4, dtype=torch.float32)
    monkeypatch.setattr(WeightedLogProb, "CHUNK_BYTES", 4 * 1000 * 9)
    with Largest() as largest:
        WeightedLogProb.apply(hidden, lm_head, embed, action, weight, tau, 0.7)[0].backward()
    assert largest.bytes == 4 * 1000 * 9


# Checkpoints that are not what they should be: one line that names what is wrong

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"
NORM, HEAD, EMBED = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def change(path, **changes):
    """Change config.json; a key that becomes ... goes."""
    raw = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def only(path, *names):
    """Leave only these files; "name/" is a folder, and config.json keeps its content."""
    for file in path.iterdir():
        file.unlink() if file.name not in names else None
    for name in {*names} - {"config.json"}:
        (path / name).mkdir() if name.endswith("/") else (path / name).write_text("{}")


def prefix(tensors, text):
    for key in [*tensors]:
        tensors[text + key] = tensors.pop(key)


DAMAGE = [  # what happens to a directory p and its tensors t; what the message says
    (lambda p, t: t.pop(NORM), "1 tensors are missing, the first is norm.weight"),
    (lambda p, t: t.update({NORM: torch.ones(31)}), "norm.weight .*31.*32"),
    (lambda p, t: t[Q_PROJ].view(-1)[5].fill_(math.nan), "q_proj.weight .*NaN"),
    (lambda p, t: change(p, tie_word_embeddings=True), "tied twin"),
    (lambda p, t: change(p, rope_theta=-1.0), "rope_theta -1.0"), (lambda p, t: change(p, rms_norm_eps=-1), "eps -1"),
    (lambda p, t: change(p, num_hidden_layers=0), "num_hidden_layers 0"),
    (lambda p, t: (p / "model.safetensors").write_text(POINTER), "git lfs pull"),
    (lambda p, t: (only(p, "config.json"), (p / "model.safetensors").symlink_to("gone")), "not readable"),
    (lambda p, t: only(p, "adapter_config.json", "adapter_model.safetensors"), "adapter"),
    (lambda p, t: only(p, "snapshots/", "blobs/", "refs/"), "snapshots/"),
    (lambda p, t: only(p, "config.json", "model-Q4_K.gguf"), "GGUF"),
    (lambda p, t: only(p, "config.json", "pytorch_model-00001-of-00002.bin"), "pickled"),
    (lambda p, t: only(p, "config.json", "training_args.bin"), "all model\\*.safetensors of the checkpoint$"),
    (lambda p, t: t.update({"score.weight": t.pop(HEAD)[:1].clone()}), "score.weight.*reward model"),
    (lambda p, t: prefix(t, "_orig_mod."), "compiled"), (lambda p, t: prefix(t, "language_model."), "multimodal"),
    *((lambda p, t, x=x: (p / "config.json").write_text(x), "config.json: ") for x in ("", "[1, 2]", POINTER)),
    *((lambda p, t, changes=changes: change(p, **changes), f"config.json: .*{[*changes][0]}") for changes in (
        {"model_type": "mixtral"}, {"quantization_config": {"quant_method": "gptq"}}, {"hidden_act": "gelu"},
        {"rope_type": 0, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, {"hidden_size": ...},
        {"use_sliding_window": True, "max_window_layers": 0}, {"num_key_value_heads": 3}, {"head_dim": 7}))]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_damaged_checkpoint_is_refused_in_one_line(number, tmp_path):
    random_model().save_pretrained(tmp_path)
    file, (damage, named) = tmp_path / "model.safetensors", DAMAGE[number]
    tensors, before = {key: tensor.clone() for key, tensor in load_file(file).items()}, file.stat().st_mtime_ns
    damage(tmp_path, tensors)
    if file.exists() and file.stat().st_mtime_ns == before:
        save_file(tensors, file)
    with pytest.raises(InputError, match=named) as caught:
        Transformer.from_pretrained(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("form", [
    lambda t: t.update({HEAD: t[EMBED].clone()}), lambda t: t.update({HEAD: t.pop(EMBED)}), lambda t: prefix(t, "m."),
    lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})])
def test_usual_forms_of_a_tied_checkpoint_load(form, tmp_path):
    model = random_model(tie_word_embeddings=True).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert HEAD not in (tensors := load_file(tmp_path / "model.safetensors"))
    form(tensors)
    save_file({key.replace("m.model.", ""): x for key, x in tensors.items()}, tmp_path / "model.safetensors")
    again = Transformer.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.embed_tokens.weight and again.norm.weight.dtype == torch.float32
    assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

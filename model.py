"""
A Llama / Qwen2 / Qwen3 transformer, its KV cache, its checkpoints, and the soft-token arithmetic.

    model = Transformer.from_pretrained("path/to/checkpoint", dtype=torch.bfloat16, device="cuda")
    hidden = model(ids)            # ids (B, T) or embeddings (B, T, D) -> (B, T, D)
    logits = model.logits(hidden)  # (B, T, V) float32
    last, cache = model.read(prompts)  # each prompt once, for all rows that will continue it
    thought = model.soft_embedding(logits.softmax(-1))  # p E, without noise, (B, T, D) float32

Equation numbers are those of "Soft Tokens, Hard Truths" (arXiv 2509.19170).
Dimensions: Q prompts, P their positions, B rows, T new positions, S a row's own positions in the
cache, V vocabulary, D width, H heads, N scored positions. Parameters are named as in a Hugging Face
checkpoint, less the prefix "model.".
"""
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


class InputError(Exception):
    """A user's mistake; its message, all a script prints, names the file or flag, value and fix."""


# --------------------------------------------------------------------------------------------------
# Configuration: what config.json says, in one dialect

LARGEST = {  # more than any model has, less than what would fill a machine before an error
    "vocab_size": 2 ** 21, "hidden_size": 2 ** 16, "intermediate_size": 2 ** 18,
    "num_hidden_layers": 2 ** 9, "num_attention_heads": 2 ** 10, "num_key_value_heads": 2 ** 10,
    "head_dim": 2 ** 10, "max_position_embeddings": 2 ** 25}
ROPE_TYPES = {  # and what each needs in config.json
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings")}


@dataclass
class Config:
    """What shapes a dense Llama, Qwen2 or Qwen3 model: keys of config.json, under their names."""
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    rope: dict = field(default_factory=dict)  # rope_parameters of transformers 5: "rope_type", ...
    qkv_bias: bool = False  # the three places where the families differ: biases ...
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False   # ... and an RMSNorm on every query and key head

    @classmethod
    def from_json(cls, path):
        """Read config.json, with rope_theta and rope_scaling or transformers 5's rope_parameters.

        Raises InputError, naming the file, for what this code would get wrong if it went on: other
        architectures, quantised weights, sliding windows that are switched on, unknown rope types,
        sizes that are absurd or do not go together.
        """
        raw = read_json(path)
        try:
            return cls.parse(raw, path)
        except KeyError as e:
            raise InputError(f"{path}: {e.args[0]} is missing; "
                             "give the config.json of a Llama or Qwen model") from None
        except (AttributeError, TypeError, ValueError) as e:  # a word where a number belongs
            raise InputError(f"{path}: not as a config.json is ({e}); "
                             "download the file again") from None

    @classmethod
    def parse(cls, raw, path):
        """The Config in a dict; `path` names it in errors."""
        def refuse(key, value, supported):
            raise InputError(f"{path}: {key} {value!r} is not supported; "
                             f"use a checkpoint with {supported}")

        family = raw.get("model_type")
        if family not in ("llama", "qwen2", "qwen3"):
            refuse("model_type", family, "model_type llama, qwen2 or qwen3")
        for key, largest in LARGEST.items():
            derived = key in ("num_key_value_heads", "head_dim") and raw.get(key) is None
            value = raw.get(key, 1)
            if not derived and not (isinstance(value, int) and 1 <= value <= largest):
                refuse(key, value, f"a whole number from 1 to {largest}")
        if quantised := raw.get("quantization_config"):
            refuse("quantization_config", quantised.get("quant_method"), "unquantised weights")
        if raw.get("hidden_act", "silu") != "silu":
            refuse("hidden_act", raw["hidden_act"], "hidden_act silu")
        full_layers, n_layers = raw.get("max_window_layers", 28), raw["num_hidden_layers"]
        windowed = raw.get("use_sliding_window") and full_layers < n_layers
        if windowed or "sliding_attention" in (raw.get("layer_types") or []):
            refuse("use_sliding_window", True, "full attention in every layer")

        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope = {"rope_theta": raw.get("rope_theta", 10000.0)} | rope
        rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
        if rope["rope_type"] not in ROPE_TYPES:
            refuse("rope_type", rope["rope_type"], f"rope_type {', '.join(ROPE_TYPES)}")
        numbers = rope | {"rms_norm_eps": raw.get("rms_norm_eps", 1e-6)}
        for key in ("rms_norm_eps", "rope_theta", *ROPE_TYPES[rope["rope_type"]]):
            if not 0 < numbers[key] < math.inf:
                refuse(key, numbers[key], "a number above 0")
        partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1))
        if partial != 1:
            refuse("partial_rotary_factor", partial, "rotary embedding on whole heads")

        heads = raw["num_attention_heads"]
        bias = bool(raw.get("attention_bias", False))
        required = ("model_type", "vocab_size", "hidden_size", "intermediate_size",
                    "num_hidden_layers", "num_attention_heads")
        optional = ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
        config = cls(
            **{key: raw[key] for key in required},
            **{key: raw[key] for key in optional if key in raw},
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or (
                128 if family == "qwen3" else raw["hidden_size"] // heads),
            qkv_bias=bias or family == "qwen2", o_bias=bias and family != "qwen2",
            mlp_bias=family == "llama" and raw.get("mlp_bias", False),
            qk_norm=family == "qwen3", rope=rope)
        if config.head_dim < 2 or config.head_dim % 2:
            refuse("head_dim", config.head_dim, "an even one: rotary embedding turns pairs")
        if heads % config.num_key_value_heads:
            refuse("num_key_value_heads", config.num_key_value_heads, f"a divisor of {heads} there")
        return config

    def to_json(self):
        """The dict that from_json and transformers 4 and 5 read back."""
        same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "head_dim", "model_type", "num_key_value_heads",
                "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
        name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[self.model_type]
        scaling = None if self.rope["rope_type"] == "default" else self.rope
        out = {key: getattr(self, key) for key in same}
        out |= {"architectures": [f"{name}ForCausalLM"], "hidden_act": "silu",
                "use_sliding_window": False, "rope_parameters": self.rope,
                "rope_theta": self.rope["rope_theta"], "rope_scaling": scaling}
        if self.model_type != "qwen2":
            out["attention_bias"] = self.qkv_bias
        return out | ({"mlp_bias": self.mlp_bias} if self.model_type == "llama" else {})


def read_json(path):
    """The object in a JSON file; a missing or broken one is an InputError that names it."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        return content
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a checkpoint is the directory of config.json, a "
                         "result the file that --out named") from None
    except (ValueError, OSError, RecursionError) as e:
        raise InputError(f"{path}: not readable as JSON ({e}); download the file again") from None


# --------------------------------------------------------------------------------------------------
# The fused soft-embedding path

def log_density(thought, mean, noise_std):
    """eq. 10: log N(thought; mean, noise_std^2 I) of (..., D) in nats, summed over D."""
    constant = mean.shape[-1] * math.log(noise_std * math.sqrt(2 * math.pi))
    return -(thought - mean).square().sum(-1) / (2 * noise_std ** 2) - constant


def softmax_(z):
    """softmax(z) over the last dimension, in the place of z: a second (B, V) costs time too."""
    z -= z.amax(-1, keepdim=True)
    return z.exp_().div_(z.sum(-1, keepdim=True))


def add_product(out, a, b):
    """out (V, D) += a^T b of (n, V) and (n, D); on a CPU by blocks of rows, which stay in its cache
    between the product and the addition."""
    block = 1024 if out.device.type == "cpu" else len(out)
    for i in range(0, len(out), block):
        out[i:i + block] += a[:, i:i + block].T @ b


class WeightedLogProb(torch.autograd.Function):
    """sum_n weight_n log pi(action_n | hidden_n) and every log pi, never holding an (N, V) tensor.

    A policy gradient knows the weight of every log-prob beforehand: it is minus the advantage. So
    each chunk of rows forms its gradients while its softmax is at hand, instead of computing the
    softmax again in the backward pass. With z = h W^T / tau and p = softmax(z) (eq. 3):
      token a:   log pi = z_a - logsumexp(z)                                    d/dz = onehot(a) - p
      thought a: log pi = -|a - p E|^2 / (2 sigma^2) - D log(sigma sqrt(2 pi))  (eq. 10)
                 with r = (a - p E) / sigma^2:
                 d/dE = p^T r,   d/dp = r E^T,   d/dz = p * (d/dp - sum(p * d/dp))
    """
    CHUNK = 256

    @staticmethod
    def forward(ctx, hidden, lm_head, embed, action, weight, temperature, noise_std, with_grad):
        """hidden (N, D); lm_head, embed (V, D), the same tensor if tied; action (N,) int64 tokens
        or (N, D) thoughts; weight (N,); temperature float or (N,); noise_std float.
        Returns the weighted sum and logp (N,), in float32."""
        wide, narrow = torch.promote_types(hidden.dtype, torch.float32), hidden.dtype
        is_thought, tied = action.dim() == 2, lm_head is embed
        logp = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        if with_grad:
            grad_hidden = torch.empty_like(hidden)
            grad_head = torch.zeros_like(lm_head, dtype=wide)
            grad_embed = torch.zeros_like(embed, dtype=wide) if is_thought and not tied else None

        for i in range(0, len(hidden), WeightedLogProb.CHUNK):
            rows = slice(i, i + WeightedLogProb.CHUNK)
            h, a, w = hidden[rows], action[rows], weight[rows, None].to(wide)
            tau = temperature[rows, None] if torch.is_tensor(temperature) else temperature
            z = F.linear(h, lm_head).to(wide).div_(tau)  # (n, V)
            z -= z.amax(-1, keepdim=True)
            chosen = None if is_thought else z.gather(-1, a[:, None])  # (n, 1)
            p = z.exp_()
            total = p.sum(-1, keepdim=True)
            p /= total
            if is_thought:
                p_narrow = p.to(narrow)
                mean = (p_narrow @ embed).to(wide)  # h0 = p E, (n, D)
                logp[rows] = log_density(a.to(wide), mean, noise_std)  # eq. 10
            else:
                logp[rows] = (chosen - total.log())[:, 0]
            if not with_grad:
                continue
            if is_thought:
                g = (w * (a.to(wide) - mean) / noise_std ** 2).to(narrow)  # w r, (n, D)
                dp = F.linear(g, embed).to(wide)  # (n, V)
                dp -= torch.linalg.vecdot(dp, p)[:, None]
                dz = dp.mul_(p).div_(tau).to(narrow)
            else:
                at_token = (w / tau).expand_as(chosen)
                dz = p.mul_(-w / tau).scatter_add_(-1, a[:, None], at_token).to(narrow)
            grad_hidden[rows] = dz @ lm_head
            if is_thought and tied:  # both terms of the one table in one product
                add_product(grad_head, torch.cat((dz, p_narrow)), torch.cat((h, g)))
            else:
                add_product(grad_head, dz, h)
                if is_thought:
                    add_product(grad_embed, p_narrow, g)
        if with_grad:
            z = p = p_narrow = dp = dz = None  # free the last chunk before the tables are narrowed
            ctx.save_for_backward(grad_hidden, *(
                None if g is None else g.to(narrow) for g in (grad_head, grad_embed)))
        ctx.mark_non_differentiable(logp)
        return (weight * logp).sum(), logp

    @staticmethod
    def backward(ctx, grad_loss, _):
        grads = [None if g is None else g * grad_loss for g in ctx.saved_tensors]
        return *grads, None, None, None, None, None


# --------------------------------------------------------------------------------------------------
# The transformer

def rope_frequencies(config):
    """Angle per position of each rotated pair of coordinates, (head_dim / 2,) float32.

    "linear" slows every angle by `factor`; "llama3" slows only wavelengths longer than the original
    context, leaves those much shorter alone, and interpolates between (Llama 3.1's rule).
    """
    rope = config.rope
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    freq = rope["rope_theta"] ** -exponent
    if rope["rope_type"] == "linear":
        freq = freq / rope["factor"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * freq / (2 * math.pi)  # per old context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / rope["factor"]
    return freq


def rotate(x, cos, sin):
    """Rotary embedding of x (B, T, H, head_dim); a head's halves hold the pairs' coordinates."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin  # sin is negative in the first half


def masked_attention(q, k, v, mask):
    """Attention of q (B, H, T, head_dim) to k, v (B, H_kv, S, head_dim), mask (B, 1, T, S) bool.

    The query heads of a shared key head are simply several queries to it.
    """
    n = q.shape[1] // k.shape[1]
    queries = q.reshape(len(q), k.shape[1], -1, q.shape[3])  # (B, H_kv, n T, head_dim)
    out = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask.repeat(1, 1, n, 1))
    return out.reshape(q.shape)


def attend(q, k, v, bias, fused=True):
    """Attention of q (B, H, n, head_dim) to k, v (B, H, S, head_dim) with a float32 bias on scores.

    Returns the output (B, H, n, head_dim), and the logarithm of what its softmax divided by,
    (B, H, n, 1): two outputs over different keys can be joined by it. Without gradients.
    """
    if fused and q.device.type == "cpu":  # scaled_dot_product_attention's kernel also knows log_sum
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sum = kernel(q, k, v, attn_mask=bias)
        return out, log_sum[..., None]
    scores = torch.add(bias, q @ k.mT, alpha=q.shape[-1] ** -0.5)
    weights = scores.softmax(-1)
    log_sum = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
    return weights.to(v.dtype) @ v, log_sum


class KVCache:
    """Keys and values of Q prompts, each once for all the rows that continue it, and of B rows.

        cache = KVCache(prompt_len)   # (Q,) int64
        model(ids, cache)             # the prompts (Q, P), aligned at the right
        cache = cache.branch(of_row)  # (B,) int64: rows begin, each behind a prompt
        model(x, cache)               # what the rows add, T positions at a time

    prompts  by layer a pair (Q, H_kv, P, head_dim)
    own      by layer a pair (B, H_kv, S, head_dim) in buffers that grow by blocks; all rows end at
             column `length`, and the younger ones have unused columns on their left
    age      (B,) int64: how many columns a row uses
    start    column of the first position of the pass under way; a layer may be run again
             (activation checkpointing) as long as no other pass has begun
    """

    def __init__(self, prompt_len, block=64):
        self.prompt_len, self.block = prompt_len, block
        self.prompts, self.own, self.length = {}, {}, 0
        self.of_row = None

    def branch(self, of_row):
        """A cache of B rows, which read the prompts here: row b continues the prompt of_row[b]."""
        rows = KVCache(self.prompt_len, self.block)
        rows.prompts, rows.age = dict(self.prompts), torch.zeros_like(of_row)
        rows.own = {layer: tuple(x.new_empty(len(of_row), x.shape[1], 0, x.shape[3]) for x in pair)
                    for layer, pair in self.prompts.items()}
        rows.group(of_row)
        return rows

    def group(self, of_row):
        """List the rows of each prompt: slots (Q, M), where M is the most rows that a prompt has,
        filled up with row 0; and at (B,), each row's place in slots.flatten()."""
        rows, prompts = (torch.arange(len(x), device=x.device) for x in (of_row, self.prompt_len))
        is_of = of_row == prompts[:, None]  # (Q, B)
        M = int(is_of.sum(1).max())
        self.of_row, self.at = of_row, of_row * M + is_of.cumsum(1)[of_row, rows] - 1
        self.slots = torch.zeros(len(prompts) * M, dtype=torch.long, device=of_row.device)
        self.slots = self.slots.index_copy(0, self.at, rows).view(-1, M)

    def prepare(self, T):
        """Make room for T new positions, and their masks. Returns these positions, (Q or B, T)."""
        device = self.prompt_len.device
        column = torch.arange(T, device=device)
        if self.of_row is None:  # the prompts; padding sees itself, as an empty softmax is NaN
            position = column - (T - self.prompt_len[:, None])
            self.mask = (position >= 0)[:, None, None] & (column[:, None] >= column)
            self.mask |= column[:, None] == column  # (Q, 1, P, P)
            return position.clamp(min=0)
        P, S = self.prompts[0][0].shape[2], self.length
        in_prompt = torch.arange(P, device=device) >= P - self.prompt_len[:, None]  # (Q, P)
        own = torch.arange(S + T, device=device) >= S - self.age[:, None]  # (B, S + T)
        self.mask = None
        if T > 1 or torch.is_grad_enabled():
            seen = torch.ones(T, S + T, dtype=torch.bool, device=device).tril(S)
            prompt = in_prompt[self.of_row, None].expand(-1, T, -1)
            own = own[:, None] & seen  # (B, T, S + T)
            self.mask = torch.cat((prompt, own), -1)[:, None]  # (B, 1, T, P + S + T)
        else:
            self.biases = [torch.zeros(used.shape, device=device).masked_fill(~used, -math.inf)
                           [:, None, None] for used in (in_prompt, own)]
        position = (self.prompt_len[self.of_row] + self.age)[:, None] + column
        self.start, self.length, self.age = S, S + T, self.age + T
        return position

    def append(self, layer, k, v):
        """Add new k, v (B, H_kv, T, head_dim) of the rows; return views of all their own so far."""
        if self.start == 0:  # not copied, so that gradients flow
            self.own[layer] = k, v
            return k, v
        if self.length > self.own[layer][0].shape[2]:
            grow = (0, 0, 0, self.length - self.own[layer][0].shape[2] + self.block)
            self.own[layer] = tuple(F.pad(x, grow) for x in self.own[layer])
        for buffer, new in zip(self.own[layer], (k, v)):
            buffer[:, :, self.start:self.length] = new
        return tuple(x[:, :, :self.length] for x in self.own[layer])

    def attend(self, layer, q, k, v):
        """Attention of new positions, q (Q or B, H, T, head_dim), to all that they may see."""
        if self.of_row is None:
            self.prompts[layer] = k.contiguous(), v.contiguous()
            return masked_attention(q, k, v, self.mask)
        prompt_k, prompt_v = self.prompts[layer]
        k, v = self.append(layer, k, v)
        if self.mask is not None:
            k = torch.cat((prompt_k[self.of_row], k), 2)  # (B, H_kv, P + S + T, head_dim)
            v = torch.cat((prompt_v[self.of_row], v), 2)
            return masked_attention(q, k, v, self.mask)

        # One new position: all rows of a prompt query it together, so that it is read once.
        def by_row(x):  # (Q, H_kv, M n, ...) -> (B, H_kv, n, ...)
            return x.unflatten(2, (self.slots.shape[1], -1)).transpose(1, 2).flatten(0, 1)[self.at]
        queries = q.view(len(q), k.shape[1], -1, q.shape[3])  # (B, H_kv, n, head_dim)
        grouped = queries[self.slots].transpose(1, 2).flatten(2, 3)  # (Q, H_kv, M n, head_dim)
        prompt, prompt_sum = attend(grouped, prompt_k, prompt_v, self.biases[0])
        own, own_sum = attend(queries, k, v, self.biases[1])
        share = torch.sigmoid(own_sum - by_row(prompt_sum)).to(q.dtype)
        return torch.lerp(by_row(prompt), own, share).reshape(q.shape)

    def keep(self, rows):
        """Keep only the given rows (1-D index), the columns that they use, and their prompts."""
        self.age = self.age[rows]
        first = self.length - int(self.age.max())
        self.own = {layer: tuple(x[rows, :, first:self.length] for x in pair)
                    for layer, pair in self.own.items()}
        self.length -= first
        asked, of_row = self.of_row[rows].unique(return_inverse=True)
        self.prompt_len = self.prompt_len[asked]
        longest = int(self.prompt_len.max())
        self.prompts = {layer: tuple(x[asked, :, -longest:] for x in pair)
                        for layer, pair in self.prompts.items()}
        self.group(of_row)

    def join(self, other):
        """Add another cache's prompts and rows behind these."""
        def below(a, b):  # the narrower one gets unused columns on its left
            width = max(a.shape[2], b.shape[2])
            return torch.cat([F.pad(x, (0, 0, width - x.shape[2], 0)) for x in (a, b)])
        for layer, pair in other.prompts.items():
            self.prompts[layer] = tuple(map(below, self.prompts[layer], pair))
            self.own[layer] = tuple(
                below(a[:, :, :self.length], b[:, :, :other.length])
                for a, b in zip(self.own[layer], other.own[layer]))
        self.length = max(self.length, other.length)
        self.age = torch.cat((self.age, other.age))
        of_row = torch.cat((self.of_row, other.of_row + len(self.prompt_len)))
        self.prompt_len = torch.cat((self.prompt_len, other.prompt_len))
        self.group(of_row)


class Attention(nn.Module):
    """Causal self-attention in which H / H_kv query heads share each key and value head."""

    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, rope, cache, layer):
        B, T, _ = x.shape
        heads = B, T, -1, self.head_dim
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), *rope).transpose(1, 2)  # (B, H, T, hd)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), *rope).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, H_kv, T, hd), like k
        if cache is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            out = cache.attend(layer, q, k, v)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """From token ids or input embeddings to hidden states, logits, soft tokens and log-probs."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        with torch.device("cpu"):  # not a buffer: .to(bfloat16) must not round the angles
            self.frequencies = rope_frequencies(config)
        self.activation_checkpointing = False  # compute each layer twice, to keep less of it

    def init_weights(self, generator=None, std=0.02):
        """Random initialisation: normal matrices, smaller where they end a residual branch."""
        for name, p in self.named_parameters():
            branch_end = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = std / math.sqrt(2 * self.config.num_hidden_layers) if branch_end else std
            with torch.no_grad():
                if p.dim() == 2:
                    p.normal_(0, scale, generator=generator)
                else:
                    p.fill_(1.0 if "norm" in name else 0.0)

    def forward(self, x, cache=None):
        """Hidden states after the final norm.

        x       (B, T) int64 token ids, or (B, T, D) input embeddings in the model's dtype
        cache   KVCache, which says what comes before x and takes it in; None: nothing does
        returns (B, T, D) in the model's dtype; finite and meaningless at a prompt's padding
        """
        h = x if x.is_floating_point() else self.embed_tokens(x)
        T = h.shape[1]
        if cache is None:
            positions = torch.arange(T, device=h.device)[None]
        else:
            positions = cache.prepare(T)
        self.frequencies = self.frequencies.to(h.device)
        angles = positions[..., None, None] * self.frequencies  # (B, T, 1, hd / 2), float32
        cos, sin = angles.cos().to(h.dtype), angles.sin().to(h.dtype)
        rope = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        again = self.activation_checkpointing and torch.is_grad_enabled()
        for i, block in enumerate(self.layers):
            h = (checkpoint(block, h, rope, cache, i, use_reentrant=False) if again
                 else block(h, rope, cache, i))
        return self.norm(h)

    def read(self, prompts):
        """Run Q prompts, lists of ids, through the model.

        Returns hidden (Q, D) after each prompt's last token, and the KVCache, ready to branch.
        """
        device, width = self.embed_tokens.weight.device, max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (Q, P)
        cache = KVCache(torch.tensor([len(p) for p in prompts], device=device))
        return Transformer.forward(self, ids, cache)[:, -1], cache

    def logits(self, hidden):
        """Next-token logits of hidden (..., D): (..., V) float32."""
        return F.linear(hidden, self.lm_head.weight).float()

    def soft_embedding(self, probs):
        """The mixture of embeddings h0 = p E (eq. 5) of probs (..., V): (..., D), both float32."""
        embed = self.embed_tokens.weight
        return (probs.to(embed.dtype) @ embed).float()

    def thought_mean(self, hidden, noise_at, support=None):
        """What noise is added to where it is not p E: the hidden state, or the logits of `support`
        (..., k) int64, the tokens that take part; None: of all. (..., D or k or V) float32."""
        if noise_at == "hidden":
            return hidden.float()
        if support is None:
            return self.logits(hidden)
        return (self.lm_head.weight[support] @ hidden[..., None])[..., 0].float()

    def thought_input(self, action, noise_at, support, temperature):
        """The embedding that a noisy action feeds, (..., D): itself, or the mixture that follows
        from a noisy hidden state or from noisy logits, the other tokens' being -inf."""
        if noise_at == "embedding":
            return action
        logits = self.logits(action) if noise_at == "hidden" else action
        probs, embed = (logits / temperature).softmax(-1), self.embed_tokens.weight
        if support is None:
            return self.soft_embedding(probs).to(embed.dtype)
        return (probs[..., None, :].to(embed.dtype) @ embed[support])[..., 0, :]

    def log_prob(self, prompts, of_row, tokens, thoughts, is_thought, weight, temperature,
                 noise_std, through=None, noise_at="embedding", support=None):
        """Log-probs of recorded actions, and the weighted sum that policy gradient differentiates.

        prompts     Q lists of ids; each is run once for all the rows that continue it
        of_row      (B,) int64: the prompt of each row
        tokens      (B, N) int64: what follows the prompt, padded at the right with anything
        thoughts    (B, N, D) the noisy embeddings that were fed, read where is_thought; or None;
                    with noise_at "hidden" or "logits" instead the noisy states or logits (B, N, k)
        is_thought  (B, N) bool: where the action is a noisy embedding and not a token
        weight      (B, N) float32: d loss / d log pi of each action; 0 where nothing was chosen
        temperature of the thoughts or, in hard mode, of the CoT tokens: float, or (B, N) float32
        noise_std   standard deviation of the thoughts' noise per coordinate, > 0
        through     "logits" or "embedding": of each thought's gradient only the part that comes
                    through p, or the part that comes from E in p E; None: their sum
        noise_at    "embedding", "hidden" or "logits"; support (B, N, k): see thought_mean
        returns     loss = sum(weight * logp), a scalar with gradients; and logp (B, N) float32
                    without them, 0 where weight is 0
        """
        last, cache = Transformer.read(self, prompts)  # FSDP wraps methods called from outside
        cache = cache.branch(of_row)
        x = self.embed_tokens(tokens)
        if thoughts is not None:  # stored actions are constants: no backprop through time (eq. 10)
            tau = temperature[..., None] if torch.is_tensor(temperature) else temperature
            fed = self.thought_input(thoughts.detach(), noise_at, support, tau)
            x = torch.where(is_thought[..., None], fed, x)
        inner = Transformer.forward(self, x[:, :-1], cache)
        hidden = torch.cat((last[of_row, None], inner), 1)  # (B, N, D): what chooses each slot
        logp = torch.zeros_like(weight)
        loss = 0.0
        for thought in (False, True):
            chosen = (weight != 0) & (is_thought if thought else ~is_thought)  # (B, N)
            if thought and thoughts is None:
                continue
            action = thoughts[chosen] if thought else tokens[chosen]
            if thought and noise_at != "embedding":
                ids = None if support is None else support[chosen]
                mean = self.thought_mean(hidden[chosen], noise_at, ids)
                density = log_density(action.float(), mean, noise_std).to(logp.dtype)
                loss, logp[chosen] = loss + (weight[chosen] * density).sum(), density.detach()
                continue
            tau = temperature[chosen] if torch.is_tensor(temperature) else temperature
            h, lm_head, embed = hidden[chosen], self.lm_head.weight, self.embed_tokens.weight
            if through == "logits":
                embed = embed.detach()
            elif through == "embedding":
                h, lm_head = h.detach(), lm_head.detach()
            part, logp[chosen] = WeightedLogProb.apply(
                h, lm_head, embed, action, weight[chosen], tau, noise_std,
                torch.is_grad_enabled())
            loss = loss + part
        return loss, logp

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Load a Hugging Face directory: config.json and model.safetensors, or indexed shards.

        Raises InputError naming the tensor or key that is missing, extra, misshapen or unsupported.
        """
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"{path}: no such directory; "
                             "give the directory of a Hugging Face checkpoint")
        config = Config.from_json(path / "config.json")
        with torch.device("meta"):
            model = cls(config)
        state = read_weights(path, model.state_dict(), config.tie_word_embeddings, dtype, device)
        model.load_state_dict(state, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return model

    def save_pretrained(self, path, state=None):
        """Write config.json and model.safetensors as transformers and vLLM read them.

        state: {parameter name: tensor} to write instead of the model's own, gathered from shards.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        state = dict(state or self.state_dict())
        if self.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        dtype = str(state["embed_tokens.weight"].dtype).removeprefix("torch.")
        state = {k if k == "lm_head.weight" else f"model.{k}": v.detach().contiguous()
                 for k, v in state.items()}
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        config = self.config.to_json() | {"dtype": dtype, "torch_dtype": dtype}
        eos = eos_token_ids(path)  # generation_config.json, copied beforehand, knows the end tokens
        config |= {"eos_token_id": eos} if eos else {}
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def eos_token_ids(path):
    """End-of-sequence ids as a list, from generation_config.json, else config.json; [] if none."""
    for name in ("generation_config.json", "config.json"):
        if (Path(path) / name).exists():
            eos = read_json(Path(path) / name).get("eos_token_id")
            if eos is not None:
                eos = eos if isinstance(eos, list) else [eos]
                if not all(isinstance(token, int) for token in eos):
                    raise InputError(f"{Path(path) / name}: eos_token_id {eos} must be numbers")
                return eos
    return []


def read_weights(path, expected, tied, dtype, device):
    """Read a checkpoint directory's tensors for the state dict `expected` (on meta), strictly."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        files = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        if not files or any(Path(file).name != file for file in files):
            raise InputError(f"{index}: its weight_map names no files of this directory; "
                             "download the file again")
    elif (path / "model.safetensors").exists():
        files = ["model.safetensors"]
    else:
        raise InputError(f"{path}: no model.safetensors and no {index.name}; "
                         "give a checkpoint in safetensors format")
    state = {}
    for file in files:
        try:
            with safe_open(path / file, framework="pt", device=str(device)) as f:
                for key in f.keys():
                    name = key.removeprefix("model.")
                    if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
                        continue  # harmless: tables of old Llama files, a tied matrix's second copy
                    what = f"{path / file}: tensor {key}"
                    if name not in expected:
                        raise InputError(f"{what} is unknown to config.json's architecture; "
                                         "use the config.json that belongs to these weights")
                    tensor, shape = f.get_tensor(key), tuple(expected[name].shape)
                    if tensor.shape != shape:
                        raise InputError(f"{what} has shape {tuple(tensor.shape)}, config.json "
                                         f"says {shape}; use the one that belongs to these weights")
                    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
                        raise InputError(f"{what} is {tensor.dtype}; use unquantised weights")
                    if not tensor.isfinite().all():
                        raise InputError(f"{what} holds NaN or infinite weights; "
                                         "download the file again, or use an earlier checkpoint")
                    state[name] = tensor.to(dtype)
        except (SafetensorError, OSError) as e:
            raise InputError(f"{path / file}: not readable as safetensors ({e}); "
                             "download the file again") from None
    if tied and "embed_tokens.weight" in state:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    missing = sorted(expected.keys() - state.keys())
    if missing:
        raise InputError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}; "
                         "download all files of the checkpoint")
    return state

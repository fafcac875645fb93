"""
A Llama / Qwen2 / Qwen3 transformer, its KV cache, its checkpoints, and the log-prob of a thought.

    model = Transformer.from_pretrained("path/to/checkpoint", dtype=torch.bfloat16, device="cuda")
    hidden = model(ids)                          # ids (B, T) or embeddings (B, T, D) -> (B, T, D)
    logits = model.logits(hidden)                # (B, T, V) float32
    thought = model.mixture(logits.softmax(-1))  # p E, before any noise: (B, T, D) float32

Equation numbers are those of "Soft Tokens, Hard Truths" (arXiv 2509.19170).
Dimensions: Q prompts, P their positions, B rows, T new positions, N scored slots, V vocabulary,
D width, H heads, H_kv heads of keys and values, d width of a head. Parameters are named as in a
Hugging Face checkpoint, less the prefix "model.".
"""
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint


class InputError(Exception):
    """A user's mistake. Its message, all that a script prints, names the place and the fix."""


def read_json(path):
    """The object in a JSON file; InputError if that is missing or broken."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError, RecursionError) as e:
        raise InputError(f"{path}: no readable JSON object ({e}); give the file as it was written"
                         f"{hint(Path(path).parent)}") from None


def write_json(path, content):
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ---- The transformer -------------------------------------------------

@dataclass
class Config:
    """What shapes a dense Llama, Qwen2 or Qwen3 model, in the words of its config.json."""
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None    # several query heads share each of them
    head_dim: int = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False  # lm_head is the embedding table
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: dict = None                  # transformers 5: rope_parameters; 4: two keys
    raw: dict = None                   # config.json itself, to save it again

    @classmethod
    def from_dict(cls, raw):
        """The Config in a config.json, of transformers 4 or 5; ValueError for what is beyond us."""
        names = cls.__dataclass_fields__.keys() - {"raw", "rope"}
        c = cls(**{k: v for k, v in raw.items() if k in names and v is not None}, raw=raw)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        c.rope = {"rope_theta": raw.get("rope_theta", 10000.0)} | rope
        c.rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
        heads = c.num_attention_heads
        c.num_key_value_heads = c.num_key_value_heads or heads
        c.head_dim = c.head_dim or (128 if c.model_type == "qwen3" else c.hidden_size // heads)
        windowed = raw.get("use_sliding_window") and (
            raw.get("max_window_layers", 28) < c.num_hidden_layers)
        refused = {  # what this file would get wrong if it went on
            "model_type": c.model_type not in ("llama", "qwen2", "qwen3"),
            "quantization_config": raw.get("quantization_config"),
            "hidden_act": raw.get("hidden_act", "silu") != "silu",
            "use_sliding_window": windowed or "sliding_attention" in (raw.get("layer_types") or ()),
            "rope_type": c.rope["rope_type"] not in ("default", "linear", "llama3"),
            "rope_theta": not 0 < c.rope["rope_theta"] < math.inf,
            "partial_rotary_factor": (raw | rope).get("partial_rotary_factor", 1) != 1,
            "rms_norm_eps": not 0 < c.rms_norm_eps < 1,
            "num_hidden_layers": not 0 < c.num_hidden_layers < 1000,
            "num_key_value_heads": heads % c.num_key_value_heads, "head_dim": c.head_dim % 2}
        for key in filter(refused.get, refused):
            raise ValueError(f"{key} {(raw | c.rope).get(key)!r} is not supported")
        return c


def rope_frequencies(c):
    """Angle per position of each rotated pair of coordinates: (d / 2,) float32.

    "linear" divides every angle by `factor`; "llama3" does so for waves that are longer than the
    original context, keeps those that are much shorter, and interpolates between them.
    """
    rope = c.rope
    freq = rope["rope_theta"] ** -(torch.arange(0.0, c.head_dim, 2) / c.head_dim)
    if rope["rope_type"] == "linear":
        freq = freq / rope["factor"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * freq / (2 * math.pi)  # per old context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / rope["factor"]
    return freq


def rotate(x, cos, sin):
    """Rotary embedding of x (B, T, H, d); the halves of a head hold the pairs' two coordinates."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)  # sin < 0 in the first half


class Prompts:
    """Keys and values of Q prompts: each is run once for all the rows that continue it.

        prompts = Prompts(length)         # (Q,) int64
        model(ids, prompts)               # (Q, P), padded at the right; padding is never read
        model(x, prompts.before(of_row))  # (B, T): B rows go on, row b after prompt of_row[b]

    Without of_row, a pass is causal and fills kv, {layer: (keys, values)}, each (Q, H_kv, P, d).
    With of_row, a pass goes on from there. Gradients flow through both.
    """

    def __init__(self, length=None, of_row=None, kv=None):
        self.length, self.of_row, self.kv = length, of_row, {} if kv is None else kv

    def before(self, of_row):
        return Prompts(self.length, of_row, self.kv)

    def prepare(self, column):
        """Begin a pass of T positions, column = arange(T). Returns where they are, (1 or B, T)."""
        if self.of_row is None:
            return column[None]
        length, P = self.length[self.of_row, None], self.kv[0][0].shape[2]
        key, newest = torch.arange(P + len(column), device=length.device), P + column[:, None]
        self.mask = (key < length[..., None, None]) | (P <= key) & (key <= newest)  # (B, 1, T, P+T)
        return length + column

    def attend(self, layer, q, k, v):
        """Attention of q (B, H, T, d) to the prompt and to the new k, v (B, H_kv, T, d)."""
        if self.of_row is None:
            self.kv[layer] = k, v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        k, v = (torch.cat((prompt[self.of_row], new), 2)
                for prompt, new in zip(self.kv[layer], (k, v)))
        B, H, T, d = q.shape  # the query heads of a shared key head are several queries to it
        n = H // k.shape[1]
        if layer == 0:  # the same for all; columns in 16s, or a GPU would copy it for every layer
            self.bias = q.new_zeros(B, 1, n * T, -(-k.shape[2] // 16) * 16)[..., :k.shape[2]]
            self.bias.masked_fill_(~self.mask.repeat(1, 1, n, 1), -math.inf)
        out = F.scaled_dot_product_attention(q.reshape(B, -1, n * T, d), k, v, attn_mask=self.bias)
        return out.reshape(q.shape)  # its heads need not be contiguous on a GPU


class KVCache:
    """Keys and values of B rows that grow by one position at a time, the t-th in column t.

        cache = KVCache(model, B, room)     # room: how many positions a row may have
        cache.enter(rows, prompts, of_row)  # row rows[i] begins anew, after prompt of_row[i]
        model(x, cache)                     # (B, 1, D)

    A pass never waits for the device, moves a tensor or changes a shape: a CUDA graph can replay
    it. `last` (B,) is each row's newest position; a pass reads only the first `columns` columns.
    """

    def __init__(self, model, B, room):
        c, like = model.config, model.embed_tokens.weight
        shape = B, c.num_key_value_heads, room, c.head_dim
        self.kv = [[like.new_zeros(shape) for _ in range(2)] for _ in range(c.num_hidden_layers)]
        self.rows, self.column = (torch.arange(n, device=like.device) for n in (B, room))
        self.last, self.columns = torch.zeros_like(self.rows), room

    def enter(self, rows, prompts, of_row):
        self.last[rows] = prompts.length[of_row] - 1
        for layer, pair in enumerate(self.kv):
            for stored, prompt in zip(pair, prompts.kv[layer]):
                stored[rows, :, :prompt.shape[2]] = prompt[of_row]

    def keep(self, rows):
        """Keep only the given rows (n,), in this order."""
        self.kv = [[x[rows] for x in pair] for pair in self.kv]
        self.last, self.rows = self.last[rows], self.rows[:len(rows)]

    def prepare(self, _):
        """Begin a pass of T = 1 position of each row. Returns where they stand, (B, 1)."""
        self.last.add_(1).clamp_(max=len(self.column) - 1)  # rows that are done stay at the end
        later = self.column[:self.columns] > self.last[:, None, None, None]  # (B, 1, 1, columns)
        self.bias = self.kv[0][0].new_zeros(later.shape).masked_fill_(later, -math.inf)
        return self.last[:, None]

    def attend(self, layer, q, k, v):
        """Attention of new positions, q (B, H, 1, d), to their rows so far."""
        for stored, new in zip(self.kv[layer], (k, v)):
            stored[self.rows, :, self.last] = new[:, :, 0]
        k, v = (x[:, :, :self.columns] for x in self.kv[layer])
        queries = q.view(len(q), k.shape[1], -1, q.shape[3])  # (B, H_kv, H / H_kv, d)
        out = F.scaled_dot_product_attention(queries, k, v, attn_mask=self.bias)
        return out.reshape(q.shape)


class Attention(nn.Module):
    """Causal self-attention in which H / H_kv query heads share each key and value head.

    The three families differ here alone: Qwen2 has biases on q, k and v; Qwen3 normalises every
    query and key head; Llama has neither.
    """

    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        is_qwen2, is_qwen3 = c.model_type == "qwen2", c.model_type == "qwen3"
        self.q_proj = nn.Linear(c.hidden_size, q, bias=c.attention_bias or is_qwen2)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias or is_qwen2)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias or is_qwen2)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=c.attention_bias and not is_qwen2)
        self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if is_qwen3 else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if is_qwen3 else nn.Identity()

    def forward(self, x, rope, cache, layer):
        B, T, _ = x.shape
        heads = B, T, -1, self.head_dim
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), *rope).transpose(1, 2)  # (B, H, T, d)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), *rope).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, H_kv, T, d), like k
        out = cache.attend(layer, q, k, v)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, c):
        super().__init__()
        bias = c.mlp_bias and c.model_type == "llama"
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=bias)

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
    """From token ids or input embeddings to hidden states, logits, mixtures and log-probs."""

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

    @torch.no_grad()
    def init_weights(self, generator=None, std=0.02):
        """Random initialisation: normal matrices, smaller where they end a residual branch."""
        for name, p in self.named_parameters():
            branch_end = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = std / math.sqrt(2 * self.config.num_hidden_layers) if branch_end else std
            if p.dim() == 2:
                p.normal_(0, scale, generator=generator)
            else:
                p.fill_(1.0 if "norm" in name else 0.0)

    def forward(self, x, cache=None):
        """Hidden states after the final norm. Called as self.forward, it runs without hooks.

        x       (B, T) int64 token ids, or (B, T, D) input embeddings in the model's dtype
        cache   Prompts or KVCache: what comes before x; it stores x, too. None: nothing does
        returns (B, T, D) in the model's dtype
        """
        h = x if x.is_floating_point() else self.embed_tokens(x)
        cache = cache or Prompts()
        positions = cache.prepare(torch.arange(h.shape[1], device=h.device))  # (1 or B, T)
        self.frequencies = self.frequencies.to(h.device)
        angles = positions[..., None, None] * self.frequencies  # (B, T, 1, d / 2), float32
        cos, sin = angles.cos().to(h.dtype), angles.sin().to(h.dtype)
        rope = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        for i, block in enumerate(self.layers):
            if not torch.is_grad_enabled():  # no hooks, for CUDA graphs; under FSDP, see gathered()
                h = block.forward(h, rope, cache, i)
            elif self.activation_checkpointing:
                h = checkpoint(block, h, rope, cache, i, use_reentrant=False)
            else:
                h = block(h, rope, cache, i)
        return self.norm(h)

    def prefill(self, prompts):
        """Run Q prompts, lists of ids: hidden (Q, D) at the last token of each, and Prompts."""
        ids = pad_sequence([*map(torch.tensor, prompts)], batch_first=True)  # (Q, P)
        length = torch.tensor([*map(len, prompts)], device=self.embed_tokens.weight.device)
        cache = Prompts(length)
        hidden = self.forward(ids.to(length.device), cache)  # (Q, P, D)
        return hidden[torch.arange(len(length), device=length.device), length - 1], cache

    def logits(self, hidden):
        """Next-token logits of hidden (..., D): (..., V) float32. They are rounded to the model's
        dtype first, as part of the policy: in bfloat16 the two best may tie, and from such ties
        fuzzy thoughts learn."""
        return F.linear(hidden, self.lm_head.weight).float()

    def mixture(self, probs):
        """h0 = p E (eq. 5), the mean embedding under probs (..., V): (..., D) float32."""
        embed = self.embed_tokens.weight
        return (probs.to(embed.dtype) @ embed).float()

    def log_prob(self, prompts, of_row, tokens, thoughts, is_thought, weight, tau, noise_std):
        """Log-probs of recorded actions, and the weighted sum that policy gradient differentiates.

        prompts     Q lists of ids; each is run once for all the rows that continue it
        of_row      (B,) int64: the prompt of each row
        tokens      (B, N) int64: what follows the prompt, with any padding at the right
        thoughts    (B, N, D): the noisy embeddings that were fed where is_thought (B, N); or None
        weight      (B, N) float32: d loss / d log pi of each action; 0 for forced words
        tau         (B, N) float32: the temperature that each action was drawn at
        noise_std   sigma of eq. 6, per coordinate
        returns     loss = sum(weight * logp), with gradients; logp (B, N), 0 where weight is 0
        """
        last, cache = self.prefill(prompts)
        x = self.embed_tokens(tokens)
        if thoughts is not None:  # stored actions are constants: no backprop through time (eq. 10)
            x = torch.where(is_thought[..., None], thoughts, x)
        inner = self.forward(x[:, :-1], cache.before(of_row))
        hidden = torch.cat((last[of_row, None], inner), 1)  # (B, N, D): predicts each slot

        loss, logp = 0.0, torch.zeros_like(weight)
        for action, chosen in ((tokens, ~is_thought), (thoughts, is_thought)):
            if action is not None:
                chosen = chosen & (weight != 0)
                part, logp[chosen] = WeightedLogProb.apply(
                    hidden[chosen], self.lm_head.weight, self.embed_tokens.weight, action[chosen],
                    weight[chosen], tau[chosen], noise_std)
                loss = loss + part
        return loss, logp

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu", prepare=None):
        """Load a Hugging Face directory: config.json and model.safetensors, in one file or several.

        prepare(model) may shard the model by FSDP before any weight exists: each rank then holds
        only its own part. Raises InputError, naming the key, tensor or file at fault.
        """
        file = Path(path) / "config.json"
        raw = read_json(file)
        try:
            with torch.device("meta"):  # shapes without numbers
                model = cls(Config.from_dict(raw)).to(dtype)
        except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as e:
            raise InputError(f"{file}: {str(e).splitlines()[0]}; give the checkpoint of a dense "
                             "Llama, Qwen2 or Qwen3 model in plain floating point") from None
        if prepare:
            prepare(model)
        model.to_empty(device=device)
        if model.config.tie_word_embeddings:  # to_empty has untied them
            model.lm_head.weight = model.embed_tokens.weight
        read_weights(model, Path(path))
        return model

    def save_pretrained(self, path, state=None, dtype="float32"):
        """Write config.json and model.safetensors as transformers and vLLM read them. state: {name:
        whole tensor}, default the model's own; dtype: for config.json, no tensor is converted."""
        state = {name if name == "lm_head.weight" else f"model.{name}": w.detach().contiguous()
                 for name, w in (state or dict(self.named_parameters())).items()}
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        key = "torch_dtype" if "torch_dtype" in self.config.raw else "dtype"
        write_json(path / "config.json", self.config.raw | {key: dtype})
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(path / "config.json", path / "model.safetensors")  # some versions: 0600


# ---- Reading weights -------------------------------------------------

HINTS = {  # parts of names of files or tensors that show what people have instead of a checkpoint
    "adapter_config": "it is an adapter; merge it into its base model", "lora_": "it is an adapter",
    "snapshots": "it is the root of a hub cache; give a directory in its snapshots/",
    "best": "it is a run of train.py; give its best/", ".gguf": "give safetensors, not GGUF",
    "pytorch_model": "give safetensors, not pickled weights", "score.": "it is a reward model",
    "_orig_mod": "it is a compiled model's; save its _orig_mod", "vision": "it is multimodal",
    "language_model": "it is a part of a multimodal model"}


def hint(path, key=""):
    """A hint about a mistake, "; ..." or "", from a tensor's key, or else from the file names in a
    directory without weights."""
    has_weights = any(path.glob("model*.safetensors"))  # then pytorch_model.bin is only a copy
    names = key or " ".join(file.name for file in path.glob("*") if not has_weights)
    return next((f"; {text}" for part, text in HINTS.items() if part in names), "")


def whole(tensor):
    """The whole of a tensor; if FSDP shards it, it is gathered, and all ranks must call this."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor() if tensor.device_mesh.size() > 1 else tensor.to_local()  # no copy


def part_of(tensor, param):
    """This rank's share of a whole tensor that every rank has, sharded like the parameter."""
    if not isinstance(param, DTensor):
        return tensor
    return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)


@torch.no_grad()
def read_weights(model, path):
    """Copy a checkpoint directory's tensors into a model, one after the other, and strictly."""
    params = dict(model.named_parameters(remove_duplicate=False))
    missing = {param: name for name, param in model.named_parameters()}  # tied tables are one
    for file in sorted(path.glob("model*.safetensors")):
        try:
            stored = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as e:
            raise InputError(f"{file}: not readable ({e}); download it again, or, if it is a "
                             "git-lfs pointer, run git lfs pull") from None
        for key in stored.keys():
            tensor, name, wrong = stored.get_tensor(key), key.removeprefix("model."), ""
            if name.endswith("rotary_emb.inv_freq"):  # tables in old Llama files
                continue
            param = params.get(name)
            is_first = missing.pop(param, None)
            if param is None:
                wrong = "is unknown to config.json's architecture"
            elif tensor.shape != param.shape:
                wrong = f"has shape {(*tensor.shape,)}, but config.json says {(*param.shape,)}"
            elif tensor.dtype.itemsize < 2 or not tensor.isfinite().all():
                wrong = f"holds quantised ({tensor.dtype}), infinite or NaN weights"
            elif isinstance(param, DTensor):
                tensor, param = part_of(tensor, param).to_local(), param.to_local()
            if not (wrong or is_first or torch.equal(param, tensor.to(param))):
                wrong = "is there twice, or differs from its tied twin"
            if wrong:
                raise InputError(f"{file}: tensor {key} {wrong}; give files that belong together"
                                 f"{hint(path, key)}")
            param.copy_(tensor)
    if names := sorted(missing.values()):
        raise InputError(f"{path}: {len(names)} tensors are missing, the first is {names[0]};"
                         f" give all model*.safetensors of the checkpoint{hint(path)}")


# ---- The fused soft-embedding path -----------------------------------

def log_density(thought, mean, noise_std):
    """eq. 10: log N(thought; mean, noise_std^2 I) of (..., D) in nats, summed over D."""
    constant = mean.shape[-1] * math.log(noise_std * math.sqrt(2 * math.pi))
    return -(thought - mean).square().sum(-1) / (2 * noise_std ** 2) - constant


class WeightedLogProb(torch.autograd.Function):
    """sum_n weight_n log pi(action_n | hidden_n) and every log pi, never holding an (N, V) tensor.

    A policy gradient knows the weight of every log-prob beforehand, from the advantages. So each
    chunk of slots computes its gradients while it has its softmax, instead of computing that again
    in the backward pass. With z = h W^T / tau and p = softmax(z) (eq. 3):

      token a:    log pi = z_a - logsumexp(z)                         d/dz = onehot(a) - p
      thought a:  log pi = -|a - p E|^2 / (2 sigma^2) + const  (eq. 10)
                  with r = (a - p E) / sigma^2:
                  d/dE = p^T r,   d/dp = r E^T,   d/dz = p * (d/dp - sum(p * d/dp))
    """
    CHUNK_BYTES = 2 ** 28  # of one (n, V) float32 tensor; about four exist at a time

    @staticmethod
    def forward(ctx, hidden, lm_head, embed, action, weight, tau, noise_std):
        """hidden (N, D), action (N,) or (N, D), weight, tau (N,): weighted sum, and logp (N,)."""
        wide, narrow = torch.promote_types(hidden.dtype, torch.float32), hidden.dtype
        is_thought = action.dim() == 2
        logp = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_head = grad_embed = torch.zeros_like(lm_head, dtype=wide)  # one table if tied
        if is_thought and embed is not lm_head:
            grad_embed = torch.zeros_like(embed, dtype=wide)

        chunk = max(1, WeightedLogProb.CHUNK_BYTES // (4 * len(lm_head)))
        for i in range(0, len(hidden), chunk):
            rows = slice(i, i + chunk)
            h, a, w, t = hidden[rows], action[rows], weight[rows, None], tau[rows, None]
            z = F.linear(h, lm_head).to(wide).div_(t)  # (n, V)
            p = z.softmax(-1)
            if is_thought:
                p_narrow = p.to(narrow)
                mean = (p_narrow @ embed).to(wide)  # h0 = p E, (n, D)
                logp[rows] = log_density(a.to(wide), mean, noise_std)
                r = (w * (a.to(wide) - mean) / noise_std ** 2).to(narrow)  # weighted, (n, D)
                dp = F.linear(r, embed).to(wide)  # (n, V)
                dp -= torch.linalg.vecdot(dp, p)[:, None]
                dz = dp.mul_(p).div_(t).to(narrow)
                grad_embed += p_narrow.T @ r
            else:
                logp[rows] = z.gather(-1, a[:, None])[:, 0] - z.logsumexp(-1)
                dz = p.mul_(-w / t).scatter_add_(-1, a[:, None], w / t).to(narrow)
            grad_hidden[rows] = dz @ lm_head
            grad_head += dz.T @ h
        z = p = p_narrow = dp = dz = None  # free the last chunk before the tables are narrowed
        tables = [grad_head] if grad_embed is grad_head else [grad_head, grad_embed]
        ctx.save_for_backward(grad_hidden, *(table.to(narrow) for table in tables))
        ctx.mark_non_differentiable(logp)
        return (weight * logp).sum(), logp

    @staticmethod
    def backward(ctx, grad_loss, _):
        grads = [grad * grad_loss for grad in ctx.saved_tensors]
        return *grads, *[None] * (7 - len(grads))

"""What the tests share: small random models, the untrained tiny model, and scripts run as a user runs them."""
import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the expected figures are those of a CPU
import torch  # noqa: E402
import torch.nn.functional as F
from torch.distributions import Categorical, Normal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = Path(__file__).resolve().parents[2] / "shared"  # real benchmark files, where there are any
from model import Config, Transformer  # noqa: E402
from sample import load  # noqa: E402
from train import write_tiny_model  # noqa: E402


def random_model(seed=0, std=0.3, **changes):
    """A small model, with weights so large that its distributions are far from uniform. changes: of config.json."""
    raw = dict(model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
               num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256)
    model = Transformer(Config.from_dict(raw | changes))
    model.init_weights(torch.Generator().manual_seed(seed), std=std)
    return model


@pytest.fixture(autouse=True)
def attention_in_the_layout_of_a_gpu(monkeypatch, attend=F.scaled_dot_product_attention):
    """Its kernel for masks leaves (B, T, H, d) in memory, and calls it (B, H, T, d)."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: attend(
        *args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """The checkpoint directory of an untrained tiny model, as train.py makes it."""
    write_tiny_model(path := tmp_path_factory.mktemp("tiny"), seed=0)
    return path


@pytest.fixture()
def tiny(tiny_dir):
    """(model, tokenizer) of the tiny model, with larger random weights: only some thoughts say the stop phrase."""
    model, tokenizer = load(tiny_dir)
    model.init_weights(torch.Generator().manual_seed(1), std=0.12)
    model.embed_tokens.weight.data[2] *= 1.5  # the stop phrase
    return model, tokenizer


def plain_pass(model, rollout, i):
    """(logits, log pi) of every slot of row i by the formulas: the whole text in one pass, no cache, no chunks."""
    row, E, noise_std = rollout.rows[i], model.embed_tokens.weight, model.notes["noise_scale"] * model.notes["rms"]
    prompt, tokens, c = rollout.prompts[row.question], rollout.tokens[i, :row.length], row.cot_len
    x = E[torch.cat((torch.tensor(prompt), tokens))]
    if rollout.thoughts is not None:
        x = torch.cat((x[:len(prompt)], rollout.thoughts[i, :c], x[len(prompt) + c:]))
    logits = model(x[None, :-1])[0, len(prompt) - 1:] @ model.lm_head.weight.T
    policy = Categorical(logits=logits / rollout.tau[i, :row.length, None])  # eq. 3
    logp = policy.log_prob(tokens)
    if rollout.thoughts is not None:
        density = Normal(policy.probs[:c] @ E, noise_std).log_prob(rollout.thoughts[i, :c])  # eq. 5 and 10
        logp = torch.cat((density.sum(-1), logp[c:]))
    return logits, logp


def script_inside(*args):
    """Run a script as a user would, but in this process: starting Python and importing torch takes seconds."""
    out, err, code, argv = io.StringIO(), io.StringIO(), 0, [str(ROOT / args[0]), *map(str, args[1:])]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as e:
            code = e.code or 0
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())

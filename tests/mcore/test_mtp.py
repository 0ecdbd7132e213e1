"""Multi-token prediction: depths that see no further than they may, in generation not at all; its losses in the log."""

import re

import pytest
import torch

import linear_moe
from linear_moe.inference import generate
from tests.mcore.test_pretrain import MOCK, pretrain

T = 24
MODEL = {"hidden_size": 32, "num_attention_heads": 4, "seq_length": T, "max_position_embeddings": 2 * T}
MODEL |= {"vocab_size": 64, "swiglu": True, "normalization": "RMSNorm", "disable_bias_linear": True}
MODEL |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
MODEL |= {"position_embedding_type": "rope", "num_experts": 4, "moe_ffn_hidden_size": 16, "init_method_std": 0.2}
MODEL |= {"mixer": {"G": "gated_deltanet", "M": "mamba2"}, "mom_memories": 3, "moe_router_load_balancing_type": "none"}


def build(seed, pattern="GM*E/GE*-/GE*-"):
    return linear_moe.build_model(MODEL, hybrid_layer_pattern=pattern, seed=seed)


@pytest.mark.parametrize("seen", [7, 15])
def test_a_depth_sees_as_many_tokens_more(seen, seed):
    """Depth d, of which the model itself is 0, predicts the token after t + d, and sees none but those up to that."""
    model, found = build(seed), []
    model.mtp.register_forward_hook(lambda module, args, kwargs, out: found.append(out), with_kwargs=True)
    tokens = torch.randint(64, (1, T))
    for changed in (tokens, tokens.clone()):
        if found:
            changed[0, seen] = (changed[0, seen] + 1) % 64
        model(changed, torch.arange(T)[None], None, labels=tokens)
    depths = [x.chunk(3) for x in found]
    for depth, (before, after) in enumerate(zip(*depths)):
        differ = (before - after).abs().flatten(1).amax(
            1
        ) > 1e-5 * before.abs().max()  # experts sum by number of tokens
        assert not differ[: seen - depth].any() and differ[seen - depth], f"depth {depth}: {differ.nonzero().flatten()}"


def test_generation_leaves_it_out(seed):
    model = build(seed).eval()
    prompt = torch.randint(64, (6,)).tolist()
    (found,) = generate(model, [prompt], 5)
    whole = list(prompt)
    for _ in range(5):
        ids = torch.tensor([whole])
        whole.append(int(model(ids, torch.arange(len(whole))[None], None)[0, -1, :64].argmax()))
    assert found == whole[len(prompt) :]


def test_losses_are_logged_by_depth(tmp_path):
    pattern = ["--hybrid-layer-pattern", "GE*E/GE/GE", "--lr", "1e-2", "--lr-warmup-iters", "0", "--eval-iters", "0"]
    run = pretrain(*MOCK, *pattern, "--train-iters", "4", "--log-interval", "1", cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    for depth in (1, 2):
        losses = [float(loss) for loss in re.findall(rf"mtp_{depth} loss: ([\d.]+)", run.stdout)]
        assert len(losses) == 4 and losses[-1] < losses[0], run.stdout

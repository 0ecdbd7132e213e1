"""A mixer's depth is its place among the layers that mix the sequence, on whatever stage, whatever Megatron counts."""

import pytest
import torch

import linear_moe
from linear_moe.mcore.mixer_layer import MixerLayer
from linear_moe.ssm.lightning import alibi_slopes

HIDDEN, HEADS, PATTERN = 32, 4, "*L-R|LL-*LR-"
SIZES = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "seq_length": 8, "max_position_embeddings": 8}
MIXERS = {"L": "lightning", "R": "hgrn2"}


def mixers(model):
    return [module for module in model.modules() if isinstance(module, MixerLayer)]


def test_depth_counts_what_mixes_the_sequence(seed):
    """Behind softmax, two in a row, without a feed-forward."""
    model = linear_moe.build_model(SIZES, hybrid_layer_pattern=PATTERN, mixer=MIXERS, seed=seed)
    found = [(layer.layer_number, layer.core.mixer.layer, layer.core.mixer.num_layers) for layer in mixers(model)]
    assert found == [(2, 1, 8), (4, 2, 8), (5, 3, 8), (6, 4, 8), (9, 6, 8), (10, 7, 8)]
    first, second, *_, last = mixers(model)
    assert torch.allclose(first.core.constants["g"], -alibi_slopes(HEADS) * (1 - 1 / 7 + 1e-5))
    assert torch.allclose(second.core.heads.lower_bound.sigmoid(), torch.full((HIDDEN,), 2 / 8))
    assert torch.allclose(last.core.heads.lower_bound.sigmoid(), torch.full((HIDDEN,), 7 / 8))


@pytest.mark.parametrize("repeated", [False, True], ids=["each", "repeated"])
def test_multi_token_prediction_is_as_deep_as_the_last(repeated, seed):
    sizes = SIZES | {"num_layers": 2, "position_embedding_type": "rope", "mtp_use_repeated_layer": repeated}
    sizes |= {"mixer": {"L": "lightning", "R": "hgrn2"}, "mom_memories": 2}
    model = linear_moe.build_model(sizes, hybrid_layer_pattern="LR-/R-/R-", seed=seed)
    found = [(layer.number, layer.core.mixer.layer, layer.core.mixer.num_layers) for layer in mixers(model)]
    assert found == [(1, 0, 2), (2, 1, 2), (4, 1, 2), (6, 1, 2)][: 3 if repeated else 4]


def test_behind_softmax_a_mixer_is_not_the_first(seed):
    """As in published hybrids, whose layers count on through softmax attention."""
    first, second = (
        linear_moe.build_model(SIZES, num_layers=2, mixer="hgrn2", layer_pattern=pattern, seed=seed)
        for pattern in ("LN", "NL")
    )
    assert "lower_bound" not in first.decoder.layers[0].self_attention.core.heads()
    bound = second.decoder.layers[2].self_attention.core.heads()["lower_bound"]
    assert torch.allclose(bound.sigmoid(), torch.full((32,), 1 / 2))

"""A mixer's depth is its place among the layers that mix the sequence, on whatever stage, whatever Megatron counts."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

import linear_moe
from linear_moe.mcore.specs import LayerOptions, MixerOptions, layer_specs
from linear_moe.ssm import mixer_class
from linear_moe.ssm.lightning import alibi_slopes

HIDDEN, HEADS, PATTERN = 32, 4, "NLGLLNLG"
SIZES = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "seq_length": 8, "max_position_embeddings": 8}
MIXERS = {"L": "lightning", "G": "hgrn2"}


def options(pattern=PATTERN):
    classes = {letter: mixer_class(name) for letter, name in MIXERS.items()}
    mixers = {letter: MixerOptions(cls, cls.make_config(HIDDEN, HEADS, {})) for letter, cls in classes.items()}
    return LayerOptions(pattern, mixers, None)


def config(num_layers=8, **layout):
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_layers": num_layers}
    return TransformerConfig(**sizes, transformer_impl="local", pipeline_dtype=torch.float32, **layout)


def depths(config, vp_stage=None):
    """(mixer, depth, number of mixers) of each layer of this stage, None for softmax."""
    specs = layer_specs(config, options(), vp_stage).layer_specs
    params = [spec.submodules.self_attention.params for spec in specs]
    return [(p["mixer"].__name__, p["depth"], p["num_mixers"]) if "mixer" in p else None for p in params]


@pytest.mark.parametrize(
    "layout",
    [
        {"pipeline_model_parallel_size": 4},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 3},
    ],
    ids=["pp4", "pp2-vpp2", "uneven"],
)
def test_depth_is_the_same_under_pipeline_parallelism(layout, monkeypatch):
    names = {"L": "Lightning", "G": "HGRN2"}
    expected = [(names[letter], i, 8) if letter in names else None for i, letter in enumerate(PATTERN)]
    found = []
    for chunk in range(layout.get("virtual_pipeline_model_parallel_size", 1)):
        for rank in range(layout["pipeline_model_parallel_size"]):
            monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda rank=rank: rank)
            vp_stage = chunk if "virtual_pipeline_model_parallel_size" in layout else None
            found += depths(config(**layout), vp_stage)
    assert found == expected


def test_depth_is_not_megatrons_layer_number(seed):
    """HybridModel counts feed-forward layers, too: eight layers that mix the sequence are then layers of sixteen."""
    linear_moe.build_model(SIZES | {"num_layers": 1}, seed=seed)  # starts Megatron
    specs = layer_specs(config(), options()).layer_specs

    def built(depth):
        attention = specs[depth].submodules.self_attention
        return build_module(attention, config=config(num_layers=16), layer_number=2 * depth + 1)

    lightning, hgrn2 = built(3), built(7)
    assert lightning.layer_number == 7 and hgrn2.layer_number == 15  # telemetry and checkpoints go by it
    assert torch.allclose(lightning.core.constants["g"], -alibi_slopes(HEADS) * (1 - 3 / 7 + 1e-5))
    assert torch.allclose(hgrn2.core.heads.lower_bound.sigmoid(), torch.full((HIDDEN,), 7 / 8))


def test_behind_softmax_a_mixer_is_not_the_first(seed):
    """As in published hybrids, whose layers count on through softmax attention."""
    first, second = (
        linear_moe.build_model(SIZES, num_layers=2, mixer="hgrn2", layer_pattern=pattern, seed=seed)
        for pattern in ("LN", "NL")
    )
    assert "lower_bound" not in first.decoder.layers[0].self_attention.core.heads()
    bound = second.decoder.layers[1].self_attention.core.heads()["lower_bound"]
    assert torch.allclose(bound.sigmoid(), torch.full((32,), 1 / 2))

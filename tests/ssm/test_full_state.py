"""Whole tensors by declared name: every parameter once, as the forward uses it, whatever shards hold it."""

import pytest
import torch

from linear_moe.ops import route
from linear_moe.ssm import MIXERS, mixer_class
from linear_moe.ssm.core import MixerCore
from linear_moe.ssm.full_state import full_state, load_full_state
from linear_moe.ssm.projection import INNER
from tests.helpers import rel_err

D, HEADS = 32, 4
EQUAL = ("gsa", "hgrn2", "rwkv6", "rwkv7", "titans", "ttt")  # these refuse other numbers of heads
MEMORIES = {"plain": 0, "mom": 3}


def build(name, memories=0, dtype=torch.float64, **kwargs):
    cls = mixer_class(name)
    heads = {} if name in EQUAL else {"num_heads": 2, "num_value_heads": HEADS}
    mixer = cls(cls.make_config(D, HEADS, {"conv_size": 4} | heads), layer=1, num_layers=4)
    core = MixerCore(mixer, D, memories=memories, dtype=dtype, **kwargs)
    core.initialize(lambda weight: weight.normal_(0, 0.3))
    return core


def declared(core, memories):
    """Name -> shape, from what the mixer says alone."""
    mixer, shapes = core.mixer, {}
    for name, spec in mixer.projections().items():
        lead = (memories,) if memories and spec.role == "write" else ()
        width = spec.width * mixer.heads(spec.per)
        if spec.low_rank:
            shapes[f"{name}.down"], shapes[f"{name}.up"] = (*lead, spec.low_rank, D), (*lead, width, spec.low_rank)
        else:
            shapes[name] = (*lead, width, D)
        if spec.conv:
            shapes[f"conv_{name}"] = (width, mixer.config.conv_size)
    for name, parameter in mixer.parameters_per_head().items():
        if parameter.trainable:
            shapes[name] = parameter.init(mixer.heads(parameter.per)).shape
    return shapes | {name: init().shape for name, init in mixer.shared_parameters().items()}


@pytest.mark.parametrize("memories", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("name", MIXERS)
def test_round_trip(name, memories, seed):
    """Every declared tensor in its declared shape; another core that loads them has the same parameters."""
    core, other = build(name, memories), build(name, memories)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.normal_()
    state = core.full_state()
    assert {name: (*tensor.shape,) for name, tensor in state.items()} == {
        name: (*shape,) for name, shape in declared(core, memories).items()
    }
    assert sum(tensor.numel() for tensor in state.values()) == sum(p.numel() for p in core.parameters())
    other.load_full_state(state)
    assert all(a.equal(b) for a, b in zip(core.parameters(), other.parameters(), strict=True))
    next(iter(state.values())).zero_()  # a copy: the layer does not notice
    assert all(a.equal(b) for a, b in zip(core.parameters(), other.parameters(), strict=True))


def product(x, part, state, inner):
    """A projection written out: x times the tensor of that name, or its low-rank factors."""
    if part in state:
        return x @ state[part].T
    return INNER[inner](x @ state[f"{part}.down"].T) @ state[f"{part}.up"].T


@pytest.mark.parametrize("memories", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("name", MIXERS)
def test_projections_are_what_their_names_say(name, memories, seed):
    """What the forward's products return under a name is made with the tensor of that name, of each row's memory."""
    core = build(name, memories)
    state, specs = core.full_state(), core.specs
    x = torch.randn(1, 24, D, dtype=torch.float64)
    for part, y in core.tokens(x, lambda parameter: parameter).items():
        assert rel_err(y, product(x, part, state, specs[part].inner)) < 1e-13
    if not memories:
        return
    routes = route(torch.randint(2, (1, 24, 1)), torch.ones(1, 24, 1).double(), num_memories=2, shared=True)
    ends = routes.memory_offsets.tolist()
    for part, y in core.rows(x[0], lambda parameter: parameter, routes).items():
        for m, (start, end) in enumerate(zip([0, *ends], ends)):  # the shared memory last
            own = {key: tensor[m] for key, tensor in state.items() if key.split(".")[0] == part}
            assert rel_err(y[start:end], product(x[0, routes.token[start:end]], part, own, specs[part].inner)) < 1e-13


@pytest.mark.parametrize("memories", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("name", MIXERS)
def test_shards_give_and_take_their_parts(name, memories, seed):
    whole = build(name, memories).full_state()
    parts = [build(name, memories, shards=2, shard=shard) for shard in range(2)]
    tensors, halves = parts[0].tensors(), []
    for part in parts:
        parameters = dict(part.named_parameters())
        load_full_state(tensors, parameters, whole, 2, part.shard)
        halves.append(full_state(tensors, parameters, lambda half, axis: half))
    for key, stored in tensors.items():
        both = [half[key] for half in halves]
        assert both[0].equal(both[1]) if stored.axis is None else torch.cat(both, stored.axis).equal(whole[key])
    with pytest.raises(ValueError, match="whole tensors need all shards, but this is shard 1 of 2"):
        parts[1].full_state()


def test_refusals():
    core = build("gla", memories=3)
    before = core.full_state()
    state = {name: tensor + 1 for name, tensor in before.items()}
    k, up = state.pop("k"), state.pop("a.up")
    with pytest.raises(ValueError, match=r"missing tensors: k \[3, 32, 32\]; a\.up \[3, 64, 16\]$"):
        core.load_full_state(state)
    unknown = r"unknown tensors: a_up \[3, 64, 16\] \(did you mean a\.up\?\)\. The layer has q, "
    with pytest.raises(ValueError, match=unknown):
        core.load_full_state(state | {"k": k, "a_up": up})
    wrong = r"another shape: k \[3, 32, 5\], not \[3, 32, 32\]; a\.up \[2, 64, 16\], not \[3, 64, 16\]"
    with pytest.raises(ValueError, match=wrong):
        core.load_full_state(state | {"k": k[..., :5], "a.up": up[:2]})
    assert all(before[name].equal(tensor) for name, tensor in core.full_state().items())

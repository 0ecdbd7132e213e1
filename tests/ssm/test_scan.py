"""A layer that goes on from a state: pieces of any size and one-token steps are the whole, for every mixer."""

import pytest
import torch

from linear_moe.mom import MoMConfig, Router, make_routes
from linear_moe.ops.sequences import Sequences
from linear_moe.ssm import MIXERS, mixer_class
from linear_moe.ssm.core import MixerCore
from linear_moe.ssm.state import MixerState, state_bytes
from tests.helpers import rel_err

D, HEADS = 32, 4
FORMS = {"plain": None, "mom": MoMConfig(memories=3), "single-kv": MoMConfig(memories=3, single_kv=True, shared=False)}


class Layer:
    """A core with its router, as the Megatron layer has it."""

    def __init__(self, name, mom):
        cls = mixer_class(name)
        mixer = cls(cls.make_config(D, HEADS, {"conv_size": 4}), layer=1, num_layers=4)
        self.mom = mom
        self.core = MixerCore(mixer, D, memories=mom.projections if mom else 0, dtype=torch.float64)
        self.core.initialize(lambda weight: weight.normal_(0, 0.3))
        if mom:
            self.router = Router(D, mom.memories, mom.topk, dtype=torch.float64)
            torch.nn.init.normal_(self.router.weight)

    def __call__(self, x, cu=None, before=None, state=None):
        sequences, routes = Sequences.of(x, cu, before), None
        if self.mom:
            routing = self.router(x.flatten(0, 1))
            routes = make_routes(routing, self.mom, x.shape[:2], sequences.cu_seqlens, 0.0)
        return self.core(x, routes=routes, sequences=sequences, state=state)


def borders(lengths):
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MIXERS)
def test_pieces_and_steps_are_the_whole(name, form, seed):
    """Three sequences, in a pack with an empty part, in a pack where one begins late, then token by token."""
    layer = Layer(name, FORMS[form])
    pieces = [(5, 0, 18), (12, 3, 1)]
    lengths = [sum(each) + 6 for each in zip(*pieces)]
    x = [torch.randn(n, D, dtype=torch.float64) for n in lengths]
    with torch.no_grad():
        whole = layer(torch.cat(x)[None], borders(lengths))[0].split(lengths)
        state, seen, answers = MixerState(3), [0, 0, 0], [[], [], []]

        def forward(tokens, counts, cu):
            y = layer(tokens, cu, torch.tensor(seen), state)
            for n, part in enumerate(y.flatten(0, 1).split(counts)):
                answers[n].append(part)
                seen[n] += counts[n]

        for counts in pieces:
            part = [x[n][seen[n] : seen[n] + counts[n]] for n in range(3)]
            forward(torch.cat(part)[None], list(counts), borders(counts))
        size = state.nbytes
        for _ in range(6):
            forward(torch.stack([x[n][seen[n], None] for n in range(3)]), [1, 1, 1], None)
    memories = layer.mom.memories + layer.mom.shared if layer.mom else 0
    # float64 here, so the rule's states are twice as wide as in any other dtype
    kept = state_bytes(layer.core.mixer, D, memories=memories, element_size=8)
    assert state.nbytes == size == 3 * (kept + 4 * max(memories, 1) * layer.core.mixer.state_size)
    for ours, theirs in zip(answers, whole):
        assert rel_err(torch.cat(ours), theirs) < 1e-9


@pytest.mark.parametrize("form", ["plain", "mom"])
@pytest.mark.parametrize("name", ["gated_deltanet", "gsa", "rwkv6", "ttt"])
def test_reorder(name, form, seed):
    """After a reorder each sequence goes on as the one that was named."""
    layer, index = Layer(name, FORMS[form]), torch.tensor([2, 0, 0])
    x = torch.randn(3, 21, D, dtype=torch.float64)
    state = MixerState(3)
    with torch.no_grad():
        whole = layer(torch.cat([x[index, :20], x[:, 20:]], 1))
        layer(x[:, :20], before=torch.zeros(3, dtype=torch.int64), state=state)
        state.reorder(index)
        last = layer(x[:, 20:], before=torch.full((3,), 20), state=state)
    assert rel_err(last[:, 0], whole[:, 20]) < 1e-9

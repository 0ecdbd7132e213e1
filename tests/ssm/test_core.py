"""The body of a mixer layer: MoM with one memory is the plain mixer, shards are the whole, bfloat16 keeps constants."""

import pytest
import torch

from linear_moe.mom import MoMConfig, Router, make_routes
from linear_moe.ops import route
from linear_moe.ops.sequences import Sequences
from linear_moe.ssm import MIXERS, mixer_class
from linear_moe.ssm.core import MixerCore
from tests.helpers import rel_err
from tests.mixers import Toy

D, HEADS = 32, 4


def build(name, memories=0, dtype=torch.float64, **kwargs):
    cls = mixer_class(name)
    mixer = cls(cls.make_config(D, HEADS, {"conv_size": 4}), layer=1, num_layers=4)
    core = MixerCore(mixer, D, memories=memories, dtype=dtype, **kwargs)
    core.initialize(lambda weight: weight.normal_(0, 0.3))
    return core


def copy_to_memories(plain, many):
    """The plain core's projections, given to every memory of another core."""
    state = plain.full_state()
    many.load_full_state({name: state[name].expand(tensor.shape) for name, tensor in many.full_state().items()})


@pytest.mark.parametrize("single_kv", [False, True], ids=["own-kv", "single-kv"])
@pytest.mark.parametrize("pack", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("name", MIXERS)
def test_one_memory_is_the_plain_mixer(name, pack, single_kv, seed):
    """M = 1, k = 1, no shared memory: the same function and gradients, to the rounding of the matrix products, whose
    order of summation may depend on their width."""
    mom = MoMConfig(memories=1, topk=1, shared=False, single_kv=single_kv)
    plain, many = build(name), build(name, mom.projections)
    copy_to_memories(plain, many)
    router = Router(D, 1, 1, dtype=torch.float64)
    torch.nn.init.normal_(router.weight)
    B, T = (1, 90) if pack else (2, 45)
    cu = torch.tensor([0, 30, 30, 90], dtype=torch.int32) if pack else None
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    sequences = Sequences.of(x, cu)
    y = plain(x, sequences=sequences)
    routes = make_routes(router(x.flatten(0, 1)), mom, (B, T), cu, 0.0)
    routed = many(x, routes=routes, sequences=sequences)
    assert rel_err(routed, y) < 1e-13
    direction = torch.randn_like(y)
    (dx,) = torch.autograd.grad((y * direction).sum(), x)
    (routed_dx,) = torch.autograd.grad((routed * direction).sum(), x)
    assert rel_err(routed_dx, dx) < 1e-13


@pytest.mark.parametrize("name", MIXERS)
def test_equal_memories_are_one(name, seed):
    """Each token's k weights sum to 1, so memories that get every token and share their weights answer as one."""
    mom = MoMConfig(memories=3, topk=3, shared=False)
    plain, many = build(name), build(name, mom.projections)
    copy_to_memories(plain, many)
    router = Router(D, 3, 3, dtype=torch.float64)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(2, 45, D, dtype=torch.float64)
    routes = make_routes(router(x.flatten(0, 1)), mom, (2, 45), None, 0.0)
    # The gate and norm come after the combination, which is linear in the answers.
    assert rel_err(many(x, routes=routes), plain(x)) < 1e-12


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "retention"])  # its positions count every token
def test_untouched_memories_stay(name, seed):
    """A token that is not routed to a memory leaves it as it is: removing it changes nothing for the others."""
    core = build(name, memories=2)
    with torch.no_grad():  # what asks the memories and gates their answers is shifted along all tokens: not here
        for key, parameter in core.shared.named_parameters():
            if key in ("mix_q", "mix_gate", "mix_up_q", "mix_up_gate"):
                parameter.zero_()
    T = 40
    x = torch.randn(1, T, D, dtype=torch.float64)
    to_first = torch.rand(T) < 0.5

    def answer(keep):
        indices = torch.where(to_first, 0, 1)[keep].view(1, -1, 1)
        weights = torch.ones(1, len(keep), 1, dtype=torch.float64)
        routes = route(indices, weights, num_memories=2, shared=False)
        return core(x[:, keep], routes=routes)

    everything = answer(torch.arange(T))
    first = to_first.nonzero().flatten()
    assert rel_err(answer(first), everything[:, first]) < 1e-12


@pytest.mark.parametrize("memories", [0, 3], ids=["plain", "mom"])
@pytest.mark.parametrize("name", MIXERS)
def test_shards_are_parts_of_the_whole(name, memories, seed):
    """Initial values and outputs of two shards, side by side, are those of one."""

    def seeded(**kwargs):
        torch.manual_seed(seed)
        return build(name, memories, **kwargs)

    whole, parts = seeded(), [seeded(shards=2, shard=i) for i in range(2)]
    x = torch.randn(2, 40, D, dtype=torch.float64)
    routes = None
    if memories:
        mom = MoMConfig(memories=memories, topk=2, shared=False)
        router = Router(D, memories, 2, dtype=torch.float64)
        torch.nn.init.normal_(router.weight)
        routes = make_routes(router(x.flatten(0, 1)), mom, (2, 40), None, 0.0)
    outputs = [part(x, routes=routes) for part in parts]
    assert rel_err(torch.cat(outputs, -1), whole(x, routes=routes)) < 1e-12


@pytest.mark.parametrize("name", MIXERS)
def test_what_is_no_matrix_is_not_decayed(name):
    """Megatron decays the weight of whatever has more than one dimension: of these only convolutions and maps."""
    core = build(name)
    decayed = {n for n, p in core.named_parameters() if p.dim() > 1}
    matrices = ("conv_", "mix_down_", "mix_up_")
    assert not [n for n in decayed if n.startswith(("heads.", "shared.")) and not any(m in n for m in matrices)]


@pytest.mark.parametrize("name", MIXERS)
def test_every_module_with_parameters_is_called(name):
    """Megatron's overlapped gather of parameters waits in the forward of the module that owns them."""
    core = build(name)
    called = set()
    for module in core.modules():
        module.register_forward_pre_hook(lambda module, _: called.add(module))
    core(torch.randn(1, 5, D, dtype=torch.float64))
    assert {m for m in core.modules() if list(m.parameters(recurse=False))} <= called


def test_constants_stay_float32(seed):
    core = build("retention", dtype=torch.float32).bfloat16()
    assert core.constants["g"].dtype == torch.float32
    assert torch.allclose(core.constants["g"].double().expm1(), -(2.0 ** (-5.0 - torch.arange(HEADS).double())))


@pytest.mark.parametrize("name", MIXERS)
def test_bfloat16_is_close_to_float32(name, seed):
    core = build(name, memories=3, dtype=torch.float32)
    mom = MoMConfig(memories=2, topk=1)
    router = Router(D, 2, 1)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(2, 45, D).bfloat16().float()
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.copy_(parameter.bfloat16())
        routes = make_routes(router(x.flatten(0, 1)), mom, (2, 45), None, 0.0)
        expected = core(x, routes=routes)
        assert rel_err(core.bfloat16()(x.bfloat16(), routes=routes), expected) < 3e-2


class Before(Toy):
    """Writes, asks and answers with what stood one token earlier."""

    token_shift = True

    def mix(self, names, x, previous, p):
        return dict.fromkeys(names, previous)

    def recur(self, q, k, v, **options):
        return v.repeat(1, 1, 1, 2) if q.shape[-1] > v.shape[-1] else v

    def output(self, o, gate, p, routes):
        return o


@pytest.mark.parametrize("single_kv", [False, True], ids=["own-kv", "single-kv"])
@pytest.mark.parametrize("pack", [False, True], ids=["dense", "packed"])
def test_token_shift_keeps_to_sequences_and_buckets(pack, single_kv, seed):
    """The token before is that of the same sequence; for what enters a memory, the one that entered it before."""
    core = MixerCore(Before(Before.make_config(D, 1, {})), D, memories=0 if single_kv else 3, dtype=torch.float64)
    with torch.no_grad():  # every projection is the identity
        for fused in filter(None, (core.tokens, core.rows)):
            fused.weight.copy_(torch.cat([torch.eye(D, dtype=torch.float64)] * len(fused.local)))
    cu = torch.tensor([0, 0, 7, 8, 20], dtype=torch.int32) if pack else None
    x = torch.randn(1, 20, D, dtype=torch.float64)
    sequence = torch.zeros(20).long() if cu is None else torch.repeat_interleave(torch.arange(4), cu.diff())
    indices = torch.randint(2, (1, 20, 1))
    routes = route(indices, torch.ones(1, 20, 1).double(), num_memories=2, shared=True, cu_seqlens=cu)
    memory = torch.cat([indices[0], torch.full((20, 1), 2)], 1)
    places = {}  # (sequence, memory) -> its last token so far
    expected = torch.zeros(20, 2, D, dtype=torch.float64)
    for t in range(20):
        for j in range(2):
            bucket = int(sequence[t]), int(memory[t, j])
            expected[t, j] = x[0, places[bucket]] if bucket in places else 0
            places[bucket] = t
    found = core.mixer.recur
    rows = []
    core.mixer.recur = lambda q, k, v, **options: (rows.append(v), found(q, k, v, **options))[1]
    core.mixer.output = lambda o, gate, p, routes: o[:20]
    core(x, routes=routes)
    assert torch.equal(rows[0][0, :, 0][routes.row], expected)
    plain = core(x, sequences=Sequences.of(x, cu)) if single_kv else None
    if plain is not None:
        before = torch.where(
            (sequence == sequence.roll(1))[:, None] & (torch.arange(20) > 0)[:, None], x[0].roll(1, 0), 0
        )
        assert torch.equal(plain[0], before)


def test_value_residual_mixes_the_first_layers_values(seed):
    first = {}
    cls = mixer_class("rwkv7")
    config = cls.make_config(D, HEADS, {"value_residual": True})
    cores = [MixerCore(cls(config, i, 2), D, dtype=torch.float64, first_values=first) for i in range(2)]
    for core in cores:
        core.initialize(lambda weight: weight.normal_(0, 0.3))
    x = torch.randn(2, 9, D, dtype=torch.float64)
    seen = []
    for core in cores:
        recur = core.mixer.recur
        core.mixer.recur = lambda recur=recur, **operands: (seen.append(operands), recur(**operands))[1]
        y = core(x)
    own, p = cores[1], seen[1]["p"]
    previous = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    mixed = x + (previous - x) * p["mix_v"]
    v = torch.nn.functional.linear(mixed, own.tokens.weight.split(list(own.tokens.local.values()))[2]).view(
        2, 9, HEADS, -1
    )
    low = torch.nn.functional.linear(mixed, own.tokens.down.split(list(own.tokens.ranks.values()))[-1])
    nu = torch.sigmoid(p["nu0"] + (low @ own.tokens.up_nu.T).view(2, 9, HEADS, -1))
    assert rel_err(seen[1]["v"], v + nu * (seen[0]["v"] - v)) < 1e-13
    y.sum().backward()
    assert cores[0].tokens.weight.grad.any()  # through the second layer's values


def test_heads_must_divide():
    with pytest.raises(ValueError, match=r"num_heads \(4\) must be divisible by the tensor parallel size \(3\)"):
        build("gla", shards=3)

"""Each mixer against its formula in MATHS.md, token by token, and its options."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map

from linear_moe.ops.sequences import Sequences
from linear_moe.ssm import MIXERS, mixer_class
from linear_moe.ssm.lightning import alibi_slopes
from linear_moe.ssm.mixer import rotary
from linear_moe.ssm.scan import Carried, Plain
from tests.helpers import rel_err

T, H, HV, K, V = 33, 2, 4, 6, 5


def l2(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def loop(q, k, v, decay, beta=None, scale=K**-0.5):
    """decay ``[T, HV, K]`` multiplies the state's key channels; beta ``[T, HV]`` makes it a delta rule."""
    S = torch.zeros(HV, q.shape[-1], v.shape[-1], dtype=q.dtype)
    q, k = (x.repeat_interleave(HV // x.shape[1], 1) for x in (q, k))
    o = []
    for t in range(T):
        S = S * decay[t, :, :, None]
        new = v[t]
        if beta is not None:
            new = beta[t, :, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], S))
        S = S + torch.einsum("hk,hv->hkv", k[t], new)
        o.append(scale * torch.einsum("hk,hkv->hv", q[t], S))
    return torch.stack(o)


def gated_slots(x, f):
    """What M slots hold after each token: ``[T, H, M, D]``."""
    slots, found = torch.zeros(HV, f.shape[-1], x.shape[-1], dtype=x.dtype), []
    for t in range(T):
        slots = f[t][..., None] * slots + torch.einsum("hm,hd->hmd", 1 - f[t], x[t])
        found.append(slots)
    return torch.stack(found)


def inner_training(q, k, v, eta, p):
    """TTT-Linear with the inner loss's gradient from autograd, head by head."""
    weight, bias = p["inner_weight"], p["inner_bias"]
    answers = torch.empty(T, HV, K, dtype=torch.float64)
    for h in range(HV):
        W, b = p["first_weights"][h, :K], p["first_weights"][h, K]
        inner = lambda z: F.layer_norm(z, (K,), weight[h], bias[h], 1e-6)  # noqa: B023, E731
        for start in range(0, T, 16):
            steps = [torch.zeros_like(W), torch.zeros_like(b)]
            for n, t in enumerate(range(start, min(start + 16, T))):
                W, b = W.detach().requires_grad_(), b.detach().requires_grad_()
                loss = 0.5 * (inner(k[t, h] @ W + b) - (v[t, h] - k[t, h])).square().sum()
                steps = [s + eta[t, h] * g for s, g in zip(steps, torch.autograd.grad(loss, (W, b)))]
                scale = p["place"][n].clamp(min=0)
                answers[t, h] = q[t, h] + inner(q[t, h] @ (W - scale * steps[0]) + b - scale * steps[1])
            W, b = W - scale * steps[0], b - scale * steps[1]
    return answers.detach()


def expected(name, x, p):
    """The formula of MATHS.md, written out once more."""
    ones = torch.ones(T, HV, K, dtype=torch.float64)
    q, k, v = x["q"], x.get("k"), x["v"]
    h = torch.arange(HV).double()
    if name == "linear_attention":
        return loop(F.elu(q) + 1, F.elu(k) + 1, v, ones)
    if name == "retention":
        turn = torch.arange(T).double()[:, None] * 10000.0 ** (-torch.arange(K // 2).double() / (K // 2))
        turn = torch.polar(torch.ones_like(turn), turn)[:, None]
        q, k = ((torch.complex(y[..., : K // 2], y[..., K // 2 :]) * turn) for y in (q, k))
        q, k = (torch.cat([y.real, y.imag], -1) for y in (q, k))
        return loop(q, k, v, (1 - 2 ** (-5 - h))[:, None] * ones)
    if name == "lightning":
        slopes = torch.tensor([2.0 ** (-8 * (i + 1) / HV) for i in range(HV)]).double()
        return loop(q, k, v, torch.exp(-slopes * (1 - 1 / 3 + 1e-5))[:, None] * ones)
    if name == "gla":
        return loop(q, k, v, torch.exp(F.logsigmoid(x["a"] + p["g_bias"]) / 16))
    if name == "mamba2":
        dt = F.softplus(x["dt"][..., 0] + p["dt_bias"])
        decay = torch.exp(-p["A_log"].exp() * dt)[..., None] * ones
        return loop(q, k, dt[..., None] * v, decay, scale=1.0) + p["D"][:, None] * v
    if name == "hgrn2":
        bound = p["lower_bound"].sigmoid()
        f = bound + (1 - bound) * x["a"].sigmoid()
        return loop(q, 1 - f, v, f, scale=1.0)
    if name == "based":
        q, k = (y.repeat_interleave(HV // H, 1) for y in (q, k))
        s = torch.einsum("thk,shk->hts", q, k) * K**-0.5
        weights = (1 + s + s.square() / 2).tril()
        return torch.einsum("hts,shv->thv", weights, v) / (weights.sum(-1).mT[..., None] + 1e-6)
    if name == "rebased":
        q, k = (F.layer_norm(y, (K,)) * p["gamma"] + p["beta"] for y in (q, k))
        q, k = (y.repeat_interleave(HV // H, 1) for y in (q, k))
        weights = (torch.einsum("thk,shk->hts", q, k).square() / K).tril()
        return torch.einsum("hts,shv->thv", weights, v) / (weights.sum(-1).mT[..., None] + 1e-2)
    if name == "gsa":
        f = x["slots"].sigmoid() ** (1 / 8)
        slots = gated_slots(k, f), gated_slots(v, f)
        return torch.einsum(
            "thm,thmv->thv", (torch.einsum("thmk,thk->thm", slots[0], q) * K**-0.5).softmax(-1), slots[1]
        )
    if name == "rwkv6":
        f = torch.exp(-torch.exp(p["w0"] + x["w"]))
        S, o = torch.zeros(HV, K, V, dtype=torch.float64), []
        for t in range(T):
            now = torch.einsum("hk,hv->hkv", k[t], v[t])
            o.append(torch.einsum("hk,hkv->hv", q[t], S + p["u"][..., None] * now))
            S = f[t][..., None] * S + now
        return torch.stack(o)
    if name == "rwkv7":
        f, iclr = torch.exp(-math.exp(-0.5) * (p["w0"] + x["w"]).sigmoid()), (p["iclr0"] + x["iclr"]).sigmoid()
        kappa = k * p["xi"] / (k * p["xi"]).norm(dim=-1, keepdim=True)
        k = k * (1 - p["alpha"] + p["alpha"] * iclr)
        S, o = torch.zeros(HV, V, K, dtype=torch.float64), []  # the paper's: rows are values
        for t in range(T):
            transition = torch.diag_embed(f[t]) - torch.einsum("hi,hj->hij", kappa[t], iclr[t] * kappa[t])
            S = S @ transition + torch.einsum("hv,hk->hvk", v[t], k[t])
            o.append(torch.einsum("hvk,hk->hv", S, q[t]))
        return torch.cat([torch.stack(o), (q * k * p["bonus"]).sum(-1, keepdim=True) * v], -1)
    if name == "ttt":
        return inner_training(q, k, v, x["rate"][..., 0].sigmoid() / K, p)
    if name == "titans":
        theta, alpha, eta = x["theta"].sigmoid() / 16, (x["alpha"] + p["alpha_bias"][:, None]).sigmoid(), x["eta"]
        eta = (eta + p["eta_bias"][:, None]).sigmoid()
        q, k = l2(q), l2(k)
        S = Z = torch.zeros(HV, K, V, dtype=torch.float64)
        o = []
        for t in range(T):
            if t % 16 == 0:
                start = S
            wrong = torch.einsum("hkv,hk->hv", start, k[t]) - v[t]
            Z = eta[t][..., None] * Z - theta[t][..., None] * torch.einsum("hk,hv->hkv", k[t], wrong)
            S = (1 - alpha[t][..., None]) * S + Z
            o.append(torch.einsum("hkv,hk->hv", S, q[t]) * K**-0.5)
        return torch.stack(o)
    beta = x["beta"][..., 0].sigmoid()
    if name == "deltanet":
        return loop(l2(q), l2(k), v, ones, beta)
    if name == "kda":
        g = -p["A_log"].exp()[:, None] * F.softplus(x["a"] + p["dt_bias"])
        return loop(l2(q), l2(k), v, torch.exp(g), beta)
    if name == "gated_deltanet":
        g = -p["A_log"].exp() * F.softplus(x["a"][..., 0] + p["dt_bias"])
        return loop(l2(q), l2(k), v, torch.exp(g)[..., None] * ones, beta)
    raise AssertionError(f"no formula for {name}")


EQUAL_HEADS = ("hgrn2", "gsa", "rwkv6", "rwkv7", "ttt", "titans")


@pytest.mark.parametrize("name", MIXERS)
def test_mixer_computes_its_formula(name, seed):
    cls = mixer_class(name)
    options = {"num_heads": HV if name in EQUAL_HEADS else H, "num_value_heads": HV, "head_dim": K}
    options["value_head_dim"] = K if name == "ttt" else V
    mixer = cls(cls.make_config(32, 4, options), layer=1, num_layers=4)
    specs = {n: s for n, s in mixer.projections().items() if s.role != "gate"}
    x = {n: torch.randn(T, mixer.heads(s.per), s.width, dtype=torch.float64) for n, s in specs.items()}
    p = {n: s.init(mixer.heads(s.per)).double() for n, s in mixer.parameters_per_head().items()}
    p |= {n: init().double() for n, init in mixer.shared_parameters().items()}
    # The layer normalises what the projections say
    operands = {n: (l2(value) if specs[n].normalize else value)[None] for n, value in x.items()}
    o = mixer.recur(**operands, p=p, scan=Plain(Sequences.of(operands["v"]), mixer.initial_state(p, 1)))
    assert rel_err(o[0], expected(name, x, p)) < 1e-6  # rotary angles are float32


def carried(mixer, x, p, cu_seqlens=None, initial=None, before=None):
    """The mixer's answer, and the states that the sequences of x end in."""
    sequences = Sequences.of(x["v"], cu_seqlens, before)
    scan = Carried(sequences, mixer.initial_state(p, sequences.N) if initial is None else initial)
    return mixer.recur(**x, p=p, scan=scan), scan.final


def drawn(name):
    """A mixer, its parameters and a function that draws operands of T tokens."""
    cls = mixer_class(name)
    mixer = cls(cls.make_config(32, 4, {}), layer=1, num_layers=4)
    specs = {n: s for n, s in mixer.projections().items() if s.role != "gate"}
    p = {n: s.init(mixer.heads(s.per)).double() for n, s in mixer.parameters_per_head().items()}
    p |= {n: init().double() for n, init in mixer.shared_parameters().items()}

    def draw(T):
        return {n: torch.randn(1, T, mixer.heads(s.per), s.width, dtype=torch.float64) for n, s in specs.items()}

    return mixer, p, draw


@pytest.mark.parametrize("name", MIXERS)
def test_state_carries_a_sequence(name, seed):
    """Two parts, the second from the first one's state, are the whole."""
    mixer, p, draw = drawn(name)
    x = draw(T)
    whole, final = carried(mixer, x, p)
    parts = [{n: value[:, part] for n, value in x.items()} for part in (slice(20), slice(20, T))]
    first, state = carried(mixer, parts[0], p)
    second, last = carried(mixer, parts[1], p, initial=state, before=torch.tensor([20]))
    assert rel_err(torch.cat([first, second], 1), whole) < 1e-9
    for ours, theirs in zip(tree_leaves(last), tree_leaves(final), strict=True):
        assert rel_err(ours, theirs) < 1e-9


@pytest.mark.parametrize("name", MIXERS)
def test_states_in_packs(name, seed):
    """Each sequence of a pack, those that begin and empty ones among them, goes on from the state given to it and
    leaves the one that it would leave alone."""
    mixer, p, draw = drawn(name)
    lengths, seen = (0, 5, 0, 17, 1, 0, 9), (3, 18, 0, 1, 16, 20, 0)
    before = [carried(mixer, draw(n), p)[1] for n in seen]
    parts = [draw(n) for n in lengths]
    alone = [carried(mixer, x, p, initial=state, before=torch.tensor([n])) for x, state, n in zip(parts, before, seen)]
    o, states = carried(
        mixer,
        {n: torch.cat([x[n] for x in parts], 1) for n in parts[0]},
        p,
        torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
        tree_map(lambda *each: torch.cat(each), *before),
        torch.tensor(seen),
    )
    assert rel_err(o, torch.cat([answer for answer, _ in alone], 1)) < 1e-9
    expected = tree_map(lambda *each: torch.cat(each), *(state for _, state in alone))
    for ours, theirs in zip(tree_leaves(states), tree_leaves(expected), strict=True):
        assert rel_err(ours, theirs) < 1e-9
    for n, (_, state), given in zip(lengths, alone, before):
        if not n:
            assert all(torch.equal(a, b) for a, b in zip(tree_leaves(state), tree_leaves(given), strict=True))


def test_a_mixer_runs_one_rule(seed):
    _, p, draw = drawn("gla")
    mixer = TwoRules(TwoRules.make_config(32, 4, {}), layer=1, num_layers=4)
    with pytest.raises(ValueError, match="recur called scan twice"):
        carried(mixer, draw(3), p)


class TwoRules(mixer_class("gla")):
    def recur(self, *operands, **options):
        return super().recur(*operands, **options) + super().recur(*operands, **options)


def test_alibi_slopes():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(12)[8:].tolist() == pytest.approx([2.0 ** (-(2 * i + 1) / 2) for i in range(4)])


def test_mamba2_norms_over_a_group_after_the_gate(seed):
    cls = mixer_class("mamba2")
    mixer = cls(cls.make_config(32, 2, {}))
    o, gate = torch.randn(2, 3, 4, 16, dtype=torch.float64)
    group = (o * F.silu(gate)).view(3, 2, 32)
    group = group / (group.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    weight = torch.rand(4, 16, dtype=torch.float64)
    assert rel_err(mixer.output(o, gate, {"norm": weight}, None), group.view_as(o) * weight) < 1e-12


def dpfp(x, nu):
    """arXiv 2102.11174, eq. 37: phi_{i nu}(k) = r_i r_{i + nu} of r = relu([k, -k]), the index round the end."""
    r = torch.cat([x, -x], -1).relu()
    n = r.shape[-1]
    return torch.stack([r[..., i] * r[..., (i - shift) % n] for shift in range(1, nu + 1) for i in range(n)], -1)


def test_gated_deltanet_starts_with_even_decays(seed):
    """Of 3 heads at 0.001 * 100^(1/6), ^(3/6), ^(5/6) a token; or at random ones."""

    def decays(**options):
        mixer = mixer_class("gated_deltanet")
        parameters = mixer(
            mixer.make_config(32, 3, {"head_dim": 8, "value_head_dim": 8} | options)
        ).parameters_per_head()
        A_log, dt_bias = (parameters[name].init(3) for name in ("A_log", "dt_bias"))
        return A_log.exp() * torch.nn.functional.softplus(dt_bias)

    assert decays() == pytest.approx([0.001 * 100 ** (i / 6) for i in (1, 3, 5)], rel=1e-4)
    drawn = torch.stack([decays(even_decays=False) for _ in range(200)])
    assert drawn.min() >= 0.001 and drawn.max() <= 1.6 and drawn.max() > 0.5 and len(drawn.unique()) == 600


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("feature_map", ["relu", "dpfp", "hedgehog", "t2r"])
def test_feature_maps(feature_map, normalize, seed):
    cls = mixer_class("linear_attention")
    options = {"num_heads": HV, "head_dim": K, "value_head_dim": V, "feature_map": feature_map, "nu": 3}
    mixer = cls(cls.make_config(32, 4, options | {"normalize": normalize}))
    q, k = torch.randn(2, 1, T, HV, K, dtype=torch.float64)
    v = torch.randn(1, T, HV, V, dtype=torch.float64)
    p = {n: torch.randn_like(init(), dtype=torch.float64) for n, init in mixer.shared_parameters().items()}
    o, state = carried(mixer, {"q": q, "k": k, "v": v}, p)
    maps = {
        "relu": lambda x, name: x.relu(),
        "dpfp": lambda x, name: dpfp(x, 3),
        "hedgehog": lambda x, name: hedgehog(x @ p[f"{name}_map"].T + p[f"{name}_map_bias"]),
        "t2r": lambda x, name: (x @ p[f"{name}_map"].T + p[f"{name}_map_bias"]).relu(),
    }
    q, k = maps[feature_map](q[0], "q"), maps[feature_map](k[0], "k")
    weights = torch.einsum("thk,shk->hts", q, k).tril()
    expected = torch.einsum("hts,shv->thv", weights, v[0])
    expected = expected / (weights.sum(-1).mT[..., None] + 1e-6) if normalize else expected * q.shape[-1] ** -0.5
    assert rel_err(o[0], expected) < 1e-9
    assert mixer.key_channels == q.shape[-1] and mixer.state_size == state[0].numel()


def hedgehog(y):
    """arXiv 2402.04347: [e^y, e^-y], here of 2 y, divided by their sum."""
    y = torch.cat([2 * y, -2 * y], -1).exp()
    return y / y.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", MIXERS)
def test_state_has_the_size_it_says(name):
    mixer, p, draw = drawn(name)
    _, state = carried(mixer, draw(3), p)
    assert sum(leaf.numel() for leaf in tree_leaves(state)) == mixer.state_size


def test_linear_attention_normalised_is_an_average(seed):
    cls = mixer_class("linear_attention")
    mixer = cls(cls.make_config(32, 4, {"normalize": True}))
    q, k = torch.randn(2, 1, T, 4, 8, dtype=torch.float64)
    v = torch.full((1, T, 4, 8), math.pi, dtype=torch.float64)
    o, _ = carried(mixer, {"q": q, "k": k, "v": v}, {})
    assert rel_err(o, v) < 1e-5


def test_rotary_depends_on_distance_only(seed):
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 2, 1, 8)
    places = torch.tensor([[3, 103]])
    scores = (rotary(q, places + 5) * rotary(k, places)).sum(-1)
    assert rel_err(scores[:, 0], scores[:, 1]) < 1e-5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gla", {"head_dims": 8}, "unknown mixer option 'head_dims'; did you mean 'head_dim'"),
        ("gla", {"head_dim": "8"}, "head_dim must be of type int, but is '8'"),
        ("gla", {"head_dim": 0}, "head_dim must be at least 1, but is 0"),
        ("gla", {"gate_rank": 0}, r"gate_rank \(0\) must be at least 1"),
        ("gla", {"num_value_heads": 6}, r"num_value_heads \(6\) must be a multiple of num_heads \(4\)"),
        ("gla", {"num_heads": 3}, r"hidden_size \(32\) must be divisible by num_heads \(3\)"),
        ("deltanet", {"conv_size": 1}, "conv_size must be 0 .none. or at least 2, but is 1"),
        ("retention", {"head_dim": 7}, "even head_dim"),
        (
            "linear_attention",
            {"feature_map": "gelu"},
            "feature_map must be one of elu, relu, identity, dpfp, hedgehog, t2r, but",
        ),
        ("linear_attention", {"feature_map": "identity", "normalize": True}, "not negative"),
        ("linear_attention", {"feature_map": "dpfp", "nu": 16}, r"nu \(16\) must be between 1 and .* \(15\)"),
        ("linear_attention", {"hidden_size": 32}, "unknown mixer option 'hidden_size'"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        mixer_class(name).make_config(32, 4, options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gated_deltanett", "unknown mixer 'gated_deltanett'; did you mean 'gated_deltanet'"),
        ("rubbish", "Allowed: linear_attention, retention"),
        ("no.such.module:Class", "cannot be imported: No module named 'no'; is its folder on PYTHONPATH"),
        ("linear_moe.ssm.mixer:Projection", "not a subclass"),
    ],
)
def test_unknown_mixer(name, message):
    with pytest.raises(ValueError, match=message):
        mixer_class(name)

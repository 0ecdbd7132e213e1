"""What the kernels are compiled, counted and tuned on: every op in every form, forward and backward.

The same cases run on meta tensors, where launches are only recorded, under the interpreter, where products of matrices
are counted, and on a GPU, where they are timed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from linear_moe.ops import api, decoding, online
from linear_moe.ops.check_step import ONE_DTYPE, OPERANDS, STATES
from linear_moe.ops.triton import launch, tuning

HIDDEN, MEMORIES, TOPK, TAPS = 1024, 4, 2, 4


@dataclass(frozen=True)
class Shape:
    """B sequences of T tokens, H key heads of width K, values of width V. The default is one MoM layer's work."""

    K: int
    V: int
    dtype: torch.dtype = torch.bfloat16
    device: str = "meta"
    B: int = 4
    T: int = 4096
    H: int = 8

    def draw(self, *size, dtype=None, grad=True):
        x = torch.randn(size, dtype=dtype or self.dtype, device=self.device)
        return x.requires_grad_(grad)


@dataclass(frozen=True)
class Case:
    """One use of one op. `prepare(shape)` -> (differentiable inputs, function of them that returns the outputs)."""

    name: str
    prepare: Callable
    backward: bool = True
    decoding: bool = False  # one token of every sequence
    counted: tuple[int, int] = (1, 128)  # heads and tokens on which FLOPs are counted; they grow linearly with both

    def tokens(self, shape):
        return shape.B if self.decoding else shape.B * shape.T

    def run(self, inputs, function, backward=True):
        """Forward, and backward for every input, of what `prepare` gave. Returns outputs and gradients."""
        backward = backward and self.backward
        with torch.set_grad_enabled(backward):
            outputs = function(*inputs)
        if not backward:
            return [*outputs]
        return [*outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])]


def _rule(rule, decay, *, packed=False, groups=1, states=False):
    """decay: None, or the number of dimensions of g. packed: B sequences in one row, of which one is empty."""

    def prepare(s):
        B, T, HV = (1, s.B * s.T, s.H * groups) if packed else (s.B, s.T, s.H * groups)
        q, k = (normalize(s.draw(B, T, s.H, s.K, grad=False), dim=-1).requires_grad_() for _ in range(2))
        inputs = {"q": q, "k": k, "v": s.draw(B, T, HV, s.V)}
        if rule == "delta_rule":
            inputs["beta"] = s.draw(B, T, HV, dtype=torch.float32, grad=False).sigmoid().requires_grad_()
        if rule == "dplr":
            inputs["a"] = normalize(s.draw(B, T, HV, s.K, grad=False), dim=-1).requires_grad_()
            inputs["b"] = (s.draw(B, T, HV, s.K, grad=False).sigmoid() * -inputs["a"].detach()).requires_grad_()
        if decay:
            size = (HV,) if decay == 1 else (B, T, HV, s.K)[:decay]
            inputs["g"] = (s.draw(*size, dtype=torch.float32, grad=False).abs() * -0.1).requires_grad_()
        if states:
            inputs["initial_state"] = s.draw(s.B + 1 if packed else s.B, HV, s.K, s.V, dtype=torch.float32)
        cu = torch.arange(-1, s.B + 1, device=s.device).clamp(min=0).int() * s.T if packed else None

        def function(*values):
            given = dict(zip(inputs, values))
            o, state = getattr(api, rule)(**given, return_state=states, cu_seqlens=cu, backend="triton")
            return (o, state) if states else (o,)

        return [*inputs.values()], function

    return prepare


def _summary(rule, decay):
    """Of packed segments, of which one is empty."""

    def prepare(s):
        inputs, _ = _rule(rule, decay, packed=True)(s)
        cu = torch.arange(-1, s.B + 1, device=s.device).clamp(min=0).int() * s.T
        return inputs[1:], lambda *operands: api.summary(rule, None, *operands, cu_seqlens=cu, backend="triton")

    return prepare


def _rwkv6(s):
    inputs = [s.draw(s.B, s.T, s.H, width) for width in (s.K, s.K, s.V)]
    inputs += [_decay(s, s.K), s.draw(s.H, s.K, dtype=torch.float32)]
    return inputs, lambda *x: api.rwkv6(*x, backend="triton")[:1]


def _gsa(s):
    """As many slots as value channels, so that the first pass is compiled for states of V x K."""
    inputs = [s.draw(s.B, s.T, s.H, width) for width in (s.K, s.K, s.V, s.V)]
    return [*inputs, _decay(s, s.V)], lambda *x: api.gsa(*x, backend="triton")[:1]


def _decay(s, width):
    return (s.draw(s.B, s.T, s.H, width, dtype=torch.float32, grad=False).abs() * -0.1).requires_grad_()


def _step(rule, *, stored=False, **forms):
    """forms: of operands that may have several, else the last one. stored: in a store of the states."""

    def prepare(s):
        V = min(s.V, online.MAX_WIDTH) if rule in ("ttt_linear", "titans_linear") else s.V
        K = min(s.K, V) if rule == "titans_linear" else s.K
        sizes = {"R": s.B, "H": s.H, "HV": s.H, "K": K, "V": V, "M": V, "D": V, "D+1": V + 1, "2": 2, "3": 3}

        def draw(form, dtype=torch.float32):
            return s.draw(*(sizes[symbol] for symbol in form.split()), dtype=dtype, grad=False)

        operands = []
        for name, form in (OPERANDS[rule] | forms).items():
            form = form.rpartition(" | ")[2]
            operands.append(draw(form, s.dtype) if name in ONE_DTYPE else -draw(form).abs())  # decays are negative
        states = tuple(draw(f"R {form}") for form in STATES[rule])
        slots = torch.arange(s.B, device=s.device) if stored else None

        def function():
            state = [x.clone() for x in states] if stored else states  # the next run begins with the same ones
            o, new = decoding.step(
                rule, tuple(state) if rule == "gsa" else state[0], *operands, slots=slots, backend="triton"
            )
            return o, *(new if rule == "gsa" else (new,))

        return [], function

    return prepare


def _online(rule, *, packed=False):
    """packed: as above, with states and offsets. Its kernels take heads of at most 128 channels, TTT's square ones."""

    def prepare(s):
        B, T = (1, s.B * s.T) if packed else (s.B, s.T)
        N, V = s.B + 1 if packed else s.B, min(s.V, online.MAX_WIDTH)
        K = V if rule == "ttt_linear" else min(s.K, online.MAX_WIDTH)
        q, k = (normalize(s.draw(B, T, s.H, K, grad=False), dim=-1).requires_grad_() for _ in range(2))
        inputs = {"q": q, "k": k, "v": s.draw(B, T, s.H, V)}
        gates = {"ttt_linear": ("eta", "token_scale"), "titans_linear": ("theta", "g", "m")}[rule]
        for name in gates:
            x = s.draw(B, T, s.H, dtype=torch.float32, grad=False).sigmoid()
            inputs[name] = (x.log() if name in ("g", "m") else 0.1 * x).requires_grad_()
        if rule == "ttt_linear":
            inputs |= {name: s.draw(s.H, V, dtype=torch.float32) for name in ("weight", "bias")}
        if packed:
            size = (2, V + 1, V) if rule == "ttt_linear" else (3, K, V)
            inputs["initial_state"] = s.draw(N, s.H, *size, dtype=torch.float32)
        options = {"return_state": packed, "backend": "triton"}
        if packed:
            options["cu_seqlens"] = torch.arange(-1, s.B + 1, device=s.device).clamp(min=0).int() * s.T
            options["offset"] = torch.arange(N, device=s.device) % 16

        def function(*values):
            o, state = getattr(api, rule)(**dict(zip(inputs, values)), **options)
            return (o, state) if packed else (o,)

        return [*inputs.values()], function

    return prepare


def _choices(s):
    """Balanced, so that counts do not depend on luck: token t goes to memories t and t + 1 of M."""
    token = torch.arange(s.B * s.T, device=s.device).view(s.B, s.T, 1)
    indices = (token + torch.arange(TOPK, device=s.device)) % MEMORIES
    return indices, s.draw(s.B, s.T, TOPK, dtype=torch.float32)


def _routes(s):
    """The weights, of which the routes are a function, and the routes."""
    indices, weights = _choices(s)
    return weights, api.route(indices, weights, num_memories=MEMORIES, shared=True, backend="triton")


def _route(s):
    indices, weights = _choices(s)

    def function():
        r = api.route(indices, weights, num_memories=MEMORIES, shared=True, backend="triton")
        return r.token, r.row, r.cu_seqlens, r.memory_offsets

    return [], function


def _grouped(s):
    _, routes = _routes(s)
    weight = s.draw(MEMORIES + 1, s.H * (s.K + s.V), HIDDEN)
    inputs = [s.draw(s.B * s.T, HIDDEN), weight]
    offsets = routes.memory_offsets
    return inputs, lambda x, w: (api.grouped_linear(x, w, offsets, routes=routes, backend="triton"),)


def _conv(*, gathered=False, packed=False, states=False, normalized=True):
    """gathered: what MoM does to its reads, rows of tokens that follow their buckets; packed: to its writes."""

    def prepare(s):
        routes = _routes(s)[1] if gathered or packed else None
        B, T, D = (1, len(routes.token), s.H * s.K) if packed else (s.B, s.T, s.H * s.K)
        inputs = [s.draw(B, T, D), s.draw(D, TAPS)]
        given = {"normalize": s.K if normalized else None, "return_state": states, "backend": "triton"}
        given |= {"routes": routes} if gathered else {"cu_seqlens": routes.cu_seqlens} if packed else {}
        if states:
            inputs.append(s.draw(B, D, TAPS - 1))

        def function(x, weight, state=None):
            y, last = api.short_conv(x, weight, initial_state=state, **given)
            return (y, last) if states else (y,)

        return inputs, function

    return prepare


def _norm(*, gathered):
    """gathered: the rows of every token are combined first."""

    def prepare(s):
        weights, routes = _routes(s)
        inputs = [s.draw(len(routes.token) if gathered else s.B * s.T, s.H, s.V), s.draw(s.V)]
        inputs += [s.draw(s.B * s.T, s.H, s.V)] + [weights] * gathered
        given = {"eps": 1e-5, "routes": routes if gathered else None, "backend": "triton"}
        return inputs, lambda o, weight, gate, *_: (api.gated_norm(o, weight, gate, **given),)

    return prepare


CASES = [
    *(
        Case(f"{name} {label}", _rule(rule, decay))
        for rule, name in (("linear_attention", "attention"), ("delta_rule", "delta"))
        for label, decay in (("no decay", None), ("constant", 1), ("scalar", 3), ("channel", 4))
    ),
    *(
        Case(f"{name} {label} packed", _rule(rule, decay, packed=True, states=True))
        for rule, name in (("linear_attention", "attention"), ("delta_rule", "delta"))
        for label, decay in (("no decay", None), ("constant", 1), ("scalar", 3), ("channel", 4))
    ),
    Case("delta scalar grouped heads", _rule("delta_rule", 3, groups=2)),
    Case("attention channel grouped heads", _rule("linear_attention", 4, groups=2)),
    Case("dplr", _rule("dplr", 4)),
    Case("dplr packed", _rule("dplr", 4, packed=True, states=True)),
    Case("rwkv6", _rwkv6),
    Case("gsa", _gsa),
    Case("summary attention scalar packed", _summary("linear_attention", 3)),
    Case("summary attention channel packed", _summary("linear_attention", 4)),
    Case("summary delta scalar packed", _summary("delta_rule", 3)),
    Case("summary delta channel packed", _summary("delta_rule", 4)),
    Case("summary dplr packed", _summary("dplr", 4)),
    Case("step attention channel", _step("linear_attention"), backward=False, decoding=True),
    Case("step delta scalar", _step("delta_rule", g="R HV"), backward=False, decoding=True),
    Case("step delta scalar in a store", _step("delta_rule", g="R HV", stored=True), backward=False, decoding=True),
    Case("step dplr", _step("dplr"), backward=False, decoding=True),
    Case("step rwkv6", _step("rwkv6"), backward=False, decoding=True),
    Case("step gsa", _step("gsa"), backward=False, decoding=True),
    Case("step ttt", _step("ttt_linear"), backward=False, decoding=True),
    Case("step ttt in a store", _step("ttt_linear", stored=True), backward=False, decoding=True),
    Case("step titans", _step("titans_linear"), backward=False, decoding=True),
    Case("step titans in a store", _step("titans_linear", stored=True), backward=False, decoding=True),
    Case("ttt", _online("ttt_linear")),
    Case("ttt packed", _online("ttt_linear", packed=True)),
    Case("titans", _online("titans_linear")),
    Case("titans packed", _online("titans_linear", packed=True)),
    Case("route", _route, backward=False),
    Case("conv", _conv(states=True, normalized=False)),
    Case("conv of reads", _conv(gathered=True)),
    Case("conv of writes", _conv(packed=True)),
    Case("norm and gate", _norm(gathered=False)),
    Case("combine, norm and gate", _norm(gathered=True)),
    Case("grouped projections", _grouped, counted=(1, 256)),
]


def title(kernel):
    """A kernel's name in tables: its file and its function."""
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__.strip('_').removesuffix('_kernel')}"


def record(case, shape, architecture):
    """The launches of one case, forward and backward, with the tiles of one architecture."""
    before, tuning.target = tuning.target, architecture
    prepared = case.prepare(shape)
    launch.recorded.clear()  # what is needed to prepare is a case of its own
    try:
        case.run(*prepared)
        return list(launch.recorded)
    finally:
        tuning.target = before
        launch.recorded.clear()

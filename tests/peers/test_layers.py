"""Every mixer's layer against independent code with the same weights: output, input gradient, parameter gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from linear_moe.mom import Router, make_routes
from linear_moe.ops import ttt_linear
from linear_moe.ssm import MIXERS, mixer_class
from linear_moe.ssm.core import MixerCore
from tests.helpers import rel_err
from tests.peers.cases import CASES, WITHOUT_PEER, Case
from tests.peers.interpreted import eager, fla
from tests.peers.layers import NORM_EPS, D, H

TOLERANCE = 1e-4


class Layer(nn.Module):
    """Ours: a mixer's core and an output projection. Where it mixes the first layer's values in, they are the input."""

    def __init__(self, case: Case):
        super().__init__()
        cls, self.mom = mixer_class(case.mixer), case.mom
        self.mixer = cls(cls.make_config(D, H, {"norm_eps": NORM_EPS} | case.options), case.layer, case.layers)
        self.core = MixerCore(self.mixer, D, memories=self.mom.projections if self.mom else 0)
        self.width = self.mixer.config.value_head_dim
        self.output = nn.Linear(self.mixer.config.num_value_heads * self.width, D, bias=False)
        if self.mom:
            self.router = Router(D, self.mom.memories, self.mom.topk)

    def forward(self, x: Tensor) -> Tensor:
        routes = None
        if self.mom:
            routes = make_routes(self.router(x.flatten(0, 1)), self.mom, x.shape[:2], None, 1.0)
        self.core.first_values = {"v": x.unflatten(-1, (-1, self.width))}
        return self.output(self.core(x, routes=routes))

    def parts(self, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """name -> that part of what `of` gives for the parameters: as the layer declares it."""
        parts = {"out": of(self.output.weight)} | ({"router": of(self.router.weight)} if self.mom else {})
        parameters = dict(self.core.named_parameters())
        for name, stored in self.core.tensors().items():
            parts[name] = stored.of(of(parameters[stored.parameter]))
        return parts


@torch.no_grad()
def randomize(peer: nn.Module) -> None:
    """Values that matter: some start at zero, or all equal. Under decays that forget within a few tokens, the peers'
    gradients of A_log would be differences of much larger terms."""
    for name, parameter in peer.named_parameters():
        if name == "A_log":
            parameter.normal_(0, 0.5)
        elif parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("name", CASES)
def test_layer_agrees(name, seed, monkeypatch):
    case = CASES[name]
    peer, layer = case.peer(monkeypatch).eval(), Layer(case)
    randomize(peer)
    theirs = dict(peer.named_parameters())
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in theirs.values())

    def as_ours(tensors):
        return {name: tensors[of] if isinstance(of, str) else of(tensors) for name, of in case.names.items()}

    with torch.no_grad():
        values, parts = as_ours(theirs), layer.parts(lambda parameter: parameter)
        assert values.keys() == parts.keys()
        for key, part in parts.items():
            part.copy_(values[key].reshape(part.shape))

    x = torch.randn(*case.shape, D)
    ours_x, peer_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, outputs = layer(ours_x), eager(peer, peer_x)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    ((outputs[0] * direction).sum() + (case.loss(outputs) if case.loss else 0.0)).backward()

    expected = as_ours({name: parameter.grad for name, parameter in theirs.items()})
    errors = {"output": rel_err(y, outputs[0]), "x": rel_err(ours_x.grad, peer_x.grad)}
    for key, part in layer.parts(lambda parameter: parameter.grad).items():
        errors[key] = rel_err(part, expected[key].reshape(part.shape))
    print(name, {key: f"{error:.1e}" for key, error in errors.items()})
    assert max(errors.values()) < TOLERANCE, errors


def test_ttt_rule(seed):
    """flash-linear-attention's reference of TTT-Linear has one learning rate a query, which is our token_scale, and
    adds LN(o) to the answer o itself instead of the query."""
    B, T, K, eps = 2, 40, 16, 1e-6
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, K), "eta": (B, T, H, 1), "w": (H, K), "b": (H, K)}
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    values["eta"] = values["eta"].sigmoid() / K
    ours, theirs = ({n: x.clone().requires_grad_() for n, x in values.items()} for _ in range(2))

    q, k, v, eta, w, b = ours.values()
    o, _ = ttt_linear(q, k, v, torch.ones(B, T, H), eta.squeeze(-1), w, b, eps=eps, scale=1.0)
    y = o + torch.nn.functional.layer_norm(o, (K,), eps=eps) * w + b
    q, k, v, eta, w, b = (x * 1 for x in theirs.values())  # it writes into q and eta
    expected, *_ = fla("ops.ttt.naive").chunk_ttt_linear_ref(q, k, v, w, b, eta, scale=1.0, eps=eps)

    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (expected * direction).sum().backward()
    errors = {"output": rel_err(y, expected)} | {n: rel_err(ours[n].grad, theirs[n].grad) for n in values}
    print({key: f"{error:.1e}" for key, error in errors.items()})
    assert max(errors.values()) < TOLERANCE, errors


def test_every_mixer_has_a_peer_or_a_reason():
    assert {case.mixer for case in CASES.values()} | WITHOUT_PEER.keys() == MIXERS.keys()

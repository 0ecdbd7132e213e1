"""MoM's router: its losses by hand, how they reach the gradients, and its options."""

import pytest
import torch

from linear_moe.mom import MoMConfig, Router, make_routes
from tests.helpers import rel_err

N, D, M, K = 50, 16, 4, 2


def make_router(topk=K):
    router = Router(D, M, topk, dtype=torch.float64)
    torch.nn.init.normal_(router.weight)
    return router


def test_losses_by_hand(seed):
    router, x = make_router(), torch.randn(N, D, dtype=torch.float64)
    routing = router(x)
    logits = x @ router.weight.T
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    counts = torch.zeros(M, dtype=torch.float64)
    for t in range(N):
        chosen = sorted(range(M), key=lambda m: -p[t, m])[:K]
        assert routing.indices[t].tolist() == chosen
        assert torch.allclose(routing.weights[t], p[t, chosen] / p[t, chosen].sum())
        counts[chosen] += 1
    f = counts / N
    assert abs(f.sum() - K) < 1e-12
    assert torch.allclose(routing.balance_loss, M / K * (f * p.mean(0)).sum())
    assert torch.allclose(routing.z_loss, logits.exp().sum(-1).log().square().mean())
    assert torch.allclose(routing.share, f / K)
    assert torch.allclose(routing.entropy, -(p * p.log()).sum(-1).mean())


def test_balance_loss_is_one_when_balanced_and_grows():
    router = Router(M, M, 1)
    with torch.no_grad():
        router.weight.copy_(50 * torch.eye(M))
    balanced = router(torch.eye(M).repeat(5, 1)).balance_loss
    collapsed = router(torch.eye(M)[:1].repeat(20, 1)).balance_loss
    assert abs(balanced - 1) < 1e-5 and abs(collapsed - M) < 1e-4


def test_losses_join_the_gradient(seed):
    """The routes' backward adds the losses' gradients, exactly as if they had been added to the loss."""
    router, x = make_router(), torch.randn(N, D, dtype=torch.float64)
    config = MoMConfig(memories=M, topk=K, balance_coeff=0.3, z_loss_coeff=0.2)
    direction = torch.randn(N, K + 1, dtype=torch.float64)
    routing = router(x)
    loss = (make_routes(routing, config, (1, N), None, 0.5).weights * direction).sum()
    (hidden,) = torch.autograd.grad(loss, router.weight)
    routing = router(x)
    plain = (torch.cat([routing.weights, torch.ones(N, 1)], 1) * direction).sum()
    added = 0.5 * (0.3 * routing.balance_loss + 0.2 * routing.z_loss)
    (explicit,) = torch.autograd.grad(plain + added, router.weight)
    (without,) = torch.autograd.grad(
        make_routes(router(x), config, (1, N), None, 0.0).weights.mul(direction).sum(), router.weight
    )
    assert rel_err(hidden, explicit) < 1e-12
    assert rel_err(without, explicit) > 1e-3


def test_padding_counts_nowhere(seed):
    """Losses, figures and gradients are those of the real tokens alone; the padding is routed all the same."""
    router, x = make_router(), torch.randn(N, D, dtype=torch.float64)
    padding = torch.rand(N) < 0.6
    found, expected = router(x, padding=padding), router(x[~padding])
    for name in ("balance_loss", "z_loss", "share", "entropy"):
        assert rel_err(getattr(found, name), getattr(expected, name)) < 1e-12, name
    assert rel_err(found.weights[~padding], expected.weights) < 1e-12 and len(found.indices) == N
    losses = [routing.balance_loss + routing.z_loss for routing in (found, expected)]
    ours, theirs = (torch.autograd.grad(loss, router.weight)[0] for loss in losses)
    assert rel_err(ours, theirs) < 1e-12
    nothing = router(x, padding=torch.ones(N, dtype=torch.bool))
    assert nothing.balance_loss == nothing.z_loss == nothing.entropy == 0 and not nothing.share.any()


def test_empty_batch():
    routing = make_router()(torch.zeros(0, D, dtype=torch.float64))
    assert routing.balance_loss == 0 and routing.indices.shape == (0, K)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memories": 0}, "mom_memories must be at least 1, but is 0"),
        ({"memories": 2, "topk": 3}, r"mom_topk \(3\) must be between 1 and mom_memories \(2\)"),
        ({"memories": 2, "topk": 0}, r"mom_topk \(0\)"),
        ({"memories": 2, "balance_coeff": -1.0}, "mom_balance_coeff must be a number and not negative, but is -1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MoMConfig(**options)

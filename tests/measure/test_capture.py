"""What of the CUDA graphs' check needs no CUDA: its subjects, and what it says where a capture fails."""

from types import SimpleNamespace

import pytest
import torch

from linear_moe.measure import capture
from tests.helpers import fresh_seed


@pytest.mark.parametrize("subject", capture.SUBJECTS)
def test_subjects(subject):
    """Each reaches its input and all of its leaves, and keeps no node of theirs for the next run."""
    fresh_seed()
    leaves, function = capture.SUBJECTS[subject]("cpu")
    leaves = [torch.randn(capture.TOKENS, capture.WIDTH, requires_grad=True), *leaves]
    y = function(leaves[0])
    grads = torch.autograd.grad(y, leaves, torch.randn_like(y))
    assert all(grad.any() for grad in grads)
    del y
    assert capture.stale_leaves(leaves) == []


def test_finds_what_an_earlier_run_left():
    a, b = torch.randn(2, 3, requires_grad=True).unbind()
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    kept = b.exp()
    assert capture.stale_leaves([a, b]) == [1]
    del kept
    assert capture.stale_leaves([a, b]) == []
    assert capture.stale_leaves([a, b.double()]) == [1]  # no leaf: the copy's node is as old as the copy


def test_names_the_stream_of_every_node(monkeypatch):
    handle = SimpleNamespace(cuda_stream=0x10)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: handle)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: handle.cuda_stream == 0x10)
    x, seen = torch.randn(3, requires_grad=True), []
    y = x.exp()
    y.register_hook(lambda grad: setattr(handle, "cuda_stream", 0))  # what is below runs on the legacy stream
    y = y.sin()
    capture.watch_streams(seen, [x], y)
    torch.autograd.grad(y.sum(), [x])
    left = "legacy, NOT capturing"
    assert seen == ["0x10 forward", "0x10 SinBackward0", f"{left} ExpBackward0", f"{left} leaf 0 [3]"]

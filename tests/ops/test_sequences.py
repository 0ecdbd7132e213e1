"""Where the tokens of sequences lie."""

import pytest
import torch

from linear_moe.ops import route
from linear_moe.ops.sequences import Sequences


def test_packed():
    cu = torch.tensor([0, 0, 3, 3, 5], dtype=torch.int32)
    sequences = Sequences.of(torch.empty(1, 5, 2), cu)
    assert sequences.N == 4
    assert sequences.owner.tolist() == [[1, 1, 1, 3, 3]]
    assert sequences.places.tolist() == sequences.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert sequences.lengths.tolist() == sequences.after.tolist() == [0, 3, 0, 2]


def test_dense_that_go_on():
    sequences = Sequences.of(torch.empty(2, 3, 2), before=torch.tensor([7, 0]))
    assert sequences.N == 2 and not sequences.single
    assert sequences.owner.tolist() == [[0] * 3, [1] * 3]
    assert sequences.places.tolist() == [[7, 8, 9], [0, 1, 2]]
    assert sequences.after.tolist() == [10, 3]
    assert Sequences.of(torch.empty(2, 1, 2)).single


def test_buckets():
    """Of memories 0, 1 and a shared one: places count a bucket's own tokens, positions the document's."""
    cu = torch.tensor([0, 2, 5])
    sequences = Sequences.of(torch.empty(1, 5, 2), cu, before=torch.tensor([10, 0]))
    indices = torch.tensor([0, 1, 1, 1, 0]).view(1, 5, 1)
    routes = route(indices, torch.ones(1, 5, 1), num_memories=2, shared=True, cu_seqlens=sequences.cu_seqlens)
    rows = sequences.rows(routes, before=torch.tensor([4, 0, 6, 0, 10, 0]))
    assert rows.N == 6
    assert rows.owner.tolist() == [[0, 1, 2, 3, 3, 4, 4, 5, 5, 5]]
    assert rows.places.tolist() == [[4, 0, 6, 0, 1, 10, 11, 0, 1, 2]]
    assert rows.positions.tolist() == [[10, 2, 11, 0, 1, 10, 11, 0, 1, 2]]
    assert rows.after.tolist() == [5, 1, 7, 2, 12, 3]


def test_borders_are_the_callers_no_more():
    """What is worked out from the borders is kept with a tensor that the caller does not hold."""
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    first = Sequences.of(torch.empty(1, 5, 2), cu)
    assert first.owner.tolist() == [[0, 0, 1, 1, 1]]
    cu[1] = 4
    assert Sequences.of(torch.empty(1, 5, 2), cu).owner.tolist() == [[0, 0, 0, 0, 1]]


def test_errors():
    x = torch.empty(1, 5, 2)
    with pytest.raises(ValueError, match=r"before must be \[N\] = \[2\], not \[1\]"):
        Sequences.of(x, torch.tensor([0, 2, 5]), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"run from 0 to T \(5\)"):
        Sequences.of(x, torch.tensor([0, 2, 4]))

"""Whole tensors by declared name: every parameter of a layer unfused and unflattened, whatever shards it lies on."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from linear_moe.ssm.stored import Tensors


@torch.no_grad()
def full_state(
    tensors: Tensors, parameters: Mapping[str, Tensor], gather: Callable[[Tensor, int], Tensor]
) -> dict[str, Tensor]:
    """Declared name -> a copy of the whole tensor.

    gather: puts the shards' parts of a tensor together along an axis.
    """
    state = {}
    for name, stored in tensors.items():
        part = stored.of(parameters[stored.parameter])
        state[name] = part.clone() if stored.axis is None else gather(part, stored.axis).clone()
    return state


@torch.no_grad()
def load_full_state(
    tensors: Tensors, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor], shards: int, shard: int
) -> None:
    """Copy whole tensors into the parameters, in their data type; of each what this shard holds.

    Raises:
        ValueError: a missing or an unknown tensor, or one of another shape; then nothing has been changed.
    """
    shapes = {name: [*stored.whole_shape(shards)] for name, stored in tensors.items()}
    _check_names(state, shapes)
    wrong = [f"{n} {[*state[n].shape]}, not {shape}" for n, shape in shapes.items() if [*state[n].shape] != shape]
    if wrong:
        raise ValueError(f"tensors of another shape: {'; '.join(wrong)}")
    for name, stored in tensors.items():
        stored.of(parameters[stored.parameter]).copy_(stored.cut(state[name], shards, shard))


def _check_names(state: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> None:
    missing = [name for name in shapes if name not in state]
    unknown = [name for name in state if name not in shapes]
    if unknown:
        hints = {name: difflib.get_close_matches(name, missing or shapes, n=1) for name in unknown}
        named = [
            f"{name} {[*state[name].shape]}" + (f" (did you mean {near[0]}?)" if near else "")
            for name, near in hints.items()
        ]
        raise ValueError(f"unknown tensors: {'; '.join(named)}. The layer has {', '.join(shapes)}")
    if missing:
        raise ValueError(f"missing tensors: {'; '.join(f'{name} {shapes[name]}' for name in missing)}")

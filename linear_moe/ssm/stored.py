"""Where each declared tensor of a layer is stored: the one description that initial values, checkpoints, optimizers and
whole tensors by name (``full_state.py``) go by.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """One declared tensor, and the part of it that a shard holds.

    Args:
        parameter: name of the parameter that holds it, from the layer's root.
        shape: of the shard's part. Where every memory has its own, they are the first axis, the shared one last.
        axis: of this shape, cut over the shards; None where all of them hold the whole.
        matrix: whether it is a projection or a factor of one, ``[(memories,) out, in]``. Everything else has initial
            values of its own.
        section: its name in a fused parameter, whose rows (axis -2) are those of several tensors; else None.
        start: its first row there.
    """

    parameter: str
    shape: tuple[int, ...]
    axis: int | None = None
    matrix: bool = False
    section: str | None = None
    start: int = 0

    def whole_shape(self, shards: int) -> tuple[int, ...]:
        return tuple(size * shards if axis == self.axis else size for axis, size in enumerate(self.shape))

    def of(self, parameter: Tensor) -> Tensor:
        """The tensor ``[*shape]`` as a view of its parameter, or of whatever is shaped like that, as a gradient is."""
        if self.section is not None:
            parameter = parameter.narrow(-2, self.start, self.shape[-2])
        return parameter.view(self.shape)

    def cut(self, whole: Tensor, shards: int, shard: int) -> Tensor:
        """The part of a whole tensor that a shard holds."""
        return whole if self.axis is None else whole.chunk(shards, self.axis)[shard]


Tensors = dict[str, Stored]  # by declared name

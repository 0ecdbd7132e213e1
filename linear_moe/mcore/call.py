"""What a forward pass of a model says to all of its linear layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.mcore.inference import require_static
from linear_moe.mcore.masks import packed_cu_seqlens, require_causal
from linear_moe.ops.sequences import Sequences


@dataclass
class Call:
    """One forward pass of a model, as all of its linear layers see it.

    Args:
        loss_tokens: how many tokens the loss counts, a scalar; None where the call does not say.
    """

    loss_tokens: Tensor | None = None
    made: tuple | None = None  # the sequences, and what they were made from

    def sequences(self, x: Tensor, packed_seq_params) -> Sequences:
        """Where the tokens of x ``[b, s, hidden]`` lie: made by the first layer, for all.

        Raises:
            ValueError: see packed_cu_seqlens.
        """
        of = (packed_seq_params, *x.shape[:2])
        if self.made is None or self.made[0] is not of[0] or self.made[1:3] != of[1:]:
            self.made = (*of, Sequences.of(x, packed_cu_seqlens(packed_seq_params, x)))
        return self.made[3]


def before_forward(mixers: Iterable[torch.nn.Module], model, args: tuple, kwargs: dict) -> None:
    """A forward pre-hook of Megatron's model: what a call says to its linear layers that no layer is told.

    It refuses an attention mask that they would not keep to and a context that has no place for their states; and it
    counts the tokens that the loss counts, where the call has a loss_mask. mixers: the model's ``MixerLayer``s.
    """
    if (context := kwargs.get("inference_context")) is not None:
        require_static(context)
    attention_mask = args[2] if len(args) > 2 else kwargs.get("attention_mask")
    if attention_mask is not None:
        require_causal(attention_mask)
    loss_mask = kwargs.get("loss_mask")
    call = Call(None if loss_mask is None else loss_mask.sum(dtype=torch.float32))
    for mixer in mixers:
        mixer.call = call

"""What a layer keeps of its sequences from call to call: as large after a million tokens as after one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from linear_moe.ssm.mixer import Mixer


class MixerState:
    """States of N sequences by name: the rule's, convolutions' last inputs, the token before, a memory's tokens seen.

    Each is a tensor, or a tuple of tensors, ``[N, ...]``, or under Mixture-of-Memories ``[memories * N, ...]``, memory
    by memory. They come into being with the first call and then stay where they are, so that a CUDA graph finds them.

    Args:
        N: how many sequences.
    """

    def __init__(self, N: int):
        self.N, self.held = N, {}

    def get(self, name: str):
        """The state of that name, or None before the first call."""
        return self.held.get(name)

    @torch.no_grad()
    def put(self, name: str, value) -> None:
        """Keeps ``value`` as the state of that name."""
        if name not in self.held:
            self.held[name] = tree_map(lambda x: x.detach().clone(memory_format=torch.contiguous_format), value)
            return
        for kept, x in zip(tree_leaves(self.held[name]), tree_leaves(value), strict=True):
            if kept is not x:
                kept.copy_(x)

    @torch.no_grad()
    def reorder(self, index: Tensor) -> None:
        """Sequence n goes on as sequence index[n] was: int64 ``[N]``, with repetitions (beams, parallel samples)."""
        for kept in tree_leaves(self.held):
            of_sequences = kept.unflatten(0, (-1, self.N))
            of_sequences.copy_(of_sequences[:, index])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.numel() * x.element_size() for x in tree_leaves(self.held))


def state_size(mixer: Mixer, hidden_size: int, memories: int = 0) -> tuple[int, int]:
    """What a layer of this mixer keeps of one sequence, all heads together: (numbers of the rule's states, numbers of
    the convolutions' and token shifts' tails).

    A rule has a state, heads x K x V for most, for every memory. A convolution of w taps keeps the last w - 1 of its
    inputs, also once a memory, since its taps follow the tokens that the memory received; a token shift keeps the last
    token, of the sequence and of each memory.

    Args:
        memories: of a Mixture-of-Memories, the shared one included; 0 for none.
    """
    buckets, c = max(memories, 1), mixer.config
    convolved = sum(spec.width * mixer.heads(spec.per) for spec in mixer.projections().values() if spec.conv)
    tails = convolved * (c.conv_size - 1) if c.conv_size else 0
    shifted = hidden_size * (1 + memories) if mixer.token_shift else 0
    return buckets * mixer.state_size, buckets * tails + shifted


def state_bytes(mixer: Mixer, hidden_size: int, *, memories: int = 0, element_size: int = 2) -> int:
    """The same in bytes: `MixerState.nbytes` of one sequence.

    Args:
        memories: as in `state_size`; each counts its tokens. element_size: of the model's dtype; the rule's states are
            float32.
    """
    states, tails = state_size(mixer, hidden_size, memories)
    return 4 * states + element_size * tails + 8 * memories


def carry(state: MixerState | None, name: str, function: Callable) -> Tensor:
    """What ``function(initial_state=, return_state=) -> (y, last state)`` answers from the state of that name, which it
    also replaces; without a state, from each sequence's beginning."""
    if state is None:
        return function()[0]
    y, last = function(initial_state=state.get(name), return_state=True)
    state.put(name, last)
    return y

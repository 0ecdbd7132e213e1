"""What a model keeps of its sequences between calls: Megatron's static inference context, for packed sequences, too.

Megatron's own `StaticInferenceContext` holds a batch in which every sequence is as far as every other.
`InferenceContext` holds sequences that are each at a place of their own: pieces of their prompts come packed in one
row, then one token of each. In both, a layer's state lies in ``key_value_memory_dict``: keys and values of softmax
attention, which grow with the sequence, and a `MixerState` of a linear layer, which does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.transformer.attention import Attention
from megatron.core.utils import unwrap_model
from torch import Tensor

from linear_moe.ops.sequences import Sequences
from linear_moe.ssm.state import MixerState


@dataclass(frozen=True)
class Limits:
    """What a model can be asked: ids below ``vocabulary``, sequences of at most ``positions`` tokens (None: of any
    length). ranks: of tensor parallelism."""

    vocabulary: int
    positions: int | None
    ranks: int


def limits(model: torch.nn.Module) -> Limits:
    """Those of a model. Linear layers know no positions; softmax layers and learned embeddings do.

    Raises:
        ValueError: a model cut into pipeline stages.
    """
    config, inner = model.config, unwrap_model(model)
    if config.pipeline_model_parallel_size > 1:
        raise ValueError(
            f"generate runs one pipeline stage, but pipeline_model_parallel_size is "
            f"{config.pipeline_model_parallel_size}: use Megatron's static engine, or load the checkpoint without it"
        )
    positional = inner.position_embedding_type == "learned_absolute"
    positional |= any(isinstance(module, Attention) for module in inner.modules())
    vocabulary = getattr(inner, "vocabulary", None) or inner.vocab_size
    return Limits(vocabulary, inner.max_sequence_length if positional else None, config.tensor_model_parallel_size)


@contextmanager
def without_sequence_parallel(model: torch.nn.Module) -> Iterator[None]:
    """A step has one token a sequence, which cannot be cut over tensor-parallel ranks."""
    names = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
    modules = list(model.modules()) if model.config.sequence_parallel else []
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    holders = [*modules, *configs.values()]
    found = [(holder, name) for holder in holders for name in names if getattr(holder, name, None) is True]
    for holder, name in found:
        setattr(holder, name, False)
    try:
        yield
    finally:
        for holder, name in found:
            setattr(holder, name, True)


class InferenceContext(StaticInferenceContext):
    """N sequences of different lengths, each at its own position.

    A forward pass goes between `begin` and `advance`; its ``position_ids`` are ``sequences.positions``. Nothing is read
    back from the device, so that a CUDA graph can hold ``begin(None)``, a forward pass and ``advance()``.

    Args:
        N: how many sequences. max_sequence_length: the most tokens of one, prompt and all.

    Attributes:
        sequences: where the tokens of this call lie; ``sequences.before``, int64 ``[N]``, is what came in earlier ones.
        seen: int64 ``[N]`` on the device, tokens of each sequence; counts: the same on the host.
        lengths: of this call's pieces, on the host; None in a step.
        last: int64 ``[N]``, each sequence's last row in the pack, some row where it has none; None in a step.
        span: as many tokens as the longest sequence may have after this call.
    """

    def __init__(self, N: int, max_sequence_length: int):
        super().__init__(N, max_sequence_length)
        self.config.materialize_only_last_token_logits = False  # Megatron would keep the last row of a whole pack
        self.N, self.device = N, torch.device(torch.cuda.current_device())
        self.seen, self.counts = torch.zeros(N, dtype=torch.int64, device=self.device), [0] * N
        self.sequences: Sequences | None = None
        self.lengths: list[int] | None = None
        self.last: Tensor | None = None
        self.span = 0

    def begin(self, lengths: Sequence[int] | None = None, span: int | None = None) -> Sequences:
        """Says what the next forward pass holds.

        Args:
            lengths: of pieces of the sequences, packed in one row, tokens ``[1, sum(lengths)]``; none of a sequence is
                0. None: one token of each, tokens ``[N, 1]``.
            span: how many tokens softmax layers look back over in a step, at least; so many as there are unless given.

        Raises:
            ValueError: another number of lengths, or more tokens than max_sequence_length.
        """
        new = [1] * self.N if lengths is None else [int(length) for length in lengths]
        if len(new) != self.N or min(new, default=0) < 0:
            raise ValueError(f"lengths must be {self.N} numbers of at least 0, one a sequence, but are {new}")
        longest = max((seen + length for seen, length in zip(self.counts, new)), default=0)
        if longest > self.max_sequence_length:
            raise ValueError(f"a sequence would have {longest} tokens, more than {self.max_sequence_length}")
        self.span = longest if span is None else span
        self.lengths = None if lengths is None else new
        if lengths is None:
            self.last = None
            self.sequences = Sequences(B=self.N, T=1, device=self.device, before=self.seen, single=True)
        else:
            cu_seqlens = torch.tensor([0, *accumulate(new)], dtype=torch.int32, device=self.device)
            self.last = (cu_seqlens[1:].long() - 1).clamp(min=0)
            pack = torch.empty(1, sum(new), device=self.device)
            self.sequences = Sequences.of(pack, cu_seqlens, self.seen)
        self.decode_mode = lengths is None
        return self.sequences

    def advance(self) -> None:
        """Counts the tokens of the call that is over."""
        self.seen.add_(self.sequences.lengths)
        self.count()

    def count(self) -> None:
        """The host's part of `advance`: what a CUDA graph leaves out when it is replayed."""
        new = [1] * self.N if self.lengths is None else self.lengths
        self.counts = [seen + length for seen, length in zip(self.counts, new)]
        self.sequence_len_offset = max(self.counts, default=0)

    def reset(self) -> None:
        """Forgets the sequences."""
        super().reset()
        self.key_value_memory_dict.clear()
        self.seen.zero_()
        self.counts = [0] * self.N
        self.sequences = None

    @torch.no_grad()
    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Sequence n goes on as sequence index[n] was, with repetitions: beams, parallel samples. Reads index back."""
        index = torch.as_tensor(index, dtype=torch.int64, device=self.device)
        places = index.tolist()
        if len(places) != self.N or not all(0 <= place < self.N for place in places):
            raise ValueError(f"index must be {self.N} numbers from 0 to {self.N - 1}, but is {places}")
        for held in self.key_value_memory_dict.values():
            if isinstance(held, MixerState):
                held.reorder(index)
            else:
                for cache in held:
                    cache.copy_(cache[index])
        self.seen.copy_(self.seen[index])
        self.counts = [self.counts[place] for place in places]

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held: ``"kv"`` for softmax attention's keys and values, ``"states"`` for linear layers."""
        found = {"kv": 0, "states": 0}
        for held in self.key_value_memory_dict.values():
            if isinstance(held, MixerState):
                found["states"] += held.nbytes
            else:
                found["kv"] += sum(cache.numel() * cache.element_size() for cache in held)
        return found

    def keep(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes this call's keys and values ``[B, T, heads, d]`` to their sequences' places.

        Returns:
            Keys and values of all tokens, ``[N, max_sequence_length, heads, d]``; zeros where none has been.
        """
        if layer_number not in self.key_value_memory_dict:
            self.key_value_memory_dict[layer_number] = tuple(
                x.new_zeros(self.N, self.max_sequence_length, *x.shape[2:]) for x in (key, value)
            )
        caches = self.key_value_memory_dict[layer_number]
        for cache, x in zip(caches, (key, value)):
            cache[self.sequences.owner, self.sequences.places] = x
        return caches


@torch.no_grad()
def forward(model: torch.nn.Module, context: InferenceContext, tokens: Tensor, lengths=None, *, span=None) -> Tensor:
    """One piece of each prompt, or one token of each sequence; the context goes on behind them.

    Args:
        model: Megatron's, in eval mode. tokens: int64 ``[1, sum(lengths)]``, or ``[N, 1]`` without lengths.
        lengths, span: see `InferenceContext.begin`.

    Returns:
        Logits ``[N, vocab]`` behind each sequence's last token of this call, some token's where it has none.
    """
    sequences, inner = context.begin(lengths, span), unwrap_model(model)
    positions = sequences.positions.clamp(max=inner.max_sequence_length - 1)  # sequences that have ended run on

    def keep_last(layer, args: tuple) -> tuple:
        hidden, *rest = args  # [tokens, 1, hidden], or in a step [1, N, hidden]
        return hidden if context.last is None else hidden[context.last], *rest

    hook = inner.output_layer.register_forward_pre_hook(keep_last)
    try:
        with nullcontext() if InferenceMode.is_active() else InferenceMode.active():
            logits = model(
                tokens, positions, None, inference_context=context, runtime_gather_output=True
            )  # [1, N, vocab], or in a step [N, 1, vocab]
    finally:
        hook.remove()
    context.advance()
    return logits.flatten(0, 1)


def sequences_of(context, x: Tensor) -> Sequences:
    """Where the tokens of x ``[B, T, ...]`` lie in this call of a model.

    Raises:
        ValueError: a dynamic batching context, which has no place for a linear layer's state, or tokens that are not
            those that `InferenceContext.begin` was told of.
    """
    require_static(context)
    B, T = x.shape[:2]
    if isinstance(context, InferenceContext):
        found = context.sequences
        if found is None or (found.B, found.T) != (B, T):
            told = "nothing" if found is None else [found.B, found.T]
            raise ValueError(f"tokens [B, T] = {[B, T]}, but the inference context was told of {told}")
        return found
    key = (B, T, context.sequence_len_offset, x.device)
    found, made_for = getattr(context, "_sequences", (None, None))
    if made_for != key:
        before = torch.full((B,), context.sequence_len_offset, device=x.device)
        found = Sequences.of(x, before=before)
        context._sequences = found, key
    return found


def state_of(context, layer_number: int, sequences: Sequences) -> MixerState:
    """What a linear layer keeps of its sequences; empty where they start.

    Megatron cuts large batches into micro-batches under pipeline parallelism: each has a state of its own, by the
    context's batch_size_offset.

    Raises:
        ValueError: a dynamic batching context, or another number of sequences than when they started.
    """
    require_static(context)
    held = context.key_value_memory_dict
    if isinstance(context, InferenceContext):
        return held.setdefault(layer_number, MixerState(context.N))
    states = held.setdefault(layer_number, {})
    offset = context.batch_size_offset
    if context.sequence_len_offset == 0:
        states[offset] = MixerState(sequences.N)
    if offset not in states or states[offset].N != sequences.N:
        kept = states[offset].N if offset in states else 0
        raise ValueError(f"{sequences.N} sequences go on, but {kept} were started in this inference context")
    return states[offset]


def require_static(context) -> None:
    if not context.is_static_batching():
        raise ValueError(
            "linear layers cannot use dynamic batching: its pages hold keys and values, not their states. Use "
            "linear_moe.inference.generate, or Megatron's static engine"
        )

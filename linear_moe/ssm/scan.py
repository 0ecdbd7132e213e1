"""How a rule is run: the one seam between a mixer, which says which rule runs on which operands, and its layer.

A kind of scan is a class here. Plain is training's: whole sequences. Carried starts from a state and leaves one: a
prompt in pieces, and one-token steps. Kinds that exchange states between ranks belong to ``linear_moe.parallel``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from linear_moe.ops import step, titans_linear, ttt_linear
from linear_moe.ops.check_step import OPERANDS
from linear_moe.ops.sequences import Sequences

COUNTED = (ttt_linear, titans_linear)  # rules that ask how much of its mini-batch a state has seen


class Scan:
    """``scan(rule, *operands, **options) -> o``, which `recur` calls once.

    rule: a function of ``linear_moe.ops``, or one like them: ``rule(*operands, initial_state=, return_state=,
    cu_seqlens=, **options) -> (o, state)``. operands: ``[B, T, heads, width]`` each, or whatever the rule takes.

    Args:
        sequences: where the tokens lie. initial: the states that all N sequences start from, or None for zeros.
    """

    def __init__(self, sequences: Sequences, initial=None):
        self.sequences, self.initial, self.called = sequences, initial, False

    def __call__(self, rule: Callable, *operands: Tensor | None, **options) -> Tensor:
        if self.called:
            raise ValueError("recur called scan twice: one state is kept for each layer, so it may run one rule")
        self.called = True
        return self.run(rule, operands, options)

    def run(self, rule: Callable, operands: tuple[Tensor | None, ...], options: dict) -> Tensor:
        raise NotImplementedError


class Plain(Scan):
    """From each sequence's beginning; what state it ends in is not kept."""

    def run(self, rule, operands, options):
        o, _ = rule(*operands, initial_state=self.initial, cu_seqlens=self.sequences.cu_seqlens, **options)
        return o


class Carried(Scan):
    """From states to states: afterwards ``final`` holds those that the sequences end in, empty ones' as they were.

    Args:
        in_place: the initial states may be overwritten. One token of each sequence then goes through ``ops.step``,
            which touches the states of those alone that have one.
    """

    final = None

    def __init__(self, sequences: Sequences, initial=None, in_place: bool = False):
        super().__init__(sequences, initial)
        self.in_place = in_place

    def run(self, rule, operands, options):
        if rule in COUNTED and self.sequences.before is not None:
            options = {**options, "offset": self.sequences.before % options["mini_batch"]}
        if self.in_place and self.sequences.single and rule.__name__ in OPERANDS:
            return self.step(rule.__name__, operands, options)
        o, self.final = rule(
            *operands,
            initial_state=self.initial,
            return_state=True,
            cu_seqlens=self.sequences.cu_seqlens,
            **options,
        )
        return o

    def step(self, rule: str, operands: tuple[Tensor | None, ...], options: dict) -> Tensor:
        B, T = self.sequences.B, self.sequences.T
        of_tokens = ("R" in form.split() for form in OPERANDS[rule].values())
        rows = [x.flatten(0, 1) if of and x is not None and x.ndim > 1 else x for x, of in zip(operands, of_tokens)]
        o, self.final = step(rule, self.initial, *rows, slots=self.sequences.slots, **options)
        return o.unflatten(0, (B, T))

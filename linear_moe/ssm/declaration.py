"""What a mixer declares, checked before anything is built from it: a slip there would train, but something else."""

from __future__ import annotations

from collections.abc import Iterable
from keyword import iskeyword
from typing import get_args

from torch import nn

from linear_moe.ssm.mixer import PER, Inner, Mixer, Projection, Role

CHOICES = {"role": get_args(Role), "per": get_args(PER), "activation": ("silu", None)}
CHOICES |= {"inner": (*get_args(Inner), None)}
ARGUMENTS = ("p", "scan")  # of `recur`, beside the projections
LAYERS_OWN = ("router", "out")  # of a layer's tensors


def check_declaration(mixer: Mixer) -> None:
    """Refuses an unknown value, a name that means two things, and an option without effect.

    Raises:
        ValueError: with the mixer's class, the rule and the value.
    """
    owner, projections, heads = type(mixer).__name__, mixer.projections(), mixer.parameters_per_head()
    for name, spec in projections.items():
        _check_projection(f"{owner}: projection {name!r}", spec)
    for name, parameter in heads.items():
        _check_choice(f"{owner}: head parameter {name!r}", "per", parameter.per)
    gates = [name for name, spec in projections.items() if spec.role == "gate"]
    if len(gates) > 1:
        raise ValueError(f"{owner}: at most one projection may have the role gate, but {', '.join(gates)} have it")
    conv = [f"conv_{name}" for name, spec in projections.items() if spec.conv]
    if mixer.config.conv_size and not conv:
        raise ValueError(f"{owner}: conv_size ({mixer.config.conv_size}) has no effect, for no projection has conv")
    taken = [*LAYERS_OWN, *conv]
    _check_names(f"{owner}: projection", projections, [*taken, *ARGUMENTS])
    taken += projections
    _check_names(f"{owner}: head parameter", heads, [*taken, *dir(nn.Module())])
    taken += heads
    _check_names(f"{owner}: shared parameter", mixer.shared_parameters(), [*taken, *dir(nn.Module())])


def _check_projection(what: str, spec: Projection) -> None:
    for option in CHOICES:
        _check_choice(what, option, getattr(spec, option))
    for option, least in (("width", 1), ("low_rank", 0)):
        if getattr(spec, option) < least:
            raise ValueError(f"{what}: {option} must be at least {least}, but is {getattr(spec, option)}")
    if spec.inner and not spec.low_rank:
        raise ValueError(f"{what}: inner ({spec.inner!r}) has no effect without low_rank")
    for option in ("conv", "activation", "normalize") if spec.role == "gate" else ():
        if getattr(spec, option):
            raise ValueError(f"{what}: {option} ({getattr(spec, option)!r}) has no effect on a gate")


def _check_choice(what: str, option: str, value: object) -> None:
    if value not in CHOICES[option]:
        allowed = ", ".join(map(repr, CHOICES[option]))
        raise ValueError(f"{what}: {option} must be one of {allowed}, but is {value!r}")


def _check_names(what: str, names: Iterable[str], taken: Iterable[str]) -> None:
    for name in names:
        if not name.isidentifier() or iskeyword(name):
            raise ValueError(f"{what} {name!r} must have a name that can be a Python argument")
        if name in taken:
            raise ValueError(f"{what} {name!r} has a name that is already used for something else")

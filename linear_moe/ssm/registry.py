"""Mixers by name: a literal table, imported only when used. Adding a mixer is one file and one line here."""

from __future__ import annotations

import difflib
from importlib import import_module

from linear_moe.ssm.mixer import Mixer

MIXERS = {
    "linear_attention": "linear_moe.ssm.linear_attention:LinearAttention",
    "retention": "linear_moe.ssm.retention:Retention",
    "lightning": "linear_moe.ssm.lightning:Lightning",
    "gla": "linear_moe.ssm.gla:GatedLinearAttention",
    "hgrn2": "linear_moe.ssm.hgrn2:HGRN2",
    "based": "linear_moe.ssm.based:Based",
    "rebased": "linear_moe.ssm.rebased:ReBased",
    "gsa": "linear_moe.ssm.gsa:GatedSlotAttention",
    "mamba2": "linear_moe.ssm.mamba2:Mamba2",
    "deltanet": "linear_moe.ssm.deltanet:DeltaNet",
    "gated_deltanet": "linear_moe.ssm.gated_deltanet:GatedDeltaNet",
    "kda": "linear_moe.ssm.kda:KimiDeltaAttention",
    "rwkv6": "linear_moe.ssm.rwkv6:RWKV6",
    "rwkv7": "linear_moe.ssm.rwkv7:RWKV7",
    "ttt": "linear_moe.ssm.ttt:TTTLinear",
    "titans": "linear_moe.ssm.titans:Titans",
}


def mixer_class(name: str) -> type[Mixer]:
    """The class behind a registered name, or behind ``package.module:Class`` for a mixer outside this package.

    Raises:
        ValueError: an unknown name (with the nearest), a module or class that is not there, or not a Mixer.
    """
    target = MIXERS.get(name, name)
    if ":" not in target:
        near = difflib.get_close_matches(name.lower(), MIXERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"unknown mixer {name!r}{hint} Allowed: {', '.join(MIXERS)}, or package.module:Class for your own"
        )
    module, _, attribute = target.partition(":")
    if not attribute or not module or module.startswith("."):
        raise ValueError(f"mixer {name!r} must be written as package.module:Class")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        hint = "; is its folder on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        raise ValueError(f"mixer {name!r} cannot be imported: {error}{hint}") from error
    if not (isinstance(found, type) and issubclass(found, Mixer)):
        raise ValueError(f"mixer {name!r} is {found!r}, which is not a subclass of linear_moe.ssm.mixer.Mixer")
    return found

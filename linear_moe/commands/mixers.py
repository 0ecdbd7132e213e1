"""List the mixers with their rules, papers, states and options."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import fields

from linear_moe.ssm import MIXERS, Mixer, mixer_class
from linear_moe.ssm.state import state_bytes


def describe(name: str, hidden_size: int, num_attention_heads: int) -> str:
    """What there is to know about a mixer in a model of that size."""
    cls = mixer_class(name)
    mixer = cls(cls.make_config(hidden_size, num_attention_heads, {}), layer=1, num_layers=2)
    options = [f.name for f in fields(cls.Config) if f.name != "hidden_size"]
    lines = {
        "rule": cls.rule,
        "paper": cls.paper,
        "state": _state(mixer, hidden_size),
        "options": ", ".join(f"{option}={getattr(mixer.config, option)}" for option in options),
    }
    if "Config" in vars(cls) and not cls.Config.__doc__.startswith("Config("):
        lines["of which"] = " ".join(cls.Config.__doc__.split())
    wrapped = [
        textwrap.fill(text, 116, initial_indent=f"  {key:8} ", subsequent_indent=" " * 11)
        for key, text in lines.items()
    ]
    return "\n".join([name, *wrapped])


def _state(mixer: Mixer, hidden_size: int) -> str:
    """Its size, which does not grow with the sequence."""
    plain, mom = (state_bytes(mixer, hidden_size, memories=memories) for memories in (0, 5))
    return (
        f"{plain:,} bytes a sequence and layer, whatever its length, of which {mixer.state_size:,} float32 numbers are "
        f"the rule's and the rest bfloat16 inputs; {mom:,} under MoM with 4 memories and a shared one"
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="linear-moe mixers", description=__doc__)
    parser.add_argument("mixers", nargs="*", help="names; all unless given")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--num-attention-heads", type=int, default=8)
    args = parser.parse_args(argv)
    try:
        text = [describe(name, args.hidden_size, args.num_attention_heads) for name in args.mixers or MIXERS]
    except ValueError as error:
        parser.error(str(error))
    print(f"Options are those of a model of hidden size {args.hidden_size} with {args.num_attention_heads} heads.")
    print("Give others with --mixer-args '{\"head_dim\": 64}', or in a configuration under mixer-args.\n")
    print("\n\n".join(text))

"""Our command-line flags, configurations as flags, and what they mean for the model's layers."""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.training import arguments as megatrons

from linear_moe.mcore.checkpoint import CHECKPOINT_DEFAULTS
from linear_moe.mcore.checks import check_arguments
from linear_moe.mcore.configs import read_config
from linear_moe.mcore.cpu import cpu_defaults
from linear_moe.mcore.pattern import translate
from linear_moe.mcore.specs import layer_options
from linear_moe.mcore.vocabulary import patch_padding
from linear_moe.mom import MoMConfig
from linear_moe.ssm import MIXERS

RATIOS = ("--hybrid-attention-ratio", "--hybrid-mlp-ratio")
USAGE = "%(prog)s [--config NAME] [flags of Megatron and of linear_moe]"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags to a Megatron parser; give it to Megatron as ``extra_args_provider``."""
    patch_padding()  # here, because Megatron pads the vocabulary while it parses
    _patch_validation()
    parser.usage = USAGE  # all 700 flags would hide an error
    _mend_help(parser)
    group = parser.add_argument_group("linear_moe")
    group.add_argument(
        "--mixer",
        type=_mixer_names,
        default="gated_deltanet",
        help=f"linear mixer of the L, G or M layers: {', '.join(MIXERS)}, or package.module:Class for your own; or "
        'several as JSON, each with a letter for the pattern: {"G": "gla", "M": "mamba2"}',
    )
    group.add_argument(
        "--mixer-args",
        type=_json_object,
        default={},
        help='the mixer\'s options as JSON, such as {"head_dim": 64}; with several mixers by letter',
    )
    group.add_argument(
        "--mixer-recompute",
        action="store_true",
        help="keep the short convolutions' inputs only, and make the rule's operands again in the backward",
    )
    group.add_argument(
        "--mixer-init-gain",
        type=float,
        help="matrices of linear layers (projections, MoM's router) start uniform with Xavier's bound times this gain, "
        "as in MoM's own code (2^-2.5 = 0.1768); else as Megatron's do",
    )
    group.add_argument(
        "--layer-pattern",
        default="L",
        help="one letter a layer with its feed-forward, L (linear mixer) or N (softmax attention), repeated to "
        "--num-layers, such as LLLN; other letters as in --mixer. --hybrid-layer-pattern says more: see the README",
    )
    group.add_argument("--mom-memories", type=int, default=0, help="memories of Mixture-of-Memories; 0: none")
    group.add_argument(
        "--mom-topk",
        type=int,
        default=2,
        help="memories that each token is routed to; with 1 the router learns from its own losses only",
    )
    group.add_argument(
        "--mom-shared-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one more memory that sees every token",
    )
    group.add_argument("--mom-single-kv", action="store_true", help="one set of write projections for all memories")
    group.add_argument(
        "--mom-balance-coeff",
        type=float,
        default=MoMConfig.balance_coeff,
        help="weight of each layer's balance loss, which is 1 when balanced",
    )
    group.add_argument(
        "--mom-z-loss-coeff", type=float, default=MoMConfig.z_loss_coeff, help="weight of the router z-loss"
    )
    group.add_argument("--verbose", action="store_true", help="print all that Megatron prints, not only what matters")
    parser.set_defaults(**(_local_defaults() | cpu_defaults() | CHECKPOINT_DEFAULTS))
    return parser


def _patch_validation() -> None:
    """Let Megatron's checks, and all that follows, see our layers as the pattern of a HybridModel. Idempotent."""
    original = megatrons.validate_args
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def validate_args(args, *rest, **kwargs):
        if hasattr(args, "mixer"):
            check_arguments(args)
            translate(args, layer_options(args).pattern)
        return original(args, *rest, **kwargs)

    megatrons.validate_args = validate_args


def _mend_help(parser: argparse.ArgumentParser) -> None:
    """A help text of Megatron's has a bare %, on which argparse fails while it prints all of them."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except ValueError:
            action.help = action.help.replace("%", "%%")


def _local_defaults() -> dict:
    """None of the fusions whose package is not installed; without Transformer Engine, local layers."""
    found = {}
    if find_spec("fused_weight_gradient_mlp_cuda") is None:  # part of apex
        found["gradient_accumulation_fusion"] = False
    if not HAVE_TE:
        fusions = ("masked_softmax_fusion", "apply_rope_fusion")
        found |= {"transformer_impl": "local", "no_persist_layer_norm": True, **dict.fromkeys(fusions, False)}
    return found


def _json_object(text: str, example: str = '{"head_dim": 64}') -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        what = f"{error.msg.removesuffix(' at')}, in column {error.colno} of line {error.lineno}"
        raise argparse.ArgumentTypeError(f"not JSON ({what}); write it as {example}: {text[:80]!r}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets too deep
        raise argparse.ArgumentTypeError(f"not JSON ({error}); write it as {example}: {text[:80]!r}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, but is {text[:80]!r}")
    return value


def _mixer_names(text: str) -> str | dict:
    return _json_object(text, '{"G": "gla", "M": "mamba2"}') if text.startswith("{") else text


def config_argv(config: Mapping[str, object], source: str = "config") -> list[str]:
    """A configuration as command-line flags, to stand before the user's own, which then override it.

    Keys are the names of Megatron's and our flags, with ``-`` or ``_``. true sets a switch, false its ``--no-`` form
    or, where it has none, leaves it out; a list gives a flag several values; a mapping becomes JSON.

    Raises:
        ValueError: a key that no flag has (with the nearest), or a value that its flag cannot take.
    """
    actions = _actions()
    argv: list[str] = []
    for key, value in config.items():
        flag = "--" + str(key).replace("_", "-")
        action = actions.get(flag)
        if action is None:
            near = difflib.get_close_matches(flag, actions, n=1)
            hint = f"; did you mean {near[0].removeprefix('--')!r}?" if near else ""
            raise ValueError(f"{source}: unknown key {key!r}{hint}")
        if value is None:
            continue
        if action.nargs == 0:  # a switch
            if not isinstance(value, bool):
                raise ValueError(f"{source}: {key} is a switch, so it must be true or false, but is {value!r}")
            opposite = "--no-" + flag.removeprefix("--")
            if value:
                argv.append(flag)
            elif opposite in action.option_strings:
                argv.append(opposite)
        elif isinstance(value, Mapping):
            argv += [flag, json.dumps(value)]
        elif isinstance(value, list):
            # A flag that takes one value reads a list as Megatron writes it, without spaces: [1,0,0].
            argv += [flag, *map(str, value)] if action.nargs else [flag, json.dumps(value, separators=(",", ":"))]
        else:
            argv += [flag, str(value)]
    return argv


@functools.cache  # Megatron's 700 flags take a moment
def _actions() -> dict[str, argparse.Action]:
    """Flag -> argparse action, of Megatron's and our flags."""
    parser = add_arguments(megatrons.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return {flag.replace("_", "-"): action for action in parser._actions for flag in action.option_strings}


def expand_argv(argv: list[str]) -> list[str]:
    """Replace ``--config NAME`` (see ``read_config``) by the flags that it stands for, put first so that the others
    override them.

    ``--no-<switch>`` on the command line takes back a switch that the file set and that has no such flag of its own.
    """
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--config", action="append", default=[])
    known, rest = pre.parse_known_args(argv)
    if len(known.config) > 1:
        raise ValueError(f"give --config once, not {len(known.config)} times ({', '.join(known.config)})")
    flags = [flag for path in known.config for flag in config_argv(read_config(path), path)]
    actions = _actions()
    for taken_back in [flag for flag in rest if flag.startswith("--no-") and flag not in actions]:
        flag = "--" + taken_back.removeprefix("--no-")
        if flag in flags:
            flags.remove(flag)
            rest.remove(taken_back)
    _refuse_unknown(rest, actions)
    return flags + rest


def _refuse_unknown(argv: list[str], actions: Mapping[str, argparse.Action]) -> None:
    for flag in _flags(argv):
        if flag.replace("_", "-") not in actions:
            near = difflib.get_close_matches(flag, actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            if flag in RATIOS:  # which Megatron had
                hint = "; write the layers out: --hybrid-layer-pattern M-M-M*-"
            raise ValueError(f"unknown flag {flag}{hint}")


def _flags(argv: list[str]) -> Iterator[str]:
    return (word.split("=")[0] for word in argv if word.startswith("--"))


def set_argv(argv: list[str]) -> None:
    """Megatron parses ``sys.argv``: put the flags there."""
    sys.argv = [sys.argv[0], *argv]

"""Benchmarks, one subcommand each: `linear-moe benchmark ops`; or --tune, which remakes the tuning table."""

import argparse
import sys
from importlib import import_module


def ops(a):
    import_module("linear_moe.measure.torch_benchmark").run(a.repeats, a.scale, a.threads)


def kernels(a):
    return import_module("linear_moe.measure.kernel_benchmark").kernels(a.peer, a.repeats, a.rule)


def mom(a):
    return import_module("linear_moe.measure.layer_benchmark").mom(a.peer, a.repeats)


def decode(a):
    import_module("linear_moe.measure.decoding").decoding(a.tokens, a.contexts, a.picture)


def steps(a):
    import_module("linear_moe.measure.kernel_benchmark").decode(a.repeats)


def tune(a):
    import_module("linear_moe.measure.tune").run(a.kernel)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="linear-moe benchmark", description=__doc__)
    parser.add_argument("--tune", dest="run", action="store_const", const=tune, help="on the present GPU; takes long")
    parser.add_argument("--kernel", default="", metavar="TEXT", help="tune only kernels whose name holds this text")
    commands = parser.add_subparsers()
    command = commands.add_parser("ops", help="the torch update rules, beside transformers' and torch's attention")
    command.add_argument("--repeats", type=int, default=7)
    command.add_argument("--scale", type=float, default=1.0, help="share of the sequence lengths to run")
    command.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    command.set_defaults(run=ops)
    command = commands.add_parser("kernels", help="the Triton kernels, forward and backward, on a GPU")
    command.add_argument("--peer", choices=("fla", "flash-qla"), help="beside these kernels")
    command.add_argument("--rule", action="append", help="only this rule (repeat)")
    command.add_argument("--repeats", type=int, default=30)
    command.set_defaults(run=kernels)
    command = commands.add_parser("mom", help="the Mixture-of-Memories layer beside a plain layer, on a GPU")
    command.add_argument("--peer", choices=("fla",), help="beside these layers too")
    command.add_argument("--repeats", type=int, default=20)
    command.set_defaults(run=mom)
    command = commands.add_parser("decode", help="models behind contexts of 1k to 128k tokens (a GPU: 4k to 512k)")
    command.add_argument("--tokens", type=int, default=64, help="generated in a round (default: %(default)s)")
    command.add_argument("--contexts", type=int, nargs="+", metavar="N", help="their lengths")
    command.add_argument("--picture", metavar="PNG", help="draw it, too")
    command.set_defaults(run=decode)
    command = commands.add_parser("steps", help="one-token kernels after contexts of 1k to 1M tokens, on a GPU")
    command.add_argument("--repeats", type=int, default=10)
    command.set_defaults(run=steps)
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        parser.error("give a subcommand, or --tune")
    try:
        return bool(arguments.run(arguments))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")

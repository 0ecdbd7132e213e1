"""Benchmarks, one subcommand each: `python tools/benchmark.py ops`."""

import argparse


def ops(arguments):
    from linear_moe.ops import benchmark

    benchmark.run(arguments.repeats, arguments.scale, arguments.threads)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("ops", help="the torch update rules, beside transformers' and torch's attention")
    command.add_argument("--repeats", type=int, default=7)
    command.add_argument("--scale", type=float, default=1.0, help="share of the sequence lengths to run")
    command.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    command.set_defaults(run=ops)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except ImportError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()

"""Everything that a visit to a GPU should tell, in minutes: linear-moe gpu-report [--minutes 8] [--peer fla].

Checks every rule, part and layer in every precision against float64 on the CPU and goes on after failures, captures
CUDA graphs, then times kernels, the layer, training steps and decoding. Writes report.md and report.json as it goes.
Exit status 1: something was wrong, failed, crashed or took too long; or there is no GPU.
"""

import argparse
import sys


def main(argv: list[str]) -> int:
    from linear_moe.measure.gpu_report import run
    from linear_moe.measure.plan import PARTS

    parser = argparse.ArgumentParser(
        prog="linear-moe gpu-report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything, compiling included (%(default)s)")
    parser.add_argument("--only", choices=PARTS, help="one part (default: all)")
    parser.add_argument("--peer", choices=("fla",), help="times beside flash-linear-attention: pip install '.[peers]'")
    parser.add_argument("--output", default="gpu_report", metavar="DIR", help="folder of the report (%(default)s)")
    a = parser.parse_args(argv)
    try:
        return bool(run(a.minutes, a.only, a.peer, a.output))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")

"""Everything that a visit to a GPU should tell, in minutes: python tools/gpu_report.py [--minutes 8] [--peer fla].

Checks every rule, part and layer in every precision against float64 on the CPU and goes on after failures, captures
CUDA graphs, then times kernels, the layer, training steps and decoding. Writes report.md and report.json as it goes.
Exit status 1: something was wrong, failed, crashed or took too long; or there is no GPU.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where the package is not installed
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for all processes that this one starts

from linear_moe.measure.gpu_report import run
from linear_moe.measure.plan import PARTS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything, compiling included (%(default)s)")
    parser.add_argument("--only", choices=PARTS, help="one part (default: all)")
    parser.add_argument("--peer", choices=("fla",), help="times beside flash-linear-attention: pip install '.[peers]'")
    parser.add_argument("--output", default="gpu_report", metavar="DIR", help="folder of the report (%(default)s)")
    a = parser.parse_args()
    try:
        parser.exit(bool(run(a.minutes, a.only, a.peer, a.output)))
    except (ImportError, OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()

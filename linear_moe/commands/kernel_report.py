"""Compiles every Triton kernel for every architecture of the tuning table, without a GPU, and says what came out.

Prints registers, spills, shared memory and tensor-core instructions of every kernel, and the bytes, FLOPs and least
time of every op on an H200. Exit status 1: a kernel that does not compile, that spills too much, that wants more shared
memory than the chip has, or that multiplies bf16 matrices without tensor cores.
"""

import argparse
import os


def main(argv: list[str]) -> int:
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    from linear_moe.measure import kernel_report as report  # which reads them

    parser = argparse.ArgumentParser(
        prog="linear-moe kernel-report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the part of it that runs in CI: about three minutes")
    parser.add_argument("--json", metavar="FILE", help="also write everything there")
    parser.add_argument("--architecture", action="append", choices=sorted(report.SHARED), help="only this one (repeat)")
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only kernels whose name holds this text")
    parser.add_argument("--max-spills", type=int, default=report.MAX_SPILLS, help="bytes a thread (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="compilers that run at once (%(default)s)")
    a = parser.parse_args(argv)
    return bool(report.run(a.quick, a.json, a.architecture, a.kernel, a.max_spills, a.processes))

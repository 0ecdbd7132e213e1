"""Floating-point operations of kernels, counted under Triton's interpreter, in a process of its own."""

import json
import os
import subprocess
import sys
import warnings
from collections import Counter

import torch

from .workload import CASES, Shape, title


def start_counting(names, widths, backward=True):
    """Starts what `count_flops` does; the process prints its result as JSON."""
    command = [sys.executable, "-m", __name__, json.dumps([list(names), list(widths), backward])]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def count_flops(names, widths, backward=True):
    """Floating-point operations a token of every kernel: {"KxV": {case: {kernel: FLOPs}}}, for the heads of a Shape.

    names of cases; widths: pairs (K, V); backward: or forward alone. What is counted are the products of matrices
    (tl.dot, 2 M N K each, so also what masks throw away) that the interpreter executes on short inputs, in a process of
    its own, with the tiles of `tuning.target` for 16-bit inputs.
    """
    return finish_counting(start_counting(names, widths, backward))


def finish_counting(process):
    """The result of `start_counting`; a warning and nothing where the interpreter fails, as some of its versions do."""
    text, _ = process.communicate()
    if process.returncode:
        warnings.warn("FLOPs are not counted, so floors are those of bytes: see the interpreter's error", stacklevel=2)
        return {}
    return json.loads(text)


def _count_case(case, K, V, backward=True):
    """{kernel: FLOPs a token of a Shape's heads}, under the interpreter."""
    from triton.runtime import interpreter

    counts, running, (H, T) = Counter(), [], case.counted
    prepared = case.prepare(Shape(K, V, torch.float16, "cpu", B=1, T=T, H=H))
    dot, call = interpreter.InterpreterBuilder.create_dot, interpreter.GridExecutor.__call__

    def counting_dot(self, a, b, accumulator, *rest):
        counts[running[-1]] += 2 * a.data.size * b.data.shape[-1]
        return accumulator  # nothing that is executed depends on a product's values

    def named_call(self, *args, **options):
        running.append(title(self.fn))
        counts[running[-1]] += 0
        return call(self, *args, **options)

    interpreter.InterpreterBuilder.create_dot, interpreter.GridExecutor.__call__ = counting_dot, named_call
    try:
        case.run(*prepared, backward)
    finally:
        interpreter.InterpreterBuilder.create_dot, interpreter.GridExecutor.__call__ = dot, call
    return {name: count / T * Shape.H / H for name, count in counts.items()}


def _main():
    names, widths, backward = json.loads(sys.argv[1])
    cases = [case for case in CASES if case.name in names]
    print(json.dumps({f"{K}x{V}": {case.name: _count_case(case, K, V, backward) for case in cases} for K, V in widths}))


if __name__ == "__main__":
    _main()

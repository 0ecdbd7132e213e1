"""What a recorded launch becomes on a GPU that need not be here: compiled, and its binary read.

The signature, the constants and the alignments are what triton's own JITFunction derives from the arguments of that
launch; meta tensors have addresses, counted from zero, so that a slice that is not 16-byte aligned shows as such.
"""

import io
import multiprocessing
import os
import re
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from multiprocessing.connection import wait

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import create_function_from_signature

from linear_moe.ops.triton.launch import RUNTIME

from .dataflow import transposed_products

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB a block; 8.6 and 8.9 run what is made for 8.0
TENSOR_CORES = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync", "mfma": "v_mfma"}
LOG = "ptxas.log"


@dataclass
class Binary:
    """registers a thread; spills, bytes a thread; shared, bytes a block; tensor_cores, kinds of instructions found."""

    registers: int = 0
    spills: int = 0
    shared: int = 0
    tensor_cores: list = field(default_factory=list)
    matrix: bool = False  # the kernel multiplies matrices (tl.dot)
    transposed: list = field(default_factory=list)  # products that take the transpose of another one
    seconds: float = 0.0
    remark: str = ""  # a performance warning of the assembler
    error: str = ""  # why there is no binary


class Build:
    """One kernel as one launch compiles it for one architecture. Builds with the same `key` are the same binary."""

    def __init__(self, launch, architecture):
        kernel, _, args, options = launch
        self.kernel, self.architecture, self.target = kernel, architecture, TARGETS[architecture]
        backend = make_backend(self.target)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        arguments, specialization, rest = bind(*args, **options)
        self.options, self.signature, constants, attributes = kernel._pack_args(
            backend, options, arguments, specialization, rest
        )
        self.source = ASTSource(kernel, self.signature, constants, attributes)
        self.key = f"{architecture} {self.source.hash()} {self.options.hash()}"
        names = list(self.signature)
        self.constants = {names[i]: value for (i, *_), value in constants.items()}
        # integers that are neither constants nor run-time sizes: launches specialise on their values
        integers = [p.name for p in kernel.params if type(arguments[p.name]) is int and not p.is_constexpr]
        self.fixed_integers = [name for name in integers if name not in RUNTIME]

    def ttir(self):
        """Triton's IR of the kernel, before anything that depends on the architecture."""
        backend, context, stages = make_backend(self.target), ir.context(), {}
        ir.load_dialects(context)
        backend.load_dialects(context)
        codegen = backend.get_codegen_implementation(self.options)
        module = self.source.make_ir(self.target, self.options, codegen, backend.get_module_map(), context)
        backend.add_stages(stages, self.options, self.source.language)
        return str(stages["ttir"](module, {}))

    def compile(self):
        """The Binary; raises what triton raises."""
        start, triton.knobs.nvidia.dump_ptxas_log = time.perf_counter(), True
        compiled, log = self._compile_with_log()
        text = compiled.asm["amdgcn" if self.target.backend == "hip" else "ptx"]
        read = _read_amdgcn if self.target.backend == "hip" else _read_ptxas_log
        return Binary(
            **read(text if self.target.backend == "hip" else log),
            shared=compiled.metadata.shared,
            tensor_cores=[name for name, instruction in TENSOR_CORES.items() if instruction in text],
            matrix="tt.dot" in compiled.asm["ttir"],
            transposed=transposed_products(compiled.asm["ttir"]),
            seconds=time.perf_counter() - start,
        )

    def _compile_with_log(self):
        """Triton keeps binaries but not the assembler's log, so the log is put beside the binary."""
        printed = io.StringIO()
        with redirect_stdout(printed):
            compiled = triton.compile(self.source, target=self.target, options=self.options.__dict__)
        files = get_cache_manager(compiled.metadata.hash)
        if self.target.backend == "hip":
            return compiled, ""
        if not printed.getvalue() and (path := files.get_file(LOG)):
            with open(path) as log:
                return compiled, log.read()
        if not printed.getvalue():  # compiled earlier, by a launch
            triton.knobs.compilation.always_compile = True
            return self._compile_with_log()
        files.put(printed.getvalue(), LOG, binary=False)
        return compiled, printed.getvalue()


def _read_ptxas_log(log):
    remarks = sorted(
        set(re.findall(r"Potential Performance Loss: (.*?)(?: (?:in|for)(?: the)? function.*)?$", log, re.M))
    )
    return {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", log))),
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill stores", log))),
        "remark": "; ".join(remarks),
    }


def _read_amdgcn(text):
    def count(name):
        return int(re.search(rf"\.{name}: +(\d+)", text)[1])

    scalar = count("sgpr_spill_count")
    return {
        "registers": count("vgpr_count"),
        "spills": 4 * count("vgpr_spill_count"),
        "remark": f"{scalar} scalar registers spilled into vector registers" if scalar else "",
    }


def compile_all(builds, workers=2, timeout=600, progress=lambda done: None):
    """The Binary of every build, each compiled in a process of its own: a compiler that dies costs one row.

    progress(i) is called when build i is done. A build that takes longer than `timeout` seconds is ended, an error.
    """
    context, waiting, running = multiprocessing.get_context("fork"), list(range(len(builds)))[::-1], {}
    results = [None] * len(builds)
    while waiting or running:
        while waiting and len(running) < workers:
            i = waiting.pop()
            log, (receive, send) = tempfile.TemporaryFile(), context.Pipe(duplex=False)
            process = context.Process(target=_compile_in_child, args=(builds[i], send, log.fileno()))
            process.start()
            send.close()
            running[receive] = i, process, log, time.monotonic() + timeout
        patience = max(0, min(end for *_, end in running.values()) - time.monotonic())
        ready = wait(list(running), patience)
        late = [connection for connection, (*_, end) in running.items() if time.monotonic() > end]
        for connection in {*ready, *late}:
            i, process, log, _ = running.pop(connection)
            results[i] = _result(connection, process, log, timeout)
            progress(i)
    return results


def _compile_in_child(build, send, log):
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        send.send(build.compile())
    except Exception as error:
        send.send(Binary(error=_one_line(error)))


def _one_line(error):
    """Where in the kernel, and why: triton's messages quote the whole kernel between the two."""
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines() if line.strip(" ^")]
    where = f"{lines[0]} " if len(lines) > 1 and re.fullmatch(r"at \d+:\d+:", lines[0]) else ""
    return f"{type(error).__name__}: {where}{lines[-1] if lines else ''}"[:300]


def _result(connection, process, log, timeout):
    if not connection.poll():
        process.kill()
        process.join()
        return Binary(error=f"took longer than {timeout} s")
    try:
        result = connection.recv()
        process.join()
        return result
    except EOFError:  # the compiler died with its process
        process.join()
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines() or [""]
        return Binary(error=f"the compiler died (exit code {process.exitcode}): {lines[-1][:200]}")

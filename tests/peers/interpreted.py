"""Packages to compare with, on the CPU: flash-linear-attention in Triton's interpreter, and transformers in torch.

Nothing is changed on disk, nor in triton or torch: only what the peers' own modules hold is adapted, after their
import. So it does not matter whether Megatron or transformers imported them before, and our own kernels see none of it.
"""

import builtins
import inspect
import sys
from types import ModuleType

import pytest
import torch
import triton.language as tl
from torch import Tensor, nn
from triton.runtime.autotuner import Autotuner

REASON = "nothing to compare with: pip install -e '.[peers]'"


class Index(int):
    """A loop's index with a Triton scalar's `.to`, which the plain integers of the interpreter's loops lack."""

    def to(self, dtype: tl.dtype) -> tl.tensor:
        return tl.cast(int(self), dtype)


def index_range(*bounds: int) -> list[Index]:
    return [Index(i) for i in builtins.range(*bounds)]


def fla(module: str) -> ModuleType:
    """That module of flash-linear-attention, ready for the interpreter; skips the test where it is not installed."""
    found = pytest.importorskip(f"fla.{module}", reason=REASON)
    for name, loaded in list(sys.modules.items()):
        if not name.startswith("fla."):
            continue
        loaded.range = index_range  # a module's global comes before the builtin
        for function in list(vars(loaded).values()):
            while function is not None:
                if isinstance(function, Autotuner):
                    function.configs = function.configs[:1]  # with one there is nothing to measure
                function = getattr(function, "fn", None)
    return found


def transformers(patch: pytest.MonkeyPatch, model: str) -> ModuleType:
    """That model's module of transformers, its functions in torch, also where it found a package with kernels."""
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}", reason=REASON)
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ == module.__name__:
            patch.setattr(module, name, inspect.unwrap(function))
    return module


def eager(layer: nn.Module, x: Tensor) -> tuple:
    """What the layer returns, as a tuple, without torch.compile, which flash-linear-attention asks for in places."""
    with torch.compiler.set_stance("force_eager"):
        outputs = layer(x)
    return outputs if isinstance(outputs, tuple) else (outputs,)

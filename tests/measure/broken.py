"""Tasks that go wrong on purpose, for children to import."""

import os
import subprocess
import time
from unittest import mock

import torch

from linear_moe.measure import rules
from linear_moe.ops import api


def wrong_gradient(*arguments):
    """The check of a rule whose kernels get the gradient of the decay 1 % wrong."""
    right = api.linear_attention

    def twisted(q, k, v, g, **options):
        if options["backend"] == "triton":
            g = 1.01 * g - (0.01 * g).detach()
        return right(q, k, v, g, **options)

    with mock.patch.object(api, "linear_attention", twisted):
        return rules.check_rule(*arguments)


def fails():
    raise RuntimeError("no such kernel\nand much more")


def loses_context():
    """As after an illegal memory access: every later CUDA call of this process fails too."""
    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = broken = mock.Mock(side_effect=RuntimeError("CUDA error: an illegal memory access"))
    broken()


def crashes():
    print("about to die", flush=True)
    os.abort()


def hangs(file):
    """Writes the number of a process that it starts, and never ends."""
    child = subprocess.Popen(["sleep", "600"])
    file.write_text(str(child.pid))
    time.sleep(600)


def number():
    return {"row": {"process": str(os.getpid())}}

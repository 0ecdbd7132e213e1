"""Training steps of a configuration through Megatron's own loop: time, tokens, memory, and where the time goes."""

import statistics
import sys
import time
from functools import partial
from itertools import pairwise

import torch
from torch.profiler import ProfilerActivity, profile

from linear_moe.mcore.configs import CONFIGS

from .profiles import by_part, rows_of

MOCK = "--mock-data --tokenizer-type NullTokenizer --eval-iters 0 --num-workers 0 --transformer-impl local"
FIRST, TIMED, PROFILED = 3, 5, 2  # steps; the first ones compile


class Watch:
    """Stands where Megatron has its forward step, with one micro-batch a step: sees when each step begins."""

    def __init__(self, step, device, first, timed, profiled):
        self.step, self.device, self.profiled = step, device, profiled
        self.start, self.stop = first + timed, first + timed + profiled  # of the profile
        self.first, self.times, self.losses, self.calls = first, [], [], 0
        self.cuda = torch.device(device).type == "cuda"
        self.profile = profile(activities=[ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU])

    def __call__(self, data_iterator, model):
        if self.cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        if self.calls == self.start:
            self.profile.start()
        if self.calls == self.stop:
            self.profile.stop()
        self.calls += 1
        output, loss = self.step(data_iterator, model)
        return output, partial(self.note, loss)

    def note(self, loss, output):
        found = loss(output)
        total, tokens = found[-1]["lm loss"]
        self.losses.append((total / tokens).detach())
        return found

    def milliseconds(self):
        ends = self.times[self.first : self.start + 1]
        return 1e3 * statistics.median(b - a for a, b in pairwise(ends))


def train(config, flags, device, first=FIRST, timed=TIMED, profiled=PROFILED):
    """A row, the parts of a step and its kernels. config: below linear_moe/configs; flags: as on the command line.

    The last step is the one whose beginning ends the profile. Needs a process of its own.
    """
    from linear_moe.mcore.flops import training_flops
    from linear_moe.mcore.pretrain import forward_step, prepare
    from linear_moe.mcore.pretrain import train as megatron

    steps = f"--train-iters {first + timed + profiled + 1}"
    sys.argv = ["pretrain.py", "--config", str(CONFIGS / config), *MOCK.split(), *steps.split(), *flags.split()]
    args = prepare(sys.argv[1:])
    watch = Watch(forward_step, device, first, timed, profiled)
    megatron(args, step=watch)
    step, tokens = watch.milliseconds(), args.global_batch_size * args.seq_length
    work = training_flops(args, args.global_batch_size)
    kernels = rows_of(watch.profile, device, profiled)
    losses = [loss.item() for loss in watch.losses]
    row = {
        "configuration": config,
        "ms a step": f"{step:.1f}",
        "tokens/s": f"{1e3 * tokens / step:.0f}",
        "TFLOP/s": f"{1e-9 * work / step:.1f}",
        "peak GiB": f"{torch.cuda.max_memory_allocated() / 2**30:.1f}",
        "kernels ms": f"{sum(microseconds for _, microseconds, _ in kernels) / 1e3:.1f}",
        "loss": f"{losses[0]:.3f} to {losses[-1]:.3f}",
    }
    return {"row": row, "parts": by_part(kernels), "profiles": {f"a step of {config}": kernels}}

"""Run Megatron-Core 0.19 on a machine without CUDA: gloo for communication, the CPU in place of the device.

`enable_cpu()` is called once, before Megatron is used. Megatron asks `torch.cuda` for its device, its streams, its
random numbers and its memory; where there is no CUDA, each of those questions gets the CPU's answer. Nothing here is a
mock: the model, the optimizer, the communication and the checkpoints are Megatron's own.
"""

import collections
import contextlib
import functools
import logging
import os
import sys
import types

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_enabled = False


def enable_cpu() -> bool:
    """Make Megatron run on the CPU. Idempotent; returns False where CUDA is available.

    On any machine a single process can then start without torchrun.
    """
    global _enabled
    ensure_rendezvous()
    if torch.cuda.is_available():
        return False
    if not _enabled:
        _enabled = True
        # Megatron asserts this for TP; it orders kernels on a GPU older than Blackwell and means nothing here.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        _patch_torch_cuda()
        _patch_gloo()
        _DeviceMode().__enter__()  # for the life of the process
        _patch_megatron()
    return True


def cpu_defaults() -> dict:
    """Megatron's arguments on CPU, for `parser.set_defaults(**cpu_defaults())` in `extra_args_provider`.

    Not for Megatron's `args_defaults`: that only fills arguments whose own default is None, which none of these are.
    Set as the parser's defaults, a flag on the command line still overrides them. Empty where CUDA is available.
    """
    if torch.cuda.is_available():
        return {}
    return {
        "distributed_backend": "gloo",
        "transformer_impl": "local",  # Transformer Engine is CUDA only
        "use_cpu_initialization": True,  # the whole weight is made and cut, so that it does not depend on TP
        # fused kernels that exist for CUDA only
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "no_persist_layer_norm": True,
        "num_workers": 0,  # forking data workers beside gloo's threads can hang, and the cores are busy training
    }


def ensure_rendezvous() -> None:
    """Let a single process start without torchrun: Megatron's env:// rendezvous needs these variables."""
    if "WORLD_SIZE" not in os.environ:
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        for name, value in single.items():
            os.environ.setdefault(name, value)  # port 0: the system picks a free one


class _DeviceMode(TorchFunctionMode):
    """Reads "cuda" as "cpu" in every torch call. Costs about 2 microseconds a call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # clip_grads and the distributed optimizer compare with "torch.cuda.FloatTensor" to tell the dtype.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs:
            if "device" in kwargs:
                kwargs["device"] = _to_cpu(kwargs["device"])
            kwargs.pop("pin_memory", None)  # pinning needs a CUDA context
            return func(*map(_to_cpu, args), **kwargs) if func is torch.Tensor.to else func(*args, **kwargs)
        if func is torch.Tensor.to:
            return func(*map(_to_cpu, args))
        if func is torch.Tensor.pin_memory:
            return args[0]
        return func(*args)


def _to_cpu(device):
    """CPU for any CUDA device given as a string, torch.device or index; anything else unchanged."""
    if isinstance(device, str) and device.startswith("cuda"):
        return CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return CPU
    return device


class _Stream:
    """A stream on which everything has already happened: CPU operations return when they are done."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args, **kwargs):
        pass

    def _done(self, *args, **kwargs):
        return None

    synchronize = wait_event = wait_stream = _done

    def record_event(self, event=None):
        return event or _Event()

    def query(self):
        return True

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None


class _Event(_Stream):
    """An event that has already happened."""

    record = wait = _Stream._done

    def elapsed_time(self, end):
        return 0.0


def _patch_torch_cuda() -> None:
    """torch.cuda's questions, answered by the CPU."""

    def always(value):
        """A function of its own each time: torch.compile holds a rule for every one of torch.cuda's."""
        return lambda *args, **kwargs: value

    stream = _Stream()
    # Capability (0, 0) turns every "if the GPU is at least ..." off.
    properties = types.SimpleNamespace(major=0, minor=0, name="cpu", multi_processor_count=1, total_memory=0)
    answers = {
        "current_device": lambda: CPU,
        "device_count": lambda: 1,  # 0 would leave model parallelism and the seeds uninitialised
        "get_device_properties": lambda *args: properties,
        "get_device_capability": lambda *args: (0, 0),
        "get_device_name": lambda *args: "cpu",
        "memory_stats": lambda *args: collections.defaultdict(int),
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda s: contextlib.nullcontext(),
        "device": lambda d: contextlib.nullcontext(),
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "is_current_stream_capturing": lambda: False,
        # The CPU generator is what dropout draws from here, so it is the one to seed, save and fork.
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),  # torch.manual_seed calls these two
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    }
    inert = (
        "set_device set_stream synchronize empty_cache ipc_collect reset_peak_memory_stats reset_max_memory_allocated"
    )
    zero = "memory_allocated max_memory_allocated memory_reserved max_memory_reserved device_memory_used utilization"
    answers |= {name: always(None) for name in inert.split()} | {name: always(0) for name in zero.split()}
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, always(None))
    _keep_generator_from_data_loaders()
    # The mode above never sees these: modules move themselves, and a tensor's method may be called outside torch.
    torch.nn.Module.cuda = lambda self, device=None: self
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = always(None)


def _keep_generator_from_data_loaders() -> None:
    """A data loader's iterator draws a seed for its workers. On a GPU, dropout draws from another generator; here they
    share one, and a resumed run, which makes its iterator after it has loaded the generator, would drop others.
    """
    iterator = torch.utils.data.dataloader._BaseDataLoaderIter
    make = iterator.__init__

    @functools.wraps(make)
    def make_and_restore(self, loader):
        state = torch.get_rng_state()
        make(self, loader)
        torch.set_rng_state(state)

    iterator.__init__ = make_and_restore


def _patch_gloo() -> None:
    """gloo gathers and scatters equal parts only; experts under TP exchange as many tokens as were routed."""
    from torch import distributed as dist

    gather, scatter = dist.all_gather, dist.reduce_scatter

    def all_gather(parts, own, group=None, async_op=False):
        sizes = [len(part) for part in parts]
        if len(set(sizes)) == 1:
            return gather(parts, own, group, async_op)
        whole = own.new_empty(sum(sizes), *own.shape[1:])
        copies = own.repeat(len(sizes), *[1] * (own.ndim - 1))
        dist.all_to_all_single(whole, copies, sizes, [len(own)] * len(sizes), group)
        for part, received in zip(parts, whole.split(sizes)):
            part.copy_(received)

    def reduce_scatter(own, parts, op=dist.ReduceOp.SUM, group=None, async_op=False):
        sizes = [len(part) for part in parts]
        if len(set(sizes)) == 1:
            return scatter(own, parts, op, group, async_op)
        whole = torch.cat(list(parts))
        dist.all_reduce(whole, op, group)
        own.copy_(whole.split(sizes)[dist.get_rank(group)])

    dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter


def _uncompile(owner) -> None:
    """Put back the functions that a module of Megatron's, or a class in it, has given to torch.compile."""
    for name, value in list(vars(owner).items()):
        if isinstance(value, type) and value.__module__ == getattr(owner, "__name__", None):
            _uncompile(value)
        elif callable(value) and hasattr(value, "_torchdynamo_orig_callable"):
            setattr(owner, name, value._torchdynamo_orig_callable)


def _patch_megatron() -> None:
    """The few places where Megatron itself must know that there is no GPU."""
    import megatron.training as package
    from megatron.core import jit
    from megatron.core.inference import communication_utils
    from megatron.core.tensor_parallel import random as mcore_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.training import initialize, training

    # mcore decorates small functions with torch.compile; on CPU that costs minutes of C++ compilation for nothing.
    jit.disable_jit_fuser()
    for module in [module for name, module in sys.modules.items() if name.startswith("megatron.")]:
        _uncompile(module)

    # Its own assertion: "Megatron requires CUDA".
    start = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    initialize.initialize_megatron = training.initialize_megatron = package.initialize_megatron = start

    # Warming up fused kernels that are off, it would draw random numbers of TP-dependent shapes from the generator that
    # initialises the model, and initial values would depend on the layout.
    initialize.set_jit_fusion_options = training.set_jit_fusion_options = lambda tp_size=None: None

    # These read torch.cuda.default_generators, which are empty here.
    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # ... and their fork() warns whenever the CPU generator was used inside it, which here is its purpose.
    logging.getLogger(mcore_random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.msg)

    communication_utils._is_cuda = lambda tensor: None  # asserts it of what pipeline stages send each other

    # Split sizes become numpy only on their way from the GPU; all_to_all_single does not take them as tensors.
    move = moe_utils.maybe_move_tensor_to_cpu

    def move_split_sizes(tensor, as_numpy=False, record_stream=False):
        if as_numpy and isinstance(tensor, torch.Tensor):
            return tensor.numpy()
        return move(tensor, as_numpy, record_stream)

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = move_split_sizes

"""A mixer's layer body under Mixture-of-Memories, on the device against float64 on the CPU."""

import copy
from functools import partial

import torch

from linear_moe.mom import MoMConfig, Router
from linear_moe.ops import route
from linear_moe.ops.sequences import Sequences
from linear_moe.ssm.core import MixerCore
from linear_moe.ssm.registry import mixer_class

from .compare import outputs_and_gradients, verdict

HEADS, MEMORIES, TOPK = 2, 4, 2
# In 16 bits several roundings follow each other; the torch forms are off by up to 7e-3 and 2e-2 in bfloat16 on a CPU.
LIMITS = {torch.float32: (1e-5, 1e-4), torch.float16: (5e-3, 5e-2), torch.bfloat16: (2e-2, 5e-2)}


def make_layer(name, width):
    """(core, router) of a MoM layer of HEADS heads, hidden size HEADS * width, in float32 on the CPU."""
    mixer, hidden, mom = mixer_class(name), HEADS * width, MoMConfig(memories=MEMORIES, topk=TOPK)
    config = mixer.make_config(hidden, HEADS, {})
    core = MixerCore(mixer(config, 0, 2), hidden, memories=mom.projections)
    core.initialize(lambda weight: weight.normal_(std=hidden**-0.5))
    router = Router(hidden, MEMORIES, TOPK, dtype=torch.float32, device="cpu")
    torch.nn.init.normal_(router.weight)
    return core, router


def check_layer(name, width, dtype, device, lengths, seed):
    """Output and every gradient, packed; all precisions on the routes that float32 chooses: near ties they differ."""
    torch.manual_seed(seed)
    core, router = make_layer(name, width)
    x = torch.randn(1, sum(lengths), HEADS * width)
    weights, indices, *_ = router(x.flatten(0, 1))
    lengths = torch.tensor([0, *lengths]).cumsum(0).int()
    core = core.to(dtype)
    inputs = {"x": x.to(dtype), "weights": weights.detach()} | dict(core.named_parameters())

    def run(core, inputs, device):
        body = {name: value for name, value in inputs.items() if name not in ("x", "weights")}
        options = {"num_memories": MEMORIES, "shared": True, "cu_seqlens": lengths.to(device)}
        routes = route(indices[None].to(device), inputs["weights"][None], **options)
        options = {"routes": routes, "sequences": Sequences.of(inputs["x"], lengths.to(device))}
        return {"y": torch.func.functional_call(core, body, (inputs["x"],), options)}

    exact = copy.deepcopy(core).double()
    expected, _ = outputs_and_gradients(partial(run, exact), {n: t.double() for n, t in inputs.items()}, "cpu")
    ours = {n: t.to(device) for n, t in inputs.items()}
    found, _ = outputs_and_gradients(partial(run, core.to(device)), ours, device)
    return verdict(found, expected, LIMITS[dtype])

"""Initial values that do not depend on the parallel layout.

With `--use-cpu-initialization` mcore makes each tensor-parallel weight whole and cuts it, which settles TP. It does not
settle the rest: the generator is seeded per pipeline stage (initialize.py, `seed + 100 * pp_rank`), and expert-parallel
ranks all draw the same numbers for different experts. So every parameter is drawn anew here, from a seed made of its
global name: layers count from the model's start, experts from the layer's first.
"""

import functools
import hashlib
import math

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from linear_moe.mcore.sections import Sections

# As mcore does: what writes into the residual stream starts smaller with depth.
RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight", "out_proj.weight")


def xavier(tensor: torch.Tensor, gain: float, fans: int | None = None) -> None:
    """Fill matrices ``[..., out, in]`` uniformly within ``gain * sqrt(6 / (out + in))``, each by itself.

    fans: out + in of the whole matrix, where the tensor is only this rank's part of it.
    """
    bound = gain * math.sqrt(6 / (sum(tensor.shape[-2:]) if fans is None else fans))
    torch.nn.init.uniform_(tensor, -bound, bound)


@torch.no_grad()
def reinitialize(model: torch.nn.Module, seed: int, pg_collection=None) -> None:
    """Draw every parameter of `model` (one pipeline stage or chunk, not yet wrapped) as a function of its global name.

    The sharded state dict tells where each local tensor lies in the global one, for TP, PP, VPP and EP alike: the
    global tensor is drawn on the CPU and this rank's part cut out. Values come from, in this order:
    `parameter.initializer(tensor)`, where a module has set that attribute (it fills a tensor of the global shape, in
    place); nothing for vectors and scalars (norms and biases keep their constants); mcore's own
    `config.output_layer_init_method`, `config.embedding_init_method` and `config.init_method` by the parameter's role.
    """
    if pg_collection is None:
        from megatron.core.process_groups_config import ProcessGroupCollection

        pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": pg_collection.dp_cp}
    for entry in nested_values(model.sharded_state_dict(metadata=metadata)):
        parameter = getattr(entry, "data", None)
        if not isinstance(parameter, torch.nn.Parameter):
            continue
        fill = _initializer(model.config, entry.key, parameter)
        if fill is None:
            continue
        build = getattr(entry, "build_fn", None)
        if isinstance(build, Sections) and not build.cut:  # all ranks hold it: drawn as the one tensor that it is
            values = _drawn(f"{seed}/{entry.key}/()", parameter.shape, fill)
        elif build:
            # A fused weight: its slices are cut from the global tensor one by one, then put together again.
            draw = functools.partial(_local_part, fill=fill, seed=seed)
            values = entry.merge_fn(dict_list_map_inplace(draw, entry.build()))
        else:
            values = _local_part(entry, fill, seed)
        parameter.copy_(values)


def _initializer(config, key: str, parameter: torch.nn.Parameter):
    if hasattr(parameter, "initializer"):
        return parameter.initializer
    if parameter.dim() < 2:
        return None
    if key.endswith(RESIDUAL_OUTPUTS):
        return config.output_layer_init_method
    if "embedding" in key:
        return config.embedding_init_method or config.init_method
    return config.init_method


def _local_part(part: ShardedTensor, fill, seed: int) -> torch.Tensor:
    """This rank's part of the global tensor that `part` describes."""
    prepended = part.prepend_axis_num  # axes that number experts (or layers): part of the name, not of the shape
    name = f"{seed}/{part.key}/{part.global_offset[:prepended]}"
    whole = _drawn(name, part.global_shape[prepended:], fill)
    offsets = part.global_offset[prepended:]
    return whole[tuple(slice(start, start + size) for start, size in zip(offsets, part.local_shape, strict=True))]


def _drawn(name: str, shape, fill) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
        whole = torch.empty(shape)
        fill(whole)
    return whole

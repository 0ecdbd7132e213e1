"""Checkpoints of before this release, which kept a layer's low-rank factors `down` as one tensor. Delete this file with
the next release: whoever skips this one must load and save once in between.
"""

import functools

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from linear_moe.mcore.sections import Sections


def patch() -> None:
    """Let Megatron's `dist_checkpointing.load` read them, parameters and optimizer state alike."""
    original = dist_checkpointing.load

    @functools.wraps(original)
    def load(sharded_state_dict, checkpoint_dir, *args, **kwargs):
        if any(map(_is_down, nested_values(sharded_state_dict))):
            stored = {entry.key for entry in dist_checkpointing.load_tensors_metadata(checkpoint_dir).values()}
            sharded_state_dict = dict_list_map_outplace(
                lambda entry: _as_one(entry) if _is_down(entry) and entry.key in stored else entry, sharded_state_dict
            )
        return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    dist_checkpointing.load = load


def _is_down(entry) -> bool:
    build = getattr(entry, "build_fn", None)
    return isinstance(build, Sections) and not build.cut


def _as_one(entry: ShardedTensorFactory) -> ShardedTensor:
    offsets = entry.build_fn.offsets
    return ShardedTensor.from_rank_offsets(
        entry.key, entry.data, *offsets, replica_id=entry.replica_id, prepend_axis_num=len(offsets)
    )

"""Checkpoints of Megatron's GPTModel, whose layers are two of a HybridModel's: what mixes the sequence, and its
feed-forward. So are all that this package wrote before it built HybridModels; they load with their optimizer state.
"""

from __future__ import annotations

import functools
import re

from megatron.core.dist_checkpointing import gpt_checkpoint_interop
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase

LAYER = re.compile(r"\bdecoder\.layers\.(\d+)\.")
NORMS = ("decoder.final_norm.", "decoder.final_layernorm.")
EXTRA = "output_layer._extra_state"  # empty, and not in a GPTModel's checkpoints


def has_gpt_names(saved) -> bool:
    """Whether the run of these arguments, which are a checkpoint's, built a GPTModel with our layers."""
    return hasattr(saved, "mixer") and not hasattr(saved, "layers")


def use_gpt_names(sharded_state_dict: dict) -> None:
    """Let the entries of a HybridModel's sharded state dict, or its optimizer's, be read under a GPTModel's names."""
    dict_list_map_inplace(_renamed, sharded_state_dict)


def _renamed(entry):
    if not isinstance(entry, ShardedBase):
        return entry
    if entry.key.endswith(EXTRA):
        return LocalNonpersistentObject(entry.data)
    entry.key = LAYER.sub(lambda found: f"decoder.layers.{int(found[1]) // 2}.", entry.key).replace(*NORMS)
    return entry


def patch() -> None:
    """Let Megatron's way from GPTModel to HybridModel, which knows no linear mixers, do so."""
    from megatron.training import checkpointing

    ask, retarget = checkpointing._maybe_setup_gpt_to_hybrid_load, "retarget_sharded_state_dict_to_gpt_checkpoint"
    megatrons = getattr(gpt_checkpoint_interop, retarget)

    @functools.wraps(ask)
    def maybe_setup(args, ckpt_args, model):
        ours = has_gpt_names(ckpt_args)
        return (use_gpt_names, not args.finetune) if ours else ask(args, ckpt_args, model)

    def retargeted(sharded_state_dict, layer_maps):
        if layer_maps is use_gpt_names:
            use_gpt_names(sharded_state_dict)
        else:
            megatrons(sharded_state_dict, layer_maps)

    checkpointing._maybe_setup_gpt_to_hybrid_load = maybe_setup
    setattr(gpt_checkpoint_interop, retarget, retargeted)

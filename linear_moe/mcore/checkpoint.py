"""What Megatron's distributed checkpoints need from us, on GPU and CPU alike.

`patch_megatron()` once before training makes a checkpoint saved at any TP, PP, VPP, EP and DP, with or without the
distributed optimizer, load at any other with its optimizer state; `check_checkpoint(args)` refuses, before anything is
built or loaded, what cannot be loaded.
"""

import copy
import functools
import json
import os
from dataclasses import replace
from pathlib import Path

import torch

# Defaults for `parser.set_defaults`: "dp_reshardable", Megatron's own, only reshards along DP.
CHECKPOINT_DEFAULTS = {"dist_ckpt_optim_fully_reshardable": True}

# Arguments that decide which parameters exist and what shape they have.
ARCHITECTURE = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels swiglu normalization "
    "add_bias_linear add_qkv_bias qk_layernorm multi_latent_attention untie_embeddings_and_output_weights vocab_size "
    "position_embedding_type mtp_num_layers num_experts moe_layer_freq moe_ffn_hidden_size "
    "moe_shared_expert_intermediate_size moe_router_enable_expert_bias "
    "layer_pattern mixer mixer_args mom_memories mom_shared_memory mom_single_kv"
).split()
# Arguments that change what the same parameters compute: --finetune may change them, a resumed run may not.
BEHAVIOUR = "moe_router_topk mom_topk rotary_base rotary_percent squared_relu moe_router_score_function".split()
WEIGHTS_ONLY = "load the weights only: --no-load-optim --no-load-rng to keep the iteration, or --finetune to start at 0"


# --- before loading -------------------------------------------------------------------------------------------------


def check_checkpoint(args) -> None:
    """Raise ValueError if the checkpoint at `args.load` cannot be loaded under `args`; silent if there is none.

    Call it after Megatron has parsed and validated its arguments, before `pretrain`. Mends a tracker file that an
    interrupted save has left empty.
    """
    folder = getattr(args, "load", None)
    if folder is None or not (Path(folder) / TRACKER).exists():
        return
    from megatron.core import dist_checkpointing

    path = Path(folder) / _checkpoint_name(args, Path(folder))
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        return  # another format (legacy torch, DCP): Megatron's own business
    common = dist_checkpointing.load_common_state_dict(str(path))
    saved = common.get("args")
    if saved is None:
        return
    names = ARCHITECTURE if args.finetune else ARCHITECTURE + BEHAVIOUR
    differing = [name for name in names if _differ(saved, args, name)]
    if differing:
        lines = [f"  {n}: {_value(saved, n)!r} in the checkpoint, {_value(args, n)!r} now" for n in differing]
        raise ValueError("\n".join([f"the checkpoint {path} is of another architecture:", *lines]))
    if not (args.finetune or args.no_load_optim or getattr(saved, "no_save_optim", False)):
        _check_optimizer(path, saved, args, dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {})


def _value(args, name: str):
    """An argument in a form that compares: patterns written out to the model's depth."""
    value = getattr(args, name, None)
    layers = getattr(args, "num_layers", None)
    if name == "layer_pattern" and value and layers:
        return (value * layers)[:layers]
    if name == "num_query_groups" and not getattr(args, "group_query_attention", False):
        return getattr(args, "num_attention_heads", None)  # Megatron writes this into its arguments later
    if name == "moe_layer_freq" and getattr(args, "num_experts", None) is None:
        return None
    if name == "moe_layer_freq" and isinstance(value, int) and layers:
        return [int(i % value == 0) for i in range(layers)]
    if name == "vocab_size" and value is None:
        return getattr(args, "padded_vocab_size", None)
    return value


def _differ(saved, args, name: str) -> bool:
    if not hasattr(saved, name) or not hasattr(args, name):
        # One of the two programs does not know the option: a plain Megatron script has no mixer, and may not load one.
        return (getattr(saved, name, None) or None) != (getattr(args, name, None) or None)
    if name == "vocab_size" and (saved.vocab_size is None or args.vocab_size is None):
        # Only the padded size is known, and padding depends on TP; Megatron pads or cuts it when it loads.
        if saved.tensor_model_parallel_size != args.tensor_model_parallel_size:
            return False
        return getattr(saved, "padded_vocab_size", None) != getattr(args, "padded_vocab_size", None)
    return _value(saved, name) != _value(args, name)


def _check_optimizer(path: Path, saved, args, metadata: dict) -> None:
    """What of the optimizer's state the engine cannot move to another layout."""
    if saved.params_dtype != args.params_dtype:
        raise ValueError(
            f"the optimizer state in {path} belongs to {saved.params_dtype} parameters, not {args.params_dtype}: "
            + WEIGHTS_ONLY
        )
    if saved.optimizer != args.optimizer:
        raise ValueError(f"the optimizer in {path} is {saved.optimizer}, not {args.optimizer}: {WEIGHTS_ONLY}")
    kind = metadata.get("distrib_optim_sharding_type", "fully_reshardable")
    names = "tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size".split()
    pairs = [(n, getattr(saved, n), getattr(args, n)) for n in [*names, "use_distributed_optimizer"]]
    changed = [f"{name}: {old} -> {new}" for name, old, new in pairs if old != new]
    if changed and kind not in ("fully_reshardable", "fully_sharded_model_space"):
        raise ValueError(
            f"the optimizer state in {path} is stored as {kind!r}, which only another number of data-parallel ranks "
            f"can read ({', '.join(changed)}). Save with --dist-ckpt-optim-fully-reshardable, or {WEIGHTS_ONLY}"
        )


# --- interrupted saves ----------------------------------------------------------------------------------------------

TRACKER = "latest_checkpointed_iteration.txt"


def _checkpoint_name(args, folder: Path) -> str:
    """The checkpoint that Megatron will load, checked to be whole.

    Megatron writes a checkpoint's files, then its metadata.json, then the tracker: killed before the last, the tracker
    still names the one before. Only the tracker itself is written in place: killed just there, it is empty.
    """
    tracker = folder / TRACKER
    text = tracker.read_text().strip()
    whole = sorted(filter(_is_whole, folder.glob("iter_*")), key=lambda path: (path / "metadata.json").stat().st_mtime)
    if not text and whole:
        text = str(int(whole[-1].name.removeprefix("iter_")))
        mended = tracker.with_suffix(f".{os.getpid()}")
        mended.write_text(text)
        mended.replace(tracker)  # atomic: every rank may be doing the same
    step = getattr(args, "ckpt_step", None) or text
    if str(step) == "release":
        return "release"
    if not str(step).isdigit():
        raise ValueError(f"{tracker} should hold an iteration but holds {text!r}, and {folder} has no whole checkpoint")
    name = f"iter_{int(step):07d}"
    legacy = any((folder / name).glob("mp_rank_*"))
    if not legacy and folder / name not in whole:
        usable = ", ".join(p.name for p in whole) or "none"
        raise ValueError(f"{folder / name} is incomplete or missing; whole: {usable} (--ckpt-step N loads iteration N)")
    return name


def _is_whole(path: Path) -> bool:
    """metadata.json is written last, after every rank's tensors and torch's .metadata."""
    try:
        json.loads((path / "metadata.json").read_text())
    except (OSError, ValueError):
        return False
    return (path / ".metadata").exists()


# --- patches --------------------------------------------------------------------------------------------------------


def patch_megatron() -> None:
    """Make checkpoints independent of the layout. Idempotent; call it before the first one is saved or loaded."""
    from megatron.core.datasets import utils
    from megatron.training import checkpointing

    if getattr(checkpointing, "_linear_moe", False):
        return
    checkpointing._linear_moe = True

    # The wheel ships the data-set helpers compiled and no Makefile: compiling would end the program.
    if not (Path(utils.__file__).parent / "Makefile").exists():
        utils.compile_helpers = lambda: None

    build = checkpointing._build_sharded_state_dict_metadata

    @functools.wraps(build)
    def build_metadata(args, *rest, **kwargs):
        """Stored in the checkpoint when it is saved, and read back from it when it is loaded."""
        metadata = build(args, *rest, **kwargs)
        # One name per layer. By default all layers are slices of one tensor, which a hybrid model's are not.
        metadata["non_homogeneous_layers"] = True
        metadata |= _optimizer_metadata(args)
        return metadata

    checkpointing._build_sharded_state_dict_metadata = build_metadata
    _patch_optimizers()


# --- optimizer state that moves between layouts ---------------------------------------------------------------------
# Its tensors are no problem: each is stored under its parameter's global name. The rest is a small dictionary of
# parameter groups and a step count, whose shape follows the layout: with EP > 1 experts have an optimizer of their own,
# chained behind the first; the distributed optimizer nests its groups and keeps the step inside them, the plain one
# beside them. And torch's Adam (no Transformer Engine, no apex) counts steps in a tensor per parameter, which Megatron
# forgets.

# Megatron's names for the float32 copy of the parameters; with float32 parameters the plain optimizer has no copy.
MAIN_PARAMETER = "main_parameter"


def _optimizer_metadata(args) -> dict:
    """Kept in the checkpoint: how its optimizer state is stored."""
    if args.ckpt_format != "torch_dist":
        return {}
    plain = "fp32_param" if args.bf16 or args.fp16 else ""
    found = {MAIN_PARAMETER: "param" if args.use_distributed_optimizer else plain}
    # Not written by Megatron without the distributed optimizer, but asked for when one then loads.
    return found if args.use_distributed_optimizer else found | {"distrib_optim_sharding_type": "fully_reshardable"}


def _patch_optimizers() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params

    _wrap(DistributedOptimizer, "state_dict", _state_dict)
    _wrap(DistributedOptimizer, "load_state_dict", _load_state_dict)
    _wrap(DistributedOptimizer, "_set_main_param_and_optimizer_states", _set_states)
    _wrap(DistributedOptimizer, "sharded_param_state_fully_reshardable", _sharded_param_state)
    _wrap(Float16OptimizerWithFloat16Params, "sharded_state_dict", _float16_sharded_state_dict)
    _wrap(ChainedOptimizer, "load_state_dict", _chained_load_state_dict)


def _wrap(owner: type, name: str, wrapper) -> None:
    """owner.name(...) becomes wrapper(original, ...)."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, method)


# --- torch's Adam under the distributed optimizer -------------------------------------------------------------------


def _is_torch_adam(optimizer) -> bool:
    return isinstance(getattr(optimizer, "optimizer", None), (torch.optim.Adam, torch.optim.AdamW))


def _state_dict(original, self):
    """Megatron reads `step` out of the state and asserts that there is one: not so before the first update (and a
    checkpoint is loaded before it), nor on a pipeline stage that has none of this optimizer's parameters."""
    if not _is_torch_adam(self):
        return original(self)
    for group in self.optimizer.param_groups:
        for parameter in group["params"]:
            state = self.optimizer.state[parameter]
            for name in ("exp_avg", "exp_avg_sq"):
                if name not in state:
                    state[name] = torch.zeros_like(parameter)
            state.setdefault("step", torch.tensor(0.0))
    if self.optimizer.state:
        return original(self)
    groups = [group | {"step": 0.0} for group in self.optimizer.param_groups]
    return {"optimizer": {"param_groups": [{k: v for k, v in g.items() if k != "params"} for g in groups]}}


def _load_state_dict(original, self, state_dict):
    original(self, state_dict)
    if _is_torch_adam(self):
        for state in self.optimizer.state.values():
            # Megatron gives all parameters one and the same tensor, which an update would count up once a parameter.
            state["step"] = state["step"].clone()


def _set_states(original, self, model_param, tensors):
    """Keep what the checkpoint does not hold a tensor for: `step`, which is in the groups, and the main parameter of a
    float32 model (the model parameter itself, already loaded). Megatron raises KeyError for both."""
    if _is_torch_adam(self):
        tensors = self._get_main_param_and_optimizer_states(model_param) | tensors
    original(self, model_param, tensors)


# --- with and without the distributed optimizer ---------------------------------------------------------------------


def _sharded_param_state(original, self, model_sharded_state_dict, is_loading=False, metadata=None):
    found = original(self, model_sharded_state_dict, is_loading, metadata)
    name = (metadata or {}).get(MAIN_PARAMETER, "param")
    if is_loading and name != "param":
        for tensors in found.values():
            entry = tensors.pop("param")
            if name:
                tensors["param"] = _renamed(entry, "param", name)
    return found


def _float16_sharded_state_dict(original, self, model_sharded_state_dict, is_loading=False, metadata=None):
    found = original(self, model_sharded_state_dict, is_loading, metadata)
    name = (metadata or {}).get(MAIN_PARAMETER, "fp32_param")
    if is_loading and name != "fp32_param":
        groups = found["fp32_from_fp16_params"]
        found["fp32_from_fp16_params"] = [[_renamed(entry, "fp32_param", name) for entry in group] for group in groups]
    return found


def _renamed(entry, old: str, new: str):
    return replace(entry, key=entry.key.replace(f"optimizer.state.{old}.", f"optimizer.state.{new}.", 1))


# --- groups and step, whatever optimizers there were ----------------------------------------------------------------


def _chained_load_state_dict(original, self, state_dict):
    """Give each of this layout's optimizers its groups, found by what they say and not by where they were."""
    if isinstance(state_dict, dict):
        optimizers = self.chained_optimizers
        entries = [state_dict, *(state_dict[key] for key in sorted(k for k in state_dict if isinstance(k, int)))]
        saved = [entry for entry in entries if _groups(entry)]
        if saved:
            targets = [state_dict.get(i, {}) for i in range(len(optimizers))] if len(optimizers) > 1 else [state_dict]
            adapted = [_adapted(o, target, saved) for o, target in zip(optimizers, targets, strict=True)]
            state_dict = dict(enumerate(adapted)) if len(optimizers) > 1 else adapted[0]
    original(self, state_dict)


def _groups(entry: dict) -> list[dict]:
    """The groups that were saved in `entry`; those that only say which parameters are here now do not count."""
    groups = entry.get("optimizer", entry).get("param_groups", [])
    return [group for group in groups if "lr" in group]


def _adapted(optimizer, target: dict, saved: list[dict]) -> dict:
    """The state to load into one optimizer: tensors from `target`, groups and step from wherever they were saved."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    groups = [group for entry in saved for group in _groups(entry)]
    steps = [group["step"] for group in groups if group.get("step") is not None]
    steps += [s for e in saved if (s := e.get("optimizer", e).get("state", {}).get("common_step")) is not None]
    # All count together; an optimizer without parameters on the rank that wrote the groups has only counted to 0.
    step = max(steps, default=None, key=float)
    result = {key: value for key, value in target.items() if not isinstance(key, int)}
    if "grad_scaler" in saved[0]:
        result.setdefault("grad_scaler", saved[0]["grad_scaler"])
    distributed = isinstance(optimizer, DistributedOptimizer)
    if distributed:
        kinds = [entry["param_state_sharding_type"] for entry in saved if "param_state_sharding_type" in entry]
        result["param_state_sharding_type"] = kinds[0] if kinds else "fully_reshardable"

    current = optimizer.optimizer.state_dict()["param_groups"]
    matched = [copy.deepcopy(_match(group, groups)) | {"params": group["params"]} for group in current]
    for group, now in zip(matched, current, strict=True):
        group["is_expert_parallel"] = now["is_expert_parallel"]
        group.pop("step", None)
    if step is not None and (distributed or not _is_torch_adam(optimizer)):
        for group in matched:
            group["step"] = float(step) if _is_torch_adam(optimizer) else step
    nested = "fp32_from_fp16_params" in result or distributed
    inner = {"param_groups": matched}
    if not distributed:
        tensors = (result.get("optimizer", {}) if nested else result).get("state", {})
        inner["state"] = {key: value for key, value in tensors.items() if isinstance(key, int) and value}
        if step is not None and _is_torch_adam(optimizer):
            inner["state"]["common_step"] = torch.as_tensor(float(step))
    return result | ({"optimizer": inner} if nested else inner)


def _match(group: dict, saved: list[dict]) -> dict:
    """The saved group with the same hyperparameters. Whether experts were parallel is the layout's, not the group's."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    def identity(g: dict) -> tuple:
        return tuple(g.get(k, g.get(f"pre_{k}")) for k in param_group_identifier_keys if k != "is_expert_parallel")

    for candidate in saved:
        if identity(candidate) == identity(group):
            return candidate
    raise ValueError(
        f"the checkpoint's optimizer has no parameter group with {identity(group)} but {list(map(identity, saved))} "
        f"(the order is {', '.join(k for k in param_group_identifier_keys if k != 'is_expert_parallel')}). "
        "Were --lr or --min-lr changed? --no-load-optim loads the weights only"
    )

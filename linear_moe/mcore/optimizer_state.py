"""Optimizer state that moves between layouts.

Its tensors are no problem: each is stored under its parameter's global name. The rest is a small dictionary of
parameter groups and a step count, whose shape follows the layout: with EP > 1 experts have an optimizer of their own,
chained behind the first; the distributed optimizer nests its groups and keeps the step inside them, the plain one
beside them. And torch's Adam (no Transformer Engine, no apex) counts steps in a tensor per parameter, which Megatron
forgets.
"""

import copy
import functools
import inspect
import itertools
from collections.abc import Iterable
from dataclasses import replace

import torch

# Megatron's names for the float32 copy of the parameters; with float32 parameters the plain optimizer has no copy.
MAIN_PARAMETER = "main_parameter"
# What a parameter group says of its learning rate and weight decay over time.
SCHEDULE = ("max_lr", "min_lr", "start_wd", "end_wd")


def metadata(args) -> dict:
    """Kept in the checkpoint: how its optimizer state is stored."""
    if args.ckpt_format != "torch_dist":
        return {}
    plain = "fp32_param" if args.bf16 or args.fp16 else ""
    found = {MAIN_PARAMETER: "param" if args.use_distributed_optimizer else plain}
    # Not written by Megatron without the distributed optimizer, but asked for when one then loads.
    return found if args.use_distributed_optimizer else found | {"distrib_optim_sharding_type": "fully_reshardable"}


def patch() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params

    _wrap(DistributedOptimizer, "state_dict", _state_dict)
    _wrap(DistributedOptimizer, "load_state_dict", _load_state_dict)
    _wrap(DistributedOptimizer, "_set_main_param_and_optimizer_states", _set_states)
    # Megatron's pull request 5077 mends this, and with it goes the variable.
    if "missing_elems_num" in inspect.getsource(DistributedOptimizer.sharded_param_state_fully_reshardable):
        _wrap(DistributedOptimizer, "sharded_param_state_fully_reshardable", _without_bucket_padding)
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


# --- more than one bucket ---------------------------------------------------------------------------------------------


def _without_bucket_padding(original, self, *args, **kwargs):
    """Megatron collects the buckets' states without the padding at their ends, but looks parameters up by their places
    in the padded buffer: whatever lies behind the first bucket was saved from the wrong place, without a word."""
    maps = [buffer.param_index_map for buffer in self.buffers]
    try:
        for buffer, places in zip(self.buffers, maps, strict=True):
            sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
            padding = [b.offset - start for b, start in zip(buffer.buckets, itertools.accumulate([0, *sizes]))]
            buffer.param_index_map = {
                parameter: (start - padding[bucket], end - padding[bucket], bucket)
                for parameter, (start, end, bucket) in places.items()
            }
        return original(self, *args, **kwargs)
    finally:
        for buffer, places in zip(self.buffers, maps, strict=True):
            buffer.param_index_map = places


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

    saved_groups = [group for entry in saved for group in _groups(entry)]
    step = _last_step(saved, saved_groups)
    torch_adam = _is_torch_adam(optimizer)
    groups = _current_groups(optimizer, saved_groups)
    result = {key: value for key, value in target.items() if not isinstance(key, int)}
    if "grad_scaler" in saved[0]:
        result.setdefault("grad_scaler", saved[0]["grad_scaler"])

    if isinstance(optimizer, DistributedOptimizer):
        kinds = [entry["param_state_sharding_type"] for entry in saved if "param_state_sharding_type" in entry]
        result["param_state_sharding_type"] = kinds[0] if kinds else "fully_reshardable"
        _set_step(groups, float(step) if torch_adam and step is not None else step)
        return result | {"optimizer": {"param_groups": groups}}

    # The plain optimizer keeps its tensors beside the groups; that of 16-bit parameters nests both.
    nested = "fp32_from_fp16_params" in result
    tensors = result.get("optimizer", {}) if nested else result
    state = {key: value for key, value in tensors.get("state", {}).items() if isinstance(key, int) and value}
    if not torch_adam:
        _set_step(groups, step)
    elif step is not None:
        state["common_step"] = torch.as_tensor(float(step))
    inner = {"param_groups": groups, "state": state}
    return result | ({"optimizer": inner} if nested else inner)


def _last_step(saved: list[dict], groups: list[dict]):
    """The step that was saved, in the groups or beside them; None where there is none.

    All count together; an optimizer without parameters on the rank that wrote the groups has only counted to 0.
    """
    steps = [group.get("step") for group in groups]
    steps += [entry.get("optimizer", entry).get("state", {}).get("common_step") for entry in saved]
    return max((step for step in steps if step is not None), default=None, key=float)


def _set_step(groups: list[dict], step) -> None:
    if step is not None:
        for group in groups:
            group["step"] = step


def _current_groups(optimizer, saved: list[dict]) -> list[dict]:
    """This optimizer's groups, each with what was saved of it; without a step."""
    from megatron.training import get_args

    override = get_args().override_opt_param_scheduler
    current = optimizer.optimizer.state_dict()["param_groups"]
    groups = [copy.deepcopy(_match(now, saved)) for now in current]
    for group, now, live in zip(groups, current, optimizer.optimizer.param_groups, strict=True):
        group |= {name: now[name] for name in ("params", "is_expert_parallel")}
        group.pop("step", None)
        # Megatron reads learning rates in the groups, and pairs groups by them once more.
        source, destination = (now, group) if override else (group, live)
        destination.update({name: source[name] for name in SCHEDULE if name in source})
    return groups


def _match(group: dict, saved: list[dict]) -> dict:
    """The saved group of the same kind: with the same schedule, or the only other that there is.

    Whether experts were parallel is the layout's, not the group's.
    """
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    kind = [*param_group_identifier_keys, "default_config"]
    kind = [name for name in kind if name not in ("is_expert_parallel", *SCHEDULE)]
    alike = [candidate for candidate in saved if _values(candidate, kind) == _values(group, kind)]
    exact = [candidate for candidate in alike if _values(candidate, SCHEDULE) == _values(group, SCHEDULE)]
    if exact or len({_values(candidate, SCHEDULE) for candidate in alike}) == 1:
        return (exact or alike)[0]
    names = (*kind, *SCHEDULE)
    raise ValueError(
        f"the checkpoint's optimizer has no one parameter group for {_values(group, names)} in "
        f"{[_values(candidate, names) for candidate in saved]} (the order is {', '.join(names)}). "
        "--no-load-optim loads the weights only"
    )


def _values(group: dict, names: Iterable[str]) -> tuple:
    return tuple(group.get(name, group.get(f"pre_{name}")) for name in names)

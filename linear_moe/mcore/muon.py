"""Megatron's Muon (`--optimizer muon`, arXiv 2502.16982) over linear layers: it makes the update of each projection of
each memory orthogonal by itself; everything else of them is Adam's.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from types import SimpleNamespace

import torch

from linear_moe.ssm.stored import Tensors

OPTIMIZERS = ("muon", "adaptive_muon")


def check_muon(args, linear: bool) -> None:
    """Raises a ValueError for what Muon needs, or cannot do with linear layers."""
    name = args.optimizer.removeprefix("dist_")
    if name not in OPTIMIZERS:
        return
    if find_spec("emerging_optimizers") is None:
        raise ValueError(f"optimizer {args.optimizer} needs the extra `muon`: pip install 'linear-moe[muon]'")
    if linear and not args.muon_split_qkv:
        raise ValueError(
            "muon_no_split_qkv would make a linear layer's projections orthogonal to each other; leave it out"
        )
    layer_wise = args.optimizer != name or getattr(args, "use_layer_wise_distributed_optimizer", False)
    if linear and (args.use_distributed_optimizer or layer_wise):
        raise ValueError(
            f"optimizer {args.optimizer} with use_distributed_optimizer is not supported with linear layers: "
            "Megatron gives whatever has two dimensions to Muon there, convolutions and routers too"
        )


def mark(layer, tensors: Tensors) -> None:
    """Leave on the layer's parameters what Muon asks them: whether they are its own, and how many rows of a fused one
    each matrix has.
    """
    for stored in tensors.values():
        parameter = layer.get_parameter(stored.parameter)
        parameter.use_muon = stored.matrix
        if stored.section is not None:
            parameter.is_qkv = True
            parameter.qkv_split_shapes = [*getattr(parameter, "qkv_split_shapes", ()), stored.shape[-2]]


def patch() -> None:
    """Let Megatron's Muon go by `use_muon` where a parameter has it, and take stacks ``[memories, out, in]``."""
    from megatron.core.optimizer import emerging_optimizers
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    def for_adam(parameter) -> bool:
        use_muon = getattr(parameter, "use_muon", None)
        return emerging_optimizers._is_nonlinear_or_embedding(parameter) if use_muon is None else not use_muon

    for name in OPTIMIZERS:
        key = ParamKey(predicate=ParamPredicate(name="not_of_muon", fn=for_adam))
        emerging_optimizers._EMERGING_OPTIMIZERS[name].default_param_overrides = {key: {"optimizer": "adam"}}

    original = emerging_optimizers.TensorParallelMuon.orthogonalize

    @functools.wraps(original)
    def orthogonalize(self, p, grad, **kwargs):
        if grad.dim() == 2:
            return original(self, p, grad, **kwargs)
        cut = getattr(p, "partition_dim", -1)
        of_one = SimpleNamespace(partition_dim=cut - 1 if cut > 0 else -1, is_qkv=getattr(p, "is_qkv", False))
        of_one.qkv_split_shapes = getattr(p, "qkv_split_shapes", None)
        return torch.stack([original(self, of_one, memory, **kwargs) for memory in grad])

    emerging_optimizers.TensorParallelMuon.orthogonalize = orthogonalize

"""How many parameters a configuration's model has, and how many of them one token uses, without making them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from linear_moe.mcore.mixer_layer import MixerLayer
from linear_moe.mcore.model import make_model


@dataclass(frozen=True)
class ParameterCount:
    """total: all parameters. activated: those that one token uses. embedding: the word embeddings and the output
    layer (one matrix if tied), which both figures include.
    """

    total: int
    activated: int
    embedding: int

    def __str__(self) -> str:
        without = (self.total - self.embedding, self.activated - self.embedding)
        million = "{:.0f}M total, {:.0f}M activated".format
        return (
            f"{million(*(n / 1e6 for n in without))} without embeddings; "
            f"{million(self.total / 1e6, self.activated / 1e6)} with {self.embedding / 1e6:.0f}M of embeddings"
        )


def count_parameters(config: str | Path | Mapping[str, object], **overrides: object) -> ParameterCount:
    """Counts what ``build_model`` would make, on tensors without memory.

    Of the routed experts a token uses top-k; of a MoM layer's write projections those of its top-k memories and of the
    shared one. Everything else counts in full: routers, shared experts, norms, and all rows of the embeddings.

    Args:
        config, overrides: as for ``build_model``. ``vocab_size``, which training takes from the tokenizer, counts.

    Raises:
        ValueError: an unknown key or values that do not fit together.
    """
    with FakeTensorMode():
        model = make_model(config, **overrides, no_initialization=True)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    activated = total
    for path, share in _used_shares(model).items():
        activated -= (1 - share) * sum(n for name, n in sizes.items() if name.startswith(f"{path}."))
    embedding = sum(n for name, n in sizes.items() if name.startswith(("embedding.", "output_layer.")))
    return ParameterCount(total, round(activated), embedding)


def _used_shares(model: nn.Module) -> dict[str, float]:
    """Path of a module of which a token uses only part -> how much of it."""
    shares = {}
    for path, module in model.named_modules():
        if isinstance(module, MixerLayer) and module.mom and module.mom.projections:
            shares[f"{path}.core.rows"] = (module.mom.topk + module.mom.shared) / module.mom.projections
        elif isinstance(module, MoELayer):
            shares[f"{path}.experts"] = module.config.moe_router_topk / module.config.num_moe_experts
    return shares

"""What a recall comparison holds equal: the numbers that a layer keeps of a sequence, and the parameters."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean

import torch

from linear_moe.mcore.mixer_layer import MixerLayer
from linear_moe.mcore.model import build_model
from linear_moe.ssm import mixer_class
from linear_moe.ssm.state import state_size

TOLERANCE = 0.03  # by which "equal" sizes may differ


@dataclass(frozen=True)
class Size:
    """Of a built model. state: numbers that a layer keeps of a sequence to recall from, mean over the layers. tail:
    those of its short convolutions and token shifts, beside them. parameters: of the whole model."""

    state: float
    tail: float
    parameters: int


def measure(config: Mapping[str, object]) -> Size:
    """The size of a configuration's model, which is built for it.

    Raises:
        ValueError: whatever `build_model` refuses.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        model = build_model(config)
    layers = [layer.self_attention for layer in model.decoder.layers]
    mixing = [layer for layer in layers if any(True for _ in layer.parameters())]  # others are feed-forward
    sizes = [layer_state(layer, model.max_sequence_length) for layer in mixing]
    states, tails = zip(*sizes)
    return Size(mean(states), mean(tails), sum(p.numel() for p in model.parameters()))


def layer_state(layer: torch.nn.Module, seq_length: int) -> tuple[int, int]:
    """(numbers that a layer keeps of one sequence, numbers of its convolutions' and token shifts' tails): of a linear
    mixer `state_size`; softmax attention keeps keys and values of all seq_length tokens."""
    if isinstance(layer, MixerLayer):
        memories = layer.mom.memories + layer.mom.shared if layer.mom else 0
        return state_size(layer.core.mixer, layer.config.hidden_size, memories)
    config = layer.config
    if config.multi_latent_attention:
        return seq_length * (config.kv_lora_rank + config.qk_pos_emb_head_dim), 0
    return seq_length * 2 * config.num_query_groups * config.kv_channels, 0


def with_state(config: Mapping[str, object], numbers: int) -> dict[str, object]:
    """The configuration with head_dim = value_head_dim such that a linear layer keeps that many numbers of a sequence.

    Raises:
        ValueError: a mixer whose state cannot come within 3 % of it by these widths, with the nearest size.
    """
    name, options = config.get("mixer", "gated_deltanet"), dict(config.get("mixer-args", {}))
    if not isinstance(name, str):
        raise ValueError(f"state sizes can be set where all linear layers have one mixer, not for {name}")
    memories = config.get("mom-memories", 0)
    memories = memories + config.get("mom-shared-memory", True) if memories else 1
    mixer, hidden, heads = mixer_class(name), config["hidden-size"], config["num-attention-heads"]
    best = None
    for width in range(1, 1025):
        chosen = options | {"head_dim": width, "value_head_dim": width}
        try:
            state = mixer(mixer.make_config(hidden, heads, chosen)).state_size * memories
        except ValueError:  # a width that this mixer cannot have
            continue
        if best is None or abs(state - numbers) < abs(best[0] - numbers):
            best = state, chosen
        if state > 2 * numbers:
            break
    if best is None or abs(best[0] / numbers - 1) > TOLERANCE:
        nearest = f"; the nearest is {best[0]}" if best else ""
        raise ValueError(
            f"{name} with {memories} memories cannot have a state of {numbers} numbers by head_dim = value_head_dim "
            f"within {TOLERANCE:.0%}{nearest}"
        )
    return {**config, "mixer-args": best[1]}


def with_parameters(configs: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, object]]:
    """The configurations, their feed-forward layers widened until each model has as many parameters as the largest.

    Raises:
        ValueError: a model that cannot come within 3 % of that.
    """
    sizes = {name: measure(config).parameters for name, config in configs.items()}
    target, fitted = max(sizes.values()), {}
    for name, config in configs.items():
        key = "moe-ffn-hidden-size" if config.get("num-experts") else "ffn-hidden-size"
        width = config.get(key) or 4 * config["hidden-size"]
        slope = (measure({**config, key: width + 8}).parameters - sizes[name]) / 8
        fitted[name] = {**config, key: width + round((target - sizes[name]) / slope)}
        found = measure(fitted[name]).parameters
        if abs(found / target - 1) > TOLERANCE:
            raise ValueError(f"{name} has {found} parameters, not {target} within {TOLERANCE:.0%}, at {key} {width}")
    return fitted

"""A mixer, with or without Mixture-of-Memories, where Megatron's TransformerLayer has its self-attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.core import num_microbatches_calculator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor

from linear_moe.mcore.call import Call
from linear_moe.mcore.inference import sequences_of, state_of
from linear_moe.mcore.init import xavier
from linear_moe.mcore.masks import padding_tokens
from linear_moe.mcore.muon import mark
from linear_moe.mcore.replicated import SumGradients
from linear_moe.mcore.sections import by_section
from linear_moe.mcore.telemetry import telemetry
from linear_moe.mom import MoMConfig, Router, make_routes
from linear_moe.ssm import Mixer
from linear_moe.ssm.core import MixerCore
from linear_moe.ssm.full_state import full_state, load_full_state
from linear_moe.ssm.stored import Stored, Tensors


@dataclass
class MixerLayerSubmodules:
    """linear_proj: the row-parallel output projection."""

    linear_proj: type


class MixerLayer(MegatronModule):
    """Heads over tensor-parallel ranks; hidden states ``[s (/ tp under SP), b, hidden]`` in and out.

    The hidden states are gathered (SP) or copied (TP) once. From there every gradient is a partial sum over the ranks:
    the copy's backward adds up the input's. Those of parameters that all ranks hold are added up in one collective for
    the layer (``SumGradients``), or under SP by Megatron, with its norms', once a step. So the router, which every rank
    computes in full, gets the sum over ranks of its routing weights' gradients.

    Args:
        config, submodules, layer_number (from 1), pg_collection: as Megatron gives them to self-attention.
        mixer: the mixer's class. mixer_config: its options. depth, num_mixers: see Mixer's ``layer``, ``num_layers``.
        number: its place in the pattern, from 1, by which telemetry knows it; layer_number unless given.
        mom: Mixture-of-Memories, or None. first_values, recompute: see MixerCore.
        init_gain: gain of the matrices' Xavier-uniform initial values; None for Megatron's init methods.
    """

    def __init__(
        self,
        config,
        submodules: MixerLayerSubmodules,
        layer_number: int,
        *,
        mixer: type[Mixer],
        mixer_config: Mixer.Config,
        number: int | None = None,
        depth: int,
        num_mixers: int,
        mom: MoMConfig | None,
        first_values: dict[str, Tensor] | None = None,
        recompute: bool = False,
        init_gain: float | None = None,
        pg_collection=None,
        name: str | None = None,
        **kwargs,
    ):
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError(f"context_parallel_size ({config.context_parallel_size}) must be 1 with linear mixers")
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group, self.layer_number, self.mom = pg_collection.tp, layer_number, mom
        self.number = layer_number if number is None else number
        self.call: Call | None = None  # the microbatch at hand; see call.py
        self.copies: dict[Tensor, Tensor] = {}  # see `_copy_replicated`
        factory = {
            "dtype": config.params_dtype,
            "device": "cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
        }
        self.core = MixerCore(
            mixer(mixer_config, depth, num_mixers),
            config.hidden_size,
            memories=mom.projections if mom else 0,
            shards=self.tp_group.size(),
            shard=self.tp_group.rank(),
            replicated=self._replicated,
            first_values=first_values,
            recompute=recompute,
            **factory,
        )
        if mom:
            self.router = Router(config.hidden_size, mom.memories, mom.topk, **factory)
            telemetry.sums.pop(self.number, None)  # figures of an earlier model in this process
        init_method, output_init_method = config.init_method, config.output_layer_init_method
        if init_gain is not None:
            init_method = partial(xavier, gain=init_gain)
            width = mixer_config.num_value_heads * mixer_config.value_head_dim
            output_init_method = partial(xavier, gain=init_gain, fans=width + config.hidden_size)
        if config.perform_initialization:
            self.core.initialize(init_method)
            if mom:
                init_method(self.router.weight)
        self.linear_proj = build_module(
            submodules.linear_proj,
            mixer_config.num_value_heads * mixer_config.value_head_dim,
            config.hidden_size,
            config=config,
            init_method=output_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=self.tp_group,
            name=f"{name}.linear_proj" if name else None,
        )
        declared = self.tensors()
        axes = {s.parameter: s.axis for s in declared.values() if not s.parameter.startswith("linear_proj.")}
        self.replicated = [name for name, axis in axes.items() if axis is None]  # what all ranks hold
        for name, axis in axes.items():
            parameter = self.get_parameter(name)
            if axis is not None:
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=axis, stride=1)
            else:
                parameter.sequence_parallel = config.sequence_parallel  # then Megatron sums its gradient
        mark(self, declared)
        if init_gain is not None:  # `init.reinitialize` goes by parameter
            self.core.set_initializer(init_method)
            self.linear_proj.weight.initializer = output_init_method
            if mom:
                self.router.weight.initializer = init_method

    def _copy_replicated(self) -> dict[Tensor, Tensor]:
        """Parameter whose gradient must be summed over the ranks -> what stands for it in this forward pass."""
        if self.tp_group.size() == 1 or self.config.sequence_parallel or not torch.is_grad_enabled():
            return {}
        parameters = [parameter for parameter in map(self.get_parameter, self.replicated) if parameter.requires_grad]
        return dict(zip(parameters, SumGradients.apply(self.tp_group, *parameters))) if parameters else {}

    def _replicated(self, parameter: Tensor) -> Tensor:
        return self.copies.get(parameter, parameter)

    def _loss_scale(self, padding: Tensor | None, tokens: int) -> Tensor | float:
        """What an auxiliary loss of one must weigh here, so that it adds to the model's loss as one.

        Megatron divides the loss by the number of microbatches, or, with calculate_per_token_loss, the gradients by
        the number of tokens that the loss counts, which the call says if it knows it. Every
        tensor-parallel rank computes the same loss, and their gradients are summed.

        padding: bool ``[b, s]`` of so many tokens, or None.
        """
        scale = 1.0 / self.tp_group.size()
        if self.config.calculate_per_token_loss:
            counted = self.call and self.call.loss_tokens
            if counted is None:
                counted = tokens if padding is None else (~padding).sum()
            scale = scale * counted
        elif num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None:
            scale /= num_microbatches_calculator.get_num_microbatches()
        if self.config.grad_scale_func is not None:  # fp16's dynamic loss scale
            one = torch.ones((), dtype=torch.float32, device=self.router.weight.device)
            scale = self.config.grad_scale_func(one * scale)
        return scale

    def forward(
        self, hidden_states: Tensor, attention_mask=None, *, inference_context=None, packed_seq_params=None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states ``[s (/ tp under SP), b, hidden]`` -> the same shape, and the output projection's bias or None.

        Rotary embeddings and attention masks are softmax attention's: the causal order is in the rule itself.

        Args:
            attention_mask: Megatron's padding_mask, bool ``[b, s (/ tp under SP)]``, True for padding, which
                `MixerTransformerLayer` gives in its place. The router's losses and figures leave padding out. It does
                enter the memories, as softmax attention would see it, so it belongs behind a sequence's tokens.
        """
        sequence_parallel = self.config.sequence_parallel and self.tp_group.size() > 1
        if sequence_parallel:
            x = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        else:
            x = copy_to_tensor_model_parallel_region(hidden_states, group=self.tp_group)
        self.copies = self._copy_replicated()
        x = x.transpose(0, 1)  # [b, s, hidden]
        state = None
        if inference_context is None:
            sequences = (self.call or Call()).sequences(x, packed_seq_params)
        else:
            sequences = sequences_of(inference_context, x)
            state = state_of(inference_context, self.layer_number, sequences)
        routes = None
        if self.mom:
            shape, group = x.shape[:2], self.tp_group if sequence_parallel else None
            padding = padding_tokens(attention_mask, packed_seq_params, shape, group)
            flat = None if padding is None else padding.flatten()
            routing = self.router(x.flatten(0, 1), self._replicated, flat)
            scale = 0.0
            if self.training and torch.is_grad_enabled():  # once, also under activation recomputation
                scale = self._loss_scale(padding, shape.numel())
                telemetry.record(self.number, routing)
            routes = make_routes(routing, self.mom, shape, sequences.cu_seqlens, scale)
        y = self.core(x, routes=routes, sequences=sequences, state=state)
        self.copies = {}
        return self.linear_proj(y.transpose(0, 1).contiguous())

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Every parameter by its place in the whole model, so that a checkpoint loads under any other layout."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = {}
        for key, module in self.named_children():
            if key == "core":
                continue
            state |= sharded_state_dict_default(
                module, f"{prefix}{key}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        tensors = self.core.tensors().values()
        prefix = f"{prefix}core."
        core = make_sharded_tensors_for_checkpoint(
            self.core.state_dict(keep_vars=True),
            prefix,
            {stored.parameter: stored.axis for stored in tensors if stored.axis is not None},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        fused: dict[str, list[Stored]] = {}
        for stored in tensors:
            if stored.section is not None:
                fused.setdefault(prefix + stored.parameter, []).append(stored)
        for key, parts in fused.items():
            core[key] = by_section(core[key], parts, sharded_offsets, self.tp_group)
        return state | core

    def tensors(self) -> Tensors:
        """Every parameter by its declared name: those of the core, MoM's ``router``, and the output projection ``out``
        with its bias ``out.bias``."""
        found = {
            name: replace(stored, parameter=f"core.{stored.parameter}") for name, stored in self.core.tensors().items()
        }
        if self.mom:
            found["router"] = Stored("router.weight", (*self.router.weight.shape,))
        out = self.linear_proj
        found["out"] = Stored("linear_proj.weight", (*out.weight.shape,), axis=1, matrix=True)
        if self.config.add_bias_linear:
            found["out.bias"] = Stored("linear_proj.bias", (*out.bias.shape,))
        return found

    def full_state(self) -> dict[str, Tensor]:
        """Declared name -> a copy of the whole tensor, on every tensor-parallel rank, all of which must ask for it.

        As ``MixerCore.full_state``, and ``router`` ``[M, hidden]``, ``out`` ``[hidden, HV * V]``, ``out.bias``.
        """
        return full_state(self.tensors(), dict(self.named_parameters()), self._gather)

    def load_full_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what ``full_state`` gives, whole on every rank, in any data type and on any device.

        An optimizer that keeps float32 copies of the parameters is not told: load before it is made.

        Raises:
            ValueError: a missing or an unknown tensor, or one of another shape; then nothing is loaded.
        """
        group = self.tp_group
        load_full_state(self.tensors(), dict(self.named_parameters()), state, group.size(), group.rank())

    def _gather(self, part: Tensor, axis: int) -> Tensor:
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.tp_group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=self.tp_group)
        return torch.cat(parts, axis)


class MixerTransformerLayer(TransformerLayer):
    """Megatron's layer around a mixer, of any of the pattern's letters for mixers.

    Args:
        as Megatron gives them to a layer of its HybridStack; name: says whether it is of multi-token prediction, whose
            layers count from 1 again. options: LayerOptions. first_values: see MixerCore.
    """

    def __init__(self, config, submodules, layer_number: int = 1, *, options, first_values, name=None, **kwargs):
        pattern = options.pattern
        letters, number, depth = pattern.main, layer_number, pattern.place(layer_number - 1)
        if name is not None and name.startswith("mtp."):
            letters = pattern.ahead
            number += len(pattern.main) + len(letters) * (int(name.split(".")[2]) - 1)
            depth = max(len(pattern.mixing) - 1, 0)  # as deep as the last
        chosen = options.mixers[letters[layer_number - 1]]
        params = {
            "mixer": chosen.mixer,
            "mixer_config": chosen.config,
            "number": number,
            "depth": depth,
            "num_mixers": max(len(pattern.mixing), 1),
            "mom": options.mom,
            "first_values": first_values,
            "recompute": options.recompute,
            "init_gain": options.init_gain,
        }
        attention = replace(submodules.self_attention, params=params)
        submodules = replace(submodules, self_attention=attention)
        super().__init__(config, submodules, layer_number, name=name, **kwargs)

    def _forward_attention(self, hidden_states, attention_mask=None, *args, padding_mask=None, **kwargs):
        """As in TransformerLayer, which gives padding_mask to its feed-forward alone. attention_mask, which can say no
        more than the causal order (see call.py), makes room for it."""
        return super()._forward_attention(hidden_states, padding_mask, *args, padding_mask=padding_mask, **kwargs)

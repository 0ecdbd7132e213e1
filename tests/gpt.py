"""Megatron's GPTModel with our layers, as this package built it before HybridModel: an oracle, and old checkpoints."""

import re
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from megatron.training import arguments as megatrons
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder

from linear_moe.mcore import arguments, model, pattern, pretrain, specs
from linear_moe.mcore.norm import Norm
from linear_moe.mcore.specs import hybrid_spec


def layer_specs(config, options, vp_stage=None) -> TransformerBlockSubmodules:
    """Of each two letters of the pattern one layer."""
    letters = options.pattern.main
    mixer = hybrid_spec(
        config, replace(options, pattern=pattern.Pattern((options.pattern.mixing,)))
    ).submodules.gdn_layer
    layers = []
    for mixing, feeding in zip(letters[::2], letters[1::2], strict=True):
        whole = specs._local_submodules(config, feeding == "E")
        if mixing in "*+":
            layers.append(ModuleSpec(module=TransformerLayer, submodules=whole))
            continue
        keys = {old: new for old, new in whole.sharded_state_dict_keys_map.items() if old != "input_layernorm."}
        attention = mixer.submodules.self_attention
        whole = replace(whole, self_attention=attention, input_layernorm=Norm, sharded_state_dict_keys_map=keys)
        layers.append(ModuleSpec(module=mixer.module, params=mixer.params, submodules=whole))
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
    own = layers[offset : offset + get_num_layers_to_build(config, vp_stage=vp_stage)]
    return TransformerBlockSubmodules(layer_specs=own, layer_norm=Norm)


def model_config(args):
    """What `linear_moe.mcore.model.model_config` was."""
    config = gpt_config_from_args(args)
    options = specs.layer_options(args)
    config.pre_wrap_hooks += [model._watch_calls]
    config.transformer_layer_spec = lambda of, vp_stage=None: layer_specs(of.transformer, options, vp_stage)
    if args.use_cpu_initialization and args.perform_initialization:
        config.pre_wrap_hooks.append(lambda chunks: model._reinitialize(chunks, args.seed))
    return config


@contextmanager
def as_before():
    """Within it, Megatron sees the arguments as they are, and builds GPTModels."""
    with (
        mock.patch.object(pretrain, "model_config", model_config),
        mock.patch.object(arguments, "translate", lambda args, pattern: None),
    ):
        yield


def build(hybrid, config, **overrides):
    """The GPTModel of a configuration whose HybridModel there is, with that one's weights."""
    args = model.arguments_of(config, **overrides)
    with mock.patch.object(arguments, "translate", lambda args, pattern: None):
        megatrons.validate_args(args)
    made = model_config(args)
    built = GPTModelBuilder(made).build_model(ProcessGroupCollection.use_mpu_process_groups())
    for hook in made.pre_wrap_hooks:
        hook([built])
    weights = {gpt_name(name): value for name, value in hybrid.state_dict().items()}
    built.load_state_dict({name: weights.get(name) for name in built.state_dict()})
    return built


def gpt_name(name: str) -> str:
    """A HybridModel's name of a parameter, as the GPTModel has it."""
    name = re.sub(r"\bdecoder\.layers\.(\d+)\.", lambda found: f"decoder.layers.{int(found[1]) // 2}.", name)
    return name.replace("decoder.final_norm.", "decoder.final_layernorm.")

"""Megatron's static engine over a model, and models under layouts of several processes; functions for launch.py."""

import warnings

import torch

SIZE = {"hidden_size": 32, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 64}
SIZE |= {"vocab_size": 128, "swiglu": True, "normalization": "RMSNorm", "position_embedding_type": "rope"}
SIZE |= {"num_layers": 4, "layer_pattern": "LN", "mixer": "gated_deltanet", "disable_bias_linear": True}
MODELS = {"hybrid": SIZE, "mom": SIZE | {"mom_memories": 3, "num_experts": 2, "moe_ffn_hidden_size": 32}}
LENGTHS, STEPS = (7, 3, 12), 5


class Numbers:
    """A tokenizer whose text is its ids."""

    vocab_size, eod, bos = 128, 0, None

    def tokenize(self, text):
        return [int(word) for word in text.split()]

    def detokenize(self, tokens):
        return " ".join(map(str, tokens))


def engine_tokens(model, prompts):
    """What Megatron's static engine writes behind the prompts."""
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
    from megatron.core.inference.utils import InferenceMode

    wrapper = GPTInferenceWrapper(model, StaticInferenceContext(len(prompts), max(LENGTHS) + STEPS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        engine = StaticInferenceEngine(TextGenerationController(wrapper, Numbers()), legacy=True)
    greedy = SamplingParams(top_k=1, num_tokens_to_generate=STEPS)
    greedy.add_attributes({"no_early_termination": True})
    try:
        done = engine.generate([Numbers().detokenize(prompt) for prompt in prompts], sampling_params=greedy)
    finally:
        InferenceMode.unset_active()
    return [request.generated_tokens.tolist() for request in done]


def build(name, **layout):
    """The same weights under every layout; not so near to zero that all tokens are as likely."""
    from linear_moe.mcore.arguments import config_argv
    from linear_moe.mcore.cpu import enable_cpu
    from linear_moe.mcore.model import model_from_args, parse

    enable_cpu()
    model = model_from_args(parse(config_argv({"micro_batch_size": 1} | MODELS[name] | layout))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def written(name, prompts, by, **layout):
    """Tokens behind the prompts in this process of several, by ``generate`` or by Megatron's engine."""
    from megatron.core import parallel_state

    from linear_moe.inference import generate
    from linear_moe.mcore.cpu import enable_cpu
    from tests.parallel.harness import reset_megatron

    enable_cpu()
    reset_megatron()
    sizes = {key: size for key, size in layout.items() if key.endswith("_size")}
    parallel_state.initialize_model_parallel(**sizes)
    model = build(name, **layout)
    tokens = engine_tokens(model, prompts) if by == "engine" else generate(model, prompts, STEPS)
    assert model.config.sequence_parallel == layout.get("sequence_parallel", False)
    return tokens

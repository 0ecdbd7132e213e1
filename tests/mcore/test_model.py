"""The model that the arguments describe: its layers, gradients, cost, and mixers from outside."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.training.training import num_floating_point_operations

import linear_moe
from linear_moe.mcore.attention import TorchAttention
from linear_moe.mcore.configs import CONFIGS, read_config
from linear_moe.mcore.flops import training_flops
from linear_moe.mcore.init import xavier
from linear_moe.mcore.mixer_layer import MixerLayer
from linear_moe.mcore.pattern import moe_layers
from linear_moe.mcore.telemetry import telemetry
from linear_moe.ssm import core
from tests.gpt import gpt_name
from tests.helpers import rel_err

ROOT = Path(__file__).resolve().parents[2]
TINY = "tiny"
STEP = 1e-4


def batch(length=64, vocabulary=512):
    tokens = torch.randint(vocabulary, (2, length))
    return tokens, torch.arange(length).expand_as(tokens)


def test_configuration_makes_the_layers(seed):
    model = linear_moe.build_model(TINY, seed=seed)
    layers = [layer.self_attention for layer in model.decoder.layers[::2]]
    assert [isinstance(layer, MixerLayer) for layer in layers] == [True, True, True, False]
    assert isinstance(layers[3].core_attention, TorchAttention)
    assert all(len(layer.mlp.experts.local_experts) == 4 for layer in model.decoder.layers[1::2])
    assert layers[0].router.weight.shape == (4, 64) and layers[0].core.rows.weight.shape[0] == 5
    tokens, positions = batch()
    model(tokens, positions, None, labels=tokens).mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("config", ["nemotron_h/tiny", "kimi_linear/tiny", "qwen3_next/tiny_mtp"])
def test_configurations_by_pattern_learn_everywhere(config, seed):
    model = linear_moe.build_model(config, seed=seed)
    assert model.hybrid_layer_pattern == read_config(config)["hybrid-layer-pattern"].replace("M", "G")
    tokens, positions = batch()
    model(tokens, positions, None, labels=tokens).mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_pattern_of_feed_forwards(seed):
    model = linear_moe.build_model(TINY, seed=seed, layer_pattern="LN", moe_layer_freq=[0, 1, 1, 0])
    assert [hasattr(layer.mlp, "experts") for layer in model.decoder.layers[1::2]] == [False, True, True, False]


def test_models_of_different_depth_run_side_by_side():
    """Megatron's table of the experts' figures is as deep as the first model that fills it."""
    models = [linear_moe.build_model(TINY, num_layers=depth, layer_pattern="L") for depth in (1, 3)]
    tokens, positions = batch(16)
    for model in (*models, *models):
        assert model(tokens, positions, None, labels=tokens).isfinite().all()


def test_a_model_can_be_saved_and_loaded(tmp_path):
    """By Megatron's own functions, without its training program."""
    from megatron.core import dist_checkpointing

    model, other = (linear_moe.build_model(TINY, seed=seed) for seed in (1, 2))
    kept = {"metadata": {"non_homogeneous_layers": True}}
    dist_checkpointing.save(model.sharded_state_dict(**kept), str(tmp_path))
    other.load_state_dict(dist_checkpointing.load(other.sharded_state_dict(**kept), str(tmp_path)))
    tokens, positions = batch(16)
    assert torch.equal(model(tokens, positions, None), other(tokens, positions, None))


def test_same_seed_same_model():
    first, second, other = (linear_moe.build_model(TINY, seed=s).state_dict() for s in (1, 1, 2))
    names = [name for name, value in first.items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(first[name], second[name]) for name in names)
    assert not torch.equal(first["embedding.word_embeddings.weight"], other["embedding.word_embeddings.weight"])


@pytest.mark.parametrize(
    ("mixer", "options"),
    [("linear_attention", {"feature_map": "hedgehog"}), ("linear_attention", {"feature_map": "t2r"}), ("rwkv6", {})],
)
def test_shared_parameters_start_as_their_mixer_says(mixer, options, seed):
    """Megatron's initial values are for projections; a map that is not one has its own."""
    model = linear_moe.build_model(TINY, seed=seed, mixer=mixer, mixer_args=options, layer_pattern="L")
    core = model.decoder.layers[2].self_attention.core
    for name, init in core.mixer.shared_parameters().items():
        found, said = dict(core.shared.named_parameters())[name].detach(), init()
        if "down" in name or "up" in name:  # random
            assert 0.9 < found.std() / said.std() < 1.1, name
        else:
            assert found.equal(said), name


@pytest.mark.parametrize("in_place", [False, True], ids=["by-name", "in-place"])
@pytest.mark.parametrize("mixer", ["gated_deltanet", "rwkv6"])  # rwkv6 has low-rank projections
def test_init_gain_is_xaviers_for_each_projection(mixer, in_place, seed):
    """Uniform within gain sqrt(6 / (out + in)) of the projection itself, not of the tensor that it is fused into."""
    options = {"mixer": mixer, "mom_memories": 3, "mixer_init_gain": 0.3, "layer_pattern": "L"}
    layer = linear_moe.build_model(TINY, seed=seed, **options).decoder.layers[2].self_attention
    if in_place:  # without --use-cpu-initialization
        layer.core.initialize(partial(xavier, gain=0.3))
    state = layer.full_state()
    for name in ["router", *(name for name, stored in layer.tensors().items() if stored.matrix)]:
        matrix = state[name]
        bound = 0.3 * (6 / sum(matrix.shape[-2:])) ** 0.5
        for each in matrix.reshape(-1, *matrix.shape[-2:]):
            assert 0.95 * bound < each.abs().max() <= bound
            assert each.std() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_refuses_init_gain():
    with pytest.raises(ValueError, match=r"mixer_init_gain must be positive, but is 0\.0"):
        linear_moe.build_model(TINY, mixer_init_gain=0.0)


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]}  # nothing of mixers
OWN = {"mixer_recompute": True}
SHIFT = {"mixer": "rwkv6", "mixer_args": {"conv_size": 4}, "mom_single_kv": True, "layer_pattern": "L", "num_layers": 2}


@pytest.mark.parametrize("recompute", [FULL, SELECTIVE, OWN, FULL | OWN], ids="+".join)
@pytest.mark.parametrize("layers", [{}, SHIFT], ids=["hybrid", "shift and single-kv"])
def test_recompute_changes_nothing(layers, recompute, seed, monkeypatch):
    """Of packed sequences: the same gradients, to the bit, and the routers' figures counted once."""
    from megatron.core.packed_seq_params import PackedSeqParams

    calls, conv = [], core.short_conv
    monkeypatch.setattr(core, "short_conv", lambda *args, **options: (calls.append(None), conv(*args, **options))[1])
    borders = torch.tensor([0, 50, 50, 64], dtype=torch.int32)
    pack = PackedSeqParams("thd", borders, borders, max_seqlen_q=50, max_seqlen_kv=50)
    tokens = torch.randint(512, (1, 64))
    grads, again = [], []
    for extra in ({}, recompute):
        model = linear_moe.build_model(TINY, seed=seed, **layers, **extra)
        loss = model(tokens, tokens, None, labels=tokens, packed_seq_params=pack).mean()
        calls.clear()
        loss.backward()
        again.append(len(calls))
        grads.append([p.grad for p in model.parameters()])
        assert [int(telemetry.sums[layer][-1]) for layer in (1, 3)] == [1, 1]
    assert again[0] == 0 and (again[1] > 0) == (recompute != SELECTIVE)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


NO_EXPERTS = {"num_experts": None, "moe_ffn_hidden_size": None}
OPTIONS = [
    {"qk_layernorm": True},
    {"rotary_percent": 0.5, "no_rope_freq": 2},
    {"moe_shared_expert_intermediate_size": 32},
    {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    {"normalization": "LayerNorm", "disable_bias_linear": False} | NO_EXPERTS,
    {"apply_layernorm_1p": True},
    {"multi_latent_attention": True, "group_query_attention": False, "num_query_groups": 1},
]
EVERYWHERE = {"mom_topk": 4}  # each token goes to every memory, so that no rounding decides a route
LOUD = {"init_method_std": 0.2}  # else the residual stream is all embedding, and a layer may do what it likes


@pytest.mark.parametrize("options", [*OPTIONS, {"mom_shared_memory": False}], ids="+".join)
def test_gradient_is_the_slope_of_the_loss(options, seed):
    """Options in a hybrid: along a random line the loss goes as the gradient says, to 1 % of how such lines differ."""
    experts = {} if "num_experts" in options else {"moe_router_topk": 4}
    no_losses = {"mom_balance_coeff": 0.0, "moe_aux_loss_coeff": 0.0}
    model = linear_moe.build_model(TINY, seed=seed, **options, **LOUD, **EVERYWHERE, **experts, **no_losses)
    tokens, positions = batch()
    parameters = list(model.parameters())

    def loss():
        return model(tokens, positions, None, labels=tokens).mean()

    grads = torch.autograd.grad(loss(), parameters)
    assert all(grad.any() for grad in grads)
    line = [torch.randn_like(grad) / grad.norm() for grad in grads]  # every parameter weighs as much
    slope = sum((grad * part).sum().item() for grad, part in zip(grads, line))
    values = []
    with torch.no_grad():
        for step in (STEP, -2 * STEP):  # to one side, and from there to the other
            for parameter, part in zip(parameters, line):
                parameter.add_(part, alpha=step)
            values.append(loss().item())
    assert abs((values[0] - values[1]) / (2 * STEP) - slope) < 1e-2 * len(grads) ** 0.5


@pytest.mark.parametrize("options", OPTIONS[:5], ids="+".join)
def test_softmax_models_are_megatrons(options, seed):
    """Megatron's own model, of its own layers, has the same logits; without Transformer Engine it has no other two."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    ours = linear_moe.build_model(TINY, seed=seed, layer_pattern="N", **options)
    with torch.no_grad():
        for parameter in ours.parameters():  # norms and biases, too
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = copy.copy(ours.config)
    config.num_layers, config.no_rope_freq = 4, config.no_rope_freq and config.no_rope_freq[::2]
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    sizes = {"vocab_size": 512, "max_sequence_length": 128, "share_embeddings_and_output_weights": False}
    rope = {"position_embedding_type": "rope", "rotary_percent": options.get("rotary_percent", 1.0)}
    theirs = GPTModel(config, spec, **sizes, **rope)
    theirs.load_state_dict({gpt_name(name): value for name, value in ours.state_dict().items()}, strict=False)
    tokens, positions = batch()
    assert rel_err(ours(tokens, positions, None), theirs(tokens, positions, None)) < 1e-5


def test_zero_centered_norms(seed):
    """apply_layernorm_1p: a norm's weight is what it is stored as, and 1."""
    plain, centered = (linear_moe.build_model(TINY, seed=seed, apply_layernorm_1p=on) for on in (False, True))
    state = {name: value for name, value in plain.state_dict().items() if isinstance(value, torch.Tensor)}
    norms = [name for name in state if "norm" in name.split(".")[-2]]
    assert len(norms) == 2 * 4 + 1
    centered.load_state_dict(state | {name: state[name] - 1 for name in norms}, strict=False)
    tokens, positions = batch()
    assert rel_err(centered(tokens, positions, None), plain(tokens, positions, None)) < 1e-5


@pytest.mark.parametrize("pattern", ["LLLN", "N"])
def test_bfloat16_is_close_to_float32(pattern, seed):
    options = {"layer_pattern": pattern, "init_method_std": 0.1} | NO_EXPERTS | EVERYWHERE
    model = linear_moe.build_model(TINY, seed=seed, **options)
    low = linear_moe.build_model(TINY, seed=seed, **options, bf16=True).bfloat16()
    with torch.no_grad():
        for parameter, rounded in zip(model.parameters(), low.parameters(), strict=True):
            parameter.copy_(rounded)
    tokens, positions = batch()
    assert rel_err(low(tokens, positions, None), model(tokens, positions, None)) < 3e-2


def test_attention_is_megatrons(seed):
    """Torch's attention and mcore's own, on the same weights."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    model = linear_moe.build_model(TINY, seed=seed, layer_pattern="N")
    ours = model.decoder.layers[0].self_attention
    x = torch.randn(40, 2, 64)
    mask = torch.ones(40, 40).triu(1).bool()[None, None]
    before, _ = ours(x, mask)
    ours.core_attention = DotProductAttention(ours.config, 1, AttnMaskType.causal, "self")
    after, _ = ours(x, mask)
    assert rel_err(before, after) < 1e-5


@pytest.mark.parametrize("memories", [0, 3], ids=["plain", "mom"])
def test_a_mixer_from_outside(memories, seed):
    """One class elsewhere, named on the command line, is a mixer, under MoM too: its layer does what its rule says,
    token by token and memory by memory."""
    model = linear_moe.build_model(TINY, seed=seed, mixer="tests.mixers:Toy", mom_memories=memories, layer_pattern="L")
    layer, x = model.decoder.layers[2].self_attention, torch.randn(30, 1, 64)
    core, heads = layer.core, 4

    def answers(k, v):
        """For each token, what it would read after those before it: of its own q, of keys and values ``[n, heads, 16]``
        of the tokens that write, None for the others."""
        q = torch.nn.functional.linear(x[:, 0], core.tokens.weight[:64]).view(30, heads, 16)
        decay = torch.exp(-torch.nn.functional.softplus(core.heads.decay))[:, None, None]
        state, found = torch.zeros(heads, 16, 16), []
        for t in range(30):
            if k[t] is not None:
                state = decay * state + k[t][:, :, None] * v[t][:, None]
            found.append(torch.einsum("hk,hkv->hv", q[t], state) * 16**-0.5)
        return torch.stack(found)

    def written(weight, who):
        k, v = torch.nn.functional.linear(x[:, 0], weight).view(30, 2, heads, 16).unbind(1)
        return [k[t] if who[t] else None for t in range(30)], v

    if memories:
        weights, chosen = torch.nn.functional.linear(x[:, 0], layer.router.weight).softmax(-1).topk(2)
        share = torch.zeros(30, 4).scatter(1, chosen, weights / weights.sum(-1, keepdim=True))
        share[:, 3] = 1  # the shared memory
        each = [answers(*written(core.rows.weight[m], share[:, m] > 0)) for m in range(4)]
        o = sum(share[:, m, None, None] * answer for m, answer in enumerate(each))
    else:
        o = answers(*written(core.tokens.weight[64:], torch.ones(30)))
    o = o / (o.square().mean(-1, keepdim=True) + core.mixer.config.norm_eps).sqrt() * core.shared.norm
    expected = torch.nn.functional.linear(o.flatten(1), layer.linear_proj.weight)
    assert rel_err(layer(x)[0][:, 0], expected) < 1e-5
    tokens, positions = batch()
    model(tokens, positions, None, labels=tokens).mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_a_mixer_needs_one_registry_line(seed, monkeypatch):
    from linear_moe.ssm import MIXERS

    monkeypatch.setitem(MIXERS, "toy", "tests.mixers:Toy")
    model = linear_moe.build_model(TINY, seed=seed, mixer="toy")
    assert type(model.decoder.layers[0].self_attention.core.mixer).__name__ == "Toy"


def arguments(name=TINY, **options):
    from linear_moe.mcore.arguments import config_argv
    from linear_moe.mcore.model import parse

    config = {k.replace("_", "-"): v for k, v in options.items()}
    args = parse(config_argv(read_config(name) | config))
    args.padded_vocab_size = 512
    args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    return args


def megatrons_flops(args, samples):
    """Megatron's formula, with the MoE routers, which it leaves out, and without the norms of latent attention."""
    routers = sum(moe_layers(args.moe_layer_freq, args.num_experts, args.num_layers)) * (args.num_experts or 0)
    norms = args.num_layers * (args.q_lora_rank + args.kv_lora_rank) if args.multi_latent_attention else 0
    own = 6 * samples * args.seq_length * (args.hidden_size * routers - norms)
    return num_floating_point_operations(args, samples) + own


def test_flops_of_softmax_layers_are_megatrons():
    """Where every layer is softmax attention, Megatron's formula is right, and ours agrees with it."""
    for options in (
        {"num-experts": None},
        {"moe-layer-freq": [1, 0, 1, 0]},
        {"moe-shared-expert-intermediate-size": 48},
    ):
        args = arguments(layer_pattern="N", **options)
        assert training_flops(args, 7) == megatrons_flops(args, 7), options


@pytest.mark.parametrize("base", sorted(path.parent.name for path in CONFIGS.glob("*/tiny_mom.yaml")))
def test_flops_of_base_models_softmax_layers_are_megatrons(base):
    """Latent attention, shared experts, output gates, dense first layers: all counted as Megatron counts them."""
    args = arguments(f"{base}/tiny", layer_pattern="N")
    assert training_flops(args, 7) == megatrons_flops(args, 7)


def test_flops_of_linear_layers_by_hand():
    args = arguments(layer_pattern="L", num_layers=1, num_experts=None, mom_memories=0)
    hidden, heads, width, tokens = 64, 4, 16, 3 * 128
    projections = 4 * hidden * heads * width + 2 * hidden * heads + heads * width * hidden  # q k v gate, beta a, out
    rule, conv = 3 * heads * width * width, 3 * heads * width * 4
    feed_forward, logits = 3 * hidden * 128, hidden * 512
    plain = 6 * tokens * (projections + rule + conv + feed_forward + logits)
    assert training_flops(args, 3) == plain
    args = arguments(layer_pattern="L", num_layers=1, num_experts=None, mom_memories=4, mom_topk=2)
    writes = 2 * hidden * heads * width + 2 * hidden * heads  # k v, beta a: three times, not once
    assert training_flops(args, 3) == plain + 6 * tokens * (2 * (writes + rule + conv) + 4 * hidden)


def test_flops_of_token_shift_draw_nothing():
    """They are counted at every step, between what training draws."""
    model = {"layer_pattern": "L", "mixer": "rwkv6", "num_layers": 1, "num_experts": None, "mom_memories": 0}
    narrow, wide = (arguments(**model, mixer_args={"mix_rank": rank}) for rank in (8, 16))
    before = torch.get_rng_state()
    difference = training_flops(wide, 3) - training_flops(narrow, 3)
    assert torch.get_rng_state().equal(before)
    assert difference == 6 * 3 * 128 * 5 * 2 * 8 * 64  # five names, down and up, 8 more ranks


def test_norms_of_latent_attention_are_named_as_with_transformer_engine():
    """It fuses them into the projections behind them; local checkpoints are the same format."""
    model = linear_moe.build_model("deepseek_v3/tiny", layer_pattern="N")
    names = {getattr(tensor, "key", "") for tensor in model.sharded_state_dict().values()}
    for projection in ("linear_q_up_proj", "linear_kv_up_proj"):
        assert f"decoder.layers.2.self_attention.{projection}.layer_norm_weight" in names


def test_transformer_engine_specs_as_far_as_they_go():
    """Without the package the choice is one clear error; the specs themselves need a GPU machine."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE:
        pytest.skip("Transformer Engine is installed: covered by running on its machine")
    with pytest.raises(ValueError, match=r"needs Transformer Engine: pip install linear-moe\[gpu\]"):
        linear_moe.build_model(TINY, transformer_impl="transformer_engine")


def test_padded_packs_are_masked_by_their_padded_borders(seed):
    """A user's own script may pad its sequences: attention and mixers then see the same borders."""
    from megatron.core.packed_seq_params import PackedSeqParams

    model = linear_moe.build_model(TINY, seed=seed, layer_pattern="N")
    attention = model.decoder.layers[0].self_attention
    real, padded = (torch.tensor(borders, dtype=torch.int32) for borders in ([0, 5, 12], [0, 8, 16]))
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=real, cu_seqlens_q_padded=padded)
    x = torch.randn(16, 1, 64, requires_grad=True)
    o = attention(x, None, packed_seq_params=packed)[0]
    (grad,) = torch.autograd.grad(o[12].sum(), x)
    assert not grad[:8].any() and grad[8:13].abs().amin() > 0

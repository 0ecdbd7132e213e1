"""What a model is called with beside its tokens: padding, packs, masks, and the tokens that the loss counts."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

import linear_moe
from linear_moe.mcore import checks
from linear_moe.mcore.arguments import config_argv
from linear_moe.mcore.attention import TorchAttention
from linear_moe.mcore.checks import check_arguments
from linear_moe.mcore.telemetry import telemetry
from tests.helpers import rel_err
from tests.mcore.test_arguments import MODEL, parse
from tests.mcore.test_model import TINY, batch

LENGTHS = (37, 0, 64, 5)
LINEAR = {"layer_pattern": "L", "num_layers": 2, "num_experts": None, "moe_ffn_hidden_size": None}
LOSSES = {"mom_balance_coeff": 1.0, "mom_z_loss_coeff": 0.1}  # heavy enough to show in every gradient


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# The gradients of what a head has one number of are sums over all tokens, whose terms cancel here up to 44-fold:
# rounding of the terms, below 2e-7 of their absolute values, is as much as 7e-6 of the sum (1,000 seeds).
SUMS_OVER_TOKENS = ("A_log", "dt_bias")


def differences(ours, theirs, tolerance=1e-5):
    """{name: relative error} of the gradients that differ by more than the tolerance, ten times it for such sums."""
    errors = {name: rel_err(ours[name], theirs[name]) for name in theirs}
    limits = {name: tolerance * (10 if name.endswith(SUMS_OVER_TOKENS) else 1) for name in errors}
    return {name: error for name, error in errors.items() if not error < limits[name]}


def packed(borders, padded=None):
    borders = torch.as_tensor(borders, dtype=torch.int32)
    padded = None if padded is None else torch.as_tensor(padded, dtype=torch.int32)
    longest = {"max_seqlen_q": max(LENGTHS), "max_seqlen_kv": max(LENGTHS)}
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_q_padded=padded, **longest)


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_padding_changes_nothing(form, seed):
    """Sequences of different lengths, padded: the losses, gradients and figures of those without padding."""
    model = linear_moe.build_model(TINY, seed=seed, **LINEAR, **LOSSES)
    borders = torch.tensor([0, *LENGTHS]).cumsum(0)
    tokens = torch.randint(512, (len(LENGTHS), max(LENGTHS)))
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    tight = tokens[real][None]
    expected_loss = model(tight, tight, None, labels=tight, packed_seq_params=packed(borders))
    expected = gradients(model, expected_loss.mean())
    figures = telemetry.sums[3].clone()
    telemetry.sums.clear()
    if form == "dense":
        losses = model(tokens, tokens, None, labels=tokens, padding_mask=~real)
    else:
        tokens, real = tokens.view(1, -1), real.view(1, -1)
        pack = packed(borders, torch.arange(len(LENGTHS) + 1) * max(LENGTHS))
        losses = model(tokens, tokens, None, labels=tokens, packed_seq_params=pack)
    found = gradients(model, losses[real].mean())
    assert rel_err(losses[real], expected_loss[0]) < 1e-5
    assert not differences(found, expected)
    assert rel_err(telemetry.sums[3], figures) < 1e-5
    ignored = gradients(model, model(tokens, tokens, None, labels=tokens)[real].mean())
    assert "decoder.layers.2.self_attention.router.weight" in differences(ignored, expected, 0.1)


@pytest.mark.parametrize("shape", [(2, 63), (1, 64), (64, 2)], ids=str)
def test_padding_mask_of_another_shape_is_refused(shape):
    model = linear_moe.build_model(TINY, **LINEAR)
    layer = model.decoder.layers[0]
    with pytest.raises(
        ValueError, match=rf"padding_mask must be \[b, s\] = \[2, 64\], but is \[{shape[0]}, {shape[1]}\]"
    ):
        layer(torch.randn(64, 2, 64), padding_mask=torch.zeros(shape, dtype=torch.bool))


@pytest.mark.parametrize("borders", [[0, 17, 39], [0, 17, 41], [0, 30, 20, 40]], ids=str)
def test_packs_that_leave_tokens_out_are_refused(borders):
    model = linear_moe.build_model(TINY, num_layers=2, layer_pattern="LN")
    mixer, softmax = (layer.self_attention for layer in model.decoder.layers[::2])
    message = rf"packed sequences: cu_seqlens must run from 0 to T \(40\) and not decrease: \{borders}"
    with pytest.raises(ValueError, match=message):
        mixer(torch.randn(40, 1, 64), packed_seq_params=packed(borders))
    q = torch.randn(40, 4, 16)
    with pytest.raises(ValueError, match=message):
        softmax.core_attention(q, q, q, None, packed_seq_params=packed(borders))


def test_masks_that_linear_layers_would_ignore_are_refused():
    model = linear_moe.build_model(TINY, **LINEAR)
    tokens, positions = batch(16)
    causal = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    assert model(tokens, positions, causal).equal(model(tokens, positions, None))
    documents = causal.clone()
    documents[..., 8:, :8] = True
    with pytest.raises(
        RuntimeError, match="linear mixers keep to the causal order alone, but attention_mask says more"
    ):
        model(tokens, positions, documents)
    with pytest.raises(ValueError, match=r"attention_mask must be \[b, 1, s, s\], but is \[2, 16\]"):
        model(tokens, positions, attention_mask=torch.ones(2, 16))


def test_softmax_layers_obey_a_mask(seed):
    """Documents that a mask keeps apart (--reset-attention-mask) are those of a pack."""
    model = linear_moe.build_model(TINY, seed=seed, layer_pattern="N")
    attention = model.decoder.layers[0].self_attention
    x = torch.randn(40, 1, 64, requires_grad=True)
    document = torch.arange(40) >= 17
    forbidden = torch.ones(40, 40, dtype=torch.bool).triu(1) | (document[:, None] != document)
    expected = attention(x, None, packed_seq_params=packed([0, 17, 40]))[0]
    found = attention(x, forbidden[None, None])[0]
    assert rel_err(found, expected) < 1e-5
    (grad,) = torch.autograd.grad(found[30].sum(), x)
    assert not grad[:17].any() and not grad[31:].any() and grad[17:31].abs().amin() > 0
    only_documents = (document[:, None] != document)[None, None]  # the causal order holds beside any mask
    assert rel_err(attention(x, only_documents)[0], expected) < 1e-5


@pytest.mark.parametrize("mask_type", ["causal", "causal_bottom_right"])
def test_fewer_queries_than_keys_are_the_last(mask_type, seed):
    """Prefill in pieces: the last piece sees all before it."""
    config = linear_moe.build_model(TINY, layer_pattern="N").config
    core = TorchAttention(config, 1, AttnMaskType[mask_type], "self")
    q, k, v = torch.randn(3, 20, 2, 4, 16, dtype=torch.float64)
    whole = core(q, k, v, None)
    for start in (0, 13, 19):
        assert rel_err(core(q[start:], k, v, None), whole[start:]) < 1e-12
    with pytest.raises(ValueError, match=r"at least as many keys \(19\) as queries \(20\)"):
        core(q, k[:19], v[:19], None)
    with pytest.raises(ValueError, match=r"packed sequences need as many keys \(20\) as queries \(7\)"):
        core(q[13:, 0], k[:, 0], v[:, 0], None, packed_seq_params=packed([0, 7]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--reset-attention-mask --layer-pattern LN", "cannot keep documents apart with linear mixers"),
        ("--reset-attention-mask --layer-pattern N --pipeline-model-parallel-size 2", "pipeline_model_parallel_size 2"),
        ("--reset-attention-mask --layer-pattern N --transformer-impl transformer_engine", "reads? no mask"),
        (
            "--reset-attention-mask --layer-pattern N --no-create-attention-mask-in-dataloader",
            "with no_create_attention_mask_in_dataloader; use --dataloader-inter-document-masking",
        ),
        (
            "--calculate-per-token-loss --eod-mask-loss --mom-memories 2 --pipeline-model-parallel-size 2",
            "only the last stage knows how many tokens the loss counts",
        ),
    ],
)
def test_what_would_not_be_obeyed_is_refused(flags, message, monkeypatch):
    monkeypatch.setattr(checks, "HAVE_TE", True)
    with pytest.raises(ValueError, match=message):
        check_arguments(parse([*config_argv(MODEL), *flags.split()]))


def test_what_is_obeyed_passes():
    for flags in (
        "--reset-attention-mask --layer-pattern N",
        "--calculate-per-token-loss --eod-mask-loss --mom-memories 2",
        "--calculate-per-token-loss --mom-memories 2 --pipeline-model-parallel-size 2",
    ):
        check_arguments(parse([*config_argv(MODEL), *flags.split()]))


def test_evaluation_adds_no_losses(seed):
    tokens, positions = batch()
    found = {}
    for coefficient in (0.0, 1.0):
        model = linear_moe.build_model(TINY, seed=seed, **LINEAR, mom_balance_coeff=coefficient)
        for training in (True, False):
            loss = model.train(training)(tokens, positions, None, labels=tokens).mean()
            found[coefficient, training] = gradients(model, loss)
    router = "decoder.layers.0.self_attention.router.weight"
    assert router in differences(found[1.0, True], found[0.0, True], 0.1)
    assert not differences(found[1.0, False], found[0.0, False])


@pytest.mark.parametrize("per_token", [False, True], ids=["per-batch", "per-token"])
def test_router_losses_follow_the_loss_scale(per_token, seed):
    """fp16's scale multiplies the whole gradient, the router's losses included."""
    model = linear_moe.build_model(TINY, seed=seed, **LINEAR, **LOSSES)
    model.config.calculate_per_token_loss = per_token
    tokens, positions = batch()
    plain = gradients(model, model(tokens, positions, None, labels=tokens).mean())
    model.config.grad_scale_func = lambda loss: 1024 * loss
    scaled = gradients(model, 1024 * model(tokens, positions, None, labels=tokens).mean())
    assert not differences({name: grad / 1024 for name, grad in scaled.items()}, plain)


@pytest.mark.parametrize("padded", [False, True], ids=["no-padding", "padding"])
def test_router_losses_per_token(padded, seed):
    """calculate_per_token_loss: Megatron divides the gradients by the number of tokens that the loss counts, so the
    router's losses weigh as many as if each microbatch's loss were its mean."""
    model = linear_moe.build_model(TINY, seed=seed, **LINEAR, **LOSSES)
    tokens, positions = batch()
    mask = (torch.rand(tokens.shape) < 0.3).float()  # of a chat, prompts do not count
    call = {"labels": tokens, "loss_mask": mask}
    if padded:
        call["padding_mask"] = (torch.arange(64) >= 50).expand_as(tokens)
        mask[:, 50:] = 0
    mean = gradients(model, (model(tokens, positions, None, **call) * mask).sum() / mask.sum())
    model.config.calculate_per_token_loss = True
    total = gradients(model, (model(tokens, positions, None, **call) * mask).sum())
    assert not differences({name: grad / mask.sum() for name, grad in total.items()}, mean)

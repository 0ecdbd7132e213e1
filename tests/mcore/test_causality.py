"""Output t has exactly zero gradient to later inputs and to other sequences; for every mixer, plain and MoM."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

import linear_moe
from linear_moe.ssm import MIXERS

T, B = 140, 2
LENGTHS = [0, 1, 70, 0, 64, 5]  # of a pack: together T; chunks of 64 and the convolution's 4 taps lie across borders
TIMES = (0, 1, 2, 63, 64, 70, 71, 72, 134, 135, T - 1)  # about the borders of chunks and sequences
MODEL = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "seq_length": T,
    "max_position_embeddings": T,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "disable_bias_linear": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "mom_balance_coeff": 0.0,  # its gradient is not the output's
    "mixer_args": {"conv_size": 4},
}
MOM = {"mom_memories": 3, "mom_topk": 2}
HYBRID = MOM | {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "moe_aux_loss_coeff": 0.0}


def packed():
    cu = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=max(LENGTHS), max_seqlen_kv=max(LENGTHS)
    )


def check_causal(forward, hidden_size, pack, times=TIMES):
    """forward: hidden states ``[T, b, D]`` -> outputs ``[T, b, D]``. times: the outputs to look back from."""
    batch = 1 if pack else B
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)) if pack else torch.zeros(T)
    x = torch.randn(T, batch, hidden_size, requires_grad=True)
    y = forward(x)
    for t in times:
        (grad,) = torch.autograd.grad((y[t, 0] * torch.randn(hidden_size)).sum(), x, retain_graph=True)
        may = torch.zeros(T, batch, dtype=torch.bool)
        may[: t + 1, 0] = sequence[: t + 1] == sequence[t]
        assert not grad[~may].any(), f"output {t} sees {grad.abs().amax(-1).mul(~may).nonzero().tolist()[:5]}"
        assert grad[t, 0].any(), f"output {t} does not even see input {t}"
    return grad


def attention_of(model, pack):
    layer = model.decoder.layers[0].self_attention
    return lambda x: layer(x, packed_seq_params=packed() if pack else None)[0]


@pytest.mark.parametrize("pack", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", ["plain", "mom"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_mixer_is_causal(mixer, form, training, pack, seed):
    model = linear_moe.build_model(MODEL, mixer=mixer, num_layers=1, seed=seed, **(MOM if form == "mom" else {}))
    model.train(training)
    times = range(T) if mixer == "gated_deltanet" else TIMES
    grad = check_causal(attention_of(model, pack), MODEL["hidden_size"], pack, times)
    assert grad[T - 2, 0].any(), "no memory: the last output does not see the input before it"


@pytest.mark.parametrize("pack", [False, True], ids=["dense", "packed"])
def test_hybrid_model_is_causal(pack, seed):
    """Two linear layers, a softmax layer and MoE feed-forward in all of them, as one stack."""
    model = linear_moe.build_model(
        MODEL, mixer="gated_deltanet", layer_pattern="LLN", num_layers=3, seed=seed, **HYBRID
    )
    rotary = model.rotary_pos_emb(T)

    def forward(x):
        return model.decoder(x, None, rotary_pos_emb=rotary, packed_seq_params=packed() if pack else None)

    check_causal(forward, MODEL["hidden_size"], pack)


@pytest.mark.parametrize("name", ["Peeking", "Crossing"])
def test_the_check_finds_leaks(name, seed):
    """A mixer that looks one token ahead, and one that ignores the borders of packed sequences, do not pass."""
    model = linear_moe.build_model(MODEL, mixer=f"tests.mixers:{name}", num_layers=1, seed=seed)
    with pytest.raises(AssertionError, match="sees"):
        check_causal(attention_of(model, pack=True), MODEL["hidden_size"], True)

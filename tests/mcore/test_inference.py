"""Inference contexts: pieces of prompts and steps give what the whole sequence gives, at every position."""

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext

import linear_moe
from linear_moe.mcore.inference import InferenceContext, forward, sequences_of, state_of
from linear_moe.ssm import MIXERS
from tests.helpers import rel_err

SIZE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 64}
SIZE |= {"vocab_size": 64, "swiglu": True, "normalization": "RMSNorm", "disable_bias_linear": True}
ROPE = SIZE | {"position_embedding_type": "rope", "layer_pattern": "N"}
MLA = {"multi_latent_attention": True, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_head_dim": 8, "v_head_dim": 12}
SOFTMAX = {
    "plain": ROPE,
    "grouped": ROPE | {"group_query_attention": True, "num_query_groups": 2, "qk_layernorm": True},
    "gated": ROPE | {"attention_output_gate": True, "rotary_percent": 0.5},
    "latent": ROPE | MLA | {"qk_pos_emb_head_dim": 4},
    "yarn": ROPE | MLA | {"qk_pos_emb_head_dim": 4, "rope_type": "yarn", "rotary_scaling_factor": 4.0},
    "learned": ROPE | {"position_embedding_type": "learned_absolute"},
}
# rebased divides by a sum that nearly cancels; tests/ssm/test_scan.py has it with its own divisor, in float64
ARGS = {"rebased": {"mixer_args": {"divisor_eps": 1.0}}}
LINEAR = {
    f"{mixer}-{form}-{pattern}": ROPE
    | {"mixer": mixer, "layer_pattern": pattern, "mom_memories": memories}
    | ARGS.get(mixer, {})
    for mixer in MIXERS
    for form, memories in {"plain": 0, "mom": 3}.items()
    for pattern in ("L", "LN")
}
MODELS = SOFTMAX | LINEAR
MODELS |= {"several": ROPE | {"mixer": {"G": "gated_deltanet", "R": "rwkv7"}, "layer_pattern": "GR"}}
LENGTHS = (9, 1, 6)


def build(config, seed):
    model = linear_moe.build_model(config, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():  # not so near to zero that nothing matters
            parameter.mul_(1.5)
    return model.eval()


def whole(model, tokens):
    """Logits [length, vocab] of one sequence, all at once."""
    positions = torch.arange(len(tokens))[None]
    with torch.no_grad():
        return model(tokens[None], positions, None)[0]


def pieces_of(lengths, seed):
    """Each sequence in three pieces of random lengths, some empty."""
    random = torch.Generator().manual_seed(seed)
    borders = [torch.randint(length + 1, (2,), generator=random).sort().values.tolist() for length in lengths]
    edges = [[0, *border, length] for border, length in zip(borders, lengths)]
    return [[(edge[i], edge[i + 1]) for edge in edges] for i in range(3)]


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_pieces_and_steps_give_the_whole(config, seed):
    model = build(config, seed)
    check_packs(model, seed)
    check_megatrons_context(model)


def check_packs(model, seed):
    """Sequences of different lengths in packs of their pieces, then step by step."""
    steps = 3
    sequences = [torch.randint(64, (length + steps,)) for length in LENGTHS]
    expected = [whole(model, tokens) for tokens in sequences]
    context = InferenceContext(len(LENGTHS), max(LENGTHS) + steps)
    for piece in pieces_of(LENGTHS, seed):
        lengths = [end - start for start, end in piece]
        if not sum(lengths):
            continue
        pack = torch.cat([tokens[start:end] for tokens, (start, end) in zip(sequences, piece)])
        logits = forward(model, context, pack[None], lengths)
        for n, (start, end) in enumerate(piece):
            assert start == end or rel_err(logits[n], expected[n][end - 1]) < 1e-5
    for step in range(steps):
        tokens = torch.stack([tokens[length + step] for tokens, length in zip(sequences, LENGTHS)])
        logits = forward(model, context, tokens[:, None])
        for n, length in enumerate(LENGTHS):
            assert rel_err(logits[n], expected[n][length + step]) < 1e-5
    assert context.seen.tolist() == context.counts == [length + steps for length in LENGTHS]


def check_megatrons_context(model):
    """A dense batch, its prompt in two pieces: Megatron lets every token of the second see all others."""
    tokens = torch.randint(64, (2, 12))
    expected = torch.stack([whole(model, row) for row in tokens])
    context = StaticInferenceContext(2, 12)
    for start, end in ((0, 4), (4, 9), (9, 10), (10, 11), (11, 12)):
        positions = torch.arange(start, end).expand(2, -1)
        with torch.no_grad():
            logits = model(tokens[:, start:end], positions, None, inference_context=context)
        context.increment_sequence_len_offset(end - start)
        assert rel_err(logits, expected[:, start:end]) < 1e-5


def test_sequences_change_places(seed):
    model = build(SOFTMAX["grouped"], seed)
    sequences = [torch.randint(64, (length,)) for length in LENGTHS]
    context = InferenceContext(3, 16)
    forward(model, context, torch.cat(sequences)[None], LENGTHS)
    context.reorder(torch.tensor([2, 0, 2]))
    tokens = torch.randint(64, (3,))
    logits = forward(model, context, tokens[:, None])
    for n, origin in enumerate([2, 0, 2]):
        assert rel_err(logits[n], whole(model, torch.cat([sequences[origin], tokens[n : n + 1]]))[-1]) < 1e-5
    assert context.counts == context.seen.tolist() == [7, 10, 7]
    with pytest.raises(ValueError, match=r"index must be 3 numbers from 0 to 2, but is \[0, 3, 1\]"):
        context.reorder([0, 3, 1])
    context.reset()
    assert context.seen.tolist() == context.counts == [0, 0, 0] and context.nbytes == {"kv": 0, "states": 0}
    logits = forward(model, context, torch.cat(sequences)[None], LENGTHS)
    assert rel_err(logits[1], whole(model, sequences[1])[-1]) < 1e-5


def test_refusals():
    context = InferenceContext(2, 8)
    with pytest.raises(ValueError, match=r"lengths must be 2 numbers of at least 0, one a sequence, but are \[1\]"):
        context.begin([1])
    with pytest.raises(ValueError, match="a sequence would have 9 tokens, more than 8"):
        context.begin([9, 1])
    context.begin([3, 1])
    with pytest.raises(ValueError, match=r"tokens \[B, T\] = \[1, 5\], but the inference context was told of \[1, 4\]"):
        sequences_of(context, torch.zeros(1, 5, 3))


def test_states_of_megatrons_context():
    """A state for each micro-batch, made anew with a new batch."""
    context, x = StaticInferenceContext(4, 8), torch.zeros(2, 3, 5)
    first = state_of(context, 1, sequences_of(context, x))
    assert first.N == 2 and sequences_of(context, x).before.tolist() == [0, 0]
    context.increment_batch_size_offset(2)
    second = state_of(context, 1, sequences_of(context, x))
    context.reset_batch_size_offset()
    context.increment_sequence_len_offset(3)
    sequences = sequences_of(context, x[:, :1])
    assert sequences.single and sequences.before.tolist() == [3, 3]
    assert state_of(context, 1, sequences) is first is not second
    with pytest.raises(ValueError, match="3 sequences go on, but 2 were started"):
        state_of(context, 1, sequences_of(context, torch.zeros(3, 1, 5)))
    context.reset()
    assert state_of(context, 1, sequences_of(context, x)) is not first

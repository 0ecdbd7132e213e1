"""Generation against a loop that runs the whole sequence anew for every token."""

import pytest
import torch

import linear_moe
from linear_moe.inference import Session, generate
from linear_moe.inference.generation import pieces

SIZE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 40}
SIZE |= {"vocab_size": 61, "swiglu": True, "normalization": "RMSNorm", "position_embedding_type": "rope"}
MODELS = {"softmax": SIZE | {"layer_pattern": "N"}}
MODELS["learned"] = MODELS["softmax"] | {"position_embedding_type": "learned_absolute"}
LENGTHS = (7, 1, 12)

HYBRID = {
    "layer_pattern": "NL",
    "mixer": "gated_deltanet",
    "mom_memories": 3,
    "num_experts": 2,
    "moe_ffn_hidden_size": 32,
    "disable_bias_linear": True,
}
MODELS["hybrid-mom"] = SIZE | HYBRID


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    model = linear_moe.build_model(MODELS[request.param], seed=int(torch.randint(2**31, ())))
    with torch.no_grad():
        for parameter in model.parameters():  # not so near to zero that all tokens are as likely
            parameter.mul_(1.5)
    return model.eval()


@pytest.fixture
def prompts(seed):
    return [torch.randint(61, (length,)).tolist() for length in LENGTHS]


@torch.no_grad()
def greedy(model, prompt, steps):
    tokens = list(prompt)
    for _ in range(steps):
        positions = torch.arange(len(tokens))[None]
        logits = model(torch.tensor([tokens]), positions, None)[0, -1, :61]
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def test_greedy_is_the_naive_loop(model, prompts, monkeypatch):
    expected = [greedy(model, prompt, 6) for prompt in prompts]
    assert generate(model, prompts, 6) == expected
    monkeypatch.setattr("linear_moe.inference.generation.PIECE", 5)  # prompts in pieces of several sequences
    heard = []
    assert generate(model, prompts, 6, stream=lambda n, token: heard.append((n, token))) == expected
    assert [[token for n, token in heard if n == i] for i in range(3)] == expected


def test_stops(model, prompts):
    expected = [greedy(model, prompt, 6) for prompt in prompts]
    one, two = expected[0][2], expected[2][1:3]
    written = generate(model, prompts, 6, stop=[one, two])
    for tokens, full in zip(written, expected):
        ends = [i + 1 for i in range(6) if full[i] == one or full[max(i - 1, 0) : i + 1] == two]
        assert tokens == full[: min(ends, default=6)]


def test_a_turn_goes_on_from_the_last(model, prompts):
    session = Session(model, 1, 40)
    said = []
    for prompt in prompts:
        said += prompt
        expected = greedy(model, said, 3)
        assert session.reply([prompt], 3) == [expected]
        said += expected
    assert session.tokens == len(said) and session.decode_tokens == 6
    assert session.prefill_tokens == sum(LENGTHS) + 2  # what was drawn last is read with the next turn
    assert session.prefill_seconds > 0 < session.decode_seconds
    with pytest.raises(ValueError, match="29 tokens and 12 new ones are more than the session's 30"):
        Session(model, 1, 30).reply([[1] * 29], 15)


def test_seeds_and_padding(model, prompts):
    options = {"temperature": 30.0}  # all tokens about as likely, padding of the vocabulary as well
    first, again, other = (generate(model, prompts, 8, seed=seed, **options) for seed in (5, 5, 6))
    assert first == again != other
    assert max(map(max, first)) < 61


def test_ends_with_the_models_positions(model, prompts):
    """Other sequences of the batch go on, and the training mode comes back."""
    model.train()
    long = [3] * 38
    written = generate(model, [long, prompts[0]], 9)
    assert model.training
    model.eval()
    assert written == [greedy(model, long, 3), greedy(model, prompts[0], 9)]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 1 is empty: give at least one token"),
        ([4, 61], "prompt 1 has token id 61, outside the vocabulary of 61"),
        ([-1], "prompt 1 has token id -1, outside"),
        ([1] * 41, "prompt 1 has 41 tokens, more than the model's 40 positions"),
    ],
    ids=["empty", "vocabulary", "negative", "long"],
)
def test_refuses_prompts(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [[1, 2], prompt], 4)


def test_refuses_values(model):
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, but is 0"):
        generate(model, [[1]], 0)
    with pytest.raises(ValueError, match="stop has an empty list of tokens"):
        generate(model, [[1]], 2, stop=[[]])
    with pytest.raises(ValueError, match="2 prompts for 1 sequences"):
        Session(model, 1, 8).reply([[1], [2]], 1)
    assert generate(model, [], 3) == []


def test_pieces():
    assert list(pieces([7, 0, 12], 5)) == [[5, 0, 0], [2, 0, 3], [0, 0, 5], [0, 0, 4]]
    assert list(pieces([1, 1], 5)) == [[1, 1]]

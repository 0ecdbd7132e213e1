"""`linear_moe.load_model`: the model of a checkpoint folder, and what is wrong with folders."""

import os
import shutil

import pytest
import torch
from megatron.core import dist_checkpointing

import linear_moe
from linear_moe.mcore.damage import TRACKER
from linear_moe.mcore.load import find_checkpoint, load_model, saved_limits
from tests.inference.conftest import MODEL


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


def by_hand(path):
    """The same model, built from the same flags."""
    words = MODEL.split()[2:]
    config = dict(zip([word.removeprefix("--") for word in words[::2]], words[1::2]))
    model = linear_moe.build_model("tiny", **config, vocab_size=300)
    kept = {"metadata": {"non_homogeneous_layers": True}}
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict(**kept)}, str(path))
    model.load_state_dict(loaded["model"])
    return model.eval()


def test_the_model_of_a_checkpoint(trained, seed):
    tokens = torch.randint(300, (2, 20))
    model = linear_moe.load_model(trained.load)
    assert not model.training and model.vocabulary == 300 and model.vocab_size == 384
    assert logits(model, tokens).equal(logits(by_hand(trained.load / "iter_0000002"), tokens))
    first = logits(linear_moe.load_model(trained.load, 1), tokens)
    assert not first.equal(logits(model, tokens))
    assert first.equal(logits(load_model(trained.load / "iter_0000001"), tokens))


def test_overrides(trained, seed):
    tokens = torch.randint(300, (1, 8))
    plain, other = load_model(trained.load), load_model(trained.load, mom_topk=1, bf16=True, swiglu=True)
    assert not logits(plain, tokens).equal(logits(other, tokens).float())
    assert {p.dtype for p in other.parameters() if p.ndim > 1} >= {torch.bfloat16}
    for overrides, message in (
        ({"hidden_size": 128}, "(?s)is of another architecture:.*hidden_size: 64 in the checkpoint, 128 now"),
        ({"num_layers": 1}, "says which layers there are, so num-layers cannot be overridden"),
        ({"swiglu": False}, "(?s)is of another architecture:.*swiglu: True in the checkpoint, False now"),
        ({"hiden_size": 128}, "load_model: unknown key 'hiden-size'; did you mean 'hidden-size'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(trained.load, **overrides)


def test_limits_are_known_before_the_model(trained):
    saved = find_checkpoint(trained.load)[1]["args"]
    assert (saved_limits(saved).vocabulary, saved_limits(saved).positions) == (300, 64)
    saved.layers = "LE"
    assert saved_limits(saved).positions is None


def test_refuses_folders(trained, tmp_path):
    with pytest.raises(ValueError, match=f"no checkpoint: {tmp_path}/none is not a folder"):
        load_model(tmp_path / "none")
    with pytest.raises(ValueError, match=f"no checkpoint in {tmp_path}: {TRACKER} is missing"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="iter_0000007 is missing; whole: iter_0000001, iter_0000002"):
        load_model(trained.load, 7)
    folder = tmp_path / "copy"
    shutil.copytree(trained.load, folder)
    tracker = folder / TRACKER
    tracker.write_text("two")
    with pytest.raises(ValueError, match="should hold an iteration but holds 'two'"):
        load_model(folder)
    tracker.write_text("2")
    last = folder / "iter_0000002"
    part = max(last.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = part.read_bytes()
    part.write_bytes(os.urandom(len(content)))
    with pytest.raises(ValueError, match=r"iter_0000002 is damaged: it cannot be read .*iter_0000001 \(--ckpt-step 1"):
        load_model(folder)
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"iter_0000002 is damaged: {part.name} has {len(content) // 2} bytes"):
        load_model(folder)

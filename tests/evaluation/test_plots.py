"""Event files of interrupted and resumed runs -> one series a tag -> pictures."""

import sys

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from linear_moe.evaluation.plots import plot_loss, plot_memories, read_scalars


def write(folder, steps, value, memories=4):
    writer = SummaryWriter(str(folder), filename_suffix=f".{value}")
    for step in steps:
        writer.add_scalar("lm loss", value, step)
        writer.add_scalar("lm loss vs samples", value, step * 8)
        if step % 10 == 0:
            writer.add_scalar("lm loss validation", value + 0.5, step)
            for layer in (1, 3):
                for memory in range(memories):
                    writer.add_scalar(f"mom/layer_{layer}/memory_{memory}_share", 1 / memories, step)
    writer.close()


def is_png(path):
    # Signature, and a picture rather than an empty canvas.
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 10_000


def test_a_resumed_run_replaces_what_the_interrupted_one_wrote_after_that_point(tmp_path):
    write(tmp_path, range(1, 61), 4.0)  # killed at 60, last checkpoint at 40
    write(tmp_path, range(41, 56), 3.0)
    scalars = read_scalars(tmp_path)
    steps, values = scalars["lm loss"]
    assert steps.tolist() == list(range(1, 56))
    assert values.tolist() == [4.0] * 40 + [3.0] * 15
    assert scalars["lm loss validation"][0].tolist() == [10, 20, 30, 40, 50]
    assert "lm loss vs samples" not in scalars


def test_a_file_cut_off_by_a_kill_is_read_up_to_there(tmp_path):
    write(tmp_path, range(1, 31), 4.0)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    assert read_scalars(tmp_path)["lm loss"][0].tolist() == list(range(1, 31))


@pytest.mark.parametrize("memories", [1, 4, 20])
def test_pictures_are_written(tmp_path, memories):
    write(tmp_path / "tb", range(1, 61), 4.0, memories)
    plot_loss(tmp_path / "tb", tmp_path / "new" / "loss.png", baseline=3.6)
    plot_memories(tmp_path / "tb", tmp_path / "memories.png")
    assert is_png(tmp_path / "new" / "loss.png")
    assert is_png(tmp_path / "memories.png")


def test_a_loss_that_is_not_finite_and_a_single_point_are_drawn(tmp_path):
    writer = SummaryWriter(str(tmp_path / "tb"))
    for step, value in enumerate([4.0, np.nan, np.inf, 3.0], 1):
        writer.add_scalar("lm loss", value, step)
    writer.close()
    plot_loss(tmp_path / "tb", tmp_path / "a.png")
    write(tmp_path / "one", [10], 4.0)
    plot_loss(tmp_path / "one", tmp_path / "b.png")
    plot_memories(tmp_path / "one", tmp_path / "c.png")
    assert all(is_png(tmp_path / name) for name in ("a.png", "b.png", "c.png"))


def test_missing_logs_and_tags_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no TensorBoard scalars in .*--tensorboard-dir"):
        read_scalars(tmp_path)
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("other", 1.0, 1)
    writer.close()
    with pytest.raises(ValueError, match="has no tag lm loss; it has: other"):
        plot_loss(tmp_path, tmp_path / "loss.png")
    with pytest.raises(ValueError, match="has no tag mom/layer_1/memory_0_share; it has: other"):
        plot_memories(tmp_path, tmp_path / "memories.png")


@pytest.mark.parametrize("package", ["tensorboard.backend.event_processing", "matplotlib"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    write(tmp_path / "tb", [10], 4.0)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install linear-moe\[look\]"):
        plot_loss(tmp_path / "tb", tmp_path / "loss.png")

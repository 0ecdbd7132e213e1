"""Megatron's Muon: each projection of each memory is a matrix of its own, under tensor parallelism too."""

import pytest
import torch

from tests.helpers import rel_err
from tests.parallel import harness
from tests.parallel.launch import Case, run_cases
from tests.parallel.test_layouts import TP2
from tests.parallel.test_whole_tensors import LAYERS

pytest.importorskip("emerging_optimizers")

LR, DECAY, STEPS = 1e-2, 0.1, 5
FLAGS = (
    f"{LAYERS} --optimizer muon --muon-coefficient-type simple --muon-fp32-matmul-prec high --seq-length 16 "
    f"--muon-num-ns-steps {STEPS} --muon-tp-mode duplicated --global-batch-size 2 --train-iters 2 --lr {LR} "
    f"--weight-decay {DECAY} --lr-decay-style constant --lr-warmup-iters 0"
)
# Of a layer: projections and the factors of low-rank ones, of tokens and of rows, and the output projection.
MATRICES = (".tokens.weight.", ".rows.weight.", ".tokens.down.", ".rows.down.", ".up_", ".linear_proj.weight")


def train(data, flags, save, load=None):
    """As `test_layouts.train`, with a checkpoint after each of two iterations."""
    from linear_moe.mcore.pretrain import main

    argv = [*harness.TINY, "--data-path", data, *flags.split(), "--save-interval", "1"]
    return harness.train(main, argv + (["--load", load, "--ckpt-step", "1"] if load else []), save)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("muon")

    def case(name, flags, **options):
        return Case(name, f"{__name__}:train", {"data": data, "flags": flags, "save": str(folder / name), **options})

    alone = run_cases(1, [case("one", FLAGS), case("resumed", FLAGS, load=str(folder / "one"))])
    return alone | run_cases(2, [case("two", f"{FLAGS} {TP2}")])


def orthogonal(x):
    """Newton and Schulz's iteration on one matrix, written out, with the factor of Muon's spectral scale."""
    y = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        square = y @ y.T
        y = 3.4445 * y + (-4.7750 * square + 2.0315 * square @ square) @ y
    return y * max(x.shape) ** 0.5


def test_each_projection_is_made_orthogonal_by_itself(runs):
    """The second step of one process, from what its checkpoints hold."""
    run = runs["one"].result
    before, after = harness.read_checkpoint(run.save, 1), run.tensors
    momenta = {n.partition("momentum_buffer.")[2]: t for n, t in after.items() if ".momentum_buffer." in n}
    of_layers = {name: tensor for name, tensor in momenta.items() if ".self_attention." in name}
    parameters = [name for name in after if ".self_attention." in name and not name.startswith("optimizer.")]
    assert of_layers.keys() == {name for name in parameters if any(part in name for part in MATRICES)}
    assert {tensor.dim() for tensor in of_layers.values()} == {2, 3}  # 3: a matrix for each memory
    for name in set(parameters) - of_layers.keys():  # convolutions, heads, token shift, the router
        assert f"optimizer.state.exp_avg.{name}" in after
    for name, momentum in of_layers.items():
        update = torch.stack([orthogonal(x) for x in momentum.double().reshape(-1, *momentum.shape[-2:])])
        moved = before[name].double() * (1 - LR * DECAY) - after[name].double()
        assert rel_err(moved, LR * update.view(momentum.shape)) < 1e-4, name


def test_resume_is_bitwise(runs):
    assert not harness.same_tensors(runs["resumed"].result, runs["one"].result)


def test_the_same_under_tensor_parallelism(runs):
    one, two = runs["one"].result, runs["two"].result
    assert not harness.differences(two, one)
    momenta = [name for name in one.tensors if ".momentum_buffer." in name]
    assert all(rel_err(two.tensors[name], one.tensors[name]) < 1e-4 for name in momenta)

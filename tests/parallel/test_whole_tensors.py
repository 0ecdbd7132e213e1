"""Whole tensors by name under tensor parallelism, and in checkpoints: those of before, which had a layer's low-rank
factors as one tensor, still load.
"""

from unittest import mock

import pytest
import torch

from tests.parallel import harness
from tests.parallel.launch import Case, run_cases
from tests.parallel.test_layouts import DIST, SP, TP2, last_iterations

HERE = "tests.parallel.test_whole_tensors"
# Of all mixers the ones whose layers hold the most kinds of tensors.
LAYERS = (
    '--mixer {"Q":"rwkv7","R":"rwkv6"} --mixer-args {"Q":{"conv_size":4},"R":{}} --layer-pattern QR --num-layers 2 '
    "--mom-memories 2 --mom-topk 1"
)
SHORT = "--seq-length 16 --global-batch-size 2 --train-iters 3"


def train(data, flags, save, load=None, old=False):
    """As `test_layouts.train`; old: write checkpoints as they were before."""
    from linear_moe.mcore import mixer_layer
    from tests.parallel import test_layouts

    def as_before(whole, parts, *rest):
        return whole if parts[0].axis is None else by_section(whole, parts, *rest)

    by_section = mixer_layer.by_section
    with mock.patch.object(mixer_layer, "by_section", as_before if old else by_section):
        return test_layouts.train(data, flags, save, load)


def full_states(flags):
    """Layer -> what its `full_state` says on this rank, before and after it has loaded twice that."""
    layers = mixer_layers(build(flags))
    states = [layer.full_state() for layer in layers]
    for layer, state in zip(layers, states):
        layer.load_full_state({name: 2 * tensor for name, tensor in state.items()})
    return states, [layer.full_state() for layer in layers]


def build(flags):
    """The model of the flags, under their parallel layout."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.training import arguments
    from megatron.training.models.hybrid import HybridModelBuilder

    from linear_moe.mcore import model

    harness.enable_cpu()
    harness.reset_megatron()
    args = model.parse([*harness.TINY, *flags.split()])
    arguments.validate_args(args)
    parallel_state.initialize_model_parallel(args.tensor_model_parallel_size)
    model_parallel_cuda_manual_seed(args.seed)
    config = model.model_config(args)
    built = HybridModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    for hook in config.pre_wrap_hooks:
        hook([built])
    return built


def mixer_layers(model):
    return [layer.self_attention for layer in model.decoder.layers[::2]]


def collectives(flags):
    """Sizes of what a backward sums over tensor-parallel ranks, and of what all of these hold of each layer."""
    built = build(flags)
    held = [sum(map(torch.numel, map(layer.get_parameter, layer.replicated))) for layer in mixer_layers(built)]
    tokens = torch.arange(32)[None]
    loss = built(tokens, tokens, None, labels=tokens).mean()
    sizes, all_reduce = [], torch.distributed.all_reduce

    def counted(tensor, *args, **options):
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **options)

    with mock.patch.object(torch.distributed, "all_reduce", counted):
        loss.backward()
    return sizes, held


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("whole")
    places = {name: str(folder / name) for name in ("old", "one", "two")}

    def training(name, flags, **options):
        return Case(
            name, f"{HERE}:train", {"data": data, "flags": f"{LAYERS} {SHORT} {flags}", "save": places[name], **options}
        )

    def states(name, flags):
        return Case(name, f"{HERE}:full_states", {"flags": f"{LAYERS} {flags}"})

    alone = [training("old", "", old=True), training("one", "", load=places["old"]), states("states", "")]
    pairs = [training("two", f"{TP2} {SP} {DIST}", load=places["old"]), states("states-tp2", TP2)]
    for name, flags in (("sums", TP2), ("sums-sp", f"{TP2} {SP}")):
        pairs.append(Case(name, f"{HERE}:collectives", {"flags": f"{LAYERS} {flags}"}))
    return run_cases(1, alone) | run_cases(2, pairs)


def test_full_state_does_not_depend_on_the_layout(outcomes):
    before, after = outcomes["states"].result
    assert any(name == "w.down" for name in before[0]) and any(name == "mix_down_q" for name in before[1])
    for found_before, found_after in outcomes["states-tp2"].results:
        for found, expected in zip(found_before + found_after, before + after, strict=True):
            assert found.keys() == expected.keys()
            assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert all(twice[name].equal(2 * once[name]) for once, twice in zip(before, after) for name in once)


def test_gradients_of_what_all_ranks_hold_are_one_collective(outcomes):
    """A layer's and no more, beside those of the inputs of its mixer, its feed-forward and the output layer; under
    sequence parallelism none, for Megatron sums them once a step.
    """
    sizes, held = outcomes["sums"].result
    inputs = 32 * 32
    assert len(set(held)) == 2 and sorted(sizes) == sorted([*held, *[inputs] * (2 * len(held) + 1)])
    assert outcomes["sums-sp"].result[0] == []


def one_tensor_a_layer(tensors):
    """A checkpoint's tensors as they were before: the sections of `down` in one, in the order of their declaration."""
    found = {name: tensor for name, tensor in tensors.items() if ".down." not in name}
    for name in tensors:
        whole, _, section = name.partition(".down.")
        if section:
            found.setdefault(f"{whole}.down", []).append(tensors[name])
    return {name: torch.cat(t, -2) if isinstance(t, list) else t for name, t in found.items()}


@pytest.mark.parametrize("run", ["one", "two"])
def test_a_checkpoint_of_before_loads(outcomes, run):
    """With its optimizer state, in the same layout and in another; what is saved then has each factor by name."""
    old, new = outcomes["old"].result, outcomes[run].result
    names = [name for name in new.tensors if "exp_avg." in name and ".0.self_attention.core.rows.down" in name]
    assert sorted(name.rpartition(".")[2] for name in names) == ["iclr", "w"]
    assert not [name for name in new.tensors if name.endswith(".down")]
    assert [name for name in old.tensors if name.endswith(".down")]
    new.tensors = one_tensor_a_layer(new.tensors)
    if run == "one":
        assert not harness.same_tensors(new, old)
    assert not harness.differences(new, last_iterations(old))

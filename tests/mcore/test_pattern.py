"""Patterns: what they say, what --layer-pattern stands for, where pipelines cut them, what they may not be."""

import pytest
from megatron.training import arguments

from linear_moe.mcore.arguments import config_argv, expand_argv
from linear_moe.mcore.checks import check_arguments
from linear_moe.mcore.model import model_config, parse
from linear_moe.mcore.pattern import translate
from linear_moe.mcore.specs import layer_options

MODEL = {"num-layers": 4, "hidden-size": 32, "num-attention-heads": 4, "seq-length": 8, "vocab-size": 128}
MODEL |= {"max-position-embeddings": 8, "position-embedding-type": "rope", "micro-batch-size": 1}
MLA, PP2 = "--multi-latent-attention", "--pipeline-model-parallel-size 2"


def parsed(flags):
    return parse([*config_argv(MODEL), *flags.split()])


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--layer-pattern LLLN", "L-L-L-*-"),
        ("--layer-pattern LN --num-experts 2", "LE*ELE*E"),
        ("--layer-pattern LN --num-experts 2 --moe-layer-freq [0,1,1,0]", "L-*ELE*-"),
        (f"--layer-pattern LN {MLA}", "L-+-L-+-"),
        ("--layer-pattern L --mtp-num-layers 2", "L-L-L-L-/L-/L-"),
        (f"--layer-pattern LLLN {PP2}", "L-L-|L-*-"),
        (
            f"--layer-pattern LLLN {PP2} --num-virtual-stages-per-pipeline-rank 2",
            "L-|L-|L-|*-",
        ),
        (
            f"--layer-pattern LLLN {PP2} --num-layers-per-virtual-pipeline-stage 1",
            "L-|L-|L-|*-",
        ),
        (f"--layer-pattern LLLN {PP2} --decoder-first-pipeline-num-layers 1", "L-|L-L-*-"),
        (f"--layer-pattern LLLN {PP2} --pipeline-model-parallel-layout Et|tttL", "L-|L-L-*-"),
        (
            f"--layer-pattern LLN --num-layers 6 {PP2} --account-for-embedding-in-pipeline-split "
            "--account-for-loss-in-pipeline-split",
            "L-L-*-|L-L-*-",
        ),
        ("--hybrid-layer-pattern GG-M*", "GG-M*"),
        (f"--hybrid-layer-pattern GG-*-G {PP2}", "GG-|*-G"),
        (f"--hybrid-layer-pattern G|G-*-G {PP2}", "G|G-*-G"),
        ("--hybrid-layer-pattern G|G-*-G", "GG-*-G"),  # stages are for pipelines
        ("--hybrid-layer-pattern G-/G-/G-", "G-/G-/G-"),
    ],
)
def test_what_arguments_say(flags, text):
    args = parsed(flags)
    pattern = layer_options(args).pattern
    assert pattern.text == text
    translate(args, pattern)
    assert args.layers == text and args.num_layers == len(pattern.main)
    translate(args, layer_options(args).pattern)  # once more: nothing changes
    assert args.layers == text and layer_options(args).pattern == pattern
    letters = str.maketrans("LM", "GG")
    assert args.hybrid_layer_pattern == text.translate(letters)


def test_letters_of_mixers():
    several = '--mixer {"G":"gla","M":"mamba2","R":"rwkv7"} --hybrid-layer-pattern M-R-G*'
    args = parsed(several)
    options = layer_options(args)
    assert {letter: choice.mixer.__name__ for letter, choice in options.linear.items()} == {
        "G": "GatedLinearAttention",
        "M": "Mamba2",
        "R": "RWKV7",
    }
    check_arguments(args)
    assert options.pattern.megatrons == "G-G-G*" and options.pattern.mixing == "MRG*"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--hybrid-layer-pattern G-X",
            r"'G-X' has unknown letters \['X'\]; allowed: L \(linear mixer\), G .*, - \(feed-f",
        ),
        ("--hybrid-override-pattern M-M*", "hybrid_override_pattern is deprecated: write hybrid_layer_pattern"),
        ("--mtp-hybrid-override-pattern M", "mtp_hybrid_override_pattern is deprecated: write hybrid_layer_pattern"),
        ("--hybrid-layer-pattern GD", r"unknown letters \['D'\]"),
        ("--hybrid-layer-pattern=", "hybrid_layer_pattern '' is empty; it must have a letter a layer"),
        (
            f"--layer-pattern L {PP2} --num-layers-per-virtual-pipeline-stage 3",
            r"4 layers .* cannot be cut for 2 ranks into stages of num_layers_per_virtual_pipeline_stage \(3\)",
        ),
        (
            f"{PP2} --num-layers-per-virtual-pipeline-stage 1 --pipeline-model-parallel-layout Ett|ttL",
            "no more than one of num_layers_per_virtual_pipeline_stage, pipeline_model_parallel_layout",
        ),
        ("--num-virtual-stages-per-pipeline-rank 2", "needs pipeline_model_parallel_size above 1"),
        (
            "--hybrid-layer-pattern G-/G-*E --num-experts 2 --position-embedding-type rope",
            "has E as letter 4 of a depth, beyond Megatron's table of experts, which holds 2 layers and 1 depths",
        ),
        ("--cpu-offloading-num-layers 1", "HybridModel does not have cpu_offloading_num_layers"),
        (
            "--layer-pattern L --mtp-num-layers 1 --recompute-granularity full --recompute-method uniform "
            "--recompute-num-layers 2",
            "multi-token prediction with uniform recomputation needs recompute_num_layers 1, not 2",
        ),
        ("--hybrid-layer-pattern /G-", "has no layers of the model itself before /"),
        (
            "--hybrid-layer-pattern G- --position-embedding-type mrope",
            "must be learned_absolute, rope, yarn, none, but is m",
        ),
        ("--position-embedding-type none --use-rope-scaling", "needs position_embedding_type rope, not none"),
        ("--hybrid-layer-pattern G-/", "a depth of multi-token prediction is letters of layers, not ''"),
        ("--hybrid-layer-pattern G-/G|-", r"letters of layers, not 'G\|-'"),
        (
            "--hybrid-layer-pattern G-/G-/G",
            r"all depths of multi-token prediction are alike, but these are \['G-', 'G'\]",
        ),
        (
            "--hybrid-layer-pattern G-/G- --mtp-num-layers 2",
            "has 1 depths of multi-token prediction, but mtp_num_layers is 2",
        ),
        (
            "--hybrid-layer-pattern G-GM",
            "has the linear mixers G, M, but --mixer names one: map each letter to its own",
        ),
        ("--hybrid-layer-pattern GE", "has E, experts, but num_experts is not set"),
        ("--hybrid-layer-pattern G- --num-experts 2", "has no E, experts, but num_experts is 2"),
        ("--hybrid-layer-pattern G+*-", r"has both \* and \+: softmax layers of one model are of one kind"),
        (f"--hybrid-layer-pattern G*- {MLA}", r"has \*, but with multi_latent_attention it must be \+"),
        (
            f"--hybrid-layer-pattern G|-|G {PP2}",
            r"has 3 stages, which must be a multiple of pipeline_model_parallel_size \(2\)",
        ),
        (
            f"--hybrid-layer-pattern G-* {PP2}",
            "3 layers on 2 pipeline stages: .*divisible by .*=2",
        ),
        (
            f"--hybrid-layer-pattern G|- {PP2} --num-virtual-stages-per-pipeline-rank 1",
            r"says by \| where stages end: leave out num_virtual_stages_per_pipeline_rank",
        ),
        (
            f"--layer-pattern L {PP2} --pipeline-model-parallel-layout Ett|tL",
            r"4 layers cannot be cut into pipeline stages of \[2, 1\] layers",
        ),
        (
            "--hybrid-layer-pattern G-/G- --position-embedding-type learned_absolute",
            "multi-token prediction needs position_embedding_type rope or none, not learned_absolute",
        ),
    ],
)
def test_what_patterns_may_not_be(flags, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(parsed(flags))


def test_ratios_are_named_with_what_to_write():
    with pytest.raises(
        ValueError, match="unknown flag --hybrid-mlp-ratio; write the layers out: --hybrid-layer-pattern"
    ):
        expand_argv("--hybrid-mlp-ratio 0.5".split())


def test_arguments_that_were_not_translated_are_refused():
    """A script that bound validate_args before our flags came would train a model without layers."""
    args = parsed("--layer-pattern L")
    arguments.validate_args.__wrapped__(args)
    with pytest.raises(ValueError, match="validate_args was imported before add_arguments ran"):
        model_config(args)

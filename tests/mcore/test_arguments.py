"""Flags, configuration files and patterns; what is refused, and how it is said."""

import argparse

import pytest
import torch
import yaml
from megatron.training.arguments import add_megatron_arguments

from linear_moe.mcore import checks
from linear_moe.mcore.arguments import add_arguments, config_argv, expand_argv
from linear_moe.mcore.checks import check_arguments
from linear_moe.mcore.configs import CONFIGS, packaged, read_config
from linear_moe.mcore.pattern import expand_pattern
from linear_moe.mcore.specs import layer_options

MODEL = {"num-layers": 4, "hidden-size": 32, "num-attention-heads": 4, "seq-length": 32}


def parse(argv):
    args = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))).parse_args(argv)
    args.world_size, args.rank = 4, 0
    return args


def from_config(tmp_path, config, *flags):
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(config))
    return parse(expand_argv(["--config", str(path), *flags]))


def test_configuration_becomes_arguments_and_flags_override(tmp_path):
    config = MODEL | {
        "layer_pattern": "LLLN",
        "mixer": "gla",
        "mixer-args": {"gate_rank": 4},
        "mom-memories": 4,
        "mom-shared-memory": False,
        "moe-layer-freq": [0, 1, 0, 1],
        "lr": 1e-3,
        "swiglu": True,
        "bf16": False,
        "data-path": ["0.3", "a", "0.7", "b"],
        "load": None,
    }
    args = from_config(tmp_path, config, "--hidden-size", "64", "--mom-topk", "3")
    assert (args.hidden_size, args.num_layers, args.mom_topk, args.lr) == (64, 4, 3, 1e-3)
    assert args.mixer_args == {"gate_rank": 4} and args.moe_layer_freq == [0, 1, 0, 1]
    assert args.swiglu and not args.bf16 and not args.mom_shared_memory and args.load is None
    assert args.data_path == ["0.3", "a", "0.7", "b"]
    options = layer_options(args)
    assert options.mixers["L"].config.gate_rank == 4 and options.mixers["L"].config.head_dim == 16
    assert options.mom.memories == 4 and options.mom.topk == 3 and options.mom.projections == 4


def test_a_switch_of_the_file_can_be_taken_back(tmp_path):
    assert not from_config(tmp_path, MODEL | {"swiglu": True}, "--no-swiglu").swiglu
    assert from_config(tmp_path, MODEL | {"mom-shared-memory": False}, "--mom-shared-memory").mom_shared_memory


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mom-memory": 4}, "unknown key 'mom-memory'; did you mean 'mom-memories'"),
        ({"num_layer": 4}, "unknown key 'num_layer'; did you mean 'num-layers'"),
        ({"swiglu": "yes please"}, "swiglu is a switch, so it must be true or false, but is 'yes please'"),
    ],
)
def test_unknown_keys(config, message):
    with pytest.raises(ValueError, match=message):
        config_argv(config)


def test_bad_configuration_files(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.yaml does not exist"):
        expand_argv(["--config", str(tmp_path / "nowhere.yaml")])
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match=r"must map argument names to values, but is a list \(write num-layers: 4\)"):
        expand_argv(["--config", str(path)])
    with pytest.raises(ValueError, match=f"configuration {tmp_path} is not a file"):
        expand_argv(["--config", str(tmp_path)])
    with pytest.raises(ValueError, match=r"give --config once, not 2 times \(a.yaml, b.yaml\)"):
        expand_argv(["--config", "a.yaml", "--config", "b.yaml"])
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"list\.yaml is empty; it must map argument names"):
        expand_argv(["--config", str(path)])
    with pytest.raises(ValueError, match=f"configuration {tmp_path} is not a file, and linear_moe/configs has no such"):
        expand_argv(["--config", str(tmp_path)])
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"list.yaml is empty; it must map argument names"):
        expand_argv(["--config", str(path)])
    path.write_text("a: [1\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        expand_argv(["--config", str(path)])


def test_yaml_numbers_and_words(tmp_path):
    """As a user means them: YAML 1.1 takes 1e-6 for text, and NO, a pattern, for false."""
    path = tmp_path / "model.yaml"
    path.write_text(
        "layer-pattern: NO\nmixer: {O: gla}\nmixer-args: {O: {norm_eps: 1e-6, gate_rank: 010, conv_size: 4}}\n"
        "lr: 1E-3\nmin-lr: .5\nseed: 010\nsave: 2026-01-01\nload: ~\nqk-layernorm: true\nswiglu: False\n"
    )
    config = read_config(path)
    assert config["mixer-args"] == {"O": {"norm_eps": 1e-6, "gate_rank": "010", "conv_size": 4}}
    assert config["layer-pattern"] == "NO"
    args = parse(config_argv(config))
    assert (args.lr, args.min_lr, args.seed, args.save, args.load) == (1e-3, 0.5, 10, "2026-01-01", None)
    assert args.qk_layernorm and not args.swiglu
    for word in ("NULL", "TRUE", "ON", "Y", "E", "INF"):
        path.write_text(f"layer-pattern: {word}\n")
        assert read_config(path) == {"layer-pattern": word}


UNREADABLE = {"deep": b"a: " + b"[" * 2000, "digits": b"a: " + b"1" * 5000, "latin": b"a: \xe9\n", "open": b"a: [1\n"}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_yaml_that_cannot_be_read_is_one_line(tmp_path, content):
    path = tmp_path / "model.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^configuration {path} is not valid YAML: .+") as error:
        read_config(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b: c\n", "mapping values are not allowed here, in column 5 of line 1"),
        ("a: 1\nb: @x\n", "found character '@' that cannot start any token, in column 4 of line 2"),
        ("a: \x07\n", "special characters are not allowed at byte 3"),
        ("lr: 1\nmin-lr: 2\nlr: 3\n", "key 'lr' is there twice, in column 1 of line 1"),
    ],
)
def test_yaml_errors_say_where(tmp_path, text, message):
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_config(path)
    assert "byte string" not in str(error.value) and "^" not in str(error.value)


def test_base_configurations(tmp_path):
    """A file overrides its base, key by key, whatever the spelling; null takes a key back."""
    (tmp_path / "below").mkdir()
    (tmp_path / "base.yaml").write_text("num_layers: 2\nhidden-size: 32\nqk-layernorm: true\n")
    path = tmp_path / "below" / "model.yaml"
    path.write_text("base: ../base.yaml\nnum-layers: 4\nqk-layernorm: null\n")
    assert config_argv(read_config(path)) == ["--num-layers", "4", "--hidden-size", "32"]
    (tmp_path / "base.yaml").write_text("base: below/model.yaml\n")
    with pytest.raises(ValueError, match=r"model.yaml is its own base: .*model.yaml -> .*base.yaml -> .*model.yaml"):
        read_config(path)
    path.write_text("base: nowhere.yaml\n")
    with pytest.raises(ValueError, match=r"nowhere.yaml \(base of .*model.yaml\) does not exist"):
        read_config(path)
    path.write_text("base: [a.yaml, b.yaml]\n")
    with pytest.raises(ValueError, match=r"base must be the name of a file, but is \['a.yaml', 'b.yaml'\]"):
        read_config(path)


def test_packaged_configurations_by_name(tmp_path, monkeypatch):
    """A name is a path below linear_moe/configs without .yaml; a file of that name wins, a folder does not."""
    monkeypatch.chdir(tmp_path)
    known = packaged()
    assert {"tiny", "demo", "llama3/1.3b_mom", "common/tiny"} <= known.keys() and known["tiny"].parent == CONFIGS
    (tmp_path / "llama3").mkdir()
    (tmp_path / "tiny").mkdir()
    assert read_config("tiny") == read_config(known["tiny"]) != read_config("llama3/tiny")
    (tmp_path / "llama3" / "tiny").write_text("num-layers: 3\n")
    assert read_config("llama3/tiny") == {"num-layers": 3}


def test_a_base_may_be_packaged(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("base: llama3/340m\nnum-layers: 2\n")
    expected = read_config("llama3/340m") | {"num-layers": 2}
    assert read_config(path) == expected and "bf16" in expected and "base" not in expected  # its base has that
    (tmp_path / "llama3").mkdir()
    (tmp_path / "llama3" / "340m").write_text("seed: 3\n")
    assert read_config(path) == {"seed": 3, "num-layers": 2}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("llama3/340m_mon", "; did you mean llama3/340m_mom or "),
        ("qwen2_moe/tiny.yaml", "; did you mean qwen2_moe/tiny or "),
        ("examples/configs/demo.yaml", "; did you mean demo?"),
        ("mine", "; did you mean mine.yaml?"),
        ("nothing-like-it", ""),
    ],
)
def test_an_unknown_configuration_suggests(name, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(ValueError) as error:
        read_config(name)
    before = f"configuration {name} does not exist, and linear_moe/configs has no such name"
    assert str(error.value).startswith(before + hint) and (hint or str(error.value) == before)


def test_several_mixers():
    """Each has a letter; options by letter; unused ones are not held to the layout."""
    argv = [*config_argv(MODEL), "--layer-pattern", "GMNG", "--mixer", '{"G": "gla", "M": "mamba2", "U": "deltanet"}']
    args = parse([*argv, "--mixer-args", '{"G": {"num_heads": 2}, "U": {"num_heads": 1}}'])
    args.tensor_model_parallel_size = 2
    check_arguments(args)
    options = layer_options(args)
    assert options.pattern.text == "G-M-*-G-" and list(options.linear) == ["G", "M"]
    names = {letter: choice.mixer.__name__ for letter, choice in options.linear.items()}
    assert names == {"G": "GatedLinearAttention", "M": "Mamba2"}
    assert [options.mixers[letter].config.num_heads for letter in "GMU"] == [2, 4, 1]


@pytest.mark.parametrize(
    ("mixer", "mixer_args", "message"),
    [
        ('{"N": "gla"}', "{}", r"capital letters other than N, E, D to mixers, but has \['N'\]"),
        ('{"E": "gla"}', "{}", r"capital letters other than N, E, D to mixers, but has \['E'\]"),
        ('{"gl": "gla"}', "{}", r"but has \['gl'\]"),
        ("{}", "{}", "capital letters other than N, E, D to mixers"),
        ('{"G": "gla"}', '{"num_heads": 2}', r"map their letters \(G\) to options, but has 'num_heads': 2"),
        ('{"G": "gla"}', "{}", r"unknown letters \['L'\]; allowed: G \(linear mixer\), N \(softmax attention\)"),
        ('{"L": "glaa"}', "{}", "unknown mixer 'glaa'; did you mean 'gla'"),
    ],
)
def test_several_mixers_that_cannot_be(mixer, mixer_args, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(parse([*config_argv(MODEL), "--mixer", mixer, "--mixer-args", mixer_args]))


def test_unknown_flag_suggests(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(MODEL))
    with pytest.raises(ValueError, match="unknown flag --num-layer; did you mean --num-layers"):
        expand_argv(["--config", str(path), "--num-layer", "3"])


@pytest.mark.parametrize(
    "text", ["head_dim=64", '{"head_dim": %s}' % ("[" * 99999), '{"head_dim": %s}' % ("1" * 5000)], ids=["=", "[", "1"]
)
def test_mixer_args_must_be_json(capsys, text):
    with pytest.raises(SystemExit):
        parse(["--mixer-args", text])
    assert 'write it as {"head_dim": 64}' in capsys.readouterr().err


def test_json_errors_say_where(capsys):
    with pytest.raises(SystemExit):
        parse(["--mixer-args", '{"mode": "a\nb"}'])
    assert "not JSON (Invalid control character, in column 12 of line 1); write it as" in capsys.readouterr().err


def test_patterns():
    assert expand_pattern("LLLN", 8) == "LLLNLLLN"
    assert expand_pattern("NLL", 3) == "NLL"
    with pytest.raises(
        ValueError, match=r"unknown letters \['X'\]; allowed: L \(linear mixer\), N \(softmax attention\)"
    ):
        expand_pattern("LLX", 6)
    with pytest.raises(
        ValueError, match=r"num_layers \(6\) must be a multiple of the length of layer_pattern 'LLLN' \(4\)"
    ):
        expand_pattern("LLLN", 6)


RESIDUAL = '--mixer rwkv7 --mixer-args {"value_residual":true}'


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mixer glaa", "unknown mixer 'glaa'; did you mean 'gla'"),
        ("--mixer GLA", r"unknown mixer 'GLA'; did you mean 'gla'\? Allowed: linear_attention, "),
        ("--mixer xyz", r"unknown mixer 'xyz'\. Allowed: linear_attention, "),
        *((f"--mixer {name}", "must be written as package.module:Class") for name in (":", ".x:y", ":Toy", "toy:")),
        ('--mixer-args {"nothing":1}', r"unknown mixer option 'nothing'\. GatedDeltaNet has: num_heads, "),
        ('--mixer-args {"norm_eps":-1}', "norm_eps must be a number above 0, but is -1"),
        ('--mixer-args {"norm_eps":NaN}', "norm_eps must be a number above 0, but is nan"),
        ("--layer-pattern=", r"layer_pattern '' is empty; it must have a letter a layer: L \(linear mixer\), G"),
        ("--num-layers 0", "num_layers must be at least 1, but is 0"),
        ("--hidden-size -1", "hidden_size must be at least 1, but is -1"),
        ("--mom-memories -1", r"mom_memories must be 0 \(no MoM\) or the number of memories, but is -1"),
        ("--mom-memories 2 --mom-balance-coeff nan", "mom_balance_coeff must be a number and not negative, but is nan"),
        ("--mom-memories 2 --mom-z-loss-coeff inf", "mom_z_loss_coeff must be a number and not negative, but is inf"),
        ("--mom-memories 2 --mom-topk 3", r"mom_topk \(3\) must be between 1 and mom_memories \(2\)"),
        (
            "--tensor-model-parallel-size 3",
            r"num_attention_heads \(4\) must be divisible by tensor_model_parallel_size \(3\)",
        ),
        (
            "--num-attention-heads 6 --hidden-size 36 --tensor-model-parallel-size 2 --group-query-attention "
            "--num-query-groups 3",
            r"num_query_groups \(3\) must be a multiple or a divisor of tensor_model_parallel_size \(2\)",
        ),
        *(
            (
                f"--group-query-attention --num-query-groups {n}",
                rf"groups \({n}\) must divide num_attention_heads \(4\)",
            )
            for n in (3, 8, 0, -2)
        ),
        (
            "--tensor-model-parallel-size 4 --padded-vocab-size 301",
            r"padded_vocab_size \(301\) must be divisible by tensor_model_parallel_size \(4\)",
        ),
        (
            '--tensor-model-parallel-size 4 --mixer-args {"num_heads":2}',
            r"mixer option num_heads \(2\) must be divisible by tensor_model_parallel_size \(4\)",
        ),
        ("--num-experts 3 --expert-model-parallel-size 2", r"num_experts \(3\) must be divisible by expert_model"),
        ("--num-experts 2 --tensor-model-parallel-size 2", "needs --sequence-parallel"),
        ("--context-parallel-size 2", "context_parallel_size .2. must be 1"),
        ("--reset-attention-mask", "use --dataloader-inter-document-masking"),
        (
            "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --no-overlap-p2p-communication",
            "batched p2p gives wrong gradients",
        ),
        (
            "--recompute-granularity selective --recompute-modules layernorm moe_act --transformer-impl local",
            r"recompute_modules \['layernorm', 'moe_act'\] need --transformer-impl transformer_engine",
        ),
        (
            "--dataloader-inter-document-masking --pipeline-model-parallel-size 2 --micro-batch-size 2",
            "packed sequences under pipeline parallelism need micro_batch_size 1, not 2",
        ),
        ("--train-iters 4 --lr-warmup-iters 20", r"lr_warmup_iters \(20\) must be below lr_decay_iters or train_iters"),
        (f"{RESIDUAL} --mom-memories 2", r"value_residual: mom_memories \(2\) must be 0"),
        (f"{RESIDUAL} --layer-pattern NL", r"value_residual: pattern \(\*-L-\*-L-\) must start with L"),
        (
            f"{RESIDUAL} --pipeline-model-parallel-size 2",
            r"value_residual: pipeline_model_parallel_size \(2\) must be 1",
        ),
        (
            f"{RESIDUAL} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            r"value_residual: recompute_granularity \(full\) must not be full",
        ),
        (
            "--multi-latent-attention --tensor-model-parallel-size 2 --transformer-impl local",
            "multi_latent_attention with tensor_model_parallel_size .2. above 1 needs --sequence-parallel",
        ),
        (
            "--multi-latent-attention --kv-lora-rank 33 --tensor-model-parallel-size 2 --sequence-parallel",
            r"kv_lora_rank \+ qk_pos_emb_head_dim \(97\) must be divisible by tensor_model_parallel_size \(2\)",
        ),
        (
            "--multi-latent-attention --qk-layernorm --transformer-impl local",
            "multi_latent_attention with qk_layernorm needs q_lora_rank",
        ),
        ('--mixer {"L":null}', r"mixer must map letters to names of mixers, but has \[None\]"),
        ('--mixer {"L":["gla"]}', r"mixer must map letters to names of mixers, but has \[\['gla'\]\]"),
        ('--mixer based --mixer-args {"head_dim":256}', "head_dim must be at most 64, but is 256"),
        ("--num-experts 2 --moe-layer-freq [0,1]", "moe_layer_freq must hold one 0 or 1 for each of the 4 layers"),
    ],
)
def test_what_does_not_fit_is_refused(flags, message):
    argv = config_argv(MODEL) + flags.split()
    with pytest.raises(ValueError, match=message):
        check_arguments(parse(argv))


def test_a_model_without_a_size_is_refused():
    with pytest.raises(ValueError, match=r"give --config NAME .*, or --num-layers, --hidden-size, --num-attention"):
        check_arguments(parse([]))


def test_help_lists_all_flags(capsys):
    """One of Megatron's help texts has a %, on which argparse fails."""
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "10%)." in said
    assert all(flag in said for flag in ("--mom-memories", "--mixer-args", "--tensor-model-parallel-size"))


def test_what_fits_passes():
    check_arguments(parse([*config_argv(MODEL), "--layer-pattern", "LN", "--mom-memories", "4"]))


def test_a_gpu_that_gets_wrong_code_is_refused_before_training(monkeypatch):
    def refuse():
        raise ValueError("wrong code")

    args = parse(config_argv(MODEL))
    monkeypatch.setattr(checks, "check_compiler", refuse)
    check_arguments(args)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="wrong code"):
        check_arguments(args)

"""The recall test bed: its examples, what it holds equal, what it refuses, its log, its report."""

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from linear_moe.evaluation import mqar, mqar_report
from linear_moe.evaluation.mqar import merge, parse_model, plan, sweep
from linear_moe.evaluation.mqar_report import best, plot, spread, table
from linear_moe.evaluation.mqar_size import layer_state, measure, with_parameters, with_state
from linear_moe.evaluation.mqar_task import Examples, Task
from linear_moe.evaluation.mqar_train import read_log
from linear_moe.mcore.attention import TorchAttention
from linear_moe.mcore.configs import read_config
from linear_moe.mcore.inference import InferenceContext, forward
from linear_moe.mcore.model import build_model

TASK = Task(64, (4, 8, 16), 64)
SMALL = {"num-layers": 2, "hidden-size": 16, "num-attention-heads": 2, "ffn-hidden-size": 16, "seq-length": 12}
SMALL |= {"max-position-embeddings": 12, "vocab-size": 32, "make-vocab-size-divisible-by": 1}
BUDGET = {"steps": 10, "batch_size": 4, "examples": 4, "processes": 1}
SWEEP = {"state_sizes": [], "lrs": [1e-3], "seeds": 1, "equal_parameters": False, "options": {}, **BUDGET}


# --- the examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", (TASK, Task(64, (16,), 40), Task(128, (1, 32), 257, power=1.0)), ids=str)
def test_every_answer_is_in_the_pairs_before(task, seed):
    for index in range(60):
        example = task.example("train", seed, index)
        tokens, P = example["tokens"], task.pairs[index % len(task.pairs)]
        keys, values = tokens[: 2 * P : 2], tokens[1 : 2 * P : 2]
        half = task.vocab_size // 2
        assert len(keys.unique()) == len(values.unique()) == P  # no duplicates, so an answer is the only one
        assert 0 < keys.min() and keys.max() < half <= values.min() and values.max() < task.vocab_size
        queries = example["loss_mask"].bool()
        assert not queries[: 2 * P].any() and queries.sum() == P
        answers = dict(zip(keys.tolist(), values.tolist()))
        assert sorted(tokens[queries].tolist()) == sorted(answers)  # every key once
        assert [answers[key] for key in tokens[queries].tolist()] == example["labels"][queries].tolist()
        assert not tokens[2 * P :][~queries[2 * P :]].any() and not example["labels"][~queries].any()
        assert example["position_ids"].tolist() == list(range(task.seq_length))


def test_gaps_follow_the_power_law(seed):
    """With one pair a query's place is one draw from the law."""
    for power in (0.01, 1.0):
        task = Task(22, (1,), 16, power)
        gaps = [(int(task.example("train", seed, i)["loss_mask"].argmax()) - 2) // 2 for i in range(4000)]
        law = np.arange(1, 11) ** (power - 1.0)
        found = np.bincount(gaps, minlength=10) / len(gaps)
        assert np.abs(found - law / law.sum()).max() < 0.04  # 5 standard deviations


def test_deterministic_fresh_and_held_out(seed):
    def drawn(split, seed, number=200):
        return [tuple(example["tokens"].tolist()) for example in Examples(TASK, split, seed, number)]

    train = drawn("train", seed)
    assert train == drawn("train", seed) and len(set(train)) == len(train)
    assert not set(train) & set(drawn("train", seed + 1))
    validation, test = drawn("validation", seed), drawn("test", seed)
    assert validation == drawn("validation", seed + 1) and test == drawn("test", seed + 1)  # one score for all runs
    assert not (set(train) | set(drawn("train", 0))) & set(validation + test) and not set(validation) & set(test)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, (17,), 64), r"seq_length \(64\) must be at least 4 times the pairs \(17\)"),
        ((64, (16,), 32), r"vocab_size \(32\) has 15 keys, too few for 16 pairs"),
        ((64, (1,), 1), "has 0 keys"),
        ((63, (4,), 64), "must be even"),
        ((64, (), 64), "pairs must be"),
        ((64, (4, 4), 64), "pairs must be different"),
        ((64, (0,), 64), "at least 1"),
        ((64, (4,), 64, 0.0), "power must be positive"),
    ],
)
def test_impossible_tasks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Task(*arguments)


# --- what is held equal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mom", ({}, {"mom-memories": 3}, {"mom-memories": 2, "mom-topk": 1, "mom-shared-memory": False})
)
@pytest.mark.parametrize("mixer", ("gated_deltanet", "gla", "mamba2", "based", "gsa", "rwkv6"))
def test_state_is_what_the_layer_carries(mixer, mom, seed):
    """Counted in what it keeps of sequences that are read."""
    model = build_model(SMALL | mom, mixer=mixer, layer_pattern="L").eval()
    layer, batch = model.decoder.layers[2], 3
    context = InferenceContext(batch, 12)
    forward(model, context, torch.zeros(1, 12 * batch, dtype=torch.long), [12] * batch)
    kept = dict(context.key_value_memory_dict[layer.layer_number].held)
    kept.pop("seen", None)
    state = sum(x.numel() for x in tree_leaves(kept.pop("rule")))
    tail = sum(x.numel() for x in tree_leaves(kept))
    assert (state, tail) == tuple(batch * n for n in layer_state(layer.self_attention, 12))


def test_softmax_keeps_keys_and_values(monkeypatch):
    groups = {"group-query-attention": True, "num-query-groups": 1}
    model = build_model(SMALL | groups, layer_pattern="N")
    seen, forward = [], TorchAttention.forward

    def counting(self, query, key, value, *rest, **options):
        seen.append(key[:, 0].numel() + value[:, 0].numel())
        return forward(self, query, key, value, *rest, **options)

    monkeypatch.setattr(TorchAttention, "forward", counting)
    model(torch.zeros(2, 12, dtype=torch.long), torch.arange(12).expand(2, 12), None)
    assert [layer_state(layer.self_attention, 12) for layer in model.decoder.layers[::2]] == [(n, 0) for n in seen]
    size = measure(SMALL | groups | {"layer-pattern": "N"})
    assert size.state == seen[0] and size.parameters == sum(p.numel() for p in model.parameters())


def test_hybrids_have_the_mean_over_their_layers():
    plain, softmax, both = (measure(SMALL | {"layer-pattern": pattern}) for pattern in ("L", "N", "LN"))
    assert both.state == (plain.state + softmax.state) / 2 and both.tail == plain.tail / 2


def test_equal_state_and_parameters():
    """MoM beside its mixer, whose heads are wider: within 3 % in both, as built."""
    task, words = Task(64, (4,), 64), ("gated_deltanet", "gated_deltanet+mom", "gla", "gla+mom", "softmax")
    runs = plan(words, task, **(SWEEP | {"state_sizes": [320, 1280], "equal_parameters": True}))
    sizes = {run["label"]: measure(run["config"]) for run in runs}
    for run in runs:
        assert {"state": run["state"], "parameters": run["parameters"]}.items() <= vars(sizes[run["label"]]).items()
    parameters = [size.parameters for size in sizes.values()]
    assert max(parameters) / min(parameters) < 1.01
    for numbers in (320, 1280):
        for mixer in ("gated_deltanet", "gla"):
            plain, mom = sizes[f"{mixer}@{numbers}"].state, sizes[f"{mixer}+mom@{numbers}"].state
            assert mom == numbers and abs(plain / mom - 1) < 0.03
    assert sizes["softmax"].state == 64 * 2 * 128  # tokens, keys and values, hidden size


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"gla with 5 memories cannot have a state of 700 .* the nearest is 640"):
        with_state(SMALL | {"mixer": "gla", "mom-memories": 4}, 700)
    with pytest.raises(ValueError, match="where all linear layers have one mixer"):
        with_state(SMALL | {"mixer": {"A": "gla", "B": "mamba2"}}, 640)
    with pytest.raises(ValueError, match="parameters"):  # one channel of these experts is too many parameters
        coarse = {"num-experts": 64, "moe-ffn-hidden-size": 1, "num-layers": 1, "swiglu": True}
        with_parameters({"a": SMALL | coarse, "b": SMALL | {"num-layers": 1, "ffn-hidden-size": 300}})


# --- the sweep -------------------------------------------------------------------------------------------------------


def test_models_are_named_in_words(tmp_path):
    name, config = parse_model("gla+mom{mom-memories: 8, mixer_args: {gate_rank: 4}}")
    assert name == "gla+mom" and (config["mixer"], config["mom-memories"], config["mom-topk"]) == ("gla", 8, 2)
    assert config["mixer-args"] == {"num_heads": 1, "conv_size": 4, "gate_rank": 4}
    assert parse_model("gla+mom-single-kv")[1] == parse_model("gla+mom{mom-single-kv: true}")[1]
    assert parse_model("top=softmax")[1]["layer-pattern"] == "N"
    file = tmp_path / "x.yaml"
    file.write_text("num-layers: 3\nmixer_args: {conv_size: 2}\n")
    name, config = parse_model(f"mine={file}{{mixer-args: {{num_heads: 1, norm_eps: 1e-6}}}}")
    assert name == "mine"
    assert config == {"num-layers": 3, "mixer-args": {"conv_size": 2, "num_heads": 1, "norm_eps": 1e-6}}
    assert merge({"a-b": 1}, {"a_b": 2}) == {"a-b": 2}
    assert parse_model("small=llama3/tiny{num-layers: 1}") == ("small", read_config("llama3/tiny") | {"num-layers": 1})
    assert parse_model("tiny")[1] == read_config("tiny")


@pytest.mark.parametrize(
    ("models", "changes", "message"),
    [
        (["gla{"], {}, "a model is"),
        (["gla{a: [}"], {}, "options .* is not valid YAML"),
        (["gla+mon"], {}, r"only \+mom or \+mom-single-kv may stand, not '\+mon'"),
        (["gla{num_heads: 3}"], {}, "unknown key 'num-heads'"),
        (["nowhere.yaml"], {}, "nowhere.yaml does not exist"),
        (["llama3/tinny"], {}, "llama3/tinny does not exist.*; did you mean llama3/tiny"),
        (["glaa"], {}, "unknown mixer 'glaa'; did you mean 'gla'"),
        (["gla", "gla"], {}, "two models are called 'gla'"),
        (["gla"], {"lrs": [0.0]}, "must be positive"),
        (["gla"], {"seeds": 0}, "must be positive"),
        (["gla"], {"steps": 9}, r"steps \(9\) must be at least 10"),
        (["gla"], {"processes": 3}, r"batch_size \(4\) divisible by processes \(3\)"),
        (["gla"], {"options": {"hiden-size": 3}}, "unknown key 'hiden-size'; did you mean 'hidden-size'"),
        (["gla+mom"], {"state_sizes": [660]}, "cannot have a state of 660"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(models, changes, message):
    with pytest.raises(ValueError, match=message):
        plan(models, TASK, **(SWEEP | changes))


def test_runs_differ_in_what_they_say(tmp_path):
    changes = {"lrs": [1e-3, 2e-3], "seeds": 3, "options": {"num-layers": 1}}
    runs = plan(["gla", "softmax"], TASK, **(SWEEP | changes))
    assert len({run["id"] for run in runs}) == len(runs) == 12
    assert runs == plan(["gla", "softmax"], TASK, **(SWEEP | changes))
    others = plan(["gla", "softmax"], TASK, **(SWEEP | changes | {"steps": 20}))
    assert not {run["id"] for run in runs} & {run["id"] for run in others}
    for run in runs:
        assert (run["config"]["lr"], run["config"]["seed"]) == (run["lr"], run["seed"])
        assert run["config"]["num-layers"] == 1


def test_log_is_read():
    log = """
 [2026-11-21 12:00:00] iteration        5/     10 | consumed samples: 80 | lm loss: 3.5E+00 | loss scale: 1.0 |
 tokens/s: 100 |
 [2026-11-21 12:00:00] iteration       10/     10 | consumed samples: 160 | lm loss: nan | loss scale: 1.0 |
 validation loss at iteration 10 on validation set | lm loss value: 2.0E+00 | lm loss PPL: 7E+00 | accuracy value: 0.5 \
| accuracy PPL: 1.6E+00 | accuracy/4 value: 7.5E-01 | accuracy/4 PPL: 2.1E+00 | accuracy/8 value: 2.5E-01 | x PPL: 1 |
"""
    found = read_log(log, (4, 8))
    assert found["loss_curve"][0] == [5, 3.5] and found["loss_curve"][1][0] == 10
    assert found["validation"] == {"loss": 2.0, "recall": 0.5, "recall_of": {"4": 0.75, "8": 0.25}}
    assert not found["test"]


def test_a_half_finished_sweep_goes_on(tmp_path, monkeypatch):
    """A run that fails or is killed leaves nothing that counts; those that have finished are not run again."""
    runs, trained = plan(["gla"], TASK, **(SWEEP | {"seeds": 3})), []

    def train(run, folder, slot):
        trained.append(run["seed"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.partial").write_text('{"half')  # of one killed while it wrote
        if run["seed"] == 2 and len(trained) == 2:
            raise RuntimeError("the machine went away")
        return {"test": run["seed"]}

    monkeypatch.setattr(mqar, "_train", train)
    with pytest.raises(RuntimeError, match="went away"):
        list(sweep(runs, tmp_path))
    assert 1 in trained and len(list(tmp_path.rglob("result.json"))) == len(trained) - 1
    before = len(trained)
    assert [result["test"] for result in sweep(runs, tmp_path)] == [1, 2, 3]
    assert sorted(trained) == sorted([1, 2, 3, 2]) and 1 not in trained[before:]
    assert [result["id"] for result in sweep(runs, tmp_path)] == [run["id"] for run in runs] and len(trained) == 4


def test_a_failed_run_says_why(tmp_path):
    runs = plan(["gla"], TASK, **SWEEP)
    runs[0]["config"]["hidden-size"] = 63
    with pytest.raises(RuntimeError, match="hidden_size"):
        list(sweep(runs, tmp_path))
    assert not list(tmp_path.rglob("result.json"))


# --- the report ------------------------------------------------------------------------------------------------------


def results():
    """Two learning rates, of which the second is better in validation and worse in the test."""
    found = []
    models = [("gla", "gla", 648, {}), ("gla", "gla", 2592, {}), ("gla+mom", "gla", 640, {"mom-memories": 4})]
    models.append(("softmax", None, 8192, {"layer-pattern": "N"}))
    for number, (model, mixer, state, config) in enumerate(models):
        for lr in (1e-3, 2e-3):
            for seed in (1, 2, 3):
                recall = (0.1 * seed + 0.1 * number) / (1 if lr == 1e-3 else 2)
                of = {"4": recall, "16": recall / 2}
                run = {
                    "label": f"{model}@{state}",
                    "model": model,
                    "state": state,
                    "tail": 1,
                    "parameters": 1000 + number,
                }
                run |= {"lr": lr, "seed": seed, "config": ({"mixer": mixer} if mixer else {}) | config}
                run |= {"task": {"seq_length": 64, "pairs": [4, 16], "vocab_size": 64, "power": 0.01}}
                run["validation"] = {"recall": lr}
                found.append(run | {"test": {"recall": recall, "recall_of": of}})
    return found


def test_learning_rate_is_chosen_on_the_validation_set():
    chosen = best(results())
    assert {run["lr"] for runs in chosen.values() for run in runs} == {2e-3} and all(
        len(r) == 3 for r in chosen.values()
    )
    mean, deviation = spread(chosen["gla@648"], 4)
    assert mean == pytest.approx(0.1) and deviation == pytest.approx(0.05)  # of 0.05, 0.10, 0.15; over n - 1


def test_table_has_sizes_means_and_deviations():
    lines = table(results()).splitlines()
    assert "differ by 0.3% in parameters" in lines[0]
    assert lines[2] == "| model | state | tails | parameters | lr | seeds | 4 pairs | 16 pairs |"
    assert lines[4] == "| gla | 648 | 1 | 1,000 | 0.002 | 3 | 10.0 ± 5.0 | 5.0 ± 2.5 |"
    assert len(lines) == 8


def test_picture_shows_recall_against_state_size(tmp_path, monkeypatch):
    plt, figures = mqar_report._pyplot(), []
    monkeypatch.setattr(plt, "close", figures.append)  # the figure is looked at before it goes
    plot(results(), tmp_path / "mqar.png")
    assert (tmp_path / "mqar.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == ["4 pairs", "16 pairs"]
    for axes, of in zip(figure.axes, (1, 2)):
        plain, mom = (axes.containers[i].lines for i in (0, 1))
        assert plain[0].get_xdata().tolist() == [648, 2592] and mom[0].get_xdata().tolist() == [640]
        assert plain[0].get_ydata() == pytest.approx(np.array([0.1, 0.15]) / of)
        (bars,) = plain[2]  # the error bars
        assert np.diff([segment[:, 1] for segment in bars.get_segments()]) == pytest.approx(0.1 / of)
        assert plain[0].get_color() == mom[0].get_color() and plain[0].get_marker() != mom[0].get_marker()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(legend) == ["chance", "gla", "gla+mom", "softmax (KV cache: 8,192)"]
    ceiling = {line.get_label(): line.get_ydata()[0] for line in figure.axes[0].lines}
    assert ceiling["softmax (KV cache: 8,192)"] == pytest.approx(0.25) and ceiling["chance"] == 1 / 32
    plt.close(figure)

"""Recall runs (`linear-moe evaluate mqar`): models x state sizes x learning rates x seeds, a process each."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import queue
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from linear_moe.evaluation.mqar_report import plot, require_matplotlib, table
from linear_moe.evaluation.mqar_size import measure, with_parameters, with_state
from linear_moe.evaluation.mqar_task import Task
from linear_moe.evaluation.mqar_train import read_log, run_config
from linear_moe.mcore.configs import packaged, read_config
from linear_moe.mcore.yaml_text import parse_yaml

# What a mixer's name alone stands for: two layers, with short convolutions (a key must meet its value).
BASE = {
    "num-layers": 2,
    "hidden-size": 128,
    "num-attention-heads": 2,
    "ffn-hidden-size": 64,
    "position-embedding-type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable-bias-linear": True,
    "untie-embeddings-and-output-weights": True,
    "hidden-dropout": 0.0,
    "attention-dropout": 0.0,
    "init-method-std": 0.05,
    "embedding-init-method-std": 0.3,
    "weight-decay": 0.1,
    "clip-grad": 1.0,
    "adam-beta1": 0.9,
    "adam-beta2": 0.95,
    "layer-pattern": "L",
    "mixer-args": {"num_heads": 1, "conv_size": 4},
}
MOM = {"mom-memories": 4, "mom-topk": 2}
SUFFIXES = {"+mom": MOM, "+mom-single-kv": MOM | {"mom-single-kv": True}}


def parse_model(word: str) -> tuple[str, dict[str, object]]:
    """``[NAME=]BASE[{key: value, ...}]`` -> its name and configuration.

    BASE is a mixer (in the model above), a mixer and ``+mom`` (4 memories, top-2, a shared one) or ``+mom-single-kv``
    (the same with one set of write projections), ``softmax``, or a configuration: a YAML file or the name of a packaged
    one, such as ``llama3/tiny``. What stands in braces, in YAML, are Megatron's and our arguments, and wins; mixer-args
    add to those that are there.

    Raises:
        ValueError: another form, or a file that does not exist.
    """
    match = re.fullmatch(r"(?:([^={}]+)=)?([^={}]+)(\{.*\})?", word, re.DOTALL)
    if not match:
        raise ValueError(
            "a model is [NAME=]MIXER, MIXER+mom, MIXER+mom-single-kv, softmax or CONFIGURATION, then {key: value}, "
            f"not {word!r}"
        )
    name, base, own = match[1] or match[2], match[2], parse_options(match[3] or "{}")
    if base.endswith((".yaml", ".yml")) or "/" in base or base in packaged():
        return name, merge(read_config(base), own)
    if base == "softmax":
        return name, merge(BASE | {"layer-pattern": "N"}, own)
    mixer, plus, rest = base.partition("+")
    if plus + rest not in ("", *SUFFIXES):
        raise ValueError(f"behind a mixer only {' or '.join(SUFFIXES)} may stand, not {plus + rest!r}")
    return name, merge(BASE | {"mixer": mixer} | SUFFIXES.get(plus + rest, {}), own)


def parse_options(text: str) -> dict[str, object]:
    """A YAML mapping of arguments.

    Raises:
        ValueError: anything else.
    """
    options = parse_yaml(text, f"options {text!r}")
    if not isinstance(options, dict):
        raise ValueError(f"options are a YAML mapping such as {{num-layers: 4}}, not {text!r}")
    return options


def merge(config: Mapping[str, object], more: Mapping[str, object]) -> dict[str, object]:
    """`more` over `config`, with keys as on the command line; mixer-args key by key."""
    merged, more = ({str(key).replace("_", "-"): value for key, value in side.items()} for side in (config, more))
    if "mixer-args" in merged and "mixer-args" in more:
        more["mixer-args"] = {**merged["mixer-args"], **more["mixer-args"]}
    return merged | more


def plan(
    models: Sequence[str],
    task: Task,
    *,
    state_sizes: Sequence[int],
    lrs: Sequence[float],
    seeds: int,
    equal_parameters: bool,
    options: Mapping[str, object],
    **budget: int,
) -> list[dict[str, object]]:
    """Every run of the sweep: label, model, sizes, lr, seed, task, config, and an id that is a function of them.

    Each model is built to be measured, so what it refuses is refused here. `options` hold for all models, over what a
    model's own words say. budget: steps, batch_size, examples, processes, see `run_config`.

    Raises:
        ValueError: models, sizes or options that do not fit together.
    """
    if min(seeds, *budget.values(), *lrs, *state_sizes) <= 0:
        raise ValueError(
            "seeds, steps, batch size, examples, processes, learning rates and state sizes must be positive"
        )
    if budget["steps"] < 10 or budget["batch_size"] % budget["processes"]:
        raise ValueError(
            f"steps ({budget['steps']}) must be at least 10, and batch_size ({budget['batch_size']}) divisible by "
            f"processes ({budget['processes']})"
        )
    configs, names = {}, {}
    for word in models:
        name, config = parse_model(word)
        config = merge(config | run_config(task, lr=lrs[0], seed=1, **budget), options)
        linear = set(config.get("layer-pattern", "L")) - {"N"}
        for numbers in state_sizes if linear and state_sizes else (None,):
            label = name if numbers is None else f"{name}@{numbers}"
            if label in configs:
                raise ValueError(f"two models are called {name!r}: write NAME={word}")
            configs[label], names[label] = config if numbers is None else with_state(config, numbers), name
    if equal_parameters:
        configs = with_parameters(configs)
    runs = []
    for label, config in configs.items():
        size = asdict(measure(config))
        for lr, seed in itertools.product(lrs, range(1, seeds + 1)):
            own = {**config, "lr": lr, "min-lr": lr / 100, "seed": seed}
            run = {"label": label, "model": names[label], **size, "lr": lr, "seed": seed}
            run |= {"task": asdict(task), "processes": budget["processes"], "config": own}
            digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:10]
            runs.append({"id": f"{label}-lr{lr:g}-seed{seed}-{digest}", **run})
    return runs


def sweep(runs: Sequence[Mapping[str, object]], output: Path, jobs: int = 1) -> Iterator[dict[str, object]]:
    """Runs what has no result in `output` yet, `jobs` at a time, and yields each run with its result, in order.

    A run has the folder runs/<id>: run.json, log.txt (all that Megatron said) and, once it has finished, result.json.

    Raises:
        RuntimeError: a run that failed; its log's end. Those that are under way finish first.
    """
    slots: queue.Queue = queue.Queue()
    for slot in range(jobs):
        slots.put(slot)

    def one(run):
        folder = output / "runs" / re.sub(r"[^\w.+@-]", "_", run["id"])
        result = folder / "result.json"
        if not result.exists():
            slot = slots.get()
            try:
                found = _train(run, folder, slot)
            finally:
                slots.put(slot)
            partial = result.with_suffix(".partial")  # a result is there as a whole or not at all
            partial.write_text(json.dumps(found))
            partial.replace(result)
        return {**run, **json.loads(result.read_text())}

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, runs)


def _train(run: Mapping[str, object], folder: Path, slot: int) -> dict[str, object]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run, indent=1))
    module = ["-m", "linear_moe.evaluation.mqar_train", str(folder / "run.json")]
    if run["processes"] > 1:
        module = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run['processes']}", *module]
    # This process has been one of a torch.distributed world, to measure the models.
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= _devices(slot, run["processes"])
    start, log = time.monotonic(), folder / "log.txt"
    with open(log, "w") as file:
        status = subprocess.run([sys.executable, *module], env=environment, stdout=file, stderr=subprocess.STDOUT)
    found = read_log(log.read_text(), tuple(run["task"]["pairs"]))
    if status.returncode or not found["test"]:
        raise RuntimeError(f"{''.join(deque(open(log), maxlen=20))}\n{run['id']} failed; all it said: {log}")
    return found | {"seconds": time.monotonic() - start}


def _devices(slot: int, processes: int) -> dict[str, str]:
    """The environment that gives a job GPUs of its own, as far as there are enough."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if not torch.cuda.is_available():
        return {}
    own = [gpus[(slot * processes + i) % len(gpus)] for i in range(processes)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}


def mqar(
    models: Sequence[str],
    *,
    seq_length: int,
    pairs: Sequence[int],
    vocab_size: int,
    power: float,
    options: str,
    output: Path,
    jobs: int,
    **budget,
) -> None:
    """Plans and runs a sweep; writes results.jsonl, mqar.md and mqar.png to `output`, and prints the table.

    Raises:
        ValueError: before any work, as `Task` and `plan`. ImportError: no matplotlib. RuntimeError: as `sweep`.
    """
    task = Task(seq_length, tuple(pairs), vocab_size, power)
    require_matplotlib()
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, but is {jobs}")
    runs = plan(models, task, options=parse_options(options), **budget)
    output.mkdir(parents=True, exist_ok=True)
    results = []
    with open(output / "results.jsonl", "w") as file:
        for number, result in enumerate(sweep(runs, output, jobs), 1):
            results.append(result)
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(f"{number}/{len(runs)} {result['id']}: recall {result['test']['recall']:.3f}", flush=True)
    text = table(results)
    (output / "mqar.md").write_text(text)
    plot(results, output / "mqar.png")
    print(f"\n{text}\n{output / 'mqar.png'}")

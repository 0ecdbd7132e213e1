"""Every mixer in every base model: which cells there are, one model for each base model that holds all mixers, and
README's table of them.

    python -m tests.parallel.matrix    # writes the table into README.md
"""

import string
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from linear_moe.mcore.configs import CONFIGS, read_config
from linear_moe.mcore.pattern import RESERVED
from linear_moe.ssm import MIXERS
from tests.parallel import harness
from tests.parallel.launch import Case, Outcome, run_cases

ROOT = Path(__file__).resolve().parents[2]
BASES = sorted(path.parent.name for path in CONFIGS.glob("*/tiny_mom.yaml"))
FORMS = ("tiny", "tiny_hybrid", "tiny_mom")  # every layer linear; with softmax layers; and with memories
MIXED_FORMS = FORMS[1:]
CELLS = [(mixer, base) for mixer in MIXERS for base in BASES]
LETTERS = dict(zip(MIXERS, (letter for letter in string.ascii_uppercase if letter not in RESERVED)))
CORPUS = "corpus"
BEGIN, END = "<!-- mixers x base models -->\n", "<!-- end -->\n"

TP2_SP = "--tensor-model-parallel-size 2 --sequence-parallel".split()
PP2 = "--pipeline-model-parallel-size 2".split()
EP2 = "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1".split()
# The initial values make the gradients of queries and keys large enough to be told from rounding; Adam's epsilon keeps
# it from blowing rounding up where gradients vanish.
SHORT = """--seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 2
    --init-method-std 0.04 --lr 2e-3 --min-lr 2e-3 --lr-warmup-iters 0 --lr-decay-iters 10 --adam-eps 1e-4
    --log-interval 1 --eval-iters 0 --eval-interval 1000 --split 100,0,0 --tokenizer-type NullTokenizer
    --vocab-size 127 --make-vocab-size-divisible-by 32 --distributed-timeout-minutes 1 --seed 1234""".split()


def config_file(base: str, form: str) -> str:
    return str(CONFIGS / base / f"{form}.yaml")


def tp2(base: str) -> list[str]:
    """Tensor and sequence parallelism, and expert parallelism where there are experts, in two processes."""
    return TP2_SP + (EP2 if "num-experts" in read_config(config_file(base, FORMS[0])) else [])


def mixed(base: str, form: str) -> dict[str, object]:
    """A form of a base model whose linear layers have one mixer each, all of them, and a softmax layer between them."""
    letters = [LETTERS[mixer] for mixer in MIXERS]
    letters.insert(len(letters) // 2, "N")
    own = read_config(config_file(base, form))
    changes = {"mixer": {letter: mixer for mixer, letter in LETTERS.items()}}
    changes["mixer-args"] = {LETTERS[own["mixer"]]: own.get("mixer-args", {})}
    changes |= {"layer-pattern": "".join(letters), "num-layers": len(letters), "hidden-size": 32}
    dense_first = own.get("moe-layer-freq")
    if dense_first:
        changes["moe-layer-freq"] = dense_first[:1] + [1] * (len(letters) - 1)
    return changes


def layer_of(mixer: str, base: str) -> int:
    """The layer of ``mixed`` that has this mixer."""
    return str(mixed(base, FORMS[0])["layer-pattern"]).index(LETTERS[mixer])


def corpus(folder: Path) -> None:
    """One document that steps through 31 tokens, always the same way: each sample has them all, and teaches them."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    tokens = (7 * np.arange(1200) % 31).astype(np.uint16)
    prefix = folder / CORPUS
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def train(config: str, flags: list[str], data: str, save: str, load: str | None = None):
    """A case of launch.py: train a configuration up to the second iteration, with a checkpoint after each.

    load: start from the first checkpoint there.
    """
    from linear_moe.mcore.pretrain import main

    argv = ["--config", config, *SHORT, "--data-path", data, *flags]
    argv += ["--train-iters", "2", "--save-interval", "1"]
    return harness.train(main, argv + (["--load", load, "--ckpt-step", "1"] if load else []), save)


def run_all(processes: int, name: str, models: dict, folder: Path, load: str | None = None) -> dict[object, Outcome]:
    """Trains models, {key: (configuration file, flags)}, for two iterations from the data that ``corpus`` wrote.

    Of single processes two sets at a time. Checkpoints go to a folder of that name for each; load: the name that an
    earlier call had, from whose first checkpoints these go on.
    """

    def place(name: str, key) -> str:
        return str(folder / "-".join([name, *((key,) if isinstance(key, str) else key)]))

    cases = []
    for key, (config, flags) in models.items():
        paths = {"data": str(folder / CORPUS), "save": place(name, key), "load": load and place(load, key)}
        arguments = {"config": config, "flags": flags, **paths}
        cases.append(Case(key, "tests.parallel.matrix:train", arguments))
    halves = [cases[::2], cases[1::2]] if processes == 1 else [cases]
    with ThreadPoolExecutor() as pool:
        outcomes = pool.map(partial(run_cases, processes), halves)
        return {key: outcome for half in outcomes for key, outcome in half.items()}


def of_layer(lines, layer: int) -> list:
    """What is said of a letter of --layer-pattern: two layers, the second of them its feed-forward."""
    names = [f"decoder.layers.{2 * layer + half}." for half in (0, 1)]
    return [line for line in lines if any(name in line for name in names)]


def part(run: harness.Run, last: int, first: int = 1) -> harness.Run:
    """The iterations of a run from the first to the last, with the checkpoint after that one."""
    chosen = [run.iterations.index(iteration) for iteration in range(first, last + 1)]
    lists = {name: [getattr(run, name)[i] for i in chosen] for name in ("losses", "grad_norms")}
    found = replace(run, **lists, figures=[run.figures[i] for i in chosen] if run.figures else [])
    found.tensors = harness.read_checkpoint(run.save, last, without="exp_avg_sq")  # which no comparison looks at
    return found


def table() -> str:
    """README's table: a tick for every cell, each of which is a test."""
    lines = [f"| | {' | '.join(f'`{base}`' for base in BASES)} |", "|---|" + ":-:|" * len(BASES)]
    for mixer in MIXERS:
        lines.append(f"| `{mixer}` | {' | '.join('✓' for _ in BASES)} |")
    return "\n".join(lines) + "\n"


def readme_parts() -> tuple[str, str, str]:
    """README before the table, the table, and README behind it."""
    before, found, rest = (ROOT / "README.md").read_text().partition(BEGIN)
    inside, end, after = rest.partition(END)
    assert found and end, f"README.md lacks {BEGIN!r} or {END!r}"
    return before + BEGIN, inside, END + after


if __name__ == "__main__":
    start, _, rest = readme_parts()
    (ROOT / "README.md").write_text(start + table() + rest)

"""make demo: from the Python standard library's source to a trained, resumed, looked-at hybrid model; no download."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import torch

from linear_moe.data.text import split_files, stdlib_files, stdlib_root
from linear_moe.data.tokenizer import train_bpe
from linear_moe.evaluation.bigram import bigram_loss, bits_per_byte
from linear_moe.evaluation.plots import plot_loss, plot_memories, read_scalars
from linear_moe.mcore.preprocess import load_documents, preprocess

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "demo", help="where everything is written")
    parser.add_argument("--minutes", type=int, default=7, help="how long to train in all, at least 2")
    parser.add_argument("--max-iters", type=int, default=2000, help="at most this many steps, on a fast machine")
    parser.add_argument("--processes", type=int, default=0, help="0: one a GPU, at most 2; 2 without a GPU")
    args = parser.parse_args()
    folder, checkpoints, logs = args.folder, args.folder / "checkpoints", args.folder / "tensorboard"
    if (checkpoints / "latest_checkpointed_iteration.txt").exists():
        sys.exit(
            f"{checkpoints} holds a finished demo: remove {folder} (or its checkpoints and tensorboard) to train anew"
        )

    corpus, baseline = prepare(folder)
    first_minutes = max(1, args.minutes // 3)
    print(f"\n2. Train for {first_minutes} minutes, save a checkpoint, and stop", flush=True)
    started = time.monotonic()
    train(args, folder, ["--train-iters", args.max_iters, "--exit-duration-in-mins", first_minutes])
    first = int((checkpoints / "latest_checkpointed_iteration.txt").read_text())
    speed = first / (time.monotonic() - started)
    total = min(args.max_iters, first + int(speed * 60 * (args.minutes - first_minutes)))
    print(f"\n3. Resume from iteration {first} and train to {total}", flush=True)
    if total > first:
        train(args, folder, ["--train-iters", total, "--override-opt-param-scheduler"])

    print("\n4. Look at it")
    scalars = read_scalars(logs)
    loss = float(scalars["lm loss validation"][1][-1])
    tokens_per_second = scalars["tokens-per-second"][1]
    plot_loss(logs, folder / "loss.png", baseline=baseline.nats_per_token)
    plot_memories(logs, folder / "memories.png")
    for name, nats in (("smoothed bigram", baseline.nats_per_token), ("this model", loss)):
        bits = bits_per_byte(nats, corpus["tokens"], corpus["bytes"])
        print(f"   {name:16s} {nats:.4f} nats a token, {bits:.3f} bits per byte on the validation files")
    print(f"   {sorted(tokens_per_second)[len(tokens_per_second) // 2]:.0f} tokens/s (median)")
    print(f"   loss curve: {folder / 'loss.png'}\n   what each memory received: {folder / 'memories.png'}")
    print(f"   TensorBoard: {Path(sys.executable).parent / 'tensorboard'} --logdir {logs}")
    verdict = "below" if loss < baseline.nats_per_token else "NOT below"
    print(f"   The validation loss is {verdict} the bigram's.")
    print(
        "\nTry next: another mixer or no MoM at all, in a folder of its own\n"
        "   torchrun --nproc-per-node 2 examples/pretrain.py --config examples/configs/demo.yaml \\\n"
        f"     --train-data-path {folder}/train --valid-data-path {folder}/valid --tokenizer-model {folder}/bpe \\\n"
        "     --train-iters 300 --mixer gla --mom-memories 0\n"
        "your own text: tools/preprocess_data.py --help; all flags: examples/pretrain.py --help"
    )
    if loss >= baseline.nats_per_token:
        sys.exit(1)


def prepare(folder: Path):
    """Tokenizer, data files and bigram of the corpus; the validation file's counts and the BigramResult."""
    train_files, validation_files = split_files(stdlib_files(), stdlib_root(), validation=0.01)
    if not (folder / "valid.json").exists():
        print(f"1. Corpus: {len(train_files)} + {len(validation_files)} files of {stdlib_root()}", flush=True)
        train_bpe(train_files, VOCABULARY, folder / "bpe")
        preprocess(train_files, folder / "bpe", folder / "train")
        preprocess(validation_files, folder / "bpe", folder / "valid")
    counts = json.loads((folder / "valid.json").read_text())
    baseline = bigram_loss(load_documents(folder / "train"), load_documents(folder / "valid"), VOCABULARY)
    print(f"   {counts['tokens']} validation tokens; a smoothed bigram has {baseline.nats_per_token:.4f} nats a token")
    return counts, baseline


def train(args, folder: Path, flags: list) -> None:
    """examples/pretrain.py under torchrun, in as many processes as the machine has use for; its output to train.log."""
    gpus = torch.cuda.device_count()
    processes = args.processes or (min(gpus, 2) if gpus else 2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command += [ROOT / "examples" / "pretrain.py", "--config", ROOT / "examples" / "configs" / "demo.yaml"]
    command += ["--train-data-path", folder / "train", "--valid-data-path", folder / "valid"]
    command += ["--tokenizer-model", folder / "bpe", "--tensorboard-dir", folder / "tensorboard"]
    command += ["--save", folder / "checkpoints", "--load", folder / "checkpoints", "--save-interval", 100000]
    command += ["--expert-model-parallel-size", processes, *(["--bf16"] if gpus else []), *flags]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    last = deque(maxlen=40)
    with (
        open(folder / "train.log", "a") as log,
        subprocess.Popen(
            list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as child,
    ):
        for line in child.stdout:
            log.write(line)
            last.append(line)
            if step := re.search(r"iteration +(\d+)/.*lm loss: (\S+)", line):
                print(f"   iteration {step[1]}: loss {float(step[2]):.4f}", flush=True)
            elif re.match(r" tokens/s| validation loss at|.*(loading|saving) checkpoint", line):
                print("     ", line.strip(" |\n"), flush=True)
    if child.returncode:
        sys.exit(f"{''.join(last)}\ntraining failed with exit code {child.returncode}; all it said: {folder}/train.log")


if __name__ == "__main__":  # tokenizing and checkpointing start this module again in processes of their own
    main()

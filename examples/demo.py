"""make demo: from the Python standard library's source to a trained, resumed, looked-at hybrid model; no download."""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections import deque
from pathlib import Path

# Nothing heavy here: the processes that tokenize import this module again.
from linear_moe.data.text import split_files, stdlib_files, stdlib_root

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, SEQUENCE, BATCH = 512, 256, 16  # the last two as in demo.yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "demo", help="where everything is written")
    parser.add_argument("--minutes", type=int, default=6, help="how long to train in all, at least 2")
    parser.add_argument("--max-iters", type=int, default=2000, help="at most this many steps, on a fast machine")
    parser.add_argument("--processes", type=int, default=0, help="0: one a GPU, at most 2; 2 without a GPU")
    args = parser.parse_args()
    folder, plan = args.folder, args.folder / "iterations.txt"
    corpus, baseline = prepare(folder)
    if not iteration(folder):
        minutes = max(1, args.minutes // 3)
        print(f"\n2. Train for {minutes} minutes, save a checkpoint, and stop", flush=True)
        train(args, folder, ["--train-iters", args.max_iters, "--exit-duration-in-mins", minutes])
        seconds = 60 * (args.minutes - minutes)
        steps = int(seconds * tokens_per_second(folder) / (SEQUENCE * BATCH))
        plan.write_text(str(min(args.max_iters, iteration(folder) + steps)))
    total = int(plan.read_text()) if plan.exists() else args.max_iters
    if iteration(folder) < total:
        print(f"\n3. Resume from iteration {iteration(folder)} and train to {total}", flush=True)
        train(args, folder, ["--train-iters", total, "--override-opt-param-scheduler"])
    print("\n4. Evaluate on the validation tokens, each once (whole batches of them)", flush=True)
    once = (corpus["tokens"] - 1) // SEQUENCE // BATCH
    loss = train(args, folder, ["--train-iters", total, "--skip-train", "--eval-iters", once])
    status = show(folder, corpus, baseline, loss)
    sample(folder)
    sys.exit(status)


def iteration(folder: Path) -> int:
    """Of the last checkpoint; 0 if there is none."""
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def tokens_per_second(folder: Path) -> float:
    from linear_moe.evaluation.plots import read_scalars

    return statistics.median(read_scalars(folder / "tensorboard")["tokens-per-second"][1])


def show(folder: Path, corpus: dict, baseline, loss: float) -> int:
    """Pictures, numbers and what to try next; the exit status: 0 if the model is better than the bigram."""
    from linear_moe.evaluation.bigram import bits_per_byte
    from linear_moe.evaluation.plots import plot_loss, plot_memories

    print("\n5. Look at it")
    logs = folder / "tensorboard"
    plot_loss(logs, folder / "loss.png", baseline=baseline.nats_per_token)
    plot_memories(logs, folder / "memories.png")
    for name, nats in (("smoothed bigram", baseline.nats_per_token), ("this model", loss)):
        bits = bits_per_byte(nats, corpus["tokens"], corpus["bytes"])
        print(f"   {name:16s} {nats:.4f} nats a token, {bits:.3f} bits per byte on the validation files")
    better, programs = loss < baseline.nats_per_token, Path(sys.executable).parent
    print(
        f"   The validation loss is {'' if better else 'NOT '}below the bigram's.\n"
        f"   {tokens_per_second(folder):.0f} tokens/s (median)\n"
        f"   loss curve: {folder / 'loss.png'}\n   what each memory received: {folder / 'memories.png'}\n"
        f"   TensorBoard: {programs / 'tensorboard'} --logdir {logs}\n\n"
        "Try next: another mixer, or no MoM at all\n"
        f"   {programs / 'torchrun'} --nproc-per-node 2 -m linear_moe pretrain \\\n"
        f"     --config demo --tokenizer-model {folder}/bpe \\\n"
        f"     --train-data-path {folder}/train --valid-data-path {folder}/valid \\\n"
        "     --train-iters 200 --mixer gla --mom-memories 0\n"
        f"more of what it writes: {programs / 'linear-moe'} generate --load {folder}/checkpoints\n"
        f"your own text: {programs / 'linear-moe'} preprocess --help; all flags: pretrain --help\n"
        f"this demo once more: remove {folder}"
    )
    return 0 if better else 1


def sample(folder: Path) -> None:
    """What the model writes."""
    print("\n6. What it writes behind `def `", flush=True)
    words = [sys.executable, "-m", "linear_moe", "generate", "--load", str(folder / "checkpoints"), "--prompt", "def "]
    subprocess.run([*words, *"--max-new-tokens 200 --temperature 0.7 --top-p 0.95 --seed 1".split()], check=True)


def prepare(folder: Path):
    """Tokenizer, data files and bigram of the corpus; the validation file's counts and the BigramResult."""
    from linear_moe.data.tokenizer import train_bpe
    from linear_moe.evaluation.bigram import bigram_loss
    from linear_moe.mcore.preprocess import load_documents, preprocess

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


def command(args, folder: Path, flags: list) -> list[str]:
    """linear-moe pretrain under torchrun, in as many processes as the machine has use for."""
    import torch

    gpus = torch.cuda.device_count()
    processes = args.processes or (min(gpus, 2) if gpus else 2)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    words += ["-m", "linear_moe", "pretrain", "--config", "demo"]
    words += ["--train-data-path", folder / "train", "--valid-data-path", folder / "valid"]
    words += ["--tokenizer-model", folder / "bpe"]
    words += [] if "--skip-train" in flags else ["--tensorboard-dir", folder / "tensorboard"]
    words += ["--save", folder / "checkpoints", "--load", folder / "checkpoints", "--save-interval", 100000]
    words += ["--expert-model-parallel-size", processes, *(["--bf16"] if gpus else []), *flags]
    return list(map(str, words))


def train(args, folder: Path, flags: list) -> float:
    """Run `command`: its progress is shown, all of its output goes to train.log. Returns the last validation loss."""
    words = command(args, folder, flags)
    processes = int(words[words.index("--nproc-per-node") + 1])
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    last, validation = deque(maxlen=40), math.nan
    with (
        open(folder / "train.log", "a") as log,
        subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child,
    ):
        for line in child.stdout:
            log.write(line)
            last.append(line)
            if step := re.search(r"iteration +(\d+)/.*lm loss: (\S+)", line):
                print(f"   iteration {step[1]}: loss {float(step[2]):.4f}", flush=True)
                if figures := re.search(r"tokens/s: .*", line):
                    print("     ", figures[0].strip(" |"), flush=True)
            elif re.match(r" validation loss at| (loaded|saved) checkpoint", line):
                print("     ", line.strip(" |\n"), flush=True)
            if found := re.search(r"validation loss at .*lm loss value: (\S+)", line):
                validation = float(found[1])
    if child.returncode:
        sys.exit(f"{''.join(last)}\ntraining failed with exit code {child.returncode}; all it said: {folder}/train.log")
    return validation


if __name__ == "__main__":  # tokenizing and checkpointing start this module again in processes of their own
    main()

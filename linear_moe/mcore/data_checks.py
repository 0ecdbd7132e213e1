"""What is refused of the data's flags and files, before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split
from megatron.training.utils import get_blend_and_blend_per_split

from linear_moe.mcore.preprocess import check_dataset

BLEND = "in a blend give every prefix a weight before it (0.3 a 0.7 b), or none (a b)"
DEFAULT_SPLIT = "969, 30, 1"  # Megatron's, of a --data-path without --split


@dataclass(frozen=True)
class Source:
    """Where one of the three sets comes from. prefixes: of .bin and .idx files, or chats with --sft; weights: one each,
    or None. split: what cuts the files into the three sets, or None where they are whole.
    """

    prefixes: list[str]
    weights: list[float] | None
    split: str | None


def data_sources(args) -> dict[str, Source]:
    """Where the sets "training", "validation" and "test" come from; a set without data is left out.

    Raises:
        ValueError: flags, files of flags or a --split that cannot be read.
    """
    try:
        blend, per_set = get_blend_and_blend_per_split(args)
    except AssertionError as error:
        raise ValueError(f"give one source of data (--data-path, or a path for each set); {BLEND}") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the data's paths cannot be read ({type(error).__name__}: {error})") from error
    split, shares = None, [1.0] * 3
    if blend:
        split = args.split or DEFAULT_SPLIT
        per_set, shares = [blend] * 3, _shares(split)
    sets = zip(("training", "validation", "test"), per_set or [None] * 3, shares)
    return {name: Source(*one, split) for name, one, share in sets if one and share}


def _shares(split: str) -> list[float]:
    try:
        with np.errstate(invalid="ignore"):
            shares = parse_and_normalize_split(split)
    except (AssertionError, ValueError, ZeroDivisionError):
        shares = [math.nan]
    if not np.isfinite(shares).all():
        raise ValueError(f"--split {split} must be up to three numbers, not all 0: of training, validation and test")
    return list(shares)


def check_data(args) -> None:
    """Refuse data that is missing, damaged, too small, or not what the flags take it for.

    Raises:
        ValueError: naming the flag or the file and what is wrong with it.
    """
    if args.full_validation != args.multiple_validation_sets:
        raise ValueError(
            "--full-validation and --multiple-validation-sets must be given together (one validation set is enough)"
        )
    if args.mock_data:
        return
    sources = data_sources(args)
    if not sources:
        raise ValueError("no data: give --data-path PREFIX (linear-moe preprocess makes one) or --mock-data")
    _check_sets(args, sources)
    for source in sources.values():
        _check_blend(source)
    if args.full_validation and "validation" in sources and sources["validation"].weights:
        raise ValueError("--full-validation reads every validation set once: give the sets without weights")
    if args.sft:
        _check_chats(args, sources)
    else:
        for prefix, split in dict.fromkeys((p, source.split) for source in sources.values() for p in source.prefixes):
            check_dataset(prefix, args.seq_length, split=split)


def _check_sets(args, sources: dict[str, Source]) -> None:
    splits = [f"--split {source.split}" for source in sources.values() if source.split]
    given = splits[0] if splits else f"only {' and '.join(sources)} data"
    if "validation" not in sources and (args.eval_iters or args.full_validation):
        raise ValueError(
            f"no validation set ({given}): give one (--valid-data-path, or a share of --split), or --eval-iters 0 to "
            "train without evaluation"
        )
    if "training" not in sources and not args.skip_train:
        raise ValueError(f"no training set ({given}): give one, or --skip-train to evaluate only")


def _check_blend(source: Source) -> None:
    numbers = [word for word in source.prefixes if _is_number(word) and not Path(f"{word}.idx").exists()]
    blend = " ".join(source.prefixes)
    if numbers:
        raise ValueError(f"blend {blend}: {BLEND}")
    wrong = [weight for weight in source.weights or () if not 0 < weight < math.inf]
    if wrong:
        raise ValueError(f"blend {blend}: weights must be above 0, but are {source.weights}; leave out what weighs 0")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _check_chats(args, sources: dict[str, Source]) -> None:
    missing = [name for name in ("datasets", "transformers") if find_spec(name) is None]
    if missing:
        raise ValueError(f"--sft needs {' and '.join(missing)}: pip install 'linear-moe[sft]'")
    if args.tokenizer_type != "SFTTokenizer":
        raise ValueError(f"--sft needs --tokenizer-type SFTTokenizer, which knows chats, not {args.tokenizer_type}")
    for path in [path for source in sources.values() for path in source.prefixes]:
        if not Path(path).is_file():
            raise ValueError(f"{path} does not exist: --sft reads .jsonl files, one list of messages a line")

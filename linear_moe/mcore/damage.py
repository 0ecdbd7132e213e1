"""Checkpoints that were damaged, and disks that are full: what is wrong, and which whole checkpoint there is."""

import errno
import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint import CheckpointException, FileSystemReader

TRACKER = "latest_checkpointed_iteration.txt"
FULL = (errno.ENOSPC, errno.EDQUOT)
LITTLE = 2**20  # bytes; a disk with less to give is full


class Refused(ValueError):
    """What a user can mend, found while Megatron runs: to be said in one line."""


_write_errors: list[Exception] = []


def damage(path: Path) -> str | None:
    """What is wrong with a distributed checkpoint's files, or None. Looks at their sizes, not into the tensors."""
    if not path.is_dir():
        return "missing"
    if not (path / "metadata.json").exists():
        return "incomplete: its save was interrupted, metadata.json is missing"  # Megatron writes that last
    try:
        json.loads((path / "metadata.json").read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError):
        return "damaged: metadata.json is not what Megatron wrote"
    if not (path / ".metadata").exists():
        return "incomplete: .metadata is missing"
    try:
        parts = FileSystemReader(path).read_metadata().storage_data.values()
        ends = [(part.relative_path, part.offset + part.length) for part in parts]
    except Exception as error:  # whatever unpickling garbage may raise
        return f"damaged: .metadata cannot be read ({_line(error)})"
    for name, end in sorted(ends, reverse=True):
        if not (path / name).exists():
            return f"damaged: {name} is missing"
        if (path / name).stat().st_size < end:
            return f"damaged: {name} has {(path / name).stat().st_size} bytes, not {end} or more"
    return None


def remedy(folder: Path, without: Path | None = None) -> str:
    """Which of a folder's checkpoints can be loaded, and how; without one that looks whole and is not."""
    found = [path for path in whole(folder) if path != without]
    if not found:
        return "no other checkpoint there is whole"
    step = iteration(found[0])
    names = ", ".join(path.name for path in sorted(found))
    return f"whole: {names} (--ckpt-step {step} loads iteration {step})"


def whole(folder: Path) -> Iterator[Path]:
    """A folder's checkpoints that are not damaged, the last written first."""
    paths = [path for path in folder.glob("iter_*") if path.name[5:].isdigit() and (path / "metadata.json").exists()]
    paths.sort(key=lambda path: (path / "metadata.json").stat().st_mtime, reverse=True)
    return (path for path in paths if damage(path) is None)


def iteration(path: Path) -> int:
    return int(path.name.removeprefix("iter_"))


def loaded_folder(args) -> str | None:
    """The folder whose checkpoint Megatron will load, if there is one."""
    given = [folder for folder in (args.load, args.pretrained_checkpoint) if folder]
    return next((folder for folder in given if (Path(folder) / TRACKER).exists()), None)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# --- while Megatron reads and writes --------------------------------------------------------------------------------


def patch_errors() -> None:
    """Say in one line what a damaged checkpoint or a full disk did to Megatron. Idempotent."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import get_args, training

    if hasattr(training.save_checkpoint, "__wrapped__"):
        return
    load, save, write = training.load_checkpoint, training.save_checkpoint, FileSystemWriterAsync.write_preloaded_data

    @functools.wraps(load)
    def load_checkpoint(*rest, **kwargs):
        try:
            return load(*rest, **kwargs)
        except CheckpointException as error:
            folder = Path(loaded_folder(get_args()))
            step = get_args().ckpt_step or (folder / TRACKER).read_text().strip()
            path = folder / (f"iter_{int(step):07d}" if str(step).isdigit() else step)
            cause = _line(next(iter(error.failures.values()))[0])
            raise Refused(f"{path} is damaged: it cannot be read ({cause}); {remedy(folder, path)}") from error

    @functools.wraps(save)
    def save_checkpoint(step, *rest, **kwargs):
        _write_errors.clear()
        try:
            return save(step, *rest, **kwargs)
        except (Exception, CheckpointException) as error:
            folder = Path(get_args().save)
            reason = _why(folder, error)
            if reason is None:
                raise
            raise Refused(
                f"iteration {step} could not be saved: {reason}. Make room (iter_{step:07d} is incomplete and can go), "
                f"then go on with --load {folder}; {remedy(folder)}"
            ) from error

    @functools.wraps(write)
    def write_preloaded_data(*rest, **kwargs):
        result = write(*rest, **kwargs)
        if isinstance(result[1], Exception):
            _write_errors.append(result[1])  # Megatron goes on with its type alone
        return result

    training.load_checkpoint, training.save_checkpoint = load_checkpoint, save_checkpoint
    FileSystemWriterAsync.write_preloaded_data = staticmethod(write_preloaded_data)


def _why(folder: Path, error: BaseException) -> str | None:
    """Why a save failed, if that was writing."""
    free = shutil.disk_usage(folder).free
    errors = [error, *_write_errors]
    if free < LITTLE or any(isinstance(e, OSError) and e.errno in FULL for e in errors):
        return f"the disk of {folder} is full ({free / 2**20:.1f} MiB free)"
    return f"writing to {folder} failed ({_line(_write_errors[0])})" if _write_errors else None

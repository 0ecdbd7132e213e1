"""The folder of --save: writable, not another run's, and its checkpoints not overwritten by a run that starts anew."""

import fcntl
import os
import socket
import tempfile
import warnings
from pathlib import Path

import torch

from linear_moe.mcore.damage import TRACKER, Refused

LOCK = ".lock"
_held: int | None = None


def check_folder(args) -> None:
    """Refuse a --save folder that this run cannot write to or would overwrite. Makes the folder.

    Raises:
        ValueError: with what to do.
    """
    if not args.save or args.skip_train:
        return
    folder, overwrites = Path(args.save), _overwrites(args)
    if overwrites:
        raise ValueError(overwrites)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise ValueError(f"--save {folder} cannot be written to ({error.strerror}): give another folder") from None


def hold_folder(args) -> None:
    """Keep other runs out of the --save folder until ``release_folder`` or this process's end, whatever ends it.

    A collective call: all ranks raise when rank 0 is refused.

    Raises:
        Refused: another run holds the folder, or has saved there since ``check_folder``.
    """
    if not args.save or args.skip_train:
        return
    refusal = [(_take(Path(args.save)) or _overwrites(args)) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(refusal, src=0)
    if refusal[0]:
        raise Refused(refusal[0])


def _overwrites(args) -> str | None:
    """What this run would do to checkpoints in its --save folder, if anything."""
    folder = Path(args.save)
    resumes = args.load is not None and Path(args.load).resolve() == folder.resolve()
    if not (folder / TRACKER).exists() or (resumes and not args.finetune):
        return None
    hint = f"--load {folder} goes on from the last; to start anew, give another --save or remove the folder"
    if resumes:
        hint = "--finetune starts at iteration 0; give another --save, or leave it out to go on"
    step = (folder / TRACKER).read_text().strip()
    return f"{folder} has checkpoints (iteration {step}), which this run would overwrite: {hint}"


def _take(folder: Path) -> str | None:
    """Lock the folder; what is in the way, if anything. Again by the same process, it does nothing.

    The kernel frees a lock of flock when the last copy of its descriptor is closed, at the latest by the death of the
    process: exec closes it (Python opens everything so), and a fork does below. On NFS the server keeps such locks for
    all machines, unless it is mounted with nolock or local_lock: then two machines do not see each other's; nor with
    Lustre's localflock.
    """
    global _held
    if _held is not None:
        return None
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        return f"--save {folder}: its {LOCK} cannot be opened ({error.strerror}): remove it, or give another folder"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 1000).decode(errors="replace") or "unknown"
        os.close(descriptor)
        return f"--save {folder} belongs to a run that goes on ({holder}): end that one first, or give another --save"
    except OSError as error:
        os.close(descriptor)
        warnings.warn(f"{folder} cannot be locked ({error.strerror}): start no second run there", stacklevel=2)
        return None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _held = descriptor
    return None


def release_folder() -> None:
    """Let other runs in; nothing where the folder is not held."""
    global _held
    if _held is not None:
        os.close(_held)
        _held = None


os.register_at_fork(after_in_child=release_folder)  # data workers and checkpoint writers may live on

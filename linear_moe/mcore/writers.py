"""The processes that Megatron starts to write checkpoints: as few as can be, and none outlives the run.

Imports nothing heavy: those processes import it.
"""

import multiprocessing
import os
import queue
import threading
from multiprocessing.managers import SyncManager

_shared = None


def patch_writers() -> None:
    """Idempotent."""
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    filesystem_async.get_write_results_queue = results_queue
    async_utils.PersistentAsyncCaller.async_loop = staticmethod(write_persistently)


def results_queue(mp_mode: str = "spawn"):
    """What a writer says when it is done. Megatron keeps it in a process of its own, which takes seconds to start, has
    all of torch in memory and survives a run that is killed; only --async-save, where another process writes, needs it.
    """
    from megatron.training import global_vars

    global _shared
    args = global_vars._GLOBAL_ARGS  # None outside of the training program
    if args is None or not args.async_save:
        return queue.Queue()
    if _shared is None:
        manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
        manager.start(end_with_parent)
        _shared = manager.Queue()  # holds the manager
    return _shared


def write_persistently(*args) -> None:
    """Megatron's persistent checkpoint worker, in its process."""
    end_with_parent()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    from linear_moe.mcore.cpu import enable_cpu

    enable_cpu()
    PersistentAsyncCaller.async_loop(*args)


def end_with_parent() -> None:
    """End this process when the one that started it has ended, however that was."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

"""What a run prints: what a person reads; with --verbose, all that Megatron prints. Imports nothing heavy."""

import logging
import re
import sys
import warnings

# Warnings about packages that are not there, and others that a user can do nothing about.
IDLE_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "Only transformer-engine",
    "Triton is not supported on current platform",
    r".* is experimental and still under active development",
    "'pin_memory' argument is set as true",
    "Overriding default arguments for",
    "torch.distributed is (disabled, )?unavailable or uninitialized",
    "enabling --no-load-optim when skipping training",
)
QUIET_LOGGERS = ("megatron", "linear_moe", "torch", "fla", "transformer_engine")
# Megatron's lines that are said in fewer words, or not at all.
SAID = (
    (r"\] iteration +\d+/", ""),  # logs.py has a line of its own
    (r"number of parameters on .* rank \(0, 0, 0\): (\d+)", r" parameters on the first model-parallel rank: \1"),
    (r"successfully saved checkpoint from iteration +(\d+) to (.+?) \[", r" saved checkpoint of iteration \1 to \2"),
    (r"scheduled an async checkpoint save at iteration +(\d+) to (.+)", r" saving checkpoint of iteration \1 to \2"),
    (
        r"successfully loaded checkpoint from (.+?) \[.*at iteration (\d+)",
        r" loaded checkpoint of iteration \2 from \1",
    ),
    (r"could not find the metadata file (.+)/", r" no checkpoint in \1 yet: starting with random weights"),
    (r"\[(exiting program .*?)\] datetime", r" \1"),
    (r"^ validation.* loss at .*|.*\benergy\b.*", r"\g<0>"),
    (r"\(after \d+ iterations\) memory \(MB\) \| allocated: (?!0\.0).*", r" \g<0>"),  # of a GPU
)
MATTERS = re.compile(
    r"warning|error|exception|traceback|could not|cannot|unable|fail|invalid|mismatch|out of memory|overflow"
    r"|exit|abort|skipping|\bnan\b",
    re.IGNORECASE,
)
IDLE = re.compile(
    r"^  \w+ [. ]|one_logger|will not load any checkpoints|RerunStateMachine (initialized|mode)|Result validation"
    "|Setting args.overlap_p2p_comm|MCore's async save is deprecated|indexes because path_to_cache is None"
)


def hush() -> None:
    """Before the imports, which warn."""
    for message in IDLE_WARNINGS:
        warnings.filterwarnings("ignore", message)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.formatwarning = lambda message, category, file, line, text=None: f"warning: {message} ({file}:{line})\n"
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA


class Megatron:
    """What Megatron prints and logs, while it trains. progress: its last line about an iteration, on the rank that
    prints it; None when logs.py has taken it. asked: loggers of which all is shown, since a flag asks for them.
    """

    def __init__(self) -> None:
        self.verbose, self.progress, self.handlers, self.asked = False, None, set(), ()

    def listen(self, args) -> None:
        """Stand between Megatron and the terminal. Idempotent; call it once Megatron is imported."""
        self.verbose = args.verbose or args.logging_level is not None
        by_flag = {"megatron.core.timers": args.timing_log_level, "megatron.core.utils": args.log_straggler}
        self.asked = tuple(name for name, flag in by_flag.items() if flag)
        for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "megatron"]:
            module.print = self.print
        configure_logging()
        for handler in set(logging.getLogger().handlers) - self.handlers:
            self.handlers.add(handler)
            # Not addFilter: Megatron's handler has its own filter and looks at no other.
            handler.filter = lambda record, own=handler.filter: own(record) and self.worth_logging(record)

    def print(self, *values: object, **options) -> None:
        """In place of Megatron's print."""
        lines = " ".join(map(str, values)).splitlines()
        whole = any(isinstance(value, BaseException) for value in values) or any(map(matters, lines))
        if self.verbose or whole or options.get("file") is not None:
            print(*values, **options)
            return
        for line in lines:
            if re.search(SAID[0][0], line):
                self.progress = line
            elif said := in_brief(line):
                print(said, flush=True)

    def worth_logging(self, record: logging.LogRecord) -> bool:
        shown = record.name.split(".")[0] not in QUIET_LOGGERS or record.name in self.asked
        return self.verbose or shown or (record.levelno >= logging.WARNING and not IDLE.search(record.getMessage()))


megatron = Megatron()


def configure_logging() -> None:
    """Megatron's own set-up of logging, which is lost where emerging-optimizers is imported first: that logs through
    absl, which leaves a bare handler at the root, and the root's level as it was."""
    from megatron.training.log_handler import CustomHandler

    if [type(handler) for handler in logging.root.handlers] == [logging.StreamHandler]:
        logging.basicConfig(handlers=[CustomHandler()], level=logging.INFO, force=True)


def in_brief(line: str) -> str:
    """A line of Megatron's as a person reads it; empty for what nobody does."""
    for pattern, words in SAID:
        if found := re.search(pattern, line):
            return found.expand(words)
    return line if matters(line) else ""


def matters(line: str) -> bool:
    """Whether a line that Megatron prints, and that SAID does not know, tells of something that went wrong."""
    known = any(re.search(pattern, line) for pattern, _ in SAID)
    return not known and bool(MATTERS.search(line)) and not IDLE.search(line)

"""What every process of tests/parallel needs: multiprocessing's fork server imports it once, and forks them from there.

Nothing here may start a thread or ask for a device, which a fork would not survive.
"""

import functools
import gc

import pytest  # noqa: F401
import transformers.convert_slow_tokenizer  # noqa: F401  (a tokenizer's first use)
from megatron.training.argument_utils import ArgumentGroupFactory

import linear_moe.mcore.pretrain  # noqa: F401


def docstrings(factory, config: type) -> dict[str, str]:
    return _parsed(config)


@functools.cache
def _parsed(config: type) -> dict[str, str]:
    return _parse(object.__new__(ArgumentGroupFactory), config)


# For help texts, each run parses the source of Megatron's configurations three times.
_parse, ArgumentGroupFactory._get_field_docstrings = ArgumentGroupFactory._get_field_docstrings, docstrings
gc.collect()
gc.freeze()  # collecting garbage between runs would look at all that was imported, again and again

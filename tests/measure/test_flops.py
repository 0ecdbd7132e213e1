"""The table of FLOPs is what the interpreter counts today. If not: python -m linear_moe.measure.flops."""

import random
from dataclasses import replace

import pytest

from linear_moe.measure import count_flops, flops, kernel_benchmark, workload
from linear_moe.measure.timing import MODES
from tests.helpers import fresh_seed


def recount(name, D, backward):
    case = next(case for case in workload.CASES if case.name == name)
    counted = count_flops._count_case(replace(case, counted=(1, 64)), D, D, backward)
    return {kernel: count / workload.Shape.H for kernel, count in counted.items()}


@pytest.mark.parametrize("name, D", [("delta scalar", 64), ("delta channel", 64), (None, None)])
def test_table_is_current(name, D):
    """Two that use every kernel, and any other one."""
    random.seed(fresh_seed())
    name, D = name or random.choice(flops.CASES), D or random.choice(flops.WIDTHS[:2])
    expected = flops.table()[name][f"{D}x{D}"]
    assert recount(name, D, backward=True) == expected["both"] == flops.of_kernels(name, D), (name, D)
    assert recount(name, D, backward=False) == expected["forward"], (name, D)


def test_modes():
    found = flops.of_modes("delta scalar", 128)
    assert found.keys() == {*MODES} and found["both"] == found["forward"] + found["backward"] > found["backward"] > 0


def test_every_benchmarked_rule_is_in_the_table():
    for rule in kernel_benchmark.RULES:
        for size in (*kernel_benchmark.SIZES, *kernel_benchmark.FLASH_QLA):
            assert flops.of_modes(rule.case, size.D)["both"] > 0

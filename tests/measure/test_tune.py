"""The tuner, with one kernel, under the interpreter: what it tries, and what it keeps."""

import copy

import pytest
import torch

from linear_moe.measure import tune
from linear_moe.measure.workload import Shape
from linear_moe.ops.triton import tuning


@pytest.fixture
def trial():
    before = copy.deepcopy(tuning.table())
    cases = tune.uses(64, 64, "sm_90")["step", "64x64"]
    yield tune.Trial("step", "64x64", cases, Shape(64, 64, torch.float32, "cpu", B=1, T=1, H=1), "sm_90", 1)
    tuning.table().update(before)
    tuning.lookup.cache_clear()


def test_every_entry_of_the_table_is_reached():
    reached = {name for K, V in tune.WIDTHS for name, _ in tune.uses(K, V, "sm_90")}
    small = {name for name in tuning.table()["sm_90"] if name.endswith("_small")}  # of products with few rows
    assert reached == tuning.table()["sm_90"].keys() - small


def test_neighbours():
    found = tune.neighbours({"BV": 16, "num_warps": 1, "num_stages": 2})
    assert {"BV": 32, "num_warps": 1, "num_stages": 2} in found and {"BV": 16, "num_warps": 2, "num_stages": 2} in found
    assert {entry["num_stages"] for entry in found} == {1, 2, 3}
    assert not any(entry["BV"] < 16 or entry["num_warps"] < 1 for entry in found)


def test_the_fastest_is_kept(trial, monkeypatch):
    monkeypatch.setattr(trial, "fitting", lambda entries: entries)
    monkeypatch.setattr(trial, "milliseconds", lambda entry: 1 / entry["BV"])
    best, after, before = trial.search(rounds=2)
    assert best["BV"] == 4 * trial.entry["BV"] and (after, before) == (1 / best["BV"], 1 / trial.entry["BV"])
    assert tuning.lookup("step", 64, 64, "sm_90") == best


def test_what_fails_is_out(trial):
    assert trial.milliseconds(trial.entry) < float("inf")
    assert trial.milliseconds({**trial.entry, "BV": 17}) == float("inf")

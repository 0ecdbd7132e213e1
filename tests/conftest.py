import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# The tests are for the CPU, also on a machine with a GPU; tests/gpu starts processes that see it.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; read when they are declared
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores; read when torch is imported

from tests.helpers import fresh_seed  # noqa: E402  (imports torch)

# The files that take longest, in this order: what comes first keeps one worker busy while the others do the rest.
LONGEST = (
    "parallel/test_layouts.py parallel/test_matrix.py ops/triton/test_rules.py tools/test_kernel_report.py "
    "ops/triton/test_online.py tools/test_evaluate.py parallel/test_checkpoints.py ops/triton/test_layer.py "
    "parallel/test_base_models.py parallel/test_hybrid.py parallel/test_mixers.py mcore/test_causality.py "
    "ops/triton/test_dplr.py peers/test_layers.py mcore/test_pretrain.py test_readme.py inference/test_engine.py "
    "mcore/test_inference.py"
).split()


def pytest_collection_modifyitems(items):
    order = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))  # stable


@pytest.fixture
def seed() -> int:
    """A fresh seed, set in torch and shown when the test fails."""
    return fresh_seed()


@pytest.fixture(scope="session")
def gpu_environment() -> dict[str, str]:
    """The environment of a process that may use the GPUs that this one hides from itself."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")}
    return environment if GPUS is None else environment | {"CUDA_VISIBLE_DEVICES": GPUS}

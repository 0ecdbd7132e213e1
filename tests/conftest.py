import os

import pytest

# The tests are for the CPU, also on a machine with a GPU; tests/gpu starts processes that see it.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; read when they are declared

from tests.helpers import fresh_seed  # noqa: E402  (imports torch)


@pytest.fixture
def seed() -> int:
    """A fresh seed, set in torch and shown when the test fails."""
    return fresh_seed()


@pytest.fixture(scope="session")
def gpu_environment() -> dict[str, str]:
    """The environment of a process that may use the GPUs that this one hides from itself."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")}
    return environment if GPUS is None else environment | {"CUDA_VISIBLE_DEVICES": GPUS}

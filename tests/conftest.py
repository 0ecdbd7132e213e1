import pytest

from tests.helpers import fresh_seed


@pytest.fixture
def seed() -> int:
    """A fresh seed, set in torch and shown when the test fails."""
    return fresh_seed()

import numpy as np
import pytest

from tests.parallel.harness import TINY

END_OF_DOCUMENT = int(TINY[TINY.index("--vocab-size") + 1]) - 1  # NullTokenizer's


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A corpus with something to learn: walks of a random step size over 120 tokens, each with an end-of-document."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(tmp_path_factory.mktemp("data") / "walks")
    rng = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(60):
        walk = (rng.integers(120) + rng.integers(1, 4) * np.arange(rng.integers(20, 60))) % 120
        walk = np.append(walk, END_OF_DOCUMENT)
        builder.add_document(walk.astype(np.uint16), [len(walk)])
    builder.finalize(f"{prefix}.idx")
    return prefix

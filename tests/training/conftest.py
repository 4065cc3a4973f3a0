from pathlib import Path

import pytest

from tests.training import corpus


@pytest.fixture(scope="session")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TOML of a small run; tests give each run a ``train.directory`` of its own."""
    return corpus.make(tmp_path_factory.mktemp("corpus"))

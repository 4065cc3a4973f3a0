"""Settings of all tests, and the small run that several of them train."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported, which the tests below do

from tests import corpus

# Reproducible examples, no deadline (the machine may be busy), and no folder of past examples in the checkout.
hypothesis.settings.register_profile("megapoly", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("megapoly")


@pytest.fixture(scope="session")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TOML of a small run; a test gives its run a ``train.directory`` of its own."""
    return corpus.make(tmp_path_factory.mktemp("corpus"))

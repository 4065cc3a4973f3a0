"""What the tests of builds share."""

from __future__ import annotations

import subprocess

import pytest

from megapoly.data import encode, pieces
from megapoly.data.tokenizer_training import train_tokenizer
from tests.data.building import write_corpus


@pytest.fixture(scope="package")
def corpus(tmp_path_factory):
    """A folder of files of several kinds, and their texts."""
    folder = tmp_path_factory.mktemp("corpus") / "text"
    return folder, write_corpus(folder)


@pytest.fixture(scope="package")
def tokenizer(corpus, tmp_path_factory):
    return train_tokenizer(
        {"xx": [corpus[0] / "a.jsonl"]}, tmp_path_factory.mktemp("model") / "t.model", vocabulary=400
    )


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 8000)
    monkeypatch.setattr(encode, "_BATCH_BYTES", 1500)


@pytest.fixture
def workers(monkeypatch):
    """The processes that are started."""
    started = []

    def start(*arguments, popen=subprocess.Popen, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return started

"""A small corpus in two languages, made of random words, with its tokenizer, datasets and a run's TOML."""

from __future__ import annotations

import json
import random
from pathlib import Path

from megapoly.data import builder
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.tokenizer_training import train_tokenizer

LETTERS = {"en": "abcdefghij", "ru": "абвгдежзик"}
STEP = 8 * 16  # tokens of a global batch

TOML = """
[model]
layers = 4
hidden = 32
heads = 4
ffn = 64
vocabulary = {vocabulary}
positions = 16
[layout]
micro_batch = 1
device = "cpu"
bucket_mb = 0.05
[data]
tokenizer = "poly.model"
separate_documents = true
sources.en = {{ path = "en", language = "en" }}
sources.ru = {{ path = "ru", language = "ru" }}
[[data.stages]]
name = "first"
tokens = {first}
weights = {{ en = 0.7, ru = 0.3 }}
[[data.stages]]
name = "second"
tokens = {second}
weights = {{ en = 0.4, ru = 0.6 }}
[train]
directory = "run"
sequence = 16
global_batch = 8
precision = "fp64"
[optimizer]
learning_rate = 0.01
warmup_tokens = {step}
[checkpoint]
every_steps = 1000
[validation]
windows = 4
[log]
tensorboard = false
"""


def make(folder: Path) -> Path:
    """Write everything into ``folder``; the path of the TOML. The run has 12 + 8 steps."""
    pick = random.Random(0)
    for language, letters in LETTERS.items():
        words = ["".join(pick.choices(letters, k=pick.randint(2, 6))) for _ in range(200)]
        records = [{"text": " ".join(pick.choices(words, k=pick.randint(3, 20)))} for _ in range(300)]
        (folder / f"{language}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = {language: [folder / f"{language}.jsonl"] for language in LETTERS}
    train_tokenizer(files, folder / "poly.model", vocabulary=323)
    tokenizer = load_tokenizer(folder / "poly.model")
    for language in LETTERS:
        options = builder.Options(validation_fraction=0.1, threads=1)
        builder.build(files[language], folder / language, tokenizer, language=language, options=options)
    path = folder / "run.toml"
    sizes = {"vocabulary": tokenizer.vocabulary, "first": 12 * STEP, "second": 8 * STEP, "step": 2 * STEP}
    path.write_text(TOML.format(**sizes))
    return path


def lines(run: Path, kind: str) -> list[dict]:
    """Events of ``kind`` in a run's log."""
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [event for event in events if event["kind"] == kind]

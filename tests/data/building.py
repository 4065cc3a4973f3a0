"""Text of random words to build datasets from, in files of several formats, and what a build should make of it."""

from __future__ import annotations

import gzip
import json
import random

from megapoly.data.indexed import IndexedDataset

WORDS = ["a", "corpus", "of", "words", "in", "some", "order", "long", "enough", "to", "hold", "many", "pairs"]
GERMAN = ["ein", "Korpus", "aus", "Wörtern", "in", "einer", "Reihe", "lang", "genug", "für", "viele", "Paare"]
SUFFIXES = (".bin", ".idx", ".json")


def sentence(words, seed):
    return " ".join(random.Random(seed).choices(words, k=8)) + f" {seed}"


def write_lines(path, records):
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_corpus(folder, count=800):
    """Files of four kinds with ``count`` texts in all, in the order of their names; the texts."""
    texts = [f"{sentence(WORDS, i)} {sentence(GERMAN, i)}" for i in range(count)]
    quarter = count // 4
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "a.jsonl", [{"text": text} for text in texts[:quarter]])
    write_lines(folder / "b.jsonl.gz", [{"text": text} for text in texts[quarter : 2 * quarter]])
    (folder / "c.txt").write_text("".join(text + "\n" for text in texts[2 * quarter : 3 * quarter]), encoding="utf-8")
    write_lines(folder / "d.jsonl", [{"text": text, "id": 1} for text in texts[3 * quarter :]])
    return texts


def documents(prefix):
    dataset = IndexedDataset(prefix)
    return [dataset.document(i).tolist() for i in range(dataset.documents)]


def contents(prefix):
    return [prefix.with_name(prefix.name + suffix).read_bytes() for suffix in SUFFIXES]

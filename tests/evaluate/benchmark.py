"""A small folder of benchmarks in the formats of the real ones, with sentences made up here."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WORDS = {
    language: words.split()
    for language, words in {
        "en": "the cat sat on a mat while rain fell over old town and nobody saw her go home",
        "de": "die Katze saß auf der Matte während Regen fiel und niemand sah sie nach Hause gehen",
        "zh": "猫 坐 在 垫 子 上 雨 落 城 里 没 人 看 见",
        "th": "แมว นั่ง บน เสื่อ ฝน ตก ใน เมือง",
    }.items()
}
_SHORT = {"zh", "th"}


def sentence(draw: random.Random, language: str, most: int = 7) -> str:
    words = draw.choices(WORDS[language], k=draw.randint(3, most))
    if language in _SHORT:
        return "".join(words) + ("。" if language == "zh" else "")
    text = " ".join(words)
    return text[0].upper() + text[1:] + "."


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def make(folder: Path, count: int = 4) -> Path:
    """Every task in one or two languages, and texts longer than 256 bytes in ``text.en.jsonl``."""
    draw = random.Random(0)
    for split in ("dev", "test"):
        for language in ("de", "zh"):
            write(
                folder / f"xnli/{split}.{language}.jsonl.gz",
                (
                    {
                        "id": i,
                        "premise": sentence(draw, language),
                        "hypothesis": sentence(draw, language),
                        "label": draw.choice(["entailment", "neutral", "contradiction"]),
                    }
                    for i in range(count)
                ),
            )
    for language in ("en", "zh"):
        write(
            folder / f"pawsx/dev.{language}.jsonl",
            (
                {"id": i, "sentence1": sentence(draw, language), "sentence2": sentence(draw, language), "label": i % 2}
                for i in range(count)
            ),
        )
    for language in ("th", "zh"):
        write(
            folder / f"xcopa/test.{language}.jsonl.gz",
            (
                {
                    "premise": sentence(draw, language),
                    "choice1": sentence(draw, language),
                    "choice2": sentence(draw, language),
                    "question": draw.choice(["cause", "effect"]),
                    "label": draw.randrange(2),
                }
                for _ in range(count)
            ),
        )
    write(
        folder / "tydiqa_goldp/dev.en.jsonl",
        (
            {
                "id": str(i),
                "context": sentence(draw, "en"),
                "question": "Who sat?",
                "answers": [{"text": "the cat", "answer_start": 0}, {"text": "a cat", "answer_start": 0}],
            }
            for i in range(count)
        ),
    )
    for pair in ("de-en", "zh-en", "en-zh"):
        source, target = pair.split("-")
        write(
            folder / f"wmt20/{pair}.jsonl.gz",
            ({"source": sentence(draw, source, 4), "target": sentence(draw, target, 4)} for _ in range(count)),
        )
    write(
        folder / "mtg/title.de.jsonl",
        ({"source": sentence(draw, "de"), "target": sentence(draw, "de", 4)} for _ in range(count)),
    )
    rows = (
        ("en", "He saw the cat because he was old .", [5], [["he", [0, 1]], ["the cat", [2, 4]]]),
        ("en", 'She said " no " because she was old .', [6], [["she", [0, 1]], ["no", [3, 4]]]),
        ("jp", "猫 は 犬 を 見 た 。 彼 は 悪 か っ た 。", [7], [["猫", [0, 1]], ["犬", [2, 3]]]),
    )
    lines = []
    for language, text, (at,), names in rows:
        words = text.split()
        quotes = iter(("``", "''"))
        tokens = [next(quotes) if word == '"' else word for word in words]
        whole = ("" if language == "jp" else " ").join(words).replace(" .", ".").replace('" no "', '"no"')
        pronoun = json.dumps([words[at], [at, at + 1], [words[at]]])
        candidates = json.dumps([[name, span, name.split(), i == 1] for i, (name, span) in enumerate(names)])
        lines.append("\t".join([language, "original", "?", whole, json.dumps(tokens), pronoun, candidates]))
    (folder / "xwinograd").mkdir(parents=True)
    (folder / "xwinograd/dataset.tsv").write_text("\n".join(lines) + "\n")
    write(folder / "text.en.jsonl", ({"text": " ".join(sentence(draw, "en") for _ in range(n))} for n in (1, 30, 12)))
    return folder

"""Small instructions in three languages, with their tokenizer, packed datasets and the TOML of a run on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from megapoly.data import builder
from megapoly.data.templates import TEMPLATES
from megapoly.data.tokenizer import Tokenizer
from megapoly.data.tokenizer_training import train_tokenizer

WORDS = {
    "es": "la casa grande tiene una piscina en el jardín donde los niños juegan cada día con sus perros ¿cómo? ¡así!",
    "ja": "東京 都が 日本で 最も 人口が 多い です 私は 英語が 苦手 でした ひらがな カタカナ 漢字 。 、 「本」",
    "th": "ประเทศ ไทย มี อาหาร อร่อย มาก และ ผู้คน ใจดี ทุก วัน เรา กิน ข้าว กับ ปลา",
}
PACK = 64

TOML = """
[model]
layers = 2
hidden = 16
heads = 2
ffn = 32
vocabulary = {vocabulary}
positions = 64
init_std = 0.2
[layout]
micro_batch = 1
device = "cpu"
[data]
tokenizer = "poly.model"
separate_documents = true
sources.es = {{ path = "es", language = "es" }}
sources.ja = {{ path = "ja", language = "ja" }}
[[data.stages]]
name = "tune"
epochs = 2
[train]
directory = "run"
sequence = 64
global_batch = 8
precision = "fp64"
[optimizer]
learning_rate = 0.01
[validation]
windows = 8
[log]
tensorboard = false
"""


def records(language: str, count: int = 120) -> list[dict[str, Any]]:
    """Instructions, some with an input, and chats of one to three rounds."""
    draw = random.Random(language)
    words = WORDS[language].split()

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    found: list[dict[str, Any]] = []
    for number in range(count):
        given = (None, "", "<noinput>", text(4))[number % 4]
        found.append({"instruction": f"{text(4)} {number}", "input": given, "output": text(6)})
        if number % 5 == 0:
            rounds = range(1 + number % 3)
            turns = [("user", "assistant")[i % 2] for _ in rounds for i in range(2)]
            messages = [{"role": role, "content": f"{text(3)} {number}"} for role in turns]
            system = [{"role": "system", "content": text(3)}] if number % 2 else []
            found[-1] = {"messages": [*system, *messages]}
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def train(folder: Path) -> Tokenizer:
    """A tokenizer of all languages, as megapoly trains them."""
    files = {}
    for language in WORDS:
        texts = [text for row in records(language) for key, text in row.items() if key == "output"]
        files[language] = [write(folder / f"{language}.text.jsonl", [{"text": text} for text in texts])]
    return train_tokenizer(files, folder / "poly.model", vocabulary=420)


def make(folder: Path) -> Path:
    """Write everything into ``folder``; the path of the TOML."""
    tokenizer = train(folder)
    for language in WORDS:
        source = write(folder / f"{language}.jsonl", records(language))
        options = builder.Options(
            instructions=TEMPLATES["multialpaca"],
            validation_fraction=0.15,
            threads=1,
            assembly=builder.Assembly(pack=PACK, shuffle=1),
        )
        builder.build([source], folder / language, tokenizer, language=language, options=options)
    path = folder / "run.toml"
    path.write_text(TOML.format(vocabulary=tokenizer.vocabulary), encoding="utf-8")
    return path

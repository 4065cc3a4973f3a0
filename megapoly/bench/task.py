"""What a benchmark asks of the process of a contender, as JSON on its command line. No torch."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from megapoly import config as configuration
from megapoly.config import Config

RATE = 1e-4  # constant: nothing here depends on a schedule of the learning rate


@dataclass(frozen=True)
class Task:
    """One rank of a contender.

    Attributes:
        document: of the config, see :meth:`Config.document`.
        threads: of this process.
        device: cpu, or cuda: one GPU for each rank.
        store: file over which the ranks of a contender find each other.
    """

    document: dict[str, Any]
    threads: int
    device: str = "cpu"
    rank: int = 0
    store: str = ""

    @property
    def config(self) -> Config:
        return configuration.parse(self.document, where="benchmark")

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def of(cls, text: str) -> Task:
        return cls(**json.loads(text))


def make_config(
    *,
    layers: int,
    hidden: int,
    heads: int,
    sequence: int,
    vocabulary: int,
    micro_batch: int,
    global_batch: int,
    precision: str = "fp32",
    **layout: Any,
) -> Config:
    """A GPT with ``ffn = 4 hidden``, and a run that reads no data.

    Raises:
        ConfigError: sizes or a layout that do not fit together.
    """
    step = sequence * global_batch
    return configuration.parse(
        {
            "model": {
                "layers": layers, "hidden": hidden, "heads": heads, "ffn": 4 * hidden, "vocabulary": vocabulary,
                "positions": sequence,
            },
            "layout": {"dp": 1, "micro_batch": micro_batch, **layout},
            "data": {
                "tokenizer": "none",
                "sources": {"random": {"path": "none", "language": "none"}},
                "stages": [{"name": "random", "tokens": step, "weights": {"random": 1.0}}],
            },
            "train": {
                "directory": "none", "sequence": sequence, "global_batch": global_batch, "precision": precision,
            },
            "optimizer": {"learning_rate": RATE},
        },
        where="benchmark",
    )  # fmt: skip

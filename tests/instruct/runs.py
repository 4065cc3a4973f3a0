"""Small runs of self-instruct against an endpoint of this machine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from megapoly.cli import main
from megapoly.instruct.journal import Journal
from tests.instruct.server import bank

TOML = """
directory = "run"
seeds = "seeds.jsonl"
leave_out = ["seed_3"]
languages = [{languages}]
seed = 5
[rounds]
count = 3
requests = 6
first = 3
tasks = 5
[endpoint]
model = "fake"
base_url = "{url}"
key_variable = ""
max_tokens = 600
context = 4000
timeout_seconds = 60
backoff_seconds = 0.005
concurrency = 4
"""
#: With faults among which are time-outs.
SHORT = ("--set", "endpoint.timeout_seconds=1.5")
KINDS = ("tasks", "seeds", "dropped")
REQUESTS = 3 + 6 + 6
SEEDS = 8  # of which one is left out
_ABOVE = [up / "shared/data/instructions" for up in Path(__file__).resolve().parents]
#: Real seeds and tasks, beside the checkout of those who have them.
REAL = next((folder for folder in _ABOVE if folder.is_dir()), _ABOVE[0])
NEEDED = SEEDS - 1 + REQUESTS
ROWS = bank(300)


def write(folder: Path, url: str, languages: str = '"es"', more: str = "") -> Path:
    """A config and its seeds; the path of the former."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"id": f"seed_{i}", **row} for i, row in enumerate(bank(SEEDS, seed=99))]
    (folder / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "instruct.toml"
    path.write_text(TOML.format(url=url, languages=languages) + more)
    return path


def go(path: Path, *options: str) -> int:
    """``megapoly instruct generate`` in this process; its exit code."""
    try:
        main(["instruct", "generate", str(path), *options])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def files(run: Path) -> dict[str, bytes]:
    """What a run made, without its journals."""
    return {path.name: path.read_bytes() for kind in KINDS for path in sorted(run.glob(f"{kind}.*.jsonl"))}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lines(run: Path, language: str = "es") -> Counter[str]:
    """Lines of a journal, by kind."""
    return Counter(line["kind"] for line in rows(run / f"requests.{language}.jsonl"))


def journal(run: Path, language: str = "es") -> Journal:
    return Journal(run / f"requests.{language}.jsonl", None)

"""The speeds that the README states are those of the committed tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


def rows(pattern: str) -> list[dict]:
    newest = max(RESULTS.glob(pattern), key=lambda path: path.stem[-10:])  # they end with their date
    return json.loads(newest.read_text(encoding="utf-8"))["rows"]


def test_the_readme_states_the_measured_ratios() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    by = {(row["name"], row.get("peer")): row for row in rows("step-*-cores-*.json")}
    peers = [f"{by['megapoly', peer]['ratio']:.1f} times" for peer in ("transformers", "megatron")]
    assert f"{peers[0]} the tokens per second of transformers, {peers[1]} those of Megatron-Core" in text
    assert f"{by['megapoly', 'megatron']['share_of_limit']:.0%}".replace("%", " % of what bare matrix products") in text
    for name, what in (("dp2", "as dp 2"), ("tp2", "as tp 2"), ("pp2 less bubble", "as pp 2 with its bubble counted")):
        assert f"{by[name, 'megapoly']['ratio']:.2f} {what}" in text


def test_the_readme_states_how_near_schedules_come_to_their_simulation() -> None:
    ratios = [row["ratio"] for row in rows("schedule-cpu-*.json") if row.get("ratio") and row["unit"] in ("s", "ms")]
    assert len(ratios) == 5
    low, high = re.search(r"(\d+) to (\d+) % of the simulated", (ROOT / "README.md").read_text()).groups()
    assert int(low) <= round(100 * min(ratios))
    assert round(100 * max(ratios)) <= int(high)


def test_the_readme_states_what_the_data_engine_measured() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    by = {row["name"]: row for row in rows("data-*-cores-*.json")}
    start = by["startup"]
    assert f"{start['value']:.1f} ms and {start['memory_mib']:.1f} MiB, not {start['peer_value'] / 1e3:.1f} s" in text
    assert f"{start['peer_memory_mib']:.0f} MiB and a cache of {start['peer_disk_mb']:.0f} MB" in text
    assert f"10^12 samples takes {by['mixture']['value_1e12']:.1f} ms" in text
    assert f"samples come {by['samples']['ratio']:.0f} times as fast" in text
    assert f"separated {by['samples_documents']['ratio']:,.0f} times" in text
    assert f"written {by['encode']['ratio']:.1f} times as fast" in text


def test_the_readme_states_the_memory_of_the_loss() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    found = [
        row for row in rows("kernels-*-cores-*.json") if (row["shape"] or "").startswith("256K: 512 x 2048 x 262144")
    ]
    (row,) = found
    ours, eager = row["extra_bytes"] / 1e6, row["peer_extra_bytes"] / 1e6
    assert f"takes {ours:,.0f} MB beyond inputs and gradients, eager PyTorch {eager:,.0f} MB" in text

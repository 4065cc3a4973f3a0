"""How far the loss curves of two runs are apart, in nats: ``compare.py RUN RUN [BOUND]``; exits with 1 beyond BOUND."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


def losses(run: Path) -> dict[int, float]:
    """Training loss by step."""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return {event["step"]: event["loss"] for event in map(json.loads, lines) if event["kind"] == "train"}


def main() -> None:
    a, b = (losses(Path(argument)) for argument in sys.argv[1:3])
    steps = sorted(a.keys() & b.keys())
    apart = {step: b[step] - a[step] for step in steps}
    worst = max(steps, key=lambda step: abs(apart[step]))
    tail = steps[-max(1, len(steps) // 10) :]
    print(f"{len(steps)} steps: largest difference {apart[worst]:+.4f} nats, at step {worst} (loss {a[worst]:.4f})")
    print(f"mean of the differences {statistics.fmean(apart.values()):+.5f} nats")
    ends = [statistics.fmean(curve[step] for step in tail) for curve in (a, b)]
    print(f"last {len(tail)} steps: {ends[0]:.4f} and {ends[1]:.4f}, {ends[1] - ends[0]:+.5f} nats apart")
    if len(sys.argv) > 3 and abs(apart[worst]) > float(sys.argv[3]):
        sys.exit(f"further apart than {sys.argv[3]} nats")


if __name__ == "__main__":
    main()

"""Speed of a training step: megapoly, its peers, the limit of a plain matmul, layouts of several ranks. No torch.

A value is the median of a contender's turns. Rates that are compared come from one race.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megapoly.bench.race import Entry, Peer, Result, race
from megapoly.bench.task import make_config
from megapoly.config import Config
from megapoly.errors import ConfigError
from megapoly.models.cost import flops_per_token, peak_tflops
from megapoly.pipeline import schedule
from megapoly.pipeline.timeline import simulate

Progress = Callable[[str], object]
Row = dict[str, Any]

OWN, MATMUL = "megapoly.bench.run_megapoly", "megapoly.bench.run_matmul"
PEERS = {
    "transformers": Peer("megapoly.bench.run_transformers", "transformers", "pip install transformers"),
    "megatron": Peer("megapoly.bench.run_megatron", "megatron-core", "pip install --no-deps megatron-core==0.15.3"),
}
DEVICES = {"cpu": "fp32", "cuda": "bf16"}  # with the precision of each
# Where torch was built without oneDNN, or on a GPU, there is the plain limit only.
ONEDNN = Peer("megapoly.bench.run_onednn", "torch", "pip install torch")
_LAYOUT = re.compile(r"(dp|tp|pp)([2-9]|[1-9]\d+)")


@dataclass(frozen=True)
class Options:
    """Sizes of the model and of the measurement; ``threads`` in all, which ranks share."""

    layers: int = 12
    hidden: int = 512
    heads: int = 8
    sequence: int = 512
    vocabulary: int = 32000
    micro_batch: int = 4
    threads: int = 2
    device: str = "cpu"
    steps: int = 1
    repeats: int = 3

    def config(self, micro_batch: int, global_batch: int, **layout: int) -> Config:
        return make_config(
            layers=self.layers, hidden=self.hidden, heads=self.heads, sequence=self.sequence,
            vocabulary=self.vocabulary, precision=DEVICES[self.device], micro_batch=micro_batch,
            global_batch=global_batch, **layout,
        )  # fmt: skip

    def entry(self, program: str, config: Config, peer: Peer | None = None) -> Entry:
        return Entry(program, config, max(1, self.threads // config.mesh.world_size), self.device, peer)

    def race(self, entries: dict[str, Entry], progress: Progress) -> dict[str, Result]:
        return race(entries, steps=self.steps, repeats=self.repeats, progress=progress)


def measure(
    options: Options, against: Sequence[str], layouts: Sequence[str], progress: Progress = lambda text: None
) -> tuple[list[Row], str]:
    """Rows of the benchmark: products of matrices, ``megapoly`` for each peer, each layout; and the GPU's name, or "".

    The limit is the faster of ``matmul``, which is ``torch.mm``, and on a CPU ``matmul oneDNN``.

    Args:
        against: names in :data:`PEERS`; one that is not installed, or fails, leaves a note in its row.
        layouts: such as ``dp2``, ``tp2``, ``pp2``; see :func:`layout_config`. The peer of a layout is megapoly in one
            process, with as many threads as all ranks have, on the same global batch in the same micro-batches.
        progress: called with a line of text before every turn.

    Raises:
        ConfigError: an unknown name, or sizes that do not fit together.
        TrainingError: megapoly did not finish.
    """
    for option, names, known in (("against", against, PEERS), ("device", [options.device], DEVICES)):
        for name in names:
            if name not in known:
                raise ConfigError(f"--{option} {name}: unknown; the known ones are {', '.join(known)}")
    parallel = {name: layout_config(options, name) for name in layouts}
    alone = options.config(options.micro_batch, options.micro_batch)
    entries = {"matmul": options.entry(MATMUL, alone), "megapoly": options.entry(OWN, alone)}
    if options.device == "cpu":
        entries["matmul oneDNN"] = options.entry(ONEDNN.program, alone, ONEDNN)
    entries |= {name: options.entry(PEERS[name].program, alone, PEERS[name]) for name in against}
    results = options.race(entries, progress)
    rows = [_matmul_row(name, result) for name, result in results.items() if "matmul" in name and result.turns]
    limit = max(row["tokens_per_second"] for row in rows)
    own = results["megapoly"]
    rows += [_row("megapoly", own, limit, peer, results[peer]) for peer in against] or [_row("megapoly", own, limit)]
    for batch in dict.fromkeys(_batch(config) for config in parallel.values()):
        same = {name: config for name, config in parallel.items() if _batch(config) == batch}
        entries = {name: options.entry(OWN, config) for name, config in same.items()}
        results = options.race({"megapoly": options.entry(OWN, options.config(*batch)), **entries}, progress)
        for name in same:
            rows += _layout_rows(name, results[name], results["megapoly"], limit)
    return rows, own.gpu


def layout_config(options: Options, name: str) -> Config:
    """A run of ``name``: dp, tp or pp and a number of ranks.

    A global batch has ranks x ``micro_batch`` samples under each, so that they do the same work: dp and tp take it in
    micro-batches of ``micro_batch``, pp in 4 for each stage.

    Raises:
        ConfigError: another name, or sizes that do not fit together.
    """
    match = _LAYOUT.fullmatch(name)
    if match is None:
        raise ConfigError(f"--layouts {name}: expected dp, tp or pp and a number of ranks from 2, such as dp2,tp2,pp2")
    axis, ranks = match[1], int(match[2])
    if axis == "pp":
        micro_batch = max(1, options.micro_batch // 4)
        return options.config(micro_batch, 4 * ranks * micro_batch, pp=ranks)
    return options.config(options.micro_batch, ranks * options.micro_batch, **{axis: ranks})


def _batch(config: Config) -> tuple[int, int]:
    return config.layout.micro_batch, config.train.global_batch


def _matmul_row(name: str, result: Result) -> Row:
    """With the tokens per second of a training step that did nothing but its matrix products at this speed."""
    config = result.entry.config
    rates = result.per_second(result.flops / 1e9)
    value = statistics.median(rates)
    had = sum(t.cpu_seconds for t in result.turns) / (sum(t.seconds for t in result.turns) * result.entry.threads)
    return {
        "name": name,
        "value": value,
        "unit": "GFLOP/s",
        "spread": _spread(rates),
        "tokens_per_second": value * 1e9 / flops_per_token(config.model, config.train.sequence),
        "processor_share": had,
    }


def _row(name: str, own: Result, limit: float, peer_name: str | None = None, peer: Result | None = None) -> Row:
    config = own.entry.config
    row: Row = {
        "name": name,
        "value": own.rate,
        "unit": "tokens/s",
        "spread": _spread(own.rates),
        "limit": limit,
        "share_of_limit": own.rate / limit,
        "ranks": config.mesh.world_size,
        "threads": own.entry.threads,
        "global_batch": config.train.global_batch,
        "micro_batch": config.layout.micro_batch,
        "work": _work(own),
        "parameters": own.parameters,
        "loss": own.turns[-1].loss,
        **_on_gpu(own),
        "peer": peer_name,
        "peer_value": None,
        "ratio": None,
    }
    if peer is not None and peer.missing:
        row["note"] = peer.missing
    elif peer is not None:
        row["peer_value"], row["peer_spread"] = peer.rate, _spread(peer.rates)
        row["ratio"] = own.rate / peer.rate
        row["ratio_spread"] = _spread([ours / theirs for ours, theirs in zip(own.rates, peer.rates)])
        row["peer_parameters"], row["peer_loss"] = peer.parameters, peer.turns[-1].loss
    return row


def _on_gpu(result: Result) -> Row:
    """TFLOP/s of a GPU, their share of its peak (MFU) where that is known, and its memory; nothing on a CPU."""
    if not result.gpu:
        return {}
    config, peak = result.entry.config, peak_tflops(result.gpu)
    tflops = result.rate * flops_per_token(config.model, config.train.sequence) / config.mesh.world_size / 1e12
    mfu = {} if peak is None else {"mfu": tflops / peak}
    return {"tflops": tflops, **mfu, "peak_bytes": max(turn.peak_bytes for turn in result.turns)}


def _work(result: Result) -> str:
    config, ranks = result.entry.config, result.entry.config.mesh.world_size
    batch, micro_batch = config.train.global_batch, config.layout.micro_batch
    replicas = f"{config.mesh.dp} ranks x" if config.mesh.dp > 1 else "in"
    return (
        f"{_plural(ranks, 'rank')} of {_plural(result.entry.threads, 'thread')}; a global batch of"
        f" {batch} samples, {replicas} {_plural(config.microbatches, 'micro-batch', 'es')} of {micro_batch}"
    )


def _plural(count: int, what: str, ending: str = "s") -> str:
    return f"{count} {what}{ending if count > 1 else ''}"


def _layout_rows(name: str, own: Result, alone: Result, limit: float) -> list[Row]:
    """A pipeline has a second row, of the time outside of its schedule's bubble."""
    row = _row(name, own, limit, "megapoly", alone)
    config = own.entry.config
    if config.layout.pp == 1:
        return [row]
    busy = 1 - simulate(schedule.build(config.layout.schedule, config.layout.pp, config.microbatches)).bubble
    work = f"the same, and the schedule's bubble of {1 - busy:.1%} counted out"
    counted_out = row | {"name": f"{name} less bubble", "work": work, "bubble": 1 - busy}
    for key in ("value", "share_of_limit", "ratio"):
        counted_out[key] = row[key] / busy
    for key in ("spread", "ratio_spread"):
        counted_out[key] = [value / busy for value in row[key]]
    return [row, counted_out]


def _spread(values: Sequence[float]) -> list[float]:
    return [min(values), max(values)]

"""What a run reports: a line per step on the terminal, one JSON object per event in ``log.jsonl``, and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.text import Text
from tensorboard.summary import Writer

from megapoly.config import Config
from megapoly.context import ParallelContext, Traffic
from megapoly.models.cost import flops_per_token, peak_tflops
from megapoly.stragglers import NOTABLE, Report


class Recorder:
    """Writes on rank 0 only; on other ranks every method but ``warn`` returns at once.

    Args:
        sources: names in the order of the plan; each has a language in ``config.data.sources``.
        last_step: at which this start of the run ends, for the time left.
        answers: some source is of instructions, of which the answers alone count in validation.

    Steps that are left, by a rollback or because the run was resumed from before them, do not mix with those that take
    their place: their events move to ``log.left-at-STEP.jsonl``, and TensorBoard goes on in a folder of its own.
    """

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        sources: list[str],
        console: Console,
        last_step: int,
        answers: bool = False,
    ) -> None:
        self.config, self.context, self.sources, self.console = config, context, sources, console
        self.languages = [config.data.sources[name].language for name in sources]
        self.active = context.rank == 0
        self.held_out = "held-out text" + (" (of instructions the answers)" if answers else "")
        self.last_tokens = config.batches.sample_at(last_step) * config.train.sequence
        self.began = time.perf_counter()
        self.first_tokens: int | None = None
        self._live = False
        self._writer: Writer | None = None
        self._since_line = self._no_sums()  # losses and counted tokens by source since the last line
        if self.active:
            self._log = (config.train.directory / "log.jsonl").open("a", encoding="utf-8", buffering=1)
        peak = config.log.peak_tflops or (_known_peak(context.device) if config.train.precision == "bf16" else None)
        self.peak_flops = peak * 1e12 * context.mesh.world_size if peak else None
        self.flops = flops_per_token(config.model, config.train.sequence)

    def note(self, what: RenderableType) -> None:
        """Lines of their own on the terminal."""
        if self._live:
            self.console.print()
            self._live = False
        self.console.print(what)

    def warn(self, text: str) -> None:
        """A line of any rank: in the log and on the terminal from rank 0, to its own stderr from another."""
        if self.active:
            self._event("warning", text=text)
            self.note(Text(text, style="yellow"))
        else:
            sys.stderr.write(f"megapoly: rank {self.context.rank}: {text}\n")  # in one piece: other ranks write too
            sys.stderr.flush()

    def start(self, step: int, sample: int, tokens: int, resumed_from: str | None) -> None:
        """A start of the run at ``step``; later steps are left."""
        self._branch_off(step)
        self._event(
            "start", step=step, sample=sample, tokens=tokens, layout=str(self.context.mesh), resumed_from=resumed_from
        )

    def step(self, values: dict[str, Any], seconds: Mapping[str, float], traffic: Mapping[str, Traffic]) -> None:
        """One step.

        Args:
            values: step, tokens, sample, stage, stage_share, batch_size (samples), loss, learning_rate, gradient_norm,
                parameter_norm, zero_gradients, skipped (why the weights were not updated, or empty), skipped_steps so
                far, under loss scaling loss_scale and overflows so far, and by number of the source source_loss (sums)
                and source_tokens. What is not finite is logged as null.
            seconds: the step's time in all (``step``) and by part.
            traffic: of the step, by axis.
        """
        if not self.active:
            return
        step_tokens = values["batch_size"] * self.config.train.sequence
        if self.first_tokens is None:
            self.first_tokens, self.began = values["tokens"] - step_tokens, time.perf_counter() - seconds["step"]
        speed = step_tokens / seconds["step"]
        sums, counts = values.pop("source_loss"), values.pop("source_tokens")
        values = {key: _finite(value) for key, value in values.items()}
        waiting = sum(axis.seconds for axis in traffic.values())
        self._event(
            "train",
            **values,
            tokens_per_second=round(speed, 1),
            layout=str(self.context.mesh),
            seconds={part: round(value, 5) for part, value in seconds.items()},
            traffic={
                name: {"calls": axis.calls, "bytes": axis.bytes, "seconds": round(axis.seconds, 5)}
                for name, axis in traffic.items()
            },
            sources={
                name: {"loss": _finite(total / count), "tokens": count}
                for name, total, count in zip(self.sources, sums, counts)
                if count
            },
        )
        if values["loss"] is not None:
            for kept, new in zip(self._since_line, (sums, counts)):
                kept[:] = [a + b for a, b in zip(kept, new)]
        if values["step"] % self.config.log.every_steps:
            return
        self._line(values, speed)
        for name, total, count in zip(self.sources, *self._since_line):
            if count:
                self._scalar(f"train/loss by source/{name}", total / count, values["tokens"])
        for language, loss in self._by_language(*self._since_line).items():
            self._scalar(f"train/loss by language/{language}", loss, values["tokens"])
        self._since_line = self._no_sums()
        self._scalars(values, speed, waiting / seconds["step"], seconds)

    def rollback(self, cause: str, *, step: int, sample: int, tokens: int, **details: Any) -> None:
        """A rollback to ``step``; what came after it is left.

        Args:
            cause: a sentence.
            details: branch, parent, left_at_step, skipped_samples, and retired: steps of checkpoints.
        """
        self._branch_off(step, always=True)
        self._event("rollback", step=step, sample=sample, tokens=tokens, cause=cause, **details)
        self.first_tokens, self._since_line = None, self._no_sums()
        if self.active:
            moved = f"; later checkpoints are in left-branch-{details['parent']}" if details["retired"] else ""
            self.note(
                f"{cause}. Back to the checkpoint of step {step}; goes on as branch {details['branch']}, without the"
                f" next {details['skipped_samples']} samples{moved}"
            )

    def stragglers(self, report: Report) -> None:
        """The slowest rank and stage of an interval; on the terminal where that rank is far from the median."""
        self._event("stragglers", **asdict(report), over_median=report.over_median)
        if report.over_median >= NOTABLE:
            self.note(str(report))

    def validation(
        self, at: str, step: int, tokens: int, sums: list[float], counts: list[float], sizes: list[float]
    ) -> None:
        """Held-out loss by source: sums of token losses in nats, counted tokens, and bytes of their text."""
        if not self.active:
            return
        rows = {
            name: (total / count, total / (math.log(2) * size))
            for name, total, count, size in zip(self.sources, sums, counts, sizes)
            if count and size
        }
        losses, bits = ({name: row[i] for name, row in rows.items()} for i in (0, 1))
        by_language = self._by_language(sums, counts)
        self._event(
            "validation", at=at, step=step, tokens=tokens, loss=losses, bits_per_byte=bits, loss_by_language=by_language
        )
        for language, loss in by_language.items():
            self._scalar(f"validation/loss by language/{language}", loss, tokens)
        for name in rows:
            self._scalar(f"validation/bits_per_byte/{name}", bits[name], tokens)
            self._scalar(f"validation/loss/{name}", losses[name], tokens)
        if not rows:
            self.note(
                "validation: no source has held-out documents; `megapoly data build --validation SHARE` holds out"
            )
            return
        when = {"before": "before training", "between": "between stages", "after": "after training"}.get(
            at, "on the way"
        )
        self.note(f"{self.held_out}, bits per byte, {when}, {_si(tokens)} tokens:")
        self.note(Columns((f"{name} {value:.2f}" for name, value in bits.items()), padding=(0, 3)))
        self.note("loss by language:")
        self.note(Columns((f"{language} {loss:.4f}" for language, loss in by_language.items()), padding=(0, 3)))

    def close(self) -> None:
        if not self.active:
            return
        if self._live:
            self.console.print()
        self._log.close()
        if self._writer is not None:
            self._writer.close()

    def _branch_off(self, step: int, always: bool = False) -> None:
        if not self.active:
            return
        left = self._leave_events(step)
        if self.config.log.tensorboard and (always or left or self._writer is None):
            if self._writer is not None:
                self._writer.close()
            root = self.config.train.directory / "tensorboard"
            parts = sorted(root.glob("*-from-step-*"), key=lambda path: int(path.name.partition("-")[0]))
            if always or left:
                parts.append(root / f"{len(parts) + 1}-from-step-{step}")
            self._writer = Writer(str(parts[-1] if parts else root))

    def _leave_events(self, step: int) -> bool:
        """Move the events of steps after ``step`` to a file of their own; whether there were any."""
        path = self.config.train.directory / "log.jsonl"
        kept: list[str] = []
        left: list[str] = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            (kept if json.loads(line)["step"] <= step else left).append(line)
        if not left:
            return False
        with (path.parent / f"log.left-at-{step}.jsonl").open("a", encoding="utf-8") as old:
            old.writelines(left)
        self._log.close()
        temporary = path.with_name(".log.jsonl")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
        self._log = path.open("a", encoding="utf-8", buffering=1)
        return True

    def _no_sums(self) -> tuple[list[float], list[float]]:
        return [0.0] * len(self.sources), [0.0] * len(self.sources)

    def _by_language(self, sums: list[float], counts: list[float]) -> dict[str, float]:
        total: dict[str, list[float]] = {}
        for language, loss, count in zip(self.languages, sums, counts):
            entry = total.setdefault(language, [0.0, 0.0])
            entry[0] += loss
            entry[1] += count
        return {language: loss / count for language, (loss, count) in total.items() if count}

    def _line(self, values: dict[str, Any], speed: float) -> None:
        assert self.first_tokens is not None
        done = values["tokens"] - self.first_tokens
        left = (self.last_tokens - values["tokens"]) * (time.perf_counter() - self.began) / max(1, done)
        step = f"step {values['step']:>5}/{self.config.total_steps}  {values['stage']} {values['stage_share']:4.0%}"
        loss = "loss not finite" if values["loss"] is None else f"loss {values['loss']:.4f}"
        if values["skipped"]:
            loss += f" (skipped: {values['skipped']})"
        speed_text, clock = f"{_si(speed)} tokens/s", f"left {_clock(left)}"
        rate, norm = f"lr {values['learning_rate']:.2e}", f"norm {_number(values['gradient_norm'])}"
        more = (
            f"weights {_number(values['parameter_norm'])}  zeros {_si(values['zero_gradients'])}",
            f"batch {values['batch_size']}",
            *([f"scale {values['loss_scale']:g}"] if "loss_scale" in values else []),
            *([f"skipped {skips}"] if (skips := values["skipped_steps"] + values.get("overflows", 0)) else []),
        )
        tokens = f"{_si(values['tokens'])} tokens"
        whole = (step, tokens, loss, rate, norm, *more, speed_text, clock)
        if not self.console.is_terminal:
            self.console.print("  ".join(whole))
            return
        # A line that wraps could not be written over: the narrower the terminal, the fewer fields.
        forms = (
            whole,
            (step, tokens, loss, rate, norm, speed_text, clock),
            (step, loss, rate, norm, speed_text, clock),
            (step, loss, speed_text, clock),
            (step, clock),
        )
        text = next((t for t in map("  ".join, forms) if len(t) < self.console.width), step)
        self.console.file.write(f"\r\x1b[K{text}")
        self.console.file.flush()
        self._live = True

    def _scalars(
        self,
        values: dict[str, Any],
        speed: float,
        waiting: float,
        seconds: Mapping[str, float],
    ) -> None:
        tokens = values["tokens"]
        for key in (
            "loss", "learning_rate", "gradient_norm", "parameter_norm", "zero_gradients", "batch_size", "loss_scale",
            "skipped_steps", "overflows",
        ):  # fmt: skip
            if values.get(key) is not None:
                self._scalar(f"train/{key}", values[key], tokens)
        self._scalar("speed/tokens per second", speed, tokens)
        self._scalar("speed/model TFLOP per second", speed * self.flops / 1e12, tokens)
        if self.peak_flops:
            self._scalar("speed/MFU", speed * self.flops / self.peak_flops, tokens)
        if self.context.device.type == "cpu":
            self._scalar("speed/share of the step waiting for other ranks", waiting, tokens)
        for part, value in seconds.items():
            self._scalar(f"seconds/{part}", value, tokens)
        self._scalar("memory/peak GB of rank 0", _peak_memory(self.context.device) / 1e9, tokens)

    def _scalar(self, tag: str, value: float, tokens: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(tag, value, tokens)

    def _event(self, kind: str, **values: Any) -> None:
        if self.active:
            self._log.write(json.dumps({"kind": kind, **values}) + "\n")


def _known_peak(device: torch.device) -> float | None:
    return peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _peak_memory(device: torch.device) -> float:
    """Bytes: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def _finite(value: Any) -> Any:
    """None in place of what JSON has no number for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2f}"


def _si(value: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= factor:
            return f"{value / factor:.2f}{unit}"
    return f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"

"""``megapoly instruct``."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from megapoly.cli.common import SETTINGS, JsonFile, count, make_table, print_whole
from megapoly.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megapoly.instruct.asking import Asker
    from megapoly.instruct.config import Config
    from megapoly.instruct.limits import Account
    from megapoly.instruct.rounds import Tell
    from megapoly.instruct.tasks import Seed

instruct_app = typer.Typer(help="Tasks in many languages, written by a model (self-instruct).", **SETTINGS)


@instruct_app.command("generate")
def instruct_generate(
    path: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="TOML file, such as examples/instruct/multialpaca.toml.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as rounds.count=3.")
    ] = None,
    languages: Annotated[
        list[str] | None, typer.Option("--language", help="Only this one of the config's; several times.")
    ] = None,
    seeds_only: Annotated[bool, typer.Option("--seeds-only", help="End when the seeds are translated.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show a prompt, the requests and what they can cost; ask nothing.")
    ] = False,
) -> None:
    """Translate the seeds, then ask for tasks in rounds, and keep those that are new: tasks.LANG.jsonl.

    The same command again goes on where it was interrupted; nothing that was answered is asked again. Ctrl-C waits for
    the answers under way; a second one leaves them.

    [bold]Example:[/bold] OPENAI_API_KEY=... megapoly instruct generate instruct.toml --language th --dry-run
    """
    from megapoly.instruct import config as configuration
    from megapoly.instruct import tasks

    config = configuration.load(path, overrides or [])
    if config.local:
        from megapoly.instruct.local import with_own_template

        config = with_own_template(config)
    chosen = list(dict.fromkeys(languages or config.languages))
    unknown = [code for code in chosen if code not in config.languages]
    if unknown:
        raise ConfigError(f"--language {unknown[0]}: the config has {', '.join(config.languages)}")
    seeds = tasks.read_seeds(config.seeds)
    left_out = set(config.leave_out) - {seed.id for seed in seeds}
    if left_out:
        raise ConfigError(f"{path}: leave_out: {config.seeds} has no seed {sorted(left_out)[0]!r}")
    seeds = [seed for seed in seeds if seed.id not in config.leave_out]
    by_language = {code: tasks.read_seeds(own) if (own := config.languages[code].seeds) else seeds for code in chosen}
    if dry_run:
        _show_plan(config, by_language, seeds_only)
    elif not _generate(config, by_language, seeds_only):
        raise typer.Exit(1)


@instruct_app.command("report")
def instruct_report(
    directory: Annotated[Path, typer.Argument(help="The config's directory.", metavar="FOLDER")],
    json_file: JsonFile = None,
) -> None:
    """What was asked, kept and dropped, and what it cost, by language. A run may go on meanwhile.

    [bold]Example:[/bold] megapoly instruct report runs/multialpaca
    """
    from megapoly.data.files import write_whole
    from megapoly.instruct import report

    config, standings = report.read_folder(directory)
    _show_report(config, standings)
    if json_file:
        write_whole(json_file, json.dumps([each.row() for each in standings], indent=1).encode())


def _show_report(config: Config, standings: Any) -> None:
    from megapoly.instruct import report

    for heads, rows in report.tables(config, standings).values():
        table = make_table(*heads)
        for row in rows:
            table.add_row(*row)
        print_whole(table)
    for each in standings:
        if each.refused:
            print(f"{each.language}: refused, mostly: {each.refusal}")
    print(report.budget_line(config, report.total(standings)))
    if any(each.uncertain.total for each in standings):
        print("uncertain: the most that requests can have cost that were interrupted, or went wrong at the server")


def _show_plan(config: Config, seeds: dict[str, list[Seed]], seeds_only: bool) -> None:
    """Requests, a bound of what they take, and the first prompt."""
    from megapoly.instruct import plan

    planned = [plan.plan(config, code, each, seeds_only) for code, each in seeds.items()]
    priced = config.budget.priced
    most = "at most" if all(each.bound for each in planned) else "about"
    heads = ("language", "seeds", "translations at most", "requests", f"tokens {most}")
    table = make_table(*heads, *[f"cost {most}"] * priced)
    for each in planned:
        cells = (each.seeds, each.translations, each.requests, each.most.total)
        cost = [f"{float(config.budget.cost(*each.most)):,.2f}"] * priced
        table.add_row(each.language, *(f"{cell:,}" for cell in cells), *cost)
    print(plan.first_prompt(config, planned[0].language, seeds[planned[0].language], seeds_only))
    print()
    print_whole(table)
    print(plan.summary(config, planned))


def _generate(config: Config, seeds: dict[str, list[Seed]], seeds_only: bool) -> bool:
    """Whether all is there at the end."""
    from megapoly.data.lock import lock_folder
    from megapoly.instruct import report
    from megapoly.instruct.limits import Account
    from megapoly.instruct.rounds import LanguageRun

    try:
        config.directory.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(config.directory, "another run works there", "wait for its end, or choose another directory")
    except OSError as error:
        raise DataError(f"{config.directory}: cannot be written ({error.strerror})") from error
    stop = _Stop()
    try:
        report.note_config(config)
        account = Account(config.budget, report.spent(config.directory))
        with stop.listening(), _bar(account, config) as bar:
            for code, each in seeds.items():
                asker = _asker(config, code, account, stop)
                run = LanguageRun(config, code, each, bar(code))
                try:
                    whole = run.go(asker, seeds_only)
                finally:
                    run.close()
                if not whole:
                    break
        _say_end(config, asker, whole)
        return whole
    finally:
        os.close(lock)


def _say_end(config: Config, asker: Asker, whole: bool) -> None:
    from megapoly.instruct import report

    recorded, standings = report.read_folder(config.directory)
    _show_report(recorded, standings)
    if asker.ended == "budget":
        budget = "tokens" if config.budget.money is None else "tokens or budget.money"
        print(f"The budget does not allow another request: raise budget.{budget}, and run the same command again.")
    elif not whole:
        print("Stopped. The same command goes on.")


def _asker(config: Config, code: str, account: Account, stop: _Stop) -> Asker:
    from megapoly.instruct.asking import Asker
    from megapoly.instruct.limits import Pace
    from megapoly.instruct.prompts import draw

    if config.local:
        from megapoly.instruct.local import Checkpoint

        model = Checkpoint(config.local, draw(2**31, config.seed, code))
        return Asker(model, config.budget, account, Pace(None, None, time.monotonic), stopping=lambda: stop.asked)
    from megapoly.instruct.endpoint import Server

    settings = config.endpoint
    assert settings is not None
    pace = Pace(settings.requests_per_minute, settings.tokens_per_minute, time.monotonic)
    return Asker(
        Server(settings),
        config.budget,
        account,
        pace,
        settings.retries,
        settings.backoff_seconds,
        lambda: stop.asked,
    )


class _Stop:
    """Set by Ctrl-C or SIGTERM. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, b"\nmegapoly: waits for the answers under way; Ctrl-C again leaves them\n")

    @contextmanager
    def listening(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)


@contextmanager
def _bar(account: Account, config: Config) -> Iterator[Any]:
    """A bar of requests; what makes the ``tell`` of a language."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from megapoly.instruct import report

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[said]}", TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def of(code: str) -> Tell:
            task = bar.add_task(code, total=None, said="")

            def tell(number: int, done: int, wanted: int, kept: int) -> None:
                name = f"{code} round {number} of {config.rounds.count}" if number else f"{code} seeds"
                said = f"{count(kept, 'task')}; {report.budget_line(config, account.spent)}"
                bar.update(task, description=name, completed=done, total=wanted, said=said)

            return tell

        yield of

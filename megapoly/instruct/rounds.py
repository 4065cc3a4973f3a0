"""Multilingual self-instruct in one language: translated seeds, then rounds (polylm.md, 5). No torch.

What is asked in a round is a function of (seed, language, round, request, tasks at its beginning), and answers are
judged in the order of the requests, whenever they come. So all state follows from the journal, and the tasks are the
same whatever the concurrency, the faults, and wherever the process was killed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megapoly.data.files import write_whole
from megapoly.errors import DataError
from megapoly.instruct import prompts, tasks
from megapoly.instruct.asking import Asker, Request, sha256
from megapoly.instruct.config import Config
from megapoly.instruct.journal import Journal, Key
from megapoly.instruct.model import Answer
from megapoly.instruct.rouge import Pool
from megapoly.instruct.tasks import Seed, Task
from megapoly.instruct.words import load_words

FORMAT = "megapoly-instruct-1"
REFUSED, TRANSLATION = "refused prompts", "untranslated seeds"

# Round (0: seeds), answered, of how many, tasks kept.
Tell = Callable[[int, int, int, int], None]


class LanguageRun:
    """Self-instruct in one language, in ``directory`` of the config, which the caller has locked.

    Args:
        seeds: in the language, or in that of the config's seeds, to be translated.
        tell: is called as things go on.

    Attributes:
        kept: the tasks.

    Raises:
        ConfigError: the folder holds the language with other settings, or a package is missing.
        DataError: its journal is damaged.
    """

    def __init__(self, config: Config, code: str, seeds: Sequence[Seed], tell: Tell = lambda *_: None) -> None:
        self._config, self.code, self._tell = config, code, tell
        self._given, self._translate = seeds, needs_translation(config, code)
        self._form = prompt_form(config)
        self._words = load_words(code)
        self._pool = Pool(config.filter.similarity)
        self.kept: list[Task] = []
        self._dropped: list[dict[str, Any]] = []
        self._seeds: list[Seed] = []
        self._written = True
        self.journal = Journal(file_of(config.directory, "requests", code), self._job())

    def close(self) -> None:
        self.journal.close()

    def _job(self) -> dict[str, Any]:
        """What decides the tasks, beside the answers."""
        config, rounds = self._config, self._config.rounds
        model = config.endpoint.model if config.endpoint else config.local.path.name if config.local else ""
        return {
            "format": FORMAT,
            "language": self.code,
            "name": config.name(self.code),
            "seed": config.seed,
            "seeds (SHA-256)": tasks.digest(self._given),
            "translated": self._translate,
            "rounds": {key: value for key, value in rounds.model_dump().items() if key != "count"},
            "similarity": config.filter.similarity,
            "input_overlap": str(config.overlap(self.code)),
            "model": model,
            "form": self._form,
        }

    def go(self, asker: Asker, seeds_only: bool = False) -> bool:
        """Ask for what is missing, and write what was made; whether all is there.

        Raises:
            DataError: the journal is of other prompts, or the model writes nothing that is a task.
            ConfigError, TrainingError: see :meth:`Asker.answers`.
        """
        if not self._get_seeds(asker):
            return False
        if seeds_only:
            return True
        for seed in self._seeds:
            self._pool.add(self._words(seed.task.instruction))
        for number in range(1, self._config.rounds.count + 1):
            if not self._round(number, asker):
                return False
        self._write()
        return True

    def _get_seeds(self, asker: Asker) -> bool:
        """Those that are given, or their translations, a few times each until one can be used, or one is refused."""
        if not self._translate:
            self._seeds = list(self._given)
        else:
            found: dict[int, Task] = {}
            refused: set[int] = set()
            for trial in range(1, self._config.rounds.translations + 1):
                wanted = [i for i in range(len(self._given)) if i not in found and i not in refused]
                requests = [self._translation(i, trial) for i in wanted]
                for _ in self._ask(requests, asker, 0):
                    pass
                if any(request.key not in self.journal.answers for request in requests):
                    return False
                for i, request in zip(wanted, requests):
                    answer = self.journal.answers[request.key]
                    task = self._translated(answer, self._given[i])
                    if task is not None:
                        found[i] = task
                    elif answer.refused:
                        refused.add(i)
            self._seeds = [Seed(self._given[i].id, found[i]) for i in sorted(found)]
            for i in range(len(self._given)):
                if i not in found:
                    self._drop(Key(0, i), TRANSLATION, text=self._given[i].task.block(1))
        if len(self._seeds) < self._config.rounds.seeds + self._config.rounds.pool:
            raise DataError(
                f"{self.journal.path}: {len(self._seeds)} of {len(self._given)} seeds are there in"
                f" {self._config.name(self.code)}, too few for a prompt{self._why()}; give more, or another model"
            )
        rows = [{"id": seed.id, **asdict(seed.task)} for seed in self._seeds]
        write_whole(file_of(self._config.directory, "seeds", self.code), tasks.to_lines(rows))
        return True

    def _why(self) -> str:
        """What the model refuses, for an error."""
        count, reason = self.journal.refused()
        return f" (the model refused {count} of {len(self.journal.answers)} prompts, mostly: {reason})" if count else ""

    def _translation(self, number: int, trial: int) -> Request:
        config = self._config
        source, language = config.name(config.seeds_language), config.name(self.code)
        prompt = prompts.translation_prompt(source, language, self._given[number].task, self._form)
        return Request(Key(0, number, trial), (trial - 1) * len(self._given) + number, prompt)

    def _translated(self, answer: Answer, seed: Seed) -> Task | None:
        task = tasks.parse_one(self._opened(answer.text, 1), answer.cut)
        return task if task is not None and bool(task.input) == bool(seed.task.input) else None

    def _round(self, number: int, asker: Asker) -> bool:
        """Ask for what a round lacks, and judge its answers in order."""
        requests = [self._request(number, i, self.kept) for i in range(self._config.rounds.size(number))]
        answers, judged, proposed = self.journal.answers, 0, 0
        for _ in self._ask(requests, asker, number):
            while judged < len(requests) and requests[judged].key in answers:
                proposed += self._judge(requests[judged].key, answers[requests[judged].key])
                judged += 1
        if judged < len(requests):
            return False
        if not proposed:
            raise DataError(
                f"{self.journal.path}: round {number} has no task in {len(requests)} answers{self._why()}; see what the"
                " model writes, and begin in another directory with one that follows the prompt"
            )
        self._written = False
        return True

    def _ask(self, requests: Sequence[Request], asker: Asker, number: int) -> Iterator[None]:
        """Comes back after every answer, and before the first."""
        answers = self.journal.answers
        for request in requests:
            if self.journal.prompts.get(request.key, digest := sha256(request.prompt)) != digest:
                raise DataError(
                    f"{self.journal.path}: request {request.key.number} of round {number} was asked with another prompt"
                    " than that of this version; begin anew in another directory"
                )
        missing = [request for request in requests if request.key not in answers]
        done = len(requests) - len(missing)
        if missing:
            self._write()
        self._tell(number, done, len(requests), len(self.kept))
        yield
        for _ in asker.answers(missing, self.journal):
            done += 1
            yield
            self._tell(number, done, len(requests), len(self.kept))

    def _request(self, number: int, i: int, pool: Sequence[Task]) -> Request:
        rounds, config = self._config.rounds, self._config
        key = (config.seed, self.code, number, i)
        shown = prompts.examples(key, self._seeds, pool, rounds.seeds, rounds.pool)
        prompt = prompts.task_prompt(config.name(self.code), shown, rounds.tasks, self._form)
        before = sum(rounds.size(each) for each in range(1, number))
        own = len(self._given) * rounds.translations + before + i
        return Request(Key(number, i), own, prompt)

    def _opened(self, text: str, number: int) -> str:
        """An answer with the label that ended its prompt."""
        if self._form == "chat" or tasks.begins(text):
            return text
        return prompts.opening(number) + text

    def _judge(self, key: Key, answer: Answer) -> int:
        """Keep or drop the tasks of an answer; how many there are."""
        if answer.refused:
            self._drop(key, REFUSED, text=answer.finish or "")
            return 0
        shown = self._config.rounds.seeds + self._config.rounds.pool
        found, dropped = tasks.parse(self._opened(answer.text, shown + 1), answer.cut)
        words = [self._words(task.instruction) for task in found]
        for each in dropped:
            self._drop(key, each.reason, text=each.text)
        judged = [self._reason(task, each) for task, each in zip(found, words)]
        alike = self._pool.sift(words, [reason is None for _, reason in judged])
        for (task, reason), like in zip(judged, alike):
            if like is not None:
                self._drop(key, tasks.SIMILAR, **asdict(task), like=self._instruction(like))
            elif reason is not None:
                self._drop(key, reason, **asdict(task))
            else:
                self.kept.append(task)
        return len(found)

    def _reason(self, task: Task, words: Sequence[str]) -> tuple[Task, str | None]:
        """The task, without an input that its instruction holds already, and why it is dropped, if similar to none."""
        if not words:
            return task, tasks.NO_WORDS
        if task.input and task.input in task.instruction:
            return Task(task.instruction, "", task.output), None
        if task.input and self._pool.exceeds(words, self._words(task.input), self._config.overlap(self.code)):
            return task, tasks.REPEATED_INPUT
        return task, None

    def _instruction(self, member: int) -> str:
        """That of a member of the pool: seeds, then kept tasks."""
        seeds = len(self._seeds)
        return self._seeds[member].task.instruction if member < seeds else self.kept[member - seeds].instruction

    def _drop(self, key: Key, reason: str, **found: str) -> None:
        self._dropped.append({"reason": reason, "round": key.round, "request": key.number, **found})

    def _write(self) -> None:
        """The files of all rounds that are whole."""
        if not self._written:
            directory = self._config.directory
            write_whole(file_of(directory, "dropped", self.code), tasks.to_lines(self._dropped))
            write_whole(file_of(directory, "tasks", self.code), tasks.to_lines(map(asdict, self.kept)))
            self._written = True


def needs_translation(config: Config, code: str) -> bool:
    """Whether the model has to translate the seeds first."""
    language = config.languages[code]
    return code != config.seeds_language and language.seeds is None


def prompt_form(config: Config) -> prompts.Form:
    """Whether the model answers a prompt, or goes on from it."""
    if config.endpoint:
        return config.endpoint.api
    return "completions" if config.local and config.local.template is None else "chat"


def file_of(directory: Path, kind: str, code: str) -> Path:
    return directory / f"{kind}.{code}.jsonl"

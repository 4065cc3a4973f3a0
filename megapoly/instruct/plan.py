"""What a run will ask, before it does. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megapoly.instruct import prompts
from megapoly.instruct.config import Config
from megapoly.instruct.limits import reserve
from megapoly.instruct.model import Tokens
from megapoly.instruct.rounds import needs_translation, prompt_form
from megapoly.instruct.tasks import Seed


class Planned(NamedTuple):
    """Of one language; nothing that is there already is taken off.

    Attributes:
        translations: requests for seeds, each asked once.
        requests: of the rounds.
        most: tokens that both can take.
    """

    language: str
    seeds: int
    translations: int
    requests: int
    most: Tokens


class _Sizes(NamedTuple):
    """What :func:`reserve` needs of a model."""

    limit: int | None
    context: int | None


def plan(config: Config, code: str, seeds: Sequence[Seed], seeds_only: bool) -> Planned:
    """Requests and their bound. A task of the pool counts as long as the longest seed, in English where it is so."""
    sizes = _sizes(config)
    most = Tokens()
    translations = len(seeds) if needs_translation(config, code) else 0
    for seed in seeds[:translations]:
        prompt = prompts.translation_prompt(
            config.name(config.seeds_language), config.name(code), seed.task, prompt_form(config)
        )
        most = most.plus(reserve(prompt, sizes, config.budget))
    requests = 0 if seeds_only else config.requests()
    longest = sorted((seed.task for seed in seeds), key=lambda task: -len(task.block(1).encode()))
    shown = config.rounds.seeds + config.rounds.pool
    prompt = prompts.task_prompt(config.name(code), longest[:shown], config.rounds.tasks, prompt_form(config))
    each = reserve(prompt, sizes, config.budget)
    most = most.plus(Tokens(each.prompt * requests, each.completion * requests))
    return Planned(code, len(seeds), translations, requests, most)


def first_prompt(config: Config, code: str, seeds: Sequence[Seed], seeds_only: bool) -> str:
    """Of the first round, with seeds as they are given; or of the first translation."""
    form, rounds = prompt_form(config), config.rounds
    if seeds_only and needs_translation(config, code):
        return prompts.translation_prompt(config.name(config.seeds_language), config.name(code), seeds[0].task, form)
    shown = prompts.examples((config.seed, code, 1, 0), seeds, [], rounds.seeds, rounds.pool)
    return prompts.task_prompt(config.name(code), shown, rounds.tasks, form)


def summary(config: Config, planned: Sequence[Planned]) -> str:
    """All together, in a line."""
    most = Tokens()
    for each in planned:
        most = most.plus(each.most)
    requests = sum(each.translations + each.requests for each in planned)
    line = f"{requests:,} requests take at most {most.total:,} tokens"
    budget = config.budget
    if budget.priced:
        line += f", {float(budget.cost(*most)):,.2f}"
    limits = [f"{budget.tokens:,} tokens" if budget.tokens else "", f"{budget.money:,.2f}" if budget.money else ""]
    caps = " and ".join(filter(None, limits))
    return f"{line}; retries come on top" + (f"; the budget ends them at {caps}." if caps else "; there is no budget.")


def _sizes(config: Config) -> _Sizes:
    if config.endpoint:
        return _Sizes(config.endpoint.max_tokens, config.endpoint.context)
    assert config.local is not None
    return _Sizes(config.local.max_tokens, None)

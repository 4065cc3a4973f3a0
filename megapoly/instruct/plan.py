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
        translations: requests for seeds, where none can be used before the last trial.
        requests: of the rounds.
        most: tokens that both can take.
        bound: whether they cannot take more; else prompts show what the model writes, and no context limits them.
    """

    language: str
    seeds: int
    translations: int
    requests: int
    most: Tokens
    bound: bool


class _Sizes(NamedTuple):
    """What :func:`reserve` needs of a model."""

    limit: int | None
    context: int | None


def plan(config: Config, code: str, seeds: Sequence[Seed], seeds_only: bool) -> Planned:
    """Requests and their bound. Where no context limits a prompt, what the model writes counts as the longest seeds."""
    sizes = _sizes(config)
    most = Tokens()
    rounds = config.rounds
    translated = needs_translation(config, code)
    translations = len(seeds) * rounds.translations if translated else 0
    for seed in seeds if translated else ():
        prompt = prompts.translation_prompt(
            config.name(config.seeds_language), config.name(code), seed.task, prompt_form(config)
        )
        each = reserve(prompt, sizes, config.budget)
        most = most.plus(Tokens(each.prompt * rounds.translations, each.completion * rounds.translations))
    requests = 0 if seeds_only else config.requests()
    longest = sorted((seed.task for seed in seeds), key=lambda task: -len(task.block(1).encode()))
    shown = longest[: rounds.seeds + rounds.pool]
    prompt = prompts.task_prompt(config.name(code), shown, rounds.tasks, prompt_form(config))
    known = requests == 0 or not (translated or (rounds.pool and rounds.count > 1))
    if not known and sizes.context:
        prompt = prompt.ljust(sizes.context)  # as long as the model takes
    each = reserve(prompt, sizes, config.budget)
    most = most.plus(Tokens(each.prompt * requests, each.completion * requests))
    return Planned(code, len(seeds), translations, requests, most, known or sizes.context is not None)


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
    bound = all(each.bound for each in planned)
    line = f"at most {requests:,} requests take {'at most' if bound else 'about'} {most.total:,} tokens"
    budget = config.budget
    if budget.priced:
        line += f", {float(budget.cost(*most)):,.2f}"
    limits = [f"{budget.tokens:,} tokens" if budget.tokens else "", f"{budget.money:,.2f}" if budget.money else ""]
    caps = " and ".join(filter(None, limits))
    if not bound:
        limit = "endpoint.context would bound it" if config.endpoint else "the checkpoint's positions bound it"
        line += f" (prompts show tasks that the model writes, here as long as the longest seeds; {limit})"
    return f"{line}; retries come on top" + (f"; the budget ends them at {caps}." if caps else "; there is no budget.")


def _sizes(config: Config) -> _Sizes:
    if config.endpoint:
        return _Sizes(config.endpoint.max_tokens, config.endpoint.context)
    assert config.local is not None
    return _Sizes(config.local.max_tokens, None)

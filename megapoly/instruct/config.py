"""The config of self-instruct: TOML in, frozen models out, checked. No torch."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from megapoly.config_file import apply_override, explain, read_toml, refuse_unknown
from megapoly.errors import ConfigError

#: Names by which prompts call languages that need none in the config.
NAMES = {
    "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
    "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi", "hu": "Hungarian",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "ms": "Malay", "nl": "Dutch",
    "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish", "sw": "Swahili",
    "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
#: Of an input with its instruction, where it is not that of the filter (PolyLM).
INPUT_OVERLAP = {"ko": 0.3, "vi": 0.3, "ar": 0.2}

Overlap = typing.Annotated[float, Field(gt=0.0, le=1.0)]
Count = typing.Annotated[int, Field(ge=0)]


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Language(_Section):
    """One of the languages that tasks are made in."""

    name: str | None = Field(None, description="in English; known for the usual codes")
    seeds: Path | None = Field(None, description="seeds in this language; translated by the model where not given")
    input_overlap: Overlap | None = Field(None, description="filter.input_overlap, or PolyLM's of ko, vi and ar")


class Rounds(_Section):
    """How often the model is asked, and for what."""

    count: PositiveInt = 10
    requests: PositiveInt = Field(100, description="of every round but the first")
    first: PositiveInt = Field(10, description="requests of the first round, which knows no tasks but the seeds")
    seeds: PositiveInt = Field(2, description="that a prompt shows")
    pool: Count = Field(1, description="made tasks that it shows; seeds in their place while there are none")
    tasks: PositiveInt = Field(17, description="that it asks for")
    translations: PositiveInt = Field(3, description="trials of a seed's translation before it is left out")

    def size(self, number: int) -> int:
        """Requests of a round, counted from 1."""
        return self.first if number == 1 else self.requests


class Filter(_Section):
    """What is kept of what the model writes."""

    similarity: Overlap = Field(0.7, description="ROUGE-L with one in the pool that drops an instruction")
    input_overlap: Overlap = Field(0.5, description="ROUGE-L with its instruction above which an input drops a task")


class Endpoint(_Section):
    """A server that speaks OpenAI's protocol."""

    model: str
    base_url: str = "https://api.openai.com/v1"
    api: Literal["chat", "completions"] = Field("chat", description="completions: the model goes on from the prompt")
    key_variable: str = Field("OPENAI_API_KEY", description='environment variable with the key; "" where there is none')
    temperature: NonNegativeFloat = 1.0
    top_p: Overlap = 1.0
    max_tokens: PositiveInt | None = Field(None, description="of an answer; what the context leaves where not given")
    context: PositiveInt | None = Field(None, description="most tokens of prompt and answer together")
    extra: dict[str, Any] = Field({}, description="further fields of every request")
    concurrency: PositiveInt = 8
    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    timeout_seconds: PositiveFloat = 180.0
    retries: Count = Field(8, description="of one request before the run ends")
    backoff_seconds: NonNegativeFloat = Field(1.0, description="before the first retry; doubled for each, to a minute")


class Local(_Section):
    """A run folder, a checkpoint, or a folder of Hugging Face or Megatron, on this machine."""

    path: Path
    tokenizer: Path | None = None
    max_tokens: PositiveInt = 1024
    temperature: NonNegativeFloat = 0.7
    top_p: Overlap = 0.8
    repetition_penalty: PositiveFloat = 1.0
    template: str | None = Field(
        None,
        description="of a tuned model, with {prompt}; where not given that of a model that megapoly has tuned, and"
        " others go on from the prompt",
    )
    batch: PositiveInt = 16
    dtype: Literal["fp32", "bf16", "fp16", "fp64"] | None = Field(None, description="as stored where not given")
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Budget(_Section):
    """What the whole folder may cost, in all runs together. Nothing is asked that could exceed it."""

    tokens: PositiveInt | None = None
    money: PositiveFloat | None = Field(None, description="in the currency of the prices")
    prompt_price: NonNegativeFloat = Field(0.0, description="of a million tokens of prompts")
    completion_price: NonNegativeFloat = Field(0.0, description="of a million tokens of answers")

    @property
    def priced(self) -> bool:
        return self.prompt_price > 0 or self.completion_price > 0

    def cost(self, prompt: int, completion: int) -> Fraction:
        """Of so many tokens, exactly."""
        prices = (Fraction(str(self.prompt_price)), Fraction(str(self.completion_price)))
        return (prompt * prices[0] + completion * prices[1]) / 1_000_000


class Config(_Section):
    """Self-instruct in one or several languages."""

    directory: Path
    seeds: Path = Field(description="tasks that people wrote, as JSON lines")
    seeds_language: str = "en"
    leave_out: list[str] = Field([], description="ids of seeds that do not carry over to other languages")
    languages: dict[str, Language] = Field(description="by code; also a list of codes")
    seed: int = Field(0, description="of all draws")
    rounds: Rounds = Rounds()
    filter: Filter = Filter()
    endpoint: Endpoint | None = None
    local: Local | None = None
    budget: Budget = Budget()

    @pydantic.field_validator("languages", mode="before")
    @classmethod
    def _by_code(cls, value: Any) -> Any:
        return {code: {} for code in value} if isinstance(value, list) else value

    def name(self, code: str) -> str:
        """What prompts call a language."""
        language = self.languages.get(code, Language())
        return language.name or NAMES[code.split("-")[0]]

    def overlap(self, code: str) -> Fraction:
        """The most ROUGE-L of an input with its instruction."""
        language = self.languages[code]
        given = language.input_overlap
        if given is None:
            given = INPUT_OVERLAP.get(code.split("-")[0], self.filter.input_overlap)
        return Fraction(str(given))

    def requests(self) -> int:
        """Of all rounds of a language."""
        return sum(self.rounds.size(number) for number in range(1, self.rounds.count + 1))


def load(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file, apply ``section.key=value`` overrides, check everything.

    Raises:
        ConfigError: a missing file, a syntax error, an unknown key, a wrong value, or values that do not fit together.
    """
    tree = read_toml(path)
    for override in overrides:
        apply_override(tree, override)
    refuse_unknown(Config, tree, (), str(path))
    try:
        config = Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {explain(problem)}" for problem in error.errors())) from error
    problem = _problem(config)
    if problem:
        raise ConfigError(f"{path}: {problem}")
    return _resolve(config, path.parent)


def _problem(config: Config) -> str | None:
    """What does not fit together."""
    if (config.endpoint is None) == (config.local is None):
        return "expected either [endpoint] or [local], the model that writes the tasks"
    if not config.languages:
        return 'languages is empty; name some, such as languages = ["es", "th"]'
    for code in [*config.languages, config.seeds_language]:
        language = config.languages.get(code, Language())
        if language.name is None and code.split("-")[0] not in NAMES:
            return f'language {code!r} has no name here; give it one, [languages.{code}] name = "..."'
        if not code.replace("-", "").isalnum() or not code.isascii():
            return f"language {code!r}: a code is letters, digits and -, such as pt-BR"
    return _endpoint_problem(config.endpoint, config.budget) if config.endpoint else _local_problem(config.local)


def _endpoint_problem(endpoint: Endpoint, budget: Budget) -> str | None:
    if endpoint.max_tokens is None and endpoint.context is None:
        return "endpoint: give max_tokens, context, or both: they bound what a request can cost"
    if endpoint.max_tokens and endpoint.context and endpoint.max_tokens >= endpoint.context:
        return f"endpoint.max_tokens {endpoint.max_tokens} leaves nothing of context {endpoint.context} for a prompt"
    if budget.money is not None and not budget.priced:
        return "budget.money needs budget.prompt_price and budget.completion_price, of a million tokens"
    taken = sorted({"model", "messages", "prompt", "max_tokens", "stream", "n", "best_of"} & endpoint.extra.keys())
    if taken:
        return f"endpoint.extra.{taken[0]} cannot be set there: megapoly sets it, or relies on it"
    return None


def _local_problem(local: Local | None) -> str | None:
    if local and local.template is not None and local.template.count("{prompt}") != 1:
        return f"local.template {local.template!r} has to hold {{prompt}} once"
    return None


def _resolve(config: Config, folder: Path) -> Config:
    def at(path: Path) -> Path:
        return Path(os.path.abspath(folder / path))

    languages = {
        code: each.model_copy(update={"seeds": each.seeds and at(each.seeds)})
        for code, each in config.languages.items()
    }
    update: dict[str, Any] = {"directory": at(config.directory), "seeds": at(config.seeds), "languages": languages}
    if config.local:
        tokenizer = config.local.tokenizer
        paths = {"path": at(config.local.path), "tokenizer": tokenizer and at(tokenizer)}
        update["local"] = config.local.model_copy(update=paths)
    return config.model_copy(update=update)

"""A model of megapoly as lm-evaluation-harness sees it.

Texts become tokens as in the harness's ``HFLM``, so that the same weights have the same likelihoods and texts in both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megapoly.errors import ConfigError, DataError
from megapoly.evaluate.leader import Leader
from megapoly.generate import Question, Sampling

Request: TypeAlias = tuple[Any, list[int], list[int]]  # something that names it, context, continuation
Told = Callable[[str, float], object]
_KNOWN = {"do_sample", "temperature", "top_k", "top_p", "repetition_penalty"}


class HarnessModel(TemplateLM):
    """Answers the requests of the harness; its rank is the only one that knows of them.

    Args:
        most: tokens of a text, instead of those that a task asks for.
        told: of what is done, and which share of it.
        questions: tasks whose prompts are in the form of the tuned model.

    Attributes:
        truncated: task and number of the records of which the beginning was left out, since they were too long.
    """

    def __init__(
        self,
        leader: Leader,
        most: int | None = None,
        told: Told = lambda what, share: None,
        questions: Container[str] = (),
    ) -> None:
        super().__init__()
        self._leader, self._most, self._told, self._questions = leader, most, told, questions
        self._vocabulary = leader.generator.vocabulary
        self._positions = leader.generator.positions
        self.truncated: set[tuple[str, int]] = set()
        self._asked: Sequence[Instance] = ()

    @property
    def eot_token_id(self) -> int:
        return self._vocabulary.prefix

    @property
    def prefix_token_id(self) -> int:
        return self._vocabulary.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **rest: Any) -> list[int]:
        if add_special_tokens is None:
            return self._vocabulary.encode_whole(string)
        return self._vocabulary.encode(string, begins=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._asked = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Request], **rest: Any) -> list[tuple[float, bool]]:
        for instance, (_, context, continuation) in zip(self._asked, requests, strict=True):
            if len(context) + len(continuation) > self._positions + 1:
                self._note(instance)
        rows = [self._row(*request) for request in requests]
        found = self._leader.score(rows, lambda share: self._told(f"scoring {len(rows):,} options", share))
        return [(each.log_probability, each.greedy) for each in found]

    def _row(self, name: Any, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """What does not fit loses its beginning, as in HFLM; which refuses a continuation that alone is too long."""
        if not continuation:
            raise DataError(f"request {name!r}: has no token to be scored; expected at least 1")
        return [*context, *continuation][-self._positions - 1 :], min(len(continuation), self._positions)

    def _note(self, instance: Instance) -> None:
        assert instance.task_name is not None
        assert instance.doc_id is not None
        self.truncated.add((instance.task_name, instance.doc_id))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        rows: list[tuple[list[int], int]] = []
        bounds = [0]
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self._positions, context_len=1)
            rows += [self._row(None, *make_disjoint_window(window)) for window in windows]
            bounds.append(len(rows))
        found = self._leader.score(rows, lambda share: self._told(f"scoring {len(rows):,} windows", share))
        parts = (found[begin:end] for begin, end in pairwise(bounds))
        return [sum(each.log_probability for each in part) for part in parts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts: dict[int, str] = {}
        for settings, numbers in alike.items():
            found = self._generate([requests[i] for i in numbers], json.loads(settings))
            texts.update(zip(numbers, found))
        return [texts[i] for i in range(len(requests))]

    def _generate(self, requests: Sequence[Instance], settings: dict[str, Any]) -> list[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(settings))
        until = [text for text in options.pop("until") if text]
        asked = options.pop("max_gen_toks")
        sampling = _sampling(self._most or asked, until, options)
        room = self._positions - sampling.tokens
        if room < 1:
            raise ConfigError(
                f"texts of {sampling.tokens} tokens leave no prompt in the model's {self._positions} positions; give"
                f" --max-tokens {self._positions // 2} or so"
            )
        prompts = [self._prompt(request) for request in requests]
        for request, prompt in zip(requests, prompts, strict=True):
            if len(prompt) > room:
                self._note(request)
        prompts = [prompt[-room:] for prompt in prompts]
        found = self._leader.generate(
            prompts, sampling, lambda share: self._told(f"generating {len(prompts):,} texts", share)
        )
        # Of the tokens alone, as in HFLM: together with the prompt's, some tokenizers give a first space more.
        texts = (self._vocabulary.decode(each.tokens) for each in found)
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _prompt(self, request: Instance) -> list[int]:
        text: str = request.args[0]
        asked = request.task_name in self._questions
        return self._vocabulary.encode(Question(text)) if asked else self.tok_encode(text)


def _sampling(tokens: int, until: Sequence[str], options: dict[str, Any]) -> Sampling:
    unknown = {name: value for name, value in options.items() if name not in _KNOWN}
    if unknown:
        raise ConfigError(
            f"a task asks for {unknown} of generation, which is not there; known: {', '.join(sorted(_KNOWN))}"
        )
    drawn = options.pop("do_sample", False)
    options["temperature"] = options.get("temperature", 1.0) if drawn else 0.0
    return Sampling(tokens=tokens, stop=tuple(until), **options)

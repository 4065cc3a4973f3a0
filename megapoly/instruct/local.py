"""A model on this machine, through megapoly.generate: a checkpoint of any of our formats, or of Hugging Face."""

from __future__ import annotations

from megapoly.engine import DTYPES
from megapoly.generate import Generator, Sampling
from megapoly.instruct.config import Local
from megapoly.instruct.model import REFUSED, Answer, Fault, Tokens
from megapoly.launch import choose_device


class Checkpoint:
    """The model of a checkpoint, which answers a batch at a time.

    What it writes depends on (seed, number of the request) and the prompt, up to rounding: not on the batch.

    Args:
        seed: of the draws; another one for each language.

    Raises:
        CheckpointError, ConfigError, DataError: what cannot be loaded.
    """

    def __init__(self, settings: Local, seed: int) -> None:
        dtype = None if settings.dtype is None else DTYPES[settings.dtype]
        device = choose_device(settings.device, 0, "local.device")
        self._generator = Generator.open(settings.path, settings.tokenizer, dtype, device, batch=settings.batch)
        self._template = settings.template
        self._sampling = Sampling(
            settings.max_tokens, settings.temperature, 0, settings.top_p, settings.repetition_penalty, seed=seed
        )
        self.concurrency, self.limit, self.context = settings.batch, settings.max_tokens, self._generator.positions
        self._started: list[tuple[int, int, str]] = []

    def start(self, ticket: int, number: int, prompt: str) -> None:
        """See :class:`megapoly.instruct.model.Model`."""
        own = self._generator.template
        if self._template is not None:
            prompt = self._template.replace("{prompt}", prompt)
        elif own is not None:
            prompt = own.turn(prompt)
        self._started.append((ticket, number, prompt))

    def wait(self, seconds: float) -> list[tuple[int, Answer | Fault]]:
        """All that were started, however long that takes."""
        started, self._started = sorted(self._started, key=lambda each: each[1]), []
        found: list[tuple[int, Answer | Fault]] = []
        fits = []
        for ticket, number, prompt in started:
            length = len(self._generator.vocabulary.encode(prompt))
            if length < self.context:
                fits.append((ticket, number, prompt, length))
            else:
                what = f"{REFUSED}the prompt has {length} tokens, the model {self.context} positions"
                found.append((ticket, Answer("", what, Tokens())))
        while fits:
            # The generator numbers its prompts one after another.
            first = fits[0][1]
            run = [each for i, each in enumerate(fits) if each[1] == first + i]
            fits = fits[len(run) :]
            made = self._generator.generate([prompt for _, _, prompt, _ in run], self._sampling, first=first)
            for (ticket, _, _, length), each in zip(run, made):
                used = Tokens(length, len(each.tokens))
                found.append((ticket, Answer(each.text, each.finish_reason, used)))
        return found

"""A model on this machine, through megapoly.generate: a checkpoint of any of our formats, or of Hugging Face."""

from __future__ import annotations

from megapoly.checkpoint.weights import open_weights, template_of
from megapoly.engine import DTYPES
from megapoly.generate import Generator, Question, Sampling
from megapoly.instruct.config import Config, Local
from megapoly.instruct.model import REFUSED, Answer, Fault, Tokens
from megapoly.launch import choose_device


def with_own_template(config: Config) -> Config:
    """The config, where its local model was tuned by megapoly with the template of that, if it gives none.

    Raises:
        CheckpointError: there are no weights.
    """
    if config.local is None or config.local.template is not None:
        return config
    own = template_of(open_weights(config.local.path))
    if own is None:
        return config
    local = config.local.model_copy(update={"template": own.turn("{prompt}")})
    return config.model_copy(update={"local": local})


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
        if self._template is not None:
            prompt = self._template.replace("{prompt}", prompt)
        tuned = self._generator.template is not None
        self._started.append((ticket, number, Question(prompt) if tuned else prompt))

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

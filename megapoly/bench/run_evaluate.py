"""``python -m``: tasks by megapoly and by the harness's class for transformers in turns, on the same weights."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from megapoly.bench import generate
from megapoly.bench.evaluate import Options, Turn
from megapoly.bench.run_generate import make_peer
from megapoly.evaluate import run
from megapoly.evaluate.leader import Leader
from megapoly.evaluate.model import HarnessModel
from megapoly.generate import Generator

Answers = list[Any]


def train_tokenizer(texts: Iterator[str], vocabulary: int, folder: Path) -> int:
    """A byte-level one of what is asked; the number of its ids."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(made.get_vocab_size())


def texts_of(value: Any) -> Iterator[str]:
    """All texts in plain values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from texts_of(each)


def answered(model: LM, tasks: Sequence[run.Prepared], limit: int) -> tuple[float, int, Answers]:
    """Seconds, records, and answers to all requests."""
    for each in tasks:
        each.task.set_fewshot_seed(0)
    begin = time.perf_counter()
    found = evaluator.evaluate(
        model, {"tasks": {each.task.task_name: each.task for each in tasks}}, limit=limit, bootstrap_iters=0
    )
    seconds = time.perf_counter() - begin
    samples = [sample for each in tasks for sample in found["samples"][each.task.task_name]]
    return seconds, len(samples), [answer for sample in samples for answers in sample["resps"] for answer in answers]


def apart(own: Answers, theirs: Answers) -> float:
    if isinstance(own[0], str):
        return sum(a != b for a, b in zip(own, theirs)) / len(own)
    return max(abs(a[0] - b[0]) for a, b in zip(own, theirs))


def main(options: Options, folder: Path) -> None:
    torch.set_num_threads(options.threads)
    asked = run.Options(tasks=options.tasks, data=Path(options.data), limit=options.limit)
    tasks = run.prepare(asked)
    for each in tasks:
        if each.task.OUTPUT_TYPE == "generate_until":
            each.task.set_config("generation_kwargs", {"max_gen_toks": options.tokens}, update=True)
    place = folder / "model"
    place.mkdir()
    docs = (doc for each in tasks for doc, _ in zip(each.task.eval_docs, range(400)))
    size = train_tokenizer((text for doc in docs for text in texts_of(doc)), options.vocabulary, place)
    peer = make_peer(
        generate.Options(
            options.family, options.layers, options.hidden, options.heads, options.groups, size,
            options.positions - options.tokens, options.tokens,
        )
    )  # fmt: skip
    peer.save_pretrained(place)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    theirs = HFLM(pretrained=peer, tokenizer=tokenizer, batch_size=options.batch, max_length=options.positions)
    own = HarnessModel(Leader(Generator.open(place, batch=options.batch)))
    for task in options.tasks:
        mine = [each for each in tasks if each.name == task]
        answer: Callable[[LM, int], Any] = lambda model, limit: answered(model, mine, limit)  # noqa: B023, E731
        for model in (own, theirs):
            answer(model, 1)
        for _ in range(options.repeats):
            (seconds, records, said), (peer_seconds, _, peer_said) = (
                answer(each, options.limit) for each in (own, theirs)
            )
            turn = Turn(task, records, (seconds, peer_seconds), apart(said, peer_said))
            sys.stdout.write(json.dumps(dataclasses.asdict(turn)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(Options(**json.loads(sys.argv[1])), Path(sys.argv[2]))

"""transformers' apply_chat_template gives the ids that examples are built of, with the tokenizer that is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from rich.console import Console

from megapoly import config
from megapoly.checkpoint.convert import convert
from megapoly.checkpoint.weights import Options, open_weights
from megapoly.context import ParallelContext
from megapoly.data.builder import Options as BuildOptions
from megapoly.data.builder import build
from megapoly.data.huggingface_export import make_tokenizer_json
from megapoly.data.indexed import IndexedDataset
from megapoly.data.instructions import encode, to_example
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.records import Record
from megapoly.data.templates import TEMPLATES, Template
from megapoly.run import prepare
from megapoly.trainer import train
from tests import tuning

transformers = pytest.importorskip("transformers", reason="the oracle of these tests")
OWN = Template(
    name="own",
    system="'{system}' {{\"x\"}} \\n ☃\n",
    user="[[{instruction}]] 👩‍👩‍👧\nA:\n",
    with_input="{input} \"'{{% q %}}'\n{instruction}\t\n",
)


@pytest.fixture(scope="module", params=[*TEMPLATES.values(), OWN], ids=lambda template: template.name)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Template]:
    """A folder with the datasets of all languages by a template, and the export of a model tuned on one of them."""
    template = request.param
    folder = tmp_path_factory.mktemp(template.name)
    tokenizer = tuning.train(folder)
    for language in tuning.WORDS:
        source = tuning.write(folder / f"{language}.jsonl", tuning.records(language))
        options = BuildOptions(instructions=template, validation_fraction=0.0, threads=1)
        build([source], folder / language, tokenizer, language=language, options=options)
    (folder / "run.toml").write_text(tuning.TOML.format(vocabulary=tokenizer.vocabulary))
    settings = config.load(folder / "run.toml", ["validation.windows=0"]).on(1)
    train(prepare(settings, ParallelContext.create(settings.mesh)), Console(quiet=True), stop_step=1)
    convert(open_weights(folder / "run"), folder / "hf", "huggingface", Options())
    return folder, template


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    if "messages" in row:
        return list(row["messages"])
    return [
        {"role": "user", "content": row["instruction"], "input": row["input"]},
        {"role": "assistant", "content": row["output"]},
    ]


def ids_of(tokenizer: Any, messages: list[dict[str, Any]], prompt: bool = False) -> list[int]:
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    return [int(i) for i in found]


@pytest.mark.parametrize("language", tuning.WORDS)
def test_the_same_ids(exported: tuple[Path, Template], language: str) -> None:
    folder, _ = exported
    peer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    dataset = IndexedDataset(folder / language)
    rows = tuning.records(language)
    assert dataset.documents == len(rows)
    several = 0
    for number, row in enumerate(rows):
        messages, tokens = messages_of(row), dataset.document(number).tolist()
        learned = dataset.learned(number).tolist()
        assert ids_of(peer, messages) == tokens
        # A prompt: all before an answer, with the answers before it.
        answers = [i for i in range(1, len(tokens)) if learned[i] and not learned[i - 1]]
        places = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        assert len(answers) == len(places)
        several += len(places) > 1
        for at, begin in zip(places, answers, strict=True):
            assert ids_of(peer, messages[:at], prompt=True) == tokens[:begin]
            assert ids_of(peer, messages[:at]) == tokens[:begin]
    assert several > 5


def test_what_is_written(exported: tuple[Path, Template]) -> None:
    folder, template = exported
    peer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    assert peer.eos_token == "</s>"
    assert transformers.GenerationConfig.from_pretrained(folder / "hf").eos_token_id == peer.eos_token_id
    tokenizer = load_tokenizer(folder / "poly.model")
    spaces = [{"role": "system", "content": " "}, {"role": "user", "content": " a b \n", "input": " <noinput> "}]
    text = peer.apply_chat_template(spaces, tokenize=False)
    assert text == template.turn("a b")
    assert ids_of(peer, spaces) == tokenizer.encode(text)
    with pytest.raises(Exception, match="unknown role tool"):
        peer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)
    peer.save_pretrained(folder / "again")
    again = transformers.AutoTokenizer.from_pretrained(folder / "again")
    assert again.chat_template == peer.chat_template == template.jinja()


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda template: template.name)
def test_a_model_that_puts_a_space_before_text(tmp_path: Path, template: Template) -> None:
    """As LLaMA's do: every round begins with one, also behind the end of the answer before."""
    rows = [row for language in tuning.WORDS for row in tuning.records(language, 40)]
    texts = [message["content"] for row in rows for message in messages_of(row)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "t"), model_type="bpe", vocab_size=420,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "t.model")
    content = make_tokenizer_json(tokenizer)
    assert content is not None
    (tmp_path / "tokenizer.json").write_bytes(content)
    peer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="</s>", chat_template=template.jinja()
    )
    ids, lengths = encode(tokenizer, [to_example(Record(Path("x"), 1, row), template) for row in rows], 1)
    for row, found in zip(rows, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        assert ids_of(peer, messages_of(row)) == (found % tokenizer.vocabulary).tolist()
        given = int((found < tokenizer.vocabulary).argmin())
        first = next(at for at, message in enumerate(messages_of(row)) if message["role"] == "assistant")
        assert ids_of(peer, messages_of(row)[:first], prompt=True) == (found[:given]).tolist()

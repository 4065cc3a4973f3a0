"""Data by a ``tokenizer.json``: against the tokenizers library and transformers, text by text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megapoly.cli import main
from megapoly.data import pieces
from megapoly.data.builder import Assembly, Options, build
from megapoly.data.huggingface_export import make_tokenizer_json
from megapoly.data.indexed import IndexedDataset
from megapoly.data.instructions import encode as encode_examples
from megapoly.data.instructions import to_example
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.merge import merge
from megapoly.data.records import Record
from megapoly.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megapoly.data.templates import TEMPLATES, Template
from megapoly.data.tokenizer import check_matches
from megapoly.data.verify import verify
from megapoly.errors import DataError
from tests import tuning
from tests.data.building import contents
from tests.generate.tokenizers import byte_level

tokenizers: Any = pytest.importorskip("tokenizers", reason="the oracle of these tests")
transformers: Any = pytest.importorskip("transformers", reason="the oracle of these tests")

WORDS = [
    "hello",
    "world",
    "ประเทศไทย",
    "東京都",
    "\u2581",
    "e\u0301",
    "🙂",
    "</s>",
    "<s>",
    "\n\n",
    "\t",
    "1,000",
    "¿cómo?",
]
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=1 + i % 40)) for i in range(300)]


def library(folder: Path) -> Any:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def plain(folder: Path) -> Any:
    """To it the words of special tokens are text as any."""
    made = library(folder)
    made.encode_special_tokens = True
    return made


def llama(folder: Path, first: bool) -> None:
    """Write the tokenizer.json of a SentencePiece model; texts begin with ``<s>``, and a space stands before each.

    Args:
        first: not behind a special token.
    """
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text for text in TEXTS for _ in range(3)), model_prefix=str(folder / "t"),
        model_type="bpe", vocab_size=330, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    own = SentencePieceTokenizer(folder / "t.model")
    content = make_tokenizer_json(own)
    assert content is not None
    made = tokenizers.Tokenizer.from_buffer(content)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", own.bos)]
    )
    if first:
        made.normalizer = tokenizers.normalizers.Sequence([])
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(params=["byte level", "byte level, begins", "llama", "llama, first"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a tokenizer.json and its settings."""
    if "llama" in request.param:
        llama(tmp_path, "first" in request.param)
    else:
        byte_level(tmp_path, begins="begins" in request.param)
    return tmp_path


def test_ids_are_the_librarys(folder: Path) -> None:
    tokenizer, peer = load_tokenizer(folder / "tokenizer.json"), plain(folder)
    expected = [peer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    for threads in (1, 3, 0):
        assert tokenizer.encode_batch(TEXTS, threads) == expected
    parsed = [library(folder).encode(text, add_special_tokens=False).ids for text in TEXTS]
    ids, lengths = tokenizer.encode_flat(TEXTS, 2, special=True)
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == parsed != expected
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.vocabulary == peer.get_vocab_size()
    assert tokenizer.eod == peer.token_to_id("</s>") == transformers.AutoTokenizer.from_pretrained(folder).eos_token_id
    assert list(tokenizer.begin) == library(folder).encode("").ids
    assert tokenizer.encoder.startswith("tokenizers ")


def test_bytes_of_tokens(folder: Path) -> None:
    """They sum to those of the text; a space that is put before it counts, and a special token is none."""
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    lengths = tokenizer.byte_lengths()
    space = tokenizer.piece(tokenizer.encode("a")[0]) != "a"
    for text in TEXTS:
        if "\u2581" not in text:  # which the llama reads as a space
            assert lengths[tokenizer.encode(text)].sum() == len(text.encode()) + space
    assert not lengths[[*tokenizer.begin, tokenizer.eod]].any()


def test_documents(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its begin and end, and the same by one process as by several, whose interpreters load the file anew."""
    tokenizer, peer = load_tokenizer(folder / "tokenizer.json"), plain(folder)
    texts = [text for text in TEXTS if text.strip()]
    source = tuning.write(folder / "in.jsonl", [{"text": text} for text in texts])
    options = Options(validation_fraction=0.1, processes=1, threads=2)
    side = build([source], folder / "one", tokenizer, language="en", options=options)
    dataset = IndexedDataset(folder / "one")
    found = [dataset.document(i).tolist() for i in range(dataset.documents)]
    begin = library(folder).encode("").ids
    expected = [[*begin, *peer.encode(text, add_special_tokens=False).ids, tokenizer.eod] for text in texts]
    assert sorted(found) == sorted(expected)
    assert side.tokenizer.sha256 == tokenizer.sha256
    assert side.bytes == sum(len(text.encode()) for text in texts)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4000)
    build([source], folder / "two", tokenizer, language="en", options=Options(validation_fraction=0.1, processes=2))
    assert contents(folder / "two")[:2] == contents(folder / "one")[:2]
    assert verify(folder / "two") == []


ROUNDS = [
    {"messages": [
        {"role": "system", "content": "hello"}, {"role": "user", "content": "world </s>"},
        {"role": "assistant", "content": "東京 </s> x"}, {"role": "user", "content": "ไทย"},
        {"role": "assistant", "content": "¿cómo?\n\nhello"},
    ]},
    {"instruction": "hello world", "input": "1,000", "output": "he"},
    {"instruction": "or", "output": "東"},
]  # fmt: skip


@pytest.mark.parametrize("template", [*TEMPLATES.values(), Template(
    name="break", system="{system}\n", user="<s>Q: {instruction} A:", with_input="{input}Q: {instruction} A:",
)], ids=lambda template: template.name)  # fmt: skip
def test_instructions(folder: Path, template: Template) -> None:
    """A prompt is given by the ids that generation makes of it; the answer is learned, as text alone."""
    tokenizer, peer, words = load_tokenizer(folder / "tokenizer.json"), library(folder), plain(folder)
    examples = [to_example(Record(Path("x"), i, row), template) for i, row in enumerate(ROUNDS)]
    ids, lengths = encode_examples(tokenizer, examples, 2)
    before = len(words.encode("\n", add_special_tokens=False).ids)
    for example, found in zip(examples, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        expected: list[int] = []
        for number, (prompt, answer) in enumerate(example.rounds):
            words_before = "".join(map(tokenizer.piece, tokenizer.begin)) if number == 0 else "</s>"
            expected += peer.encode(words_before + prompt, add_special_tokens=False).ids[number > 0 :]
            learned = words.encode("\n" + answer, add_special_tokens=False).ids[before:]
            assert words.decode(learned, skip_special_tokens=False) == answer
            expected += [i + tokenizer.vocabulary for i in (*learned, tokenizer.eod)]
        assert found.tolist() == expected
    # And as transformers asks a question.
    chat = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    chat.chat_template = template.jinja("".join(map(tokenizer.piece, tokenizer.begin)))
    for row, found in zip(ROUNDS, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        messages = row.get("messages") or [{**row, "role": "user", "content": row["instruction"]}]
        asked = [message for message in messages[:2] if message["role"] != "assistant"]
        given = int((found >= tokenizer.vocabulary).argmax())
        assert chat.apply_chat_template(asked, add_generation_prompt=True, return_dict=False) == found[:given].tolist()


def test_a_double_break_before_an_answer(tmp_path: Path) -> None:
    """GPT-2's rule splits it where text follows; a model is asked without, and so it is trained."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={p: i for i, p in enumerate(["</s>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"])},
        merges=[("Ċ", "Ċ")],
    ))  # fmt: skip
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    example = to_example(Record(Path("x"), 1, {"instruction": "q", "output": "a"}), TEMPLATES["multialpaca"])
    asked, together = made.encode("q\n\n").ids, made.encode("q\n\na").ids
    assert (len(asked), len(together)) == (2, 4)
    ids, _ = encode_examples(tokenizer, [example], 1)
    assert ids.tolist() == [*asked, *(i + tokenizer.vocabulary for i in (*made.encode("a").ids, 0))]


def test_the_end_of_a_document(tmp_path: Path) -> None:
    """By the files beside it, in transformers' order; without one data are refused, a report is not."""
    byte_level(tmp_path)
    path = tmp_path / "tokenizer.json"
    end = library(tmp_path).token_to_id("</s>")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "no such token"}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert load_tokenizer(path).eod == end
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load_tokenizer(path).eod == 7
    (tmp_path / "config.json").write_text('{"eos_token_id": 9999}')
    with pytest.raises(DataError, match=r"is a folder; give the tokenizer\.json or the SentencePiece model in it"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"tokenizer\.json: no token is known that ends documents; expected an eos_tok"):
        load_tokenizer(path)
    assert load_tokenizer(path, ends=False).eod == -1


def test_the_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """build, inspect, head and merge as of a SentencePiece model."""
    source = tuning.write(folder / "in.jsonl", [{"text": text} for text in TEXTS if text.strip()])
    tuned = tuning.write(folder / "tune.jsonl", ROUNDS)

    def run(*arguments: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        told = capsys.readouterr()
        assert ended.value.code == code, told
        return told.out + told.err

    common = ("--tokenizer", folder / "tokenizer.json", "--language", "en", "--processes", 1)
    told = run("data", "build", *common, "--output", folder / "d", source)
    assert "encoded by tokenizers" in told
    run("data", "build", *common, "--output", folder / "i", "--instructions", "--template", "chat", tuned)
    told = run("data", "inspect", folder / "i", "--tokenizer", folder / "tokenizer.json", "--document", 1)
    assert "<|assistant|>\\n'\nlearned: 'he'" in told
    assert "hello" in run("data", "head", folder / "d", "-n", 3, "--tokenizer", folder / "tokenizer.json")
    run("data", "merge", folder / "d", "--output", folder / "m", "--shuffle", 1)
    assert IndexedDataset(folder / "m").tokens == IndexedDataset(folder / "d").tokens
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    told = run("data", "head", folder / "d", "--tokenizer", folder / "tokenizer.json", code=1)
    assert "give the tokenizer that built the dataset" in " ".join(told.split())


def test_packs_of_instructions(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    source = tuning.write(folder / "in.jsonl", ROUNDS * 5)
    options = Options(
        instructions=TEMPLATES["chat"], validation_fraction=0.0, threads=1, assembly=Assembly(pack=256)
    )  # fmt: skip
    side = build([source], folder / "p", tokenizer, language="es", options=options)
    assert (side.pack, side.padding.id) == (256, tokenizer.eod + tokenizer.vocabulary)
    dataset = IndexedDataset(folder / "p")
    filled = sum(len(dataset.document(i)) for i in range(dataset.documents) if not dataset.learned(i).all())
    assert side.bytes_per_token == side.bytes / filled
    kept = [i for i in range(dataset.documents) if not dataset.learned(i).all()]
    assert len(kept) == 15
    begin = list(tokenizer.begin)
    for i in kept:
        assert dataset.document(i).tolist()[: len(begin)] == begin
        assert not dataset.learned(i)[: len(begin) + 1].any()


def test_a_dataset_that_ends_otherwise(folder: Path) -> None:
    """The file is the same, what is beside it is not."""
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    source = tuning.write(folder / "in.jsonl", [{"text": text} for text in TEXTS if text.strip()])
    build([source], folder / "a", tokenizer, language="en", options=Options(threads=1))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<s>"}))
    other = load_tokenizer(folder / "tokenizer.json")
    with pytest.raises(DataError, match=rf"documents begin with ids .* and end with {tokenizer.eod}, those of"):
        check_matches(other, IndexedDataset(folder / "a"))
    build([source], folder / "b", other, language="en", options=Options(threads=1))
    with pytest.raises(DataError, match="b: has as end of documents the id"):
        merge([folder / "a", folder / "b"], folder / "m")


def test_characters_without_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer without bytes and <unk> leaves them out, which is told."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"</s>": 0, "a": 1, "b": 2}, merges=[]))
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "t.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert tokenizer.loses
    assert tokenizer.encode("aéb") == [1, 2]
    source = tuning.write(tmp_path / "in.jsonl", [{"text": "ab"}] * 9)
    with pytest.raises(SystemExit):
        main(["data", "build", "--tokenizer", str(tmp_path / "t.json"), "--language", "en", "--output",
              str(tmp_path / "d"), str(source)])  # fmt: skip
    assert "characters that it has no token for are left out" in " ".join(capsys.readouterr().out.split())


def test_what_begins_a_text_without_latin_letters(tmp_path: Path) -> None:
    """It is found by a word that the tokenizer has: of this one "a" is refused, with <unk> it would be a token."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "水": 2}, unk_token="<unk>"))
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    made.save(str(tmp_path / "t.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert (tokenizer.begin, tokenizer.eod, tokenizer.loses) == ((0,), 1, False)
    with pytest.raises(DataError, match="cannot encode a text"):
        tokenizer.encode("a")


def test_words_that_are_no_special_tokens(folder: Path) -> None:
    """What ends or begins a text has to be written in a chat template."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if Path(folder / "t.model").exists() or content.get("post_processor"):
        with pytest.raises(DataError, match="'<s>' begins a text, and is no special token"):
            load_tokenizer(folder / "tokenizer.json")
        return
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    assert tokenizer.encode_prompts(["he"], [True])[0].tolist() == tokenizer.encode("he")
    with pytest.raises(DataError, match="'</s>' ends documents, and is no special token"):
        tokenizer.encode_prompts(["he"], [False])

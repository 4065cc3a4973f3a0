"""Datasets of instructions: records, boundaries, marked ids, what is done with datasets. Against plain loops."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megapoly.cli import main
from megapoly.data import builder, encode, pieces
from megapoly.data.builder import Assembly, Options, build
from megapoly.data.indexed import IndexedDataset
from megapoly.data.instructions import encode as encode_examples
from megapoly.data.instructions import to_example
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.merge import merge
from megapoly.data.records import BadRecord, Record
from megapoly.data.samples import NOT_COUNTED, read, validation
from megapoly.data.templates import TEMPLATES
from megapoly.data.verify import verify
from megapoly.errors import ConfigError, DataError
from tests import tuning
from tests.data.building import contents
from tests.data.test_samples import make_plan

PLAIN = TEMPLATES["multialpaca"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tuning")
    tuning.make(made)
    return made


@pytest.fixture(scope="module")
def model(folder):
    return load_tokenizer(folder / "poly.model")


def record(tmp_path, values):
    return Record(tmp_path / "f.jsonl", 3, values)


def by_hand(tokenizer, template, values):
    """Tokens of a record and which are learned, round by round by SentencePiece itself."""
    messages = values.get("messages") or [
        {"role": "user", "content": values["instruction"], "input": values.get("input")},
        {"role": "assistant", "content": values["output"]},
    ]
    library = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    tokens, learned, text = [], [], ""
    for message in messages:
        content = message["content"].strip()
        if message["role"] == "system":
            text += template.system.format(system=content)
        elif message["role"] == "user":
            given = message.get("input") or ""
            form = template.with_input if given.strip() not in ("", "<noinput>") else template.user
            text += form.format(instruction=content, input=given.strip())
        else:
            before, whole = library.encode(text), library.encode(text + content)
            assert whole[: len(before)] == before  # these tokenizers join nothing over the end of a line
            tokens += [*whole, tokenizer.eod]
            learned += [False] * len(before) + [True] * (len(whole) - len(before) + 1)
            text = ""
    return tokens, learned


# Records


def test_fields(tmp_path):
    values = {"question": " Why? ", "context": "This.", "answer": " So.\n", "output": "x"}
    example = to_example(record(tmp_path, values), PLAIN, ("question", "context", "answer"))
    assert (example.rounds, example.key) == ((("Why?\nThis.\n\n", "So."),), "Why?")
    assert example.bytes == len("Why?\nThis.\n\nSo.")
    assert to_example(record(tmp_path, values), PLAIN, ("question", "answer")).rounds == (("Why?\n\n", "So."),)
    chat = {"turns": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "instruction": "I"}
    assert to_example(record(tmp_path, chat), PLAIN, ("turns",)).rounds == (("Q\n\n", "A"),)


def test_a_chat(tmp_path):
    """Its system message, rounds by themselves, and nothing after the last answer."""
    turns = [
        ("system", " S "),
        ("user", "Q1"),
        ("assistant", "A1"),
        ("user", "Q2"),
        ("assistant", "A2"),
        ("user", "Q3"),
    ]
    messages = [{"role": role, "content": content, "more": 1} for role, content in turns]
    example = to_example(record(tmp_path, {"messages": messages}), TEMPLATES["chat"])
    first = "<|system|>\nS\n<|user|>\nQ1\n<|assistant|>\n"
    assert example.rounds == ((first, "A1"), ("<|user|>\nQ2\n<|assistant|>\n", "A2"))
    assert example.key == "Q1"


USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("values", "kind", "problem"),
    [
        ({"instruction": "a"}, "no field", "has no field 'output', only"),
        ({"output": "a"}, "no field", "has no field 'instruction'"),
        ({"instruction": "", "output": "a"}, "empty", "field 'instruction' is empty"),
        ({"instruction": "a", "output": " "}, "empty", "field 'output' is empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, "no text", "field 'input' holds int, not text"),
        ({"instruction": "a", "input": "\ud800", "output": "b"}, "half a surrogate pair", "half a surrogate"),
        ({"messages": "a"}, "no chat", "has no list of messages in 'messages'"),
        ({"messages": []}, "no answer", "'messages' has no answer"),
        ({"messages": [USER]}, "no answer", "has no answer: no message is of assistant"),
        ({"messages": [USER, USER, ASSISTANT]}, "no chat", "message 1 of 'messages' is of user, and assistant's turn"),
        ({"messages": [ASSISTANT]}, "no chat", "message 0 of 'messages' is of assistant, and user's turn"),
        ({"messages": [USER, ASSISTANT, {"role": "system", "content": "S"}]}, "no chat", "message 2 of .* of system"),
        ({"messages": [{"role": "tool", "content": "S"}]}, "no chat", "message 0 is {'role': 'tool', 'content': 'S'};"),
        ({"messages": [USER, "A"]}, "no chat", "message 1 is 'A'"),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "no text",
            "message 1, of assistant, holds null",
        ),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "empty", "message 1, of assistant, is empty"),
    ],
)
def test_bad_records(tmp_path, values, kind, problem):
    with pytest.raises(BadRecord, match=problem) as raised:
        to_example(record(tmp_path, values), PLAIN)
    assert raised.value.kind == kind
    assert str(raised.value).startswith(f"{tmp_path}/f.jsonl, line 3: ")


# Boundaries


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("language", tuning.WORDS)
def test_boundaries_of_a_batch(tmp_path, model, name, language):
    rows = tuning.records(language, 40)
    ids, lengths = encode_examples(model, [to_example(record(tmp_path, row), TEMPLATES[name]) for row in rows], 1)
    for row, found in zip(rows, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        tokens, learned = by_hand(model, TEMPLATES[name], row)
        assert (found % model.vocabulary).tolist() == tokens
        assert (found >= model.vocabulary).tolist() == learned


def test_a_token_from_the_prompt_into_the_answer(tmp_path):
    """There is none: the prompt has the ids that it has when the model is asked."""
    lines = ["xy ab", "xy ab", "x y a b"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "t"), model_type="bpe", vocab_size=13,
        byte_fallback=False, add_dummy_prefix=False, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "t.model")
    template = PLAIN.model_copy(update={"user": "{instruction}x"})
    example = to_example(record(tmp_path, {"instruction": "a", "output": "y"}), template)
    (whole, prompt, answer) = tokenizer.encode("axy"), tokenizer.encode("ax"), tokenizer.encode("y")
    assert whole != prompt + answer
    ids, lengths = encode_examples(tokenizer, [example], 1)
    assert ids.tolist() == prompt + [i + tokenizer.vocabulary for i in (*answer, tokenizer.eod)]
    assert lengths.tolist() == [len(ids)]


# Builds


def built(folder, rows, model, name="d", **choices):
    path = tuning.write(folder / f"{name}.jsonl", rows)
    options = Options(**{"instructions": PLAIN, "threads": 1, "validation_fraction": 0.2, **choices})
    return build([path], folder / name, model, language="es", options=options)


def examples_in(prefix, held=False):
    """(tokens, learned) of every document that is not padding."""
    dataset = IndexedDataset(prefix)
    numbers = range(dataset.train_documents, dataset.documents) if held else range(dataset.train_documents)
    found = [(dataset.document(i).tolist(), dataset.learned(i).tolist()) for i in numbers]
    return [each for each in found if not all(each[1])]


def test_a_stream(tmp_path, model):
    rows = tuning.records("es")
    side = built(tmp_path, rows, model)
    assert (side.instructions, side.tokenizer.vocabulary, side.ids) == (PLAIN, model.vocabulary, 2 * model.vocabulary)
    expected = sorted(by_hand(model, PLAIN, row) for row in rows)
    assert sorted(examples_in(tmp_path / "d") + examples_in(tmp_path / "d", held=True)) == expected
    assert verify(tmp_path / "d") == []
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset.marked == model.vocabulary
    text = [template for row in rows for template in to_example(record(tmp_path, row), PLAIN).rounds]
    assert side.bytes == sum(len("".join(each).encode()) for each in text)


def test_held_out_by_the_first_instruction(tmp_path, model):
    """The same question falls on the same side with any answer, input or template, and as a chat."""
    rows = [{"instruction": f"Q {i}", "input": None, "output": "a"} for i in range(60)]
    others = [{"instruction": f" Q {i}", "input": "x", "output": "b"} for i in range(60)]
    chats = [{"messages": [{"role": "user", "content": f"Q {i}"}, ASSISTANT]} for i in range(60)]
    counts = set()
    for name, given, template in (("a", rows, "multialpaca"), ("b", others, "alpaca"), ("c", chats, "chat")):
        side = built(tmp_path, given, model, name, instructions=TEMPLATES[template])
        counts.add(side.validation.documents)
        held = [model.decode(tokens) for tokens, _ in examples_in(tmp_path / name, held=True)]
        expected = {i for i in range(60) if builder.held_out(f"Q {i}", 1234, 0.2)}
        assert {int(re.search(r"Q ([0-9]+)", text)[1]) for text in held} == expected
    assert counts == {len(expected)}
    side = built(tmp_path, [{**row, "key": "same"} for row in rows], model, "k", validation_fraction=0.0)
    assert side.validation.documents == 0


def test_long_examples_are_left_out(tmp_path, model):
    """Whatever the policy for bad records; none is cut, and the first are named."""
    rows = tuning.records("es")
    rows[7] = {"instruction": "a", "output": "la casa " * 100}
    rows[9] = {"instruction": "", "output": "b"}
    expected = [by_hand(model, PLAIN, row) for number, row in enumerate(rows) if number != 9]
    fits = sorted(each for each in expected if len(each[0]) <= 64)
    assert len(fits) < len(expected)
    with pytest.raises(DataError, match=r"d.jsonl, line 10: field 'instruction' is empty"):
        built(tmp_path, rows, model, assembly=Assembly(pack=64))
    side = built(tmp_path, rows, model, assembly=Assembly(pack=64), bad_records="skip", overwrite=True)
    assert {each.kind: each.records for each in side.skipped} == {
        "empty": 1,
        "more tokens than an example may have": len(expected) - len(fits),
    }
    places = [place for each in side.skipped for place in each.first if "tokens" in each.kind]
    assert 8 in [place.number for place in places]
    assert re.fullmatch(r"has [0-9,]+ tokens, and 64 are the most", places[0].what)
    assert (side.pack, side.padding.cut, side.padding.id) == (64, 0, model.eod + model.vocabulary)
    assert sorted(examples_in(tmp_path / "d") + examples_in(tmp_path / "d", held=True)) == fits
    # The same as a stream, and then packed; a longer one is not cut by merge either.
    built(tmp_path, rows, model, "s", longest=64, bad_records="skip")
    merge([tmp_path / "s"], tmp_path / "m", Assembly(pack=64))
    assert contents(tmp_path / "m")[:2] == contents(tmp_path / "d")[:2]
    built(tmp_path, rows, model, "l", bad_records="skip")
    with pytest.raises(DataError, match=r"an example has [0-9]+ tokens, more than a pack of 64.*with --longest 64"):
        merge([tmp_path / "l"], tmp_path / "n", Assembly(pack=64))


def test_parts_processes_and_interruption_change_nothing(tmp_path, model, monkeypatch):
    rows = [row for language in tuning.WORDS for row in tuning.records(language)]
    assembly = Assembly(pack=64, shuffle=3, deduplicate=True)
    side = built(tmp_path, rows + rows[:50], model, assembly=assembly)
    fits = [len(by_hand(model, PLAIN, row)[0]) <= 64 for row in rows[:50]]
    assert side.duplicates.documents == sum(fits) > 40
    monkeypatch.setattr(pieces, "PIECE_BYTES", 8000)
    monkeypatch.setattr(encode, "_BATCH_BYTES", 1500)
    path = tmp_path / "d.jsonl"
    done = 0

    def interrupt(state):
        nonlocal done
        done = state.documents
        if done > 200:
            raise KeyboardInterrupt

    options = Options(instructions=PLAIN, validation_fraction=0.2, assembly=assembly, processes=1, threads=1)
    with pytest.raises(KeyboardInterrupt):
        build([path], tmp_path / "e", model, language="es", options=options, progress=interrupt)
    other = Options(instructions=TEMPLATES["chat"], validation_fraction=0.2, assembly=assembly)
    with pytest.raises(DataError, match="holds an interrupted build with instructions"):
        build([path], tmp_path / "e", model, language="es", options=other)
    again = build([path], tmp_path / "e", model, language="es", options=options)
    assert again.tokens == side.tokens
    assert contents(tmp_path / "e")[:2] == contents(tmp_path / "d")[:2]
    two = Options(instructions=PLAIN, validation_fraction=0.2, assembly=assembly, processes=2)
    build([path], tmp_path / "f", model, language="es", options=two)
    assert contents(tmp_path / "f")[:2] == contents(tmp_path / "d")[:2]


def test_parts_of_another_kind_do_not_merge(tmp_path, model):
    rows = tuning.records("es")
    built(tmp_path, rows, model, "a")
    built(tmp_path, rows, model, "b", instructions=TEMPLATES["chat"])
    with pytest.raises(DataError, match=r"b: has as template of instructions .*, but .*a has .*; build all with one"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    texts = [{"text": row["output"]} for row in rows if "output" in row]
    built(tmp_path, texts, model, "c", instructions=None)
    with pytest.raises(DataError, match="c: has as template of instructions None"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "m")


def test_damage_is_found(tmp_path, model):
    built(tmp_path, tuning.records("es"), model)
    path = tmp_path / "d.bin"
    content = bytearray(path.read_bytes())
    content[10:12] = (2 * model.vocabulary).to_bytes(2, "little")
    path.write_bytes(content)
    (damage,) = verify(tmp_path / "d")
    assert f"token 5 has id {2 * model.vocabulary}, outside the vocabulary of {2 * model.vocabulary}" in damage.what


def test_options_that_do_not_go_together():
    for choices, problem in (
        ({"pairs": True, "instructions": PLAIN}, "pairs and instructions are set"),
        ({"longest": 5}, "longest 5: is for instructions"),
        ({"longest": 65, "instructions": PLAIN, "assembly": Assembly(pack=64)}, "longest 65 is not from 0 to pack 64"),
        ({"fields": ("a", "b", "c", "d"), "instructions": PLAIN}, "instructions have two or three"),
    ):
        with pytest.raises(ConfigError, match=problem):
            Options(**choices)


# The command


def run(*arguments, code=0):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert ended.value.code == code


def test_the_commands(tmp_path, model, capsys):
    """jsonl.gz and Parquet; what inspect and verify show."""
    rows = [row for row in tuning.records("es") if "messages" not in row]
    rows[5]["output"] *= 30
    chats = [row for row in tuning.records("es") if "messages" in row]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows)))
    common = ("--tokenizer", model.path, "--language", "es", "--instructions", "--validation", 0.2, "--processes", 1)
    run(
        "data",
        "build",
        *common,
        "--output",
        tmp_path / "a",
        "--pack",
        64,
        "--template",
        "chat",
        tmp_path / "a.jsonl.gz",
    )
    told = " ".join(capsys.readouterr().out.split())
    assert "packs of 64 tokens" in told
    assert "skipped 1 records: more tokens than an example may have" in told
    run("data", "inspect", tmp_path / "a", "--tokenizer", model.path, "--document", 0)
    told = capsys.readouterr().out
    assert "instructions and answers, of which the answers are learned; template chat" in told
    assert re.search(r"given: '<\|user\|>\\n.*<\|assistant\|>\\n'\nlearned: '", told)
    run("data", "verify", tmp_path / "a")
    assert "whole" in capsys.readouterr().out
    run("data", "head", tmp_path / "a", "-n", 1)
    ids = IndexedDataset(tmp_path / "a").document(0).tolist()
    assert f"given: {ids[:3]}"[:-1] in capsys.readouterr().out
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "c.parquet")
    run("data", "build", *common, "--output", tmp_path / "c", "--processes", 1, tmp_path / "c.parquet")
    found = examples_in(tmp_path / "c") + examples_in(tmp_path / "c", held=True)
    assert sorted(found) == sorted(by_hand(model, PLAIN, row) for row in chats)
    run("data", "build", *common[:4], "--output", tmp_path / "d", "--template", "chat", tmp_path / "c.parquet", code=1)
    assert "--template chat: is for instructions" in " ".join(capsys.readouterr().err.split())


# Reading


@pytest.mark.parametrize("vocabulary", [420, 40_000])
@pytest.mark.parametrize("all_learned", [False, True])
def test_rows_token_by_token(tmp_path, folder, model, all_learned, vocabulary):
    """Of packs and of streams; ids of two bytes and of four."""
    wide = vocabulary > model.vocabulary
    if wide:
        model = _wide(tmp_path, vocabulary)
    for pack in (0, 64):
        built(tmp_path, tuning.records("ja"), model, f"p{pack}", assembly=Assembly(pack=pack, shuffle=1))
        dataset = IndexedDataset(tmp_path / f"p{pack}")
        assert dataset.dtype == (np.int32 if wide else np.uint16)
        plan = make_plan({"x": dataset}, 64)
        count = plan.windows[0]
        options = {"vocabulary": model.vocabulary, "separate_documents": True, "with_tokens": True}
        batch = read(plan, {"x": dataset}, np.arange(count), all_learned=all_learned, **options)
        stream = [
            (token, learned, number)
            for number in range(dataset.documents)
            for token, learned in zip(dataset.document(number).tolist(), dataset.learned(number).tolist())
        ]
        padding = {
            number for number in range(dataset.documents) if pack and set(dataset.document(number)) == {model.eod}
        }
        windows = plan.locate(np.arange(count)).window
        for row, window in enumerate(windows.tolist()):
            begin = window * 64
            assert batch.tokens[row].tolist() == [token for token, _, _ in stream[begin : begin + 64]]
            labels = []
            for at in range(begin, begin + 64):
                inside = at + 1 < (begin + 64 if pack else dataset.train_tokens)
                here, after = stream[at], stream[at + 1] if inside else None
                counted = after and here[2] == after[2] and here[2] not in padding and (after[1] or all_learned)
                labels.append(after[0] if counted else NOT_COUNTED)
            assert batch.labels[row].tolist() == labels
        held = validation(plan, {"x": dataset}, 0, windows=99, rows_multiple=1, **options)
        answers = sum(
            int(dataset.learned(i)[1:].sum())
            for i in range(dataset.train_documents, dataset.documents)
            if i not in padding
        )
        counted = int((held.labels >= 0).sum())
        assert counted == answers if pack else answers - 64 < counted <= answers


def _wide(tmp_path, vocabulary):
    """The same tokenizer with so many pieces that twice their number takes more than 16 bits."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    tuning.train(tmp_path)
    proto.ParseFromString((tmp_path / "poly.model").read_bytes())
    for number in range(len(proto.pieces), vocabulary):
        proto.pieces.add(piece=f"\ue000{number}", score=-1e6 - number)
    proto.trainer_spec.vocab_size = vocabulary
    (tmp_path / "wide.model").write_bytes(proto.SerializeToString())
    return load_tokenizer(tmp_path / "wide.model")


def test_a_smaller_vocabulary_is_refused(folder, model):
    dataset = IndexedDataset(folder / "es")
    plan = make_plan({"x": dataset}, 64)
    options = {"separate_documents": True, "with_tokens": True}
    with pytest.raises(DataError, match=f"its tokenizer has {model.vocabulary} tokens, and the vocabulary is 419"):
        read(plan, {"x": dataset}, np.arange(1), vocabulary=419, **options)


# Real text

PLACES = [folder / "shared" / "data" / "instructions" for folder in Path(__file__).resolve().parents[2:]]
SHARED = next((place for place in PLACES if place.exists()), None)


@pytest.mark.skipif(SHARED is None, reason="MultiAlpaca is not part of the repository")
@pytest.mark.parametrize("language", ["es", "ja", "pt"])
def test_multialpaca(tmp_path, model, language):
    """Every record is in a pack, or named among those that were left out; the sampled ones by hand."""
    path = SHARED / f"multialpaca.{language}.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()[:2000]]
    side = built(tmp_path, rows, model, assembly=Assembly(pack=1024), bad_records="skip")
    left_out = sum(each.records for each in side.skipped)
    found = examples_in(tmp_path / "d") + examples_in(tmp_path / "d", held=True)
    assert len(found) + left_out == len(rows)
    assert side.padding.tokens / side.tokens < 0.02
    known = {tuple(tokens): learned for tokens, learned in found}
    for row in rows[::50]:
        tokens, learned = by_hand(model, PLAIN, row)
        assert len(tokens) > 1024 or known[tuple(tokens)] == learned

"""``bench data``: rows from made-up turns against arithmetic by hand, its inputs, and small runs of its processes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sentencepiece

from megapoly.bench import data, data_input, data_report, report
from megapoly.bench.data_job import Measured, ask, repeated, watch
from megapoly.cli import main
from megapoly.data.indexed import IndexedDataset
from megapoly.data.verify import verify
from megapoly.errors import TrainingError

NAMES = ["startup", "mixture", "samples", "samples_documents", "index", "write", "encode"]
QUICK = data.Options(**data.QUICK)


def made_up(monkeypatch, own, peer, limit, huge, two):
    """Turns that take the given numbers: seconds where less is better, else a rate."""

    def asked(program, job, parameters, cores=1):
        if program == data.LIMIT:
            value = limit[job]
        elif program == data.PEER:
            value = peer[job, parameters.get("separate")]
            if isinstance(value, str):
                raise TrainingError(value)
        elif job == "mixture" and parameters["count"] == data.HUGE:
            value = huge
        elif cores == 2:
            value = two
        else:
            value = own[job, parameters.get("separate")]
        if job in ("startup", "mixture", "index"):
            return Measured(seconds=value, memory=2.0)
        return Measured(work=value, seconds=1.0, memory=None, disk=5_000_000 if program == data.PEER else 0)

    monkeypatch.setattr(data, "ask", asked)
    monkeypatch.setattr(data, "version", lambda name: "0.15.3")
    for name in ("write_index_only", "write_stream", "train_tokenizer"):
        monkeypatch.setattr(data_input, name, lambda *given: 7)
    monkeypatch.setattr(data_input, "write_text", lambda path, size: path.write_text("text"))


OWN = {("startup", None): 0.02, ("mixture", None): 0.004, ("samples", False): 80_000.0, ("samples", True): 64_000.0,
       ("index", None): 0.25, ("write", None): 100e6, ("encode", None): 24e6}  # fmt: skip
PEER = {("startup", None): 2.0, ("mixture", None): 4.0, ("samples", False): 10_000.0, ("samples", True): 100.0,
        ("index", None): 5.0, ("write", None): 50e6, ("encode", None): 4e6}  # fmt: skip
LIMIT = {"copy": 160_000.0, "disk": 125e6}


@pytest.fixture
def rows(monkeypatch):
    made_up(monkeypatch, OWN, PEER, LIMIT, 0.005, 40e6)
    return {row["name"]: row for row in data.measure(QUICK)}


def test_rows_from_turns(rows):
    assert list(rows) == NAMES
    for name, value, peer, ratio in (
        ("startup", 20, 2000, 100), ("mixture", 4, 4000, 1000), ("samples", 80_000, 10_000, 8),
        ("samples_documents", 64_000, 100, 640), ("index", 0.25, 5, 20), ("write", 100, 50, 2), ("encode", 24, 4, 6),
    ):  # fmt: skip
        row = rows[name]
        assert (row["value"], row["peer_value"], row["ratio"]) == pytest.approx((value, peer, ratio)), name
        assert row["peer"] == "megatron-core"
    wanted = [rows[name]["wanted"] for name in NAMES]
    assert wanted == [50, 10, 60_000, pytest.approx(60_000 / 1.3), 0.5, None, 20]
    assert [rows[name]["wanted_memory_mib"] for name in ("startup", "mixture")] == [5, 1]
    assert rows["samples"]["share_of_limit"] == pytest.approx(0.5)
    assert rows["write"]["share_of_limit"] == pytest.approx(0.8)
    assert rows["samples_documents"]["times_slower"] == pytest.approx(1.25)
    assert rows["mixture"]["value_1e12"] == pytest.approx(5)
    assert rows["encode"]["value_two_cores"] == pytest.approx(40)
    assert rows["startup"]["documents"] == QUICK.documents


def test_table_and_page(rows):
    document = report.make_report(list(rows.values()), "a CPU", data_report.settings(QUICK))
    cells = {name: data_report.cells(row) for name, row in rows.items()}
    assert cells["startup"] == ("startup", "ms", "20", "<= 50", "2,000", "100", "")
    assert cells["samples"] == ("samples", "samples/s", "80,000", ">= 60,000", "10,000", "8", "50%")
    assert cells["write"][3] == ""
    page = data_report.markdown(document)
    for line in (
        "startup: the memory of the process grows by 2 MiB, 5 wanted at most; megatron-core's by 2",
        "10^12 samples take 5 ms and 2 MiB",
        "1.25 times slower than samples; wanted 1.3 at most",
        "the limit is plain bytes to the disk, 125 M tokens/s",
        "megatron-core leaves a cache of 5 MB, megapoly none",
    ):
        assert line in page
    assert json.loads(json.dumps(document)) == document


@pytest.mark.parametrize("missing", [True, False])
def test_a_peer_that_is_not_there_or_fails(monkeypatch, missing):
    made_up(monkeypatch, OWN, {key: "it broke" for key in PEER}, LIMIT, 0.005, 40e6)
    if missing:
        monkeypatch.setattr(data, "version", lambda name: None)
    for row in data.measure(QUICK):
        assert (row["peer_value"], row["ratio"]) == (None, None)
        assert row["note"] == ("megatron-core is not installed: " + data.INSTALL if missing else "it broke")
        assert data_report.cells(row)[4:6] == ("", "")


# ------------------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize("vocabulary", [50_000, 100_000])
def test_inputs_are_what_they_say(tmp_path, vocabulary):
    tokens = data_input.write_stream(tmp_path / "s", 30_000, 600, vocabulary)
    dataset = IndexedDataset(tmp_path / "s")
    assert dataset.tokens == tokens == pytest.approx(30_000, rel=0.3)
    assert verify(tmp_path / "s", vocabulary=vocabulary) == []
    texts = [dataset.document(i).tolist() for i in range(dataset.documents)]
    assert all(text[-1] == 0 and 0 not in text[:-1] for text in texts)
    tokens = data_input.write_index_only(tmp_path / "i", 1000, 600, vocabulary)
    dataset = IndexedDataset(tmp_path / "i")
    assert (dataset.documents, dataset.tokens) == (1000, tokens)


def test_text_has_its_size_and_a_tokenizer_knows_it(tmp_path):
    written = data_input.write_text(tmp_path / "t.jsonl", 150_000)
    texts = [json.loads(line)["text"] for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert written == sum(len(text.encode()) for text in texts)
    assert 150_000 <= written < 250_000
    data_input.train_tokenizer(tmp_path / "m", iter(texts), 6500)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m"))
    assert model.vocab_size() == 6500
    assert model.decode(model.encode(texts[0])) == texts[0]


# ------------------------------------------------------------------------------------------------ processes


def test_watch_sees_memory_that_comes_and_goes():
    with watch(3.0) as result:
        np.ones(60 << 17).sum()  # 60 MiB, which are given back
    assert result.work == 3.0
    assert result.rate == 3.0 / result.seconds
    if result.memory is not None:  # where the system tells
        assert 50 < result.memory < 120


def test_repeated_counts_what_it_did():
    numbers = []
    result = repeated(lambda number: numbers.append(number) or 5, 0.0)
    assert numbers == [0, 1]
    assert result.work == 5


def test_a_process_and_its_failure(tmp_path):
    made = ask(data.LIMIT, "disk", {"path": tmp_path / "x", "size": 3 << 20, "item": 2})
    assert made.work == (3 << 20) / 2
    assert made.seconds > 0
    assert (tmp_path / "x").stat().st_size == 3 << 20
    with pytest.raises(TrainingError, match=r"run_data_limit copy failed: .*nothing"):
        ask(data.LIMIT, "copy", {"prefix": tmp_path / "nothing", "sequence": 8, "item": 2, "seconds": 0.0})


@pytest.mark.long
def test_the_whole_command(tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "data", "--quick", "--json", str(tmp_path / "d.json")])
    assert ended.value.code in (0, None)
    rows = json.loads((tmp_path / "d.json").read_text())["rows"]
    assert [row["name"] for row in rows] == NAMES
    assert all(row["value"] > 0 for row in rows)

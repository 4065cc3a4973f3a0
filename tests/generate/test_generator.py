"""Texts and likelihoods in one process: against transformers with a cache, and against passes without any."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from megapoly.config import load
from megapoly.context import ParallelContext
from megapoly.data.tokenizer_training import train_tokenizer
from megapoly.errors import CheckpointError, ConfigError, DataError, TrainingError
from megapoly.generate import Generator, Sampling
from megapoly.generate.sampling import candidates, penalise, uniforms
from megapoly.layers.call import Call
from megapoly.run import prepare
from megapoly.trainer import train
from tests.generate.models import POSITIONS, save, transformers
from tests.generate.tokenizers import byte_level

FAMILIES = ("gpt2", "llama", "qwen2", "bloom")
PROMPTS = ["hello world", "h", "", "中文 and more of it", "hello"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, nn.Module]]:
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        made[family] = folder, save(family, folder)
    return made


@pytest.fixture(scope="module")
def llama(folders: dict[str, tuple[Path, nn.Module]]) -> Generator:
    return Generator.open(folders["llama"][0])


@pytest.fixture(scope="module")
def run(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "run"
    config = load(toml, [f"train.directory={str(folder)!r}"]).on(1)
    train(prepare(config, ParallelContext.create()), Console(quiet=True))
    return folder


@torch.no_grad()
def logits_of(generator: Generator, ids: list[int]) -> Tensor:
    """``[S, V]``, in one pass without a cache."""
    tokens = torch.tensor(ids).unsqueeze(1)
    return generator.replica.stage(None, Call(torch.arange(len(ids)).unsqueeze(1), tokens_SB=tokens))[:, 0]


def drawn_without_cache(generator: Generator, prompt: str, sampling: Sampling, index: int, sample: int) -> list[int]:
    """The tokens of a text, each from a pass over all before it."""
    ids = begin = generator.vocabulary.encode(prompt) or generator.vocabulary.beginning
    numbers = uniforms(sampling.seed, index, sample, 0, sampling.tokens)
    while len(ids) < len(begin) + sampling.tokens and len(ids) < generator.positions:
        logits = logits_of(generator, ids)[-1:]
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, ids] = True
        probabilities, places = candidates(penalise(logits, seen, sampling.repetition_penalty), sampling)
        sums = list(itertools.accumulate(probabilities[0].tolist()))
        wanted = numbers[len(ids) - len(begin)] * sums[-1]
        place = next(place for place, reached in enumerate(sums) if reached > wanted)
        ids = [*ids, place if places is None else int(places[0, place])]
        if ids[-1] in generator.vocabulary.ends:
            break
    return ids[len(begin) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_texts_of_unequal_prompts_are_those_of_transformers(
    folders: dict[str, tuple[Path, nn.Module]], family: str
) -> None:
    folder, peer = folders[family]
    generator = Generator.open(folder)
    found = generator.generate(PROMPTS, Sampling(tokens=24, temperature=0))
    for number, (prompt, each) in enumerate(zip(PROMPTS, found, strict=True)):
        ids = torch.tensor([generator.vocabulary.encode(prompt) or generator.vocabulary.beginning])
        tokens = peer.generate(ids, max_new_tokens=24, do_sample=False, use_cache=True)[0, ids.shape[1] :].tolist()
        assert (each.index, each.prompt, each.tokens) == (number, prompt, tokens)
    assert len({i for each in found for i in each.tokens}) > 15


def test_a_repetition_penalty_is_that_of_transformers(folders: dict[str, tuple[Path, nn.Module]]) -> None:
    folder, peer = folders["gpt2"]
    generator = Generator.open(folder)
    sampling = Sampling(tokens=20, temperature=0, repetition_penalty=1.7)
    for prompt, each in zip(PROMPTS[:2], generator.generate(PROMPTS[:2], sampling)):
        ids = torch.tensor([generator.vocabulary.encode(prompt)])
        tokens = peer.generate(ids, max_new_tokens=20, do_sample=False, repetition_penalty=1.7)
        assert each.tokens == tokens[0, ids.shape[1] :].tolist()
    assert each.tokens != generator.generate(PROMPTS[:2], Sampling(tokens=20, temperature=0))[1].tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_texts_are_those_of_passes_without_a_cache(
    folders: dict[str, tuple[Path, nn.Module]], family: str
) -> None:
    generator = Generator.open(folders[family][0])
    sampling = Sampling(tokens=12, top_k=50, top_p=0.95, repetition_penalty=1.2, samples=2, seed=3)
    for each in generator.generate(PROMPTS[:3], sampling):
        expected = drawn_without_cache(generator, each.prompt, sampling, each.index, each.sample)
        assert each.tokens == expected
        ids = (generator.vocabulary.encode(each.prompt) or generator.vocabulary.beginning) + each.tokens
        log_p = logits_of(generator, ids).log_softmax(-1)[-len(each.tokens) - 1 : -1]
        own = log_p.gather(-1, torch.tensor(each.tokens).unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(torch.tensor(each.log_probabilities, dtype=torch.float64), own, rtol=0, atol=1e-10)


def test_a_text_does_not_depend_on_its_batch(llama: Generator) -> None:
    """Rows end at different times here, so that the batch is put together anew."""
    sampling = Sampling(tokens=30, seed=1, samples=2, stop=("e", "\u0120", "z", "Q"))
    together = llama.generate(PROMPTS, sampling)
    assert len({len(each.tokens) for each in together}) > 3
    assert {each.finish_reason for each in together} >= {"stop", "length"}
    small = Generator(llama.replica, llama.vocabulary, batch=3)
    apart = small.generate(PROMPTS, sampling)
    assert [(each.tokens, each.text) for each in apart] == [(each.tokens, each.text) for each in together]
    for index, prompt in enumerate(PROMPTS):
        alone = llama.generate([prompt], sampling, first=index)
        assert [each.tokens for each in alone] == [each.tokens for each in together[2 * index : 2 * index + 2]]
    samples = {tuple(each.tokens) for each in together}
    assert len(samples) == len(together)


def test_prompts_longer_than_a_pass(llama: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(tokens=9, temperature=0)
    expected = [each.tokens for each in llama.generate(PROMPTS, sampling)]
    monkeypatch.setattr("megapoly.generate.replica._TOKENS", 20)  # four of each of the five rows
    assert [each.tokens for each in llama.generate(PROMPTS, sampling)] == expected


def test_parts_of_a_stream_join_to_the_text(llama: Generator) -> None:
    sampling = Sampling(tokens=30, seed=5, stop=("\u0141\u0141\u0141",))
    text = llama.generate(["hello"], sampling)[0].text
    parts = list(llama.stream("hello", sampling))
    assert "".join(parts) == text
    assert len(parts) > 1
    assert all(parts)
    assert not torch.is_inference_mode_enabled()
    stream = llama.stream("hello", sampling)
    next(stream)
    assert not torch.is_inference_mode_enabled()  # nor between its parts
    with pytest.raises(ConfigError, match="samples 2 cannot be streamed"):
        llama.stream("hello", Sampling(samples=2))


def test_a_stop_string_ends_a_text(llama: Generator) -> None:
    greedy = Sampling(tokens=20, temperature=0)
    whole = llama.generate(["hello"], greedy)[0]
    assert whole.finish_reason == "length"
    assert len(whole.tokens) == 20
    stop = whole.text[4:6]
    ended = llama.generate(["hello"], Sampling(tokens=20, temperature=0, stop=(stop,)))[0]
    assert ended.finish_reason == "stop"
    assert ended.text == whole.text[: whole.text.index(stop)]
    assert ended.tokens == whole.tokens[: len(ended.tokens)]
    assert len(ended.tokens) < 20


def test_the_end_token_ends_a_text(llama: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = llama.generate(["hello"], Sampling(tokens=20, temperature=0))[0]
    monkeypatch.setattr(llama.vocabulary, "ends", frozenset([whole.tokens[5], 1]))
    ended = llama.generate(["hello"], Sampling(tokens=20, temperature=0))[0]
    assert ended.finish_reason == "eod"
    assert ended.tokens == whole.tokens[: whole.tokens.index(whole.tokens[5]) + 1]
    assert len(ended.log_probabilities) == len(ended.tokens)


def test_texts_end_with_the_positions_of_the_model(folders: dict[str, tuple[Path, nn.Module]]) -> None:
    for family in ("gpt2", "bloom"):
        generator = Generator.open(folders[family][0])
        ids = [5, 7, 9] * 15
        short, long = generator.generate([ids[:40], ids], Sampling(tokens=100, temperature=0))
        assert (len(short.tokens), len(long.tokens)) == (POSITIONS - 40, POSITIONS - 45)
        assert short.finish_reason == long.finish_reason == "length"
        assert generator.generate([ids[:40]], Sampling(tokens=100, temperature=0))[0].tokens == short.tokens
        with pytest.raises(ConfigError, match=r"prompt 1: has 48 tokens, and the model 48 positions .* to 47 tokens"):
            generator.generate([ids, [5] * 48], Sampling())


def test_likelihoods_are_those_of_one_pass(folders: dict[str, tuple[Path, nn.Module]]) -> None:
    folder, peer = folders["llama"]
    generator = Generator.open(folder, batch=2)
    encode = generator.vocabulary.encode
    pairs = [("hello", " world"), ("a b ", "c"), ("", "中文"), ("hello world or not", "x"), ("hel", "lo")]
    found = generator.log_likelihood(*zip(*pairs))
    split = [
        (encode("hello"), encode(" world")),
        (encode("a b"), encode(" c")),  # the space moves
        (generator.vocabulary.beginning, encode("中文")),
        (encode("hello world or not"), encode("x")),
        (encode("hel"), encode("lo")),  # together they would be other tokens
    ]
    assert encode("hello")[:2] != encode("hel")
    for (context, continuation), each in zip(split, found, strict=True):
        logits = (
            peer(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1].detach().log_softmax(-1)
        )
        own = logits.gather(-1, torch.tensor(continuation).unsqueeze(-1)).sum()
        assert each.log_probability == pytest.approx(float(own), rel=1e-6)
        assert each.tokens == len(continuation)
        assert each.greedy == (logits.argmax(-1).tolist() == continuation)
    greedy = generator.generate(["hello"], Sampling(tokens=5, temperature=0))[0]
    likely = generator.log_likelihood([encode("hello")] * 2, [greedy.tokens, [*greedy.tokens[:4], 9]])
    assert [each.greedy for each in likely] == [True, False]
    assert likely[0].log_probability == pytest.approx(sum(greedy.log_probabilities), abs=1e-10)


def test_likelihoods_do_not_depend_on_their_batch(
    folders: dict[str, tuple[Path, nn.Module]], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    pairs = [[[draw.randrange(2, 263) for _ in range(draw.randrange(1, 20))] for _ in range(7)] for _ in range(2)]
    for family in ("gpt2", "bloom"):
        alone = Generator.open(folders[family][0], batch=1).log_likelihood(*pairs)
        monkeypatch.setattr("megapoly.generate.replica._LOGITS", 263 * 5)
        together = Generator.open(folders[family][0], batch=7).log_likelihood(*pairs)
        for a, b in zip(alone, together, strict=True):
            assert a.log_probability == pytest.approx(b.log_probability, abs=1e-10)
            assert a.greedy == b.greedy


def test_likelihoods_of_what_is_too_long_leave_out_its_beginning(llama: Generator) -> None:
    context, continuation = [5, 7, 9] * 20, [11, 12]
    whole = llama.log_likelihood([context], [continuation])
    kept = llama.log_likelihood([context[-POSITIONS + 1 :]], [continuation])
    assert whole == kept
    for wrong, message in (([], "continuation 0 has 0 tokens"), ([5] * 49, "has 49 tokens; expected 1 to 48")):
        with pytest.raises(ConfigError, match=message):
            llama.log_likelihood([context], [wrong])
    with pytest.raises(ConfigError, match="2 contexts, but 1 continuations"):
        llama.log_likelihood(["a", "b"], ["c"])


@pytest.mark.parametrize("begins", [True, False])
def test_ids_are_those_of_transformers(folders: dict[str, tuple[Path, nn.Module]], begins: bool) -> None:
    folder = folders["llama"][0]
    byte_level(folder, begins)
    try:
        vocabulary, theirs = Generator.open(folder).vocabulary, transformers.AutoTokenizer.from_pretrained(folder)
        for text in (*PROMPTS, "hello</s>world", "<s>"):
            assert vocabulary.encode(text) == theirs(text)["input_ids"]
            assert vocabulary.decode(vocabulary.encode(text)) == theirs.decode(
                theirs(text)["input_ids"], skip_special_tokens=True
            )
        assert vocabulary.beginning == ([0] if begins else [1])
        assert vocabulary.encode("a", begins=False) == theirs("a", add_special_tokens=False)["input_ids"]
    finally:
        byte_level(folder)


def test_a_run_is_continued_from_its_newest_checkpoint(run: Path) -> None:
    generator = Generator.open(run)
    prompt = "abc ij"
    (found,) = generator.generate([prompt], Sampling(tokens=8, temperature=0))
    first = generator.vocabulary.encode(prompt)
    ids = first + found.tokens
    assert generator.vocabulary.decode(ids) == prompt + found.text
    best = logits_of(generator, ids).argmax(-1)
    assert best[len(first) - 1 : -1].tolist() == found.tokens
    fresh = Generator.open(run / "checkpoints" / "step-00000020")
    assert fresh.generate([prompt], Sampling(tokens=8, temperature=0)) == [found]
    fresh.replica.stage.initialise(1234)
    assert fresh.generate([prompt], Sampling(tokens=8, temperature=0))[0].tokens != found.tokens


def test_another_dtype_and_device(run: Path, folders: dict[str, tuple[Path, nn.Module]]) -> None:
    assert Generator.open(run, dtype=torch.float32).replica.dtype == torch.float32
    assert Generator.open(folders["llama"][0]).replica.dtype == torch.float64
    half = Generator.open(run, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert {parameter.dtype for parameter in half.replica.stage.parameters()} == {torch.bfloat16}
    assert len(half.generate(["abc"], Sampling(tokens=4))[0].tokens) <= 4


def test_a_model_that_gives_no_numbers_is_said(llama: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.replica.stage, "logits", lambda x, call: torch.full((*x.shape[:-1], 263), torch.nan))
    for sampling in (Sampling(temperature=0), Sampling(), Sampling(top_p=0.5)):
        with pytest.raises(TrainingError, match=r"logits in torch\.float64 are no numbers"):
            llama.generate(["a"], sampling)


def test_bad_input(run: Path, toml: Path, tmp_path: Path, folders: dict[str, tuple[Path, nn.Module]]) -> None:
    other = train_tokenizer({"en": [toml.parent / "en.jsonl"]}, tmp_path / "other.model", vocabulary=300)
    for call, kind, message in (
        (lambda: Generator.open(run, other.path), DataError, r"other\.model: is not the tokenizer that .*step-0000002"),
        (lambda: Generator.open(tmp_path), CheckpointError, str(tmp_path)),
        (lambda: Generator.open(run, tmp_path / "no.model"), DataError, r"no\.model: cannot be read"),
        (
            lambda: Generator.open(folders["gpt2"][0], other.path),
            DataError,
            r"other\.model: has 300 ids, and the model",
        ),
        (lambda: Generator.open(run, batch=0), ConfigError, "batch 0 is out of range"),
        (lambda: Generator.open(run).generate([[5, 999]], Sampling()), ConfigError, "prompt 0: token 999 is outside"),
    ):
        with pytest.raises(kind, match=message):
            call()
    folder, _ = folders["gpt2"]
    kept = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="comes with no tokenizer"):
        Generator.open(folder)
    (folder / "tokenizer.json").write_bytes(kept)

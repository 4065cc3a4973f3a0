"""The schema of a run: what it refuses, and that the message names the key, what was found and what to do."""

import copy
import json
import sys
from pathlib import Path

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapoly.config import Config, load, parse
from megapoly.errors import ConfigError
from megapoly.mesh import Mesh

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOML = """
[model]
layers = 4
hidden = 24
heads = 6
ffn = 96
vocabulary = 100
positions = 64

[layout]
pp = 2
tp = 2
micro_batch = 2

[data]
tokenizer = "tok/polyglot.model"
sources.en = {path = "sets/en", language = "en"}
sources.zh = {path = "/data/zh", language = "zh"}

[[data.stages]]
name = "first"
tokens = 12_800
weights = {en = 0.75, zh = 0.25}

[[data.stages]]
name = "second"
tokens = 25_600
weights = {en = 0.4, zh = 0.6}

[train]
directory = "runs/one"
sequence = 32
global_batch = 8

[optimizer]
learning_rate = 1e-3
warmup_tokens = 2_560
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    return path


def tree(**changes):
    """The plain values, with changes such as ``model__heads=5``; None removes a key."""
    result = tomllib.loads(TOML)
    for key, value in changes.items():
        *path, last = key.split("__")
        at = result
        for part in path:
            at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
        if value is None:
            del at[last]
        else:
            at[last] = value
    return result


def refused(**changes):
    with pytest.raises(ConfigError) as error:
        parse(tree(**changes), where="run.toml")
    message = str(error.value)
    assert message.startswith("run.toml: ")
    return message.removeprefix("run.toml: ")


def test_what_is_read(file):
    config = load(file)
    assert (config.model.layers, config.model.groups, config.model.head_dim) == (4, 6, 4)
    assert config.train.directory == file.parent / "runs/one"
    assert config.data.tokenizer == file.parent / "tok/polyglot.model"
    assert [source.path for source in config.data.sources.values()] == [file.parent / "sets/en", Path("/data/zh")]
    assert (config.total_tokens, config.step_tokens, config.total_steps) == (38_400, 256, 150)
    assert config.checkpoint.keep == 2
    assert parse(tomllib.loads(TOML), folder=file.parent) == config


def test_grouped_heads():
    assert parse(tree(model__key_value_heads=2)).model.groups == 2


def test_documents_are_json_and_read_back(file):
    config = load(file)
    document = json.loads(json.dumps(config.document()))
    assert Config.model_validate(document) == config
    assert parse(document) == config
    with pytest.raises(pydantic.ValidationError):
        config.model.layers = 5


def test_documents_of_every_family_are_read_back():
    scaling = {"kind": "linear", "factor": 2.0}
    for changes in ({}, {"model__position": "alibi"}, {"model__position": "rope", "model__rope_scaling": scaling}):
        config = parse(tree(**changes))
        assert parse({**tree(), "model": config.document()["model"]}) == config


def test_identity_leaves_free_what_may_change(file):
    config = load(file)
    free = ["layout.tp=1", "layout.micro_batch=4", "log.every_steps=7", "checkpoint.keep=9", "validation.windows=3",
            "train.directory='elsewhere'", "data.tokenizer='moved'", "data.sources.en.path='moved'",
            "data.stages.0.tokens=25600", "data.max_epochs=100"]  # fmt: skip
    for override in free:
        other = load(file, [override])
        assert other != config
        assert other.identity() == config.identity()
    fixed = ["model.layers=5", "train.seed=1", "train.sequence=16", "optimizer.clip=2.0",
             "train.precision='fp64'", "data.separate_documents=true"]  # fmt: skip
    for override in fixed:
        assert load(file, [override]).identity() != config.identity()
        assert load(file, [override]).curriculum() == config.curriculum()
    for override in ["data.stages.0.tokens=25600", "data.sources.en.language='de'", "data.max_epochs=100"]:
        assert load(file, [override]).curriculum() != config.curriculum()
    assert load(file, ["data.sources.en.path='moved'"]).curriculum() == config.curriculum()
    assert load(file).document() == config.document()  # identity() takes nothing out of the config


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(1, 40))
def test_on_settles_the_layout_or_names_what_to_start(dp, pp, tp, given_dp, world):
    values = tree(layout__pp=pp, layout__tp=tp, train__global_batch=24, layout__micro_batch=1)
    values["layout"]["sequence_parallel"] = False
    values["data"]["stages"] = [{"name": "all", "tokens": 24 * 32 * 10, "weights": {"en": 1}}]
    if given_dp:
        values["layout"]["dp"] = dp
    config = parse(values)
    if world == dp * pp * tp if given_dp else world % (pp * tp) == 0 and 24 % (world // (pp * tp)) == 0:
        settled = config.on(world)
        assert settled.mesh == Mesh(dp=world // (pp * tp), pp=pp, tp=tp)
        assert settled.mesh.world_size == world
        assert settled.microbatches * settled.mesh.dp * settled.layout.micro_batch == 24
        assert settled.on(world) == settled
        return
    with pytest.raises(ConfigError) as error:
        config.on(world)
    if given_dp:
        expected = (
            f"{world} ranks were started, but dp {dp} x pp {pp} x tp {tp} needs {dp * pp * tp}; start {dp * pp * tp},"
        )
    elif world % (pp * tp):
        expected = (
            f"{world} ranks were started, which pp {pp} x tp {tp} = {pp * tp} does not divide; start a multiple of"
        )
    else:
        expected = f"train.global_batch 24 does not divide by layout.micro_batch 1 x dp {world // (pp * tp)} ="
    assert expected in str(error.value)


def test_a_mesh_needs_a_settled_layout():
    with pytest.raises(ConfigError, match=r"layout.dp is not settled yet: call config.on\(world_size\) first"):
        parse(tree()).mesh  # noqa: B018


# Every check that joins keys: the changes, and what the message has to name.
CROSS = {
    "a back end beside dropout": (
        {"kernels__attention": "sdpa", "model__attention_dropout": 0.1},
        "kernels.attention is 'sdpa', but model.attention_dropout is above 0, which takes attention with all"
        " probabilities in memory; set it to 'auto'",
    ),
    "a back end beside a narrow softmax": (
        {"kernels__attention": "triton", "model__fp32_softmax": False, "train__precision": "bf16"},
        "kernels.attention is 'triton', but model.fp32_softmax is false",
    ),
    "flash-attn by precision": (
        {"kernels__attention": "flash_attn", "train__precision": "fp32"},
        "kernels.attention is 'flash_attn', which is for bf16 and fp16, and train.precision is 'fp32'; set one of them",
    ),
    "Triton's attention in float64": (
        {"kernels__attention": "triton", "train__precision": "fp64"},
        "kernels.attention is 'triton', which is not for train.precision 'fp64'; set it to 'auto'",
    ),
    "hidden by heads": (
        {"model__heads": 5},
        "model.hidden 24 does not divide by model.heads 5; choose heads from [1, 2, 3, 4, 6, 8, 12, 24]",
    ),
    "heads by groups": (
        {"model__key_value_heads": 4},
        "model.heads 6 does not divide by model.key_value_heads 4; choose key_value_heads from [1, 2, 3, 6]",
    ),
    "more groups than heads": (
        {"model__key_value_heads": 12},
        "model.heads 6 does not divide by model.key_value_heads 12; choose key_value_heads from [1, 2, 3, 6]",
    ),
    "heads by tp": (
        {"layout__tp": 4},
        "model.heads 6 does not divide by layout.tp 4; choose layout.tp from [1, 2, 3, 6], or a number of heads that is"
        " a multiple of 4",
    ),
    "groups by tp": (
        {"layout__tp": 2, "model__key_value_heads": 3},
        "model.key_value_heads 3 does not divide by layout.tp 2; choose layout.tp from [1, 3], or",
    ),
    "ffn by tp": (
        {"layout__tp": 3, "model__ffn": 100},
        "model.ffn 100 does not divide by layout.tp 3; the nearest that does is 99",
    ),
    "small ffn by tp": (
        {"layout__tp": 6, "model__ffn": 2},
        "model.ffn 2 does not divide by layout.tp 6; the nearest that does is 6",
    ),
    "layers by pp": (
        {"layout__pp": 5},
        "layout.pp 5 x 1 stages a rank is more than model.layers 4: a stage would have no layer; set layout.pp to 4",
    ),
    "layers by virtual stages": (
        {"layout__schedule": "interleaved", "layout__virtual_stages": 3},
        "layout.pp 2 x 3 stages a rank is more than model.layers 4: a stage would have no layer; take schedule '1f1b'",
    ),
    "virtual stages of another schedule": (
        {"layout__virtual_stages": 2},
        "layout.virtual_stages 2: schedule '1f1b' has 1 a rank; leave it out, or set layout.schedule to 'interleaved'",
    ),
    "one virtual stage": (
        {"layout__schedule": "interleaved", "layout__virtual_stages": 1},
        "layout.virtual_stages 1 makes 'interleaved' the same as '1f1b'",
    ),
    "bubbles of no pipeline": (
        {"layout__schedule": "zero-bubble", "layout__pp": 1},
        "layout.schedule 'zero-bubble' fills the bubbles of a pipeline, and layout.pp is 1; set layout.schedule to",
    ),
    "number of stage layers": (
        {"layout__stage_layers": [1, 2, 1]},
        "layout.stage_layers [1, 2, 1]: 3 stages with 4 layers, but the layout has 2 stages and the model 4 layers",
    ),
    "sum of stage layers": ({"layout__stage_layers": [1, 2]}, "2 stages with 3 layers, but the layout has 2 stages"),
    "empty stage in the middle": (
        {"layout__stage_layers": [2, 0, 0, 2], "layout__pp": 4},
        "layout.stage_layers [2, 0, 0, 2]: only the first and the last stage, which hold the embedding and the output",
    ),
    "every k-th of nothing": (
        {"layout__recompute_every": 2, "layout__recompute": "selective"},
        "layout.recompute_every 2 counts whole layers; set layout.recompute to 'full', or leave it out",
    ),
    "sequence by tp": (
        {"layout__tp": 3},
        "train.sequence 32 does not divide by layout.tp 3, as sequence parallelism needs; set train.sequence to 30, or"
        " layout.sequence_parallel to false",
    ),
    "sequence by positions": (
        {"train__sequence": 65},
        "train.sequence 65 is longer than the position table, model.positions 64; raise model.positions or shorten",
    ),
    "sequence by positions without a table": (
        {"train__sequence": 65, "model__position": "alibi"},
        "train.sequence 65 is longer than model.positions 64; raise model.positions or shorten train.sequence",
    ),
    "angles without rope": (
        {"model__rope_base": 500.0},
        "model.rope_base is set, but model.position 'learned' has no rotary angles; remove it, or set model.position",
    ),
    "scaling without rope": (
        {"model__rope_scaling": {"kind": "linear", "factor": 2.0}, "model__position": "alibi"},
        "model.rope_scaling is set, but model.position 'alibi' has no rotary angles; remove it, or set model.position",
    ),
    "pairs of channels": (
        {"model__position": "rope", "model__hidden": 18},
        "model.hidden 18 / model.heads 6 = 3 channels a head, and rotary embedding turns pairs of them; choose heads",
    ),
    "llama3 without its length": (
        {"model__position": "rope", "model__rope_scaling": {"kind": "llama3", "factor": 2.0}},
        "model.rope_scaling: kind 'llama3' needs original_positions, the longest sequence of the first training",
    ),
    "linear with a length": (
        {"model__position": "rope", "model__rope_scaling": {"kind": "linear", "factor": 2.0, "original_positions": 8}},
        "model.rope_scaling.original_positions belongs to kind 'llama3', and kind is 'linear'; remove it, or change",
    ),
    "llama3 with crossed bounds": (
        {
            "model__position": "rope",
            "model__rope_scaling": {
                "kind": "llama3", "factor": 2.0, "original_positions": 8, "low_frequency_factor": 4.0,
            },
        },
        "model.rope_scaling: low_frequency_factor 4.0 has to be below high_frequency_factor 4.0",
    ),
    "stage names": (
        {"data__stages__1__name": "first"},
        "data.stages: two stages have one name among ['first', 'first']; give each its own",
    ),
    "unknown source, near": (
        {"data__stages__1__weights": {"en": 0.5, "zz": 0.5}},
        "data.stages.1 (second): weight of an unknown source 'zz'; there are: en, zh",
    ),
    "unknown source, far": (
        {"data__stages__0__weights": {"zhh": 1.0}},
        "data.stages.0 (first): weight of an unknown source 'zhh'; did you mean 'zh'?",
    ),
    "alpha of weights": (
        {"data__stages__1__alpha": 0.5},
        "data.stages.1 (second): alpha has nothing to split, since weights are of sources; remove it",
    ),
    "sum of weights": (
        {"data__stages__1__weights": {"en": 0.5, "zh": 0.75}},
        "data.stages.1 (second): the weights sum to 1.25, not 1; divide each by 1.25",
    ),
    "sum of weights, by a hair": (
        {"data__stages__0__weights": {"en": 0.5, "zh": 0.50001}},
        "data.stages.0 (first): the weights sum to 1.00001, not 1; divide each by 1.00001",
    ),
    "no weight": (
        {"data__stages__0__weights": {"en": 0.0}},
        "data.stages.0 (first): the weights sum to 0, not 1; give a source a weight",
    ),
    "stage length": (
        {"data__stages__0__tokens": 12_801},
        "data.stages.0 (first): 12801 tokens are not a whole number of global batches of 8 x 32 = 256 tokens; set it to"
        " 12800 or 13056",
    ),
    "short stage": (
        {"data__stages__1__tokens": 100},
        "data.stages.1 (second): 100 tokens are not a whole number of global batches of 8 x 32 = 256 tokens; set it"
        " to 256",
    ),
    "long warm-up": (
        {"optimizer__warmup_tokens": 38_400},
        "optimizer.warmup_tokens 38400 is not less than the run's 38400 tokens; shorten it, for example to 384",
    ),
    "start of the warm-up": (
        {"optimizer__warmup_start": 0.002},
        "optimizer.warmup_start 0.002 is above optimizer.learning_rate 0.001; lower it",
    ),
    "decay of a constant rate": (
        {"optimizer__shape": "constant", "optimizer__decay_tokens": 100},
        "optimizer.decay_tokens is set, but optimizer.shape 'constant' has no decay; remove one",
    ),
    "warm-up and final decay": (
        {"optimizer__shape": "wsd", "optimizer__decay_tokens": 35_841},
        "warmup_tokens 2560 and the final decay_tokens 35841 together exceed the run's 38400 tokens",
    ),
    "decay inside the warm-up": (
        {"optimizer__decay_tokens": 2560},
        "optimizer.decay_tokens 2560 is the end of the decay and has to be after warmup_tokens 2560",
    ),
    "global batch by micro-batch": (
        {"layout__micro_batch": 3},
        "train.global_batch 8 does not divide by layout.micro_batch 3 x dp 1 = 3; change the number of",
    ),
    "global batch by micro-batch and dp": (
        {"layout__micro_batch": 8, "layout__dp": 2},
        "train.global_batch 8 does not divide by layout.micro_batch 8 x dp 2 = 16; change the number of",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), CROSS.values(), ids=CROSS)
def test_values_that_do_not_fit_together(changes, message):
    parse(tree())
    assert message in refused(**changes)


def test_values_at_the_edge_of_every_check_are_accepted():
    for changes in (
        {"model__heads": 24},
        {"model__key_value_heads": 2},
        {"model__position": "rope", "model__rope_base": 5e5},
        {"model__position": "rope", "model__rope_scaling": {"kind": "linear", "factor": 2.0}},
        {"model__position": "alibi", "train__sequence": 64},
        {"kernels__attention": "flash_attn", "train__precision": "fp16"},
        {"kernels__attention": "triton", "model__fp32_softmax": False},
        {"layout__tp": 6, "layout__sequence_parallel": False},
        {"layout__pp": 4},
        {"layout__pp": 4, "layout__stage_layers": [0, 2, 2, 0]},
        {"layout__schedule": "zero-bubble-v", "layout__virtual_stages": 2},
        {"layout__recompute": "full", "layout__recompute_every": 3},
        {"train__sequence": 64},
        {"data__stages__0__weights": {"en": 0.5, "zh": 0.5000005}},
        {"data__stages__0__weights": {"zh": 1}},
        {"data__stages__0__tokens": 256},
        {"optimizer__warmup_tokens": 38_399},
        {"optimizer__warmup_start": 0.001},
        {"optimizer__shape": "wsd", "optimizer__decay_tokens": 35_840},
        {"optimizer__decay_tokens": 2561},
        {"optimizer__shape": "constant"},
        {"layout__micro_batch": 4, "layout__dp": 2},
    ):
        parse(tree(**changes))


SINGLE = {
    "missing": ({"model__layers": None}, "key 'model.layers' is missing"),
    "missing section": ({"optimizer": None}, "key 'optimizer' is missing"),
    "zero": ({"model__layers": 0}, "model.layers: input should be greater than 0, found 0"),
    "fraction": ({"layout__tp": 1.5}, "layout.tp: input should be a valid integer, got a number with a fraction"),
    "text": ({"model__hidden": "wide"}, "model.hidden: input should be a valid integer"),
    "not finite": ({"optimizer__learning_rate": float("inf")}, "optimizer.learning_rate: input should be a finite"),
    "share": ({"data__stages__0__weights__en": 1.5}, "data.stages.0.weights.en: input should be less than or equal to"),
    "choice": ({"layout__schedule": "2f2b"}, "layout.schedule: input should be 'gpipe', '1f1b', 'interl"),
    "precision": ({"train__precision": "fp8"}, "train.precision: input should be 'fp32', 'bf16', 'fp16' or 'fp64'"),
    "not a section": ({"model": 3}, "model: input should be a valid dictionary or instance of Model, found 3"),
    "not a list": ({"data__stages": 3}, "data.stages: input should be a valid list, found 3"),
    "no sources": ({"data__sources": {}}, "data.sources: dictionary should have at least 1 item"),
    "no stages": ({"data__stages": []}, "data.stages: list should have at least 1 item"),
    "no weights": ({"data__stages__0__weights": {}}, "data.stages.0.weights: dictionary should have at least 1 item"),
    "beta": ({"optimizer__beta2": 1.0}, "optimizer.beta2: input should be less than 1, found 1.0"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), SINGLE.values(), ids=SINGLE)
def test_values_that_are_wrong_by_themselves(changes, message):
    assert message in refused(**changes)


def test_every_wrong_value_is_listed():
    lines = refused(model__layers=0, train__sequence=-1).split("\n")
    assert lines == [
        "model.layers: input should be greater than 0, found 0",
        "run.toml: train.sequence: input should be greater than 0, found -1",
    ]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("modell", "unknown key 'modell'; did you mean 'model'?"),
        ("model__layer", "unknown key 'model.layer'; did you mean 'layers'?"),
        (
            "checkpoint__xyz",
            "unknown key 'checkpoint.xyz'; known here: background, every_steps, keep, keep_every_steps",
        ),
        ("data__sources__en__lang", "unknown key 'data.sources.en.lang'; did you mean 'language'?"),
        ("data__stages__1__token", "unknown key 'data.stages.1.token'; did you mean 'tokens'?"),
        ("checkpoint__every", "unknown key 'checkpoint.every'; did you mean 'every_steps'?"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_name(key, message):
    assert refused(**{key: 1}) == message


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("layout.tp=1", lambda c: c.layout.tp, 1),
        (" layout.tp = 1 ", lambda c: c.layout.tp, 1),
        ("optimizer.learning_rate=2e-4", lambda c: c.optimizer.learning_rate, 2e-4),
        ("train.precision=fp64", lambda c: c.train.precision, "fp64"),
        ("train.precision = fp64", lambda c: c.train.precision, "fp64"),
        ("log.tensorboard=false", lambda c: c.log.tensorboard, False),
        ("validation.windows=0", lambda c: c.validation.windows, 0),
        ("train.directory='a=b'", lambda c: c.train.directory.name, "a=b"),
        ("data.stages.1.name=last", lambda c: c.data.stages[1].name, "last"),
        ("data.stages.0.weights={en = 1.0}", lambda c: c.data.stages[0].weights, {"en": 1.0}),
        ("data.sources.en.language=de", lambda c: c.data.sources["en"].language, "de"),
    ],
)
def test_set_overrides(file, override, read, expected):
    assert read(load(file)) != expected
    assert read(load(file, [override])) == expected


def test_a_list_entry_and_later_overrides_win(file):
    stage = "data.stages.0={name = 'only', tokens = 256, weights = {zh = 1}}"
    config = load(file, [stage, "layout.tp=3", "layout.tp=1"])
    assert config.data.stages[0].name == "only"
    assert config.layout.tp == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("layout.tp", "--set layout.tp: expected section.key=value, such as --set layout.tp=2"),
        ("layout..tp=1", "--set layout..tp=1: expected section.key=value"),
        ("=1", "--set =1: expected section.key=value"),
        ("model.layers.x=1", "--set model.layers.x=1: model.layers is a value, not a section"),
        ("data.stages.2.name=x", "data.stages is a list of 2, which has no entry '2'; entries are counted from 0"),
        ("data.stages.first.name=x", "data.stages is a list of 2, which has no entry 'first'"),
        ("data.stages.²=x", "data.stages is a list of 2, which has no entry '²'"),
        ("layout.tq=2", "unknown key 'layout.tq'; did you mean 'tp'?"),
        (
            "layout.tp=two",
            "layout.tp: input should be a valid integer, unable to parse string as an integer, found 'two'",
        ),
        ("layout=2", "layout: input should be a valid dictionary or instance of Layout, found 2"),
    ],
)
def test_overrides_that_cannot_be(file, override, message):
    with pytest.raises(ConfigError) as error:
        load(file, [override])
    assert message in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(
        ConfigError, match=r"none.toml: cannot be read \(No such file or directory\); give the path of a"
    ):
        load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[model\nlayers = 4")
    with pytest.raises(ConfigError, match=r"bad.toml: is not TOML: .*line 1"):
        load(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes("# é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.toml: is not UTF-8 text, at byte 2"):
        load(tmp_path / "latin.toml")
    (tmp_path / "twice.toml").write_text("[model]\nlayers = 1\nlayers = 2")
    with pytest.raises(ConfigError, match=r"twice.toml: is not TOML"):
        load(tmp_path / "twice.toml")


def test_the_tree_that_is_parsed_is_left_as_it_was():
    values = tree()
    before = copy.deepcopy(values)
    parse(values, folder=Path("/somewhere"))
    assert values == before

"""From stages to weights and plans: sizes, gradual moves, caps, and edits of a running job."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly import config as configuration
from megapoly.data.curriculum import stages_of
from megapoly.data.plan import Plan, edited_plan, plan_from_config
from megapoly.data.segments import Source
from megapoly.errors import ConfigError
from tests.data.small import make_config

SEQUENCE, BATCH = 8, 4
STEP = SEQUENCE * BATCH
SIZES = {"en": 4001, "fr": 801, "th": 81}


class Sized:
    """As much of a dataset as a plan asks for."""

    pack = 0

    def __init__(self, name, tokens):
        self.identity, self.train_tokens = f"identity of {name}", tokens


def config_of(stages, sources=SIZES, languages=(), caps=(), **data):
    """A config of stages given as (steps, mixture)."""
    document = make_config(sequence=SEQUENCE, global_batch=BATCH).document()
    languages, caps = dict(languages), dict(caps)
    document["data"] |= {
        "sources": {
            name: {"path": name, "language": languages.get(name, name), "max_epochs": caps.get(name)}
            for name in sources
        },
        "stages": [{"name": f"s{i}", "tokens": n * STEP, **mixture} for i, (n, mixture) in enumerate(stages)],
        **data,
    }
    return configuration.parse(document)


def sources_of(sizes=SIZES, languages=()):
    return [Source(n, dict(languages).get(n, n), n, tokens) for n, tokens in sorted(sizes.items())]


def plan_of(config, sizes=SIZES):
    return plan_from_config(config, {name: Sized(name, tokens) for name, tokens in sizes.items()})


def trained(plan, first, end):
    """Samples of every source by walking all of them."""
    return np.bincount(plan.locate(np.arange(first, end)).source, minlength=len(plan.sources)).tolist()


# ------------------------------------------------------------------------------------------------ sizes


def test_explicit_weights_are_kept():
    weights = {"en": 0.5, "fr": 0.3, "th": 0.2}
    assert stages_of(config_of([(10, {"weights": weights})]), sources_of()) == [("s0", 10 * BATCH, weights)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_share_is_split_by_size_to_the_power_alpha(alpha):
    config = config_of([(10, {"languages": {"en": 0.4, "*": 0.6}, "alpha": alpha})])
    ((_, _, weights),) = stages_of(config, sources_of())
    powers = {name: SIZES[name] ** alpha for name in ("fr", "th")}
    assert weights["en"] == pytest.approx(0.4)
    for name, power in powers.items():
        assert weights[name] == pytest.approx(0.6 * power / sum(powers.values()))


def test_a_language_in_two_sources_has_the_share_of_one():
    """Whoever cuts a source in two does not change the share of its language."""
    languages = {"fr1": "fr", "fr2": "fr"}
    whole = config_of([(10, {"non_english": 0.6})])
    cut = config_of([(10, {"non_english": 0.6})], ["en", "fr1", "fr2", "th"], languages)
    ((_, _, one),) = stages_of(whole, sources_of())
    ((_, _, two),) = stages_of(cut, sources_of({"en": 4001, "fr1": 200, "fr2": 601, "th": 81}, languages))
    assert two["fr1"] + two["fr2"] == pytest.approx(one["fr"])
    assert two["fr1"] / two["fr2"] == pytest.approx((200 / 601) ** 0.3)


def test_non_english_of_a_plan():
    plan = plan_of(config_of([(2500, {"non_english": 0.3}), (2500, {"non_english": 0.6})]))
    for (_, first, end), share in zip(plan.stages(), (0.3, 0.6), strict=True):
        counts = trained(plan, first, end)
        assert sum(counts[1:]) == round(share * (end - first))


# ------------------------------------------------------------------------------------------------ gradual moves


def test_weights_move_from_the_stage_before():
    first, last = {"en": 0.9, "fr": 0.1}, {"en": 0.2, "fr": 0.3, "th": 0.5}
    config = config_of([(8, {"weights": first}), (20, {"weights": last, "gradual": True}), (5, {"weights": last})])
    stages = stages_of(config, sources_of())
    assert [name for name, _, _ in stages] == ["s0", *["s1"] * 20, "s2"]
    assert [samples for _, samples, _ in stages] == [8 * BATCH, *[BATCH] * 20, 5 * BATCH]
    for i, (_, _, weights) in enumerate(stages[1:-1]):
        share = (i + 0.5) / 20
        for name in SIZES:
            expected = (1 - share) * first.get(name, 0) + share * last[name]
            assert weights[name] == pytest.approx(expected)


def test_a_long_move_has_256_pieces_of_whole_batches():
    config = config_of([(1, {"non_english": 0.1}), (10_007, {"non_english": 0.9, "gradual": True})])
    pieces = stages_of(config, sources_of())[1:]
    assert len(pieces) == 256
    assert {samples for _, samples, _ in pieces} == {39 * BATCH, 40 * BATCH}
    assert sum(samples for _, samples, _ in pieces) == 10_007 * BATCH
    shares = [1 - weights["en"] for _, _, weights in pieces]
    assert shares == pytest.approx([0.1 + 0.8 * (i + 0.5) / 256 for i in range(256)])


def test_pieces_make_up_for_each_others_whole_numbers():
    """A source with less than a sample in a piece has its share of the stage."""
    last = {"en": 0.99, "fr": 0.008, "th": 0.002}
    config = config_of([(4, {"weights": {"en": 1.0}}), (1000, {"weights": last, "gradual": True})])
    plan = plan_of(config)
    assert max(segment.block for segment in plan.segments[1:]) == 16
    counts = trained(plan, 16, plan.total_samples)
    # The mean weights of the move are halfway.
    assert counts == pytest.approx([4000 * 0.995, 4000 * 0.004, 4000 * 0.001], abs=1.01)
    half = trained(plan, 16, 16 + 2000)
    assert half == pytest.approx([2000 * 0.9975, 2000 * 0.002, 2000 * 0.0005], abs=1.6)


def test_a_move_has_one_name_and_one_end():
    config = config_of([(8, {"weights": {"en": 1.0}}), (600, {"non_english": 0.5, "gradual": True})])
    plan = plan_of(config)
    assert len(plan.segments) == 257
    assert plan.stages() == [("s0", 0, 32), ("s1", 32, 2432)]
    assert plan.stage_bounds(1000) == (32, 2432)


# ------------------------------------------------------------------------------------------------ caps


def test_a_cap_refuses_with_the_arithmetic():
    stages = [(10, {"weights": {"en": 0.5, "th": 0.5}}), (30, {"weights": {"en": 0.75, "th": 0.25}})]
    with pytest.raises(ConfigError) as error:
        stages_of(config_of(stages, max_epochs=4), sources_of())
    message = str(error.value)
    # (20 + 30) samples of th, which has (81 - 1) / 8 = 10 windows.
    assert "source 'th' would be read 5.00 epochs, above its max_epochs 4: samples of 8 tokens" in message
    assert "20 in s0 + 30 in s1 = 50, and one epoch has 10" in message
    assert "'en'" not in message
    stages_of(config_of(stages, max_epochs=5), sources_of())
    stages_of(config_of(stages, max_epochs=4, caps={"th": 5.0}), sources_of())
    with pytest.raises(ConfigError, match=r"above its max_epochs 4\.5"):
        stages_of(config_of(stages, caps={"th": 4.5}), sources_of())


def test_respread_takes_from_the_others_of_the_share():
    languages = {"languages": {"en": 0.4, "*": 0.6}, "alpha": 0.0}
    config = config_of([(100, languages), (100, languages)], caps={"th": 15.0}, over_epochs="respread")
    (_, _, first), (_, _, second) = stages_of(config, sources_of())
    # th may have 15 * 10 of 400 samples: 120 in the first stage, as wanted, and 30 in the second.
    assert first == pytest.approx({"en": 0.4, "fr": 0.3, "th": 0.3})
    assert second == pytest.approx({"en": 0.4, "fr": 0.525, "th": 0.075})
    plan = plan_of(config)
    assert dict(zip(["en", "fr", "th"], plan.counts_at(800).tolist(), strict=True)) == {"en": 320, "fr": 330, "th": 150}


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(1, 50), st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any)), max_size=4
    ),
    st.lists(st.floats(0.2, 30), min_size=3, max_size=3),
)
def test_respread_holds_every_cap(stages, caps):
    given_stages = [
        (steps, {"weights": {name: n / sum(shares) for name, n in zip(SIZES, shares, strict=True)}})
        for steps, shares in [(5, [1, 1, 1]), *stages]
    ]
    config = config_of(given_stages, caps=dict(zip(SIZES, caps, strict=True)), over_epochs="respread")
    room = {name: cap * ((tokens - 1) // SEQUENCE) for (name, tokens), cap in zip(SIZES.items(), caps, strict=True)}
    try:
        found = stages_of(config, sources_of())
    except ConfigError:  # it is refused only where somebody has to go without
        assert any(
            sum(steps * BATCH * mixture["weights"][name] for steps, mixture in given_stages) > room[name] * (1 - 1e-9)
            for name in SIZES
        )
        return
    used = dict.fromkeys(SIZES, 0.0)
    for (_, samples, weights), (_, mixture) in zip(found, given_stages, strict=True):
        assert sum(weights.values()) == pytest.approx(1)
        assert {name for name, weight in weights.items() if weight} <= {n for n, w in mixture["weights"].items() if w}
        for name, weight in weights.items():
            used[name] += samples * weight
    for name in SIZES:
        assert used[name] <= room[name] * (1 + 1e-9) + 1e-9


def test_respread_that_finds_no_others():
    config = config_of([(100, {"languages": {"en": 0.4, "th": 0.5, "*": 0.1}})], max_epochs=2, over_epochs="respread")
    with pytest.raises(ConfigError, match=r"stage s0: languages\.th: its sources th have a share of 0\.5 of"):
        stages_of(config, sources_of())


def test_what_moves_out_is_capped_too():
    """A source of the stage before that the stage itself does not name."""
    stages = [(20, {"weights": {"th": 0.5, "en": 0.5}}), (20, {"weights": {"en": 1.0}, "gradual": True})]
    with pytest.raises(ConfigError, match=r"40 in s0 \+ 20 in s1 = 60"):
        stages_of(config_of(stages, max_epochs=5.5), sources_of())
    with pytest.raises(ConfigError, match="s1: the stage before: its sources th"):
        stages_of(config_of(stages, max_epochs=5.5, over_epochs="respread"), sources_of())


# ------------------------------------------------------------------------------------------------ edits


def windows_of(plan, first, end):
    """(source, epoch, window) of every sample."""
    found = plan.locate(np.arange(first, end))
    names = [plan.sources[i].name for i in found.source]
    return list(zip(names, found.epoch.tolist(), found.window.tolist(), strict=True))


@settings(max_examples=25)
@given(st.integers(0, 199), st.integers(0, 8), st.integers(0, 8), st.booleans())
def test_an_edit_repeats_and_loses_nothing(step, before, after, gradual):
    old = config_of([(100, {"non_english": before / 10}), (100, {"non_english": 0.5})], ["en", "fr", "th"])
    stages = [(100, {"non_english": after / 10}), (150, {"non_english": 0.9, "gradual": gradual})]
    new = config_of(stages, ["en", "fr", "th", "zh"])
    sizes = {**SIZES, "zh": 999}
    plan = plan_of(old)
    edited = edited_plan(plan, step * BATCH, new, {name: Sized(name, tokens) for name, tokens in sizes.items()})
    assert edited.total_samples == 250 * BATCH
    assert windows_of(edited, 0, step * BATCH) == windows_of(plan, 0, step * BATCH)
    everything = windows_of(edited, 0, edited.total_samples)
    assert len(set(everything)) == len(everything)  # nothing twice in an epoch
    for source, windows in zip(edited.sources, edited.windows.tolist(), strict=True):
        mine = sorted((epoch, window) for name, epoch, window in everything if name == source.name)
        whole = [pair for pair in mine if pair[0] < (mine[-1][0] if mine else 0)]
        assert len(whole) == windows * (mine[-1][0] if mine else 0)  # every epoch but the last is whole
    # Each stage has its share, of what was left of it.
    for name, first, end in edited.stages():
        if first >= step * BATCH and not (gradual and name == "s1"):
            share = {"s0": after / 10, "s1": 0.9}[name]
            english = trained(edited, first, end)[0]
            assert english == pytest.approx((1 - share) * (end - first), abs=1.01)
    assert Plan.from_document(edited.to_document()) == edited


def test_an_edit_counts_what_was_trained_against_caps():
    old = config_of([(100, {"weights": {"en": 0.9, "th": 0.1}})])
    plan, datasets = plan_of(old), {name: Sized(name, tokens) for name, tokens in SIZES.items()}
    stages = [(50, {"weights": {"en": 1.0}}), (50, {"weights": {"en": 0.8, "th": 0.2}})]
    had = int(plan.counts_at(200)[2])
    assert 10 < had < 30
    with pytest.raises(ConfigError, match=rf"{had} trained \+ 40 in s1 = {had + 40}"):
        edited_plan(plan, 200, config_of(stages, max_epochs=5), datasets)
    edited = edited_plan(plan, 200, config_of(stages, max_epochs=5, over_epochs="respread"), datasets)
    assert edited.counts_at(400).tolist() == [350, 0, 50]


def test_edits_that_are_refused():
    plan, datasets = plan_of(config_of([(100, {"weights": {"en": 1.0}})])), {n: Sized(n, t) for n, t in SIZES.items()}
    with pytest.raises(ConfigError, match="end after 40 samples, but the run has trained 200; lengthen the stages"):
        edited_plan(plan, 200, config_of([(10, {"weights": {"en": 1.0}})]), datasets)
    other = config_of([(100, {"weights": {"en": 1.0}})], languages={"th": "ko"})
    with pytest.raises(ConfigError, match=r"data\.sources\.th\.language 'ko': this run has trained it as 'th'"):
        edited_plan(plan, 200, other, datasets)


def test_a_name_that_comes_back_is_a_stage_of_its_own():
    plan = plan_of(config_of([(10, {"weights": {"en": 1.0}}), (10, {"weights": {"fr": 1.0}})]))
    datasets = {n: Sized(n, t) for n, t in SIZES.items()}
    edited = edited_plan(plan, 60, config_of([(20, {"weights": {"en": 1.0}}), (5, {"weights": {"fr": 1.0}})]), datasets)
    assert edited.stages() == [("s0", 0, 40), ("s1", 40, 60), ("s0", 60, 80), ("s1", 80, 100)]
    assert [edited.stage_bounds(sample) for sample in (0, 39, 40, 59, 60, 80)] == [
        (0, 40), (0, 40), (40, 60), (40, 60), (60, 80), (80, 100)
    ]  # fmt: skip

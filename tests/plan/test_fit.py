"""Layouts that fit, against all layouts there are."""

from __future__ import annotations

import itertools

import pytest

from megapoly.config import Config, load, parse
from megapoly.errors import ConfigError
from megapoly.plan.fit import nearest
from megapoly.plan.memory import predict


def polylm(ranks: int, *overrides: str) -> Config:
    return load("examples/polylm/1.7b.toml", overrides).on(ranks)


def peak(settings: Config) -> int:
    return max(usage.total for usage in predict(settings))


def changed(settings: Config, ranks: int, **layout: object) -> Config:
    tree = settings.document()
    tree["layout"] |= {"dp": None, **layout}
    return parse(tree).on(ranks)


def test_the_nearest_layouts_fit_and_no_nearer_one_does() -> None:
    settings = polylm(8, "layout.tp=1", "layout.micro_batch=8", "layout.recompute='none'")
    limit = 0.5 * peak(settings)
    fits = nearest(settings, 8, limit, "cuda")
    assert len(fits) == 3
    for fit in fits:
        assert fit.peak == peak(changed(settings, 8, **fit.changes)) <= limit
    # The first of them is one change, and every smaller change does not do.
    smaller = [{"recompute": "selective"}, {"micro_batch": 4}]
    assert all(peak(changed(settings, 8, **changes)) > limit for changes in smaller)
    # None of them goes on where another fits already.
    for one, other in itertools.permutations(fits, 2):
        assert not one.changes.items() <= other.changes.items()


def test_nothing_fits_where_the_weights_alone_do_not() -> None:
    settings = polylm(8)
    limit = 1.7e9 * 2 / 8  # every layout holds an eighth of the weights at least
    assert nearest(settings, 8, limit, "cuda") == []
    for tp, pp in ((8, 1), (4, 2), (2, 4), (1, 8)):
        try:
            assert peak(changed(settings, 8, tp=tp, pp=pp, micro_batch=1, recompute="full")) > limit
        except ConfigError:
            pytest.fail("these are layouts")


def test_a_schedule_that_needs_a_pipeline_gives_way_without_one() -> None:
    settings = polylm(8, "layout.tp=1", "layout.pp=2", "layout.micro_batch=1", "layout.schedule='zero-bubble'")
    fits = nearest(settings, 8, 0.6 * peak(settings), "cuda", most=8)
    alone = [fit.changes for fit in fits if fit.changes.get("pp") == 1]
    assert all(changes["schedule"] == "1f1b" for changes in alone)
    assert fits

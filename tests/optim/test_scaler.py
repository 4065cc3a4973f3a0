"""The dynamic loss scale against the rule of the paper, step by step."""

from __future__ import annotations

from megapoly.optim.scaler import GOOD_STEPS, LossScaler


def test_it_halves_on_overflow_and_doubles_after_good_steps() -> None:
    scaler = LossScaler()
    assert (scaler.scale, GOOD_STEPS) == (65536.0, 2000)
    for _ in range(2):
        scaler.update(overflow=True)
    assert (scaler.scale, scaler.overflows) == (16384.0, 2)
    for _ in range(1999):
        scaler.update(overflow=False)
    scaler.update(overflow=True)  # the count begins anew
    assert scaler.scale == 8192.0
    for _ in range(1999):
        scaler.update(overflow=False)
    assert scaler.scale == 8192.0
    scaler.update(overflow=False)
    assert scaler.scale == 16384.0
    for _ in range(2000):
        scaler.update(overflow=False)
    assert (scaler.scale, scaler.overflows) == (32768.0, 3)


def test_it_has_a_floor() -> None:
    scaler = LossScaler()
    for step in range(16):
        assert scaler.can_shrink
        scaler.update(overflow=True)
        assert scaler.scale == 2.0 ** (15 - step)
    assert not scaler.can_shrink
    scaler.update(overflow=True)
    assert scaler.scale == 1.0


def test_a_restored_scaler_goes_on_as_if_it_had_never_stopped() -> None:
    outcomes = [step % 701 == 700 for step in range(6000)]
    whole, stopped = LossScaler(), LossScaler()
    for step, overflow in enumerate(outcomes):
        whole.update(overflow)
        stopped.update(overflow)
        if step % 1000 == 0:
            again = LossScaler()
            again.restore(stopped.state())
            stopped = again
    assert stopped == whole
    assert whole.overflows == 8

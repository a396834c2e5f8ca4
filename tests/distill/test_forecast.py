"""The time that a training still takes: estimated after its warm-up, corrected as it goes."""

import re
from collections.abc import Sequence

import numpy as np
import pytest

from laptop.distill.forecast import FAR_OFF, Forecast, Pace


def lines(seconds: Sequence[float]) -> list[tuple[float, float]]:
    """What is printed in a training of these steps: minutes to go, said and true."""
    expected = Forecast(1, 1, len(seconds), 4 * len(seconds), 1, 0, 0, 0)
    pace, now, printed = Pace(expected, len(seconds), 100.0), 100.0, []
    for step, taken in enumerate(seconds):
        now += taken
        if line := pace.after_step(now):
            number, unit = re.findall(r"([\d.]+) (hours|minutes) to go$", line)[0]
            said = float(number) * (60 if unit == "hours" else 1)
            printed.append((said, sum(seconds[step + 1 :]) / 60))
            assert line.startswith("corrected: ") == (len(printed) > 1)
    return printed


@pytest.mark.parametrize("first", [1.0, 10.0, 300.0])
def test_slow_first_steps_are_not_in_the_estimate(first: float) -> None:
    ((said, true),) = lines([first, first / 2, *[1.0] * 1000])
    assert said == pytest.approx(true, abs=0.1)


def test_usual_jitter_and_saves_are_not_corrected() -> None:
    rng = np.random.default_rng(0)
    steps = rng.uniform(0.8, 1.3, 2000) + 10 * (np.arange(2000) % 100 == 99)
    assert len(lines(steps.tolist())) == 1


@pytest.mark.parametrize("change", [0.1, 0.4, 3.0, 20.0])
def test_a_change_of_speed_is_corrected_and_then_right(change: float) -> None:
    printed = lines([*[1.0] * 100, *[change] * 900])
    assert 2 <= len(printed) <= 8
    said, true = printed[-1]
    assert 1 / FAR_OFF < said / true < FAR_OFF


@pytest.mark.parametrize("steps", range(6))
def test_a_training_of_few_steps_says_nothing_or_something_true(steps: int) -> None:
    for said, true in lines([1.0] * steps):
        assert said == pytest.approx(true, abs=0.1)

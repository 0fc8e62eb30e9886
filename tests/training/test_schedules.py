import math

import pytest

from data_prep.errors import UserError
from medpretrain.training.schedules import cosine, warmup_cosine


@pytest.mark.parametrize("step", [0, 0.5, 3, 9.75, 10])
def test_cosine_equals_the_equation(step):
    expected = 0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi * step / 10))
    assert cosine(step, total=10, start=0.04, end=0.4) == pytest.approx(expected, rel=1e-12)


def test_ends_are_exact_and_hold():
    assert cosine(0, total=7, start=0.996, end=1.0) == 0.996
    assert cosine(7, total=7, start=0.996, end=1.0) == 1.0
    assert cosine(8, total=7, start=0.996, end=1.0) == 1.0
    assert warmup_cosine(100, total=7, warmup=2, base=1.0, final=1e-6) == 1e-6


def test_warmup_is_a_line_that_meets_the_cosine():
    rates = [warmup_cosine(s, total=10, warmup=4, base=0.8, final=0.1, start=0.4) for s in (0, 1, 2, 3, 4)]
    assert rates == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8])
    just_before = warmup_cosine(4 - 1e-9, total=10, warmup=4, base=0.8, final=0.1)
    assert just_before == pytest.approx(0.8, abs=1e-8)
    assert warmup_cosine(7, total=10, warmup=4, base=0.8, final=0.1) == pytest.approx(0.45)


def test_a_schedule_that_is_all_warmup_ends_at_final():
    assert warmup_cosine(3, total=4, warmup=4, base=1.0, final=0.0) == 0.75
    assert warmup_cosine(4, total=4, warmup=4, base=1.0, final=0.0) == 0.0


@pytest.mark.parametrize(
    ("step", "total", "warmup"), [(-1, 10, 0), (-1, 10, 2), (0, 0, 0), (0, 10, 11), (0, 10, -1), (0, -3, 0)]
)
def test_impossible_schedules_are_refused(step, total, warmup):
    with pytest.raises(UserError):
        warmup_cosine(step, total=total, warmup=warmup, base=1.0, final=0.0)

"""The choice of a window, and tables of windows by anatomy."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest

from data_prep.dicom.windows import parse_window
from data_prep.errors import UserError
from data_prep.labels import VOCABULARIES


def test_choices_are_read_and_travel_to_workers() -> None:
    assert parse_window("stored").kind == "stored"
    assert parse_window("percentile").percentiles == (1, 99)
    assert parse_window("percentile:0.5,99.9").percentiles == (0.5, 99.9)
    fixed = parse_window("fixed")
    assert pickle.loads(pickle.dumps(fixed)) == fixed
    assert {name for name, _, _ in fixed.table} <= set(VOCABULARIES["anatomy"])
    assert fixed.fixed_window(None) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("storde", "did you mean 'stored'"),
        ("stored:1,99", "must be stored"),
        ("percentile:1", "two numbers"),
        ("percentile:1,2,3", "two numbers"),
        ("percentile:99,1", "LOW < HIGH"),
        ("percentile:nan,99", "LOW < HIGH"),
        ("percentile:-1,99", "LOW < HIGH"),
        ("fixed:nowhere.yaml", "does not exist"),
    ],
)
def test_a_choice_that_is_none_is_named(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_window(text)


def test_a_table_of_ones_own_is_known_by_its_digest_alone(tmp_path: Path) -> None:
    path = tmp_path / "dr_miller.yaml"
    path.write_text("brain: {centre: 35, width: 90}\n'*': {centre: 50, width: 400}\n")
    choice = parse_window(f"fixed:{path}")
    assert choice.fixed_window("brain") == ("brain", 35, 90)
    assert choice.fixed_window("knee") == choice.fixed_window(None) == ("*", 50, 400)
    assert choice.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "miller" not in choice.origin


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("lung: {centre: 1, width: 2}\nbrian: {centre: 1, width: 2}\n", r"line 2: unknown anatomy 'brian'.*'brain'"),
        ("lung:\n  centre: 1\n  widht: 2\n", r"line 3: unknown key 'widht'.*'width'"),
        ("lung: {centre: 1}\n", "line 1: width must be a number"),
        ("lung: {centre: yes, width: 2}\n", "line 1: centre must be a number"),
        ("lung: {centre: true, width: 2}\n", "line 1: centre must be a number"),
        ("lung: {centre: .nan, width: 2}\n", "line 1: centre must be a number"),
        ("lung: {centre: 1, width: 0}\n", "line 1: width must be at least 1"),
        ("lung: 40/400\n", "line 1: must be a map"),
        ("lung: {centre: 1, width: 2}\nlung: {centre: 1, width: 2}\n", "line 2"),
        ("lung: [\n", "line 2"),
        ("", "must be a mapping"),
    ],
)
def test_a_table_is_read_strictly(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "ct.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        parse_window(f"fixed:{path}")

"""Pseudonyms are stable, apart from each other, and made with a key that nobody else reads."""

from __future__ import annotations

import pickle

import pytest

from data_prep.dicom.pseudonyms import Pseudonyms, load_key, write_key
from data_prep.errors import UserError


def test_every_pseudonym_is_a_function_of_key_role_and_value(pseudonyms):
    other = Pseudonyms(bytes(range(1, 33)))
    made = [
        role(value) for p in (pseudonyms, other) for value in ("1.2", "1.3") for role in (p.study, p.series, p.instance)
    ]
    made += [
        pseudonyms.patient("1.2"),
        pseudonyms.patient("1.2", "A"),
        pseudonyms.patient("1.2A"),
        other.patient("1.2"),
    ]
    assert len({value[1:] for value in made}) == len(made)
    assert all(len(value) == 33 and int(value[1:], 16) >= 0 for value in made)
    assert [value[0] for value in made[:3]] == ["s", "e", "i"]


def test_a_known_answer_never_changes(pseudonyms):
    """Written down once: a dataset's pseudonyms must stay the same in every release."""
    assert pseudonyms.patient("A-1", "CLINIC") == "p58c6e105ce12bf4ad1636fbaf289cd53"
    assert pseudonyms.key_id == "f32225567f56bb78"


def test_padding_and_unicode_forms_do_not_split_a_patient(pseudonyms):
    assert pseudonyms.patient(" Mu\u0308ller\0") == pseudonyms.patient("M\u00fcller ", " ")
    assert pseudonyms.patient("  \0", "CLINIC") is None
    assert pseudonyms.instance(None) is None


def test_the_key_shows_in_no_text_and_survives_a_pickle(pseudonyms):
    assert bytes(range(32)).hex() not in repr(pseudonyms)
    assert pickle.loads(pickle.dumps(pseudonyms)).study("1.2") == pseudonyms.study("1.2")


def test_a_written_key_is_private_loads_and_is_never_replaced(tmp_path):
    path = tmp_path / "key"
    write_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(load_key(path)) == 64
    with pytest.raises(UserError, match="exists"):
        write_key(path)
    with pytest.raises(UserError, match="cannot be written"):
        write_key(tmp_path / "none" / "key")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"0123456789abcdefghijklmnopqrstu\n", "holds 31 bytes"),
        (b"a" * 64, "random"),
        (b"correct horse battery!!!" * 3, "random"),
        (b"0123456" * 8 + b"01", "random"),
    ],
)
def test_a_weak_key_is_refused_and_not_quoted(tmp_path, content, words):
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(UserError, match=words) as caught:
        load_key(path)
    assert content[:7].decode() not in str(caught.value)


def test_a_key_open_to_all_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "key"
    write_key(path)
    path.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        load_key(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_key(tmp_path / "none")

"""Damage of every kind is found, and the checkpoint before is loaded to the bit."""

from __future__ import annotations

import random

import checkpoint_faults as faults
import pytest


@pytest.fixture(scope="module")
def there(run_ranks, tmp_path_factory):
    """Each trial leaves it as it was."""
    return faults.Folder(tmp_path_factory.mktemp("faults"), random.SystemRandom().randrange(2**20), run_ranks)


@pytest.mark.distributed
def test_every_fault_is_found_and_the_checkpoint_before_is_loaded_to_the_bit(there):
    print("seed", there.seed)
    rows = faults.trials(there, 8 * len(faults.FAULTS), random.Random(there.seed))
    assert len(rows) == 120
    assert {row["fault"] for row in rows} == {fault.__name__.replace("_", " ") for fault in faults.FAULTS}
    assert [row for row in rows if not all(row[key] for key in faults.ASKED)] == []


@pytest.mark.distributed
def test_a_fault_that_is_not_found_is_counted_as_such(there, monkeypatch):
    """Were nothing hashed, the harness would say so."""
    monkeypatch.setattr("medpretrain.checkpoints.reading._sha256", lambda target, name, file, size: Anything())
    draw = random.Random(3)
    rows = [faults.trial(there, faults.data_of_another_save, draw) for _ in range(3)]
    assert not any(row["found"] or row["fallback"] or row["identical"] for row in rows)


class Anything:
    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    __hash__ = None

"""What is wrong with a checkpoint is said, and what is whole is never passed over in silence."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest
import torch

from medpretrain.checkpoints import CheckpointError, OtherFormat, Part, aside_later, at, load, newest, read, verify

from .conftest import bits, blank, parts, tensors

DATA = "rank-00000-of-00001.safetensors"


def test_every_byte_of_the_manifest_counts(one):
    found = one.save(1, extra={"a": 1.5})
    file = one.target.folder / found.name / "manifest.json"
    data = file.read_bytes()
    for position in range(len(data)):
        file.write_bytes(data[:position] + bytes([data[position] ^ (1, 0x20)[position % 2]]) + data[position + 1 :])
        with pytest.raises(CheckpointError) as caught:
            verify(one.target, found.name)
        assert not isinstance(caught.value, OtherFormat)  # it would stop a run that can go on from the one before
    for format in b"123579":
        file.write_bytes(data.replace(b'"format": 4', b'"format": ' + bytes([format])))
        with pytest.raises(CheckpointError) as caught:
            verify(one.target, found.name)
        assert not isinstance(caught.value, OtherFormat)
    file.write_bytes(data)
    verify(one.target, found.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / DATA).unlink(), rf"{DATA} is missing"),
        (lambda p: (p / "manifest.json").unlink(), r"manifest.json is missing"),
        (lambda p: (p / "more").mkdir(), r"more is no part"),
        (lambda p: os.truncate(p / DATA, 9), rf"{DATA} has 9 bytes"),
        (lambda p: (p / "manifest.json").write_text("[]"), r"not a JSON object"),
        (lambda p: (p / "manifest.json").write_text("{"), r"it is not JSON"),
        (lambda p: (p / "manifest.json").write_text('{"format": 99}'), r"newer medpretrain, or is damaged"),
        (lambda p: shutil.rmtree(p), r"there is no checkpoint at"),
        (lambda p: p.rename(p.with_name("step-00000002")), r"there is no checkpoint at"),
    ],
)
def test_an_error_says_which_file_and_what_is_wrong(one, change, message):
    path = one.target.folder / one.save(1).name
    change(path)
    with pytest.raises(CheckpointError, match=message):
        verify(one.target, path.name)


def test_the_place_of_a_checkpoint_may_be_given(one):
    found = one.save(3)
    assert at(f"{one.target.folder / found.name}/") == at(one.target.folder / found.name) == found
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        at(one.target.folder / "step-00000004")
    shutil.copytree(one.target.folder / found.name, one.target.folder / "copy")
    with pytest.raises(CheckpointError, match="its name is not step-NUMBER"):
        at(one.target.folder / "copy")


def test_nothing_there_is_no_checkpoint(one):
    assert newest(one.target, aside=True) is None
    assert not one.target.folder.exists()


def test_a_damaged_one_is_named_and_passed_over_and_kept(one, caplog):
    first, second = one.save(1), one.save(2)
    file = one.target.folder / second.name / DATA
    os.truncate(file, 5)
    for _ in range(2):
        assert newest(one.target) == first
    assert caplog.text.count(f"{file} has 5 bytes") == 2
    for number in (1, 2):
        assert newest(one.target, aside=True) == first
        aside = one.target.folder / "aside" / f"{second.name}-{number}"
        assert (aside / DATA).stat().st_size == 5
        assert str(aside) in caplog.text
        one.save(2)
        os.truncate(file, 5)


def test_a_folder_that_may_only_be_read_does_not_stop_a_run(one, monkeypatch, caplog):
    first, second = one.save(1), one.save(2)
    os.truncate(one.target.folder / second.name / DATA, 5)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", denied)
    assert newest(one.target, aside=True) == first
    assert "could not be moved" in caplog.text


def write_manifest(folder, plain):
    """With the checksum that its content has."""
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
    whole = plain | {"checksum": hashlib.sha256(canonical).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(whole, sort_keys=True, indent=2) + "\n")


def test_another_formats_checkpoint_is_refused_and_neither_passed_over_nor_moved(one):
    one.save(1)
    earlier = one.target.folder / "step-00000002"
    earlier.mkdir()
    (earlier / "state.pt").write_bytes(b"x")
    write_manifest(earlier, {"format": 3, "step": 2, "files": {"state.pt": {"bytes": 1, "sha256": "0" * 64}}})
    for look in (lambda: newest(one.target, aside=True), lambda: at(earlier)):
        with pytest.raises(OtherFormat, match=r"has format 3, .* go on with the version of medpretrain that wrote it$"):
            look()
    shutil.rmtree(earlier)
    later = one.target.folder / one.save(3).name
    plain = json.loads((later / "manifest.json").read_text()) | {"format": 5, "news": []}
    del plain["checksum"]
    write_manifest(later, plain)
    with pytest.raises(OtherFormat, match=r"it needs a newer medpretrain$"):
        newest(one.target, aside=True)
    assert sorted(one.target.names()) == ["step-00000001", "step-00000003"]


def test_later_ones_are_set_aside_when_a_run_goes_on_from_an_older_one(one):
    for step in (1, 2, 3):
        one.save(step)
    places = aside_later(one.target, 1)
    assert places == [str(one.target.folder / "aside" / f"step-0000000{step}-1") for step in (3, 2)]
    assert newest(one.target).step == 1
    assert aside_later(one.target, 1) == []
    os.rename(places[0], one.target.folder / "step-00000003")  # it can be had back
    assert bits(read(newest(one.target))) == bits(tensors(3))


def test_what_does_not_fit_is_named_and_nothing_is_filled(one):
    found = one.save(1)

    def refused(change, message):
        values = blank(tensors(1))
        change(values)
        with pytest.raises(CheckpointError, match=message):
            load(found, parts(values))
        assert all(not value.float().any() for name, value in values.items() if value.dtype != torch.complex64)

    refused(lambda v: v.pop("method.odd"), r"does not fit: nothing here takes method\.odd$")
    refused(lambda v: v.update(more=torch.zeros(2)), r"does not fit: it lacks more$")
    refused(lambda v: v.update({"method.odd": torch.zeros(4)}), r"method\.odd is F32 \[3\] there and F32 \[4\] here")
    refused(lambda v: v.update({"method.odd": torch.zeros(3).half()}), r"is F32 \[3\] there and F16 \[3\] here")
    refused(lambda v: v.clear(), r"nothing here takes method\.eight, .* and 5 more$")


def test_a_parameter_that_needs_a_gradient_is_filled(one):
    found = one.save(1)
    values = blank(tensors(1))
    values["method.weight"] = torch.nn.Parameter(values["method.weight"])
    values["method.turned"].requires_grad_()
    load(found, parts(values))
    assert torch.equal(values["method.weight"], tensors(1)["method.weight"])
    assert torch.equal(values["method.turned"], tensors(1)["method.turned"])


def test_a_checkpoint_that_was_replaced_after_it_verified_is_not_loaded(one):
    found = one.save(1, seed=1)
    one.save(1, seed=2)
    with pytest.raises(CheckpointError, match="was replaced after it was verified"):
        load(found, parts(blank(tensors(1))))


def test_any_range_of_a_tensor_can_be_asked_for(one, monkeypatch):
    monkeypatch.setattr("medpretrain.checkpoints.reading._BLOCK", 56)
    found = one.save(1)
    saved = {name: value.reshape(-1) for name, value in tensors(1).items()}
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        wanted = []
        for name, value in saved.items():
            first, last = sorted(torch.randint(len(value) + 1, (2,), generator=draw).tolist())
            shape = tuple(tensors(1)[name].shape)
            wanted.append(Part(name, shape, torch.zeros_like(value[first:last]), first, copied=False))
        load(found, wanted)
        got = {part.name: part.values for part in wanted}
        assert bits(got) == bits({part.name: saved[part.name][part.start : part.stop] for part in wanted}), seed

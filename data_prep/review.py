"""`prep review`: a contact sheet of what was kept and what was set aside, for a human to sign before a dataset leaves.

It may show names that are burned into pixels, so it belongs beside the link table, never into the dataset.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_prep.dataset import INDEX, INFO, LABEL_PREFIX, QUARANTINE, file_sha256, index_problem
from data_prep.dataset_info import DatasetInfo, parse_info
from data_prep.dicom.anatomy import VISIBLE_FACE
from data_prep.dicom.gate import LIFTED
from data_prep.errors import UserError
from data_prep.quarantine import REASONS
from data_prep.review_page import Group, Page, Section, Tile, render
from data_prep.review_sample import Sampled, kinds_of, sampled
from data_prep.review_sources import NoPicture, Scene, scene
from data_prep.staging import LINKS, REVIEW
from data_prep.store import Store, is_url, open_store

KEPT_SIDE = 512  # pixels of a kept image's longer side on the page
LIFTED_SIDE = 1024  # where a name must be legible
_QUALITY = 80
_SHORT = 9  # letters of a pseudonym that a caption shows


class ReviewSummary(NamedTuple):
    """What was written: the page, its pictures of kept images and of others, and how many of these can be ticked."""

    path: Path
    kept: int
    set_aside: int
    liftable: int


@dataclass(frozen=True)
class _Opened:
    store: Store
    info: DatasetInfo
    sha256: str
    index: pa.Table
    quarantine: pa.Table


def review(
    out: str | Path, private: Path | None = None, html: Path | None = None, images: int = 200, seed: int = 0
) -> ReviewSummary:
    """Write the contact sheet of a dataset, one HTML file with all its pictures in it, readable by its owner alone.

    The same dataset, sources and arguments give the same bytes.

    Args:
        out: the dataset, a folder or an fsspec URL.
        private: where its link table is; OUT.private by default.
        html: the page; review.html beside the link table by default.
        images: the most pictures of kept images, and of each reason.
        seed: of their choice.

    Raises:
        UserError: no dataset, a damaged one, no link table that belongs to it, or a page inside the dataset.
    """
    if images < 1 or seed < 0:
        raise UserError(f"--images must be at least 1 and --seed at least 0, not {images} and {seed}")
    if private is None:
        if is_url(out):
            raise UserError(f"{out}: with an OUT that is no local folder give --private DIR, where its link table is")
        folder = Path(os.path.abspath(out))
        private = folder.with_name(folder.name + ".private")
    path = Path(os.path.abspath(private / REVIEW if html is None else html))
    _refuse_inside(path, out)
    opened = _opened(out)
    links = _links(private / LINKS, opened)
    with contextlib.ExitStack() as stack:
        chosen = sampled(opened.store, opened.info, opened.index, images, seed, stack)
        groups = _groups(opened, chosen)
    sections = _sections(opened, links, (private / LINKS).stat().st_mtime, images, seed)
    page = Page(opened.info, opened.sha256, groups, sections, _warnings(opened), _notes(chosen, len(opened.index)))
    _write(path, render(page).encode())
    tiles = [tile for section in sections for tile in section.tiles]
    return ReviewSummary(path, len(chosen.rows), len(tiles), sum(tile.instance is not None for tile in tiles))


def _refuse_inside(path: Path, out: str | Path) -> None:
    if path.is_dir():
        raise UserError(f"--html {path} is a folder; name a file")
    folder = str(out)
    if is_url(out):
        system, folder = fsspec.core.url_to_fs(str(out))
        if "file" not in ([system.protocol] if isinstance(system.protocol, str) else system.protocol):
            return
    inside = Path(folder).resolve()
    if inside == path.resolve() or inside in path.resolve().parents:
        raise UserError(f"--html {path} lies in the dataset, and the page may show names: it must not leave with it")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} does not exist")


def _opened(out: str | Path) -> _Opened:
    store = open_store(out)
    if store.size(INFO) is None:
        raise UserError(f"{out} is no prepared dataset: it has no {INFO} (see 'medpretrain prep')")
    with store.local(INFO) as file:
        raw = file.read_bytes()
    info = parse_info(raw, f"{out}/{INFO}")
    tables = {}
    for name, sha256 in ((INDEX, info.index_sha256), (QUARANTINE, info.quarantine_sha256)):
        if store.size(name) is None:
            raise UserError(f"{out}: {name} is missing")
        with store.local(name) as file:
            if file_sha256(file) != sha256:
                raise UserError(f"{out}: {name} was changed since it was written (see 'medpretrain prep verify')")
            tables[name] = pq.read_table(file)
    problem = index_problem(tables[INDEX], info)
    if problem is not None:
        raise UserError(f"{out}: the index does not match its shards: {problem}")
    return _Opened(store, info, hashlib.sha256(raw).hexdigest(), tables[INDEX], tables[QUARANTINE])


def _links(path: Path, opened: _Opened) -> pa.Table:
    """The link table, checked to be this dataset's."""
    if not path.is_file():
        raise UserError(f"{path}, the table that links samples to sources, is missing; --private says where it is")
    links = pq.read_table(path)
    numbers = links.column("number").to_numpy()
    known = np.isin(opened.quarantine.column("number").to_numpy(), numbers)
    if len(links) != opened.info.sources or len(np.unique(numbers)) != len(links) or not known.all():
        raise UserError(f"{path} is not the link table of this dataset")
    return links


def _write(path: Path, content: bytes) -> None:
    """The page appears whole, and nobody else could read it at any moment."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# What was kept


def _groups(opened: _Opened, chosen: Sampled) -> list[Group]:
    """The kept pictures by their labels, each group with how many images the dataset has of it."""
    index = opened.index
    kinds, titles = kinds_of(opened.info, index)
    totals = np.bincount(kinds, minlength=len(titles))
    keys = index.column("key").take(pa.array(chosen.rows)).to_pylist()
    by_kind: dict[int, list[tuple[str, Tile]]] = {}
    for row, key, data, record in zip(chosen.rows.tolist(), keys, chosen.images(), chosen.records, strict=True):
        by_kind.setdefault(int(kinds[row]), []).append((key, _kept_tile(key, data, record)))
    found = [
        Group(titles[kind], int(totals[kind]), [tile for _, tile in sorted(tiles, key=lambda entry: entry[0])])
        for kind, tiles in by_kind.items()
    ]
    return sorted(found, key=lambda group: group.title)


def _kept_tile(key: str, data: bytes, record: dict[str, Any]) -> Tile:
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        image.draft(None, (KEPT_SIDE, KEPT_SIDE))
        jpeg = as_jpeg(image, KEPT_SIDE)
    except (OSError, ValueError, SyntaxError):
        raise UserError(f"{key} cannot be decoded: the shard is damaged (see 'medpretrain prep verify')") from None
    about = record.get("about", {})
    labels = [value for name, value in record["labels"].items() if value is not None]
    colours = "gray" if record["channels"] == 1 else "RGB"
    facts = [
        " \N{MIDDLE DOT} ".join([record["split"], *labels]),
        f"{record['width']} x {record['height']}, {record['bit_depth']} bit {colours}",
    ]
    if "Window" in about:
        facts.append(f"window {about['Window']}")
    facts.append("patient unknown" if record["patient"] is None else f"patient {_shortened(record['patient'])}")
    return Tile(key, facts, jpeg, record=record)


def _shortened(pseudonym: str) -> str:
    return pseudonym if len(pseudonym) <= _SHORT else pseudonym[:_SHORT] + "\N{HORIZONTAL ELLIPSIS}"


def as_jpeg(image: Image.Image, side: int) -> bytes:
    """A picture as JPEG of at most `side` pixels a side, without any metadata; 16 bits are shown from the 1st to the
    99th percentile.
    """
    if image.mode not in ("L", "RGB"):
        if not image.mode.startswith("I"):
            image = image.convert("RGB")
        else:
            values = np.asarray(image).astype(np.float32)
            low, high = np.percentile(values, (1, 99))
            if low == high:
                low, high = values.min(), max(values.max(), values.min() + 1)
            image = Image.fromarray(np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8))
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    image.info.clear()  # Pillow would write comments and profiles from here
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


# What was set aside


def _sections(opened: _Opened, links: pa.Table, linked: float, images: int, seed: int) -> list[Section]:
    """One for each reason, those first that a human may lift."""
    rows = opened.quarantine.to_pylist()
    first = _first_of_instances(rows)
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_reason.setdefault(row["reason"], []).append(row)
    numbers = links.column("number").to_numpy()
    by_number = np.argsort(numbers)
    sections = []
    for reason in sorted(by_reason, key=lambda code: (code not in LIFTED, code)):
        found = by_reason[reason]
        files = list({row["number"]: row for row in found}.values())  # frames of one file may be duplicates
        order = np.random.default_rng([seed, zlib.crc32(reason.encode())]).permutation(len(files))[:images]
        tiles: list[Tile] = []
        without: dict[str, list[int]] = {}
        for row in (files[place] for place in sorted(order.tolist())):
            place = by_number[np.searchsorted(numbers, row["number"], sorter=by_number)]
            link = links.slice(place, 1).to_pylist()[0]
            try:
                seen = scene(opened.info.options["source"], link["root"], link["path"], linked)
            except NoPicture as why:
                without.setdefault(str(why), []).append(row["number"])
                continue
            tiles.append(_set_aside_tile(row, seen, reason in LIFTED, first))
        details = Counter(row["message"].removeprefix(REASONS[reason]).removeprefix(": ") for row in found)
        sections.append(
            Section(reason, REASONS[reason], len(found), len(order), reason in LIFTED, dict(details), tiles, without)
        )
    return sections


def _first_of_instances(rows: list[dict[str, Any]]) -> dict[str, int]:
    """The lowest number of each instance that may be lifted: of several files it is the one that would be taken."""
    first: dict[str, int] = {}
    for row in rows:
        if row["instance"] is not None and row["reason"] in LIFTED:
            first[row["instance"]] = min(row["number"], first.get(row["instance"], row["number"]))
    return first


def _set_aside_tile(row: dict[str, Any], seen: Scene, liftable: bool, first: dict[str, int]) -> Tile:
    side = LIFTED_SIDE if liftable else KEPT_SIDE
    width, height = seen.image.size
    shrunk = f", shown at {side / max(width, height):.0%}" if max(width, height) > side else ""
    facts = [f"{width} x {height}{shrunk}"]
    facts.append("patient unknown" if row["patient"] is None else f"patient {_shortened(row['patient'])}")
    instance = row["instance"] if liftable else None
    caution = ""
    if seen.frames > 1:
        facts.append(f"frame {seen.frame + 1} of {seen.frames}")
    if liftable:
        if instance is None:
            caution = "has no instance pseudonym, so it cannot be approved"
        elif first[instance] != row["number"]:
            caution = f"another file of the instance of no. {first[instance]}: only that one would be taken"
            instance = None
        elif seen.frames > 1:
            caution = f"{seen.frames} frames: look at the others in your viewer before you approve"
    return Tile(f"no. {row['number']}", facts, as_jpeg(seen.image, side), instance=instance, caution=caution)


# What the reader should know


def _notes(chosen: Sampled, total: int) -> list[str]:
    notes = [f"{len(chosen.rows):,} of {total:,} images, at most {chosen.most} of a series and kind."]
    if chosen.shards is not None:
        notes.append(f"They are from {chosen.shards[0]} of {chosen.shards[1]} shards, which were fetched for it.")
    if chosen.kinds[0] < chosen.kinds[1]:
        notes.append(
            f"{chosen.kinds[1] - chosen.kinds[0]} of {chosen.kinds[1]} kinds of image (labels, format, channels) are "
            "not shown: ask for more with --images."
        )
    return notes


def _warnings(opened: _Opened) -> list[str]:
    info = opened.info
    dicom = info.options["source"] == "dicom"
    said = []
    faces = _faces(opened, dicom)
    if faces:
        said.append(
            f"{faces:,} images are CT or MR of the head, or of an unknown kind or region. A face can be rebuilt from "
            "such a series, and nothing was done about it (option 113102 is not claimed)."
        )
    if dicom:
        said.append(
            "Text in the pixels that no header declares stays there (option 113101 is not claimed): look for it below."
        )
    else:
        said.append("These images came without DICOM headers. Text in their pixels was not looked for: look below.")
    if info.options.get("reviewed_sha256") is not None:
        said.append(
            "Some images passed since a human approved them before. A run takes one reviewed.csv: add the earlier one "
            "before you save a new one."
        )
    if info.options.get("trust_images"):
        said.append("Images that passed through were not decoded (--trust-images): damaged ones may be among them.")
    if info.patients.images_without:
        unknown = f"{info.patients.images_without:,} images have no known patient"
        said.append(unknown + (": one may be in two splits." if len(info.splits) > 1 else "."))
    return [*said, *_duplicate_warnings(info), *_label_warnings(info)]


def _duplicate_warnings(info: DatasetInfo) -> list[str]:
    found = info.duplicates.found
    if info.duplicates.kind == "off":
        return ["Duplicates were not looked for."]
    said = []
    for kind, name in (("exact", "an exact"), ("near", "a near")):
        copies, across = found.get(f"{kind}_images", 0), found.get(f"{kind}_across_splits", 0)
        if copies:
            said.append(f"{copies:,} images had {name} copy, {across:,} of them in another split.")
    if found.get("exact_contradictory"):
        said.append(f"{found['exact_contradictory']:,} images have an exact copy with another label.")
    if said and info.duplicates.dropped:
        said.append(f"{info.duplicates.dropped:,} copies were taken out.")
    return said


def _label_warnings(info: DatasetInfo) -> list[str]:
    own = sorted(set(info.labels) - {"modality", "anatomy", "anatomy_source"})
    return [f"Values of these labels are readable in the dataset: {', '.join(own)}."] if own else []


def _faces(opened: _Opened, dicom: bool) -> int:
    """Images of the head, or of nobody knows what, from which a face could be rebuilt."""
    labels = opened.info.labels
    if "modality" not in labels or "anatomy" not in labels:
        return 0

    def one_of(label: str, names: frozenset[str], unknown: bool) -> np.ndarray:
        ids = opened.index.column(LABEL_PREFIX + label).to_numpy()
        wanted = [place for place, name in enumerate(labels[label].names) if name in names]
        return np.isin(ids, [*wanted, -1] if unknown else wanted)

    # PET has no name in the vocabulary: only DICOM leaves it unknown.
    volume = one_of("modality", frozenset(("CT", "MR")), dicom)
    return int(np.count_nonzero(volume & one_of("anatomy", VISIBLE_FACE, True)))

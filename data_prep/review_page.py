"""The markup of the contact sheet: one HTML file that loads nothing and sends nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from html import escape
from string import Template
from typing import Any, NamedTuple

from data_prep.dataset_info import DatasetInfo
from data_prep.dicom.profile import CLAIMS
from data_prep.review_browser import SCRIPT, STYLE

MOST_LISTED = 200  # numbers or label values that are listed


class Tile(NamedTuple):
    """One picture.

    Attributes:
        title: the sample's key, or the source's number.
        facts: short lines below it.
        jpeg: the picture.
        record: the JSON that leaves with it.
        instance: the pseudonym by which it can be approved, None where it cannot.
        caution: what to know before it is approved.
    """

    title: str
    facts: list[str]
    jpeg: bytes
    record: Mapping[str, Any] | None = None
    instance: str | None = None
    caution: str = ""


class Group(NamedTuple):
    """Kept images with the same labels: `total` in the dataset, some of them shown."""

    title: str
    total: int
    tiles: list[Tile]


class Section(NamedTuple):
    """One reason for setting images aside.

    Attributes:
        reason: its code.
        meaning: its phrase.
        images: how many.
        tried: how many sources were looked at for this page.
        liftable: whether a human may lift it.
        details: how many images have which further detail.
        tiles: the pictures.
        without: the numbers of sources that were looked at and have no picture, by why.
    """

    reason: str
    meaning: str
    images: int
    tried: int
    liftable: bool
    details: dict[str, int]
    tiles: list[Tile]
    without: dict[str, list[int]]


class Page(NamedTuple):
    """All that the page says; `notes` are on the choice of kept images."""

    info: DatasetInfo
    sha256: str
    groups: list[Group]
    sections: list[Section]
    warnings: list[str]
    notes: list[str]


def render(page: Page) -> str:
    """The page as HTML. Everything that comes from a dataset is escaped here."""
    liftable = [tile for section in page.sections for tile in section.tiles if tile.instance is not None]
    return _PAGE.substitute(
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(STYLE)}'; script-src '{_hash(SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'",
        style=STYLE,
        script=SCRIPT,
        counts=_counts(page.info),
        warnings=_list(page.warnings),
        facts=_facts(page),
        options=_options(page.info),
        reasons=_reasons(page.sections),
        kept="".join(map(_group, page.groups)),
        notes=" ".join(map(escape, page.notes)),
        aside="".join(map(_section, page.sections)) or "<p>Nothing was set aside.</p>",
        approval=_APPROVAL.substitute(liftable=f"{len(liftable):,}") if liftable else "",
        approved='<dt>Approved in this page</dt><dd><output class="approved">0</output></dd>' if liftable else "",
        sha256=escape(page.sha256),
        sample=f"{sum(len(group.tiles) for group in page.groups):,} of {page.info.samples:,}",
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _list(lines: Iterable[str]) -> str:
    return "".join(f"<li>{escape(line)}</li>" for line in lines)


def _definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Terms, and values that are HTML already."""
    return "".join(f"<dt>{escape(term)}</dt><dd>{value}</dd>" for term, value in pairs)


# The head


def _counts(info: DatasetInfo) -> str:
    numbers = (
        (info.sources, "sources found"),
        (info.samples, "images kept"),
        (info.quarantined, "set aside"),
        (info.patients.known, "known patients"),
    )
    return "".join(f"<li><b>{number:,}</b> {what}</li>" for number, what in numbers)


def _facts(page: Page) -> str:
    info = page.info
    patients = f"{info.patients.known:,} known, most images of one: {info.patients.most_images:,}"
    if info.patients.images_without:
        patients += f"; {info.patients.images_without:,} images without"
    size = sum(shard.bytes for shard in info.shards)
    facts = [
        ("Dataset (SHA-256 of dataset.json)", f"<code>{escape(page.sha256)}</code>"),
        ("Made by", escape(info.created_by)),
        ("Splits", escape(", ".join(f"{name} {count:,}" for name, count in info.splits.items()))),
        ("Patients", escape(patients)),
        ("Images", f"{info.bit_depth} bit, {'gray' if info.channels == 1 else 'colour or gray'}; "
                   f"{size:,} bytes in {len(info.shards):,} shards"),
        ("De-identification", _deidentification(info)),
    ]  # fmt: skip
    for name, vocabulary in info.labels.items():
        values = ", ".join(vocabulary.names[:MOST_LISTED]) + (", ..." if len(vocabulary.names) > MOST_LISTED else "")
        facts.append((f"Label {name}", f"{escape(values)} <small>from: {escape(vocabulary.source)}</small>"))
    return _definitions(facts)


def _deidentification(info: DatasetInfo) -> str:
    found = info.deidentification
    if found is None:
        return "No profile: these are no DICOM files. Metadata of the image files was removed, names of files too."
    claims = _list(f"{code} {CLAIMS.get(code, '')}" for code in found.claims)
    return (
        f"Profile {escape(found.profile)} <small>(SHA-256 <code>{escape(found.profile_sha256[:16])}</code>)</small>, "
        f"key <code>{escape(found.key_id)}</code>. Options of DICOM PS3.15 Annex E that are claimed:<ul>{claims}</ul>"
        "Not claimed: 113101 Clean Pixel Data, 113102 Clean Recognizable Visual Features."
    )


def _options(info: DatasetInfo) -> str:
    return _definitions((name, f"<code>{escape(json.dumps(value))}</code>") for name, value in info.options.items())


def _reasons(sections: list[Section]) -> str:
    return "".join(
        f'<tr><td><a href="#{escape(section.reason)}">{escape(section.reason)}</a></td>'
        f"<td>{escape(section.meaning)}</td>"
        f'<td class="number">{section.images:,}</td><td>{"yes" if section.liftable else "no"}</td></tr>'
        for section in sections
    )


# The pictures


def _group(group: Group) -> str:
    tiles = "".join(map(_tile, group.tiles))
    shown = f"{len(group.tiles):,} of {group.total:,}"
    return f'<h3>{escape(group.title)} <small>{shown}</small></h3><div class="sheet">{tiles}</div>'


def _section(section: Section) -> str:
    details = {detail: count for detail, count in section.details.items() if detail}
    said = f"<ul>{_list(f'{detail}: {count:,}' for detail, count in sorted(details.items()))}</ul>" if details else ""
    shown = f"{section.images:,}"
    if section.tried < section.images:
        shown += f", {section.tried:,} looked at for this page; ask for more with --images"
    lifting = (
        '<p class="lift">Approve a picture only if nothing in it says who the patient is. Open it: small text '
        "cannot be read in the overview.</p>"
        if section.liftable and section.tiles
        else ""
    )
    tiles = "".join(map(_tile, section.tiles))
    without = "".join(_without(why, numbers) for why, numbers in section.without.items())
    return (
        f'<section id="{escape(section.reason)}"><h3><code>{escape(section.reason)}</code> <small>{shown}</small></h3>'
        f'<p>{escape(section.meaning)}</p>{said}{lifting}<div class="sheet">{tiles}</div>{without}</section>'
    )


def _without(why: str, numbers: list[int]) -> str:
    listed = ", ".join(map(str, numbers[:MOST_LISTED])) + (", ..." if len(numbers) > MOST_LISTED else "")
    return (
        f'<details class="without"><summary>{len(numbers):,} without a picture: {escape(why)}</summary>'
        f"<p>Numbers in the link table: {listed}</p></details>"
    )


def _tile(tile: Tile) -> str:
    title = escape(tile.title)
    picture = base64.b64encode(tile.jpeg).decode()
    below = "".join(f"<li>{escape(fact)}</li>" for fact in tile.facts)
    if tile.caution:
        below += f'<li class="caution">{escape(tile.caution)}</li>'
    more = approve = ""
    if tile.record is not None:
        record = escape(json.dumps(tile.record, indent=1, ensure_ascii=False))
        more = f"<details><summary>all that leaves with it</summary><pre>{record}</pre></details>"
    if tile.instance is not None:
        approve = (
            f'<label class="approve"><input type="checkbox" class="tick" data-instance="{escape(tile.instance)}"> '
            f'identifies nobody<span class="away">, {title}</span></label>'
        )
    return (
        f'<figure><button type="button" class="open" aria-label="open {title}">'
        f'<img decoding="async" alt="{title}" src="data:image/jpeg;base64,{picture}"></button>'
        f"<figcaption><b>{title}</b><ul>{below}</ul>{more}</figcaption>{approve}</figure>"
    )


_APPROVAL = Template("""
<div class="bar noprint"><div class="inside">
<span><b><output class="approved">0</output></b> approved; $liftable can be</span>
<span class="blind" role="status"></span> <span class="added" role="status"></span>
<label class="file">Add an earlier reviewed.csv<input type="file" accept=".csv" multiple></label>
<button type="button" class="plain strong save" disabled>Save reviewed.csv</button>
<small>then: <code>medpretrain prep dicom ... --reviewed reviewed.csv --overwrite</code></small>
</div></div>
""")

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>Review before release</title>
<style>$style</style>
</head>
<body>
<div class="private"><div class="inside"><b>Private.</b> The pictures of what was set aside may show patients' names.
This page stays in the hospital, beside the link table; it is no part of the dataset.</div></div>
<main>
<h1>Review before release</h1>
<nav aria-label="Parts"><a href="#facts">Dataset</a><a href="#aside-table">Reasons</a><a href="#kept">What was kept</a>
<a href="#aside">What was set aside</a><a href="#sign">Sign-off</a></nav>
<ul class="counts">$counts</ul>
<noscript><p class="warnings">Without JavaScript pictures cannot be opened or approved.</p></noscript>
<div class="warnings"><b>To know before release</b><ul>$warnings</ul></div>

<h2 id="facts">The dataset</h2>
<div class="card"><dl>$facts</dl></div>
<h3>Options it was made with</h3>
<div class="card"><dl>$options</dl></div>
<h3 id="aside-table">Set aside, by reason</h3>
<div class="card"><table><thead><tr><th>reason</th><th>meaning</th><th class="number">images</th>
<th>a human may lift it</th></tr></thead><tbody>$reasons</tbody></table></div>

<h2 id="kept" class="noprint">What was kept</h2>
<p class="noprint">$notes Look for names, dates and faces. Open a picture with Enter; the arrow keys go on to
the next.</p>
<div class="noprint">$kept</div>

<h2 id="aside" class="noprint">What was set aside</h2>
<p class="noprint">Pictures are read from the sources again; DICOM is shown uncropped, gray images from the 1st to the
99th percentile.</p>
<div class="noprint">$aside</div>

<h2 id="sign">Sign-off</h2>
<div class="card"><dl>
<dt>Dataset (SHA-256)</dt><dd><code>$sha256</code></dd>
<dt>Kept images in this page</dt><dd>$sample</dd>$approved</dl>
<div class="sign">
<label class="check wide"><input type="checkbox">I looked at the kept images in this page and found nobody's name in
them.</label>
<label class="check wide"><input type="checkbox">I read the warnings, and they are acceptable for this use.</label>
<label>Name<input autocomplete="off"></label><label>Role<input autocomplete="off"></label>
<label>Date<input autocomplete="off"></label><label>Signature<input autocomplete="off"></label>
<label class="wide">Decision and remarks<textarea rows="2"></textarea></label>
</div>
<p class="noprint"><button type="button" class="plain print">Print the sheet</button>
<small>without any picture; what is typed here is not kept</small></p></div>
</main>
<dialog aria-label="Picture"><div><img alt="">
<footer><b class="of"></b><span class="caption"></span>
<label class="approve"><input type="checkbox"> identifies nobody <small>(key a)</small></label>
<button type="button" class="plain before">Previous</button><button type="button" class="plain next">Next</button>
<button type="button" class="plain close">Close</button></footer></div></dialog>
$approval
<script>$script</script>
</body>
</html>
""")

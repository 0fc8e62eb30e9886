"""The part of the page on feature space: measures, distances, maps, neighbours and attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from medpretrain.report.book import Book, absent, card, heading, paragraph, strip
from medpretrain.report.drawing import Look
from medpretrain.report.spaces import (
    Described,
    Space,
    by_comparability,
    histogram_pictures,
    metrics_table,
    projection_pictures,
)
from medpretrain.report.views import thumbnail
from medpretrain.report.words import count

_MOST_QUERIES = 4
_MOST_NEAREST = 6
_MOST_ATTENTION = 4
_MOST_HEADS = 6
_FROM = {"source": "as it was trained with", "default": "of this package's default kind", "given": "as was asked for"}


def space_section(book: Book, spaces: Sequence[Described], look: Mapping[str, Look]) -> str:
    """All spaces; those of other data or views apart."""
    if not spaces:
        return absent(
            "Nothing is known of the feature space: `medpretrain evaluate space` measures it, draws t-SNE and UMAP "
            "maps and finds nearest neighbours."
        )
    parts = []
    together = by_comparability(spaces)
    for number, alike in enumerate(together):
        stem = f"space-{number + 1}"
        data = alike[0][1].record.data
        parts.append(heading(3, f"{data.name}, split {data.split}, label {data.label}", stem))
        if len(together) > 1:
            parts.append(
                paragraph(
                    "Measured on other images or other views than the rest: not to be compared with it.", "differs"
                )
            )
        parts.append(paragraph(_setting(alike)))
        parts.append(book.table(metrics_table(alike, look, f"{stem}-metrics")))
        parts.append(heading(4, "Distances"))
        parts.append(book.panels(histogram_pictures(alike, stem)))
        parts.append(heading(4, "Maps of the images"))
        maps = projection_pictures(alike, stem)
        parts.append(book.panels(maps, choose="Coloured") if maps else absent("No t-SNE or UMAP map was made."))
        parts.append(heading(4, "Nearest neighbours"))
        parts.append(_neighbours(book, alike, look))
        parts.append(heading(4, "Attention"))
        parts.append(_attention(book, alike, look))
    return "".join(parts)


def _setting(alike: Sequence[Described]) -> str:
    record = alike[0][1].record
    data = record.data
    said = f"{count(data.n_images, 'image')}, {count(record.views, 'view')} of each"
    if data.n_images < data.n_labelled:
        said += f", a stratified part of {data.n_labelled:,}"
    kinds = sorted({_FROM[space.record.view_from] for _, space in alike})
    return f"{said}; augmentation {' or '.join(kinds)}. Patients {data.patients}."


def _neighbours(book: Book, alike: Sequence[Described], look: Mapping[str, Look]) -> str:
    if not book.images:
        return absent("Left out: this report is without images of patients.")
    cards = []
    for method, space in alike:
        classes = space.record.data.classes
        strips = []
        for one in space.record.neighbours[:_MOST_QUERIES]:
            query = _image(book, space, one.row, f"{classes[one.label]}, the query", "query")
            others = [
                _image(
                    book,
                    space,
                    near.row,
                    f"{classes[near.label]} {near.similarity:.2f}",
                    "right" if near.label == one.label else "wrong",
                )
                for near in one.nearest[:_MOST_NEAREST]
            ]
            label = f"{method.name}: an image of {classes[one.label]} and its neighbours"
            strips.append(strip([query, *others], label))
        cards.append(card(method.name, look[method.name], strips or [absent("No neighbours were kept.")]))
    others_only = all(space.record.other_patients_only for _, space in alike)
    whose = "of other patients" if others_only else "which may be of the same patient"
    note = (
        f"Blue frame: the query; then the images nearest to it by cosine similarity, {whose}; green: of its class, "
        "orange: of another. The numbers are similarities."
    )
    return absent(note) + f'<div class="strips">{"".join(cards)}</div>'


def _image(book: Book, space: Space, row: int, caption: str, kind: str) -> str:
    found = space.record.of_kind("image", row)
    if not found:
        return f'<figure class="{kind}"><figcaption>{escape(caption)} (its picture was not kept)</figcaption></figure>'
    return book.thumbnail(thumbnail(space.pixels(found[0])), f"image of {caption}", caption, kind)


def _attention(book: Book, alike: Sequence[Described], look: Mapping[str, Look]) -> str:
    if not book.images:
        return absent("Left out: this report is without images of patients.")
    cards, without = [], []
    for method, space in alike:
        if space.record.no_attention is not None:
            without.append(absent(f"{method.name}: no attention maps, for {space.record.no_attention}."))
            continue
        rows = list(dict.fromkeys(picture.row for picture in space.record.pictures if picture.kind == "attention"))
        strips = []
        for row in rows[:_MOST_ATTENTION]:
            figures = [_image(book, space, row, "image", "")]
            heads = space.record.of_kind("attention", row)
            heads.sort(key=lambda picture: -1 if picture.number is None else picture.number)
            for head in heads[: 1 + _MOST_HEADS]:
                name = "mean of heads" if head.number is None else f"head {head.number + 1}"
                figures.append(book.thumbnail(thumbnail(space.pixels(head)), f"attention map, {name}", name))
            strips.append(strip(figures, f"{method.name}: an image and the attention of its class token"))
        cards.append(card(method.name, look[method.name], strips))
    return (f'<div class="strips">{"".join(cards)}</div>' if cards else "") + "".join(without)

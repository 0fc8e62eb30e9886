"""`medpretrain report`: a folder with the page, and every figure and table of it as a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import UserError
from medpretrain.report.book import Book
from medpretrain.report.gather import Material, gather
from medpretrain.report.page import GENERATOR, render
from medpretrain.report.tables import as_csv, as_latex
from medpretrain.report.together import with_families
from medpretrain.whole import whole_folder

PAGE, FIGURES, TABLES = "index.html", "figures", "tables"


def report(
    sources: list[Path], out: Path, *, images: bool = True, title: str | None = None, overwrite: bool = False
) -> Path:
    """Write OUT: index.html, which needs nothing else; figures/*.png, *.svg; tables/*.csv, *.tex.

    It is written beside OUT and then renamed, so that it is there whole or not at all. The same folders give the same
    bytes.

    Args:
        sources: run folders, and folders of evaluations.
        out: the folder.
        images: show images of patients: views, neighbours, attention.
        title: of the page.
        overwrite: replace an earlier report.

    Returns:
        The page.

    Raises:
        UserError: as `gather`; OUT exists and is not an earlier report, or is one and overwrite is False.
    """
    _refuse_unless_free(out, overwrite)
    material = with_families(gather(sources))
    page, book = render(material, images=images, name=title)
    _refuse_places(page, book, sources, out, material)
    with whole_folder(out) as partial:
        _write(partial, page, book)
    return out / PAGE


def report_command(folders: Sequence[Path], images: bool, title: str | None, overwrite: bool) -> None:
    """`medpretrain report RUN... OUT`: the last folder is OUT; says where the page is.

    Raises:
        UserError: as `report`; fewer than two folders.
    """
    if len(folders) < 2:
        raise UserError("give one or more folders to report on, and then the folder to write: RUN... OUT")
    *sources, out = folders
    print(f"written: {report(sources, out, images=images, title=title, overwrite=overwrite)}")


def _write(folder: Path, page: str, book: Book) -> None:
    files = {PAGE: page.encode()}
    for picture in book.pictures.values():
        files[f"{FIGURES}/{picture.name}.png"] = picture.png
        if picture.svg:
            files[f"{FIGURES}/{picture.name}.svg"] = picture.svg
    for table in book.tables.values():
        files[f"{TABLES}/{table.name}.csv"] = as_csv(table).encode()
        files[f"{TABLES}/{table.name}.tex"] = as_latex(table).encode()
    for place in ("", FIGURES, TABLES):
        (folder / place).mkdir()
    for name, content in files.items():
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _refuse_places(page: str, book: Book, sources: Sequence[Path], out: Path, material: Material) -> None:
    """A path on a page that is passed on tells of a machine and, in hospitals, at times of a patient."""
    places = {str(place.resolve()) for place in (*sources, out.parent, Path.home())}
    places |= {str(Path(path)) for run in material.runs for path in run.recipe.data.path}
    written = [page, *(as_csv(table) for table in book.tables.values())]
    for place in sorted(places):
        if place.count("/") > 1:
            assert not any(place in text for text in written), f"the path {place} is on the page"


def _refuse_unless_free(out: Path, overwrite: bool) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    if not _is_report(out):
        raise UserError(f"{out} exists and is not an earlier report; name a folder that does not exist")
    if not overwrite:
        raise UserError(f"{out} holds an earlier report; --overwrite replaces it")


def _is_report(folder: Path) -> bool:
    page = folder / PAGE
    if folder.is_symlink() or not page.is_file():
        return False
    with page.open(encoding="utf-8", errors="replace") as file:
        return f'content="{GENERATOR.rpartition(" ")[0]} ' in file.read(4096)

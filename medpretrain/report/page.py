"""The page: one HTML file that loads nothing and sends nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from string import Template

import medpretrain
from medpretrain.report.book import Book, absent, bullets, paragraph
from medpretrain.report.comparing import tested
from medpretrain.report.drawing import method_looks
from medpretrain.report.gather import Material, differences
from medpretrain.report.head import compared, main_result, tested_on, warnings
from medpretrain.report.section_data import data_section, methods_table
from medpretrain.report.section_results import results_section, title
from medpretrain.report.section_runs import recipes_section, training_section
from medpretrain.report.section_space import space_section
from medpretrain.report.style import SCRIPT, STYLE
from medpretrain.report.views import dataset_of
from medpretrain.report.words import listed

GENERATOR = "medpretrain report 1"
"""In a `meta` element of every page; by it an earlier report is known."""


def render(material: Material, *, images: bool, name: str | None) -> tuple[str, Book]:
    """The page, and what is to lie beside it. Everything that comes from a file is escaped."""
    book = Book(images)
    look = method_looks(material)
    reach = {run.name: dataset_of(run) for run in material.runs}
    differs = differences(material.groups)
    stems = {group.key: f"results-{number + 1}" for number, group in enumerate(material.groups)}
    tests = {group.key: tested(group, group.fractions[-1]) for group in material.groups}

    methods = book.table(methods_table(material, look))
    results = "".join(
        results_section(book, group, tests[group.key], stems[group.key], look, differs[group.key])
        for group in material.groups
    )
    space = space_section(book, material.spaces, look)
    training = training_section(book, material.runs, reach, look)
    data = data_section(material, reach)
    recipes = recipes_section(book, material.runs, look)

    if material.groups:
        main = main_result(material.groups[0], tests[material.groups[0].key])
    else:
        main = "Only feature spaces were described; nothing was classified."
    head = {"Compared": compared(material), "On": tested_on(material), "Main result": main}
    contents = bullets_of_links([(stems[group.key], title(group)) for group in material.groups])
    page = _PAGE.substitute(
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(STYLE)}'; script-src '{_hash(SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'",
        style=STYLE,
        script=SCRIPT,
        generator=GENERATOR,
        title=escape(name or _title(material)),
        lead="".join(f"<dt>{term}</dt><dd{_main(term)}>{escape(said)}</dd>" for term, said in head.items()),
        warnings=_warnings(warnings(material, tests, book.shows_patients)),
        methods=methods,
        contents=contents if len(material.groups) > 1 else "",
        results=results or absent("No classifier was measured: `medpretrain evaluate knn RUN DATASET` does it."),
        space=space,
        training=training,
        data=data,
        recipes=recipes,
        version=escape(_versions(material)),
    )
    return page, book


def _main(term: str) -> str:
    return ' class="main"' if term == "Main result" else ""


def _title(material: Material) -> str:
    members = {name for names in material.families.values() for name in names}
    names = [method.name for method in material.methods if method.name not in members]
    return (
        f"{listed(names[:3])} compared"
        if 1 < len(names) <= 3
        else f"{len(names)} backbones compared"
        if names[1:]
        else names[0]
    )


def _warnings(lines: Sequence[str]) -> str:
    if not lines:
        return paragraph("Nothing was found that speaks against these numbers.", "absent")
    return f'<div class="warnings" role="note"><b>Before you believe it</b>{bullets(lines)}</div>'


def bullets_of_links(links: Sequence[tuple[str, str]]) -> str:
    return "<ul>" + "".join(f'<li><a href="#{id}">{escape(text)}</a></li>' for id, text in links) + "</ul>"


def _versions(material: Material) -> str:
    records = [*(one.evaluation for one in material.measured), *(space.record for _, space in material.spaces)]
    versions, devices = (
        sorted({str(getattr(one, key)) for one in records}) for key in ("medpretrain_version", "device")
    )
    by = f"Made by medpretrain {medpretrain.__version__} from what medpretrain {listed(versions)}"
    return f"{by} measured on {listed(devices)}."


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="generator" content="$generator">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
<dl class="lead">$lead</dl>
$warnings
<nav aria-label="Parts"><a href="#methods">Methods</a><a href="#results">Results</a><a href="#space">Feature space</a>
<a href="#training">Training</a><a href="#data">Data</a><a href="#recipes">Recipes</a></nav>
<h2 id="methods">Methods</h2>
$methods
<h2 id="results">Results</h2>
$contents
$results
<h2 id="space">Feature space</h2>
$space
<h2 id="training">Training</h2>
$training
<h2 id="data">Data</h2>
$data
<h2 id="recipes">Recipes and versions</h2>
$recipes
<footer><p>$version</p><p>Beside this page lie every figure (figures/, PNG and SVG) and every table (tables/, CSV and
LaTeX); the page needs none of them. Method colours are those of Okabe and Ito, the same throughout.</p></footer>
</main>
<script>$script</script>
</body>
</html>
""")

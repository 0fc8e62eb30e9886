"""The folder of a report: its numbers are the records', it names no place, and it is there whole or not at all."""

from __future__ import annotations

import csv
import re
from html import unescape
from pathlib import Path

import pytest

from data_prep.errors import UserError
from medpretrain.evaluation import results
from medpretrain.evaluation.comparison import compare
from medpretrain.evaluation.imbalance import imbalance
from medpretrain.report import write
from medpretrain.report.words import METRIC_NAMES, number, p_value
from medpretrain.report.write import report, report_command
from tests.report.example import FRACTIONS, data, evaluated, write_run


@pytest.fixture(scope="session")
def page(made) -> str:
    return (made / "index.html").read_text()


@pytest.fixture(scope="session")
def linear(example) -> list:
    """The evaluations of the first group with their predictions, as they lie on disk."""
    paths = [path for place in example for path in sorted(place.rglob(f"linear-*{results.SUFFIX}"))]
    return [results.read(path) for path in paths]


@pytest.fixture
def small(tmp_path) -> list[Path]:
    """Two folders of one evaluation each."""
    for name in ("simclr", "mulsupcon"):
        results.write(tmp_path / name, *evaluated(name, repeats=1, folds=0))
    return [tmp_path / "simclr", tmp_path / "mulsupcon"]


def rows(made: Path, name: str) -> list[dict[str, str]]:
    with (made / "tables" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def table(page: str, caption: str) -> list[list[str]]:
    """The cells of the table with a caption, as text."""
    found = next(part for part in page.split('<figure class="table">') if f"<figcaption>{caption}" in part)
    body = found[found.index("<tbody>") : found.index("</tbody>")]
    lines = re.findall(r"<tr>(.*?)</tr>", body)
    return [
        [unescape(re.sub(r"<[^>]+>", " ", cell)).strip() for cell in re.split(r"(?<=</t[dh]>)", line)[:-1]]
        for line in lines
    ]


def test_means_and_intervals_on_the_page_are_the_records(page, linear):
    cells = {row[0]: row[1:] for row in table(page, "Comparison: Linear probe")}
    assert len(cells) == len(linear)
    for evaluation, predictions in linear:
        summary = evaluation.summaries[-1]
        for cell, metric in zip(cells[evaluation.source.name], METRIC_NAMES, strict=False):
            low, high = summary.interval[metric].low, summary.interval[metric].high
            assert cell.split() == [number(summary.mean[metric]), number(low), "to", number(high)]
        assert cells[evaluation.source.name][-1].split()[0] == str(len(set(predictions.row_R.tolist())))


def test_csv_files_hold_the_records_to_the_last_digit(made, linear):
    found = {row["method"]: row for row in rows(made, "results-1-comparison")}
    for evaluation, _ in linear:
        summary = evaluation.summaries[-1]
        for metric in METRIC_NAMES:
            row = found[evaluation.source.name]
            assert float(row[metric]) == summary.mean[metric]
            assert float(row[f"{metric}_low"]) == summary.interval[metric].low
    labels = {row["method"]: row for row in rows(made, "results-1-labels-auroc")}
    for evaluation, _ in linear:
        for fraction, summary in zip(FRACTIONS, evaluation.summaries, strict=True):
            assert float(labels[evaluation.source.name][f"auroc_{fraction:g}"]) == summary.mean["auroc"]


def test_p_values_are_those_of_the_comparison_and_say_what_they_can_reach(made, page, linear):
    at_full = [
        (one.model_copy(update={"units": [unit for unit in one.units if unit.fraction == 100.0]}), predictions)
        for one, predictions in linear
    ]
    expected = compare(at_full, metrics=("auroc",))
    found = rows(made, "results-1-tests-auroc")
    assert len(found) == len(expected) == 3
    for pair, row in zip(expected, found, strict=True):
        assert (row["first"], row["second"]) == (pair.first, pair.second)
        assert float(row["p_holm"]) == pair.p_holm
        assert float(row["least_p"]) == pair.least_p == 0.25
        assert float(row["difference_low"]) == pair.interval.low
        assert row["trained_again"] == "too few repeats to tell"
    shown = table(page, "Differences in AUROC")
    assert [row[3] for row in shown] == [p_value(pair.p) for pair in expected]
    assert "cannot bring the corrected p below 0.75" in page


def test_the_head_says_what_was_compared_on_what_and_what_came_out(page, linear):
    head = unescape(page[page.index('<dl class="lead">') : page.index("</dl>")])
    best = max((evaluation for evaluation, _ in linear), key=lambda one: one.summaries[-1].mean["auroc"])
    assert best.source.name == "mulsupcon"
    summary = best.summaries[-1]
    assert "mulsupcon, simclr and random (3 backbones, by linear probe and k nearest neighbours)" in head
    assert "breastmnist (2 classes of class, 123 test images, patients known)" in head
    assert f"mulsupcon is highest with AUROC {number(summary.mean['auroc'])}" in head
    assert number(summary.interval["auroc"].low) in head
    assert "3 repeats cannot tell whether it stays better when trained again" in head


def test_a_difference_that_enough_repeats_show_is_bold_and_said(tmp_path):
    for name in ("mulsupcon", "random"):
        results.write(tmp_path / name, *evaluated(name, repeats=7, folds=0))
    page = report([tmp_path / "mulsupcon", tmp_path / "random"], tmp_path / "out").read_text()
    assert "trained again it stays better (p = 0.016, Wilcoxon, Holm)" in unescape(page)
    first = page[page.index("Comparison: Linear") :]
    assert f"<b>{number(evaluated('mulsupcon', repeats=7, folds=0)[0].summaries[0].mean['auroc'])}</b>" in first
    assert "cannot give" not in page


def test_confusion_and_classes_are_the_records(made, linear):
    evaluation, _ = linear[0]
    units = [unit for unit in evaluation.units if unit.fraction == 100.0]
    found = [row for row in rows(made, "results-1-confusion") if row["method"] == evaluation.source.name]
    for k, row in enumerate(found):
        total = [sum(unit.metrics.confusion[k][other] for unit in units) for other in range(2)]
        assert [int(row["count benign"]), int(row["count malignant"])] == total
        assert float(row["share benign"]) == total[0] / sum(total)
    classes = [row for row in rows(made, "results-1-classes") if row["method"] == evaluation.source.name]
    for k, row in enumerate(classes):
        mean = sum(unit.metrics.per_class[k].aupr for unit in units) / len(units)
        assert float(row["aupr"]) == pytest.approx(mean, abs=1e-12)
        assert float(row["aupr_low"]) <= mean <= float(row["aupr_high"])


def test_latex_tables_are_of_letters_that_every_latex_knows(made):
    for path in (made / "tables").glob("*.tex"):
        assert path.read_text().isascii(), path.name


def test_imbalance_is_that_of_the_training_images(made):
    expected = imbalance(data("organ").train_counts, data("organ").classes)
    (row,) = rows(made, "results-2-imbalance")
    assert float(row["imbalance_ratio"]) == expected.imbalance_ratio == 4.0
    assert row["category"] == expected.category


def test_every_figure_and_table_of_the_page_lies_beside_it(made, page):
    linked = set(re.findall(r'href="((?:figures|tables)/[^"]+)"', page))
    there = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()} - {"index.html"}
    assert linked == there
    assert {Path(name).suffix for name in there} == {".png", ".svg", ".csv", ".tex"}
    assert len(page) < 3 * 2**20


def test_nothing_tells_a_path_a_host_a_command_or_an_address(made, example):
    texts = {
        path.name: path.read_text() for path in made.rglob("*") if path.suffix in (".html", ".csv", ".tex", ".svg")
    }
    for name, text in texts.items():
        for secret in ("/secret/place", "secret-host", str(example[0].parent), str(Path.home()) + "/", "python -m"):
            assert secret not in text, f"{secret} in {name}"
    assert "mednist" in texts["index.html"], "the name of the data is no secret"


def test_the_page_may_load_and_send_nothing(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r'(?:src|href)="(?!data:|#|figures/|tables/)', page)
    assert " style=" not in page, "the policy would block it"


def test_what_is_missing_is_said(small, tmp_path):
    page = unescape(report(small, tmp_path / "out").read_text())
    assert "None of the folders is a run: there are no training curves" in page
    assert "Nothing is known of the feature space: <code>medpretrain evaluate space</code>" in page
    assert "the dataset is out of reach" in page


def test_warnings_come_first(tmp_path):
    record = data(left_out={"train": 3, "test": 0}, patients="unknown")
    evaluation = evaluated("simclr", repeats=1, folds=0, record=record, converged=False, intervals=False)
    results.write(tmp_path / "one", *evaluation)
    page = unescape(report([tmp_path / "one"], tmp_path / "out").read_text())
    warned = page[page.index('class="warnings"') : page.index("<nav")]
    assert "patients are unknown, so nothing shows that no patient is in both training and test" in warned
    assert "left out on request: 3 of train" in warned
    assert "1 of 1 classifier of simclr did not converge" in warned
    assert "no interval is known of simclr" in warned
    assert "Images of patients" not in warned


def test_runs_of_different_data_are_warned_of(tmp_path):
    for name in ("simclr", "mulsupcon"):
        run = write_run(tmp_path / name, name)
        results.write(run / "evaluation", *evaluated(name, repeats=1, folds=0))
    provenance = tmp_path / "simclr" / "provenance.json"
    provenance.write_text(provenance.read_text().replace("d" * 64, "e" * 64))
    page = unescape(report([tmp_path / "simclr", tmp_path / "mulsupcon"], tmp_path / "out").read_text())
    assert "pretrained on different data: simclr on eeeeeeeeeeee; mulsupcon on dddddddddddd" in page


def test_without_images_none_of_a_patient_is_left(example, tmp_path, page):
    assert "Images of patients are on this page" in page
    assert page.count('alt="image of') > 0
    bare = report(example[:1], tmp_path / "bare", images=False).read_text()
    assert 'alt="image of' not in bare
    assert "Images of patients are on this page" not in bare
    assert bare.count("Left out: this report is without images of patients.") == 3  # neighbours, attention, views


def test_views_are_those_of_the_recipe_where_the_data_are_within_reach(small_dataset, tmp_path):
    from data_prep.dataset import read_info

    run = write_run(tmp_path / "simclr", "simclr", data_path=str(small_dataset))
    provenance = run / "provenance.json"
    provenance.write_text(provenance.read_text().replace("d" * 64, read_info(small_dataset)[1]))
    results.write(run / "evaluation", *evaluated("simclr", repeats=1, folds=0))
    page = report([run], tmp_path / "out").read_text()
    assert page.count('alt="view global 1') == page.count('alt="view local 2') == 5
    assert "Images of patients are on this page" in page
    assert str(small_dataset) not in page
    assert "gray" in page[page.index('id="data"') :], "what is known of the data is shown"


def test_the_same_folders_give_the_same_bytes(small, tmp_path):
    first, second = report(small, tmp_path / "a"), report(small, tmp_path / "b")
    names = [sorted(str(path.relative_to(page.parent)) for path in page.parent.rglob("*")) for page in (first, second)]
    assert names[0] == names[1]
    for name in names[0]:
        one, other = first.parent / name, second.parent / name
        assert one.is_dir() or one.read_bytes() == other.read_bytes(), name


def test_out_that_is_no_report_is_never_replaced_and_a_report_only_when_asked(small, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "index.html").write_text("<html>mine</html>")
    with pytest.raises(UserError, match="is not an earlier report"):
        report(small, out, overwrite=True)
    assert (out / "index.html").read_text() == "<html>mine</html>"
    (out / "index.html").unlink()
    out.rmdir()
    monkeypatch.setattr(
        write, "render", lambda *_, **__: (f'<meta name="generator" content="{write.GENERATOR}">', book)
    )
    book = write.Book()
    report(small, out)
    with pytest.raises(UserError, match="--overwrite replaces it"):
        report(small, out)
    (out / "old").touch()
    report(small, out, overwrite=True)
    assert not (out / "old").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_report_that_fails_leaves_nothing_behind(small, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "render", lambda *_, **__: ("page", write.Book()))

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(write.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        report(small, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mulsupcon", "simclr"]


def test_the_command_takes_the_last_folder_as_out(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(write, "render", lambda *_, **__: ("page", write.Book()))
    report_command([*small, tmp_path / "out"], images=True, title=None, overwrite=False)
    assert capsys.readouterr().out == f"written: {tmp_path / 'out' / 'index.html'}\n"
    with pytest.raises(UserError, match=r"RUN\.\.\. OUT"):
        report_command([tmp_path], images=True, title=None, overwrite=False)

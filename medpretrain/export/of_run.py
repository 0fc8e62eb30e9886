"""`medpretrain export`: a run's backbone as a folder that others load, and as a version in MLflow's registry."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from rich.console import Console

import medpretrain
from data_prep.dicom.windows import parse_window
from medpretrain.evaluation.results import SUFFIX, Evaluation, read
from medpretrain.export.bundle import ExportReport, export, parse_forms, refuse_unless_free
from medpretrain.export.description import FILES, Window
from medpretrain.export.provenance import Provenance
from medpretrain.export.registry import Registration, register_export
from medpretrain.training.build import TrainedRun, load_run


def export_run(
    run: Path,
    out: Path,
    *,
    forms: str = "timm,onnx,pt2",
    register: str | None = None,
    aliases: Sequence[str] = (),
    tracking_uri: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Export, and say what was compared; then register, if asked to.

    Args:
        run: a run folder, or one of its checkpoints.
        out: the folder to write.
        forms: see `parse_forms`.
        register: the name of a model in MLflow's registry.
        aliases: of its new version.
        tracking_uri: MLflow's; None: the run's own.
        overwrite: replace an earlier export.

    Raises:
        UserError: no run, an OUT that is not an earlier export, a name or alias MLflow does not take.
        WorkFailed: the export differs, and OUT is as it was; or it is whole and was not registered.
    """
    wanted = parse_forms(forms)
    refuse_unless_free(out, overwrite)  # before the run is read
    registration = Registration.check(register, aliases, wanted, tracking_uri)
    trained = load_run(run)
    recipe, preprocessing = trained.recipe, trained.preprocessing
    provenance = _provenance(trained)
    report = export(
        trained.backbone,
        architecture=recipe.backbone.name,
        stem=recipe.backbone.stem,
        channels=preprocessing.channels,
        image_size=preprocessing.size,
        mean=list(preprocessing.mean),
        std=list(preprocessing.std),
        name=recipe.name,
        provenance=provenance,
        out=out,
        bit_depth=preprocessing.bit_depth,
        windows=windows(trained),
        evaluations=evaluations(trained),
        forms=wanted,
        overwrite=overwrite,
    )
    console = Console()
    console.print(f"{out}: {report.features} features an image; differences from the trained backbone:")
    for form, found in report.differences.items():
        about = f"{found.absolute:.1e} ({found.relative:.1e} of the largest feature)"
        console.print(f"  {form:5} {FILES[form]:18} {about}", soft_wrap=True, highlight=False)
    console.print(f'load it with timm.create_model("local-dir:{out}", pretrained=True); the rest is in {out}/README.md')
    if report.enlarged:
        console.print("for timm its images are to be enlarged twice by repeating pixels; see the card for why")
    if registration is not None:
        again = ["medpretrain", "export", str(run), str(out), "--overwrite", "--forms", forms]
        said = register_export(
            registration, trained.folder, recipe, out, provenance, report.features, again=shlex.join(again)
        )
        console.print(said, soft_wrap=True)
    return report


def windows(trained: TrainedRun) -> list[Window] | None:
    """What the training images show of their gray values; None for a checkpoint that does not tell."""
    said = trained.dataset.get("windows")
    if said is None:
        return None
    shipped = parse_window("fixed")
    return [
        Window(
            dataset_sha256=sha256,
            window=window,
            centre_width={place: (centre, width) for place, centre, width in shipped.table}
            if window == shipped.origin
            else None,
        )
        for sha256, window in zip(trained.info.dataset_sha256, said, strict=True)
    ]


def evaluations(trained: TrainedRun) -> list[Evaluation]:
    """Those in the run's folder that are of the exported weights.

    Raises:
        UserError: one of them cannot be read: a card would show the others as if they were all.
    """
    found = [read(path)[0] for path in sorted((trained.folder / "evaluation").glob(f"*{SUFFIX}"))]
    these = {"recipe_sha256": trained.recipe.sha256, "step": trained.info.step}
    return [
        one for one in found if one.source.kind == "run" and these == {key: one.source.about.get(key) for key in these}
    ]


def _provenance(trained: TrainedRun) -> Provenance:
    recipe = trained.recipe
    return Provenance(
        method=recipe.method["name"],
        recipe_name=recipe.name,
        recipe_sha256=recipe.sha256,
        dataset_sha256=trained.info.dataset_sha256,
        dataset_counts=trained.dataset["splits"],
        checkpoint_sha256=trained.checkpoint_sha256,
        step=trained.info.step,
        images_seen=trained.info.step * recipe.train.global_batch,
        medpretrain_version=medpretrain.__version__,
        torch_version=torch.__version__,
        timm_version=timm.__version__,
    )

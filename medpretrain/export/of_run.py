"""`medpretrain export`: a run's backbone as a folder that timm loads."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from rich.console import Console

import medpretrain
from medpretrain.export.bundle import ExportReport, export
from medpretrain.export.card import Provenance
from medpretrain.training.build import load_run


def export_run(run: Path, out: Path, *, overwrite: bool = False) -> ExportReport:
    """Export, and say what was compared.

    Raises:
        UserError: no run, or an OUT that is not an earlier export.
    """
    trained = load_run(run)
    recipe, preprocessing = trained.recipe, trained.preprocessing
    report = export(
        trained.backbone,
        architecture=recipe.backbone.name,
        stem=recipe.backbone.stem,
        channels=preprocessing.channels,
        image_size=preprocessing.size,
        mean=list(preprocessing.mean),
        std=list(preprocessing.std),
        name=recipe.name,
        provenance=Provenance(
            method=recipe.method["name"],
            recipe_name=recipe.name,
            recipe_sha256=recipe.sha256,
            dataset_sha256=trained.info.dataset_sha256,
            dataset_counts=trained.dataset["splits"],
            step=trained.info.step,
            images_seen=trained.info.step * recipe.train.global_batch,
            medpretrain_version=medpretrain.__version__,
            torch_version=torch.__version__,
            timm_version=timm.__version__,
        ),
        out=out,
        bit_depth=preprocessing.bit_depth,
        overwrite=overwrite,
    )
    console = Console()
    console.print(f"{out}: {report.features} features an image, largest difference {report.max_abs_difference:.1e}")
    console.print(f'load it with timm.create_model("local-dir:{out}", pretrained=True)', soft_wrap=True)
    if report.enlarged:
        console.print("its images are to be enlarged twice by repeating pixels; see the card for why")
    return report

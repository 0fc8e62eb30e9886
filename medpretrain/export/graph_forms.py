"""The forms `onnx` and `pt2`: graphs that need neither timm nor medpretrain.

Both take pixels from 0 to 1 at the size of training and normalise them themselves, and both hold a 3x3 stem as it was
trained: whoever has only the file cannot take the wrong mean, nor forget to enlarge.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from data_prep.errors import UserError, WorkFailed
from medpretrain.export.description import INPUT, OUTPUT, Form
from medpretrain.models.backbones import Stem, create_backbone
from medpretrain.models.preprocessing import Preprocessing

_BATCH = "batch"


class FromPixels(nn.Module):
    """A backbone with its normalisation before it: (n, C, S, S) from 0 to 1 becomes (n, D)."""

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, backbone: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean_C11", torch.tensor(preprocessing.mean).view(-1, 1, 1))
        self.register_buffer("std_C11", torch.tensor(preprocessing.std).view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.backbone((pixels - self.mean_C11) / self.std_C11)
        return features


def refuse_without_packages(forms: tuple[Form, ...]) -> None:
    """Raises:
    UserError: a form needs a package that is not installed.
    """
    if "onnx" not in forms:
        return
    missing = [package for package in ("onnx", "onnxruntime", "onnxscript") if find_spec(package) is None]
    if missing:
        raise UserError(f"the form onnx needs {missing[0]}, which the train extra brings; --forms pt2 leaves it out")


def trace(
    state: dict[str, Tensor], architecture: str, stem: Stem, preprocessing: Preprocessing
) -> torch.export.ExportedProgram:
    """The graph of a backbone behind its normalisation, for any number of images.

    Args:
        state: of a backbone with this stem.
        architecture: timm's name.
        stem: it is kept.
        preprocessing: size, channels, mean and std.

    Raises:
        WorkFailed: torch.export cannot trace the architecture.
    """
    p = preprocessing
    backbone = create_backbone(architecture, channels=p.channels, stem=stem, image_size=p.size)
    backbone.load_state_dict(state)
    module = FromPixels(backbone, p).eval().requires_grad_(False)
    example = torch.zeros(2, p.channels, p.size, p.size)  # 1 would be taken for a constant
    try:
        program = torch.export.export(module, (example,), dynamic_shapes={INPUT: {0: torch.export.Dim(_BATCH)}})
    except Exception as error:  # whatever the architecture's own code raises under the tracer
        raise WorkFailed(
            f"torch.export cannot trace {architecture} ({_first_line(error)}); --forms timm leaves out onnx and pt2"
        ) from error
    # The stack traces of nodes name folders of this machine.
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def write_pt2(program: torch.export.ExportedProgram, file: Path, metadata: dict[str, str]) -> None:
    """Write a torch.export archive; `torch.export.load(file).module()` runs it."""
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata)})


def load_pt2(file: Path) -> Callable[[Tensor], Tensor]:
    """As a reader loads it."""
    return torch.export.load(file).module()


def write_onnx(program: torch.export.ExportedProgram, file: Path, metadata: dict[str, str]) -> None:
    """Write an ONNX file; weights of more than 2 GB lie in a second one beside it.

    Raises:
        WorkFailed: an operator of the architecture has no counterpart.
    """
    import onnx_ir

    try:
        converted = torch.onnx.export(
            program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False, optimize=True
        )
    except Exception as error:  # the exporter wraps whatever it meets in classes of its own
        raise WorkFailed(
            f"torch.onnx.export cannot write this architecture ({_first_line(error)}); --forms timm,pt2 leaves it out"
        ) from error
    assert converted is not None
    model = converted.model
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()  # the names of Python modules, and what the tracer knew
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape = onnx_ir.Shape([_BATCH, *value.shape.dims[1:]])
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    converted.save(str(file))


def load_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    """As a reader loads it: onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: pixels.numpy()})[0])

    return run


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__

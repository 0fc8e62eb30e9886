"""The lines of a card that load each form of an export and feed it an image file, as evaluation would.

They need numpy and Pillow beside the form's own package. The resize is that of medpretrain's pipeline: a triangle
filter as wide as the reduction, in floating point, which beyond the border goes on with the last pixel. Pillow's own
leaves such weights out, and rounds between its two passes; so the image is padded, each channel is resized as floats,
and `box` takes the middle of the padded image.
"""

from __future__ import annotations

from medpretrain.export.description import INPUT, Description, Form

IMAGE = "image.png"


def lines(form: Form, description: Description) -> str:
    """Imports, and five lines from `image.png` to `features`."""
    module = {"timm": "timm, torch", "onnx": "onnxruntime", "pt2": "torch"}[form]
    return "\n".join(
        [
            f"import numpy, {module}",
            "from PIL import Image",
            "",
            *_resized(description),
            *{"timm": _timm, "onnx": _onnx, "pt2": _pt2}[form](description),
        ]
    )


def _resized(d: Description) -> list[str]:
    """Three lines: `a` is the resized image of one channel, or a list of them."""
    whole = f'Image.open("{IMAGE}")'
    colour = d.channels == 3 and d.bit_depth <= 8
    if d.bit_depth <= 8:
        whole += f'.convert("{"RGB" if colour else "L"}")'
    resize = f"resize(({d.size}, {d.size}), Image.Resampling.BILINEAR, (r, r, r + w, r + h))"
    if colour:
        one = f'[Image.fromarray(numpy.pad(c, r, "edge")).{resize} for c in numpy.moveaxis(a, 2, 0)]'
    elif d.channels == 3:
        one = f'[Image.fromarray(numpy.pad(a, r, "edge")).{resize}] * 3'
    else:
        one = f'[Image.fromarray(numpy.pad(a, r, "edge")).{resize}]'
    return [
        f'a = numpy.array({whole}, "float32")',
        f"(h, w), r = a.shape[:2], max(a.shape) // {d.size} + 1",
        f"a = {one}",
    ]


def _scaled(d: Description) -> str:
    """`x`, (1, C, S, S) from 0 to 1. A product, as the pipeline takes, and no quotient: the last bit is the same."""
    values = "numpy.round(numpy.stack(a))" if d.rounded else "numpy.stack(a)"
    return f"{values}[None] * (1 / {d.divide:.0f})"


def _timm(d: Description) -> list[str]:
    mean, std = (f"torch.tensor({list(values)}).view(-1, 1, 1)" for values in (d.mean, d.std))
    prepared = "torch.nn.functional.interpolate(x, scale_factor=2)" if d.enlarge else "x"
    return [
        f"x = (torch.from_numpy({_scaled(d)}) - {mean}) / {std}",
        f'features = timm.create_model("local-dir:.", pretrained=True).eval()({prepared})',
    ]


def _onnx(d: Description) -> list[str]:
    return [
        f"x = {_scaled(d)}",
        f'features = onnxruntime.InferenceSession("model.onnx").run(None, {{"{INPUT}": x}})[0]',
    ]


def _pt2(d: Description) -> list[str]:
    return [
        f"x = torch.from_numpy({_scaled(d)})",
        'features = torch.export.load("model.pt2").module()(x)',
    ]

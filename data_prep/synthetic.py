"""Draw images that look a little like medical ones, for a demo that needs no data.

They are drawings: good for showing that the whole chain works, and for nothing else. Each patient has an anatomy, each
image of a patient another position, slice, exposure and noise, so that a class is not a single picture.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from data_prep.errors import UserError
from data_prep.synthetic_canvas import Frame, Grid, cloud, exposed, paint

DEMO_LABELS: dict[str, tuple[str, str]] = {
    "retina_normal": ("OP", "eye"),
    "retina_lesions": ("OP", "eye"),
    "ct_abd": ("CT", "abd"),
    "ct_lung": ("CT", "lung"),
    "ct_brain": ("CT", "brain"),
    "mr_brain": ("MR", "brain"),
    "mr_knee": ("MR", "knee"),
    "mr_spine": ("MR", "spine"),
    "us_thyroid": ("US", "thyroid"),
    "us_breast": ("US", "breast"),
}
"""Class folder -> (modality, anatomy)."""

IMAGES, LABELS = "images", "labels.yaml"
PATIENT_PATTERN = r"/(\d+)_\d+\."
"""Group 1 in the path of an image is its patient."""
_SMALLEST = 32


def make_demo_images(out: Path, *, per_class: int, size: int = 96, seed: int) -> None:
    """Write OUT/images/CLASS/PATIENT_K.png (CT, MR) or .jpg (photographs, ultrasound) and OUT/labels.yaml.

    The labels lie beside the images, not among them, so that OUT/images is a source that holds images alone.
    A patient has two to four images and belongs to one class; of a retina even K are left eyes, odd K right ones.
    The same arguments give the same pixels.

    Args:
        out: a folder that does not exist or is empty.
        per_class: images in each of the ten classes.
        size: height and width in pixels, at least 32.
        seed: any integer >= 0.

    Raises:
        UserError: OUT holds something; a size, count or seed out of range.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     make_demo_images(Path(folder), per_class=1, size=32, seed=0)
    ...     len(list(Path(folder).glob("images/*/*.png"))), len(list(Path(folder).glob("images/*/*.jpg")))
    (6, 4)
    """
    if per_class < 1 or size < _SMALLEST or seed < 0:
        raise UserError(f"per_class must be >= 1, size >= {_SMALLEST}, seed >= 0; not {per_class}, {size}, {seed}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; the demo images go into a new one")
    patient = 0
    for number, name in enumerate(DEMO_LABELS):
        folder = out / IMAGES / name
        folder.mkdir(parents=True)
        written = 0
        while written < per_class:
            patient += 1
            of_patient = int(np.random.default_rng([seed, number, patient]).integers(2, 5))
            for k in range(min(of_patient, per_class - written)):
                # The anatomy is drawn from the same numbers for each image of a patient, the exposure from others.
                body = np.random.default_rng([seed, number, patient, 0])
                shot = np.random.default_rng([seed, number, patient, 1 + k])
                _save(_draw(name, body, shot, size, k), folder / f"{patient:04d}_{k}", name)
                written += 1
    lines = [f"{name}: {{modality: {m}, anatomy: {a}}}" for name, (m, a) in DEMO_LABELS.items()]
    (out / LABELS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _draw(name: str, body: Generator, shot: Generator, size: int, k: int) -> Grid:
    if name.startswith("retina"):
        return _retina(body, shot, size, lesions=name == "retina_lesions", right=k % 2 == 1)
    drawings: dict[str, Callable[[Generator, Generator, int], Grid]] = {
        "ct_abd": _ct_abd,
        "ct_lung": _ct_lung,
        "ct_brain": _ct_brain,
        "mr_brain": _mr_brain,
        "mr_knee": _mr_knee,
        "mr_spine": _mr_spine,
        "us_thyroid": _us_thyroid,
        "us_breast": _us_breast,
    }
    return drawings[name](body, shot, size)


def _save(image: Grid, stem: Path, name: str) -> None:
    pixels = Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))
    if name.startswith(("retina", "us")):
        pixels.save(stem.with_suffix(".jpg"), quality=92)
    else:
        pixels.save(stem.with_suffix(".png"))


# Retinal photographs


def _retina(body: Generator, shot: Generator, size: int, *, lesions: bool, right: bool) -> Grid:
    frame = Frame(shot, size, turn=0.12, shift=0.03)
    disc_x, disc_y = body.uniform(0.42, 0.55), body.uniform(-0.08, 0.08)
    macula_x, macula_y = disc_x - body.uniform(0.62, 0.75), disc_y + body.uniform(0.0, 0.08)
    colour = np.array([0.72, 0.36, 0.16]) * body.uniform(0.75, 1.2, 3) + body.uniform(-0.04, 0.04)
    image: Grid = np.ones((size, size, 3)) * colour
    texture = 1 + 0.05 * cloud(body, size, 5) + 0.03 * cloud(shot, size, 12)
    image *= texture[..., None]
    image *= (1 - 0.45 * frame.oval(macula_x, macula_y, 0.2, 0.2, soft=0.14))[..., None]

    def put(mask: Grid, tint: tuple[float, float, float]) -> None:
        for channel, value in enumerate(tint):
            paint(image[..., channel], mask, value)

    if lesions:
        kind = body.choice(["drusen", "haemorrhage", "both"])
        if kind != "haemorrhage":
            for _ in range(int(body.integers(14, 40))):
                x, y = macula_x + body.normal(0, 0.22), macula_y + body.normal(0, 0.22)
                radius = body.uniform(0.02, 0.055)
                put(frame.oval(x, y, radius, radius * body.uniform(0.7, 1.3), soft=0.02) * 0.8, (0.95, 0.8, 0.42))
        if kind != "drusen":
            for _ in range(int(body.integers(6, 16))):
                x, y = body.uniform(-0.7, 0.7, 2)
                rx, ry, turn = body.uniform(0.03, 0.11), body.uniform(0.025, 0.06), body.uniform(0, 3)
                put(frame.oval(x, y, rx, ry, turn, soft=0.025) * 0.85, (0.3, 0.05, 0.04))
    put(frame.oval(disc_x, disc_y, 0.15, 0.17, soft=0.04), (0.96, 0.78, 0.5))
    cup = body.uniform(0.05, 0.09)
    put(frame.oval(disc_x, disc_y, cup, cup, soft=0.04), (1.0, 0.92, 0.72))
    roots = [
        (disc_x, disc_y, heading + body.normal(0, 0.1))
        for heading in (-2.0, -1.85, -0.9, 2.0, 1.85, 0.9, -2.9, 2.9)[: int(body.integers(6, 9))]
    ]
    put(frame.tree(body, roots, body.uniform(0.035, 0.05), -0.055) * 0.65, (0.42, 0.09, 0.07))
    light = 1 - 0.35 * ((frame.x - shot.normal(0, 0.3)) ** 2 + (frame.y - shot.normal(0, 0.3)) ** 2)
    image = exposed(image * light.clip(0.3, 1.2)[..., None], shot, 0.02)
    image = np.where(frame.oval(0, 0, 0.93, 0.93, soft=0.02)[..., None] > 0.5, image, 0.015)
    return image if right else image[:, ::-1]


# CT


def _torso(frame: Frame, body: Generator) -> Grid:
    image: Grid = np.zeros_like(frame.x)
    rx, ry, fat = body.uniform(0.82, 0.95), body.uniform(0.58, 0.72), body.uniform(0.04, 0.12)
    paint(image, frame.oval(0, 0, rx, ry, soft=0.02, box=2.3), 0.26)
    paint(image, frame.oval(0, 0, rx - fat, ry - fat, soft=0.02, box=2.3), 0.5)
    return image


def _backbone(image: Grid, frame: Frame, body: Generator) -> None:
    y = body.uniform(0.34, 0.4)
    paint(image, frame.oval(0, y, 0.13, 0.1), 0.88)
    for side in (-1, 1):
        paint(image, frame.oval(0.14 * side, y + 0.12, 0.11, 0.035, 0.4 * side), 0.85)
    paint(image, frame.oval(0, y + 0.17, 0.035, 0.08), 0.85)
    paint(image, frame.oval(0, y + 0.12, 0.05, 0.04), 0.42)


def _ct_abd(body: Generator, shot: Generator, size: int) -> Grid:
    frame = Frame(shot, size)
    image = _torso(frame, body)
    level = shot.uniform(0.8, 1.15)  # of the slice: organs wax and wane
    paint(image, frame.oval(0, -0.05, 0.68, 0.42, soft=0.06) * 0.8, 0.3)
    paint(image, frame.oval(-0.38, -0.08, 0.34 * level, 0.36, 0.3), body.uniform(0.6, 0.68))
    paint(image, frame.oval(0.5, 0.02, 0.14, 0.22 * level, -0.3), body.uniform(0.6, 0.66))
    for side in (-1, 1):
        paint(image, frame.oval(0.34 * side, 0.28, 0.1, 0.15 / level, 0.25 * side), body.uniform(0.66, 0.78))
        paint(image, frame.oval(0.3 * side, 0.28, 0.035, 0.06), 0.35)
    for _ in range(int(body.integers(4, 9))):
        x, y, radius = body.uniform(-0.1, 0.5), body.uniform(-0.38, 0.08), body.uniform(0.05, 0.11)
        paint(image, frame.oval(x, y, radius, radius * 0.8), 0.56)
        paint(image, frame.oval(x, y - 0.02, radius * 0.6, radius * 0.4), body.choice([0.05, 0.48, 0.5]))
    _backbone(image, frame, body)
    paint(image, frame.oval(0.05, 0.2, 0.06, 0.06), body.uniform(0.68, 0.85))
    return exposed(image + 0.015 * cloud(shot, size, 24) * (image > 0.1), shot, 0.03)


def _ct_lung(body: Generator, shot: Generator, size: int) -> Grid:
    frame = Frame(shot, size)
    image = _torso(frame, body)
    level = shot.uniform(0.85, 1.1)
    lungs: Grid = np.zeros_like(image)
    for side in (-1, 1):
        width = 0.29 * level * body.uniform(0.9, 1.1)
        lungs = np.maximum(lungs, frame.oval(0.42 * side, -0.02, width, 0.44 * level, 0.15 * side, box=2.4))
    heart = frame.oval(body.uniform(0.05, 0.14), -0.12, 0.26 * level, body.uniform(0.22, 0.3), 0.5)
    lungs *= 1 - heart
    paint(image, lungs, 0.07)
    roots = [(0.16 * side, 0.02, (0 if side > 0 else np.pi) + body.normal(0, 0.7)) for side in (-1, 1) for _ in "1234"]
    paint(image, lungs * frame.tree(body, roots, 0.045, 0.0), 0.5)
    paint(image, heart, body.uniform(0.55, 0.66))
    paint(image, frame.oval(0, 0.08, 0.05, 0.06), 0.05)
    _backbone(image, frame, body)
    paint(image, frame.oval(0.13, 0.2, 0.07, 0.07), body.uniform(0.58, 0.75))
    phase = shot.uniform(0, 1)
    for angle in np.arange(8) * np.pi / 4 + phase:
        paint(image, frame.oval(0.76 * np.cos(angle), 0.53 * np.sin(angle), 0.08, 0.025, angle + np.pi / 2), 0.85)
    return exposed(image, shot, 0.03)


def _ct_brain(body: Generator, shot: Generator, size: int) -> Grid:
    frame = Frame(shot, size, turn=0.15)
    rx, ry, bone = body.uniform(0.64, 0.74), body.uniform(0.8, 0.9), body.uniform(0.06, 0.1)
    image: Grid = np.zeros_like(frame.x)
    paint(image, frame.oval(0, 0, rx + 0.04, ry + 0.04, soft=0.02), 0.35)
    paint(image, frame.oval(0, 0, rx, ry, soft=0.02), 0.97)
    inner = frame.oval(0, 0, rx - bone, ry - bone, soft=0.015)
    paint(image, inner, 0.47 + 0.025 * cloud(body, size, 9) - 0.05 * (cloud(body, size, 16) > 1.3))
    _ventricles(image, frame, body, shot, 0.27)
    paint(image, inner * frame.oval(0, 0, 0.012, ry, soft=0.01), 0.58)
    return exposed(image, shot, 0.025)


def _ventricles(image: Grid, frame: Frame, body: Generator, shot: Generator, value: float) -> None:
    wide, level = body.uniform(0.05, 0.11), shot.uniform(0.7, 1.1)
    for side in (-1, 1):
        paint(image, frame.oval(0.11 * side, -0.15, wide, 0.2 * level, -0.3 * side), value)
        paint(image, frame.oval(0.17 * side, 0.18, wide * 0.8, 0.17 * level, 0.35 * side), value)


# MR


def _received(image: Grid, shot: Generator) -> Grid:
    """A coil that hears one side better, and Rician noise."""
    size = len(image)
    image = image.clip(0, 1.2) * (1 + 0.22 * cloud(shot, size, 1)).clip(0.35, 1.7) * shot.uniform(0.75, 1.1)
    level = shot.uniform(0.02, 0.05)
    return np.hypot(image + shot.normal(size=image.shape) * level, shot.normal(size=image.shape) * level)


def _mr_brain(body: Generator, shot: Generator, size: int) -> Grid:
    frame = Frame(shot, size, turn=0.15)
    rx, ry = body.uniform(0.66, 0.74), body.uniform(0.8, 0.9)
    white, grey, fluid = ((0.75, 0.5, 0.12), (0.4, 0.58, 0.95))[int(shot.integers(2))]  # T1- or T2-weighted
    image: Grid = np.zeros_like(frame.x)
    paint(image, frame.oval(0, 0, rx + 0.06, ry + 0.06, soft=0.02), 0.8)
    paint(image, frame.oval(0, 0, rx, ry, soft=0.02), 0.06)
    paint(image, frame.oval(0, 0, rx - 0.05, ry - 0.05, soft=0.015), fluid * 0.8)
    folds = 0.055 * cloud(body, size, 15)
    paint(image, frame.oval(0, 0, rx - 0.07, ry - 0.07, soft=0.02) * (folds > -0.08), grey)
    shrink = 0.17 + folds
    core = (frame.x / (rx - shrink)) ** 2 + (frame.y / (ry - shrink)) ** 2 < 1
    paint(image, core * 0.95, white)
    for side in (-1, 1):
        paint(image, frame.oval(0.22 * side, 0.03, 0.08, 0.13, 0.3 * side), grey)
    _ventricles(image, frame, body, shot, fluid)
    return _received(image, shot)


def _mr_knee(body: Generator, shot: Generator, size: int) -> Grid:
    frame = Frame(shot, size, turn=0.12)
    marrow, muscle, fat = shot.uniform(0.55, 0.85), shot.uniform(0.25, 0.4), shot.uniform(0.7, 0.9)
    image: Grid = np.zeros_like(frame.x)
    leg = frame.oval(0, 0, body.uniform(0.68, 0.8), 1.6, soft=0.03, box=3)
    paint(image, leg, fat)
    paint(image, frame.oval(0.35, -0.1, 0.32, 1.4, soft=0.05, box=2.5), muscle + 0.04 * cloud(body, size, 8))
    width = body.uniform(0.4, 0.48)
    for cy, ry, direction in ((-0.2, 0.2, -1), (0.42, 0.17, 1)):
        for grow, value in ((0.035, 0.05), (0.0, marrow)):  # the dark rim is cortical bone
            paint(image, frame.oval(-0.05, cy + 0.62 * direction, 0.24 + grow, 0.6, soft=0.02, box=5), value)
            paint(image, frame.oval(-0.05, cy, width + grow, ry + grow, soft=0.02, box=2.6), value)
    paint(image, frame.oval(-0.05, 0.115, 0.42, 0.045, soft=0.02), shot.uniform(0.45, 0.95))
    for side in (-1, 1):
        paint(image, frame.oval(-0.05 + 0.34 * side, 0.12, 0.12, 0.045, 0.1 * side, soft=0.015), 0.06)
    for grow, value in ((0.03, 0.06), (0.0, marrow)):
        paint(image, frame.oval(-0.6, -0.28, 0.08 + grow, 0.17 + grow, 0.1, soft=0.02), value)
    paint(image, frame.oval(-0.58, 0.2, 0.025, 0.34, -0.15, soft=0.015), 0.07)
    return _received(image * leg + 0.02 * cloud(body, size, 20) * leg, shot)


def _mr_spine(body: Generator, shot: Generator, size: int) -> Grid:
    frame = Frame(shot, size, turn=0.08)
    curve, phase = body.uniform(0.05, 0.18), body.uniform(-0.5, 0.5)

    def column(y: float) -> float:
        return -0.12 + curve * float(np.sin(2 * y + phase))

    middle = -0.12 + curve * np.sin(2 * frame.y + phase)
    fluid, bone = shot.uniform(0.15, 0.95), shot.uniform(0.4, 0.65)
    image: Grid = 0.22 + 0.06 * cloud(body, size, 6)
    behind = 1 / (1 + np.exp(-(frame.x - middle - 0.52) / 0.03))
    paint(image, behind, 0.85)
    paint(image, 1 / (1 + np.exp(-(frame.x - middle - 0.95) / 0.03)), 0.02)
    for offset, wide, value in ((0.3, 0.085, fluid), (0.3, 0.045, 0.5)):
        paint(image, 1 / (1 + np.exp((np.abs(frame.x - middle - offset) - wide) / 0.012)), value)
    step = body.uniform(0.27, 0.36)
    start = shot.uniform(-0.15, 0.15)
    for number in range(-5, 6):
        y = start + number * step
        turn = -2 * curve * float(np.cos(2 * y + phase)) * 0.7
        paint(image, frame.oval(column(y), y, 0.2, step * 0.37, turn, soft=0.02, box=5), bone)
        disc = body.uniform(0.12, 0.75) * (0.5 + fluid / 2)
        paint(image, frame.oval(column(y + step / 2), y + step / 2, 0.19, step * 0.1, turn, soft=0.015), disc)
        paint(image, frame.oval(column(y) + 0.55, y + 0.08, 0.13, step * 0.2, 0.5, soft=0.025), bone * 0.8)
    return _received(image, shot)


# Ultrasound


def _scanned(echo: Grid, shot: Generator, fan: bool) -> Grid:
    """Speckle that is coarser across than along the beam, weaker echoes from the depth, and the probe's field."""
    size = len(echo)
    real, imaginary = (
        np.asarray(
            Image.fromarray(shot.normal(size=(size, max(8, size // 2))).astype(np.float32)).resize(
                (size, size), Image.Resampling.BILINEAR
            ),
            dtype=np.float64,
        )
        for _ in "12"
    )
    depth = np.linspace(0, 1, size)[:, None]
    image = echo.clip(0.01, 1) * np.hypot(real, imaginary) ** 0.6 * np.exp(-shot.uniform(0.1, 0.9) * depth)
    image = np.log1p(6 * image) / np.log(7) * shot.uniform(0.85, 1.15)
    px, py = np.meshgrid(np.linspace(-1, 1, size), np.linspace(0, 2, size))
    if fan:
        apex = shot.uniform(0.5, 0.9)
        radius, angle = np.hypot(px, py + apex), np.abs(np.arctan2(px, py + apex))
        seen = (radius > apex + 0.08) & (radius < apex + 1.95) & (angle < shot.uniform(0.5, 0.62))
    else:
        seen = (np.abs(px) < shot.uniform(0.86, 1.0)) & (py > 0.04) & (py < shot.uniform(1.85, 2.0))
    return np.where(seen, image, 0.01)


def _us_thyroid(body: Generator, shot: Generator, size: int) -> Grid:
    frame = Frame(shot, size, turn=0.05)
    echo: Grid = 0.28 + 0.05 * cloud(body, size, 5)
    for y, value in ((-0.95, 0.75), (-0.8, 0.2), (-0.68, 0.65), (-0.56, 0.25)):  # skin, fat, fascia, strap muscles
        paint(echo, 1 / (1 + np.exp((np.abs(frame.y - y - 0.08 * frame.x**2) - 0.05) / 0.02)), value)
    for side in (-1, 1):
        rx, ry = body.uniform(0.22, 0.3), body.uniform(0.26, 0.38)
        paint(echo, frame.oval(0.38 * side, -0.12, rx, ry, -0.2 * side), body.uniform(0.5, 0.68))
        paint(echo, frame.oval(0.78 * side, 0.02, 0.13, 0.13), 0.04)  # carotid artery
    paint(echo, frame.oval(0, -0.3, 0.3, 0.08), 0.55)
    paint(echo, frame.oval(0, 0.35, 0.2, 0.55, box=3), 0.07)  # trachea and its shadow
    paint(echo, frame.oval(0, -0.18, 0.2, 0.03), 0.95)
    for _ in range(int(body.integers(0, 3))):
        x, radius = 0.38 * body.choice([-1, 1]) + body.normal(0, 0.05), body.uniform(0.05, 0.12)
        paint(echo, frame.oval(x, -0.12 + body.normal(0, 0.08), radius, radius * 0.8), body.choice([0.08, 0.3]))
    return _scanned(echo, shot, fan=bool(shot.random() < 0.4))


def _us_breast(body: Generator, shot: Generator, size: int) -> Grid:
    frame = Frame(shot, size, turn=0.05)
    lobules = cloud(body, size, 6)
    echo: Grid = 0.22 + 0.45 * np.exp(-((np.abs(lobules) / 0.22) ** 2))  # dark fat between bright septa
    waves = 0.06 * np.sin(3 * frame.x + body.uniform(0, 6))
    gland, chest = body.uniform(-0.5, -0.2), body.uniform(0.45, 0.7)
    paint(echo, ((frame.y > gland + waves) & (frame.y < chest - 0.2 + waves)) * 0.8, 0.6 + 0.1 * cloud(body, size, 10))
    paint(echo, (frame.y > chest + waves) * 1.0, 0.3 + 0.12 * np.sin(40 * (frame.y - 0.15 * frame.x)))
    paint(echo, np.exp(-(((frame.y - chest - waves) / 0.03) ** 2)), 0.85)
    paint(echo, np.exp(-(((frame.y + 0.93) / 0.05) ** 2)), 0.95)
    if body.random() < 0.7:
        x, y = body.uniform(-0.35, 0.35), body.uniform(-0.25, 0.2)
        rx, ry, turn = body.uniform(0.14, 0.32), body.uniform(0.09, 0.2), body.normal(0, 0.25)
        below = frame.oval(x, y + 0.55, rx * 0.8, 0.5, soft=0.08)
        paint(echo, below * 0.6, body.choice([0.1, 0.85]))  # a shadow, or more echo, behind the lesion
        paint(echo, frame.oval(x, y, rx, ry, turn, soft=body.uniform(0.02, 0.07)), body.uniform(0.04, 0.16))
    return _scanned(echo, shot, fan=bool(shot.random() < 0.15))

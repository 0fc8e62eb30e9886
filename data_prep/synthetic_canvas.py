"""Soft shapes, vessels and smooth noise to draw the demo's images with; all are arrays (size, size)."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Grid = NDArray[np.float64]


class Frame:
    """Where the anatomy lies in the image: its own coordinates, -1 to 1, of every pixel."""

    def __init__(self, shot: Generator, size: int, turn: float = 0.1, shift: float = 0.06) -> None:
        self.size = size
        self.turn, self.zoom = shot.normal(0, turn), shot.uniform(0.82, 1.08)
        self.dx, self.dy = shot.normal(0, shift, 2)
        px, py = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size))
        u, v = (px - self.dx) / self.zoom, (py - self.dy) / self.zoom
        self.x: Grid = np.cos(self.turn) * u + np.sin(self.turn) * v
        self.y: Grid = -np.sin(self.turn) * u + np.cos(self.turn) * v

    def oval(
        self, cx: float, cy: float, rx: float, ry: float, turn: float = 0.0, soft: float = 0.03, box: float = 2.0
    ) -> Grid:
        """A mask from 0 to 1 with a soft edge; box 2 is an ellipse, more comes closer to a rectangle."""
        u, v = self.x - cx, self.y - cy
        u, v = np.cos(turn) * u + np.sin(turn) * v, -np.sin(turn) * u + np.cos(turn) * v
        distance = (np.abs(u / rx) ** box + np.abs(v / ry) ** box) ** (1 / box) - 1
        return 1 / (1 + np.exp((distance * min(rx, ry) / soft * 2).clip(-30, 30)))

    def tree(self, rng: Generator, roots: list[tuple[float, float, float]], width: float, bend: float) -> Grid:
        """A mask of vessels that wander and branch from roots (x, y, heading)."""
        scale = 4
        canvas = Image.new("L", (self.size * scale, self.size * scale))
        pen = ImageDraw.Draw(canvas)
        growing = [(x, y, heading, width, float(np.sign(x * np.sin(heading) or 1))) for x, y, heading in roots]
        while growing:
            x, y, heading, w, side = growing.pop()
            while w > 0.006 and x * x + y * y < 1.1:
                heading += side * bend + rng.normal(0, 0.12)
                nx, ny = x + 0.06 * np.cos(heading), y + 0.06 * np.sin(heading)
                pixels = [self._pixel(x, y, scale), self._pixel(nx, ny, scale)]
                pen.line(pixels, fill=255, width=max(1, round(w * self.zoom * self.size * scale / 2)))
                x, y, w = nx, ny, w * 0.94
                if rng.random() < 0.2:
                    growing.append((x, y, heading + rng.choice([-1, 1]) * rng.uniform(0.4, 0.9), w * 0.7, -side))
        return np.asarray(canvas.resize((self.size, self.size), Image.Resampling.BOX), dtype=np.float64) / 255

    def _pixel(self, x: float, y: float, scale: int) -> tuple[float, float]:
        u = (np.cos(self.turn) * x - np.sin(self.turn) * y) * self.zoom + self.dx
        v = (np.sin(self.turn) * x + np.cos(self.turn) * y) * self.zoom + self.dy
        return (u + 1) / 2 * self.size * scale, (v + 1) / 2 * self.size * scale


def cloud(rng: Generator, size: int, cells: int) -> Grid:
    """Smooth noise of about unit deviation with `cells` bumps across."""
    coarse = Image.fromarray(rng.normal(size=(cells + 3, cells + 3)).astype(np.float32))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
    return smooth / (smooth.std() + 1e-9)


def paint(image: Grid, mask: NDArray[np.floating], value: float | NDArray[np.floating]) -> None:
    """Cover `image`, in place, where the mask is 1."""
    image += (value - image) * mask


def exposed(image: Grid, shot: Generator, noise: float) -> Grid:
    """Another window, gamma and amount of noise for each image."""
    image = image.clip(0, 1) ** shot.uniform(0.8, 1.25)
    image = image * shot.uniform(0.8, 1.15) + shot.uniform(-0.02, 0.05)
    return image + shot.normal(size=image.shape) * noise * shot.uniform(0.6, 1.6)

"""Procedural images with the statistics of photographs: overlapping shapes of many sizes, called dead leaves."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float32]]
FEWEST, MOST = 60, 400  # shapes in an image
OBJECT, STRAIGHT = 0.7, 0.7  # shares of images with an object in the middle, and of images with upright shapes alone


def dead_leaves(count: int, channels: int, height: int, width: int, rng: np.random.Generator) -> Array:
    """Draw images of opaque shapes that cover each other, with values in [0, 1]: (count, channels, height, width).

    Radii follow a power law, so the images look alike at all scales, as photographs do (Lee, Mumford & Huang 2001, "Occlusion models for
    natural images"); networks learn useful filters from such images (Baradad et al. 2021, "Learning to see by looking at noise"). Every
    image draws its own contrast, colourfulness, power law, sharpness, light and texture. Some have an object in the middle, and some have
    upright shapes alone, as buildings have.

    Example:
        >>> pictures = dead_leaves(16, 3, 32, 32, np.random.default_rng(0))
    """
    return np.stack([_image(channels, height, width, rng) for _ in range(count)])


def _image(channels: int, height: int, width: int, rng: np.random.Generator) -> Array:
    from scipy.ndimage import gaussian_filter  # here, as it takes long to import

    side = max(height, width)
    base = rng.normal(0.47, 0.16) + rng.normal(0, 0.05, channels)
    contrast, chroma = _between(rng, 0.08, 0.3), rng.uniform(0, 0.6)
    shapes = _shapes(side, contrast, chroma, channels, rng)
    if rng.random() < OBJECT:
        _gather_object(shapes, side, rng)
    image = np.empty((height, width, channels), np.float32)
    image[:] = base
    _paint(image, shapes, base, contrast * rng.standard_normal(len(shapes["radius"])))
    blur = rng.uniform(0, 0.7) * side / 32
    image = gaussian_filter(image, (blur, blur, 0))
    image += _light(height, width, rng)[..., None]
    noise = _smooth_noise(1 + channels, height, width, rng)
    image += _between(rng, 0.003, 0.06) * (1.5 * noise[0, ..., None] + 0.3 * noise[1:].transpose(1, 2, 0))
    return np.clip(image, 0, 1).transpose(2, 0, 1)


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    """A number between two others, uniform in its logarithm."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _shapes(side: int, contrast: float, chroma: float, channels: int, rng: np.random.Generator) -> dict[str, Any]:
    """The shapes of an image, from back to front; the lengths are in pixels, centres in parts of the image."""
    count, smallest, power = int(rng.integers(FEWEST, MOST)), _between(rng, 0.02, 0.12), rng.uniform(1.2, 2.2)
    turn = rng.uniform(0, 2 * np.pi, count)
    if rng.random() < STRAIGHT:
        turn = np.round(turn / (np.pi / 2)) * np.pi / 2 + rng.normal(0, 0.05)
    return {
        "radius": np.clip(side * smallest * (rng.random(count) + 1e-4) ** (-1 / power), 1, 0.7 * side),
        "aspect": rng.uniform(0.3, 1, count),
        "turn": turn,
        "kind": rng.integers(0, 3, count),  # an ellipse, a rectangle or a triangle
        "centre": rng.uniform(-0.1, 1.1, (count, 2)),
        "colour": contrast * (rng.standard_normal((count, 1)) + chroma * rng.standard_normal((count, channels))),  # minus the mean colour
    }


def _gather_object(shapes: dict[str, Any], side: int, rng: np.random.Generator) -> None:
    """Move the shapes in front to the middle, and give them a colour in common."""
    count = int(rng.integers(3, 40))
    front, channels = slice(-count, None), shapes["colour"].shape[1]
    shapes["centre"][front] = rng.uniform(0.35, 0.65, 2) + rng.uniform(0.08, 0.2) * rng.standard_normal((count, 2))
    sizes = rng.uniform(0.04, 0.2) * (rng.random(count) + 0.05) ** -0.6
    shapes["radius"][front] = side * np.clip(sizes, 1 / side, 0.3)
    shapes["colour"][front] += rng.normal(0, 0.2) + rng.normal(0, 0.12, channels)


def _paint(image: Array, shapes: dict[str, Any], base: Any, shading: Any) -> None:
    """Paint the shapes over an image (height, width, channels), with soft edges one pixel wide and a change of brightness along each."""
    height, width, _ = image.shape
    x_all, y_all = np.arange(width, dtype=np.float32) + 0.5, np.arange(height, dtype=np.float32)[:, None] + 0.5
    long, short, turn = shapes["radius"], shapes["radius"] * shapes["aspect"], shapes["turn"]
    x, y = shapes["centre"].T * [[width], [height]]
    reach = 1 + np.hypot(long, short)
    left, right = (np.clip(edge, 0, width).astype(int) for edge in (x - reach, x + reach + 1))
    top, bottom = (np.clip(edge, 0, height).astype(int) for edge in (y - reach, y + reach + 1))
    colours, shading = (base + shapes["colour"]).astype(np.float32), shading.astype(np.float32)
    numbers = np.stack([x, y, long, short, np.cos(turn), np.sin(turn)], 1).tolist()  # Python's numbers keep float32 arrays in float32
    for i in np.flatnonzero((left < right) & (top < bottom)).tolist():
        box = slice(top[i], bottom[i]), slice(left[i], right[i])
        x0, y0, a, b, cos, sin = numbers[i]
        dx, dy = x_all[box[1]] - x0, y_all[box[0]] - y0
        u, v = (cos / a) * dx + (sin / a) * dy, (cos / b) * dy - (sin / b) * dx
        cover = np.clip(0.5 - b * _distance(shapes["kind"][i], u, v), 0, 1)
        colour = colours[i] + (shading[i] * u)[..., None]
        image[box] += cover[..., None] * (colour - image[box])


def _distance(kind: int, u: Any, v: Any) -> Any:
    """How far points are outside of a shape of radius one, negative inside."""
    if kind == 0:
        return np.hypot(u, v) - 1
    if kind == 1:
        return np.maximum(abs(u), abs(v)) - 1
    return np.maximum(-u, 0.5 * u + 0.866 * abs(v)) - 0.5


def _light(height: int, width: int, rng: np.random.Generator) -> Any:
    """A change of brightness from one side of the image to the other: (height, width)."""
    turn = rng.uniform(0, 2 * np.pi)
    x, y = np.arange(width) / width - 0.5, np.arange(height)[:, None] / height - 0.5
    return rng.uniform(0, 0.2) * (np.cos(turn) * x + np.sin(turn) * y)


def _smooth_noise(channels: int, height: int, width: int, rng: np.random.Generator) -> Any:
    """Noise with amplitudes that fall with the frequency f as 1/f, of standard deviation 1: (channels, height, width)."""
    spectrum = np.fft.rfft2(rng.standard_normal((channels, height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    noise = np.fft.irfft2(spectrum / np.maximum(frequency, 1 / max(height, width)), s=(height, width))
    return noise / noise.std(axis=(1, 2), keepdims=True)

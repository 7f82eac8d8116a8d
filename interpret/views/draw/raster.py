"""Numbers to pixels in plain numpy: colour maps with an explicit scale, and grids of small pictures.

Every signed map is centred on zero and coloured by the signed square root of value / limit, so that weak effects stay
visible beside strong ones; a quarter of the limit sits half-way along the colour bar.  The page draws with the same
tables, so a picture in W&B and a picture in the page agree.

All tables are built in OKLab (Ottosson 2020), where equal steps look equal: lightness alone carries the magnitude, so
they survive a grey print, and the hue pair blue/orange survives colour blindness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

LEVELS: Final = 255  # odd, so that zero has a colour of its own

# OKLab → LMS' → linear sRGB.
_OKLAB_TO_LMS = np.array(
    [[1.0, 0.3963377774, 0.2158037573], [1.0, -0.1055613458, -0.0638541728], [1.0, -0.0894841775, -1.2914855480]]
)
_LMS_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


def _linear_rgb(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    angle = np.deg2rad(hue)
    lab = np.stack([lightness, chroma * np.cos(angle), chroma * np.sin(angle)], -1)
    return (lab @ _OKLAB_TO_LMS.T) ** 3 @ _LMS_TO_RGB.T


def _table(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """OKLCh → sRGB, (n, 3) uint8.  Chroma shrinks where the screen cannot show it; lightness never gives way."""
    low, high = np.zeros_like(chroma), chroma.copy()
    for _ in range(20):
        middle = (low + high) / 2
        rgb = _linear_rgb(lightness, middle, hue)
        inside = ((rgb >= 0) & (rgb <= 1)).all(-1)
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    rgb = _linear_rgb(lightness, low, hue).clip(0, 1)
    encoded = np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)
    return np.round(encoded * 255).astype(np.uint8)


def _arm(hue_light: float, hue_dark: float, dark: float) -> np.ndarray:
    """From almost white to a dark, saturated end in (LEVELS + 1) / 2 steps; the same lightness for every hue."""
    t = np.linspace(0, 1, (LEVELS + 1) // 2)
    return _table(
        0.975 - (0.975 - dark) * t,
        0.155 * np.sin(np.pi / 2 * np.minimum(1, 1.4 * t)),
        hue_light + (hue_dark - hue_light) * t,
    )


def _sequential() -> np.ndarray:
    t = np.linspace(0, 1, LEVELS)
    return _table(0.975 - 0.7 * t, 0.14 * np.sin(np.pi / 2 * np.minimum(1, 2 * t)), 110 + 175 * t)


DIVERGING: Final = np.concatenate([_arm(240, 262, 0.45)[:0:-1], _arm(72, 42, 0.45)])  # blue − white − orange
SEQUENTIAL: Final = _sequential()  # pale yellow − green − blue, darker is more
NO_VALUE: Final = np.array([150, 150, 150], np.uint8)

# Kinds must not be mistaken for the blue and orange of signed maps, hence purple, green, gold; grey is "nothing here".
CATEGORIES: Final = ("#7b4aa5", "#1f9e77", "#e3b505", "#b4bac3", "#d1495b", "#5aa9e6")
# Lines and bars: distinct in hue and in lightness.
SERIES: Final = ("#2f6fb5", "#e08214", "#2a9d7c", "#9a57a8", "#7d8794", "#c0483d", "#6fb7e4", "#b0a000")


def hex_rgb(colour: str) -> np.ndarray:
    """'#rrggbb' → (3,) uint8."""
    return np.frombuffer(bytes.fromhex(colour[1:]), np.uint8)


def signed_sqrt(values: np.ndarray, limit: float) -> np.ndarray:
    """sign(v) · sqrt(|v| / limit), saturating at ±1; all zero where the limit is zero."""
    if limit <= 0:
        return np.zeros_like(values, dtype=np.float64)
    return np.sign(values) * np.sqrt(np.minimum(np.abs(values) / limit, 1))


def colour_signed(values: np.ndarray, limit: float) -> np.ndarray:
    """(…) → (…, 3) uint8 on the blue–white–orange scale of ±limit."""
    return _look_up(DIVERGING, (signed_sqrt(values, limit) + 1) / 2)


def colour_positive(values: np.ndarray, limit: float) -> np.ndarray:
    """(…) → (…, 3) uint8 on the scale 0…limit; what is below zero reads as zero."""
    return _look_up(SEQUENTIAL, signed_sqrt(np.maximum(values, 0), limit))


def colour_category(values: np.ndarray) -> np.ndarray:
    """Indices (…) → (…, 3) uint8; colours repeat after the sixth category."""
    return np.stack([hex_rgb(c) for c in CATEGORIES])[np.asarray(values, np.int64) % len(CATEGORIES)]


def colour_image(values: np.ndarray) -> np.ndarray:
    """Images in [0,1] → uint8."""
    return np.round(np.nan_to_num(values).clip(0, 1) * 255).astype(np.uint8)


def _look_up(table: np.ndarray, position: np.ndarray) -> np.ndarray:
    finite = np.isfinite(position)
    index = np.round(np.where(finite, position, 0) * (len(table) - 1)).astype(np.int64)
    return np.where(finite[..., None], table[index], NO_VALUE)


def overlay(colours: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Colours of a map shaded by the luminance of an image of the same size, both (…, 3) uint8.

    Shading keeps the hue, hence the sign; the dark parts of the image stay at 70 % so that colours still match the scale.
    """
    luminance = image.astype(np.float32) @ np.array([0.2126, 0.7152, 0.0722], np.float32) / 255
    return np.round(colours * (0.7 + 0.3 * luminance[..., None])).astype(np.uint8)


def resize_nearest(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w, …) → (height, width, …) without inventing values."""
    rows = (np.arange(height) * picture.shape[0]) // height
    columns = (np.arange(width) * picture.shape[1]) // width
    return picture[rows[:, None], columns]


def compose(rows: Sequence[Sequence[np.ndarray]], tile: int = 96, gap: int = 6, background: int = 255) -> np.ndarray:
    """A grid of pictures (h, w, 3) uint8, each scaled to ``tile`` pixels a side, as one picture."""
    columns = max((len(row) for row in rows), default=0)
    step = tile + gap
    canvas = np.full((max(len(rows) * step - gap, 1), max(columns * step - gap, 1), 3), background, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            canvas[i * step : i * step + tile, j * step : j * step + tile] = resize_nearest(picture, tile, tile)
    return canvas


def nice_limit(value: float) -> float:
    """The next of 1, 2, 5 × 10ᵏ at or above a magnitude, so that a scale seldom changes between epochs."""
    if not np.isfinite(value) or value <= 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9)))

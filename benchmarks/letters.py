"""Printed letters as small distorted images, drawn from the fonts that Matplotlib brings."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from benchmarks.loop import Columns

# without the small letters that are capitals once they are scaled, and i and l, which nobody tells apart at 8 x 8
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghmnqrt"
SIZE = 8
_FONTS = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmr10", "cmss10", "cmtt10")
_CELL, _DRAWN = 48, 32  # pixels: of a glyph before it is distorted, and after
_THICKENED = 0.5


def draw(count: int, seed: int = 0) -> Columns:
    """pixel_values (count, 1, SIZE, SIZE) in [-1, 1], and labels (count,), the indices in LETTERS.

    Each is turned, sheared, scaled and moved at random; half of them are thickened.
    """
    generator = torch.Generator().manual_seed(seed)
    glyphs = _glyphs()
    labels = torch.randint(glyphs.shape[0], (count,), generator=generator)
    fonts = torch.randint(glyphs.shape[1], (count,), generator=generator)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, shear = uniform(-0.35, 0.35), uniform(-0.4, 0.4)
    across, down = uniform(0.35, 0.6), uniform(0.38, 0.55)
    first = torch.stack([angle.cos() * across, (shear - angle.sin()) * down, uniform(-0.08, 0.08)], dim=1)
    second = torch.stack([angle.sin() * across, angle.cos() * down, uniform(-0.08, 0.08)], dim=1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), [count, 1, _DRAWN, _DRAWN], align_corners=False)
    images = F.grid_sample(glyphs[labels, fonts][:, None], grid, align_corners=False)
    thick = (torch.rand(count, generator=generator) < _THICKENED)[:, None, None, None]
    images = torch.where(thick, F.max_pool2d(images, 3, stride=1, padding=1), images)
    images = F.avg_pool2d(images, _DRAWN // SIZE)
    images = images / images.amax((1, 2, 3), keepdim=True).clamp(min=0.1)
    return {"pixel_values": 2 * images - 1, "labels": labels}


def _glyphs() -> torch.Tensor:
    """(letters, fonts, _CELL, _CELL) in [0, 1]."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = sorted(path for path in folder.glob("*.ttf") if path.stem.startswith(_FONTS) and "Display" not in path.stem)
    fonts = [ImageFont.truetype(str(path), _CELL // 2) for path in files]
    return torch.from_numpy(np.array([[_glyph(letter, font) for font in fonts] for letter in LETTERS]))


def _glyph(letter: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    image = Image.new("L", (_CELL, _CELL), 0)
    ImageDraw.Draw(image).text((_CELL / 2, _CELL / 2), letter, font=font, fill=255, anchor="mm")
    return np.asarray(image, dtype=np.float32) / 255

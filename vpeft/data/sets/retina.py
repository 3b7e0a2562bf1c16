"""How TensorFlow Datasets changes pixels before it stores them: eyes of ``btgraham-300``, and images of fewer pixels.

It does so with OpenCV; here it is the same rule in torch and SciPy, which may differ by a few grey levels.
"""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter

RADIUS = 300  # pixels, of an eye
KEPT = 0.9  # of the radius
GREY = 128
PIXELS = 120_000  # at most, of SUN397


def _resized(pixels: np.ndarray, factor: float) -> np.ndarray:
    """(H, W, 3) of uint8, linearly and without antialias."""
    size = [max(1, round(side * factor)) for side in pixels.shape[:2]]
    image = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    out = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=False)[0].permute(1, 2, 0)
    return out.round().clamp(0, 255).to(torch.uint8).numpy()


def _encoded(pixels: np.ndarray, quality: int) -> Image.Image:
    """What is left of pixels that were stored as JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return image.convert("RGB")


def within_pixels(image: Image.Image) -> Image.Image:
    """An image of SUN397 as it is stored: at most 120,000 pixels, as JPEG of OpenCV's usual quality."""
    pixels = np.array(image)
    count = pixels.shape[0] * pixels.shape[1]
    if count > PIXELS:
        pixels = _resized(pixels, (PIXELS / count) ** 0.5)
    return _encoded(pixels, 95)


def prepared(image: Image.Image) -> Image.Image:
    """An image of an eye: of radius 300, less its local average, grey outside of nine tenths of the radius, cut to that."""
    pixels = np.array(image)
    row = pixels[pixels.shape[0] // 2].sum(1)
    radius = (row > row.mean() / 10).sum() / 2
    radius = radius if radius >= 1 else pixels.shape[0] / 2  # of dark images, as is done there
    pixels = _resized(pixels, RADIUS / radius)
    whole = pixels.astype(np.float32)
    blurred = np.stack([gaussian_filter(whole[..., c], RADIUS / 30, mode="mirror", truncate=3.0) for c in range(3)], -1)
    sharp = (4 * whole - 4 * np.rint(blurred) + GREY).round().clip(0, 255)
    height, width = sharp.shape[:2]
    middle, kept = (height // 2, width // 2), int(RADIUS * KEPT)
    y, x = np.ogrid[:height, :width]
    inside = ((y - middle[0]) ** 2 + (x - middle[1]) ** 2 <= kept**2)[..., None]
    result = np.where(inside, sharp, GREY).astype(np.uint8)
    cut = tuple(slice(max(m - kept, 0), min(m + kept, side)) for m, side in zip(middle, (height, width), strict=True))
    return _encoded(result[cut], 72)

"""Random changes of training images, each a function of the row's own generator."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtransfer.data.dataset import DataError

if TYPE_CHECKING:
    from PIL import Image as pil

RATIO = (3 / 4, 4 / 3)
_ERASED = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """How training images vary, in this order; nothing by default.

    Attributes:
      crop_scale: a crop of a random area, (smallest, largest) as parts of the image, is resized to the model's size
        (Szegedy et al. 2015); instead of the resizing and the centre crop of evaluation.
      crop_ratio: of that crop's width to its height, (smallest, largest); None is (3/4, 4/3).
      pad: so many black pixels at each edge, then a random crop of the model's size (He et al. 2016, CIFAR).
      flip: left to right, of every other image.
      rotate: by up to so many degrees to either side, about the centre, over black.
      brightness: a factor between 1 - brightness and 1 + brightness, in [0, 1].
      contrast: a factor between 1 - contrast and 1 + contrast about the mean grey, in [0, 1].
      erase: the probability that a rectangle of 2 to 33 % of the area is set to the mean (Zhong et al. 2020).
    """

    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] | None = None
    pad: int = 0
    flip: bool = False
    rotate: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise DataError(f"crop_scale: must be (a, b) with 0 < a <= b <= 1, got {self.crop_scale}")
        if self.crop_ratio is not None and not 0 < self.crop_ratio[0] <= self.crop_ratio[1] < math.inf:
            raise DataError(f"crop_ratio: must be (a, b) with 0 < a <= b, got {self.crop_ratio}")
        if self.crop_ratio is not None and self.crop_scale is None:
            raise DataError("crop_ratio: is only read with crop_scale, which is not given")
        if self.pad < 0:
            raise DataError(f"pad: must be at least 0 pixels, got {self.pad}")
        if not 0 <= self.rotate <= 180:
            raise DataError(f"rotate: must be in [0, 180] degrees, got {self.rotate}")
        for field in ("brightness", "contrast", "erase"):
            if not 0 <= getattr(self, field) <= 1:
                raise DataError(f"{field}: must be in [0, 1], got {getattr(self, field)}")


def random_crop(image: "pil.Image", augment: Augment, size: tuple[int, int], resample: Any, rng: Any) -> "pil.Image":
    """A crop of random area and shape, resized to (H, W); where ten tries do not fit, the largest central crop."""
    assert augment.crop_scale is not None
    width, height = image.size
    low, high = augment.crop_ratio or RATIO
    for _ in range(10):
        area = width * height * rng.uniform(*augment.crop_scale)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            break
    else:
        w, h = min(width, round(height * high)), min(height, round(width / low))
        left, top = (width - w) // 2, (height - h) // 2
    part = image.crop((int(left), int(top), int(left) + w, int(top) + h))
    return part.resize((size[1], size[0]), resample)


def vary(image: "pil.Image", augment: Augment, rng: np.random.Generator) -> "pil.Image":
    """Everything between the crop and the erasing; the size stays."""
    from PIL import Image, ImageEnhance

    if augment.pad:
        left, top = (int(n) for n in rng.integers(-augment.pad, augment.pad + 1, 2))
        image = image.crop((left, top, left + image.width, top + image.height))  # black beyond the edges
    if augment.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augment.rotate:
        image = image.rotate(rng.uniform(-augment.rotate, augment.rotate), Image.Resampling.BILINEAR)
    if augment.brightness:
        image = ImageEnhance.Brightness(image).enhance(1 + rng.uniform(-1, 1) * augment.brightness)
    if augment.contrast:
        image = ImageEnhance.Contrast(image).enhance(1 + rng.uniform(-1, 1) * augment.contrast)
    return image


def erase(pixels: np.ndarray, augment: Augment, rng: np.random.Generator) -> np.ndarray:
    """A random rectangle of normalised pixels (H, W, C) becomes 0, the mean; in place."""
    if augment.erase and rng.random() < augment.erase:
        height, width = pixels.shape[:2]
        for _ in range(10):
            area = height * width * rng.uniform(*_ERASED)
            ratio = math.exp(rng.uniform(math.log(_ERASED_RATIO[0]), math.log(_ERASED_RATIO[1])))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < h < height and 0 < w < width:
                top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
                pixels[top : top + h, left : left + w] = 0
                break
    return pixels

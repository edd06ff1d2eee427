"""How a source's images are prepared, read from its own `preprocessor_config.json` and held to transformers' result."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtransfer.data.dataset import DataError
from jaxtransfer.types import Source

if TYPE_CHECKING:
    from PIL import Image as pil

FILE = "preprocessor_config.json"
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's, by the numbers under which preprocessor_config.json knows them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """From an image of 8 bits a channel to pixels: ``(rescale * crop(resize(image)) - mean) / std``.

    Attributes:
      channels: 1 or 3.
      resize: to (H, W), or the shorter side to so many pixels; None: not.
      crop: the centre, (H, W), black where the image is smaller; None: not.
      resample: one of Pillow's filters.
      rescale: what a level of grey is multiplied by.
      mean, std: of each channel.
      grey: whether colour is turned into grey (ITU-R 601).
      notes: what the source left open, for the log.
    """

    channels: int = 3
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    resample: str = "bilinear"
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    grey: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DataError(f"channels: must be 1 or 3, got {self.channels}")
        for field in ("mean", "std"):
            if len(getattr(self, field)) != self.channels:
                raise DataError(
                    f"{field}: has {len(getattr(self, field))} values, the model takes {self.channels} channels"
                )
        if not all(value > 0 for value in self.std):
            raise DataError(f"std: must be positive, got {self.std}")
        if self.resample not in FILTERS:
            raise DataError(f"resample: must be one of {', '.join(FILTERS)}, got {self.resample!r}")
        sides = [self.resize] if isinstance(self.resize, int) else [*(self.resize or ()), *(self.crop or ())]
        if any(side < 1 for side in sides):
            raise DataError(f"size: must be positive pixels, got resize {self.resize}, crop {self.crop}")
        if isinstance(self.resize, int) and self.crop is None:
            raise DataError(f"size: a shorter side of {self.resize} without a centre crop fixes no size; set size")

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) of the pixels; None as the images are."""
        return self.crop if self.crop is not None or isinstance(self.resize, int) else self.resize

    @property
    def filter(self) -> int:
        """Pillow's number of the filter."""
        return FILTERS.index(self.resample)

    @property
    def fields(self) -> dict[str, Any]:
        """What a `preprocessor_config.json` says of it: all but that colour is turned into grey.

        The two classes compute alike; a ViT's is the one that every version of transformers reads, without a crop.
        """
        out: dict[str, Any] = {"image_processor_type": f"{'ViT' if self.crop is None else 'Bit'}ImageProcessor"}
        out |= {"do_convert_rgb": self.channels == 3, "do_resize": self.resize is not None}
        if self.resize is not None:
            side = {"shortest_edge": self.resize} if isinstance(self.resize, int) else _sides(self.resize)
            out |= {"size": side, "resample": self.filter}
        out["do_center_crop"] = self.crop is not None
        if self.crop is not None:
            out["crop_size"] = _sides(self.crop)
        out |= {"do_rescale": True, "rescale_factor": self.rescale}
        return {**out, "do_normalize": True, "image_mean": list(self.mean), "image_std": list(self.std)}

    def fit(self, image: "pil.Image") -> "pil.Image":
        """The image at its size: resized, then cropped."""
        if self.resize is not None:
            height, width = self.resize if isinstance(self.resize, tuple) else _shorter(image, self.resize)
            image = image.resize((width, height), self.filter)
        if self.crop is not None:
            top, left = (image.height - self.crop[0]) // 2, (image.width - self.crop[1]) // 2
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        return image

    def normalise(self, image: "pil.Image") -> np.ndarray:
        """Pixels (H, W, C) float32."""
        pixels = np.asarray(image, np.uint8).reshape(image.height, image.width, self.channels)
        mean, std = (np.array(values, np.float32) for values in (self.mean, self.std))
        return (pixels * np.float32(self.rescale) - mean) / std

    def __call__(self, image: "pil.Image") -> np.ndarray:
        """Pixels (H, W, C) float32 of an image of mode ``L`` (one channel) or ``RGB`` (three)."""
        return self.normalise(self.fit(image))


def _sides(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}


def _shorter(image: "pil.Image", side: int) -> tuple[int, int]:
    """(H, W) with the shorter side of so many pixels; the longer is rounded down, as torchvision does."""
    height, width = image.size[::-1]
    return (side, int(side * width / height)) if height < width else (int(side * height / width), side)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What a class of transformers does where its file is silent: an int ``size`` is a square, the centre is cut."""

    square: bool
    crop: bool
    filter: int


_BIT = _Kind(square=False, crop=True, filter=3)
_KINDS = {
    "ViT": _Kind(square=True, crop=False, filter=2),
    "DeiT": _Kind(square=True, crop=True, filter=3),
    "Bit": _BIT,
    "CLIP": _BIT,
    "ConvNext": _Kind(square=False, crop=False, filter=3),
}
_TYPE = re.compile(rf"({'|'.join(_KINDS)})(ImageProcessor|FeatureExtractor)(Fast|Pil)?")
_KIND_OF_MODEL = {"vit": "ViT", "deit": "DeiT", "dinov2": "Bit", "resnet": "ConvNext"}
_READ = {
    "image_processor_type", "feature_extractor_type", "do_resize", "size", "default_to_square", "do_center_crop",
    "crop_size", "crop_pct", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
}  # fmt: skip
# Without a part in the pixels: conversion to RGB is ours to do or to refuse, the rest is about calls and classes.
_HARMLESS = {
    "do_convert_rgb", "processor_class", "data_format", "input_data_format", "return_tensors", "device",
    "disable_grouping", "image_seq_length", "model_input_names", "_valid_processor_keys", "pad_size",
}  # fmt: skip


def processor(
    source: Source,
    *,
    size: int | tuple[int, int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    resample: str | None = None,
    channels: int | None = None,
) -> ImageProcessor:
    """How the source prepares images: by its `preprocessor_config.json`, else to its model's size with mean, std 0.5.

    Args:
      source: a model, with its files. Where its images have got another size since these were written
        (`adapt.resize`), it is that size; where it is known how a run prepared them, that goes before the files.
      size: (H, W) of the pixels, or a square's side, instead; a centre crop keeps its part of the image.
      mean, std: instead; one value stands for every channel.
      resample: one of Pillow's filters, instead.
      channels: of a model whose configuration does not say it. Asking for 1 also asks to turn colour into grey, which
        is otherwise refused.

    Raises:
      DataError: a file that is not JSON, a field that changes the pixels and is not supported, one that is missing, or
        means of another number of channels.
    """
    config, ref = source.model.config, source.lineage.ref
    size = source.assets.get("image_size") if size is None else size
    own = getattr(config, "num_channels", None)
    if channels is not None and own not in (None, channels):
        raise DataError(f"channels: {channels}, but the model takes {own} (num_channels)")
    depth = own or channels or 3
    notes: tuple[str, ...] = ()
    if (known := source.assets.get("processor")) is not None:
        how = {name: getattr(known, name) for name in ("resize", "crop", "resample", "rescale", "mean", "std")}
    elif (path := source.assets.get("files", {}).get(FILE)) is not None:
        family = source.assets.get("config", {}).get("model_type", source.model.family)
        how = _of_file(Path(path), f"{ref}: {FILE}", family)
    else:
        how = {"resize": _pair(getattr(config, "image_size", None)), "mean": 0.5, "std": 0.5}
        unknown = {"size": size, "mean": mean, "std": std}
        if left := [name for name, value in unknown.items() if value is None]:
            told = "as they are" if how["resize"] is None else "at {} x {}".format(*how["resize"])
            notes = (f"{ref}: has no {FILE}; images are taken {told}, with mean and std 0.5, but for what is set: "
                     f"not set are {', '.join(left)}",)  # fmt: skip
    if size is not None:
        how |= _at_size(how, (size, size) if isinstance(size, int) else (size[0], size[1]))
    for name, value in {"mean": mean, "std": std}.items():
        how[name] = _per_channel(how[name] if value is None else value, depth, name)
    if resample is not None:
        how["resample"] = resample
    return ImageProcessor(channels=depth, grey=channels == 1, notes=notes, **how)


def _of_file(path: Path, name: str, family: str) -> dict[str, Any]:
    """The fields of `ImageProcessor` that a preprocessor_config.json gives."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: cannot be read: {error}") from None
    kind, cls = _kind(fields, name, family)
    for field, value in fields.items():
        if field not in _READ | _HARMLESS and value not in (None, False):
            raise DataError(
                f"{name}: field {field}={value!r} is not supported; set size, mean and std without the file"
            )
    out: dict[str, Any] = {"rescale": 1.0, "mean": 0.0, "std": 1.0, "resize": None, "crop": None}
    try:
        if fields.get("do_resize", True):
            out |= _resizing(fields, kind, cls == "ConvNext")
            out["resample"] = _filter(fields.get("resample", kind.filter))
        if fields.get("do_center_crop", kind.crop):
            out["crop"] = _pair(fields["crop_size"])
        if fields.get("do_rescale", True):
            out["rescale"] = float(fields.get("rescale_factor", 1 / 255))
        if fields.get("do_normalize", True):
            out |= {"mean": fields["image_mean"], "std": fields["image_std"]}
    except KeyError as error:
        raise DataError(f"{name}: lacks the field {error.args[0]}") from None
    except (TypeError, ValueError, IndexError) as error:
        raise DataError(f"{name}: {error}") from None
    return out


def _kind(fields: Any, name: str, family: str) -> tuple[_Kind, str]:
    if not isinstance(fields, dict):
        raise DataError(f"{name}: expected one JSON object")
    given = fields.get("image_processor_type") or fields.get("feature_extractor_type")
    if given is None:
        cls = _KIND_OF_MODEL.get(family, "ViT")
    elif found := _TYPE.fullmatch(str(given)):
        cls = found[1]
    else:
        raise DataError(f"{name}: image_processor_type {given!r} is not supported; known: {', '.join(_KINDS)}")
    return _KINDS[cls], cls


def _resizing(fields: Mapping[str, Any], kind: _Kind, convnext: bool) -> dict[str, Any]:
    size = fields["size"]
    if isinstance(size, int):
        square = fields.get("default_to_square", kind.square)
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    if not isinstance(size, dict) or size.keys() not in ({"height", "width"}, {"shortest_edge"}):
        raise ValueError(f"size={size!r} is not supported; it can be height and width, or shortest_edge")
    if not convnext:
        return {"resize": size.get("shortest_edge") or _pair(size)}
    side = size["shortest_edge"]
    if side >= 384:  # as transformers has it: no crop from there on
        return {"resize": (side, side)}
    return {"resize": int(side / fields.get("crop_pct", 224 / 256)), "crop": (side, side)}


def _filter(number: Any) -> str:
    if number not in range(len(FILTERS)):
        raise ValueError(f"resample={number!r} is not supported; it is the number of one of {', '.join(FILTERS)}")
    return FILTERS[number]


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, dict):
        return int(size["height"]), int(size["width"])
    return (size, size) if isinstance(size, int) else None if size is None else (int(size[0]), int(size[1]))


def _at_size(how: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Another size by the same fractions: of 256 cut to 224, a size of 32 makes 37 cut to 32."""
    resize, crop = how.get("resize"), how.get("crop")
    if crop is None:
        return {"resize": size}
    scales = size[0] / crop[0], size[1] / crop[1]
    if resize is None:
        return {"crop": size}
    if isinstance(resize, int):
        return {"resize": round(resize * max(scales)), "crop": size}
    return {"resize": (round(resize[0] * scales[0]), round(resize[1] * scales[1])), "crop": size}


def _per_channel(values: Any, channels: int, field: str) -> tuple[float, ...]:
    """One value for each channel; of equal values, as many as there are channels."""
    values = tuple(map(float, values)) if isinstance(values, (list, tuple)) else (float(values),)
    if len(values) != channels and len(set(values)) > 1:
        raise DataError(
            f"{field}: has {len(values)} different values, the model takes {channels} channels; set {field}"
        )
    return values if len(values) == channels else values[:1] * channels

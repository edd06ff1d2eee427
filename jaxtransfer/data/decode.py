"""One stored image into 8 bits a channel, or a refusal that names what is wrong with it.

Nothing is guessed: what would lose information (depth, transparency, an unprofiled colour space) is refused with the
way to convert it, what loses none (a palette, an opaque alpha channel, grey into three channels) is done and told.
"""

import io
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtransfer.data.catalogs import first_line
from jaxtransfer.data.dataset import DataError

if TYPE_CHECKING:
    from PIL import Image as pil

PIXELS = 2**26
"""The largest image that is decoded, 8192 x 8192; a header that claims more is refused before any pixel is read."""
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")  # Pillow reads more; some by running other programs
_REFUSED = {
    "CMYK": "is CMYK, whose colours depend on a profile; convert it: magick FILE -colorspace sRGB NEW",
    "I": "has 32 bits a channel; scale it to 8",
    "F": "holds floats; scale it to 8 bits a channel",
}


class ImageError(DataError):
    """An image that cannot be used; the message follows its name."""


def quiet() -> None:
    """Silences Pillow's warnings in this process: what matters in them is checked here.

    Not by ``catch_warnings`` where an image is decoded: that happens in threads, among which the filters are shared.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def stored(value: Any) -> bytes | np.ndarray:
    """What a row holds of its image: the bytes of a file, or an array.

    Args:
      value: a path, bytes, an array, or ``{"bytes": ..., "path": ...}`` as Hugging Face stores it.

    Raises:
      ImageError: no such file, an empty one, or a value that is none of these.
    """
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, (str, Path)) and str(value).strip():
        try:
            value = Path(value).read_bytes()
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror}") from None
    if not isinstance(value, bytes):
        raise ImageError(f"is {value!r}, expected a path, bytes or an array")
    if not value:
        raise ImageError("is empty, it has no bytes")
    return value


def decode(data: bytes | np.ndarray, channels: int, grey: bool) -> tuple["pil.Image", list[str]]:
    """The image as grey (mode ``L``) or RGB of 8 bits a channel, upright, and what was done to it.

    Args:
      data: from :func:`stored`.
      channels: 1 or 3; grey images fill three channels alike.
      grey: colour is turned into grey by ITU-R 601 first; otherwise a colour image for one channel is refused.

    Raises:
      ImageError: it cannot be decoded, or not without a loss that nobody asked for.
    """
    image, notes = _from_array(data) if isinstance(data, np.ndarray) else _from_bytes(data)
    image = _plain(image, notes)
    if image.mode == "RGB" and grey:
        image = image.convert("L")
    if image.mode == "RGB" and channels == 1:
        raise ImageError("has 3 channels, the model takes 1; set channels: 1 to turn colour into grey")
    if image.mode == "L" and channels == 3:
        notes.append("grey, repeated in three channels")
        image = image.convert("RGB")
    return image, notes


def _from_bytes(data: bytes) -> tuple["pil.Image", list[str]]:
    from PIL import Image, ImageOps, UnidentifiedImageError

    notes = []
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > PIXELS:
            raise Image.DecompressionBombError
        if image.tile and re.search(r";16[BLN]", str(image.tile[0][3])):  # read as 8 bits otherwise, by cutting
            raise ImageError("has 16 bits a channel; scale it to 8")
        image.load()
        if getattr(image, "n_frames", 1) > 1:
            notes.append("of several frames, the first is taken")
            image.seek(0)
            image.load()
        if image.getexif().get(0x0112, 1) != 1:
            image = ImageOps.exif_transpose(image)
            notes.append("turned upright as its EXIF says")
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"has more than {PIXELS:,} pixels; scale it down first") from None
    except UnidentifiedImageError:
        raise ImageError(f"is no image of a known format ({', '.join(_FORMATS)}), or cut off in its header") from None
    except Exception as error:  # Pillow raises whatever its decoders met
        raise ImageError(f"is truncated or broken: {first_line(error)}") from None
    return image, notes


def _from_array(array: np.ndarray) -> tuple["pil.Image", list[str]]:
    from PIL import Image

    notes = []
    layout = array.ndim == 2 or (array.ndim == 3 and array.shape[2] <= 4)
    if not layout or 0 in array.shape:
        raise ImageError(f"has the shape {array.shape}, expected (H, W) or (H, W, C) with 1 to 4 channels")
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ImageError(f"holds floats from {array.min():g} to {array.max():g}; they must lie in 0 to 1")
        array = np.round(array * 255).astype(np.uint8)
        notes.append("of floats, rounded to 8 bits")
    if array.dtype != np.uint8:
        raise ImageError(f"is {array.dtype}, expected uint8, or floats in 0 to 1")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array), notes


def _plain(image: "pil.Image", notes: list[str]) -> "pil.Image":
    """Mode ``L`` or ``RGB``, from every other that holds no more."""
    if refusal := _REFUSED.get(image.mode):
        raise ImageError(refusal)
    if image.mode.startswith("I;16"):
        raise ImageError("has 16 bits a channel; scale it to 8")
    if image.has_transparency_data:
        if image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise ImageError("is partly transparent; flatten it: magick FILE -background white -flatten NEW")
        notes.append("with an alpha channel that is opaque, dropped")
    if image.mode in ("P", "PA"):
        notes.append("with a palette, looked up")
    target = {"1": "L", "L": "L", "LA": "L", "RGB": "RGB", "RGBA": "RGB", "P": "RGB", "PA": "RGB"}.get(image.mode)
    if target is None:
        raise ImageError(f"is of the mode {image.mode}; convert it to RGB")
    image.info.pop("transparency", None)
    return image if image.mode == target else image.convert(target)

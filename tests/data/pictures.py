"""Images in every state that a file can be in, and sources that only say how theirs are prepared."""

import io
import json
import struct
import zlib
from types import SimpleNamespace

import numpy as np
from PIL import Image

from jaxtransfer.types import Lineage, Model, Source


def noise(height=12, width=9, channels=3, seed=0):
    """A random image as an array, smooth enough for JPEG."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    image = Image.fromarray(small[..., 0] if channels == 1 else small)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def encoded(image, kind="PNG", **options):
    """The bytes of an image file."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, depth, colour, rows):
    """A PNG made by hand: of a depth, or with a header, that Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bad():
    """Name -> bytes of an image that cannot be used, and what is said about it."""
    rgb = Image.fromarray(noise(60, 50))
    clear = rgb.copy()
    clear.putalpha(128)
    deep = (np.arange(6, dtype=np.uint16) * 9000).reshape(2, 3)
    wide = b"".join(b"\0" + row.astype(">u2").repeat(3).tobytes() for row in deep)
    whole = {kind: encoded(rgb, kind) for kind in ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")}
    return {
        **{f"half.{kind.lower()}": (data[: len(data) // 2], "truncated|cut off") for kind, data in whole.items()},
        "zero.png": (b"", "is empty, it has no bytes"),
        "text.jpg": (b"<html>not found</html>", "is no image of a known format"),
        "print.jpg": (encoded(rgb.convert("CMYK"), "JPEG"), "is CMYK"),
        "deep.png": (encoded(deep), "16 bits a channel"),
        "deeprgb.png": (png(3, 2, 16, 2, wide), "16 bits a channel"),
        "deep.tif": (encoded(deep.astype(np.int32), "TIFF"), "32 bits a channel"),
        "float.tif": (encoded(deep.astype(np.float32), "TIFF"), "holds floats"),
        "bomb.png": (png(9000, 9000, 8, 2, b"\0" * 9), "more than 67,108,864 pixels"),
        "megabomb.png": (png(90_000, 90_000, 8, 2, b"\0" * 9), "more than 67,108,864 pixels"),
        "clear.png": (encoded(clear), "partly transparent"),
        "lab.tif": (encoded(Image.new("LAB", (4, 4)), "TIFF"), "of the mode LAB"),
    }


def source(folder=None, preprocessor=None, family="vit", **config):
    """A source of which only the configuration and the preprocessor's file matter."""
    files = {}
    if preprocessor is not None:
        path = folder / "preprocessor_config.json"
        path.write_text(preprocessor if isinstance(preprocessor, str) else json.dumps(preprocessor))
        files = {"preprocessor_config.json": str(path)}
    model = Model(family, SimpleNamespace(**config), (), {})
    return Source(model, {}, Lineage("tiny", "0"), {"files": files, "config": {"model_type": family}})

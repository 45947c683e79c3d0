"""A picture that somebody hands in: read with care, or refused in one sentence. Loads no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageOps

from psd.errors import RequestError

MAX_IMAGE_SIDE_PX = 4096
MAX_IMAGE_BYTES = 10 * 2**20
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")  # nothing that reaches Pillow's rarer decoders (EPS calls Ghostscript)


def check_image(path: str | Path) -> Float32[np.ndarray, "H W 3"]:
    """The picture in a file as RGB in [0, 1], upright, transparency on white.

    Size and format are read from the header; pixels are decoded only once those pass, so that a small file cannot
    unfold into gigabytes. Only the first frame of an animation counts. Raises RequestError, never naming the folder.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"image {path.name!r} is not a file: upload a PNG, JPEG or WebP picture.")
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise RequestError(
            f"image {path.name!r} has {path.stat().st_size / 2**20:.1f} MB, at most {MAX_IMAGE_BYTES // 2**20} MB "
            "are allowed: save it smaller."
        )
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if max(width, height) > MAX_IMAGE_SIDE_PX:
                raise RequestError(
                    f"image {path.name!r} is {width} x {height} pixels, at most {MAX_IMAGE_SIDE_PX} a side "
                    "are allowed: scale it down."
                )
            if image.mode.startswith(("I", "F")):
                raise RequestError(f"image {path.name!r} has more than 8 bits a channel: save it as 8-bit RGB.")
            rgba = ImageOps.exif_transpose(image).convert("RGBA")
    except RequestError:
        raise
    except Exception as error:  # a decoder meets hostile bytes here and may raise anything
        raise RequestError(
            f"image {path.name!r} cannot be read: upload an undamaged PNG, JPEG or WebP picture."
        ) from error
    white = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"), dtype=np.float32) / np.float32(255)

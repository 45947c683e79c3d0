"""A picture that somebody hands in: read with care, or refused in one sentence. Loads no torch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageOps

from psd.errors import RequestError

MAX_IMAGE_SIDE_PX = 4096
MAX_WEBP_PIXELS = 2**23  # its decoder holds a picture four times
READ_SIDE_PX = 2048  # larger pictures are averaged down to it: rewards look at a few hundred
MAX_IMAGE_BYTES = 10 * 2**20
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")  # nothing that reaches Pillow's rarer decoders (EPS calls Ghostscript)


def check_image(path: str | Path) -> Float32[np.ndarray, "H W 3"]:
    """The picture in a file as RGB in [0, 1], upright, transparency on white, READ_SIDE_PX a side at most.

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
            if image.format == "WEBP" and width * height > MAX_WEBP_PIXELS:
                raise RequestError(
                    f"image {path.name!r} has {width * height / 1e6:.1f} megapixels, at most "
                    f"{MAX_WEBP_PIXELS / 1e6:.1f} are allowed of a WebP: scale it down or save it as JPEG."
                )
            if image.mode.startswith(("I", "F")):
                raise RequestError(f"image {path.name!r} has more than 8 bits a channel: save it as 8-bit RGB.")
            rgba = ImageOps.exif_transpose(shrunk(image)).convert("RGBA")
    except RequestError:
        raise
    except Exception as error:  # a decoder meets hostile bytes here and may raise anything
        raise RequestError(
            f"image {path.name!r} cannot be read: upload an undamaged PNG, JPEG or WebP picture."
        ) from error
    white = Image.new("RGBA", rgba.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, rgba).convert("RGB")).astype(np.float32)
    pixels /= 255
    return pixels


def shrunk(image: Image.Image) -> Image.Image:
    """A whole number of times smaller, so that READ_SIDE_PX is enough; a JPEG is decoded smaller to begin with."""
    image.draft(None, (READ_SIDE_PX, READ_SIDE_PX))
    factor = math.ceil(max(image.size) / READ_SIDE_PX)
    if factor == 1:
        return image
    return (image if image.mode in ("RGB", "RGBA") else image.convert("RGBA")).reduce(factor)

"""Files as strangers send them: FILES makes every one from nothing, by the name that it comes under."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from psd.config import FIELDS, RunConfig

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>"
FORMULAS = ("=cmd|' /C calc'!A0", '+HYPERLINK("http://host.invalid")', "@SUM(1+1)", "-2+3+cmd|' /C calc'!A0")
SIDE = 4096  # the largest picture that is taken
BINARY = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4").tobytes()
TREE = {
    "asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
    "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
    "accessors": [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}],
    "bufferViews": [{"buffer": 0, "byteLength": 36}], "buffers": [{"byteLength": 36}],
}  # fmt: skip


def nested(depth: int) -> str:
    return depth * "[" + depth * "]"


def settings(**changed: Any) -> dict[str, Any]:
    return RunConfig.from_preset(prompt="a lamp").to_dict() | changed


TEXTS = {name: SCRIPT for name, field in FIELDS.items() if field.kind is str}
# What may stand where the settings do, as JSON text.
WRITTEN: dict[str, str] = {
    "scripts": json.dumps(settings(**TEXTS)),
    "script in the prompt": json.dumps(settings(prompt=SCRIPT, negative_prompt=SCRIPT)),
    **{f"script in {name}": json.dumps(settings(**{name: SCRIPT})) for name in TEXTS},
    **{f"formula {text[0]}": json.dumps(settings(prompt=text, negative_prompt=text)) for text in FORMULAS},
    "no number": json.dumps(settings(gamma=float("nan"), lr=float("inf"))),
    "no numbers at all": '{"prompt": "a lamp", "gamma": -Infinity, "steps": NaN, "seed": Infinity}',
    "a number of 4,000 digits": json.dumps(settings()).replace('"seed": 0', f'"seed": {4000 * "9"}'),
    "a number of 5,000 digits": f'{{"prompt": "a lamp", "seed": {5000 * "9"}}}',
    "a power": '{"prompt": "a lamp", "gamma": 1e999, "seed": 1e999}',
    **{
        f"{depth:,} lists in {name}": f'{{"prompt": "a lamp", "{name}": {nested(depth)}}}'
        for depth in (500, 900, 980, 100_000)
        for name in ("seed", "preset", "mode", "arms")
    },
    "100,000 lists": nested(100_000),
    "lists in place of settings": '{"config": [[1, 2]], "prompt": "a lamp"}',
    "other kinds": '{"prompt": "a lamp", "preset": {"a": []}, "mode": [1], "arms": {"with": 1}, "seed": "0"}',
    "unhashable names": json.dumps({name: [] for name in FIELDS} | {"prompt": "a lamp"}),
    "half a surrogate pair": '{"prompt": "a \\ud800 lamp", "prior": "\\udfff"}',
    "control characters": '{"prompt": "a \\u0000 \\u001b[31m lamp"}',
    "a path": json.dumps(settings(prior="/etc", negative_from="/etc/passwd")),
    "a long text": json.dumps(settings(prompt=200_000 * "x", reward=1000 * "a + ")),
    "foreign keys": json.dumps(settings() | {"__class__": "x", "arm": SCRIPT, "negative_from_sha256": [SCRIPT]}),
    "twice": '{"prompt": "a lamp", "prompt": "' + FORMULAS[0] + '"}',
    "no object": "[]",
    "null": "null",
}


def chunk(name: bytes, data: bytes, length: int | None = None) -> bytes:
    """A PNG's, of a length that may lie."""
    crc = zlib.crc32(name + data)
    return struct.pack(">I", len(data) if length is None else length) + name + data + struct.pack(">I", crc)


def png(*chunks: bytes, width: int = 8, height: int = 8, pixels: bytes | None = None) -> bytes:
    """RGB; `chunks` come before the pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = zlib.compress(height * (1 + 3 * width) * b"\0") if pixels is None else pixels
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def told(text: str) -> bytes:
    """The chunk that a result PNG has its settings in."""
    return chunk(b"iTXt", b"psd\0\0\0\0\0" + text.encode("utf-8", "surrogatepass"))


@cache
def unfolding(megabytes: int) -> bytes:
    packer, block = zlib.compressobj(1), bytes(2**20)
    return b"".join(packer.compress(block) for _ in range(megabytes)) + packer.flush()


def picture(kind: str, side: int = SIDE, mode: str = "RGBA", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, kind, **options)
    return buffer.getvalue()


def film(kind: str, side: int, frames: int) -> bytes:
    buffer, one = io.BytesIO(), Image.new("RGB", (side, side))
    others = [Image.new("RGB", (side, side), (index % 255 + 1, 0, 0)) for index in range(frames - 1)]
    one.save(buffer, kind, save_all=True, append_images=others)
    return buffer.getvalue()


def noisy(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def damaged(data: bytes, seed: int) -> bytes:
    """Twenty bytes of it are others."""
    rng, changed = np.random.default_rng(seed), bytearray(data)
    for place in rng.integers(12, len(data), 20):
        changed[place] = rng.integers(256)
    return bytes(changed)


def glb(text: bytes, binary: bytes = BINARY, length: int | None = None, announced: int | None = None) -> bytes:
    text, binary = text + b" " * (-len(text) % 4), binary + bytes(-len(binary) % 4)
    whole = 28 + len(text) + len(binary) if announced is None else announced
    head = struct.pack("<4sIII4s", b"glTF", 2, whole, len(text) if length is None else length, b"JSON")
    return head + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary


def mesh(binary: bytes = BINARY, **tree: Any) -> bytes:
    return glb(json.dumps({**TREE, **tree}).encode(), binary)


def accessor(**changed: Any) -> bytes:
    return mesh(accessors=[{**TREE["accessors"][0], **changed}])


def textured(image: bytes) -> bytes:
    material = {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}
    views = [{"buffer": 0, "byteLength": 36}, {"buffer": 0, "byteOffset": 36, "byteLength": len(image)}]
    corners = TREE["accessors"][0]
    return mesh(
        BINARY + image, buffers=[{"byteLength": 36 + len(image)}], bufferViews=views, materials=[material],
        images=[{"bufferView": 1, "mimeType": "image/png"}], textures=[{"source": 0}],
        accessors=[corners, corners | {"type": "VEC2"}],
        meshes=[{"primitives": [{"attributes": {"POSITION": 0, "TEXCOORD_0": 1}, "material": 0}]}],
    )  # fmt: skip


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[int], end: int, dtype: str = "F32", begin: int = 0) -> dict[str, Any]:
    return {"negative": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


def carriers() -> dict[str, Callable[[], bytes]]:
    """Every one of WRITTEN in each kind of file that carries settings."""

    def extras(text: str) -> bytes:
        asset = f'{{"version": "2.0", "extras": {{"psd": {text}}}}}'
        return glb(json.dumps({**TREE, "asset": "ASSET"}).replace('"ASSET"', asset).encode("utf-8", "surrogatepass"))

    return {
        **{f"{name}.json": lambda text=text: text.encode() for name, text in WRITTEN.items()},
        **{f"{name}.png": lambda text=text: png(told(text)) for name, text in WRITTEN.items()},
        **{f"{name}.glb": lambda text=text: extras(text) for name, text in WRITTEN.items()},
    }


PICTURES: dict[str, Callable[[], bytes]] = {
    "claims 60,000 px.png": lambda: png(width=60_000, height=60_000, pixels=b""),
    "no size.png": lambda: png(width=0, height=0),
    "largest.png": lambda: picture("PNG"),
    "largest, palette.png": lambda: picture("PNG", mode="P"),
    "largest, 16 bits.png": lambda: picture("PNG", mode="I;16"),
    "largest.webp": lambda: picture("WEBP", mode="RGB", lossless=True),
    "largest, see-through.webp": lambda: picture("WEBP", lossless=True),
    "largest.jpg": lambda: picture("JPEG", mode="RGB"),
    "largest, in parts.jpg": lambda: picture("JPEG", mode="RGB", progressive=True),
    "largest, CMYK.jpg": lambda: picture("JPEG", mode="CMYK"),
    "larger.webp": lambda: picture("WEBP", side=SIDE + 1, mode="RGB"),
    "a film.png": lambda: film("PNG", 64, 200),
    "a film.webp": lambda: film("WEBP", 512, 40),
    "unfolding text.png": lambda: png(chunk(b"zTXt", b"psd\0\0" + unfolding(256))),
    "unfolding international text.png": lambda: png(chunk(b"iTXt", b"psd\0\1\0\0\0" + unfolding(256))),
    "unfolding profile.png": lambda: png(chunk(b"iCCP", b"x\0\0" + unfolding(256))),
    "hundred texts.png": lambda: png(*100 * [chunk(b"zTXt", b"psd\0\0" + zlib.compress(bytes(10**6)))]),
    "unfolding pixels.png": lambda: png(pixels=unfolding(256)),
    "frames that lie.png": lambda: png(chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))),
    "chunk that lies.png": lambda: png(chunk(b"tEXt", b"psd\0{}", length=2**31 - 1)),
    "chunk that lies more.png": lambda: png(chunk(b"iTXt", b"psd\0", length=2**32 - 1)),
    "text without an end.png": lambda: png(chunk(b"iTXt", b"psd"), chunk(b"zTXt", b""), chunk(b"tEXt", b"psd")),
    "broken profile.png": lambda: png(chunk(b"iCCP", b"x\0\0" + b"no zlib")),
    "broken EXIF.png": lambda: png(chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff")),
    "broken EXIF.jpg": lambda: noisy("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\xff\xff\xff\xff"),
    **{f"cut.{kind}": lambda kind=kind: noisy(kind)[:900] for kind in ("png", "jpeg", "webp")},
    **{
        f"damaged {seed}.{kind}": lambda kind=kind, seed=seed: damaged(noisy(kind), seed)
        for kind in ("png", "jpeg", "webp")
        for seed in range(4)
    },
    **{
        f"a {kind}.png": lambda kind=kind: picture(kind, 16, "RGB")
        for kind in ("GIF", "TIFF", "PPM", "EPS", "BMP", "ICO")
    },
    "a drawing.png": lambda: f"<svg xmlns='http://www.w3.org/2000/svg'>{SCRIPT}</svg>".encode(),
    f"{SCRIPT.replace('/', '')}.png": lambda: SCRIPT.encode(),
    f"{FORMULAS[2]}.jpg": lambda: b"",
    "a page.json": lambda: f"<html>{SCRIPT}</html>".encode(),
    "nothing.png": lambda: b"",
    "nothing.json": lambda: b"",
    "UTF-16.json": lambda: json.dumps(settings()).encode("utf-16"),
    "a megabyte of brackets.json": lambda: 10**6 * b"[",
    "ten megabytes.json": lambda: b'{"prompt": "' + 10**7 * b"x" + b'"}',
}  # fmt: skip
MESHES: dict[str, Callable[[], bytes]] = {
    "nothing.glb": lambda: b"",
    "cut.glb": lambda: mesh()[:100],
    "other magic.glb": lambda: b"glTX" + mesh()[4:],
    "JSON that lies.glb": lambda: glb(json.dumps(TREE).encode(), length=2**32 - 1),
    "JSON of no length.glb": lambda: glb(json.dumps(TREE).encode(), length=0),
    "whole that lies.glb": lambda: glb(json.dumps(TREE).encode(), announced=2**32 - 1),
    "deep.glb": lambda: glb(nested(100_000).encode()),
    "buffer that lies.glb": lambda: mesh(
        buffers=[{"byteLength": 2**40}], bufferViews=[{"buffer": 0, "byteLength": 2**40}]
    ),
    "count that lies.glb": lambda: accessor(count=2**31),
    "negative count.glb": lambda: accessor(count=-1),
    "count that is no number.glb": lambda: glb(json.dumps(TREE).replace('"count": 3', '"count": NaN').encode()),
    "offset before it all.glb": lambda: accessor(byteOffset=-12),
    "sparse that lies.glb": lambda: accessor(bufferView=None, count=2**28, sparse={"count": 2**28}),
    "nobody's view.glb": lambda: accessor(bufferView=99),
    "no numbers.glb": lambda: mesh(np.full((3, 3), np.nan, "<f4").tobytes()),
    "endless.glb": lambda: mesh(np.full((3, 3), np.inf, "<f4").tobytes()),
    "largest numbers.glb": lambda: mesh(np.full((3, 3), 3e38, "<f4").tobytes()),
    "its own child.glb": lambda: mesh(nodes=[{"mesh": 0, "children": [0]}]),
    "children that multiply.glb": lambda: mesh(
        nodes=[*({"children": [i + 1, i + 1]} for i in range(40)), {"mesh": 0}]
    ),
    "many nodes.glb": lambda: mesh(nodes=100_000 * [{"mesh": 0}], scenes=[{"nodes": list(range(100_000))}]),
    "another's file.glb": lambda: mesh(buffers=[{"byteLength": 36, "uri": "file:///etc/passwd"}]),
    "another's address.glb": lambda: mesh(buffers=[{"byteLength": 36, "uri": "http://127.0.0.1:1/x"}]),
    "texture that unfolds.glb": lambda: textured(png(width=16_384, height=16_384, pixels=unfolding(200))),
    "texture that claims.glb": lambda: textured(png(width=60_000, height=60_000, pixels=b"")),
    "compressed.glb": lambda: mesh(extensionsRequired=["KHR_draco_mesh_compression"]),
    "scripts for names.glb": lambda: mesh(
        nodes=[{"mesh": 0, "name": SCRIPT}], asset={"version": "2.0", "generator": SCRIPT}
    ),
}  # fmt: skip
TENSORS: dict[str, Callable[[], bytes]] = {
    "nothing.safetensors": lambda: b"",
    "length that lies.safetensors": lambda: safetensors(tensor([1, 2], 8), bytes(8), length=2**63),
    "length that lies a little.safetensors": lambda: safetensors(tensor([1, 2], 8), bytes(8), length=10**6),
    "deep.safetensors": lambda: safetensors(nested(100_000).encode()),
    "shape that lies.safetensors": lambda: safetensors(tensor([2**40, 2**40], 8), bytes(8)),
    "shape beyond its data.safetensors": lambda: safetensors(tensor([77, 768], 8), bytes(8)),
    "offsets that cross.safetensors": lambda: safetensors(tensor([1, 2], 0, begin=8), bytes(8)),
    "negative shape.safetensors": lambda: safetensors(tensor([-1, -2], 8), bytes(8)),
    "no width.safetensors": lambda: safetensors(tensor([77, 0], 0)),
    "no numbers.safetensors": lambda: safetensors(tensor([1, 2], 8), np.full(2, np.nan, "<f4").tobytes()),
    "endless.safetensors": lambda: safetensors(tensor([1, 2], 8), np.full(2, np.inf, "<f4").tobytes()),
    "other numbers.safetensors": lambda: safetensors(tensor([1, 1], 8, "F64"), bytes(8)),
    "unknown numbers.safetensors": lambda: safetensors(tensor([1, 2], 8, "X99"), bytes(8)),
    "another name.safetensors": lambda: safetensors({SCRIPT: tensor([1, 2], 8)["negative"]}, bytes(8)),
    "many names.safetensors": lambda: safetensors({f"{SCRIPT}{i}": tensor([0, 2], 0)["negative"] for i in range(9999)}),
    "cut.safetensors": lambda: safetensors(tensor([1, 2], 8), bytes(4)),
    "too large.safetensors": lambda: safetensors(tensor([2048, 2048], 2**24), bytes(2**24)),
    "a pickle.safetensors": lambda: b"\x80\x04cos\nsystem\n(S'touch /tmp/x'\ntR.",
    "scripts.safetensors": lambda: safetensors(
        {"__metadata__": {"psd": SCRIPT, SCRIPT: SCRIPT}, **tensor([1, 2], 8)}, bytes(8)
    ),
}
FILES = {**carriers(), **PICTURES, **MESHES, **TENSORS}

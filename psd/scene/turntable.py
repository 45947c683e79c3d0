"""Pictures of a scene for looking at: the turntable with its video, depth and normals in colours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from psd.export import to_uint8
from psd.scene.cameras import orbit_cameras
from psd.scene.render import Rendering
from psd.scene.scene import Scene

CRF = 18  # x264's quality: no loss that the eye sees


def turntable_frames(
    scene: Scene, count: int, size: int, *, samples: int, **orbit: float
) -> Iterator[UInt8[np.ndarray, "{size} {size} 3"]]:
    """One round of `count` pictures, each rendered when it is asked for; `orbit` as in `orbit_cameras`."""
    cameras = orbit_cameras(count, **orbit)
    for i in range(count):
        yield to_uint8(scene.render(cameras[i : i + 1], size, samples=samples).rgb[0])


def export_turntable(path: Path, frames: Iterable[UInt8[np.ndarray, "H W 3"]], fps: int = 24) -> None:
    """MP4 that every browser plays: H.264, yuv420p, index in front. An odd side grows by one pixel, its edge repeated.

    The colours are converted and marked as BT.709: left unmarked, players guess by the size. Raises ValueError if there
    is no frame, or if one is of another size than the first.
    """
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError("a turntable needs at least one frame")
    height, width = first.shape[:2]
    partial = path.with_name(path.name + ".partial")
    try:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": str(CRF)})
            stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
            codec = stream.codec_context
            codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
            codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
            for frame in chain([first], frames):
                if frame.shape != first.shape:
                    raise ValueError(f"frames must be of one size, not {first.shape} and {frame.shape}")
                even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                picture = av.VideoFrame.from_ndarray(even, format="rgb24")
                yuv = picture.reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                container.mux(stream.encode(yuv))
            container.mux(stream.encode())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_frame(path: Path, share: float) -> UInt8[np.ndarray, "H W 3"]:
    """The frame of a turntable's video at `share` of the round; 1 is its start again. Raises OSError or ValueError."""
    import av

    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    if not frames:
        raise ValueError(f"{path.name} holds no picture")
    return frames[round(share * len(frames)) % len(frames)].to_ndarray(format="rgb24")


def depth_picture(seen: Rendering) -> UInt8[np.ndarray, "B H W 3"]:
    """Distance to the surface in grey, the nearest white, on black; one scale for all views.

    The scale spans all but a hundredth of the pixels at either end: a floater must not dim the object.
    """
    distance = seen.depth / seen.opacity.clamp(min=1e-5)
    solid = distance[seen.opacity > 0.5]
    if not len(solid):
        return to_uint8(torch.zeros_like(seen.foreground))
    near, far = np.quantile(solid.cpu().numpy(), [0.01, 0.99]).tolist()  # torch's takes no more than 2^24 numbers
    grey = 1 - 0.8 * ((distance - near) / max(far - near, 1e-5)).clamp(0, 1)
    return to_uint8((grey * seen.opacity).expand_as(seen.foreground))


def normal_picture(seen: Rendering) -> UInt8[np.ndarray, "B H W 3"]:
    """World normals as colours, rgb = (n + 1) / 2, on grey. The rendering needs its normals."""
    return to_uint8((seen.normal * seen.opacity + 1) / 2)

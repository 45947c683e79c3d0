"""Videos read back as a player would, and pictures of depth and normals of a scene known in closed form."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Colorspace

from psd.export import to_uint8
from psd.scene.cameras import orbit_cameras
from psd.scene.fields import ConstantBackground, Field, VoxelField
from psd.scene.render import Occupancy, Rendering
from psd.scene.scene import FieldScene
from psd.scene.turntable import depth_picture, export_turntable, normal_picture, read_frame, turntable_frames


class Ball(Field):
    """Opaque, radius 0.5, red where x > 0 and blue behind."""

    def __init__(self):
        super().__init__(1.0, (0.0, 1.0))
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        red, blue = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 0, 1])
        return self.density(x), torch.where(x[:, :1] > 0, red, blue)

    def density(self, x):
        return 1000.0 * (x.norm(dim=-1) < 0.5)

    def normals(self, x):
        return torch.nn.functional.normalize(x, dim=-1)


def decoded(path: Path) -> tuple[np.ndarray, tuple]:
    """All frames; codec, pixel format, frames a second and colour space."""
    with av.open(str(path)) as container:
        (stream,) = container.streams
        codec = stream.codec_context
        # Before the container closes: what a stream says afterwards is chance.
        facts = (codec.name, codec.pix_fmt, stream.average_rate, codec.colorspace)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    return np.stack(frames), facts


def gradient_frames(count: int, height: int, width: int) -> list[np.ndarray]:
    """Smooth pictures, each of another colour."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    return [(255 * np.stack([x, y, np.full_like(x, i / count)], -1)).astype(np.uint8) for i in range(count)]


def test_a_video_decodes_to_its_frames(tmp_path: Path):
    frames = gradient_frames(30, 64, 96)
    export_turntable(tmp_path / "orbit.mp4", iter(frames), fps=24)
    shown, facts = decoded(tmp_path / "orbit.mp4")
    assert shown.shape == (30, 64, 96, 3)
    assert np.abs(shown.astype(int) - np.stack(frames)).mean() < 3
    assert facts == ("h264", "yuv420p", 24, Colorspace.ITU709)
    data = (tmp_path / "orbit.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays before it has arrived
    assert [path.name for path in tmp_path.iterdir()] == ["orbit.mp4"]


def test_a_frame_is_found_by_its_share_of_the_round(tmp_path: Path):
    frames = gradient_frames(8, 64, 64)
    export_turntable(tmp_path / "orbit.mp4", iter(frames), fps=24)
    for share, index in ((0.0, 0), (0.25, 2), (0.99, 0), (1.0, 0)):
        assert np.abs(read_frame(tmp_path / "orbit.mp4", share).astype(int) - frames[index]).mean() < 3
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises((OSError, ValueError)):
        read_frame(tmp_path / "broken.mp4", 0)


def test_saturated_colours_survive_the_conversion(tmp_path: Path):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128, 128, 128]], np.uint8)
    frames = [np.broadcast_to(colour, (32, 32, 3)).copy() for colour in colours]
    export_turntable(tmp_path / "flat.mp4", frames)
    shown, _ = decoded(tmp_path / "flat.mp4")
    assert np.abs(shown[:, 16, 16].astype(int) - colours).max() <= 6


def test_odd_sides_grow_by_one_pixel(tmp_path: Path):
    frames = gradient_frames(4, 33, 47)
    export_turntable(tmp_path / "odd.mp4", frames)
    shown, _ = decoded(tmp_path / "odd.mp4")
    assert shown.shape == (4, 34, 48, 3)
    assert np.abs(shown[:, :33, :47].astype(int) - np.stack(frames)).mean() < 4


def test_frames_that_make_no_video_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="at least one frame"):
        export_turntable(tmp_path / "none.mp4", [])
    with pytest.raises(ValueError, match="one size"):
        export_turntable(tmp_path / "mixed.mp4", [np.zeros((32, 32, 3), np.uint8), np.zeros((32, 34, 3), np.uint8)])
    assert not (tmp_path / "mixed.mp4").exists()


def test_turntable_frames_go_around_and_come_one_by_one():
    """From +x the red half, from -x the blue one."""
    frames = turntable_frames(FieldScene(Ball(), ConstantBackground((0.9,) * 3)), 4, 32, samples=64, elevation_deg=0.0)
    front, left, back, _ = frames
    assert front.shape == (32, 32, 3)
    assert front.dtype == np.uint8
    assert front[16, 16].tolist() == [255, 0, 0]
    assert back[16, 16].tolist() == [0, 0, 255]
    # From +y, red (+x) is on the left.
    assert (left[16, 12].argmax(), left[16, 20].argmax()) == (0, 2)
    assert front[0, 0] == pytest.approx(0.9 * 255, abs=1)
    assert next(turntable_frames(FieldScene(Ball(), ConstantBackground()), 10**6, 8, samples=8)).shape == (8, 8, 3)


@pytest.fixture(scope="module")
def seen() -> Rendering:
    cameras = orbit_cameras(2, elevation_deg=0.0, distance=2.5)
    return FieldScene(Ball(), ConstantBackground()).render(cameras, 32, samples=200, with_normals=True)


def test_depth_picture_is_brightest_where_the_ball_is_nearest(seen: Rendering):
    pictures = depth_picture(seen)
    assert pictures.shape == (2, 32, 32, 3)
    for picture in pictures:
        assert not picture[0, 0].any()
        assert picture[16, 16, 0] > 250
        ring = picture[16][picture[16, :, 0] > 0][:, 0]
        assert ring[0] < 150
        assert (np.diff(ring[: len(ring) // 2].astype(int)) >= 0).all()


def test_depth_picture_of_nothing_is_black(seen: Rendering):
    empty = seen._replace(opacity=torch.zeros_like(seen.opacity), depth=torch.zeros_like(seen.depth))
    assert not depth_picture(empty).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("channels", [slice(0, 1), slice(1, 4), slice(4)])
def test_pictures_of_a_diverged_field_are_pictures(channels: slice):
    field = VoxelField(8)
    field.voxels.data[:, channels] = torch.nan
    occupancy = Occupancy(1.0)
    occupancy.update(field, torch.Generator().manual_seed(0))
    scene = FieldScene(field, ConstantBackground(), occupancy)
    seen = scene.render(orbit_cameras(2), 16, samples=16, with_normals=True)
    assert not to_uint8(seen.rgb)[:, 8, 8].any()
    assert depth_picture(seen).shape == normal_picture(seen).shape == (2, 16, 16, 3)


def test_depth_picture_of_many_pixels(seen: Rendering):
    """More than 2^24 of them: 16 views of 1,024 px and a few."""
    distance = torch.linspace(2, 3, 4100).expand(1, 1, 4100, 4100)
    solid = torch.ones(()).expand(1, 1, 4100, 4100)
    picture = depth_picture(seen._replace(foreground=solid.expand(1, 3, -1, -1), opacity=solid, depth=distance))
    assert (picture[0, 0, 0, 0], picture[0, 0, -1, 0]) == (255, 51)


def test_normal_picture_shows_world_axes(seen: Rendering):
    front, back = normal_picture(seen).astype(int)
    assert front[16, 16] == pytest.approx([255, 128, 128], abs=12)
    assert back[16, 16] == pytest.approx([0, 128, 128], abs=12)
    top = np.flatnonzero(seen.opacity[0, 0, :, 16] > 0.9)[0]
    assert front[top, 16, 2] > 230  # +z
    assert front[0, 0].tolist() == [128, 128, 128]

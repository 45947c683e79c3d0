"""Cameras around the origin in MVDream's convention: poses, random groups of views, orbits, rays, embeddings.

World z-up and right-handed. A pose c2w has the columns right, up, -look, position: in the camera's frame x is right,
y up, z backwards. Azimuth 0 looks from +x, 90 from +y (MVDream's get_camera says 90 and 180: it counts from -y, in
the same world). Rows of a batch are ordered (group, view), the view fastest. Pinhole, square
pixels, principal point in the middle; fovy is the vertical field of view.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from psd.scene.rig import Rig


@dataclass(frozen=True, eq=False)
class Cameras:
    """A batch of cameras; `c2w` agrees with the angles and the distance (`Cameras.around` makes it so)."""

    c2w: Float[Tensor, "B 4 4"]
    fovy_deg: Float[Tensor, " B"]
    elevation_deg: Float[Tensor, " B"]
    azimuth_deg: Float[Tensor, " B"]
    distance: Float[Tensor, " B"]

    @classmethod
    def around(
        cls,
        azimuth_deg: Float[Tensor, " B"],
        elevation_deg: Float[Tensor, " B"],
        distance: Float[Tensor, " B"],
        fovy_deg: Float[Tensor, " B"],
    ) -> Cameras:
        """Cameras that look at the origin."""
        return cls(look_at(azimuth_deg, elevation_deg, distance), fovy_deg, elevation_deg, azimuth_deg, distance)

    @classmethod
    def joined(cls, parts: list[Cameras]) -> Cameras:
        """All cameras of several batches."""
        return cls(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)))

    def __len__(self) -> int:
        return len(self.c2w)

    def __getitem__(self, index: slice | Tensor) -> Cameras:
        """Some of the cameras: a slice, positions or a mask."""
        return Cameras(
            self.c2w[index],
            self.fovy_deg[index],
            self.elevation_deg[index],
            self.azimuth_deg[index],
            self.distance[index],
        )

    def to(self, device: torch.device | str) -> Cameras:
        return Cameras(
            self.c2w.to(device),
            self.fovy_deg.to(device),
            self.elevation_deg.to(device),
            self.azimuth_deg.to(device),
            self.distance.to(device),
        )


def look_at(
    azimuth_deg: Float[Tensor, " B"], elevation_deg: Float[Tensor, " B"], distance: Float[Tensor, " B"]
) -> Float[Tensor, "B 4 4"]:
    """Poses that look at the origin from distance * (cos a cos e, sin a cos e, sin e), with the horizon level.

    Written out instead of by cross products with the z axis, so that straight above (e = 90) is a pose like any other:
    right = (-sin a, cos a, 0), up = (-cos a sin e, -sin a sin e, cos e), -look = the position's direction.
    """
    azimuth, elevation = torch.deg2rad(azimuth_deg), torch.deg2rad(elevation_deg)
    cos_a, sin_a, cos_e, sin_e = azimuth.cos(), azimuth.sin(), elevation.cos(), elevation.sin()
    zero, one = torch.zeros_like(cos_a), torch.ones_like(cos_a)
    right = torch.stack([-sin_a, cos_a, zero, zero], -1)
    up = torch.stack([-cos_a * sin_e, -sin_a * sin_e, cos_e, zero], -1)
    back = torch.stack([cos_a * cos_e, sin_a * cos_e, sin_e, zero], -1)
    position = torch.cat([distance[:, None] * back[:, :3], one[:, None]], -1)
    return torch.stack([right, up, back, position], -1)


def sample_cameras(rig: Rig, views: int, generator: torch.Generator, groups: int = 1) -> Cameras:
    """Random groups of `views` cameras, drawn on the CPU from `generator`: five uniform numbers a group."""
    return cameras_from_draws(rig, views, torch.rand(groups, 5, generator=generator))


def cameras_from_draws(rig: Rig, views: int, u: Float[Tensor, "groups 5"]) -> Cameras:
    """The cameras of uniform draws u in [0, 1): columns law of the elevation, elevation, azimuth, fovy, distance.

    Of a group all views share elevation, fovy and distance; azimuths are -180 + (u + view) * 360 / views.
    Elevation e in [e_0, e_1]: uniform where the first draw is below 1/2, else e = asin(2 p - 1) with p uniform between
    (e_0 + 90) / 180 and (e_1 + 90) / 180. That is MVDream's form of "uniform on the sphere"; it ends short of e_1 (19.5
    of 30 degrees) and is kept, since the prior was trained so. Source: MVDream-threestudio's random_multiview.
    """
    u_law, u_elevation, u_azimuth, u_fovy, u_distance = u.unbind(-1)
    low, high = rig.elevation_deg
    p = (low + 90 + (high - low) * u_elevation) / 180
    on_sphere = torch.rad2deg(torch.asin((2 * p - 1).clamp(-1, 1)))
    elevation_deg = torch.where(u_law < 0.5, low + (high - low) * u_elevation, on_sphere)
    azimuth_deg = (u_azimuth[:, None] + torch.arange(views)).flatten() * (360 / views) - 180
    fovy_deg = rig.fovy_deg[0] + (rig.fovy_deg[1] - rig.fovy_deg[0]) * u_fovy
    multiple = rig.distance[0] + (rig.distance[1] - rig.distance[0]) * u_distance
    distance = multiple / torch.tan(torch.deg2rad(fovy_deg) / 2)
    elevation_deg, distance, fovy_deg = (
        shared.repeat_interleave(views) for shared in (elevation_deg, distance, fovy_deg)
    )
    return Cameras.around(azimuth_deg, elevation_deg, distance, fovy_deg)


def orbit_cameras(
    count: int,
    elevation_deg: float = 15.0,
    fovy_deg: float = 40.0,
    distance: float = 3.0,
    azimuth_start_deg: float = 0.0,
) -> Cameras:
    """`count` cameras on a circle, 360 / count degrees apart, counter-clockwise seen from above."""
    azimuth = azimuth_start_deg + torch.arange(count) * (360 / count)
    same = torch.ones(count)
    return Cameras.around(azimuth, elevation_deg * same, distance * same, fovy_deg * same)


def view_names(cameras: Cameras) -> list[str]:
    """What each camera sees of an object whose front looks along +x: front, back, side or overhead.

    Front and back lie less than 30 degrees around azimuths 0 and 180, overhead above 60 degrees of elevation whatever
    the azimuth. The names and the strict comparisons are threestudio's, the thresholds DreamDPO's configuration's.
    """
    names = []
    for azimuth, elevation in zip(cameras.azimuth_deg.tolist(), cameras.elevation_deg.tolist(), strict=True):
        off_front = abs((azimuth + 180) % 360 - 180)
        ends = "front" if off_front < 30 else "back" if off_front > 150 else "side"
        names.append("overhead" if elevation > 60 else ends)
    return names


def camera_rays(
    cameras: Cameras, height: int, width: int
) -> tuple[Float[Tensor, "B {height} {width} 3"], Float[Tensor, "B {height} {width} 3"]]:
    """Origins and unit directions of the rays through the pixel centres; row 0 is the top of the image."""
    c2w = cameras.c2w
    # One pixel at unit depth is 1 / focal wide, focal = height/2 / tan(fovy/2).
    pixel = torch.tan(torch.deg2rad(cameras.fovy_deg) / 2) / (height / 2)
    x = torch.arange(width, device=c2w.device) + 0.5 - width / 2
    y = height / 2 - 0.5 - torch.arange(height, device=c2w.device)
    right, up, back, position = (c2w[:, None, None, :3, column] for column in range(4))
    pixel = pixel[:, None, None, None]
    directions = (x[:, None] * pixel) * right + (y[:, None, None] * pixel) * up - back
    directions = torch.nn.functional.normalize(directions, dim=-1)
    return position.expand_as(directions), directions


def camera_embedding(c2w: Float[Tensor, "B 4 4"]) -> Float[Tensor, "B 16"]:
    """What MVDream's UNet takes as its camera: c2w row by row, its translation t divided by |t| + 1e-8.

    `c2w` is left as it is (MVDream's own function writes into it).
    """
    translation = c2w[:, :3, 3:]
    unit = translation / (torch.linalg.vector_norm(translation, dim=1, keepdim=True) + 1e-8)
    rows = torch.cat([torch.cat([c2w[:, :3, :3], unit], 2), c2w[:, 3:]], 1)
    return rows.flatten(1)

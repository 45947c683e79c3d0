"""Closed-form ray casting of a handful of primitives: one view in milliseconds, in numpy.

A primitive is a unit shape under an affine map; a ray is moved into the unit shape's frame, where every
intersection is a linear or quadratic equation (the torus: sphere tracing). World z-up, cameras look at the origin.
This file knows nothing of kinds, colours' names or captions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

BACKGROUND = np.array([0.86, 0.88, 0.90], np.float32)
LIGHT = np.array([0.45, 0.35, 0.82], np.float32) / np.linalg.norm([0.45, 0.35, 0.82])
HALF = LIGHT + np.array([0.66, 0.66, 0.36], np.float32)  # between the light and the usual viewer: where highlights sit
HALF = HALF / np.linalg.norm(HALF)
SHADOW, SHADOW_REACH = np.float32(0.62), 0.3  # its strength, and how far beyond the object it reaches
FAR = np.float32(1e9)

# Convex polyhedra in the unit frame: rows (n, d) of half-spaces n.x <= d.
_SIDES = [(1, 0, 0, 1), (-1, 0, 0, 1), (0, 1, 0, 1), (0, -1, 0, 1)]
POLYHEDRA = {
    "box": np.array([*_SIDES, (0, 0, 1, 1), (0, 0, -1, 1)], np.float32),
    "pyramid": np.array([(2, 0, 1, 1), (-2, 0, 1, 1), (0, 2, 1, 1), (0, -2, 1, 1), (0, 0, -1, 1)], np.float32),
    "prism": np.array([(1, 0, 0, 1), (-1, 0, 0, 1), (0, 2, 1, 1), (0, -2, 1, 1), (0, 0, -1, 1)], np.float32),
}


@dataclass(frozen=True)
class Primitive:
    shape: str  # sphere | dome | frustum | torus | a key of POLYHEDRA
    matrix: np.ndarray  # [3, 3] unit frame -> world
    centre: np.ndarray  # [3]
    slot: str  # what colours it: "main", "part", or a fixed material
    param: float = 0.0  # frustum: top radius / bottom radius; torus: minor / major radius

    def corners(self) -> np.ndarray:
        """World corners [8, 3] of the unit shape's bounding box."""
        reach = np.array([1.0, 1.0, 1.0])
        low_z = -1.0
        if self.shape == "torus":
            reach = np.array([1 + self.param, 1 + self.param, self.param])
            low_z = -self.param
        elif self.shape == "frustum":
            reach[:2] = max(1.0, self.param)
        elif self.shape == "dome":
            low_z = 0.0
        grid = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (0, 1)], np.float64)
        unit = np.stack([grid[:, 0] * reach[0], grid[:, 1] * reach[1], low_z + grid[:, 2] * (reach[2] - low_z)], 1)
        return unit @ self.matrix.T + self.centre

    def moved(self, scale: np.ndarray, shift: np.ndarray) -> Primitive:
        """The primitive after x -> scale * x + shift (per world axis)."""
        return self.mapped(np.diag(scale), shift)

    def mapped(self, matrix: np.ndarray, shift: np.ndarray) -> Primitive:
        """The primitive after x -> matrix @ x + shift."""
        return replace(self, matrix=matrix @ self.matrix, centre=matrix @ self.centre + shift)


@dataclass(frozen=True)
class Surface:
    """A primitive with its look."""

    primitive: Primitive
    rgb: np.ndarray  # [3] in [0, 1], sRGB
    metal: bool = False


def camera_to_world(azimuth_deg: float, elevation_deg: float, distance: float) -> np.ndarray:
    """[4, 4] pose, MVDream's convention: columns right, up, -look; position (cos a cos e, sin a cos e, sin e) * d."""
    azimuth, elevation = np.deg2rad(azimuth_deg), np.deg2rad(elevation_deg)
    position = distance * np.array(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
    )
    look = -position / np.linalg.norm(position)
    right = np.cross(look, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    pose = np.eye(4, dtype=np.float32)
    pose[:3, :3] = np.stack([right, np.cross(right, look), -look], 1)
    pose[:3, 3] = position
    return pose


def render(
    surfaces: list[Surface],
    pose: np.ndarray,
    size: int,
    fovy_deg: float = 40.0,
    oversample: int = 2,
    light: float = 1.0,
) -> np.ndarray:
    """uint8 image [size, size, 3]; `oversample`^2 rays a pixel, averaged.

    light: 0, flat and without a shadow, to 1, a key light with a soft highlight and a soft shadow on the ground.
    """
    rays = size * oversample
    focal = 0.5 * rays / np.tan(0.5 * np.deg2rad(fovy_deg))
    axis = (np.arange(rays, dtype=np.float32) + 0.5 - rays / 2) / focal
    origin, rotation = pose[:3, 3].astype(np.float32), pose[:3, :3].astype(np.float32)

    depth = np.full((rays, rays), FAR, np.float32)
    image = np.broadcast_to(BACKGROUND, (rays, rays, 3)).copy()
    for surface in surfaces:
        box = _screen_box(surface.primitive, pose, focal, rays)
        if box is None:
            continue
        top, bottom, left, right = box
        x, y = np.meshgrid(axis[left:right], -axis[top:bottom])
        directions = np.stack([x, y, -np.ones_like(x)], -1).reshape(-1, 3) @ rotation.T
        t, normal = _intersect(surface.primitive, origin, directions)
        near = depth[top:bottom, left:right]
        t = t.reshape(near.shape)
        hit = t < near
        near[hit], flat = t[hit], hit.ravel()
        image[top:bottom, left:right][hit] = _shade(
            normal[flat], origin + near[hit][:, None] * directions[flat], surface, light
        )
    if light > 0:
        _cast_shadow(image, depth, surfaces, pose, axis, light)
    within = [image[i::oversample, j::oversample] for i in range(oversample) for j in range(oversample)]
    image = sum(within) / len(within)
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _screen_box(primitive: Primitive, pose: np.ndarray, focal: float, rays: int) -> tuple[int, int, int, int] | None:
    local = (primitive.corners() - pose[:3, 3]) @ pose[:3, :3]
    z = np.maximum(-local[:, 2], 1e-3)
    columns = local[:, 0] / z * focal + rays / 2
    rows = -local[:, 1] / z * focal + rays / 2
    left, right = max(int(columns.min()) - 1, 0), min(int(columns.max()) + 2, rays)
    top, bottom = max(int(rows.min()) - 1, 0), min(int(rows.max()) + 2, rays)
    return (top, bottom, left, right) if left < right and top < bottom else None


def _cast_shadow(image, depth, surfaces: list[Surface], pose: np.ndarray, axis: np.ndarray, light: float) -> None:
    """Darken the background where the ground below the object is, as by a large soft light from above."""
    corners = np.stack([s.primitive.corners() for s in surfaces]).astype(np.float32)  # [n, 8, 3]
    low, high = corners.min(1), corners.max(1)
    ground = low[:, 2].min()
    origin, rotation = pose[:3, 3].astype(np.float32), pose[:3, :3].astype(np.float32)
    reach = SHADOW_REACH + np.abs(corners[..., :2]).max()
    patch = Primitive("box", np.diag([reach, reach, 1e-3]), np.array([0, 0, ground]), "main")
    box = _screen_box(patch, pose, 1 / (axis[1] - axis[0]), len(axis))
    if box is None or origin[2] <= ground:
        return
    # It is soft: one ray for every 2 x 2 is enough. The box is widened to whole cells of them.
    top, bottom, left, right = (2 * (v // 2) for v in (box[0], box[1] + 1, box[2], box[3] + 1))
    x, y = np.meshgrid(axis[left:right].reshape(-1, 2).mean(1), -axis[top:bottom].reshape(-1, 2).mean(1))
    directions = np.stack([x, y, -np.ones_like(x)], -1) @ rotation.T
    down = directions[..., 2] < -1e-3
    rays = directions[down]
    points = (origin + (ground - origin[2]) / rays[:, 2:] * rays)[:, :2]
    lit = np.ones(len(points), np.float32)
    for (x0, y0, z0), (x1, y1, z1) in zip(low, high):
        above = (z0 - ground) + 0.25 * (z1 - z0)  # how high its mass begins: the higher, the softer and weaker
        middle = np.array([x0 + x1, y0 + y1]) / 2 - 0.5 * above * LIGHT[:2] / LIGHT[2]
        radius = np.array([x1 - x0, y1 - y0]) / 2 + np.float32(0.03) + np.float32(0.2) * above
        far = (((points - middle.astype(np.float32)) / radius) ** 2).sum(1)
        solid = (x1 - x0) * (y1 - y0) / (4 * radius.prod())
        lit *= 1 - solid * np.exp(np.float32(-1.4) * far) / (1 + np.float32(2.5) * above)
    shade = np.ones(down.shape, np.float32)
    shade[down] = 1 - SHADOW * np.float32(light) * (1 - lit)
    shade = np.where(depth[top:bottom, left:right] >= FAR, shade.repeat(2, 0).repeat(2, 1), np.float32(1))
    image[top:bottom, left:right] *= shade[..., None]


def _shade(normal: np.ndarray, point: np.ndarray, surface: Surface, light: float) -> np.ndarray:
    """Fixed world light, no view dependence: all views of a surface point agree, as a radiance field needs."""
    lambert = np.maximum(normal @ LIGHT, 0)
    sky = 0.5 + 0.5 * normal[:, 2]
    if not surface.metal:
        flat = 0.80 + 0.10 * sky + 0.06 * lambert  # some shape must stay, or a cube is a hexagon
        keyed = 0.42 + 0.20 * sky + 0.50 * lambert
        highlight = 0.75 * light * _smooth(normal @ HALF, 0.93, 0.995)
        body = surface.rgb * ((1 - light) * flat + light * keyed)[:, None]
        return body * (1 - highlight[:, None]) + highlight[:, None]
    # Metal: a dark horizon, a bright sky and a sharp glint. Looked up along the normal bent outwards by the position,
    # so that flat faces show a reflection too.
    bent = normal + 0.9 * point
    bent /= np.linalg.norm(bent, axis=1, keepdims=True)
    up = bent[:, 2] + 0.35 * bent[:, 0]
    body = 0.32 + 0.72 * _smooth(up, 0.05, 0.5) + 0.35 * _smooth(-up, 0.1, 0.5)
    body = (1 - light) * (0.45 + 0.5 * body) + light * body
    glint = (0.45 + 0.45 * light) * _smooth(bent @ LIGHT, 0.90, 0.96)
    return surface.rgb * body[:, None] * (1 - glint[:, None]) + glint[:, None]


def _smooth(x: np.ndarray, low: float, high: float) -> np.ndarray:
    s = ((x - low) / (high - low)).clip(0, 1)
    return s * s * (3 - 2 * s)


def _intersect(primitive: Primitive, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First hit along each ray: t [n] (FAR where missed) and the world normal [n, 3]."""
    inverse = np.linalg.inv(primitive.matrix).astype(np.float32)
    o = inverse @ (origin - primitive.centre).astype(np.float32)
    d = directions @ inverse.T
    if primitive.shape in POLYHEDRA:
        t, normal = _hit_polyhedron(POLYHEDRA[primitive.shape], o, d)
    elif primitive.shape == "torus":
        t, normal = _hit_torus(primitive.param, o, d)
    elif primitive.shape == "frustum":
        t, normal = _hit_frustum(primitive.param, o, d)
    else:
        t, normal = _hit_sphere(o, d, half=primitive.shape == "dome")
    world = normal @ inverse  # normals map with the inverse transpose
    return t, world / np.maximum(np.linalg.norm(world, axis=1, keepdims=True), 1e-9)


def _roots(a: np.ndarray, b: np.ndarray, c: np.ndarray | np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Both roots of a t^2 + 2 b t + c, FAR where there is none; ascending for a > 0."""
    discriminant = b * b - a * c
    root = np.sqrt(np.maximum(discriminant, 0))
    safe = np.where(np.abs(a) < 1e-9, np.float32(1e-9), a)
    none = discriminant < 0
    return np.where(none, FAR, (-b - root) / safe), np.where(none, FAR, (-b + root) / safe)


def _hit_sphere(o: np.ndarray, d: np.ndarray, half: bool) -> tuple[np.ndarray, np.ndarray]:
    t0, t1 = _roots((d * d).sum(1), d @ o, np.float32(o @ o - 1))
    if not half:
        t = np.where(t0 > 0, t0, FAR)
        return t, o + np.where(t < FAR, t, 0)[:, None] * d
    best = np.full(len(d), FAR, np.float32)
    for t in (t0, t1):
        best = np.where((t > 0) & (t < best) & (o[2] + t * d[:, 2] >= 0), t, best)
    normal = o + np.where(best < FAR, best, 0)[:, None] * d
    return _cap(best, normal, o, d, height=0.0, radius=1.0, facing=-1.0)


def _cap(best, normal, o, d, height: float, radius: float, facing: float) -> tuple[np.ndarray, np.ndarray]:
    """Close a shape by a disc at z = height."""
    t = (height - o[2]) / np.where(np.abs(d[:, 2]) < 1e-9, np.float32(1e-9), d[:, 2])
    x, y = o[0] + t * d[:, 0], o[1] + t * d[:, 1]
    hit = (t > 0) & (t < best) & (x * x + y * y <= radius * radius)
    normal[hit] = (0, 0, facing)
    return np.where(hit, t, best).astype(np.float32), normal


def _hit_frustum(top: float, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x^2 + y^2 = r(z)^2 with r from 1 at z = -1 to `top` at z = 1, closed by discs."""
    slope, middle = np.float32((top - 1) / 2), np.float32((top + 1) / 2)
    radius_o, radius_d = middle + slope * o[2], slope * d[:, 2]
    t0, t1 = _roots(
        d[:, 0] ** 2 + d[:, 1] ** 2 - radius_d**2,
        d[:, 0] * o[0] + d[:, 1] * o[1] - radius_d * radius_o,
        np.float32(o[0] ** 2 + o[1] ** 2 - radius_o**2),
    )
    best = np.full(len(d), FAR, np.float32)
    for t in (t0, t1):
        z = o[2] + t * d[:, 2]
        best = np.where((t > 0) & (t < best) & (np.abs(z) <= 1), t, best)
    point = o + np.where(best < FAR, best, 0)[:, None] * d
    normal = np.stack([point[:, 0], point[:, 1], -slope * (middle + slope * point[:, 2])], 1)
    best, normal = _cap(best, normal, o, d, height=-1.0, radius=1.0, facing=-1.0)
    return _cap(best, normal, o, d, height=1.0, radius=top, facing=1.0)


def _hit_polyhedron(planes: np.ndarray, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    enter, leave = np.full(len(d), -FAR, np.float32), np.full(len(d), FAR, np.float32)
    normal = np.zeros((len(d), 3), np.float32)
    for plane in planes:
        along, gap = d @ plane[:3], plane[3] - plane[:3] @ o
        t = gap / np.where(np.abs(along) < 1e-9, np.float32(1e-9), along)
        inwards = along < 0
        later = inwards & (t > enter)
        enter = np.where(later, t, enter)
        normal[later] = plane[:3]
        leave = np.where(~inwards & (t < leave), t, leave)
    return np.where((enter < leave) & (enter > 0), enter, FAR).astype(np.float32), normal


def _hit_torus(minor: float, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sphere tracing of the unit torus; only rays that meet its bounding sphere are marched."""
    length = np.linalg.norm(d, axis=1)
    u = d / length[:, None]
    t0, t1 = _roots(np.ones(len(d), np.float32), u @ o, np.float32(o @ o - (1 + minor) ** 2 * 1.01))
    best = np.full(len(d), FAR, np.float32)
    normal = np.zeros((len(d), 3), np.float32)
    active = np.flatnonzero((t0 < FAR) & (t1 > 0))
    s, end, ray = np.maximum(t0[active], 0), t1[active], u[active]
    for _ in range(40):
        point = o + s[:, None] * ray
        ring = np.hypot(point[:, 0], point[:, 1])
        distance = np.hypot(ring - 1, point[:, 2]) - np.float32(minor)
        hit = distance < 2e-3
        if hit.any():
            index, q, r = active[hit], point[hit], np.maximum(ring[hit], 1e-6)[:, None]
            best[index] = s[hit] / length[index]
            normal[index] = q - np.concatenate([q[:, :2] / r, np.zeros_like(r)], 1)
        keep = ~hit & (s + distance < end)
        if not keep.any():
            break
        active, s, end, ray = active[keep], s[keep] + distance[keep], end[keep], ray[keep]
    return best, normal

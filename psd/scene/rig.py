"""How pictures of an object are taken: from where, against what. Plain numbers, for tables that load no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rig:
    """What random cameras are drawn from; the default is MVDream's training rig.

    `distance` is a multiple of 1 / tan(fovy/2), so that the object fills the same part of every picture: at 1 the unit
    disc through the origin touches the upper and lower edge. Raises ValueError on ranges that are no ranges.
    """

    fovy_deg: tuple[float, float] = (15.0, 60.0)
    distance: tuple[float, float] = (0.8, 1.0)
    elevation_deg: tuple[float, float] = (0.0, 30.0)

    def __post_init__(self) -> None:
        limits = {"fovy_deg": (0, 180), "distance": (0, float("inf")), "elevation_deg": (-90, 90)}
        for name, (least, most) in limits.items():
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise ValueError(f"{name} must be a range within [{least}, {most}], not ({low}, {high})")


@dataclass(frozen=True)
class Frame:
    """How a multi-view prior's training pictures were taken; the defaults are MVDream's."""

    radius: float = 1.0  # half the side of the box that holds the object
    rig: Rig = Rig()
    background: tuple[float, float, float] | None = None  # its one colour; None: of many colours, so it is learned
    portrait_distance: float = 3.0

    @property
    def portrait(self) -> dict[str, float]:
        """Arguments of orbit_cameras for pictures of the result."""
        return {"elevation_deg": 15.0, "fovy_deg": 40.0, "distance": self.portrait_distance}

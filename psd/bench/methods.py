"""Every method of the field on the same prompts, seeds and noises: `python -m psd.bench methods` and `methods-3d`."""

from __future__ import annotations

from types import SimpleNamespace

from psd.bench import image, scene
from psd.bench.paired import Rows, rows_of
from psd.budget import passes_of
from psd.config import RunConfig

OWN = {"methods": dict(BATCH=5), "methods-3d": dict(PRESET="toybox-fast-methods")}
ROWS: Rows = {
    "score distillation": ("without", {}),
    "PSD": ("with", {}),
    "CSD": ("csd", {}),
    "SDI": ("sdi", {}),
    "CFD": ("cfd", {}),
    "VSD": ("vsd", {}),
    "DreamDPO": ("dreamdpo", {}),
    "DreamReward": ("dreamreward", {}),
    "RewardSDS": ("rewardsds", {}),
    "RewardVSD": ("rewardvsd", {}),
}


def passes(rows: Rows, config: RunConfig) -> dict[str, dict[str, str]]:
    """Rows that a step sends through two networks, for a picture or a view; those with gradient after the plus."""
    of = {title: passes_of(arm) for title, arm in rows_of(config, rows).items()}

    def column(name: str) -> dict[str, str]:
        counts = {title: (getattr(each, name), getattr(each, f"{name}_grad")) for title, each in of.items()}
        return {title: f"{plain:.3g}{f' + {grad:.2g}' if grad else ''}" for title, (plain, grad) in counts.items()}

    return {"UNet rows a step": column("unet"), "reward rows a step": column("reward")}


COMMON = dict(__doc__=__doc__, ROWS=ROWS, PROMPTS=20, SEEDS=2, SHEET_COLUMNS=6, SHEET_PROMPTS=6, passes=passes)
TABLES = {
    name: SimpleNamespace(**vars(bench) | COMMON | OWN[name])
    for name, bench in (("methods", image), ("methods-3d", scene))
}

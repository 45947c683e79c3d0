"""Every method of the field on the same prompts, seeds and noises: `python -m psd.bench methods` and `methods-3d`."""

from __future__ import annotations

from types import SimpleNamespace

from psd.bench import image, scene
from psd.bench.paired import Rows

PROMPTS, SEEDS, BATCH = 20, 2, {"methods": 5, "methods-3d": 1}
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
TABLES = {
    name: SimpleNamespace(
        **vars(bench) | dict(__doc__=__doc__, ROWS=ROWS, PROMPTS=PROMPTS, SEEDS=SEEDS, BATCH=BATCH[name])
    )
    for name, bench in (("methods", image), ("methods-3d", scene))
}

"""Every method of the field on the same prompts, seeds and noises: `python -m psd.bench methods` and `methods-3d`."""

from __future__ import annotations

from types import SimpleNamespace

from psd.bench import image, scene
from psd.bench.paired import Rows

PROMPTS, SEEDS = 20, 2
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
# Of two methods whose step in image mode is none of DDIM's: tuned by the judge on other captions.
OF_IMAGES: Rows = ROWS | {
    "CSD": ("csd", dict(update="adam", lr=5e-3)),
    "SDI": ("sdi", dict(update="adam", lr=1e-2, inversion_gamma=0.0, inversion_eta=0.0)),
}
TABLES = {
    name: SimpleNamespace(**vars(bench) | dict(__doc__=__doc__, ROWS=rows, PROMPTS=PROMPTS, SEEDS=SEEDS))
    for name, bench, rows in (("methods", image, OF_IMAGES), ("methods-3d", scene, ROWS))
}

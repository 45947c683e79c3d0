"""Preference Score Distillation (arXiv 2603.01594): text-to-image aligned with a reward model by score distillation.

    from psd import RunConfig, generate
    *_, last = generate(RunConfig.from_preset("toybox-image", prompt="a red mushroom with a white stem"))

Importing this package loads neither torch nor gradio, diffusers or transformers.
"""

import os
import sys

# Read when torch loads OpenMP, so set before. Threads that spin while they wait make a machine with a busy neighbour
# 40 times slower; threads that sleep at once double the time of this project's small layers: so spin a few
# microseconds, then sleep. "Active" is what makes libgomp, Linux's, spin at all in a process that has more of them than
# cores, as every server has: by "passive" a run outside the main thread takes 1.8 times as long. Others would spin on.
os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE" if sys.platform == "linux" else "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from psd.config import PRESETS, RunConfig

__version__ = "0.1.0"
__all__ = ["PRESETS", "RunConfig", "generate"]


def __getattr__(name: str):
    # `generate` needs torch (0.8 s to import); only those who call it pay.
    if name == "generate":
        from psd.run import generate

        return generate
    raise AttributeError(f"module 'psd' has no attribute {name!r}")

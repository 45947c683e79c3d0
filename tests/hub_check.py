"""`python -m psd.check` on small published models, from the hub of its environment, on four pictures of noise."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from psd import check
from psd.config import PRESETS
from tests.published import shrink

shrink()
folder, rng = Path(sys.argv.pop(1)), np.random.default_rng(0)
for name in check.README_SHA256:
    Image.fromarray(rng.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(folder / name, lossless=True)
    check.README_SHA256[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
check.PROMPTS = check.PROMPTS[:1]
PRESETS["mvdream-fast"].update(grid_size=24, render_size=16, samples=12, mesh_faces=2000)
check.main()

"""Precompute the page's examples: `python examples/make_results.py` runs the entries of prompts.json, both arms, and of
methods.json, every method.

With titles as arguments only those are run anew.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from psd import RunConfig, generate  # noqa: E402
from psd.record import ARCHIVE  # noqa: E402

ENTRIES = ("prompts.json", "methods.json")
HEAVY = ("ply", "obj", "field")  # the GLB holds the same mesh


def main() -> None:
    entries = [entry for name in ENTRIES for entry in json.loads((HERE / name).read_text(encoding="utf-8"))]
    index = []
    for entry in entries:
        slug = re.sub(r"[^a-z0-9]+", "-", entry["title"].lower()).strip("-")
        index.append({"slug": slug, "title": entry["title"], "note": entry.get("note", "")})
        if sys.argv[1:] and entry["title"] not in sys.argv[1:]:
            continue
        config = RunConfig.from_preset(**entry["config"])
        *_, last = generate(config, HERE / ".runs")
        for heavy in (file for arm in last.arms.values() for kind, file in arm.files.items() if kind in HEAVY):
            heavy.unlink()
        (last.directory / ARCHIVE).unlink(missing_ok=True)
        shutil.rmtree(HERE / slug, ignore_errors=True)
        last.directory.rename(HERE / slug)
        print(slug, {name: arm.scores for name, arm in last.arms.items()})
    shutil.rmtree(HERE / ".runs", ignore_errors=True)
    made = [entry for entry in index if (HERE / entry["slug"]).exists()]
    (HERE / "index.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

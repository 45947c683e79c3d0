"""Precompute the page's examples: `python examples/make_results.py` runs every entry of prompts.json, both arms."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from psd import RunConfig, generate  # noqa: E402


def main() -> None:
    entries = json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))
    index = []
    for entry in entries:
        config = RunConfig.from_preset(**entry["config"])
        *_, last = generate(config, HERE / ".runs")
        slug = re.sub(r"[^a-z0-9]+", "-", entry["title"].lower()).strip("-")
        shutil.rmtree(HERE / slug, ignore_errors=True)
        last.directory.rename(HERE / slug)
        index.append({"slug": slug, "title": entry["title"]})
        print(slug, last.scores)
    shutil.rmtree(HERE / ".runs", ignore_errors=True)
    (HERE / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

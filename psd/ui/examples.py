"""What ships in examples/: prompts to start from, precomputed results, API recipes.

    examples/prompts.json                [{"title": str, "note": str, "config": {what differs from the preset}}]
    examples/methods.json                the same, of every method on one seed
    examples/index.json                  [{"slug": str, "title": str, "note": str}]   absent until there are results
    examples/<slug>/                     a run's folder: psd.record reads it
    examples/api_python.py, api_javascript.mjs, api_curl.sh

Only reads; `psd.run` knows how to make a result.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from psd.config import LOCAL, MODES, RunConfig
from psd.record import Result, read

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GALLERIES = {
    **{mode: f"Examples, {info.label}: click to see the arms and what to look at" for mode, info in MODES.items()},
    "methods": "Methods on one seed: click to see what every method of the field makes of it",
}
SLUG = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True)
class Example:
    """A precomputed run: shown at once, no model is touched."""

    title: str
    directory: Path
    note: str = ""  # what to look at

    @cached_property
    def result(self) -> Result:
        """Its folder, read once: the page asks for it several times while it is built."""
        return read(self.directory)

    @property
    def gallery(self) -> str:
        """Where it hangs, a key of GALLERIES: of more arms than two, or by its mode."""
        return "methods" if len(self.result.arms) > 2 else self.result.settings.get("mode", "")

    @property
    def thumbnail(self) -> Path | None:
        """Its first arm's picture."""
        return next((arm.picture for arm in self.result.arms.values() if arm.picture), None)


def load_prompts(root: Path = EXAMPLES) -> list[dict[str, Any]]:
    """Complete settings of every saved prompt, but for files: what was dropped on the page stays there."""
    saved = json.loads((root / "prompts.json").read_text(encoding="utf-8"))
    settings = [RunConfig.from_preset(**entry["config"]).to_dict() for entry in saved]
    return [{name: value for name, value in each.items() if name not in LOCAL} for each in settings]


def load_examples(root: Path = EXAMPLES) -> list[Example]:
    """The precomputed results, those whose pictures are there; [] while index.json does not exist."""
    index = root / "index.json"
    if not index.exists():
        return []
    entries = json.loads(index.read_text(encoding="utf-8"))
    found = [
        Example(entry["title"], root / entry["slug"], entry.get("note", ""))
        for entry in entries
        if SLUG.fullmatch(entry["slug"])
    ]
    return [example for example in found if example.thumbnail]


def recipe(name: str, root: Path = EXAMPLES) -> str:
    return (root / name).read_text(encoding="utf-8")

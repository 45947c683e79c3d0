"""README tells the truth where a machine can check it: its tree, its commands, the pictures and files it links."""

from __future__ import annotations

import re
from pathlib import Path

from psd.config import FIELDS, PRESETS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = README.split("## Where to read")[1].split("```")[1]


def test_the_tree_is_the_real_one():
    named = [line.split()[0].rstrip(",") for line in TREE.strip().splitlines()]
    assert len(named) > 15 and [name for name in named if not (ROOT / name).exists()] == []
    modules = {
        path.name for path in (ROOT / "psd").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert [name for name in sorted(modules - {"__init__.py", "__main__.py"}) if name not in TREE] == []


def test_what_it_links_is_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_the_targets_and_presets_that_it_names_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^|`)make ([a-z][a-z-]+)", README, re.M))
    assert targets and [target for target in targets if not re.search(rf"^{target}:", makefile, re.M)] == []
    presets = {
        name
        for name in re.findall(r"`([a-z0-9]+-[a-z0-9-]+)`", README)
        if name.startswith(("toybox-", "sd", "mvdream-fast"))
    }
    assert presets and presets <= PRESETS.keys()


def test_the_settings_in_its_table_are_settings():
    table = README.split("## What the controls do")[1].split("##")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row) if "*" not in name}
    assert names and names <= FIELDS.keys()

"""README, and what it links, tell the truth where a machine can check it: tree, commands, pictures and files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from psd.config import FIELDS, PRESETS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "psd/bench/README.md", "psd/ui/README.md", "assets/toybox/README.md"]
TREE = README.split("## Where to read")[1].split("```")[1]


def test_the_tree_is_the_real_one():
    named = [line.split()[0].rstrip(",") for line in TREE.strip().splitlines()]
    assert len(named) > 15 and [name for name in named if not (ROOT / name).exists()] == []
    modules = {
        path.name for path in (ROOT / "psd").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert [name for name in sorted(modules - {"__init__.py", "__main__.py"}) if name not in TREE] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_it_links_is_there(name: str):
    document = ROOT / name
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    links = [link for link in links if not link.startswith("http")]
    assert links and [link for link in links if not (document.parent / link).exists()] == []


def test_readme_leads_to_all_of_them():
    assert [name for name in DOCUMENTS[1:] if f"]({name})" not in README] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_targets_and_presets_that_it_names_exist(name: str):
    makefile, text = ((ROOT / each).read_text(encoding="utf-8") for each in ("Makefile", name))
    targets = set(re.findall(r"(?:^|`)make ([a-z][a-z-]+)", text, re.M))
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.M)] == []
    presets = {
        name
        for name in re.findall(r"`([a-z0-9]+-[a-z0-9-]+)`", text)
        if name.startswith(("toybox-", "sd", "table-", "mvdream-fast"))
    }
    assert presets <= PRESETS.keys() and ((targets and presets) or name != DOCUMENTS[0])


def test_the_settings_in_its_table_are_settings():
    table = README.split("## What the controls do")[1].split("##")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row) if "*" not in name}
    assert names and names <= FIELDS.keys()

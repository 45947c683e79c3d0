"""The model cards of the embedded weights, as a hub reads them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from psd.toybox.train import TRAINED
from psd.toybox.train_mvdream import TRAINERS
from psd.toybox.workshop import ASSETS, STAGES

FOLDERS = sorted(path for path in ASSETS.iterdir() if path.is_dir())
COMMANDS = {"psd.toybox.train": set(TRAINED), "psd.toybox.train_mvdream": set(TRAINERS)}
TASKS = {
    "text-to-image",
    "text-to-3d",
    "zero-shot-image-classification",
    "image-classification",
    "image-to-image",
    "other",
}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_embedded_model_has_a_card_that_is_true(folder: Path):
    card = ModelCard.load(folder / "README.md")
    about = card.data
    assert (about.license, about.library_name in ("diffusers", "transformers")) == ("apache-2.0", True)
    assert about.pipeline_tag in TASKS and about.tags[0] == "toybox"
    assert card.text.strip().startswith(f"# toybox/{folder.name}\n")
    text = " ".join(card.text.split())
    ((command, stages),) = re.findall(r"`python -m (\S+) --stages ([a-z0-9 ]+)`", text)
    assert set(stages.split()) <= COMMANDS[command] <= STAGES.keys() and stages.split()[-1] == folder.name
    for link, heading in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", text):
        linked = (folder / link).read_text(encoding="utf-8")
        slugs = {
            re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
            for title in re.findall("^#+ (.+)$", linked, re.M)
        }
        assert not heading or heading in slugs
    assert "**Measured**" in text and "**Limits.**" in text
    assert not re.search(r"\d ?(%|dB)", text)  # numbers that training changes stand in one place


def test_there_is_a_card_for_every_stage_that_leaves_a_model():
    assert {folder.name for folder in FOLDERS} == STAGES.keys() - {"text", "vae"}  # parts of sd

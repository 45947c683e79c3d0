"""Faults of the machine that are quick to make: flipped bits of weights, a clock that was put back, a killed run.

`make faults` makes the others, in processes of their own.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from psd import record
from psd.errors import RequestError
from psd.export import export_json
from psd.models import hub, weights
from psd.models.priors.table import PRIORS
from psd.models.rewards.table import REWARDS
from psd.ui import files, parts

MODELS = {**PRIORS, **REWARDS}
EMBEDDED = {name: info.sources for name, info in MODELS.items() if all(each.is_folder for each in info.sources)}
EMBEDDED["toybox/taesd"] = (PRIORS["toybox/sd"].fast_decoder.source,)
WEIGHTS = {
    f"{name}: {path.relative_to(source.path)}": (name, path)
    for name, sources in EMBEDDED.items()
    for source in sources[:1]
    for path in sorted(Path(source.path).rglob("*.safetensors"))
}


def flip(data: bytearray) -> bytearray:
    data[-1000] ^= 1  # one bit of one weight
    return data


def cut(data: bytearray) -> bytearray:
    return data[: len(data) // 2]


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("which", WEIGHTS)
def test_damaged_weights_of_every_embedded_model_are_one_sentence_that_names_it(which: str, damage, tmp_path: Path):
    name, path = WEIGHTS[which]
    for file in (path, path.with_name(path.name + weights.SUMS)):
        shutil.copy(file, tmp_path)
    with weights.readable_errors(name, hub.Source(str(tmp_path))):
        pass  # whole
    (tmp_path / path.name).write_bytes(damage(bytearray(path.read_bytes())))
    with (
        pytest.raises(RequestError, match=rf"^A file of '{name}' is damaged: restore the folder's files"),
        weights.readable_errors(name, hub.Source(str(tmp_path))),
    ):
        pytest.fail("nobody noticed")


def test_every_file_of_weights_has_its_sum(tmp_path: Path):
    for which, (_, path) in WEIGHTS.items():
        sums = path.with_name(path.name + weights.SUMS)
        assert sums.is_file() and sums.read_text() == f"{weights.sha256_of(path)}  {path.name}\n", which
    (tmp_path / "a.safetensors").write_bytes(b"abc")
    weights.export_sums(tmp_path)
    assert (tmp_path / "a.safetensors.sha256").read_text().startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")


def test_runs_of_a_clock_that_ran_ahead_give_way_to_todays(tmp_path: Path):
    """Ten of next year, then the clock is put back: the folder stays bounded, and today's runs are kept."""
    now = time.time()
    for index in range(10):
        ages_s = {f"ahead{index}": -3e7 - index, f"today{index}": index}
        for name, age_s in ages_s.items():
            folder = tmp_path / name
            folder.mkdir()
            (folder / "run.json").write_text("{}")
            os.utime(folder, (now - age_s, now - age_s))
    files.prune(tmp_path, max_entries=10)
    assert {path.name for path in tmp_path.iterdir()} == {f"today{index}" for index in range(10)}


@pytest.mark.parametrize("state", ["running", "writing"])
def test_what_a_killed_server_left_is_told_as_it_is(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Half a picture under its other name is no file of the run, and nothing is said to follow."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    folder = tmp_path / "psd-runs" / "0123456789ab"
    folder.mkdir(parents=True)
    (folder / "with.png.partial").write_bytes(b"\x89PNG")
    export_json(folder / record.MANIFEST, {"config": {"steps": 9}, "state": state, "arms": {}, "steps_done": 3})
    os.utime(folder, (1, 1))
    result = record.read(folder)
    assert [path.name for path in result.files] == ["run.json"] and not result.settled
    assert "Done" not in parts.end_status(result) and "follow" not in parts.end_status(result)

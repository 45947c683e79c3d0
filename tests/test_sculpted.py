"""The file of an object: what a run writes of it, what goes on from it, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from torch import Tensor

from psd import RunConfig, generate, record
from psd.__main__ import main
from psd.distil import distil
from psd.errors import RequestError
from psd.events import Finished
from psd.modes import pictures
from psd.modes.object import ObjectStage
from psd.safety import check_request
from psd.scene.render import render
from psd.sculpted import export_sculpted, read_sculpted
from psd.ui import form
from tests.test_object3d import CONFIG, ExactPrior, stage_of

VOXELS = np.random.default_rng(0).normal(size=(1, 4, 16, 16, 16)).astype(np.float32)
OBJECT = RunConfig.from_preset(
    "toybox-fast", prompt="a blue chair with yellow legs", steps=2, grid_size=16, render_size=16, samples=8,
    mesh_faces=500, arms="without",
)  # fmt: skip


def made(config: RunConfig) -> ObjectStage:
    """A stage at its end."""
    stage = stage_of({"with": config}, ExactPrior())
    list(distil(stage.models.prior, stage))
    return stage


@torch.no_grad()
def seen(stage: ObjectStage) -> Tensor:
    """Without the grid that says which cells are empty: a run finds that anew."""
    sculpture, cameras = stage.sculptures["with"], pictures.around(stage.frame, 4)
    return render(
        sculpture.field, sculpture.background, cameras, 16, samples=24, jitter=None, with_normals=False, occupancy=None
    ).rgb


def kept(stage: ObjectStage, path: Path) -> Path:
    (field,) = [each for each in stage.artefacts("with") if each.kind == "field"]
    field.write(path, {"arm": "with", "prompt": "a chair", "prior": "exact"})
    return path


@pytest.mark.parametrize(
    "settings",
    [{}, dict(lr_density=0.5, lr_shadow=0.3), dict(field="hashgrid")],
    ids=["voxels", "shadow", "hashgrid"],
)
def test_a_run_starts_from_the_object_that_another_one_ended_with(settings: dict, tmp_path: Path):
    """To three digits of half of the bytes; whatever the learning rates."""
    config = replace(CONFIG, **settings)
    stage = made(config)
    path = kept(stage, tmp_path / "with_field.safetensors")
    again = stage_of({"with": replace(config, start=str(path), lr=0.02)}, ExactPrior())
    fresh = stage_of({"with": config}, ExactPrior())

    before, after, nothing = map(seen, (stage, again, fresh))
    off = (before - after).abs().max()
    assert off < 2e-3 and off < 0.1 * (before - nothing).abs().max()


def test_a_finer_grid_goes_on_from_a_coarser_one(tmp_path: Path):
    path = kept(made(CONFIG), tmp_path / "with_field.safetensors")
    finer = stage_of({"with": replace(CONFIG, start=str(path), grid_size=31)}, ExactPrior())
    field = finer.sculptures["with"].field
    assert field.resolution == 31
    corners = field.state()["voxels"][..., ::2, ::2, ::2]
    assert torch.allclose(corners, torch.from_numpy(read_sculpted(path).field["voxels"]), atol=1e-5)


def test_the_same_object_gives_the_same_bytes(tmp_path: Path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        export_sculpted(path, {"voxels": VOXELS * 1e6}, {}, {})
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert np.isfinite(read_sculpted(paths[0]).field["voxels"]).all()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    *_, last = generate(OBJECT, tmp_path_factory.mktemp("runs"))
    return last


def test_a_run_goes_on_from_a_folder_on_the_command_line(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    asked = "--preset toybox-fast --steps 2 --grid-size 16 --render-size 16 --samples 8 --mesh-faces 500 --arms without"
    status = main(["a red chair", *asked.split(), "--start", str(finished.directory), "--output", str(tmp_path)])
    assert status == 0 and "Started from a field (SHA-256 " in capsys.readouterr().err
    (found,) = map(record.read, tmp_path.iterdir())
    assert found.settings["start"] == "" and len(found.settings["start_sha256"]) == 64
    assert str(finished.directory) not in (found.directory / "run.json").read_text()

    assert main(["a red chair", "--start", str(finished.directory / "previews"), "--output", str(tmp_path)]) == 2
    assert "is not a file" in capsys.readouterr().err
    assert main(["a red chair", "--start", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "start names a run that has no picture for mode image." in capsys.readouterr().err


def test_an_objects_picture_starts_a_picture(finished: Finished):
    assert record.start_of(finished.directory, "image") == finished.arms["without"].picture
    assert record.start_of(finished.directory, "3d").name == "without_field.safetensors"


def tensors(**arrays: np.ndarray) -> bytes:
    return save({name.replace("__", "."): array for name, array in arrays.items()})


REFUSED = {
    "text": (b"hello", "is not a safetensors file"),
    "another array": (tensors(negative=VOXELS), "holds ['negative'], no field"),
    "a background alone": (tensors(background__logits=VOXELS), "holds ['background.logits'], no field"),
    "more": (tensors(field__voxels=VOXELS, field__more=VOXELS), "holds an array of [1, 4, 16, 16, 16]"),
    "no cube": (tensors(field__voxels=VOXELS[..., :8]), "holds an array of [1, 4, 16, 16, 8]"),
    "too small": (tensors(field__voxels=VOXELS[..., :2, :2, :2]), "[1, 4, R, R, R] with R from 16 to 160 is needed"),
    "whole numbers": (tensors(field__voxels=VOXELS.astype(np.int64)), "of type I64, F16 or F32 is needed"),
    "a NaN": (tensors(field__voxels=VOXELS * np.float32("nan")), "holds numbers that are not finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_holds_no_field_is_refused(case: str, tmp_path: Path):
    content, why = REFUSED[case]
    path = tmp_path / "field.safetensors"
    path.write_bytes(content)
    told(OBJECT, path, why + ("" if "array" in why else ": give an ARM_field.safetensors"))


def told(config: RunConfig, path: Path, why: str, field: str = "start") -> None:
    with pytest.raises(RequestError) as refused:
        check_request(replace(config, start=str(path)), allow_local=True)
    assert why in str(refused.value) and refused.value.field == field and str(path.parent) not in str(refused.value)


def test_what_does_not_fit_the_run_is_refused(tmp_path: Path):
    path = tmp_path / "field.safetensors"
    export_sculpted(path, {"voxels": VOXELS.repeat(2, 2).repeat(2, 3).repeat(2, 4)}, {}, {})
    told(OBJECT, path, "start holds a grid of 32 voxels a side, got grid_size 16: set it to 32.", "grid_size")
    told(replace(OBJECT, field="hashgrid"), path, "start holds a field of kind voxels, got hashgrid", "field")
    export_sculpted(path, {"density_network.0.weight": VOXELS}, {}, {})
    check_request(replace(OBJECT, field="hashgrid", start=str(path)), allow_local=True)
    with pytest.raises(RequestError, match="holds a field of other sizes: give an ARM_field"):
        stage_of({"with": replace(CONFIG, field="hashgrid", start=str(path))}, ExactPrior())


def test_a_stranger_names_a_run_of_the_server_or_an_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    *_, last = generate(OBJECT, tmp_path / "psd-runs")
    settings = OBJECT.to_dict()
    for name in (last.directory.name, f"{last.directory.name}/without"):
        assert form.checked({**settings, "start": name}).start == str(last.arms["without"].files["field"])
    for name in ("../../etc", f"{last.directory.name}/../x", "/etc/passwd", "0" * 12):
        with pytest.raises(RequestError) as refused:
            form.checked({**settings, "start": name})
        assert refused.value.field == "start"

"""The learned n as a file: what a run writes of it, what starts from it in both modes, what is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor

from psd import RunConfig, generate, record
from psd.config import FIELDS, LOCAL
from psd.contracts import Models
from psd.embedding import export_embedding, read_embedding
from psd.errors import RequestError
from psd.events import Finished
from psd.methods.negative import starting_negative
from psd.models.hub import STRANGER
from psd.models.priors import load_prior
from psd.modes.image import ImageStage
from psd.safety import check_request
from psd.tensors import ABOUT
from psd.toybox.evaluate import sample
from psd.ui import form
from tests import test_image, test_object3d

PROMPT = "a red mushroom with a white stem"
CONFIG = RunConfig.from_preset(prompt=PROMPT, negative_prompt="a blue lamp", steps=4, seed=3)
VALUES = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)  # as the exact priors read it


@pytest.fixture
def given(tmp_path: Path) -> Path:
    path = tmp_path / "given.safetensors"
    export_embedding(path, VALUES, {})
    return path


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    *_, last = generate(replace(CONFIG, arms="with, without, no-negative"), tmp_path_factory.mktemp("run"))
    return last


def about(path: Path) -> dict:
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()[ABOUT])


def test_a_file_gives_back_the_same_bits_and_says_which_it_was(tmp_path: Path):
    first, again = tmp_path / "a", tmp_path / "b"
    for path in (first, again):
        export_embedding(path, VALUES, {"steps": 4, "prior": "toybox/sd"})
    assert first.read_bytes() == again.read_bytes()
    found = read_embedding(first)
    assert found.values.tobytes() == VALUES.tobytes() and found.values.shape == (4, 2)
    assert found.sha256 == hashlib.sha256(first.read_bytes()).hexdigest()
    assert about(first) == {"format": 1, "steps": 4, "prior": "toybox/sd"}


def test_every_arm_that_learns_n_writes_it_with_what_it_is_of(learned: Finished):
    files = {name: arm.files.get("negative") for name, arm in learned.arms.items()}
    assert files["without"] is files["no-negative"] is None
    assert files["with"] == learned.directory / "with_negative.safetensors"
    start = load_prior(CONFIG.prior).embed([CONFIG.negative_prompt])[0].numpy()
    moved = np.linalg.norm(read_embedding(files["with"]).values - start)
    assert moved == pytest.approx(record.read(learned.directory).rows[-1]["negative_drift"], rel=1e-4) and moved > 0
    assert about(files["with"]) == {
        "format": 1, "arm": "with", "negative_prompt": "a blue lamp", "prior": "toybox/sd", "steps": 4,
        "reward": "toybox/preference", "negative_lr": CONFIG.negative_lr,
    }  # fmt: skip


def test_a_run_that_breaks_down_keeps_its_n(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prior, seen = load_prior(CONFIG.prior), set()
    predict = prior.eps

    def eps(x_t: Tensor, t: int, *rest: Tensor) -> Tensor:
        seen.add(t)
        if len(seen) == 4:
            raise ZeroDivisionError
        return predict(x_t, t, *rest)

    monkeypatch.setattr(prior, "eps", eps)
    with pytest.raises(ZeroDivisionError):
        list(generate(replace(CONFIG, arms="negative-only"), tmp_path))
    (folder,) = tmp_path.iterdir()
    assert about(record.read(folder).arms["negative-only"].files["negative"])["steps"] == 3


@pytest.mark.parametrize("mode", ["image", "3d"])
def test_all_arms_start_from_the_file_bit_for_bit(mode: str, given: Path):
    tests = {"image": test_image, "3d": test_object3d}[mode]
    config = replace(tests.CONFIG, negative_from=str(given))
    arms = {"with": config, "without": tests.plain(config)}
    if mode == "3d":
        stage = test_object3d.stage_of(arms, test_object3d.ExactPrior())
    else:
        prior = test_image.ExactPrior()
        models = Models(prior, test_image.score, prior.decode)
        stage = ImageStage(config, arms, models, [CONFIG.prompt] * 2, [0, 1])
    runs = 2 if mode == "image" else 1
    expected = torch.from_numpy(VALUES).expand(runs, -1, -1)
    assert torch.equal(stage.arms["with"].method.negative.value, expected)
    assert torch.equal(stage.arms["without"].method.n, expected)


def test_plain_ddim_follows_the_file(given: Path):
    config = test_image.plain(test_image.CONFIG)
    usual, other = (
        test_image.run({"without": each})[-1].x_c["without"]
        for each in (config, replace(config, negative_from=str(given)))
    )
    assert not torch.allclose(usual, other)


def test_what_one_mode_learned_starts_the_other(tmp_path: Path):
    """Table 6 in small: n learned in 3D, loaded into an image's arms, learning and not."""
    settings = dict(steps=2, pref_interval=1, grid_size=16, render_size=16, samples=8, mesh_faces=500, arms="with")
    *_, object_ = generate(RunConfig.from_preset("toybox-fast", prompt=PROMPT, **settings), tmp_path / "3d")
    path = object_.arms["with"].files["negative"]
    *_, last = generate(replace(CONFIG, negative_from=str(path), steps=2), tmp_path / "2d")
    assert last.arms["with"].picture and not last.failed

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert last.remarks == (
        f"n started from a file (SHA-256 {digest[:16]}), not from the negative prompt: restored settings do not bring "
        "it.",
    )
    assert about(last.arms["with"].files["negative"])["negative_from_sha256"] == digest
    for file in ("run.json", "with.png"):
        settings = record.settings_of(last.directory / file)
        assert settings["negative_from_sha256"] == digest
        assert RunConfig.from_dict(settings) == replace(CONFIG, steps=2)
    for written in last.directory.iterdir():
        assert os.fsencode(tmp_path) not in written.read_bytes(), written.name


def test_a_file_of_another_prior_is_refused_with_both_shapes(given: Path, tmp_path: Path):
    with pytest.raises(RequestError) as refusal:
        next(generate(replace(CONFIG, negative_from=str(given)), tmp_path / "runs"))
    assert str(refusal.value) == (
        "negative_from 'given.safetensors' holds an array of [4, 2], toybox/sd reads [32, 192]: give an "
        "ARM_negative.safetensors that a run with this prior has written."
    )
    assert refusal.value.field == "negative_from" and not (tmp_path / "runs").exists()


def tensors(**arrays: np.ndarray) -> bytes:
    return save(arrays)


ENDLESS = b'{"negative":{"dtype":"F32","shape":[9,9],"data_offsets":[0,324]}}'
REFUSED = {
    "text": (b"hello", "is not a safetensors file"),
    "nothing": (b"", "is not a safetensors file"),
    "a pickle": (b"\x80\x04\x95cos\nsystem\n(S'true'\ntR.", "is not a safetensors file"),
    "cut": (tensors(negative=VALUES)[:-1], "is not a safetensors file"),
    "data that is not there": (struct.pack("<Q", len(ENDLESS)) + ENDLESS, "is not a safetensors file"),
    "another key": (tensors(weight=VALUES), "holds ['weight'], not 'negative' alone"),
    "more keys": (tensors(negative=VALUES, more=VALUES), "holds ['more', 'negative'], not 'negative' alone"),
    "no key": (tensors(), "holds [], not 'negative' alone"),
    "float16": (tensors(negative=VALUES.astype(np.float16)), "holds numbers of type F16, F32 is needed"),
    "whole numbers": (tensors(negative=VALUES.astype(np.int64)), "holds numbers of type I64, F32 is needed"),
    "a batch": (tensors(negative=VALUES[None]), "holds an array of [1, 4, 2], [tokens, width] is needed"),
    "no numbers": (tensors(negative=VALUES[:0]), "holds an array of [0, 2], [tokens, width] is needed"),
    "a NaN": (tensors(negative=VALUES * np.float32("nan")), "holds numbers that are not finite"),
    "an infinity": (tensors(negative=np.full((4, 2), np.inf, np.float32)), "holds numbers that are not finite"),
    "too much": (tensors(negative=np.zeros((1024, 1280), np.float32)), "has 5.0 MB, at most 4 MB are allowed"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_holds_no_embedding_is_refused(case: str, tmp_path: Path):
    content, why = REFUSED[case]
    path = tmp_path / "n.safetensors"
    path.write_bytes(content)
    told(path, why)


def told(path: Path, why: str) -> None:
    with pytest.raises(RequestError) as refusal:
        check_request(replace(CONFIG, negative_from=str(path)), allow_local=True)
    help_ = "give an ARM_negative.safetensors that a run has written."
    assert (
        str(refusal.value) == f"negative_from {path.name!r} {why}: {help_}" and refusal.value.field == "negative_from"
    )


def test_what_is_no_readable_file_is_refused(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none", tmp_path / "pipe"):
        told(path, "is not a file")

    def locked(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", locked)
    told(given, "cannot be read (permission denied)")


def test_any_bytes_are_read_or_refused_in_a_sentence(tmp_path: Path):
    whole, rng, path = bytearray(tensors(negative=VALUES)), np.random.default_rng(1), tmp_path / "n"
    for _ in range(500):
        changed = whole.copy()
        for at in rng.integers(len(changed), size=rng.integers(1, 4)):
            changed[at] = rng.integers(256)
        path.write_bytes(changed)
        with contextlib.suppress(RequestError):
            assert read_embedding(path).values.size == VALUES.size


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    return folder


def test_a_stranger_names_uploads_alone_and_is_told_nothing_of_other_files(given: Path, cache: Path, tmp_path: Path):
    uploaded, link = cache / "n.safetensors", cache / "link.safetensors"
    export_embedding(uploaded, VALUES, {})
    link.symlink_to(given)
    check_request(replace(CONFIG, negative_from=str(uploaded)), uploads=cache)
    others = (given, link, tmp_path / "none", "/etc/passwd", f"{cache}/../{given.name}", ".", "~", "n.safetensors")
    for path in map(str, others):
        for uploads in (cache, None):
            with pytest.raises(RequestError, match=r"^negative_from must be an upload: send an ARM_negative"):
                check_request(replace(CONFIG, negative_from=path), uploads=uploads)
        with pytest.raises(RequestError, match="must be an upload"):
            form.checked({"prompt": PROMPT, "negative_from": path})
        with pytest.raises(RequestError, match="must be an upload"):
            next(generate(replace(CONFIG, negative_from=path), tmp_path / "runs", access=STRANGER, uploads=cache))


def test_an_upload_reaches_the_settings_by_its_path(cache: Path):
    uploaded = cache / "n.safetensors"
    export_embedding(uploaded, VALUES, {})
    for sent in (str(uploaded), {"path": str(uploaded), "meta": {"_type": "gradio.FileData"}}):
        assert form.checked({"prompt": PROMPT, "negative_from": sent}).negative_from == str(uploaded)
    for nothing in (None, "", {}):
        assert form.checked({"prompt": PROMPT, "negative_from": nothing}).negative_from == ""
    for sent in (3, ["a"], {"path": 3}):
        with pytest.raises(RequestError, match="negative_from must be text"):
            form.checked({"prompt": PROMPT, "negative_from": sent})


def test_a_path_neither_leaves_with_the_settings_nor_comes_with_them(given: Path, tmp_path: Path):
    assert LOCAL == ("start", "negative_from")
    config = replace(CONFIG, negative_from=str(given))
    assert config.to_dict() == CONFIG.to_dict() and config.to_dict()["negative_from"] == ""
    hostile = CONFIG.to_dict() | {"negative_from": "/etc/passwd"}
    assert RunConfig.from_dict(hostile) == CONFIG
    (tmp_path / "run.json").write_text(json.dumps({"config": hostile}))
    assert form.checked(record.settings_of(tmp_path / "run.json")) == CONFIG
    assert form.settings_of_query({"prompt": PROMPT, "negative_from": "/etc/passwd"})["negative_from"] == ""
    assert form.settings_of_query({"negative_from": "/etc/passwd"}) == {}
    assert form.fill(config.to_dict())[list(FIELDS).index("negative_from")] is None


def test_diffusers_own_ddim_takes_a_negative_embedding():
    captions, prior = [PROMPT, "a blue chair"], load_prior("toybox/sd")
    usual = sample(captions, "cpu", steps=2)
    torch.testing.assert_close(sample(captions, "cpu", steps=2, negative=prior.embed([""])[0]), usual)
    lamp = starting_negative(replace(CONFIG, negative_prompt="a blue lamp"), prior)[0]
    assert not torch.allclose(sample(captions, "cpu", steps=2, negative=lamp), usual)

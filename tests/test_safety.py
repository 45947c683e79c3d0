"""Every refusal is one sentence that names the setting, the value given and what would be accepted."""

from __future__ import annotations

import dataclasses
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psd.config import MAX_PROMPT_CHARS, PRESETS, RunConfig
from psd.errors import RequestError, shown
from psd.picture import MAX_IMAGE_SIDE_PX, check_image
from psd.safety import check_request

FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}
BOUNDED = [name for name, field in FIELDS.items() if field.metadata["low"] is not None]
CHOSEN = [name for name, field in FIELDS.items() if field.metadata["choices"]]


def config_with(**settings: object) -> RunConfig:
    """A config as a careless caller can make it: its fields hold anything, whatever their annotations say."""
    config = RunConfig(prompt="a red mushroom with a white stem")
    for name, value in settings.items():
        object.__setattr__(config, name, value)
    return config


def refusal(allow_local: bool = False, **settings: object) -> str:
    with pytest.raises(RequestError) as caught:
        check_request(config_with(**settings), allow_local=allow_local)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes(preset: str):
    check_request(RunConfig.from_preset(preset, prompt="a blue lamp"))


def test_an_image_has_no_more_steps_than_the_schedule():
    check_request(config_with(steps=1000))
    assert refusal(mode="3d", prior="toybox/mvdream", images=2).startswith("images must be 1 in mode 3d, got 2")
    assert refusal(steps=1001) == "steps must be a whole number from 2 to 1000 in mode image, got 1001."


@pytest.mark.parametrize(("name", "least"), [("render_size", 40), ("grid_size", 48)])
def test_the_later_part_of_a_run_is_no_coarser(name: str, least: int):
    for allowed in (0, least, 2 * least):
        check_request(config_with(**{f"{name}_end": allowed}))
    message = refusal(**{f"{name}_end": least - 1})
    assert message == f"{name}_end must be 0 or at least {name} = {least}, got {least - 1}."


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_are_inclusive(name: str):
    field = FIELDS[name]
    low, high = field.metadata["low"], field.metadata["high"]
    others = {"t_min": {"t_max": 1.0}, "t_max": {"t_min": 0.0}, "time_shift_low": {"time_shift_high": 0.2}}
    others["time_shift_high"] = {"time_shift_low": -0.2}
    others["steps"] = {"mode": "3d", "prior": "ashawkey/mvdream-sd2.1-diffusers"}
    for value in (low, high):
        check_request(config_with(**{**others.get(name, {}), name: value}))
    for value in (low - 1, high + 1):
        message = refusal(**{name: value})
        assert message.startswith(f"{name} must be")
        assert str(value) in message


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.type == "float"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_are_finite(name: str, value: float):
    assert refusal(**{name: value}).startswith(f"{name} must be a finite number from ")


@pytest.mark.parametrize("name", FIELDS)
def test_types_are_exact(name: str):
    wrong = {
        "str": (None, 3, True, ["a"], {"a": 1}, b"a"),
        "int": (None, "3", True, 3.0, float("nan"), [3]),
        "float": (None, "3", True, [0.5], 1j),
        "bool": (None, 0, 1, "true", 1.0),
    }
    for value in wrong[FIELDS[name].type]:
        assert refusal(**{name: value}).startswith(f"{name} must be ")


def test_a_whole_number_serves_where_a_number_is_asked_for():
    check_request(config_with(gamma=7))


def test_a_number_python_cannot_print_is_refused_too():
    assert "more than 38 digits" in refusal(seed=10**5000)
    assert "more than 38 digits" in refusal(gamma=-(10**5000))
    assert "got a value of type list" in refusal(gamma=[10**5000])


@pytest.mark.parametrize("name", CHOSEN)
def test_choices_are_listed(name: str):
    message = refusal(**{name: "elsewhere"})
    assert all(choice in message for choice in FIELDS[name].metadata["choices"])


def test_near_misses_are_answered_with_the_nearest_name():
    assert "did you mean centred?" in refusal(pref_form="centered")
    assert "did you mean toybox-quick" in refusal(preset="toybox-quik")
    assert "did you mean toybox/sd or" in refusal(prior="toybox/sdd")
    assert "did you mean toybox/preference" in refusal(reward="Toybox/Preferences")


@pytest.mark.parametrize("prompt", ["", " ", "\t\n \u3000"])
def test_an_empty_prompt_is_refused(prompt: str):
    assert refusal(prompt=prompt).startswith("prompt is empty")


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_text_is_bounded_and_printable(name: str):
    check_request(config_with(**{name: "é" * MAX_PROMPT_CHARS}))
    check_request(config_with(**{name: "a lamp,\n\ta chair 🍄"}))
    assert f"{name} has 5000 characters, at most {MAX_PROMPT_CHARS}" in refusal(**{name: "a" * 5000})
    assert f"{name} has the control character U+0000 at position 2" in refusal(**{name: "a\0b"})
    assert "U+001B" in refusal(**{name: "\x1b[31m"})
    assert "U+D83C" in refusal(**{name: "half an emoji \ud83c"})


def test_rules_between_fields():
    assert "t_min must be below t_max" in refusal(t_min=0.5, t_max=0.5)
    assert "time_shift_low must not be above" in refusal(time_shift_low=0.1)
    assert "image_size must be a multiple of 64" in refusal(image_size=100)
    assert "try 64" in refusal(image_size=1)
    check_request(config_with(image_size=512))
    object_of = {"mode": "3d", "prior": "toybox/mvdream", "lambda_rgb": 0.3}
    assert "lambda_rgb compares renders with" in refusal(**object_of, weighting="one")
    check_request(config_with(**object_of, weighting="recon"))


@pytest.mark.parametrize("prior", ["/etc", "/nowhere", "../x", "./x", "~", "~root/x", "a/../../etc", "a/b/c", "."])
def test_a_network_caller_may_not_name_a_path(prior: str):
    assert "is a path, which only the command line may use" in refusal(prior=prior)


def test_a_path_is_answered_alike_whether_it_exists_or_not(tmp_path: Path):
    there, missing = refusal(prior=str(tmp_path)), refusal(prior=str(tmp_path)[:-1] + "?")
    assert there.partition(" is a path")[1:] == missing.partition(" is a path")[1:]


def test_a_folder_spelled_like_a_hub_id_is_still_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_request(config_with(prior="org/name"))
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "is a path" in refusal(prior="org/name")


def test_a_local_prior_needs_a_model_index(tmp_path: Path):
    assert "no model_index.json" in refusal(allow_local=True, prior=str(tmp_path))
    assert "no model_index.json" in refusal(allow_local=True, prior=str(tmp_path / "nowhere"))
    (tmp_path / "model_index.json").write_text("{}")
    check_request(config_with(prior=str(tmp_path)), allow_local=True)
    assert "is a path" in refusal(prior=str(tmp_path))


NO_HUB_IDS = [
    "", "sd", "x" * 1000, "or g/name", "org/na me", "org/na..me", "org/na--me", "org/name.git", "org/name-",
    "org./name", "-org/x", "toybox/",
]  # fmt: skip


@pytest.mark.parametrize("prior", NO_HUB_IDS)
def test_what_is_neither_a_name_nor_a_hub_id(prior: str):
    message = refusal(prior=prior)
    assert "is not known" in message
    assert "or a hub id like org/name" in message


def test_a_long_value_is_shortened():
    assert len(refusal(reward="r" * 900)) < 300
    assert shown("r" * 900).endswith("...")


def write_image(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def test_an_image_is_read_as_rgb_between_0_and_1(tmp_path: Path):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = check_image(write_image(tmp_path / "a.png", array))
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, array.astype(np.float32) / 255)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_other_formats(tmp_path: Path, suffix: str):
    image = check_image(write_image(tmp_path / f"a.{suffix}", np.full((8, 8, 3), 128, np.uint8)))
    np.testing.assert_allclose(image, 128 / 255, atol=0.02)


def test_transparency_lies_on_white(tmp_path: Path):
    array = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 51]]], np.uint8)
    image = check_image(write_image(tmp_path / "a.png", array))
    np.testing.assert_allclose(image, [[[1, 1, 1], [1, 0, 0], [0.8, 0.8, 0.8]]], atol=1 / 255)


def test_grey_and_palette_become_rgb(tmp_path: Path):
    assert check_image(write_image(tmp_path / "grey.png", np.zeros((2, 3), np.uint8))).shape == (2, 3, 3)
    Image.new("P", (3, 2)).save(tmp_path / "palette.png")
    assert check_image(tmp_path / "palette.png").shape == (2, 3, 3)


def test_a_photograph_is_turned_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    path = write_image(tmp_path / "a.jpg", np.zeros((4, 8, 3), np.uint8), exif=exif)
    assert check_image(path).shape == (8, 4, 3)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_large_photograph_is_averaged_down_upright(tmp_path: Path, kind: str):
    exif = Image.Exif()
    exif[0x0112] = 6
    array = np.zeros((2050, 4096, 3), np.uint8)
    array[:, :1024] = 200
    image = check_image(write_image(tmp_path / f"a.{kind}", array, exif=exif))
    assert image.shape == (2048, 1025, 3)
    np.testing.assert_allclose(image[[100, 1500]].mean((1, 2)), [200 / 255, 0], atol=0.01)
    deep = np.zeros((8, 2050, 4), np.uint8)
    deep[..., 3] = 255 * (np.arange(2050) % 2)  # every second column is black, the others are not there
    assert check_image(write_image(tmp_path / "b.png", deep)).mean() == pytest.approx(0.5, abs=0.01)


def image_refusal(path: Path) -> str:
    with pytest.raises(RequestError) as caught:
        check_image(path)
    message = str(caught.value)
    assert message.startswith(f"image {path.name!r}")
    assert str(path.parent) not in message
    return message


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be width x height and has no pixels: what a decompression bomb looks like from outside."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"")


def test_an_image_that_is_too_large_is_refused_from_its_header(tmp_path: Path):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_header(MAX_IMAGE_SIDE_PX + 1, 8))
    assert "is 4097 x 8 pixels, at most 4096 a side" in image_refusal(bomb)
    bomb.write_bytes(png_header(60_000, 60_000))
    image_refusal(bomb)
    Image.new("RGB", (4000, 3000)).save(tmp_path / "a.webp")
    assert "has 12.0 megapixels, at most 8.4 are allowed of a WebP" in image_refusal(tmp_path / "a.webp")


def test_a_file_that_is_too_large_is_not_opened(tmp_path: Path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(11 * 2**20)
    assert "has 11.0 MB, at most 10 MB" in image_refusal(tmp_path / "a.png")


def test_what_is_no_readable_image_is_refused(tmp_path: Path):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "PNG")
    Image.new("RGB", (8, 8)).save(tmp_path / "disguised.png", "PPM")
    for name, content in {"text.png": b"hello", "empty.png": b"", "cut.png": whole.getvalue()[:2000]}.items():
        (tmp_path / name).write_bytes(content)
        assert "cannot be read" in image_refusal(tmp_path / name)
    assert "cannot be read" in image_refusal(tmp_path / "disguised.png")
    assert "is not a file" in image_refusal(tmp_path)
    assert "is not a file" in image_refusal(tmp_path / "missing.png")
    deep = write_image(tmp_path / "deep.png", np.zeros((4, 4), np.uint16))
    assert "more than 8 bits" in image_refusal(deep)


def test_checking_a_request_needs_no_heavy_library():
    code = (
        "import sys; from psd import RunConfig; from psd.safety import check_request; "
        "check_request(RunConfig(prompt='a lamp')); "
        "print(*{'torch', 'diffusers', 'transformers', 'gradio'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

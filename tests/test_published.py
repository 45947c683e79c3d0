"""The app on its published ids, end to end: downloaded from a local hub, cached, loaded and run, small and random."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from psd.models.priors.table import PRIORS, TAESD
from psd.models.rewards.table import REWARDS
from tests import local_hub
from tests.local_hub import LocalHub
from tests.published import TYPED

ROOT = Path(__file__).resolve().parents[1]
SD15, SD21, MVDREAM = [name for name in PRIORS if not PRIORS[name].source.is_folder]
SMALL = dict(prompt="a red mushroom", steps=2, negative_lr=1e-3)
OBJECT = dict(mode="3d", weighting="recon", grid_size=24, render_size=16, samples=12, mesh_faces=2000)
CASES = {
    "sd15": dict(**SMALL, prior=SD15, reward="hpsv2.1"),
    "sd21": dict(**SMALL, prior=SD21, reward="pickscore"),
    "mvdream": dict(**SMALL, **OBJECT, prior=MVDREAM, reward="imagereward"),
    "mixture": dict(**SMALL, prior=SD15, reward="mps + 0.5 aesthetic"),
    "fast decoder": dict(**SMALL, prior=SD15, reward="hpsv2.1", fast_decoder=True),
    "typed": dict(**SMALL, prior=TYPED, reward="hpsv2.1"),
    "sd15 again": dict(**SMALL, prior=SD15, reward="hpsv2.1"),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    from tests.published import publish

    with local_hub.serve() as hub:
        publish(hub, tmp_path_factory.mktemp("published"))
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf-home")


def run(hub: LocalHub, home: Path, cases: list[dict], **environment: str) -> list[dict]:
    command = [sys.executable, "-m", "tests.hub_runs", str(home / "outputs"), *map(json.dumps, cases)]
    environment = hub.environment(home, **environment)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def runs(hub: LocalHub, home: Path) -> dict[str, dict]:
    return dict(zip(CASES, run(hub, home, list(CASES.values())), strict=True))


@pytest.mark.parametrize("case", ["sd15", "sd21", "mvdream"])
def test_a_published_model_is_downloaded_and_runs(runs: dict[str, dict], case: str):
    made, prior, reward = runs[case], CASES[case]["prior"], CASES[case]["reward"]
    assert made["missing"] == [prior, reward]
    sources = [*PRIORS[prior].sources, *REWARDS[reward].sources]
    if case == "sd15":  # later runs share its tokenizer
        assert made["told"] == [source.name for source in sources]
    assert made["first_after"] == "Started"
    assert all(value == value for scores in made["scores"].values() for value in scores.values())
    assert [*made["scores"]] == ["with", "without"] and reward in made["scores"]["with"]
    wanted = {"with.glb", "with.mp4", "with.ply"} if case == "mvdream" else {"with.png", "without.png", "run.json"}
    assert wanted <= made["files"].keys()


def test_a_mixture_downloads_its_members_and_is_judged_by_what_is_cached(runs: dict[str, dict]):
    made, members = runs["mixture"], ["mps", "aesthetic"]
    assert made["missing"] == members  # the prior and mps's tokenizer came before
    assert made["told"] == [REWARDS["mps"].source.name, *(source.name for source in REWARDS["aesthetic"].sources)]
    judges = {"hpsv2.1", "pickscore", "imagereward"}
    assert made["scores"]["with"].keys() == {CASES["mixture"]["reward"], *members, *judges}
    assert runs["sd15"]["scores"]["with"].keys() == {"hpsv2.1"}


def test_the_fast_decoder_ranks_and_previews_and_leaves_the_picture_to_the_vae(runs: dict[str, dict]):
    made, plain = runs["fast decoder"], runs["sd15"]
    assert made["missing"] == made["told"] == [TAESD.source.name]
    assert (made["preview_px"], plain["preview_px"]) == (32, 8)  # 8 and 2 pixels a latent
    assert len(read(made, "with.png")) == len(read(plain, "with.png"))
    assert read(made, "without.png") == read(plain, "without.png")  # nothing is ranked in this arm
    about = json.loads(Path(made["files"]["run.json"]).read_text())
    assert about["fast_decoder_revision"] == TAESD.source.revision


def test_any_stable_diffusion_of_the_hub_can_be_typed(runs: dict[str, dict]):
    made = runs["typed"]
    assert made["missing"] == made["told"] == [TYPED]
    assert len(read(made, "with.png")) == 8 * 8 * 3


def test_a_second_run_asks_the_hub_for_nothing(runs: dict[str, dict], hub: LocalHub):
    again = runs["sd15 again"]
    assert again["missing"] == [] and again["told"] == []
    assert read(again, "with.png") == read(runs["sd15"], "with.png")
    asked = [(method, path) for method, path, _ in hub.requests if SD15 in path and path.startswith("/api")]
    assert len(asked) == 1


def test_only_what_is_read_was_downloaded(runs: dict[str, dict], hub: LocalHub):
    files = hub.downloads()
    unread_files = "fp16", "safety_checker", "README", "mv_unet", r"\.bin", "taesd_", "HPS_v2_compressed", "med_config"
    for unread in unread_files:
        assert not [file for file in files if re.search(unread, file)], unread
    assert files.count("HPS_v2.1_compressed.pt") == files.count("ImageReward.pt") == 1
    assert files.count("merges.txt") == 1  # of the tokenizer that two rewards share


def test_without_a_network_the_cache_is_enough(runs: dict[str, dict], hub: LocalHub, home: Path):
    before = len(hub.requests)
    (offline,) = run(hub, home, [CASES["sd15"]], HF_HUB_OFFLINE="1")
    assert offline["missing"] == [] and len(hub.requests) == before
    assert read(offline, "with.png") == read(runs["sd15"], "with.png")


def read(made: dict, name: str) -> bytes:
    from PIL import Image

    with Image.open(made["files"][name]) as image:
        return image.tobytes()

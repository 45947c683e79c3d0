"""The comparison with what is published of each model: by hand, and on small models of a local hub."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from psd import check
from psd.config import PRESETS
from psd.models.priors.table import PRIORS
from psd.models.rewards.table import REWARDS
from tests import local_hub

ROOT = Path(__file__).resolve().parents[1]
TWO = check.Published((0.5, -1.5), 0.1, "its README")


@pytest.mark.parametrize(
    ("values", "verdict", "said"),
    [
        ([0.55, -1.45], "agrees", "off by 0.05"), ([0.5, -1.2], "differs", "differs by 0.3"),
        ([math.nan, -1.5], "differs", "nan"),
    ],
)  # fmt: skip
def test_values_agree_within_what_their_authors_allow(values: list[float], verdict: str, said: str):
    line = check.compared("a model", values, TWO)
    assert line.verdict == verdict
    assert said in line.why and "its README" in line.why


def test_every_published_model_has_its_answer():
    assert set(check.SCORES) == {name for name, info in REWARDS.items() if not info.embedded}
    assert set(check.RUNS) == {name for name, info in PRIORS.items() if info.download_mb}
    for name, (preset, published) in check.RUNS.items():
        assert PRESETS[preset]["prior"] == name
        assert set(published) <= set(check.SCORES)


def test_a_fault_is_a_line_and_no_end():
    def broken() -> check.Line:
        raise OSError("the hub is not there\nand more")

    assert check.guarded("x", broken) == check.Line("x", "not run", "because the hub is not there")


def test_all_models_of_a_hub_are_checked(tmp_path: Path):
    """Small and random: none can agree with its authors on a fixed answer, each is downloaded, loaded and asked."""
    from tests.published import publish

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    with local_hub.serve() as hub:
        publish(hub, tmp_path / "published")
        command = [sys.executable, "-m", "tests.hub_check", str(pictures), "published", "--device", "cpu", "--slow"]
        command += ["--steps", "2", "--pictures", str(pictures)]
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = {line[:46].strip(): line[47:].strip() for line in done.stdout.splitlines()}
    assert list(lines) == [*(name for name in REWARDS if name in check.SCORES), *check.RUNS]
    assert not [line for line in lines.values() if line.startswith("not run")], done.stdout
    assert lines["imagereward"].startswith("differs ")
    assert "0.5812, 0.2745, -1.413, -2.03 of ImageReward's README" in lines["imagereward"]

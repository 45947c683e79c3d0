"""The command line: flags from RunConfig, one sentence per refusal, exit statuses, what goes to stdout and stderr."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from psd.__main__ import main
from psd.config import ARMS, PRESETS, RunConfig
from psd.embedding import export_embedding
from psd.errors import RequestError
from psd.events import ArmResult, Finished, Started, Step
from psd.export import export_json
from psd.methods import METHODS
from psd.models.priors.table import PRIORS
from psd.models.rewards.table import REWARDS
from psd.record import read

PROMPT = "a red mushroom with a white stem"


class Runs:
    """Stands in for psd.run: remembers each request and plays a run of two steps."""

    def __init__(self) -> None:
        self.configs: list[RunConfig] = []
        self.closed = False
        self.fail: BaseException | None = None
        self.finishes = True
        self.result = dict(stopped="The time budget ended the run early.", remarks=("with.png could not be made.",))
        self.score, self.pictured = 2.0, True

    def generate(self, config: RunConfig, output_root: Path, allow_download: bool) -> Iterator[object]:
        self.configs.append(config)
        directory = output_root / "abc"
        try:
            unknown = "'mushrom' is not known, did you mean mushroom?"
            self.write(directory)
            yield Started("abc", directory, config, ("with", "without"), (unknown,))
            yield Step(1, config.steps, 0.1, 0.1, {"reward_with": 1.25, "reward_without": float("nan")})
            if self.fail:
                raise self.fail
            yield Step(2, config.steps, 0.2, 0.0, {"reward_with": 1.5, "reward_without": 1.125})
            if self.finishes:
                yield Finished(
                    "abc", directory, config, self.arms(directory), steps_done=2, seconds=0.25, **self.result
                )
        finally:
            self.closed = True

    def arms(self, directory: Path) -> dict[str, ArmResult]:
        picture = directory / "with.png" if self.pictured else None
        first = ArmResult(picture, {"target": self.score, "judge": 0.5}, {"picture": picture} if picture else {}, {})
        return {"with": first, "without": ArmResult(None, {"target": -1.0}, {}, {"picture": {"reason": "no"}})}

    def write(self, directory: Path) -> None:
        """The folder as psd.record leaves it."""
        directory.mkdir(exist_ok=True)
        (directory / "with.png").touch()
        arms = {
            name: {"scores": {}, "files": {kind: path.name for kind, path in arm.files.items()}, "remarks": {}}
            for name, arm in self.arms(directory).items()
        }
        export_json(directory / "run.json", {"state": "done", "arms": arms})


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    fake, module = Runs(), ModuleType("psd.run")
    module.generate = fake.generate
    monkeypatch.setitem(sys.modules, "psd.run", module)
    return fake


@pytest.fixture
def run(runs: Runs, tmp_path: Path) -> Callable[..., int]:
    return lambda *argv: main([*argv, "--output", str(tmp_path / "out")])


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(RunConfig):
        assert ("PROMPT" if field.name == "prompt" else f"--{field.name.replace('_', '-')}") in text
        assert " ".join(field.metadata["help"].split()) in text
        for choice in field.metadata["choices"]:
            assert choice in text
    assert "--arms" in text
    assert "(from 2 to 20000; default: 50)" in text
    assert "(default: on)" in text


def test_without_flags_the_preset_decides(run: Callable[..., int], runs: Runs):
    for preset in PRESETS:
        assert run(PROMPT, "--preset", preset) == 0
        assert runs.configs[-1] == RunConfig.from_preset(preset, prompt=PROMPT)


def test_a_given_flag_overrides_the_preset(run: Callable[..., int], runs: Runs):
    assert run(PROMPT, "--preset", "toybox-quick", "--steps", "7", "--arms", "with", "--time-shift-low", "-0.1") == 0
    expected = RunConfig.from_preset("toybox-quick", prompt=PROMPT, steps=7, arms="with", time_shift_low=-0.1)
    assert runs.configs == [expected]


@pytest.fixture
def learned(tmp_path: Path) -> Path:
    """The file of an n."""
    path = tmp_path / "with_negative.safetensors"
    export_embedding(path, np.ones((2, 3), np.float32), {})
    return path


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(RunConfig) if field.name != "prompt"])
def test_every_flag_reaches_its_field(name: str, run: Callable[..., int], runs: Runs, learned: Path, tmp_path: Path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    field = RunConfig.__dataclass_fields__[name]
    other = {"preset": "toybox-quick", "prior": "org/name", "reward": "mps", "t_min": 0.5, "t_max": 0.5}
    other |= {
        "negative_prompt": "blurry",
        "arms": "selection, without",
        "vary": "negative_lr: 0, 1e-3",
        "time_shift_low": -0.125,
        "image_size": 128,
        "steps": 1000,
    }
    other |= {
        "negative_from": str(learned),
        "start": str(picture),
        "view_prompts": True,
        "inversion_shift": True,
        "fast_decoder": True,
        "offload": True,
        "mode": "3d",
        "method": "negative",
    }
    value = other.get(name) if name in other else (field.metadata["choices"] or (field.metadata["high"],))[-1]
    flag = "--" + name.replace("_", "-")
    flags = {True: [flag], False: ["--no-" + flag[2:]]}[value] if isinstance(value, bool) else [flag, str(value)]
    if name == "mode":  # not for a prior of single pictures
        flags += ["--prior", "toybox/mvdream"]
    assert run(PROMPT, *flags) == 0
    assert getattr(runs.configs[-1], name) == value


def test_results_go_to_stdout_and_the_rest_to_stderr(
    run: Callable[..., int], runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(PROMPT, "--seed", "7") == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "out" / "abc"
    assert folder.parent.is_dir()
    lines = out.splitlines()
    assert lines[0].split() == ["score", "with", "without"]
    assert lines[1].split() == ["target", "2.0000", "-1.0000"]
    assert lines[2].split() == ["judge", "0.5000", "-"]
    assert "2 steps in 0.2 s, seed 7" in out
    assert "The time budget ended the run early." in lines
    assert lines[-2:] == [str(folder / name) for name in ("with.png", "run.json")]
    assert "warning: 'mushrom' is not known" in err
    assert "warning: with.png could not be made." in err
    assert "seed 7" in err
    assert runs.closed


def test_quiet_has_no_bar(run: Callable[..., int], capsys: pytest.CaptureFixture[str]):
    assert run(PROMPT, "--quiet") == 0
    assert capsys.readouterr().err.splitlines() == [
        "warning: 'mushrom' is not known, did you mean mushroom?", "warning: with.png could not be made.",
    ]  # fmt: skip


def test_a_random_seed_is_drawn_and_told(run: Callable[..., int], runs: Runs, capsys: pytest.CaptureFixture[str]):
    for _ in range(2):
        assert run(PROMPT, "--randomize-seed") == 0
    first, second = (config.seed for config in runs.configs)
    assert first != second
    assert f"seed {second}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "prompt is empty"),
        ([" "], "prompt is empty"),
        ([PROMPT, "--steps", "1"], "steps must be a whole number from 2 to 20000, got 1"),
        ([PROMPT, "--gamma", "nan"], "gamma must be a finite number"),
        ([PROMPT, "--pair", "ddmi"], "did you mean ddim?"),
        ([PROMPT, "--vary", "gama: 2, 7.5"], "did you mean gamma?"),
        ([PROMPT, "--preset", "toybox-imgae"], "did you mean toybox-image or"),
        ([PROMPT, "--prior", "/nowhere"], "no model_index.json"),
        ([PROMPT, "--negative-from", "/nowhere/n.safetensors"], "negative_from 'n.safetensors' is not a file"),
        ([PROMPT, "--t-min", "0.9", "--t-max", "0.1"], "t_min must be below t_max"),
    ],
)
def test_a_bad_request_is_one_sentence(
    argv: list[str], sentence: str, run: Callable[..., int], runs: Runs, capsys: pytest.CaptureFixture[str]
):
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not runs.configs


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([PROMPT, "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        ([PROMPT, "--step", "5"], "unrecognized arguments: --step"),
        ([PROMPT, "--seed", "1", "--randomize-seed"], "--seed and --randomize-seed exclude each other"),
    ],
)
def test_bad_usage_is_one_sentence(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1


def test_an_output_that_cannot_be_made(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert main([PROMPT, "--output", str(tmp_path / "file")]) == 2
    assert main([PROMPT, "--output", str(tmp_path / "file" / "below")]) == 2
    assert capsys.readouterr().err.count("give another --output") == 2
    assert not runs.configs


@pytest.mark.parametrize(("fail", "status"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_an_interrupted_run_tells_what_it_left(
    fail: BaseException,
    status: int,
    run: Callable[..., int],
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    runs.fail = fail
    assert run(PROMPT, "--quiet") == status
    assert f"what was made so far is in {tmp_path / 'out' / 'abc'}: with.png, run.json" in capsys.readouterr().err
    assert runs.closed


def test_a_terminated_run_writes_its_results_first(tmp_path: Path):
    command = [sys.executable, "-m", "psd", PROMPT, "--steps", "1000", "--output", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, bufsize=1) as process:
        shown = ""
        while "2/1000" not in shown:
            char = process.stderr.read(1)
            assert char, shown
            shown += char
        process.send_signal(signal.SIGTERM)
        shown = process.stderr.read()
    assert process.returncode == 143
    (folder,) = tmp_path.iterdir()
    result = read(folder)
    assert result.state == "done" and " after step " in result.stopped
    assert set(result.arms) == {"with", "without"} and all(arm.picture for arm in result.arms.values())
    files = "with.png, with_negative.safetensors, with_pairs.webp, without.png, metrics.csv, run.json, everything.zip"
    assert f"is in {folder}: {files}" in shown


@pytest.mark.parametrize(
    "change",
    [
        lambda runs: runs.result.update(failed=True),
        lambda runs: setattr(runs, "pictured", False),
        lambda runs: setattr(runs, "score", float("nan")),
    ],
    ids=["broken down", "no picture", "no number"],
)
def test_a_result_that_is_none_is_a_failure(change: Callable[[Runs], None], run: Callable[..., int], runs: Runs):
    change(runs)
    assert run(PROMPT, "--quiet") == 1


def test_a_nameless_output_is_refused(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main([PROMPT, "--output", ""]) == 2
    assert "output is empty" in capsys.readouterr().err
    assert not runs.configs and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fail", "status"), [(RequestError("weights are corrupted."), 2), (OSError(28, "No space left on device"), 1)]
)
def test_a_run_that_fails(
    fail: Exception, status: int, run: Callable[..., int], runs: Runs, capsys: pytest.CaptureFixture[str]
):
    runs.fail = fail
    assert run(PROMPT, "--quiet") == status
    out, err = capsys.readouterr()
    assert out == ""
    assert str(fail) in err.splitlines()[-1]
    assert runs.closed


def test_a_bug_keeps_its_traceback(run: Callable[..., int], runs: Runs):
    runs.fail = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        run(PROMPT, "--quiet")
    assert runs.closed


def test_a_run_without_a_result_is_a_failure(run: Callable[..., int], runs: Runs):
    runs.finishes = False
    assert run(PROMPT, "--quiet") == 1


def test_list_names_everything(capsys: pytest.CaptureFixture[str]):
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    named = {line.split(":")[0].strip() for line in out.splitlines() if line.startswith("  ")}
    assert named == {*PRESETS, *ARMS, *METHODS, *PRIORS, *REWARDS}


def test_the_module_refuses_before_torch_is_loaded():
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = (
        "import os, sys, psd.__main__ as cli; "
        "status = cli.main([' ']); print(status, os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["2", "ACTIVE", "False"]
    done = subprocess.run([sys.executable, "-m", "psd", ""], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: prompt is empty")

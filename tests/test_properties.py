"""Properties that hold of any settings, links and requests, and of any order of events in a run's life."""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import tempfile
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from psd.__main__ import build_parser
from psd.config import ARMS, FIELDS, RunConfig, Setting, presets_of
from psd.contracts import Artefact
from psd.errors import Abandoned, RequestError
from psd.export import export_json, export_png
from psd.models.rewards.table import REWARDS
from psd.record import Record, read, settings_of
from psd.safety import check_request
from psd.ui import files, form, wiring

QUICK = settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
AWKWARD = [
    "-x",
    "--seed 1",
    "-",
    "=1",
    "it's",
    'a "lamp"\\',
    "$(touch x) `touch x`",
    "a\nb",
    "%0a&steps=2#",
    "</script>",
]
PRINTED = st.characters(exclude_categories=("Cc", "Cs"), include_characters="\t\n")
WORDS = st.text(PRINTED, max_size=60) | st.sampled_from(AWKWARD)
# As a front end may hand it over: all that JSON knows, and numbers that it does not.
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([10**4000, "3d"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def values_of(field: Setting) -> st.SearchStrategy:
    """What a setting may be, by itself."""
    if field.name == "arms":
        return st.lists(st.sampled_from(list(ARMS)), min_size=1, unique=True).map(", ".join)
    if field.choices:
        return st.sampled_from(field.choices)
    if field.kind is bool:
        return st.booleans()
    if field.kind is int:
        return st.integers(field.low, field.high)
    return st.floats(field.low, field.high) if field.kind is float else WORDS


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    """A preset with some of its settings changed, such that all rules between them hold."""
    mode = draw(st.sampled_from(["image", "3d"]))
    preset = draw(st.sampled_from(presets_of(mode)))
    fixed = {"mode", "preset", "prompt", "prior", "reward", "method", "negative_from", "start"}
    names = draw(st.lists(st.sampled_from([name for name in FIELDS if name not in fixed]), max_size=8, unique=True))
    changed = {name: draw(values_of(FIELDS[name])) for name in names}
    changed |= {"prompt": draw(WORDS.filter(str.strip)), "reward": draw(st.sampled_from([*REWARDS, None]))}
    if "image_size" in changed:
        changed["image_size"] = changed["image_size"] // 64 * 64
    config = RunConfig.from_preset(preset, **changed)
    try:
        check_request(config)
    except RequestError:  # a rule between two of them
        config = RunConfig.from_preset(preset, prompt=changed["prompt"])
    return config


@pytest.fixture(scope="module")
def copied() -> Any:
    """(kind, settings) -> the text that the page's button copies, of its own script in a browser's engine."""
    from psd.ui import theme

    playwright = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page()
        page.route("**/*", lambda route: route.fulfill(body=f"<html>{theme.script()}</html>", content_type="text/html"))
        page.goto("http://127.0.0.1:7/")

        def copy(kind: str, config: RunConfig) -> str:
            shown = dict(zip(form.NAMES, form.fill(config.to_dict()), strict=True))
            return page.evaluate("([kind, values]) => psd.copy(kind, ...values)", [kind, list(shown.values())])

        yield copy
        browser.close()


def from_link(text: str) -> RunConfig:
    return RunConfig.from_dict(form.settings_of_query(dict(urllib.parse.parse_qsl(text.partition("?")[2], True))))


def from_python(text: str) -> RunConfig:
    call = next(node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and node.keywords)
    given = {each.arg: ast.literal_eval(each.value) for each in call.keywords if each.arg != "api_name"}
    return form.checked(given)


def from_curl(text: str) -> RunConfig:
    words = shlex.split(text.replace("\\\n", " "))
    return form.checked(json.loads(words[words.index("-d") + 1]))


def from_shell(text: str) -> RunConfig:
    words = shlex.split(text)
    assert words[:3] == ["python", "-m", "psd"]
    given = vars(build_parser().parse_args(words[3:]))
    return form.checked({name: value for name, value in given.items() if name in FIELDS})


COPIED = {"link": from_link, "python": from_python, "curl": from_curl, "shell": from_shell}


@pytest.mark.browser
@pytest.mark.parametrize("kind", COPIED)
def test_settings_come_back_from_what_the_page_copies(kind: str, copied: Any):
    @QUICK
    @given(configs())
    def holds(config: RunConfig) -> None:
        assert COPIED[kind](copied(kind, config)) == config

    holds()


@QUICK
@given(configs())
def test_settings_come_back_from_files(config: RunConfig):
    with tempfile.TemporaryDirectory() as folder:
        export_json(Path(folder) / "run.json", {"config": config.to_dict()})
        export_png(Path(folder) / "with.png", np.zeros((2, 2, 3), "uint8"), config.to_dict() | {"arm": "with"})
        for path in Path(folder).iterdir():
            assert form.checked(settings_of(path)) == config
    assert RunConfig.from_dict(config.to_dict()) == config


def check_refusal(read: Callable[[], object]) -> object | None:
    """What it reads, or None where it refuses in a sentence that blames a field, if any."""
    try:
        return read()
    except RequestError as error:
        sentence, field = str(error), error.field
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 700
    assert not field or field in FIELDS
    return None


@QUICK
@given(st.dictionaries(st.sampled_from([*FIELDS, "compare", "nobody"]), ANYTHING, max_size=8), st.booleans())
def test_whatever_a_field_holds_it_is_accepted_or_refused_in_a_sentence(given: dict[str, Any], prompted: bool):
    check_refusal(lambda: form.checked({"prompt": "a lamp", **given} if prompted else given))
    config = RunConfig(prompt="a lamp")
    for name in given.keys() & FIELDS.keys():
        object.__setattr__(config, name, given[name])
    check_refusal(lambda: check_request(config))


@QUICK
@given(st.dictionaries(st.sampled_from([*FIELDS, "run"]), st.text(max_size=30), max_size=6))
def test_any_link_is_read_or_refused_in_a_sentence(query: dict[str, str]):
    if found := check_refusal(lambda: form.settings_of_query(query)):
        assert form.checked(found).to_dict() == found


@QUICK
@given(st.text(max_size=40) | st.lists(st.sampled_from([*REWARDS, "+", "0.5", "-1", " ", "1e999", "nan"])).map("".join))
def test_any_name_of_a_model_is_known_or_refused_in_a_sentence(name: str):
    for field in ("reward", "prior"):
        check_refusal(lambda field=field: form.checked({"prompt": "a lamp", field: name}))


@QUICK
@given(st.binary(max_size=300), st.sampled_from([".png", ".glb", ".json", ".safetensors"]), st.booleans())
def test_any_bytes_are_refused_in_a_sentence(data: bytes, suffix: str, headed: bool):
    magic = {".png": b"\x89PNG\r\n\x1a\n", ".glb": b"glTF\2\0\0\0", ".safetensors": b"\x40" + bytes(7)}.get(
        suffix, b"{"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(magic + data if headed else data)
        with pytest.raises(RequestError):
            settings_of(path)
        with pytest.raises(RequestError):
            form.checked({"prompt": "a lamp", "negative_from": {"path": str(path)}})


class FakeStage:
    """Two arms that have a picture each, some of which cannot be written."""

    def __init__(self, config: RunConfig, broken: bool):
        self.arms = {name: type("Arm", (), {"config": RunConfig(negative_lr=0.0)})() for name in ("with", "without")}
        self.broken = broken

    def artefacts(self, arm: str) -> list[Artefact]:
        def write(path: Path, about: dict[str, Any]) -> None:
            if self.broken:
                raise OSError(28, "No space left on device")
            export_png(path, np.zeros((2, 2, 3), "uint8"), about)

        return [Artefact("picture", write)]


class Life(RuleBasedStateMachine):
    """Runs that begin, step, end in any way, are tidied away, killed, restored, shared and looked at, in any order."""

    going, folders = Bundle("going"), Bundle("folders")

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.patch = pytest.MonkeyPatch()
        self.patch.setenv("GRADIO_TEMP_DIR", str(self.root))
        self.patch.setattr(wiring.gr, "Info", lambda *said: None)
        self.configs: dict[Path, RunConfig] = {}
        self.heard: dict[Path, bool] = {}

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.root)

    @rule(target=going, config=configs())
    def run(self, config: RunConfig) -> Record:
        name = f"{len(self.configs):012x}"
        folder = files.output_root() / name
        self.heard[folder] = True
        record = Record(folder, config, lambda: self.heard[folder])
        self.configs[folder] = config
        return record

    @rule(record=going, value=st.floats())
    def step(self, record: Record, value: float) -> None:
        record.rows.append({"step": len(record.rows) + 1, "reward_with": value})

    @rule(record=going)
    def hang_up(self, record: Record) -> None:
        self.heard[record.directory] = False

    @rule(target=folders, record=going, stopped=WORDS, broken=st.booleans(), waited=st.booleans())
    def end(self, record: Record, stopped: str, broken: bool, waited: bool) -> Path:
        stage = FakeStage(record.config, broken) if waited else None
        try:
            for _ in record.write(stage, {}, 1.0, stopped):
                pass
        except Abandoned:
            for _ in record.write(None, {}, 1.0, stopped):
                pass
        return record.directory

    @rule(record=going, data=st.binary(max_size=20))
    def kill_while_it_writes(self, record: Record, data: bytes) -> None:
        if record.directory.exists():
            (record.directory / "with.png.partial").write_bytes(data)

    @rule(folder=folders)
    def tidy_away(self, folder: Path) -> None:
        files.remove(folder)

    @rule(folder=folders)
    def restore(self, folder: Path) -> None:
        for path in read(folder).files:
            if path.suffix in (".json", ".png"):
                assert form.named(wiring.restore_file(str(path))[:-1])["prompt"] == self.configs[folder].prompt

    @rule(folder=folders)
    def open_its_address(self, folder: Path) -> None:
        try:
            page = wiring.restore_link(gr.Request(query_params={"run": folder.name}))
        except gr.Error as error:
            page = str(error.message)
        assert "tidied away" in page or len(page) == len(form.NAMES) + 1 + len(wiring.updates())

    @rule(history=st.lists(st.sampled_from([f"{i:012x}" for i in range(5)]) | ANYTHING, max_size=6))
    def come_back(self, history: list[Any]) -> None:
        names, _ = wiring.recall_runs(history)
        assert len(names) == len(set(names)) and set(names) <= {folder.name for folder in self.configs}

    @invariant()
    def every_folder_is_readable(self) -> None:
        for folder, config in getattr(self, "configs", {}).items():
            result = read(folder)
            if not folder.exists():
                assert result.files == () and result.state == ""
                continue
            assert result.state in ("running", "writing", "done", "abandoned")
            assert RunConfig.from_dict(result.settings) == config
            assert all(path.is_file() and not path.name.endswith(".partial") for path in result.files)


TestLife = Life.TestCase
TestLife.settings = settings(QUICK, max_examples=15, stateful_step_count=20)

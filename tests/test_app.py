"""The app as its clients see it: one launched server, driven by gradio_client, curl and node on the embedded models."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError, ValidationError
from PIL import Image

from psd.config import MAX_PROMPT_CHARS, RunConfig
from psd.errors import RequestError
from psd.events import Started
from psd.models.rewards.table import REWARDS
from psd.ui import build_settings, examples, files, form, parts, plots, session
from tests import app_server

EXAMPLES = Path(examples.EXAMPLES)
PROMPT = "a red mushroom with a white stem"


@pytest.fixture(scope="module")
def app_url(psd_home: Path) -> str:
    return app_server.address()


@pytest.fixture(scope="module")
def client(app_url: str, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(app_url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))


@pytest.fixture(scope="module")
def finished(client: Client) -> list[tuple]:
    """All items of one run's stream."""
    job = client.submit(prompt=PROMPT, seed=7, steps=6, api_name="/generate")
    job.result(timeout=240)
    return job.outputs()


def test_generate_streams_previews_then_returns_everything(finished: list[tuple]):
    *stream, last = finished
    statuses = [item[1] for item in stream]
    assert statuses[0]["step"] == 0 and not statuses[0]["finished"]
    assert any(item[0] and not item[1]["finished"] for item in stream), "no preview before the end"
    assert all(item[2] is None and item[5] is None for item in stream if not item[1]["finished"])

    preview, status, with_preference, without_preference, scores, paths = last
    assert status["finished"] and status["step"] == status["steps"] == 6 and status["seed"] == 7
    assert status["config"]["prompt"] == PROMPT and status["config"]["preset"] == "toybox-image"
    wide, high = Image.open(preview).size
    assert wide == 2 * high
    assert Image.open(with_preference).size == Image.open(without_preference).size
    assert scores.keys() == {"with", "without"}
    for arm in scores.values():
        assert {"toybox/preference", "toybox/judge"} <= arm.keys()
        assert all(math.isfinite(value) for value in arm.values())
    assert {Path(path).name for path in paths} >= {"with.png", "without.png", "metrics.csv", "run.json"}


def test_files_of_a_run_restore_its_settings(finished: list[tuple]):
    config = finished[-1][1]["config"]
    for path in finished[-1][5]:
        if Path(path).suffix in (".png", ".json"):
            assert form.settings_of_file(path) == config


def test_same_seed_same_picture_through_the_api(client: Client, finished: list[tuple]):
    again = client.predict(prompt=PROMPT, seed=7, steps=6, api_name="/generate")
    for index in (2, 3):
        assert Image.open(again[index]).tobytes() == Image.open(finished[-1][index]).tobytes()


def test_one_arm_alone(client: Client):
    _, _, with_preference, without_preference, scores, _ = client.predict(
        prompt=PROMPT, steps=2, arms="with", api_name="/generate"
    )
    assert with_preference and without_preference is None
    assert scores.keys() == {"with"}


def test_scores_rates_an_uploaded_picture(client: Client, finished: list[tuple]):
    *_, with_preference, _, scores, _ = finished[-1]
    rated = client.predict(handle_file(with_preference), PROMPT, api_name="/scores")
    assert rated.keys() == set(session.embedded_rewards())
    assert rated["toybox/judge"] == pytest.approx(scores["with"]["toybox/judge"], abs=0.02)


def test_scores_refuses_what_is_no_picture(client: Client, tmp_path: Path):
    broken = tmp_path / "picture.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    with pytest.raises(AppError, match="cannot be read"):
        client.predict(handle_file(broken), PROMPT, api_name="/scores")


BAD_REQUESTS = [
    (dict(prompt=""), "prompt is empty"),
    (dict(prompt="x" * 5000), f"at most {MAX_PROMPT_CHARS}"),
    (dict(prompt=PROMPT, gamma=1e9), "gamma must be"),
    (dict(prompt=PROMPT, steps=1), "steps must be"),
    (dict(prompt=PROMPT, steps="many"), "steps must be a whole number"),
    (dict(prompt=PROMPT, arms="with, perhaps"), "arms 'perhaps' is not known"),
    (dict(prompt=PROMPT, arms="with, with"), "arms names with twice"),
    (dict(prompt=PROMPT, fast_decoder="perhaps"), "fast_decoder must be true or false"),
    (dict(prompt=PROMPT, seed=-1), "seed must be"),
    (dict(prompt=PROMPT, preset="toybox-imge"), "did you mean toybox-image"),
    (dict(prompt=PROMPT, preset=["toybox-image"]), "preset"),
    (dict(prompt=PROMPT, reward="nobody"), "reward 'nobody' is not known"),
    (dict(prompt=PROMPT, prior="toybox/ds"), "prior 'toybox/ds' is not known"),
    (dict(prompt=PROMPT, prior="someone/else"), "'someone/else' is not in the hub's cache"),
    (dict(prompt=PROMPT, prior="/etc"), "is a path, which only the command line may use"),
    (dict(prompt=PROMPT, t_min=0.9, t_max=0.5), "t_min must be below t_max"),
    (dict(prompt=PROMPT, image_size=100), "multiple of 64"),
]


@pytest.mark.parametrize(("request_", "sentence"), BAD_REQUESTS, ids=lambda value: None)
def test_bad_requests_are_refused_in_one_sentence(client: Client, request_: dict, sentence: str):
    with pytest.raises(ValidationError) as refusal:
        client.predict(**request_, api_name="/generate")
    assert sentence in str(refusal.value)


def test_not_a_number_is_refused(app_url: str):
    # Python's json writes NaN, which the standard forbids and gradio's server reads.
    body = json.dumps({"prompt": PROMPT, "gamma": math.nan})
    answer = httpx.post(
        f"{app_url}/gradio_api/call/v2/generate", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code in (400, 422)


def test_cancel_keeps_the_partial_result_and_the_next_run_works(client: Client):
    before = set(run_folders())
    job = client.submit(prompt=PROMPT, steps=1000, api_name="/generate")
    wait_until(lambda: job.outputs() and job.outputs()[-1][1]["step"] >= 2)
    cancelled_at = time.monotonic()
    job.cancel()
    (folder,) = set(run_folders()) - before
    wait_until(lambda: (folder / "run.json").exists(), seconds=10)
    assert time.monotonic() - cancelled_at < 10
    partial = session.load_result(folder)
    assert set(partial.images) == {"with", "without"}
    assert 2 <= len(partial.rows) < 1000

    *_, status, _, _, _, _ = client.predict(prompt=PROMPT, steps=2, api_name="/generate")
    assert status["finished"]


def test_two_clients_never_share_a_folder(app_url: str):
    def run(seed: int) -> list[str]:
        return Client(app_url, verbose=False, download_files=False).predict(
            prompt=PROMPT, steps=2, seed=seed, api_name="/generate"
        )[5]

    with ThreadPoolExecutor(2) as pool:
        first, second = ({file["path"] for file in paths} for paths in pool.map(run, (1, 2)))
    assert not first & second


def test_api_describes_itself(client: Client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert endpoints.keys() == {"/generate", "/scores"}
    parameters = {entry["parameter_name"]: entry for entry in endpoints["/generate"]["parameters"]}
    assert parameters.keys() == {"allow_download", *(field.name for field in dataclasses.fields(RunConfig))}
    assert parameters["allow_download"]["parameter_default"] is False
    assert all(entry["parameter_has_default"] for entry in parameters.values())
    assert parameters["steps"]["parameter_default"] is None
    assert parameters["seed"]["parameter_default"] == 0
    table = parts.parameter_table()
    assert all(f"<code>{name}</code>" in table for name in parameters)


def test_mcp_offers_the_same_two_tools_with_every_parameter_explained(app_url: str):
    tools = {tool["name"].removeprefix("app_"): tool for tool in httpx.get(f"{app_url}/gradio_api/mcp/schema").json()}
    generate = next(tool for name, tool in tools.items() if name.endswith("generate"))
    assert len(tools) == 2
    properties = generate["inputSchema"]["properties"]
    assert all(properties[field.name]["description"] for field in dataclasses.fields(RunConfig))


@pytest.mark.parametrize("outside", ["app.py", "/etc/passwd", "../app.py"])
def test_nothing_but_the_cache_is_served(app_url: str, outside: str):
    assert httpx.get(f"{app_url}/gradio_api/file={outside}").status_code in (403, 404)


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, EXAMPLES / "api_python.py"],
        ["node", EXAMPLES / "api_javascript.mjs"],
        ["sh", EXAMPLES / "api_curl.sh"],
    ],
    ids=["python", "javascript", "curl"],
)
def test_recipes_of_the_api_tab_run(command: list, app_url: str):
    if shutil.which(command[0]) is None:
        pytest.skip(f"install {command[0]} to run this recipe")
    done = subprocess.run([*command, app_url, "2"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "toybox/judge" in done.stdout and "metrics.csv" in done.stdout


def test_unexpected_failures_show_a_reference_and_no_internals(caplog: pytest.LogCaptureFixture):
    with pytest.raises(gr.Error) as shown, session.clear_errors():
        raise KeyError("/secret/path")
    assert "secret" not in str(shown.value)
    (reference,) = re.findall(r"reference ([0-9a-f]{8})", str(shown.value))
    assert reference in caplog.text and "secret" in caplog.text


def test_closing_the_stream_closes_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    closed = threading.Event()

    def generate(config: RunConfig, output_root: Path, allow_download: bool):
        try:
            yield Started("id", tmp_path, config, ("with",), ())
            yield Started("id", tmp_path, config, ("with",), ())
        finally:
            closed.set()

    monkeypatch.setattr(session, "generate", generate)
    views = session.watch(RunConfig(prompt=PROMPT))
    assert next(views).directory is None
    assert next(views).directory == tmp_path
    views.close()
    assert closed.is_set()


def test_share_link_carries_settings_and_refuses_nonsense():
    settings = form.settings_of_query({"prompt": PROMPT, "steps": "20", "compare": "false", "gamma": "5", "utm": "x"})
    assert (settings["steps"], settings["arms"], settings["gamma"]) == (20, "with", 5.0)  # compare: of older links
    assert form.settings_of_query({"unrelated": "1"}) == {}
    for query in (
        {"prompt": PROMPT, "steps": "many"},
        {"prompt": PROMPT, "steps": "99999"},
        {"prompt": PROMPT, "pair": "x"},
        {"prompt": PROMPT, "compare": "yes"},
        {"prompt": PROMPT, "arms": ""},
    ):
        with pytest.raises(RequestError):
            form.settings_of_query(query)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": 3}', '{"prompt": 5}', "[" * 100_000, "\x00"])
def test_files_without_settings_are_refused(tmp_path: Path, content: str):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(RequestError, match="carries no settings"):
        form.settings_of_file(path)


def test_pictures_without_settings_are_refused(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    with pytest.raises(RequestError, match="carries no settings"):
        form.settings_of_file(tmp_path / "other.png")


def test_presets_fill_every_control_but_what_is_drawn():
    filled = dict(zip(form.NAMES, form.fill_preset("toybox-paper-form"), strict=True))
    kept = {name for name, value in filled.items() if isinstance(value, dict) and value.get("__type__") == "update"}
    assert kept == set(form.KEPT_BY_PRESETS)
    assert filled["pref_form"] == "paper" and filled["steps"] == 50


def test_a_mixture_is_shown_with_every_members_licence_and_size():
    note = form.model_note("toybox/sd", "hpsv2.1 + 0.5 pickscore")
    for name in ("hpsv2.1", "pickscore"):
        info = REWARDS[name]
        assert f"**{name}** · {info.about} Licence: {info.licence}; {info.download_mb} MB to download." in note
    assert form.model_note("toybox/sd", "hpsv2.1 + ") == form.model_note("toybox/sd", "")  # still being typed


def test_a_prior_of_the_hub_can_be_typed_and_travels_in_a_link():
    assert form.checked({"prompt": PROMPT, "prior": "someone/else"}).prior == "someone/else"
    assert form.settings_of_query({"prompt": PROMPT, "prior": "someone/else"})["prior"] == "someone/else"


def test_a_mixture_can_be_typed_and_travels_in_a_link():
    mixture = "toybox/preference + 0.5 toybox/judge"
    with gr.Blocks():
        controls, _ = build_settings()
    assert controls["reward"].preprocess(mixture) == mixture
    assert form.settings_of_query({"prompt": PROMPT, "reward": mixture})["reward"] == mixture
    with pytest.raises(RequestError, match="reward 'nobody' is not known"):
        form.checked({"prompt": PROMPT, "reward": "toybox/preference + nobody"})


def test_the_score_table_tells_a_mixtures_members_from_the_judges():
    mixture = "hpsv2.1 + 0.5 aesthetic"
    table = parts.score_table({"with": {"pickscore": 20.0, "aesthetic": 5.0, mixture: 1.0}}, mixture)
    tags = {parts.TARGET_TAG: mixture, parts.MEMBER_TAG: "aesthetic", parts.HELD_OUT_TAG: "pickscore"}
    assert all(f"<th scope='row'>{name} {tag}</th>" in table for tag, name in tags.items())
    assert table.index(parts.TARGET_TAG) < table.index(parts.HELD_OUT_TAG)  # the target comes first
    assert parts.TARGET_TAG in parts.score_table({"with": {"retired": 1.0}}, "retired")


def test_saved_prompts_are_valid_requests():
    prompts = examples.load_prompts()
    assert len(prompts) >= 8
    for settings in prompts:
        form.checked(settings)


def test_precomputed_examples_are_complete():
    for example in examples.load_examples():
        result = session.load_result(example.directory)
        assert set(result.images) == {"with", "without"} and result.rows and result.scores
        settings = RunConfig.from_dict(result.settings).to_dict()  # an older example lacks newer settings
        assert form.settings_of_file(example.thumbnail) == settings


def test_examples_stay_hidden_without_an_index(tmp_path: Path):
    assert examples.load_examples(tmp_path) == []


def test_duration_grows_with_the_work_and_is_bounded():
    short, long = (RunConfig(prompt=PROMPT, steps=steps) for steps in (10, 1000))
    assert 15 <= session.gpu_seconds(short) < session.gpu_seconds(long) <= 120
    assert session.estimate_s(dataclasses.replace(long, time_budget_s=10.0)) <= 10
    assert session.gpu_steps(short) == 10 and 10 < session.gpu_steps(dataclasses.replace(long, mode="3d")) < 1000
    assert "ends the run after about 40 steps" in parts.estimate(long, 200.0, 120, 40)


@pytest.mark.parametrize("mode", ["image", "3d"])
def test_the_reserved_seconds_cover_a_run(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the first guess and by what the first run has measured; without reserving a multiple of what is used."""
    monkeypatch.setattr(session, "measured_step_s", {})
    monkeypatch.setattr(session.files, "output_root", lambda: tmp_path)
    config = RunConfig.from_preset(mode=mode, prompt=PROMPT, steps=8)
    for _ in range(2):
        reserved, estimated = session.gpu_seconds(config), session.estimate_s(config)
        started = time.monotonic()
        *_, last = session.watch(config)
        taken = time.monotonic() - started
        assert last.finished and taken < reserved
    assert estimated / 3 < taken < 3 * estimated


def test_on_zero_gpu_a_run_ends_within_its_seconds_and_downloads_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(session, "ON_ZERO_GPU", True)
    monkeypatch.setattr(session, "gpu_seconds", lambda config: 4)
    monkeypatch.setattr(session.files, "output_root", lambda: tmp_path)
    started = time.monotonic()
    *_, last = session.watch(RunConfig.from_preset("toybox-image", prompt=PROMPT, steps=1000))
    assert time.monotonic() - started < 4
    result = session.load_result(last.directory)
    assert "time budget of 4 s" in result.stopped and set(result.images) == {"with", "without"}

    with pytest.raises(RequestError, match=r"stable-diffusion-v1-5 and hpsv2\.1 must be downloaded first"):
        list(session.watch(RunConfig.from_preset("sd15-paper", prompt=PROMPT), allow_download=True))


def test_old_runs_are_removed_files_and_folders(tmp_path: Path):
    for index in range(12):
        folder = tmp_path / f"run{index:02d}"
        folder.mkdir()
        (folder / "result.png").write_bytes(b"x" * 100)
        os.utime(folder, (index, index))
    (tmp_path / "empty").mkdir()
    os.utime(tmp_path / "empty", (0, 0))
    (tmp_path / "young").mkdir()
    files.prune(tmp_path, max_entries=6)
    assert {path.name for path in tmp_path.iterdir()} == {"young", *(f"run{index:02d}" for index in range(7, 12))}
    files.prune(tmp_path, max_entries=64, max_bytes=250)
    assert {path.name for path in tmp_path.iterdir()} == {"young", "run10", "run11"}


def test_charts_draw_finite_values_and_escape_text():
    figure = plots.line_chart("<b>", [1, 2, 3], [plots.Series("with", "a & b", [1.0, math.nan, 2.0])], 3)
    assert "<b>:" not in figure and "&lt;b&gt;" in figure and "a &amp; b" in figure
    assert "nan" not in figure and figure.count("L") == 1
    assert plots.nice_ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    low, *_, high = plots.nice_ticks(3.14, 3.14)
    assert low <= 3.14 <= high and low < high


def run_folders() -> list[Path]:
    return [path for path in (files.cache_root() / "psd-runs").iterdir() if path.is_dir()]


def wait_until(condition, seconds: float = 120.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.05)

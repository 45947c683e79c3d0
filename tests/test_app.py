"""The app as its clients see it: one launched server, driven by gradio_client, curl and node on the embedded models."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.client import Job
from gradio_client.exceptions import AppError, ValidationError
from PIL import Image

from psd.config import LOCAL, MAX_PROMPT_CHARS, RunConfig
from psd.errors import RequestError
from psd.models.rewards.table import REWARDS
from psd.presets import OTHERS
from psd.record import read, settings_of
from psd.ui import api, create, examples, files, form, parts, plots, watch, wiring

EXAMPLES = Path(examples.EXAMPLES)
PROMPT = "a red mushroom with a white stem"
LAST_S = 600.0  # of anything that is waited for: a machine that also trains is slow
PATIENT = {"timeout": LAST_S}


@pytest.fixture(scope="module")
def client(app_url: str, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(app_url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"), httpx_kwargs=PATIENT)


@pytest.fixture(scope="module")
def finished(client: Client) -> list[tuple]:
    """All items of one run's stream."""
    job = client.submit(prompt=PROMPT, seed=7, steps=6, api_name="/generate")
    job.result(timeout=LAST_S)
    return job.outputs()


def pictures(item: tuple) -> dict[str, str]:
    """Arm -> its picture, by the last item of a stream."""
    paths = {Path(path).name: path for path in item[3]}
    return {name: paths[arm["files"]["picture"]] for name, arm in item[2].items()}


def test_generate_streams_previews_then_returns_everything(finished: list[tuple]):
    *stream, last = finished
    statuses = [item[1] for item in stream]
    assert statuses[0]["step"] == 0 and not statuses[0]["finished"]
    assert any(item[0] and not item[1]["finished"] for item in stream), "no preview before the end"
    assert all(item[2] is None and item[3] is None for item in stream if not item[1]["finished"])

    preview, status, arms, paths = last
    assert status["finished"] and status["step"] == status["steps"] == 6 and status["seed"] == 7
    assert status["config"]["prompt"] == PROMPT and status["config"]["preset"] == "toybox-image"
    assert (status["stopped"], status["failed"], status["remarks"]) == ("", False, [])
    wide, high = Image.open(preview).size
    assert wide == 2 * high
    assert list(arms) == ["with", "without"]
    for name, arm in arms.items():
        assert {"toybox/preference", "toybox/judge"} <= arm["scores"].keys()
        assert all(math.isfinite(value) for value in arm["scores"].values())
        more = {"negative": "with_negative.safetensors", "pairs": "with_pairs.webp"} if name == "with" else {}
        assert arm["files"] == {"picture": f"{name}.png"} | more and arm["remarks"].keys() == more.keys() - {"negative"}
    names = ["with.png", "with_negative.safetensors", "with_pairs.webp", "without.png", "metrics.csv", "run.json"]
    assert [Path(path).name for path in paths] == [*names, "everything.zip"]


def test_files_of_a_run_restore_its_settings(finished: list[tuple]):
    config = finished[-1][1]["config"]
    carriers = [Path(path) for path in finished[-1][3] if Path(path).suffix in (".png", ".json")]
    assert len(carriers) == 3
    for path in carriers:
        assert form.checked(settings_of(path)).to_dict() == config


def test_same_seed_same_picture_through_the_api(client: Client, finished: list[tuple]):
    again = client.predict(prompt=PROMPT, seed=7, steps=6, api_name="/generate")
    for arm, picture in pictures(again).items():
        assert Image.open(picture).tobytes() == Image.open(pictures(finished[-1])[arm]).tobytes()


def test_any_arms_in_their_order(client: Client):
    preview, _, arms, paths = client.predict(
        prompt=PROMPT, steps=2, arms="selection, with, no-negative", api_name="/generate"
    )
    assert list(arms) == ["selection", "with", "no-negative"]
    pictures = [Path(path).name for path in paths if path.endswith(".png")]
    assert pictures == ["selection.png", "with.png", "no-negative.png"]
    wide, high = Image.open(preview).size
    assert wide == 3 * high


def test_one_number_varies_under_the_same_names_in_arms_and_files(client: Client):
    _, _, arms, paths = client.predict(
        prompt=PROMPT, steps=2, arms="without", vary="gamma: 1.5, 4", api_name="/generate"
    )
    assert list(arms) == ["without", "gamma=1.5", "gamma=4"]
    assert [Path(path).name for path in paths if path.endswith(".png")] == [f"{name}.png" for name in arms]
    with pytest.raises(ValidationError, match="vary cannot take steps"):
        client.predict(prompt=PROMPT, vary="steps: 2, 3", api_name="/generate")


def test_a_run_goes_on_from_another_by_its_name(client: Client, finished: list[tuple]):
    run = finished[-1][1]["run"]
    settings = dict(prompt=PROMPT, steps=2, t_max=0.05, arms="without", api_name="/generate")
    _, status, _, paths = client.predict(start=f"{run}/with", **settings)
    assert status["remarks"][0].startswith("Started from a picture")
    *_, first_arm = client.predict(start=run, **settings)
    assert Image.open(paths[0]).tobytes() == Image.open(first_arm[0]).tobytes()
    *_, other = client.predict(start=f"{run}/without", **settings)
    assert Image.open(paths[0]).tobytes() != Image.open(other[0]).tobytes()
    for name, sentence in {
        f"{run}/selection": "start names a run that has no picture of arm 'selection' for mode image",
        "0123456789ab/with": "start must be an upload or a run of this server",
    }.items():
        with pytest.raises(ValidationError, match=sentence):
            client.predict(start=name, **settings)


def test_the_n_of_a_run_starts_another_one_as_an_upload(client: Client, finished: list[tuple]):
    learned = next(path for path in finished[-1][3] if path.endswith("with_negative.safetensors"))
    _, status, arms, paths = client.predict(
        prompt=PROMPT, steps=2, negative_from=handle_file(learned), api_name="/generate"
    )
    assert status["remarks"][0].startswith("n started from a file") and status["config"]["negative_from"] == ""
    assert arms["with"]["files"]["negative"] == "with_negative.safetensors"
    plain = client.predict(prompt=PROMPT, steps=2, arms="without", api_name="/generate")
    beside = [Image.open(pictures(item)["without"]).tobytes() for item in (plain, (None, status, arms, paths))]
    assert beside[0] != beside[1]


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        ("/etc/passwd", "negative_from must be an upload"),
        ({"path": "/nowhere"}, "negative_from must be an upload"),
        (3, "negative_from must be text"),
        (handle_file(Path(__file__)), "negative_from 'test_app.py' is not a safetensors file"),
    ],
    ids=["a path", "a told path", "a number", "another file"],
)
def test_an_n_that_is_no_upload_of_one_is_refused(client: Client, sent: object, sentence: str):
    with pytest.raises(ValidationError) as refusal:
        client.predict(prompt=PROMPT, negative_from=sent, api_name="/generate")
    assert sentence in str(refusal.value)


def test_scores_rates_an_uploaded_picture(client: Client, finished: list[tuple]):
    rated = client.predict(handle_file(pictures(finished[-1])["with"]), PROMPT, api_name="/scores")
    assert rated.keys() == set(watch.embedded_rewards())
    expected = finished[-1][2]["with"]["scores"]["toybox/judge"]
    assert rated["toybox/judge"] == pytest.approx(expected, abs=0.02)


def test_scores_reads_uploads_and_examples_alone_and_tells_of_nothing_else(client: Client, tmp_path: Path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    link = files.cache_root() / "link.png"
    link.symlink_to(picture)
    told = set()
    for path in (picture, tmp_path / "none.png", link, "/etc/passwd", "app.py", "\0", f"{files.cache_root()}/../x.png"):
        with pytest.raises(AppError) as refusal:
            client.predict({"path": str(path)}, PROMPT, api_name="/scores")
        told.add(str(refusal.value))
    assert told == {"image must be an upload: send a PNG, JPEG or WebP picture."}
    shipped = examples.load_examples()[0].thumbnail
    assert api.uploaded(str(shipped)) == shipped


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


def test_what_would_take_too_long_is_refused_before_the_queue(client: Client):
    with pytest.raises(ValidationError) as refusal:
        client.predict(
            prompt=PROMPT, preset="toybox-fast", mode="3d", steps=20_000, render_size=256, api_name="/generate"
        )
    assert "This run would take about" in str(refusal.value) and "lower steps to about" in str(refusal.value)


def test_not_a_number_is_refused(app_url: str):
    # Python's json writes NaN, which the standard forbids and gradio's server reads.
    body = json.dumps({"prompt": PROMPT, "gamma": math.nan})
    answer = httpx.post(
        f"{app_url}/gradio_api/call/v2/generate", content=body, headers={"Content-Type": "application/json"}, **PATIENT
    )
    assert answer.status_code in (400, 422)


def test_a_client_that_leaves_ends_its_run_and_the_next_one_works(client: Client):
    before = set(run_folders())
    job = client.submit(prompt=PROMPT, steps=900, api_name="/generate")
    wait_until(lambda: job.outputs() and job.outputs()[-1][1]["step"] >= 2, job)
    job.cancel()
    (folder,) = set(run_folders()) - before
    wait_until(lambda: read(folder).state == "abandoned")
    partial = read(folder)
    assert 2 <= len(partial.rows) == partial.steps_done < 900
    assert partial.preview and not partial.arms  # nobody waits for pictures

    _, status, _, _ = client.predict(prompt=PROMPT, steps=2, api_name="/generate")
    assert status["finished"]


def test_two_clients_never_share_a_folder(app_url: str):
    def run(seed: int) -> list[str]:
        return Client(app_url, verbose=False, download_files=False, httpx_kwargs=dict(PATIENT)).predict(
            prompt=PROMPT, steps=2, seed=seed, api_name="/generate"
        )[3]

    with ThreadPoolExecutor(2) as pool:
        first, second = ({file["path"] for file in paths} for paths in pool.map(run, (1, 2)))
    assert len(first) == len(second) == 7 and not first & second


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
    tools = {
        tool["name"].removeprefix("app_"): tool
        for tool in httpx.get(f"{app_url}/gradio_api/mcp/schema", **PATIENT).json()
    }
    generate = next(tool for name, tool in tools.items() if name.endswith("generate"))
    assert len(tools) == 2
    properties = generate["inputSchema"]["properties"]
    assert all(properties[field.name]["description"] for field in dataclasses.fields(RunConfig))


@pytest.mark.parametrize("outside", ["app.py", "/etc/passwd", "../app.py"])
def test_nothing_but_the_cache_is_served(app_url: str, outside: str):
    assert httpx.get(f"{app_url}/gradio_api/file={outside}", **PATIENT).status_code in (403, 404)


@pytest.mark.parametrize("path", ["monitoring", "monitoring/", "monitoring/summary", "monitoring/key"])
def test_nobody_is_told_how_the_app_is_used(app_url: str, path: str):
    assert httpx.get(f"{app_url}/{path}", follow_redirects=True, **PATIENT).status_code in (403, 404)


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
    done = subprocess.run([*command, app_url, "2"], capture_output=True, text=True, timeout=LAST_S)
    assert done.returncode == 0, done.stderr
    assert all(told in done.stdout for told in ("toybox/judge", "metrics.csv", "without.png"))


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


def test_presets_fill_every_control_but_what_is_drawn():
    filled = dict(zip(form.NAMES, form.fill_preset("toybox-paper-form"), strict=True))
    kept = {name for name, value in filled.items() if isinstance(value, dict) and value.get("__type__") == "update"}
    assert kept == set(form.KEPT_BY_PRESETS)
    assert filled["pref_form"] == "paper" and filled["steps"] == 50
    filled = dict(zip(form.NAMES, form.fill_preset("toybox-csd"), strict=True))
    assert filled["arms"] == ["with", "csd"]


def test_a_browsers_list_of_runs_is_not_believed():
    kept, gallery = wiring.recall_runs(["../psd-stops", "0123456789ab", 5, None, {"path": "/etc"}, 300 * "a"])
    assert kept == [] and not gallery["visible"]
    assert wiring.recall_runs("0123456789ab")[0] == wiring.recall_runs(None)[0] == []


def test_the_page_opens_with_what_its_preset_has():
    with gr.Blocks():
        controls = {name: form.control(name) for name in form.NAMES if name not in LOCAL}
    start = RunConfig.from_preset().to_dict()
    start["arms"] = start["arms"].split(", ")
    assert {name: each.value for name, each in controls.items()} == {name: start[name] for name in controls}
    with gr.Blocks():
        chosen, _ = create.build_settings(())
    assert {name: chosen[name].value for name in ("preset", "prior", "reward")} == {
        name: start[name] for name in ("preset", "prior", "reward")
    }


def test_a_mixture_is_shown_with_every_members_licence_and_size():
    note = form.model_note("toybox/sd", "hpsv2.1 + 0.5 pickscore")
    for name in ("hpsv2.1", "pickscore"):
        info = REWARDS[name]
        assert f"<b>{name}</b> · {info.about} Licence: {info.licence}; {info.download_mb} MB to download." in note
    assert form.model_note("toybox/sd", "hpsv2.1 + ") == form.model_note("toybox/sd", "")  # still being typed


def test_a_prior_of_the_hub_can_be_typed_and_travels_in_a_link():
    assert form.checked({"prompt": PROMPT, "prior": "someone/else"}).prior == "someone/else"
    assert form.settings_of_query({"prompt": PROMPT, "prior": "someone/else"})["prior"] == "someone/else"


def test_a_mixture_can_be_typed_and_travels_in_a_link():
    mixture = "toybox/preference + 0.5 toybox/judge"
    with gr.Blocks():
        controls, _ = create.build_settings(())
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
    index = json.loads((EXAMPLES / "index.json").read_text(encoding="utf-8"))
    shown = examples.load_examples()
    methods = json.loads((EXAMPLES / "methods.json").read_text(encoding="utf-8"))
    assert len(shown) == len(index) == len(examples.load_prompts()) + len(methods)
    for example in shown:
        result = read(example.directory)
        assert result.state == "done" and result.rows
        assert set(result.arms) == (
            {"with", "without", *OTHERS} if example.gallery == "methods" else {"with", "without"}
        )
        assert all(arm.scores for arm in result.arms.values())
        assert set(result.files) <= set(example.directory.iterdir())
        settings = RunConfig.from_dict(result.settings).to_dict()  # an older example lacks newer settings
        assert form.checked(settings_of(example.thumbnail)).to_dict() == settings


def test_examples_stay_hidden_without_an_index(tmp_path: Path):
    assert examples.load_examples(tmp_path) == []


def test_charts_draw_finite_values_and_escape_text():
    figure = plots.line_chart("<b>", [1, 2, 3], [plots.Series("with", "a & b", [1.0, math.nan, 2.0])], 3)
    assert "<b>:" not in figure and "&lt;b&gt;" in figure and "a &amp; b" in figure
    assert "nan" not in figure and figure.count("L") == 1
    assert plots.nice_ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    low, *_, high = plots.nice_ticks(3.14, 3.14)
    assert low <= 3.14 <= high and low < high


def run_folders() -> list[Path]:
    return [path for path in files.output_root().iterdir() if path.is_dir()]


def wait_until(condition: Callable[[], object], job: Job | None = None) -> None:
    give_up = time.monotonic() + LAST_S
    while not condition():
        assert not (job and job.done()), job.outputs()
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.05)

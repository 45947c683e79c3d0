"""Downloads against a hub on loopback: what arrives, what a fault leaves behind, and the sentence that tells it."""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from psd.config import RunConfig
from psd.errors import RequestError
from psd.models import hub as psd_hub
from psd.models.hub import DIFFUSERS_FILES, OWNER, STRANGER, Source, download_trouble
from psd.models.needs import check_downloads, missing_models
from psd.models.priors.table import PRIORS, PriorInfo
from psd.models.rewards.table import REWARDS
from psd.models.weights import readable_errors
from tests import local_hub
from tests.local_hub import GRANTED, LocalHub

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS, CONFIG = "model.safetensors", "config.json"
FILES = (WEIGHTS, CONFIG)
UNET = "unet/config.json"
GET_WEIGHTS, GET_CONFIG = f"GET /cdn/.*{WEIGHTS}", f"GET .*/resolve/.*{CONFIG}"
PUBLISHED = RunConfig.from_preset("sd15-paper", prompt="a red mushroom")


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    with local_hub.serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf-home")


class Client:
    """tests/hub_client.py, once for many questions: importing takes longer than answering."""

    def __init__(self, environment: dict[str, str]):
        command = [sys.executable, "-m", "tests.hub_client"]
        streams = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **streams)

    def __call__(
        self, name: str, files: tuple[str, ...] = FILES, revision: str = "main", stop: bool = False,
        stranger: bool = False,
    ):  # fmt: skip
        request = {"name": name, "files": files, "revision": revision, "stop": stop, "stranger": stranger}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return SimpleNamespace(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


@pytest.fixture(scope="module")
def client(hub: LocalHub, home: Path) -> Iterator[Client]:
    client = Client(hub.environment(home, HF_HUB_DOWNLOAD_TIMEOUT="2"))
    yield client
    client.close()


@pytest.fixture
def repo(hub: LocalHub, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A repository of the test's own, of 200 kB, and no fault left by the test before."""
    (tmp_path / CONFIG).write_text('{"a": 1}')
    (tmp_path / WEIGHTS).write_bytes(bytes(range(250)) * 800)
    (tmp_path / "unread.bin").write_bytes(b"unread")
    name = f"org/{hashlib.sha1(request.node.name.encode()).hexdigest()[:12]}"
    hub.add(name, tmp_path)
    hub.faults.clear()
    hub.requests.clear()
    yield name
    hub.faults.clear()


def content(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def stored(home: Path, name: str) -> list[Path]:
    """Everything of a repository in the cache that could pass for content."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    return [path for path in folder.rglob("*") if path.is_file() and path.parent.name in ("blobs", "snapshots")]


# What arrives


def test_the_files_that_are_read_arrive_and_are_asked_for_once(hub: LocalHub, client: Client, repo: str):
    got = client(repo)
    assert (got.before, got.after, got.sentence) == (False, True, "")
    assert content(got.folder) == {file: (hub.repos[repo].folder / file).read_bytes() for file in FILES}
    assert hub.downloads() == [WEIGHTS, CONFIG]
    assert {event["name"] for event in got.told} == {repo}
    assert {round(event["total_mb"], 4) for event in got.told} == {0.2}

    hub.requests.clear()
    again = client(repo)
    assert (again.before, again.folder, again.told, hub.requests) == (True, got.folder, [], [])


def test_patterns_take_one_precision_in_one_format_with_all_its_shards(hub: LocalHub, client: Client, repo: str):
    folder, unet = hub.repos[repo].folder, "unet/diffusion_pytorch_model"
    wanted = [
        "tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json", "text_encoder/config.json",
        "text_encoder/model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
        "unet/config.json", f"{unet}.safetensors.index.json", f"{unet}-00001-of-00002.safetensors",
        f"{unet}-00002-of-00002.safetensors", "model_index.json",
    ]  # fmt: skip
    others = [
        f"{unet}.fp16.safetensors", f"{unet}.bin", f"{unet}.non_ema.safetensors", f"{unet}.fp16-00001-of-00002.bin",
        "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin", "safety_checker/config.json",
        "feature_extractor/preprocessor_config.json", "unet/mv_unet.py",
    ]  # fmt: skip
    for file in wanted + others:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(file.encode())
    got = client(repo, DIFFUSERS_FILES)
    assert got.sentence == ""
    assert sorted(hub.downloads()) == sorted(wanted)
    assert hub.downloads()[-1] == "model_index.json"


def test_a_slow_hub_is_told_of_while_it_sends(hub: LocalHub, client: Client, repo: str):
    hub.faults[GET_WEIGHTS] = ["slow"]  # 1.6 s
    got = client(repo)
    assert got.sentence == "" and len(got.told) >= 3


def test_a_token_goes_to_the_hub_and_not_to_its_cdn(hub: LocalHub, home: Path, repo: str):
    hub.repos[repo].gated = True
    client = Client(hub.environment(home, HF_TOKEN=GRANTED))
    got = client(repo)
    client.close()
    assert got.sentence == "" and got.after
    sent = {path.split("/")[1]: "authorization" in map(str.lower, headers) for _, path, headers in hub.requests}
    assert sent == {"api": True, "org": True, "cdn": False}


# Faults: the sentence, nothing half, and a retry that works


@pytest.mark.parametrize(
    ("where", "fault", "sentence"),
    [
        (GET_WEIGHTS, "wrong", f"'{WEIGHTS}' of 'NAME' arrived damaged"),
        (GET_CONFIG, "wrong", f"'{CONFIG}' of 'NAME' arrived damaged"),
        (GET_WEIGHTS, "short", "'NAME' could not be downloaded"),
        (GET_WEIGHTS, "503", "'NAME' could not be downloaded"),
        ("GET /api", "503", "'NAME' could not be downloaded"),
    ],
)
def test_a_fault_leaves_nothing_behind_and_a_retry_works(
    hub: LocalHub, client: Client, home: Path, repo: str, where: str, fault: str, sentence: str
):
    hub.faults[where] = [fault]
    failed = client(repo)
    assert sentence.replace("NAME", repo) in failed.sentence and "run again" in failed.sentence
    assert str(home) not in failed.sentence and "\n" not in failed.sentence
    assert not failed.after
    good = {path.read_bytes() for path in hub.repos[repo].folder.iterdir()}
    assert all(path.read_bytes() in good for path in stored(home, repo))

    hub.requests.clear()
    again = client(repo)
    assert again.sentence == "" and again.after
    assert content(again.folder) == {file: (hub.repos[repo].folder / file).read_bytes() for file in FILES}
    # What was complete before is not fetched a second time.
    assert hub.downloads() == ([CONFIG] if where == GET_CONFIG else [WEIGHTS, CONFIG])


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: LocalHub, client: Client, repo: str):
    weights = bytes(range(250)) * 100_000  # 25 MB: huggingface_hub writes in chunks of 10 MiB
    (hub.repos[repo].folder / WEIGHTS).write_bytes(weights)
    hub.faults[GET_WEIGHTS] = ["cut"]
    got = client(repo)
    assert got.sentence == "" and (Path(got.folder) / WEIGHTS).read_bytes() == weights
    asked = [headers for method, path, headers in hub.requests if method == "GET" and path.startswith("/cdn")]
    ranges = [{name.lower(): value for name, value in headers.items()}.get("range") for headers in asked]
    assert ranges == [None, f"bytes={10 * 2**20}-"]


def test_a_download_that_is_closed_ends_and_is_not_used(hub: LocalHub, client: Client, home: Path, repo: str):
    hub.faults[GET_WEIGHTS] = ["slow"]
    assert not client(repo, stop=True).after
    assert client(repo).after


def test_a_missing_repository_revision_and_file(hub: LocalHub, client: Client, repo: str):
    renamed = client("org/renamed")
    assert renamed.sentence.startswith("There is no repository 'org/renamed' on the hub")
    assert client(repo, revision="0" * 40).sentence.startswith(f"'{repo}' no longer holds the files")
    assert client(repo, (WEIGHTS, "gone.json")).sentence.startswith(f"'{repo}' has no file 'gone.json'")
    assert hub.downloads() == []


def test_a_gated_repository_says_what_to_accept(hub: LocalHub, client: Client, repo: str):
    hub.repos[repo].gated = True
    sentence = client(repo).sentence
    assert f"accept its licence on huggingface.co/{repo}" in sentence and "HF_TOKEN" in sentence


def test_offline_the_cache_serves_and_the_rest_is_refused(hub: LocalHub, client: Client, home: Path, repo: str):
    got = client(repo)
    hub.requests.clear()
    offline = Client(hub.environment(home, HF_HUB_OFFLINE="1"))
    assert offline(repo).folder == got.folder
    other = offline("org/other")
    offline.close()
    assert "'org/other' is not in the hub's cache and HF_HUB_OFFLINE forbids" in other.sentence
    assert hub.requests == []


def test_a_hub_that_is_not_there(home: Path):
    with local_hub.serve() as gone:
        environment = gone.environment(home)
    client = Client(environment)
    sentence = client("org/any").sentence
    client.close()
    assert sentence.startswith("'org/any' could not be downloaded: the hub cannot be reached")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/secret/path"), "The disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "The disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/secret/path"), "'org/name' cannot be stored"),
        (TimeoutError("/secret/path"), "'org/name' could not be downloaded"),
    ],
)
def test_a_disk_that_takes_no_more(error: Exception, sentence: str):
    try:
        raise ValueError("what a library makes of it") from error
    except ValueError as wrapped:
        told = download_trouble(wrapped, "org/name")
    assert told.startswith(sentence) and "/secret" not in told


def test_a_full_disk_is_noticed_before_anything_is_downloaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psd_hub, "is_cached", lambda source: False)
    monkeypatch.setattr(psd_hub, "check_online", lambda name: None)
    monkeypatch.setattr(psd_hub, "missing_files", lambda source, access: ("0" * 40, {WEIGHTS: 10**18}))
    monkeypatch.setattr(psd_hub, "fetch", lambda *_: pytest.fail("it was downloaded"))
    with pytest.raises(RequestError, match=r"The disk is full: free space .* for 'org/name'"):
        list(psd_hub.download(Source("org/name", "main", FILES)))


def test_some_of_the_disk_stays_free(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psd_hub.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5e9))
    psd_hub.check_space(3 * 10**9)
    with pytest.raises(OSError, match="3001 MB are needed"):
        psd_hub.check_space(3001 * 10**6)


def test_a_stranger_may_not_fill_the_disk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psd_hub, "check_online", lambda name: None)
    monkeypatch.setattr(psd_hub, "check_space", lambda size: None)
    monkeypatch.setattr(psd_hub, "missing_files", lambda source, access: ("0" * 40, {WEIGHTS: 12_001 * 10**6}))
    fetched: list[psd_hub.Access] = []
    monkeypatch.setattr(psd_hub, "fetch", lambda *arguments: fetched.append(arguments[-1]))
    with pytest.raises(RequestError, match=r"^'org/name' would download 12001 MB, at most 12000 MB are allowed"):
        list(psd_hub.download(Source("org/name", "main", FILES), STRANGER))
    assert not fetched
    list(psd_hub.download(Source("org/name", "main", FILES)))
    assert fetched == [OWNER]


# Who asks


@pytest.fixture
def typed(hub: LocalHub, repo: str) -> str:
    """The repository laid out as a Stable Diffusion: configs that fit, weights that are none."""
    folder = hub.repos[repo].folder
    configs = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "scheduler/scheduler_config.json": {"prediction_type": "epsilon"},
        "text_encoder/config.json": {"model_type": "clip_text_model", "hidden_size": 16},
        "vae/config.json": {"_class_name": "AutoencoderKL"},
        "unet/config.json": {"_class_name": "UNet2DConditionModel", "sample_size": 4, "cross_attention_dim": 16},
    }
    for file in ("tokenizer/vocab.json", "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors",
                 "unet/diffusion_pytorch_model.safetensors"):  # fmt: skip
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(f"{repo} {file}".encode())
    (folder / "scheduler").mkdir()
    for file, config in configs.items():
        (folder / file).write_text(json.dumps(config))
    return repo


@pytest.fixture(scope="module")
def trusted(hub: LocalHub, home: Path) -> Iterator[Client]:
    """A process whose environment holds the owner's token."""
    client = Client(hub.environment(home, HF_TOKEN=GRANTED))
    yield client
    client.close()


def with_token(hub: LocalHub) -> set[bool]:
    return {"authorization" in map(str.lower, headers) for _, _, headers in hub.requests}


def test_a_stranger_is_not_served_with_the_owners_token(hub: LocalHub, trusted: Client, home: Path, typed: str):
    hub.repos[typed].gated = True
    for files in (FILES, ()):
        got = trusted(typed, files, stranger=True)
        assert got.sentence.startswith(f"'{typed}' is not a public repository of the hub") and not got.after
    assert "HF_TOKEN" not in got.sentence
    assert with_token(hub) == {False} and stored(home, typed) == []
    hub.repos[typed].gated = False
    assert trusted(typed, (), stranger=True).after
    assert with_token(hub) == {False}


def test_what_the_owners_token_brought_is_served_to_a_stranger_only_while_it_is_public(
    hub: LocalHub, trusted: Client, home: Path, typed: str
):
    hub.repos[typed].gated = True
    assert trusted(typed, ()).after
    assert trusted(typed, (), stranger=True).sentence.startswith(f"'{typed}' is not a public repository")
    offline = Client(hub.environment(home, HF_HUB_OFFLINE="1"))
    assert offline(typed, (), stranger=True).sentence.startswith(f"Whether '{typed}' is public cannot be asked")
    assert offline(typed, ()).sentence == ""
    offline.close()
    hub.repos[typed].gated = False
    hub.requests.clear()
    served = trusted(typed, (), stranger=True)
    assert (served.sentence, served.told, hub.downloads(), with_token(hub)) == ("", [], [], {False})


def test_generate_asks_on_behalf_of_whoever_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from psd import run

    asked: list[psd_hub.Access] = []
    monkeypatch.setattr(run, "fetch_models", lambda config, allowed, access: asked.append(access) or 1 / 0)
    config = RunConfig(prompt="a lamp")
    for access in (OWNER, STRANGER):
        with pytest.raises(ZeroDivisionError):
            next(run.generate(config, tmp_path, access=access))
    assert asked == [OWNER, STRANGER]
    with pytest.raises(RequestError, match="is a path, which only the command line may use"):
        next(run.generate(replace(config, prior="./weights"), tmp_path, access=STRANGER))


# A typed id is judged before gigabytes come

SMALL = {"model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "vae/config.json", UNET}


@pytest.mark.parametrize(
    ("file", "settings", "told", "fetched"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "is a 'StableDiffusionXLPipeline'", 1),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a 'FluxPipeline': choose a text-to-image Stable", 1),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "has two text encoders", 1),
        (UNET, {"in_channels": 9}, "is an inpainting model", 5),
        (UNET, {"layers_per_block": 2_000_000}, "has 'layers_per_block' of 2000000", 5),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "predicts sample", 5),
        ("model_index.json", {"note": "x" * 10**6}, "would download 2 MB, at most 1 MB are allowed", 0),
    ],
)
def test_an_unfit_repository_is_named_before_its_weights_are_fetched(
    hub: LocalHub, client: Client, typed: str, file: str, settings: dict, told: str, fetched: int
):
    path = hub.repos[typed].folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    got = client(typed, ())
    assert got.sentence.startswith(f"'{typed}' {told}") and not got.after
    assert set(hub.downloads()) <= SMALL and len(set(hub.downloads())) == fetched


def test_a_fit_repository_is_fetched_whole(hub: LocalHub, client: Client, typed: str):
    got = client(typed, (), stranger=True)
    assert (got.sentence, got.after) == ("", True)
    assert len(hub.downloads()) == len(set(hub.downloads())) == 9


# A cached file that broke later


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Source, Path]:
    """A source and its folder in a cache as huggingface_hub lays it out."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    root, commit = tmp_path / "models--org--name", "a" * 40
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True)
    (root / "blobs").mkdir()
    for file in FILES:
        blob = root / "blobs" / local_hub.checksum(file.encode(), file)
        blob.write_bytes(file.encode())
        (folder / file).symlink_to(blob)
    return Source("org/name", commit, FILES), folder


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_of_the_cache_is_named_and_removed(cached: tuple[Source, Path], file: str):
    source, folder = cached
    assert psd_hub.is_cached(source)
    (folder / file).resolve().write_bytes(b"something else")
    with pytest.raises(RequestError) as refusal, readable_errors("a-reward", source):
        raise ValueError("whatever a loader says")
    sentence = str(refusal.value)
    assert f"'{file}' of 'org/name'" in sentence and "run again" in sentence and str(folder) not in sentence
    assert not psd_hub.is_cached(source) and not (folder / file).is_symlink()


def test_an_intact_model_of_another_kind_is_kept(cached: tuple[Source, Path]):
    source, folder = cached
    with (
        pytest.raises(RequestError, match="'other' was downloaded whole but cannot be read"),
        readable_errors("other", source),
    ):
        raise ValueError("no UNet in it")
    assert psd_hub.is_cached(source)
    (folder / WEIGHTS).resolve().unlink()  # a cache tidied by hand
    assert not psd_hub.is_cached(source)


def test_a_repository_without_named_files_is_a_mistake():
    with pytest.raises(ValueError, match="name the files"):
        Source("org/name", "main")


# Nothing comes unasked


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_first_download_is_refused_until_it_is_allowed(online: None):
    assert list(missing_models(PUBLISHED)) == [PUBLISHED.prior, PUBLISHED.reward]
    for answer in (False, None, "yes", 1):
        with pytest.raises(RequestError, match=r"^allow_download must be true") as refusal:
            check_downloads(PUBLISHED, answer)
        for info in (PRIORS[PUBLISHED.prior], REWARDS[PUBLISHED.reward]):
            assert f"{info.download_mb} MB, licence: {info.licence}" in str(refusal.value)
    check_downloads(PUBLISHED, True)
    check_downloads(RunConfig(prompt="a red mushroom"), False)


def test_every_member_of_a_mixture_is_asked_for(online: None):
    members = ["hpsv2.1", "mps"]
    config = RunConfig(prompt="a lamp", reward="hpsv2.1 + 0.5 mps")
    assert list(missing_models(config)) == members
    with pytest.raises(RequestError) as refusal:
        check_downloads(config, False)
    for name in members:
        assert f"{name} ({REWARDS[name].download_mb} MB, licence: {REWARDS[name].licence})" in str(refusal.value)


def test_offline_it_is_the_network_that_is_named_not_the_permission():
    for allowed in (False, True):
        with pytest.raises(RequestError, match="HF_HUB_OFFLINE forbids"):
            check_downloads(PUBLISHED, allowed)


def test_what_is_cached_needs_no_permission(online: None, cached: tuple[Source, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(PRIORS, "org/name", PriorInfo(cached[0], "MIT", 10, "test"))
    check_downloads(RunConfig(prompt="a lamp", prior="org/name"), False)
    for path in cached[1].iterdir():
        path.unlink()
    with pytest.raises(RequestError, match=r"org/name \(10 MB, licence: MIT\)"):
        check_downloads(RunConfig(prompt="a lamp", prior="org/name"), False)


def test_generate_asks_before_it_downloads(online: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from psd.run import generate

    monkeypatch.setattr("psd.models.needs.download", lambda *_: pytest.fail("it was downloaded"))
    with pytest.raises(RequestError, match=r"^allow_download"):
        next(generate(PUBLISHED, tmp_path, allow_download=False))
    assert list(tmp_path.iterdir()) == []


def test_the_page_asks_with_size_and_licences_only_where_something_would_come(online: None):
    from psd.ui import form

    hidden = form.download_box("toybox/sd", "toybox/preference")
    assert not hidden["visible"] and not hidden["value"]
    assert not form.download_box("toybox/sd", "hpsv2.1 + ")["visible"]  # still being typed
    typed = form.download_box("somebody/her-fine-tune", "hpsv2.1")
    assert typed["label"] == f"Download {REWARDS['hpsv2.1'].download_mb} MB and a model of unknown size first, once"
    assert "somebody/her-fine-tune: see the model card on the hub" in typed["info"]
    assert "to be downloaded" in form.model_note("somebody/her-fine-tune", "toybox/preference")
    ours = "psd/ui"  # a folder that is spelled like a hub id
    assert form.model_note(ours, "toybox/preference") == form.model_note("", "toybox/preference")
    mixed = form.download_box("toybox/sd", "hpsv2.1 + 0.5 mps")
    assert "6400 MB" in mixed["label"] and "hpsv2.1: Apache-2.0; mps: MIT" in mixed["info"]
    asked = form.download_box(PUBLISHED.prior, PUBLISHED.reward)
    assert asked["visible"] and asked["value"] is False
    assert "6250 MB" in asked["label"] and "CreativeML OpenRAIL-M" in asked["info"] and "Apache-2.0" in asked["info"]


def test_the_page_and_the_api_refuse_in_the_same_sentence(online: None, monkeypatch: pytest.MonkeyPatch):
    import gradio as gr

    from psd.ui import api, estimate, wiring

    monkeypatch.setattr(estimate, "MAX_RUN_S", 1e9)  # a CPU takes hours
    values = [PUBLISHED.to_dict()[name] for name in api.NAMES]
    with pytest.raises(gr.Error, match="allow_download must be true for a first run with"):
        wiring.check_form(*values, False)
    wiring.check_form(*values, True)
    *others, last = api.validate(*values, False)
    assert not last["is_valid"] and "4270 MB" in last["message"] and all(entry["is_valid"] for entry in others)
    assert all(entry["is_valid"] for entry in api.validate(*values, True))


def test_a_download_is_shown_on_the_page_and_in_the_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from psd.events import Downloading, Started
    from psd.ui import api, files, parts, watch

    def generate(config: RunConfig, output_root: Path, *, allow_download: bool, access: psd_hub.Access, **options):
        assert allow_download and access == psd_hub.STRANGER and options["deadline_s"] > 0
        yield Downloading("org/name", 340.0, 1980.0)
        yield Started("id", tmp_path, config, ("with",), ())

    monkeypatch.setattr(watch, "generate", generate)
    monkeypatch.setattr(watch, "SHOW_EVERY_S", 0.0)
    monkeypatch.setattr(files, "output_root", lambda: tmp_path)
    monkeypatch.setattr(watch.estimate, "check_work", lambda config: None)
    views = watch.watch(PUBLISHED, allow_download=True)
    _, downloading, started = (next(views) for _ in range(3))
    views.close()
    shown = parts.run_status(downloading)
    assert "Downloading org/name" in shown and "340 of 1980 MB" in shown and 'aria-valuenow="17"' in shown
    assert api.answer(downloading)[1]["download"] == {"name": "org/name", "done_mb": 340.0, "total_mb": 1980.0}
    assert "Models are ready" in parts.run_status(started) and "download" not in api.answer(started)[1]


def test_the_command_line_says_what_it_downloads(
    online: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from psd.__main__ import main
    from psd.models import needs

    fetched: list[str] = []

    def download(source: Source, access: psd_hub.Access) -> Iterator[psd_hub.Downloading]:
        assert access == OWNER
        fetched.append(source.name)
        yield psd_hub.Downloading(source.name, 1.0, 2.0)
        raise RequestError("The disk is full.")

    monkeypatch.setattr(needs, "download", download)
    command = ["a red mushroom", "--preset", "sd15-paper", "--quiet", "--output", str(tmp_path)]
    assert main([*command, "--no-allow-download"]) == 2
    assert fetched == [] and "error: allow_download must be true" in capsys.readouterr().err
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert fetched == [PUBLISHED.prior] and out == ""
    assert err.splitlines()[0].startswith(f"downloading {PUBLISHED.prior} (4270 MB, licence: CreativeML OpenRAIL-M)")
    assert err.splitlines()[-1] == "error: The disk is full."


def test_reading_what_is_missing_loads_no_heavy_library():
    code = (
        "import sys; from psd.config import RunConfig; from psd.models.needs import missing_models; "
        "missing_models(RunConfig(prior='org/name')); print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

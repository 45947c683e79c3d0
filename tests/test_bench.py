"""The tables' arithmetic, and what is read of an object's views, against answers known by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from psd.bench import __main__ as bench_main
from psd.bench import gpu, growth, image, memory, methods, paired, scene, transfer
from psd.config import RunConfig
from psd.events import Preview
from psd.presets import OTHERS
from psd.run import generate
from psd.scene.cameras import Cameras
from psd.toybox import world
from psd.toybox.dataset import heldout_scenes
from psd.toybox.facts import GROUPS, labels
from psd.toybox.taste import AXES
from psd.toybox.views import AZIMUTHS, FOVY_DEG, draw_group, group

CHAIR, LAMP = (world.Scene(world.Thing(kind, "blue")) for kind in ("chair", "lamp"))


class SaysWhatItIsTold:
    """A classifier that sees `scenes` in the views, one each, surely."""

    def __init__(self, scenes: list[world.Scene]):
        rows = torch.from_numpy(np.stack([labels(scene) for scene in scenes]))
        self.answer = {
            group: torch.nn.functional.one_hot(rows[:, i], len(values)).float().clamp(min=1e-6).log()
            for i, (group, values) in enumerate(GROUPS.items())
        } | {"azimuth": torch.zeros(len(scenes), len(AZIMUTHS))}

    def __call__(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.answer


@pytest.mark.parametrize(
    ("said", "kind", "kind_views", "consistency"),
    [
        ([CHAIR] * 12, 100, 100, 100),
        ([CHAIR] * 9 + [LAMP] * 3, 100, 75, 75),
        ([CHAIR] * 3 + [LAMP] * 9, 0, 25, 75),
    ],
)
def test_what_is_seen_in_twelve_views(monkeypatch, said, kind, kind_views, consistency):
    monkeypatch.setattr(scene, "load_attributes", lambda device, source: SaysWhatItIsTold(said))
    seen = scene.seen_in(torch.zeros(12, 3, 8, 8), CHAIR)
    assert (seen["kind"], seen["kind_views"], seen["consistency"]) == (kind, kind_views, consistency)
    assert seen["facts"] == pytest.approx(50 + kind_views / 2)  # the colour is right in every view


def test_the_interval_is_over_prompts_not_over_seeds():
    between = np.repeat(np.arange(20.0)[:, None], 2, axis=1)
    mean, low, high = paired.interval(between)
    assert mean == 9.5 and 6 < low < 8 and 11 < high < 13
    within = np.tile([[0.0, 19.0]], (20, 1))  # every prompt has the same mean
    assert paired.interval(within) == (9.5, 9.5, 9.5)


def test_the_table_states_paired_differences():
    found = {"plain": {"x": np.array([[1.0], [3.0]])}, "full": {"x": np.array([[2.0], [4.0]])}}
    lines = paired.table(
        found, {"x": paired.Column("reward", 1)}, {"seconds": {"plain": "1", "full": "2"}}
    ).splitlines()
    assert lines[0] == "| arm | reward | seconds |"
    assert lines[2].startswith("| plain | 2.0 [") and lines[2].endswith("| 1 |") and "<br>" not in lines[2]
    assert "<br>+1.0 [+1.0, +1.0] (+1.00 sd, p = " in lines[3]


def test_a_row_may_differ_from_another_than_the_first():
    found = {name: {"x": np.full((4, 1), value)} for name, value in (("a", 1.0), ("b", 5.0), ("b learned", 7.0))}
    _, _, *rows = paired.table(found, {"x": paired.Column("x", 0)}, {}, {"b learned": "b"}).splitlines()
    assert ["<br>" in row for row in rows] == [False, False, True]
    assert "<br>+2 [+2, +2]" in rows[2]


def test_the_p_value_by_hand():
    """Of the 2^10 signs of ten equal differences two reach as far; of two opposite ones all do."""
    equal = np.ones((10, 3))
    assert paired.p_value(equal) == pytest.approx(2 / 2**10, abs=1e-3)
    assert paired.p_value(np.array([[1.0], [-1.0]])) == 1.0
    assert paired.p_value(np.random.default_rng(0).normal(1, 0.5, (40, 2))) < 1e-3
    more = np.arange(60.0).reshape(20, 3)
    assert paired.change(more + 1, more, 1).endswith("(+0.06 sd, p < 0.001)")


def test_jobs_come_back_under_their_prompt_and_seed(tmp_path: Path):
    scenes = heldout_scenes(3, 92)
    assert [world.caption(s) for s in scenes] == [world.caption(s) for s in heldout_scenes(5, 92)[:3]]
    order = {world.caption(s): i for i, s in enumerate(scenes)}

    def run_batch(jobs: list[paired.Job]) -> paired.Values:
        for job in jobs:
            paired.save_pictures(
                tmp_path, job, {"arm": torch.rand(12, 3, 64, 64), "other": torch.rand(12, 3, 64, 64)}, {}
            )
        return {"arm": {"x": [10.0 * order[world.caption(scene)] + seed for scene, seed in jobs]}}

    found = paired.measure(run_batch, scenes, seeds=2, batch=4, workers=1)
    assert found["arm"]["x"].tolist() == [[0, 1], [10, 11], [20, 21]]
    pictures = sorted(tmp_path.iterdir())
    assert len(pictures) == 6
    with Image.open(pictures[0]) as picture:
        assert picture.size == (12 * 64, 2 * 64)
    assert paired.contact_sheet(tmp_path, scenes, 2, 4).width == paired.NAMES_PX + 2 * 4 * 64


def judged(folder: Path, jobs: list[paired.Job], made: dict[paired.Job, paired.Pictures], keep: str, **settings):
    """paired.run_batch where making is looking up, and the jobs that were made."""
    asked = []

    def make(rows, config, device, jobs):
        asked.extend(jobs)
        return [made[job] for job in jobs]

    config = RunConfig.from_preset("toybox-fast", **settings)
    brightness = lambda views, scene: {"brightness": views.mean().item()}  # noqa: E731
    return paired.run_batch(make, brightness, scene.ROWS, config, "cpu", folder, keep, jobs), asked


def test_pictures_are_judged_again_without_being_made(tmp_path: Path):
    """And as they were: what is written is what is judged."""
    jobs = [(scene, 0) for scene in heldout_scenes(2, 92)]
    made = {job: {arm: torch.rand(3, 3, 64, 64) for arm in ("plain", "full")} for job in jobs}
    first, asked = judged(tmp_path, jobs, made, "none")
    second, asked_again = judged(tmp_path, jobs, made, "all")
    assert asked == jobs and asked_again == []
    assert first == second and set(first["full"]) == {"target", "judge", "brightness", *AXES}
    for job, pictures in enumerate(made.values()):
        for arm, views in pictures.items():
            assert first[arm]["brightness"][job] == pytest.approx(views.mean().item(), abs=2e-3)
    kept = paired.load_pictures(tmp_path, jobs[0])["full"]
    assert np.abs(kept / 255 - made[jobs[0]]["full"].permute(0, 2, 3, 1).numpy()).max() <= 0.5 / 255 + 1e-6


def test_a_table_goes_on_where_it_was_broken_off(tmp_path: Path):
    """What other settings made is never taken for these."""
    jobs = [(scene, seed) for scene in heldout_scenes(2, 92) for seed in range(2)]
    made = {job: {"plain": torch.rand(3, 3, 64, 64)} for job in jobs}
    judged(tmp_path, jobs[:3], made, "none")
    values, asked = judged(tmp_path, jobs, made, "same")
    assert asked == jobs[3:] and len(values["plain"]["target"]) == 4
    with pytest.raises(ValueError, match="other settings"):
        judged(tmp_path, jobs, made, "same", gamma=3.0)


EVERY_STEP = dict(pref_interval=1, negative_interval=1)
BEYOND_FULL_PSD = {
    image: {
        "DDIM (plain arm)": dict(method="sds"),
        "score distillation with Adam, no preference": dict(method="sds", update="adam"),
        "winner selection alone": EVERY_STEP | dict(pref_weight=0.0, negative_lr=0.0),
        "delta_pref, paper's form": EVERY_STEP | dict(negative_lr=0.0, pref_form="paper"),
        "delta_pref, centred": EVERY_STEP | dict(negative_lr=0.0),
        "negative embedding alone": EVERY_STEP | dict(method="negative", negative_lr=2e-2),
        "full PSD, paper's form": EVERY_STEP | dict(pref_form="paper", negative_lr=2e-2),
        "full PSD, centred": EVERY_STEP | dict(negative_lr=2e-2),
        "full PSD, centred, every second step: the preset": {},
        "full PSD, n at 0.001": EVERY_STEP | dict(negative_lr=1e-3),
        "full PSD, n at 0.04": EVERY_STEP,
        "full PSD, n at 0.1": EVERY_STEP | dict(negative_lr=1e-1),
    },
    scene: {
        "without preference": dict(method="sds"),
        "winner selection alone": dict(pref_weight=0.0, negative_lr=0.0),
        "delta_pref, paper's form": dict(negative_lr=0.0, pref_form="paper"),
        "delta_pref, centred": dict(negative_lr=0.0),
        "negative embedding alone": dict(method="negative"),
        "full PSD": {},
        "full PSD, n at 0.001": dict(negative_lr=1e-3),
        "full PSD, n at 0.04": dict(negative_lr=4e-2),
        "full PSD, n at 0.1": dict(negative_lr=1e-1),
    },
}


@pytest.mark.parametrize("bench", BEYOND_FULL_PSD)
def test_the_rows_differ_from_full_psd_only_where_they_say(bench):
    """In the order of the table, whose differences are to the first."""
    config = RunConfig.from_preset(bench.PRESET, prompt="a red cube", arms="with")
    settings = config.to_dict()
    beyond = {
        title: {name: value for name, value in row.to_dict().items() if value != settings[name]}
        for title, row in paired.rows_of(config, bench.ROWS).items()
    }
    assert list(beyond.items()) == list(BEYOND_FULL_PSD[bench].items())


def test_the_methods_table_has_every_method_with_the_rows_it_asks_for():
    assert [arm for arm, beyond in methods.ROWS.values() if not beyond] == ["without", "with", *OTHERS]
    for bench in methods.TABLES.values():
        config = RunConfig.from_preset(bench.PRESET, prompt="a red cube", candidates=2)
        counted = bench.passes(bench.ROWS, config)
        assert all(list(column) == list(bench.ROWS) for column in counted.values())
        assert counted["UNet rows a step"]["score distillation"] == "2"
        assert counted["UNet rows a step"]["PSD"].startswith("3 + ")
        assert counted["reward rows a step"]["RewardSDS"] == "1.4"  # two candidates in 0.7 of the run


@pytest.mark.parametrize(("bench", "stage"), [(image, image.ImageStage), (scene, scene.ObjectStage)])
def test_a_run_that_breaks_down_is_no_row_of_a_table(monkeypatch, bench, stage):
    monkeypatch.setattr(stage, "apply", lambda *_: "the scene filled with fog.")
    config = RunConfig.from_preset(bench.PRESET, steps=4)
    with pytest.raises(RuntimeError, match=r"Stopped at step \d: the scene filled with fog\."):
        bench.make(bench.ROWS, config, "cpu", [(CHAIR, 0)])


def test_a_learned_n_is_used_by_both_priors_on_the_same_noise(monkeypatch):
    """Its samples differ from those under the n it began with, and not at all where it has learned nothing."""
    monkeypatch.setattr(transfer, "STEPS", 3)
    made = {}
    for rate in (0.0, 0.03):
        config = RunConfig.from_preset(transfer.PRESET, steps=6, negative_lr=rate, arms="with")
        (made[rate],) = transfer.make(transfer.ROWS, config, "cpu", [(CHAIR, 0)])
    assert {learned.replace("learned", "of the negative prompt") for learned in transfer.AGAINST} == set(
        transfer.AGAINST.values()
    )
    for learned, before in transfer.AGAINST.items():
        assert made[0.03][learned].shape == (4, 3, 128, 128)
        assert (made[0.0][learned] - made[0.0][before]).abs().max() < 1e-5
        assert torch.equal(made[0.0][before], made[0.03][before])
        assert (made[0.03][learned] - made[0.03][before]).abs().max() > 0.02


def test_the_world_s_own_object_is_what_the_prior_s_views_look_like():
    """As drawn for the training groups, from any cameras."""
    index = next(i for i in range(100) if group(90, i, heldout=True)[0].scene.taste.framing == 1)  # stands in its place
    drawn, _ = group(90, index, heldout=True)
    others = (torch.full((4,), float(value)) for value in (drawn.elevation_deg, drawn.distance, FOVY_DEG))
    cameras = Cameras.around(torch.tensor(drawn.azimuth_deg), *others)
    views = scene.true_views(drawn.scene, 0, cameras, 128)
    assert views.shape == (4, 3, 128, 128)
    original = torch.from_numpy(draw_group(90, index, heldout=True)).permute(0, 3, 1, 2) / 255
    # Another instance of it: the same but for 4 % of its measures. Seen from 10 degrees beside it would be 0.015.
    assert (views - original).abs().mean() < 0.014


def test_settings_to_try_are_read_by_their_type():
    settings = bench_main.settings_of("gamma=3,pref_interval=2,pref_form=paper,negative_lr=1e-2")
    assert settings == dict(gamma=3.0, pref_interval=2, pref_form="paper", negative_lr=0.01)
    assert isinstance(settings["gamma"], float)
    assert bench_main.row_of("without:gamma=3") == ("without", dict(gamma=3.0))
    assert bench_main.row_of("gamma=3,negative_prompt=") == ("with", dict(gamma=3.0, negative_prompt=""))
    with pytest.raises(ValueError, match="gama is no setting"):
        bench_main.settings_of("gama=3")


@pytest.mark.parametrize(("platform", "peak"), [("linux", 512_000), ("darwin", 512_000_000)])
def test_the_cost_of_a_run_is_measured_around_it(monkeypatch, platform: str, peak: int):
    """By a clock that stands still but for one second an event, and two as the run is set up."""
    now, events = [100.0], []

    def watched(*arguments):
        now[0] += 2
        for event in generate(*arguments):
            now[0] += 1
            events.append(type(event))
            yield event

    monkeypatch.setattr(scene, "generate", watched)
    monkeypatch.setattr(scene, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(scene, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(scene.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=peak))
    cost = scene.cost_here(RunConfig.from_preset("toybox-image", prompt="a red mushroom", steps=2, arms="with"), "cpu")
    assert cost == scene.Cost(2 + len(events), 2 + 1 + events.index(Preview), 512.0)


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("mode", "unet", "text_encoder"), [
    ("image", 859_520_964, 123_060_480),
    ("3d", 867_572_164, 340_387_840),
])  # fmt: skip
def test_the_gpu_bench_builds_the_published_architectures(mode: str, unet: int, text_encoder: int):
    """Without storage: the parameters of the published checkpoints, and pictures that go through all of them."""
    prior, reward = gpu.random_prior(mode, "meta", tiny=False), gpu.random_reward("meta", tiny=False)
    assert parameters(prior.unet) == unet and parameters(prior.text_encoder) == text_encoder
    assert parameters(prior.vae) == 83_653_863
    vision = (reward.model.vision_model, reward.model.visual_projection)
    assert sum(map(parameters, vision)) == 632_076_800 and parameters(reward.model) == 986_109_441
    assert (prior.views, prior.image_size) == {"image": (1, 512), "3d": (4, 256)}[mode]
    assert {prior.unet.dtype, prior.vae.dtype, prior.text_encoder.dtype} == {torch.float16}

    images = torch.empty(prior.views, 3, prior.image_size, prior.image_size, device="meta")
    x, y = prior.encode(images), prior.embed([gpu.PROMPT]).expand(prior.views, -1, -1)
    cameras = torch.empty(prior.views, 16, device="meta") if mode == "3d" else None
    assert prior.eps(x, 500, y, cameras).shape == (prior.views, *prior.latent_shape)
    for decode in (prior.decode, gpu.random_decoder("meta", tiny=False)):
        assert reward.pixels(decode(x)).shape == (prior.views, 3, 224, 224)


# Of Algorithms 1 and 2: (y, n) x a pair or one noise, and the winner's once more with gradient, every k-th step.
ROWS = {
    "score distillation": (2, 0),
    "delta_pref only": (4, 0),
    "full PSD": (4, 1),
    "full PSD, interval 2": ((4 + 2) / 2, 1 / 2),
    "full PSD, interval 5": ((4 + 4 * 2) / 5, 1 / 5),
    "full PSD, fast decoder": (4, 1),
}


@pytest.mark.parametrize("mode", ["image", "3d"])
def test_the_gpu_bench_runs_tiny_on_a_cpu(mode: str):
    heading, *lines = gpu.report("cpu", tiny=False, steps=2, modes=[mode])
    assert "TINY" in heading and "a CPU" in heading
    assert lines[-1].endswith("not checked.")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    titles, arms = rows[0], {cells[0]: dict(zip(rows[0], cells, strict=True)) for cells in rows[1:]}
    own = ["`mvdream-fast` as it is"] if mode == "3d" else []  # the image preset is "delta_pref only"
    assert list(arms) == [*ROWS, *own]
    views = {"image": 1, "3d": 4}[mode]
    for name, (plain, gradient) in ROWS.items():
        assert float(arms[name]["UNet rows a step"]) == pytest.approx(views * plain)
        assert float(arms[name]["and with gradient"]) == pytest.approx(views * gradient)
    plain_speed, steps = float(arms[gpu.PLAIN]["steps/s"]), int(titles[-1].split()[0].replace(",", ""))
    for cells in arms.values():
        speed, ratio, in_all = (float(cells[title]) for title in ("steps/s", "ratio", titles[-1]))
        assert ratio == pytest.approx(speed / plain_speed, rel=0.02, abs=0.006)  # of numbers rounded to two digits
        assert in_all == pytest.approx(steps / speed / 60, rel=0.02, abs=0.006) and cells["peak (GB)"] == "-"
    if own:  # preference every 2nd step, n every 4th
        assert (arms[own[0]]["UNet rows a step"], arms[own[0]]["and with gradient"]) == ("12", "1")
    assert arms["full PSD"]["paper's ratio"] == {"image": "-", "3d": "0.41"}[mode]


def test_the_bars_are_the_aims_of_the_gpu_bench():
    found = {gpu.PLAIN: gpu.Measured(10.0, 8.0, 8, 0), gpu.FULL: gpu.Measured(5.0, 23.9, 16, 4)}
    assert [reached for _, reached in gpu.bars("3d", found, 2.9)] == [True, True, True]
    found[gpu.FULL] = gpu.Measured(4.9, 24.0, 16, 4)
    assert [reached for _, reached in gpu.bars("3d", found, 3.0)] == [False, False, False]
    assert len(list(gpu.bars("image", found, 0.1))) == 2  # the minutes are an object's


def test_each_bench_keeps_its_flags(monkeypatch, capsys):
    told = {}
    monkeypatch.setattr(gpu, "report", lambda *args: iter([f"report{args}"]))
    monkeypatch.setattr(bench_main, "write_table", lambda bench, args: told.update(bench=bench, **vars(args)))
    for command in ("gpu --device cpu --steps 7 --modes 3d", "scene --device cpu --seeds 1"):
        monkeypatch.setattr("sys.argv", ["psd.bench", *command.split()])
        bench_main.main()
    assert capsys.readouterr().out == "report('cpu', False, 7, ['3d'], False)\n"
    assert told["bench"] is scene and (told["seeds"], told["prompts"]) == (1, scene.PROMPTS)
    assert told["steps"] is None and told["preset"] == scene.PRESET


def test_a_short_column_says_how_far_and_how_surely_in_a_word():
    plain = np.random.default_rng(0).normal(0, 1, (40, 2))
    found = {"plain": {"x": plain}, "full": {"x": plain + plain.std()}}
    *_, first, second = paired.table(found, {"x": paired.Column("x", 2, short=True)}, {}).splitlines()
    assert first == f"| plain | {plain.mean():.2f} |" and second.endswith("<br>+1.00 sd ** |")
    assert paired.short_change(plain, plain) == "+0.00 sd"


def test_the_exponent_is_that_of_the_part_that_grows():
    for sizes in ((1, 2, 4, 8), (48, 80, 112, 160)):
        for power in (1, 2, 3):
            costs = [3 * sizes[0] ** power + 0.5 * size**power for size in sizes]
            assert growth.exponent(sizes, costs) == pytest.approx(power, abs=0.011)
            assert growth.exponent(sizes, [2.0 * size**power for size in sizes]) == pytest.approx(power, abs=0.011)
    assert growth.exponent((1, 2, 4, 8), [5, 5.1, 4.9, 5.05]) == 0.0
    assert growth.slope((20, 40), [7.0, 28.0]) == pytest.approx(2)


@pytest.mark.parametrize(("power", "verdict"), [(1, "yes"), (2, "NO")])
def test_what_grows_faster_than_its_work_is_told(monkeypatch, power: int, verdict: str):
    """By a clock that only the work moves, in turns."""
    now, done = [0.0], []

    def prepare(config: RunConfig, models: object, size: int):
        return lambda: (done.append(size), now.__setitem__(0, now[0] + 0.1 + 0.01 * size**power))

    monkeypatch.setattr(growth, "time", SimpleNamespace(process_time=lambda: now[0]))
    monkeypatch.setattr(growth, "load", lambda config, device: (None, {}))
    row = growth.Row("squares", (1, 2, 4, 8), 1, "image", prepare)
    found = growth.measured(row, "cpu", rounds=2)
    assert found.seconds == pytest.approx([0.1 + 0.01 * size**power for size in row.sizes])
    assert done == [1, *row.sizes, *row.sizes, *row.sizes]
    cells = [cell.strip() for cell in growth.told(row, found).strip("|").split("|")]
    assert cells[0] == "squares" and float(cells[4]) == pytest.approx(power, abs=0.011) and cells[-1] == verdict


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, which tells a process its peak")
def test_the_peak_is_what_was_held_since_it_was_forgotten():
    growth.forget_peak()
    before = growth.peak_mb()
    held = torch.ones(50_000_000)  # 200 MB
    del held
    assert growth.peak_mb() - before == pytest.approx(200, abs=20)
    growth.forget_peak()
    assert growth.peak_mb() < before + 20


LEAST = dict(arms=2, images=2, samples=8, render_size=16, grid_size=16, mesh_faces=500)


def test_every_row_of_the_growth_bench_runs(monkeypatch):
    """Small, and each in more time than nothing; the first through the report, in a process of its own."""
    monkeypatch.setattr(growth, "STEPS", {"image": 1, "3d": 1})
    for each in growth.ROWS[1:]:
        found = growth.measured(each._replace(sizes=(LEAST[each.quantity],)), "cpu", rounds=1)
        assert len(found.seconds) == 1 and found.seconds[0] > 0
    *_, titles, _, line = growth.report("cpu", 1, [growth.ROWS[0]._replace(sizes=(2, 3))])
    cells = dict(zip(titles.strip("| ").split(" | "), line.strip("| ").split(" | "), strict=True))
    assert (cells["quantity"], cells["sizes"], cells["of its work"]) == ("steps", "2, 3", "1")
    assert cells["no faster than its work"] in ("yes", "NO")


def test_the_bytes_that_are_made_and_let_go_are_counted():
    given = torch.ones(1000)

    def work() -> torch.Tensor:
        x = (given * 2 + 1).view(10, 100)  # two of 4,000 bytes, one of them let go of; a view is none
        return x + x

    assert memory.peak_gb(work) == pytest.approx(8e-6)
    assert memory.peak_gb(lambda: given.view(10, 100) + 1) == pytest.approx(8e-6)
    assert memory.peak_gb(lambda: given.view(10, 100) + 1, [given]) == pytest.approx(4e-6)
    kept = lambda x: memory.gradient(lambda y: y.exp().exp(), x)  # noqa: E731
    assert memory.peak_gb(lambda: kept(given), [given]) > memory.peak_gb(lambda: given.exp().exp(), [given])


def test_attention_is_counted_without_its_matrix():
    q = torch.empty(1, 2, 1024, 8, device="meta", dtype=torch.float16)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert memory.peak_gb(lambda: attend(q, q, q), [q]) < 2 * 1024 * 1024 * 2 / 1e9


def test_the_weights_are_those_of_the_published_files():
    models = gpu.Models(gpu.random_prior("image", "meta", tiny=False), gpu.random_reward("meta", tiny=False), None)
    expected = {
        "UNet": 2 * 859_520_964, "VAE": 2 * 83_653_863, "text encoder": 2 * 123_060_480,
        "reward's image tower": 4 * 632_076_800, "reward's text tower": 4 * (986_109_441 - 632_076_800 - 1),
    }  # fmt: skip
    assert memory.weights_gb(models) == pytest.approx({name: size / 1e9 for name, size in expected.items()})


def test_the_memory_bench_says_what_fits(monkeypatch):
    titles, _, *lines = memory.report(tiny=True)
    assert len(lines) == len(memory.CASES)
    for line, title in zip(lines, memory.CASES, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == title and len(cells) == titles.count("|") - 1
        assert float(cells[3]) >= float(cells[4]) >= memory.CUDA_GB and cells[5].endswith("GB: yes")
    monkeypatch.setattr(memory, "CUDA_GB", 8.0)
    monkeypatch.setattr(memory, "CASES", dict(list(memory.CASES.items())[:1]))
    *_, line = memory.report(tiny=True)
    assert line.endswith("| 8 GB: no |")

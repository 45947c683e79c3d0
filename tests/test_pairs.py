"""What the reward saw: which of a pair is kept, when, and how the sheet and the page show it."""

from __future__ import annotations

import json
import math
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from psd.config import RunConfig
from psd.contracts import Pair
from psd.pairs import MOMENTS, Pairs, chosen
from psd.record import read
from psd.run import generate
from psd.score import BoundScore
from psd.ui.strip import strips
from tests.gaussian import PlainReward


def pictures(*levels: float, views: int = 1) -> torch.Tensor:
    """A noise a level, all views of it of that grey."""
    return torch.tensor(levels).view(-1, 1, 1, 1, 1).expand(-1, views, 3, 8, 8)


def arm(pair: Pair | None, cameras: object = None) -> SimpleNamespace:
    return SimpleNamespace(score=SimpleNamespace(pair=pair, cameras=cameras))


def test_best_and_worst_are_chosen_view_by_view():
    scores = torch.tensor([[1.0, 5.0], [3.0, 4.0], [2.0, 9.0]])
    images, told = chosen(Pair(pictures(0.1, 0.5, 0.9, views=2), scores), 2)
    assert told.tolist() == [[3.0, 9.0], [1.0, 4.0]]
    assert images[:, :, 0, 0, 0].flatten().tolist() == pytest.approx([0.5, 0.9, 0.1, 0.5])


@pytest.mark.parametrize("scores", [(1.0, 1.0), (1.0, math.nan), (1.0, -math.inf), (math.nan, math.nan)])
def test_ties_go_to_the_first_and_what_has_no_score_loses(scores: tuple[float, float]):
    images, _ = chosen(Pair(pictures(0.25, 0.75), torch.tensor(scores).view(2, 1)), 1)
    assert images[:, 0, 0, 0, 0].tolist() == [0.25, 0.75]


def test_a_moment_keeps_its_first_pair_and_takes_every_pair_away():
    pairs, pair = Pairs(steps=4 * MOMENTS), Pair(pictures(0.2, 0.8), torch.tensor([[0.0], [1.0]]))
    for step in range(1, 4 * MOMENTS + 1):
        ranks = arm(pair if step % 3 == 0 else None)
        pairs.look(step, {"with": ranks, "without": arm(None)})
        assert ranks.score.pair is None
    steps = [moment.step for moment in pairs.arms["with"].values()]
    assert list(pairs.arms) == ["with"] and len(steps) == MOMENTS
    assert all(step % 3 == 0 and step - 1 - 4 * k in range(4) for k, step in enumerate(steps))


@pytest.mark.parametrize(("cameras", "rows"), [(None, 2), (object(), 8)])
def test_the_sheet_has_a_column_a_moment_and_a_row_a_view(tmp_path: Path, cameras: object, rows: int):
    """Of a batch of pictures the first alone; large ones as tiles."""
    pairs = Pairs(steps=2)
    for step, grey in ((1, 0.0), (2, 0.25)):
        images = pictures(grey, grey + 0.5, views=6).repeat_interleave(32, -1).repeat_interleave(32, -2)
        pairs.look(step, {"with": arm(Pair(images, torch.tensor([[0.0], [1.0]]).expand(2, 6)), cameras)})
    told = pairs.write("with", tmp_path / "sheet.webp", {})
    sheet = np.asarray(Image.open(tmp_path / "sheet.webp"), float) / 255
    assert sheet.shape == (128 * rows, 256, 3)
    assert told["steps"] == [1, 2] and told["views"] == rows // 2
    assert told["scores"] == 2 * [[rows // 2 * [1.0], rows // 2 * [0.0]]]
    tiles = sheet.reshape(2, -1, 2, 128, 3).mean((1, 3, 4))  # [better or worse, moment]
    assert tiles.round(2).tolist() == [[0.5, 0.75], [0.0, 0.25]]


def test_only_what_was_ranked_is_kept():
    score = BoundScore(lambda x: x, PlainReward(lambda images, prompts: images.mean((1, 2, 3))), ["x"])
    x_0 = torch.rand(2, 1, 3, 4, 4, requires_grad=True)
    score(x_0[:1])
    assert score.pair is None
    scores = score(x_0)
    assert scores.requires_grad and not score.pair.images.requires_grad and not score.pair.scores.requires_grad
    assert torch.equal(score.pair.scores, scores)


def test_a_run_keeps_what_its_reward_saw(tmp_path: Path):
    """The sheet's better one has the score that the step noted; the page tells the same, and escapes it."""
    config = RunConfig.from_preset(
        prompt="a lamp", steps=5, arms="with, without, selection", negative_lr=0.0, pref_interval=1
    )
    *_, last = generate(config, tmp_path)
    result = read(last.directory)
    assert [name for name, each in result.arms.items() if "pairs" in each.files] == ["with", "selection"]
    noted = {int(row["step"]): row["reward_winner_selection"] for row in result.rows if row["step"] > 1}
    told = result.arms["selection"].remarks["pairs"]
    assert told["steps"] == [2, 3, 4, 5]
    assert [scores[0][0] for scores in told["scores"]] == pytest.approx(list(noted.values()), rel=1e-4)
    html = strips(result)
    moments = [json.loads(unescape(part.partition("'")[0])) for part in html.split("data-moments='")[1:]]
    assert [len(each) for each in moments] == [4, 4]
    assert moments[1][0]["scores"][0] == f"{told['scores'][0][0][0]:.3f}"
    assert max(int(width[:-1]) for each in moments[0] for width in each["terms"]) == 100

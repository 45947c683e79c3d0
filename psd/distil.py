"""The loop of every mode: draw, observe, ask together, apply, learn. All arms in lockstep on the same random numbers.

A method's step is a generator that yields what it asks of the prior (psd.contracts.Ask); all arms' open questions of a
round are answered together. Knows nothing of what x_c is, of files, clocks or prompts' words.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from psd.contracts import Answer, Ask, Now, Prior, Stage
from psd.schedule import NoiseSchedule


class State(NamedTuple):
    """What a step came to; x_c itself is the stage's."""

    step: int  # 1-based
    t: int
    terms: dict[str, dict[str, Float[Tensor, " B"]]]  # arm -> Guided.terms
    failure: str = ""  # how it broke down and what to change, one sentence; the last state then


def distil(prior: Prior, stage: Stage) -> Iterator[State]:
    """Run every arm through the stage's steps; yields after each of them, and ends early at a failure.

    In image mode the start, x_0_hat of pure noise, is the first step.
    """
    schedule = NoiseSchedule(prior.alphas_cumprod)
    t = together(prior, {"": stage.start()})[""]
    opened = t is not None
    if opened:
        yield State(1, t, {name: {} for name in stage.arms})

    for step in range(stage.steps):
        drawn = stage.draw(step)
        alpha_t, sigma_t = schedule.alpha_t(drawn.t), schedule.sigma_t(drawn.t)
        observed, steps = stage.observe(drawn), {}
        for name, x_c in observed.x_c.items():
            method = stage.arms[name].method
            noise = stage.noises(drawn, name, method.noises(step))
            steps[name] = method.step(
                Now(step, drawn.share, drawn.t, alpha_t, sigma_t, drawn.cameras, x_c.detach(), noise, drawn.poses)
            )
        guided = together(prior, steps, drawn.t, drawn.poses)
        number = step + 1 + opened
        failure = stage.apply(drawn, observed, guided)
        del observed  # with its graph, before a method learns
        if not failure:
            for each in guided.values():
                if each.learn is not None:
                    each.learn()
        terms = {name: each.terms for name, each in guided.items()}
        yield State(number, drawn.t, terms, failure and f"Stopped at step {number}: {failure}")
        if failure:
            return


@torch.no_grad()
def together(
    prior: Prior,
    steps: dict[str, Generator[Ask, Answer, Any]],
    t: int | None = None,
    poses: Float[Tensor, "B 16"] | None = None,
) -> dict[str, Any]:
    """What every generator returns. Each round sends all their open asks to the prior at once."""
    returned: dict[str, Any] = {}
    answers: dict[str, Answer | None] = dict.fromkeys(steps)
    while answers:
        asks = {}
        for name, answer in answers.items():
            try:
                asks[name] = steps[name].send(answer)
            except StopIteration as end:
                returned[name] = end.value
        answers = answered(prior, asks, t, poses)
    return {name: returned[name] for name in steps}


def answered(
    prior: Prior, asks: dict[str, Ask], t: int | None, poses: Float[Tensor, "B 16"] | None
) -> dict[str, Answer]:
    """eps-hat of every ask, rows ordered (ask, condition, noise, sample).

    All rows go through the prior in one forward, or where they are kept `apart` each ask in one of its own.
    """
    answers: dict[str, Answer] = {}
    for names in [[name] for name in asks] if apart(prior) else [list(asks)] if asks else []:
        x_t, ts, conds, cameras = [], [], [], []
        for ask in (asks[name] for name in names):
            noises, samples = ask.x_t.shape[:2]
            for cond in ask.conds:
                x_t.append(ask.x_t.flatten(0, 1))
                conds.append(cond.expand(samples, -1, -1).repeat(noises, 1, 1))
                ts += [t if ask.t is None else ask.t] * len(x_t[-1])
                if (seen_from := poses if ask.poses is None else ask.poses) is not None:
                    cameras.append(seen_from.repeat(noises, 1))
        at = ts[0] if len(set(ts)) == 1 else torch.tensor(ts, device=prior.device)
        eps = prior.eps(torch.cat(x_t), at, torch.cat(conds), torch.cat(cameras) if cameras else None)
        rows = iter(eps.split([len(each) for each in x_t]))
        for name in names:
            answers[name] = tuple(next(rows).view_as(asks[name].x_t) for _ in asks[name].conds)
    return answers


def apart(prior: Prior) -> bool:
    """Whether every arm has forwards of its own: on a CPU.

    There a row's last bits depend on the size of its batch, and an arm's picture must not depend on its neighbours. A
    batch gains next to nothing (4 + 2 rows of toybox/sd take 1.06 times as long as 6, 16 + 8 of toybox/mvdream as long
    as 24).
    """
    return prior.device.type == "cpu"

"""Rows of a batch that do not fit into memory together go through a network in parts; modules wait elsewhere.

The rows know nothing of each other, so that parts bound memory and change no result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from psd.errors import is_out_of_memory


class InParts:
    """network(rows) of all rows, in as many parts of whole groups as memory allows.

    Where memory runs out it is tried with half as many rows, from then on. What keeps a gradient is not cut any
    further: the graph of the parts would take the same memory.
    """

    def __init__(self, rows_at_once: int = 2**31) -> None:
        self.rows_at_once = rows_at_once

    def __call__(self, network: Callable[[slice], Float[Tensor, "b ..."]], rows: int, group: int = 1) -> Tensor:
        while True:
            part = min(self.rows_at_once, rows)
            try:
                return torch.cat([network(slice(start, start + part)) for start in range(0, rows, part)])
            except (RuntimeError, MemoryError) as error:
                if torch.is_grad_enabled() or part <= group or not is_out_of_memory(error):
                    raise
            self.rows_at_once = max(group, part // 2 // group * group)
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


@contextmanager
def visiting(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """`modules` on `device` inside, and then where they were: on the CPU, where a run with `offload` lets them wait."""
    homes = [next(module.parameters()).device for module in modules]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module, home in zip(modules, homes):
            module.to(home)

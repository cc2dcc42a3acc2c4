"""Randomness that resumes, differs by rank, and is replayed when activation checkpointing recomputes."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from debias.errors import DebiasError
from debias.ops.distributed import global_rank

__all__ = ["StepRandom", "undisturbed"]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Afterwards random numbers of Python, NumPy and PyTorch on the CPU go on as if nothing had been drawn."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


class StepRandom:
    """Draws of one method, a function of (seed, name, micro-batch, rank) alone: there is no state to save.

    Args:
        seed: the method's seed.
        name: the instance's name, so that two instances draw differently.

    Attributes:
        replaying: whether the forward pass of this micro-batch has ended.
    """

    def __init__(self, seed: int, name: str) -> None:
        self.seed = seed
        self.name = name
        self._draws: dict[str, list[Any]] = {}
        self._counter = 0
        self.replaying = False

    def start(self, counter: int) -> None:
        """Begin a micro-batch: forget the draws of the last one."""
        self._counter = counter
        self._draws.clear()
        self.replaying = False

    def end_forward(self) -> None:
        """From now until the next :meth:`start`, layers are recomputed and must see the draws they saw."""
        self.replaying = True

    def generator(self, device: torch.device, place: str = "", *, shared: bool = False) -> torch.Generator:
        """A generator for this micro-batch.

        Args:
            device: where the numbers are needed.
            place: names the draw, e.g. the layer, so that draws do not repeat.
            shared: for decisions that all ranks take alike.
        """
        key = f"{self.seed}/{self.name}/{place}/{self._counter}/{'all' if shared else global_rank()}"
        low, high = zlib.crc32(key.encode()), zlib.crc32(key.encode()[::-1])
        return torch.Generator(device=device).manual_seed((high << 31) ^ low)

    @torch.compiler.disable  # inside a compiled layer draws are made, kept and replayed outside its graph
    def draw(
        self, place: str, device: torch.device, sample: Callable[[torch.Generator], Any], *, shared: bool = False
    ) -> Any:
        """``sample(generator)``, or in a recomputation what it returned the first time.

        Raises:
            DebiasError: a layer that ran several times in one step is recomputed; which draw belongs to which run
                cannot be told.
        """
        drawn = self._draws.setdefault(place, [])
        if self.replaying and drawn:
            if len(drawn) > 1:
                raise DebiasError(
                    f"Expected {place!r} to run once in a step with activation checkpointing, but it ran {len(drawn)}"
                    " times. Choose a layer outside the checkpointed part, or one that runs once."
                )
            return drawn[0]
        drawn.append(sample(self.generator(device, f"{place}#{len(drawn)}", shared=shared)))
        return drawn[-1]

    def chance(self, place: str) -> float:
        """A number in [0, 1) for a decision that all ranks take alike; on the host, so that nothing waits for it."""

        def sample(generator: torch.Generator) -> float:
            return random.Random(generator.initial_seed()).random()

        return self.draw(f"{place}?", torch.device("cpu"), sample, shared=True)

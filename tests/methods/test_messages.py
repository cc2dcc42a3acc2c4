"""How many messages a step sends over two ranks: a penalty that sends more than it did waits more often."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from _support import runs
from _support.fits import Classifier, loader, make_trainer, val_loader
from debias import CORAL, IRM, MMD, Debiaser, Fishr, GroupDRO, HessianAlignment, VREx

SENDS = ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor")


def _messages(rank: int, methods: list[tuple[type[Debiaser], dict[str, Any]]]) -> int:
    """Messages of a step, forward and backward, without those of DDP itself."""
    seen: list[str] = []

    def counted(name: str) -> Any:
        plain = getattr(torch.distributed, name)

        def send(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return plain(*args, **kwargs)

        return mock.patch.object(torch.distributed, name, send)

    class Counts(Classifier):
        """The second step: the first one finds out what the step does."""

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            seen.clear()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.found = len(seen)

    callbacks = [method("place", 3, name=str(i), **options) for i, (method, options) in enumerate(methods)]
    options = {"devices": 2, "strategy": runs.ddp(), "use_distributed_sampler": False, "max_epochs": 1}
    trainer = make_trainer(callbacks, limit_train_batches=2, log_every_n_steps=100, **options)
    model = Counts()
    patches = [counted(name) for name in SENDS]
    for patch in patches:
        patch.start()
    try:
        trainer.fit(model, loader(sizes=(5, 11), last=(2, 5), rank=rank), val_loader())
    finally:
        for patch in patches:
            patch.stop()
    return model.found


FIVE = [(VREx, {}), (IRM, {}), (Fishr, {}), (HessianAlignment, {}), (CORAL, {})]
MESSAGES = {
    # Beside what follows: one for the loss itself, and one for sums by domain, which all penalties of a loss share.
    "GroupDRO": ([(GroupDRO, {})], 1),
    "V-REx": ([(VREx, {})], 2),
    "V-REx twice": ([(VREx, {}), (VREx, {"penalty_weight": 2.0})], 2),
    "IRM": ([(IRM, {})], 4),  # how many samples the ranks before hold, and sums by halves
    "IRM squared": ([(IRM, {"form": "squared"})], 3),
    "Fishr": ([(Fishr, {})], 3),
    "HGP": ([(HessianAlignment, {})], 5),  # gradients forward and backward, products
    "diagonal": ([(HessianAlignment, {"statistic": "diagonal"})], 3),
    "frobenius": ([(HessianAlignment, {"statistic": "frobenius"})], 3),
    "hutchinson": ([(HessianAlignment, {"statistic": "hutchinson", "n_samples": 3})], 4),
    "autograd": ([(HessianAlignment, {"derivatives": "autograd"})], 5),
    "CORAL": ([(CORAL, {})], 4),  # means, then covariances around them
    "MMD": ([(MMD, {})], 4),  # numbers of rows, then the rows
    "five": (FIVE, 10),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_of_a_step(ranks: Any, name: str) -> None:
    methods, expected = MESSAGES[name]
    assert ranks.run(_messages, methods) == [expected, expected]

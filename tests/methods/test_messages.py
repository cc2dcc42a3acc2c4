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


def _messages(rank: int, methods: list[tuple[type[Debiaser], dict[str, Any]]]) -> float:
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


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ([(GroupDRO, {})], 1),
        ([(VREx, {})], 5),
        ([(IRM, {})], 2),
        ([(IRM, {"form": "squared"})], 2),
        ([(Fishr, {})], 2),
        ([(HessianAlignment, {})], 7),
        ([(HessianAlignment, {"statistic": "diagonal"})], 7),
        ([(HessianAlignment, {"statistic": "frobenius"})], 7),
        ([(HessianAlignment, {"statistic": "hutchinson", "n_samples": 3})], 7),
        ([(CORAL, {})], 7),
        ([(MMD, {})], 7),
        (FIVE, 17),
    ],
    ids=lambda x: "-".join(m.__name__ + "".join(f"-{v}" for v in o.values()) for m, o in x) if isinstance(x, list) else "",
)  # fmt: skip
def test_messages_of_a_step(ranks: Any, methods: list[tuple[type[Debiaser], dict[str, Any]]], expected: int) -> None:
    assert ranks.run(_messages, methods) == [expected, expected]

"""Whole runs, importable by the processes of :class:`_support.ranks.Ranks`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from _support.cases import build
from _support.fits import Classifier, Manual, loader, make_trainer, parameters, val_loader
from debias import GroupMonitor


def ddp(**options: Any) -> DDPStrategy:
    """The strategy of tests with several processes."""
    return DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60), **options)


def fit(
    rank: int,
    name: str | None,
    sizes: tuple[int, ...] = (16,),
    last: tuple[int, ...] = (7,),
    *,
    optimizer: str = "sgd",
    strategy: dict[str, Any] | None = None,
    method: dict[str, Any] | None = None,
    tags: dict[str, Any] | None = None,
    module: str = "classifier",
    poison: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train on 39 rows with global batches of 16, in ``len(sizes)`` processes; parameters, method state, metrics."""
    callbacks = build(name, **(method or {}))
    modules = {"classifier": Classifier, "manual": Manual, "skipping": Skipping, "unused": Unused}
    model = modules[module](optimizer=optimizer)
    if len(sizes) > 1:
        options |= {"devices": len(sizes), "strategy": ddp(**(strategy or {})), "use_distributed_sampler": False}
    monitor = GroupMonitor("place", 3)
    trainer = make_trainer([*callbacks, monitor], **options)
    batches = loader(sizes=sizes, last=last, rank=rank, **(tags or {}))
    if poison is not None:
        batches.dataset.dataset.tensors[0][poison] = torch.nan
    trainer.fit(model, batches, val_loader())
    return {
        "parameters": parameters(model),
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "methods": [callback.state_dict() for callback in callbacks],
        "metrics": {k: v.clone() for k, v in trainer.callback_metrics.items() if "group" in k or "accuracy" in k},
    }


class Skipping(Classifier):
    """Skips a batch on one rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 and self.global_rank == 1 else loss


class Unused(Classifier):
    """Has a layer that no step uses."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.spare = torch.nn.Linear(2, 2).double()

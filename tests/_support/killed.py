"""A training run that is killed again and again: ``python -m _support.killed FOLDER LAUNCHER METHOD``.

A method ``InferGroups`` is that with ``GroupDRO`` on what it infers: two stages.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from _support.cases import build
from _support.fits import Classifier, make_trainer, parameters, problem, tagged, val_loader
from debias import GroupDRO, GroupMonitor, InferGroups
from debias.compare.keeping import Keeper

EPOCHS, ROWS, BATCH = 4, 72, 6
STARTS = {"one process": None, "ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork"}


class Model(Classifier):
    """Makes its loaders where it trains; drops units, so that generators matter."""

    def __init__(self) -> None:
        super().__init__(optimizer="adam")
        self.backbone.append(torch.nn.Dropout(0.3))

    def train_dataloader(self) -> Any:
        return DataLoader(tagged(problem(ROWS)), BATCH, shuffle=True)

    def val_dataloader(self) -> Any:
        return val_loader()


class Tell(Callback):
    """Says each step to whoever wants to kill it, and leaves the end in a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            with (self.folder / "steps").open("a") as file:
                file.write(".")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero and trainer.current_epoch >= EPOCHS:
            states = [c.state_dict() for c in trainer.callbacks if not isinstance(c, Keeper | Tell)]
            torch.save([parameters(pl_module), states], self.folder / "draft.pt")
            (self.folder / "draft.pt").replace(self.folder / "end.pt")


def main(folder: Path, launcher: str, method: str) -> None:
    """Train, from the last checkpoint where there is one."""
    warnings.simplefilter("ignore")
    seed_everything(0)
    keeper, options = Keeper(folder, every=0.0), {}
    if STARTS[launcher]:
        strategy: Any = DDPStrategy(process_group_backend="gloo", start_method=STARTS[launcher])  # type: ignore[arg-type]
        options = {"devices": 2, "strategy": strategy}
    two_stages = [InferGroups("errors", 2), GroupDRO("inferred", 2, step_size=0.1)]
    methods = two_stages if method == "InferGroups" else build(method)
    callbacks = [*methods, GroupMonitor("place", 3), Tell(folder), keeper]
    trainer = make_trainer(callbacks, max_epochs=EPOCHS, enable_checkpointing=True, **options)
    trainer.fit(Model(), ckpt_path=keeper.last if keeper.last.exists() else None, weights_only=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])

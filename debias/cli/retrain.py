"""``debias retrain``: refit the last layer of a checkpoint on held-out samples, and write a new checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LightningArgumentParser

from debias.cli.errors import readable_errors
from debias.cli.training import DebiasCLI, refuse_bad_checkpoint
from debias.errors import DebiasError
from debias.methods.last_layer_retraining import retrain_last_layer

__all__ = ["retrain"]

_SKIPPED: set[str | int] = {"module", "loader", "transfer"}


def retrain(args: Sequence[str]) -> None:
    """Parse ``args``, build the model and data that they name, refit, and write the checkpoint.

    Args:
        args: the words after ``debias retrain``.
    """
    with readable_errors():
        RetrainCLI("retrain", args).run_stage()


class RetrainCLI(DebiasCLI):
    """The configuration of a training, with the arguments of :func:`debias.retrain_last_layer`."""

    def add_stage_arguments(self, parser: LightningArgumentParser) -> list[str]:
        """Add ``--ckpt_path``, ``--output``, ``--on`` and the arguments of the refit."""
        parser.add_argument("--ckpt_path", type=str, required=True, help="the checkpoint to repair")
        parser.add_argument("--output", type=str | None, default=None, help="by default <ckpt_path>.retrained.ckpt")
        parser.add_argument("--on", type=Literal["val", "train"], default="val", help="the set to refit on")
        # The saved config of a training holds it.
        parser.add_argument("--weights_only", type=bool | None, default=None, help="False: unpickle all of it")
        return parser.add_function_arguments(retrain_last_layer, "retrain", skip=_SKIPPED)

    def run_stage(self) -> None:
        """Refit, write the checkpoint and say where it lies."""
        path = Path(self.config_init["ckpt_path"])
        safe = self.config_init["weights_only"] is not False
        refuse_bad_checkpoint(path, safe)
        options = dict(self.config_init["retrain"])
        checkpoint = torch.load(path, map_location="cpu", weights_only=safe)
        self.model.load_state_dict(checkpoint["state_dict"])
        data: Any = self.datamodule
        if data is None:
            raise DebiasError(
                "Expected `data` to name the data module of the held-out set, but got none. Add the base file,"
                " `--config recipes/<name>/base.yaml`, or `--data <class>`."
            )
        data.prepare_data()
        data.setup("fit")
        loader = data.val_dataloader() if self.config_init["on"] == "val" else data.train_dataloader()
        while isinstance(loader, list | tuple):
            loader = loader[0]
        self.model.to(self.trainer.strategy.root_device)
        fit = retrain_last_layer(self.model, loader, **options)
        checkpoint["state_dict"] = {name: value.cpu() for name, value in self.model.state_dict().items()}
        output = Path(self.config_init["output"] or path.with_suffix(".retrained.ckpt"))
        torch.save(checkpoint, output)
        chosen = "" if fit.strength is None else f", strength {fit.strength:g}"
        print(f"Refitted `{fit.head}` on {fit.n_samples} samples ({fit.method}{chosen}): {output}")

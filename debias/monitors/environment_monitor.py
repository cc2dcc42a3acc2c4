"""Accuracy by environments that a plainly trained network infers, to choose a checkpoint without group labels.

EVaLS (Ghaznavi et al., arXiv 2410.05345) splits each class of the validation set by what an ordinary network makes of
it, and chooses by the worst part. Split as EIIL does (Creager et al., ICML 2021), by the sign of the derivative of a
sample's loss by a factor on its logits, which of two classes parts right from wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from debias.errors import BatchKeyError, DebiasError
from debias.monitors.group_monitor import GroupMonitor
from debias.monitors.scored import logits_of
from debias.ops.arguments import check_count, checked
from debias.ops.group_inference import eiil_groups, error_groups
from debias.step.batch import BatchKey, describe, input_of
from debias.step.context import Step
from debias.step.reference import second_network
from debias.tap.calls import LossCall

__all__ = ["EnvironmentMonitor"]


class EnvironmentMonitor(GroupMonitor):
    """Log the accuracy of each class where a plainly trained network is right, and where it is wrong.

    Names are those of :class:`GroupMonitor`: ``val/inferred/worst_group_accuracy``, which ``debias compare --select
    val_worst_inferred`` chooses by. A part without a sample is NaN and does not count: where the reference errs in no
    sample of the validation set, this is the worst class.

    Costs a further forward pass of every validation and test batch, and the memory of a second network.

    Args:
        reference: checkpoint of an ordinary run of the same module, with the same validation set; better one that
            leans on the shortcut than one that is too good.
        n_classes: number of classes; 2 for one binary output.
        method: ``"eiil"``, or ``"errors"``: right and wrong, also of more than two classes.
        input: where the network's input is in the batch, of which its ``forward`` makes the logits; or a callable of
            the batch that returns it: a tuple of several arguments, or a dictionary of them by name.
        target: where the target is, class ids ``(N,)``; negative ones belong to no part.
        loss, threshold, name, allow_untested_strategy: see :class:`GroupMonitor`.

    Raises:
        DebiasError: before training: the checkpoint cannot be read, or is of another network.
    """

    reference: ClassVar[str] = "Ghaznavi et al., 2024, arXiv 2410.05345 (EVaLS)"

    @checked()
    def __init__(
        self,
        reference: str,
        n_classes: int,
        *,
        method: Literal["eiil", "errors"] = "eiil",
        input: BatchKey = 0,
        target: BatchKey = 1,
        loss: int | Callable[[LossCall], bool] | None = None,
        threshold: float | None = None,
        name: str | None = "inferred",
        allow_untested_strategy: bool = False,
    ) -> None:
        if method not in ("eiil", "errors"):
            raise DebiasError(f"Expected `method` to be 'eiil' or 'errors', but got {method!r}.")
        self.n_classes = check_count("n_classes", n_classes, 2)
        super().__init__(
            f"{name} by the reference",  # no tag of the user's, nor of another of these
            2 * n_classes,
            group_names=[f"class {c} {side}" for c in range(n_classes) for side in ("easy", "hard")],
            loss=loss,
            threshold=threshold,
            name=name,
            allow_untested_strategy=allow_untested_strategy,
        )
        self.checkpoint = reference
        self.method = method
        self.input, self.target_key = input, target
        self._network: Any = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Load the reference before anything is trained."""
        self._load(pl_module)

    def _start(self, trainer: Any, pl_module: Any, loaders: list[Any]) -> None:
        super()._start(trainer, pl_module, loaders)
        self._load(pl_module)
        self._network = trainer.precision_plugin.convert_module(self._network.to(pl_module.device))

    def _load(self, pl_module: Any) -> None:
        if self._network is None:
            self._network = second_network(pl_module, self.checkpoint, "reference").eval()

    def begin(self, step: Step) -> None:
        """Ask the reference."""
        target = torch.as_tensor(step.read(self.target_key, argument="target")).to(step.module.device)
        with torch.no_grad(), step.trainer.precision_plugin.val_step_context():
            args, kwargs = input_of(self._network, step.batch, self.input, step.tags)
            output = type(self._network).forward(self._network, *args, **kwargs)
        logits = logits_of(output)
        if not isinstance(logits, Tensor):
            raise BatchKeyError(
                f"Expected the module's forward to return logits for {self.state_key}, but got {describe(output)}."
            )
        groups = eiil_groups if self.method == "eiil" else error_groups
        known = target >= 0
        ids = groups(logits, torch.where(known, target, 0), per_class=True).to(target.device)
        step.tags[self.group] = torch.where(known, ids, -1)
        super().begin(step)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the reference."""
        self._network = None
        super().teardown(trainer, pl_module, stage)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_network": None}

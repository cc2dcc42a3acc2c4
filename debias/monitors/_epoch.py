"""What monitors share that collect while validating or testing and log at the end of the epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from debias.errors import DebiasError
from debias.step.ids import names_in_data
from debias.step.indices import evaluation_sets
from debias.step.loggers import safe_names
from debias.step.watcher import MAX_LOGGED_GROUPS, StepWatcher

__all__ = ["EpochMonitor", "by_group"]


class EpochMonitor(StepWatcher):
    """A monitor that starts afresh in every validation and test epoch, and logs at its end.

    A subclass forgets the last epoch in :meth:`_start`, collects in :meth:`observe`, and returns from :meth:`_values`
    what there is to log, which is called ``<stage>/<name>/<value>``, of several loaders with
    ``/dataloader_idx_<i>`` behind. The sanity check is skipped.
    """

    monitors: ClassVar[bool] = True
    # What is always logged, as it is called behind the prefix: two monitors with one of them in common are refused.
    _value_names: Sequence[str] = ()

    def _start(self, trainer: Any, pl_module: Any, loaders: list[Any]) -> None:
        """Make ready for an epoch of these loaders."""
        raise NotImplementedError

    def _values(self, trainer: Any, pl_module: Any, stage: str) -> list[dict[str, Tensor]]:
        """Scalars of each loader, or of all together; the same on every rank."""
        raise NotImplementedError

    def _prefix(self, stage: str) -> str:
        """What comes before the names of the values; ``stage`` is ``"val"`` or ``"test"``."""
        return f"{stage}/{self.name}/" if self.name else f"{stage}/"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the engine, unless another monitor logs under the same names; learn the names of the groups."""
        mine = [self._prefix("val") + value for value in self._value_names]
        for other in trainer.callbacks:
            if isinstance(other, EpochMonitor) and other is not self:
                theirs = {other._prefix("val") + value for value in other._value_names}
                if both := [name for name in mine if name in theirs]:
                    raise DebiasError(
                        f"Expected a different `name` for each monitor that logs the same values, but {self.state_key}"
                        f" and {other.state_key} would both log `{both[0]}`. Pass e.g. `name='second'` to one of them."
                    )
        super().setup(trainer, pl_module, stage)
        given = vars(self)
        for kind in ("group", "domain"):
            if names := given.get(f"{kind}_names"):
                given[f"{kind}_names"] = names_in_data(trainer, given[kind], names, given[f"n_{kind}s"])

    def _in_step(self, module: nn.Module) -> bool:
        """Whether the evaluation step itself calls this module: monitors may run it again when the step has ended."""
        return self.engine is not None and self.engine.in_evaluation_step and not module.training

    def _end(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if trainer.sanity_checking:
            return
        prefix, tables = self._prefix(stage), self._values(trainer, pl_module, stage)
        for i, table in enumerate(tables):
            suffix = f"/dataloader_idx_{i}" if len(tables) > 1 else ""
            values = {f"{prefix}{key}{suffix}": value.float().to(pl_module.device) for key, value in table.items()}
            # Every rank holds the global value already: the maximum over ranks leaves it as it is, to the last bit, and
            # spares the user Lightning's advice to synchronise.
            options = {"reduce_fx": "max", "sync_dist": trainer.world_size > 1, "add_dataloader_idx": False}
            pl_module.log_dict(values, **options)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start afresh."""
        self._start(trainer, pl_module, evaluation_sets(trainer))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log what validation has shown."""
        self._end(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start afresh."""
        self._start(trainer, pl_module, evaluation_sets(trainer))

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log what the test has shown."""
        self._end(trainer, pl_module, "test")


def by_group(values: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Scalars as they are, and ``<key>/<name>`` for each value of a vector ``(G,)``, named as loggers take it.

    Of more than ``MAX_LOGGED_GROUPS`` groups vectors are left out: logging takes about a millisecond a value.
    """
    table: dict[str, Tensor] = {}
    for key, value in values.items():
        if value.ndim == 0:
            table[key] = value
        elif len(names) <= MAX_LOGGED_GROUPS:
            table |= {f"{key}/{name}": part for name, part in zip(safe_names(names), value.unbind(), strict=True)}
    return table

"""The ranks that a metric is of."""

from __future__ import annotations

from typing import Any

from torchmetrics import Metric

from debias.ops.distributed import ranks_group

__all__ = ["RankMetric"]


class RankMetric(Metric):
    """A metric of the ranks that see different samples; see :mod:`debias.ops.distributed`."""

    @property
    def process_group(self) -> Any:  # type: ignore[override]
        """The group that was given, else that of the run."""
        given = vars(self).get("_given_group")
        return ranks_group() if given is None else given

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._given_group = group

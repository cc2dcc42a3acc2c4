"""Which losses are reduced over ranks, and whether all ranks compute the same ones. No Lightning here.

What is reduced has to be the same on all ranks: else they would wait for each other, or add up different losses. So
only losses that a method means are; another loss stays as it is, and may be computed on some ranks only. In the first
step and on logging steps ranks compare what they compute before they reduce it.
"""

from __future__ import annotations

from typing import Any

import torch

from debias.errors import AmbiguousLossError
from debias.ops.distributed import alike, gather_objects, is_distributed
from debias.tap.tap import LossCall

__all__ = ["SharedLosses"]


class SharedLosses:
    """The losses of one step after another that are reduced over ranks.

    Attributes:
        calls: those of the running step, the same on all ranks.
        comparing: whether ranks compare theirs in the running step.
        as_ddp: nothing is reduced any more: there are augmentations only, which mean no loss, and the step computes
            several, or not the same on all ranks.
        only: the one loss that ``loss=None`` means, as its name and how many of that name come before it: losses of
            other kinds may be computed beside it in some steps only, or on some ranks. None while it is not known.
    """

    def __init__(self) -> None:
        self.calls: list[LossCall] = []
        self.comparing = self.as_ddp = False
        self.only: tuple[str, int] | None = None
        self._compared = False
        self._device = torch.device("cpu")
        self._choices: list[Any] = []
        self._first = self._late = self._parted = False

    def start(self, choices: list[Any], device: torch.device, *, first: bool, late: bool, logging: bool) -> None:
        """Begin a step.

        Args:
            choices: ``loss`` of each method that means one.
            device: of the module.
            first: whether ``loss=None`` means the first loss of the step, whatever it is.
            late: whether what is reduced is replaced once the step has ended.
            logging: values logged in this step reach the logger.
        """
        self.calls, self._parted = [], False
        self._choices, self._device, self._first, self._late = choices, device, first, late
        self.comparing = is_distributed() and not self.as_ddp and (logging or not self._compared)

    def settle_on(self, call: LossCall | None) -> None:
        """From now on ``loss=None`` means the loss that stands where this one does; None if there is none."""
        self.only = None if call is None else (call.name, call.ordinal)

    def means(self, choice: Any, call: LossCall) -> bool:
        """Whether ``loss=choice`` means a loss; while that is not known, any may be it."""
        if callable(choice):
            return bool(choice(call))
        if choice == "sum":
            return True
        if isinstance(choice, int) or self._first:
            return call.position == (choice or 0)
        if self.only is not None:
            return (call.name, call.ordinal) == self.only
        # Of one loss that the returned loss depends on, all choices are the same one.
        position = next((c for c in self._choices if isinstance(c, int)), None)
        return position is None or call.position == position

    def take(self, call: LossCall) -> bool:
        """Whether a loss is to be reduced over ranks now.

        Raises:
            AmbiguousLossError: a method means it, and other ranks have come to another one.
        """
        if not any(self.means(choice, call) for choice in self._choices or [None]):
            return False
        if self.comparing:
            if self._parted or not self._together(f"{call.name} {call.reduction}", call):
                return False
        elif self._guessing:
            return False
        self.calls.append(call)
        return True

    def misses(self, only: LossCall) -> bool:
        """Whether the one loss that the returned loss depends on is another than was taken for it."""
        return None in self._choices and not self.means(None, only)

    def passed_over(self, reaching: list[LossCall]) -> bool:
        """Whether the one loss that the returned loss depends on was not reduced, since ranks computed others before it
        and nothing told yet which is meant. Known after :meth:`end`, alike on all ranks.
        """
        parted = self.comparing and self._parted and not self.as_ddp
        return parted and len(reaching) == 1 and reaching[0] not in self.calls

    def end(self, calls: list[LossCall] | None) -> None:
        """Compare once more, after the step.

        Args:
            calls: the losses that the returned loss depends on; None where there is no returned loss.

        Raises:
            AmbiguousLossError: ranks differ in losses that a method means.
        """
        meant = [c for c in calls or () if any(x is None or self.means(x, c) for x in self._choices or [None])]
        taken, self.calls = self.calls, meant if self._late else self.calls
        if not self.comparing:
            return
        self._compared = True
        if not self._parted:
            self._together("", None)
        same = alone = len(meant) == 1 and (self._parted or meant[0] in taken)
        if calls is not None:
            same = alike(f"{alone} {[(call.name, call.reduction) for call in meant]}", self._device)
        if not self._choices:
            self.as_ddp = self._parted if calls is None else not (same and alone)
        elif calls is not None and not same:
            raise self._differ(meant)

    @property
    def _guessing(self) -> bool:
        known = self._first or self.only is not None or any(isinstance(c, int) for c in self._choices)
        return not known and (not self._choices or None in self._choices)

    def _together(self, what: str, call: LossCall | None) -> bool:
        """Whether all ranks have come to the same loss, or the end of the step."""
        if alike(what, self._device):
            return True
        self._parted = True
        if self._choices and not self._guessing:
            raise self._differ(self.calls if call is None else [*self.calls, call])
        return False

    @staticmethod
    def _differ(calls: list[LossCall]) -> AmbiguousLossError:
        found = gather_objects(", ".join(f"`{call.name}`" for call in calls) or "none")
        first = {names: rank for rank, names in reversed(list(enumerate(found)))}
        parts = [f"{names} on rank {rank}" for names, rank in sorted(first.items(), key=lambda item: item[1])]
        return AmbiguousLossError(
            f"Expected all ranks to compute the same losses where a method means them, but got {' and '.join(parts)}:"
            " their sums over ranks would be of different things. Compute them on every rank, with a mask where"
            " samples have no label for one, or choose one that every rank computes: `loss=<index>`, or"
            " `loss=callable(call) -> bool`."
        )

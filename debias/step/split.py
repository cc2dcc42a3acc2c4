"""Losses that exist only per batch, such as a detector's: the user's step is run once per group, or once per sample.

The one place with a Python loop over groups or samples. The forward passes are separate: BatchNorm in training mode
sees one group at a time, which differs from one pass over the whole batch (freeze it, as detectors do).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from debias.errors import LossNotFoundError, RowsError
from debias.step.batch import map_samples
from debias.step.context import Step
from debias.step.contract import Method
from debias.tap.calls import LossCall

__all__ = ["split_losses", "take_samples"]


def split_losses(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], step: Step, reweigher: Method
) -> tuple[Tensor, Any]:
    """Run the step on the samples of each group, or on each sample, and combine the losses.

    Returns:
        The debiased loss and the last output of the step.
    """
    ids = reweigher.sample_ids(step)
    n = ids.shape[0]
    if reweigher.losses == "image":
        passes = [[i] for i in range(n)]
    elif ids.ndim == 1:
        numbers = ids.tolist()
        passes = [[i for i in range(n) if numbers[i] == group] for group in sorted(set(numbers))]
    else:
        raise RowsError(
            f"Expected `losses='split'` to get one group id per sample, but got a membership of shape"
            f" {tuple(ids.shape)}: a sample cannot be in two passes. Give ids of shape (N,)."
        )
    nums, dens, firsts, output = [], [], [], None
    for members in passes:
        part = take_samples(step.batch, members, n)
        output = (
            original(part, *args[1:], **kwargs) if args else original(*args, **{**kwargs, next(iter(kwargs)): part})
        )
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise LossNotFoundError(
                f"Expected the training step to return a loss every time with `losses={reweigher.losses!r}`, but got"
                f" {loss!r}. Return a loss of zero instead of skipping."
            )
        nums.append(
            loss.float() * len(members) if loss.dtype in (torch.float16, torch.bfloat16) else loss * len(members)
        )
        dens.append(float(len(members)))
        firsts.append(members[0])
    num = torch.stack(nums)
    den = torch.tensor(dens, dtype=num.dtype, device=num.device)
    rows = torch.tensor(firsts, device=num.device)
    call = LossCall.of("training_step", num, den, rows)
    return reweigher.reweigh([call], step)[0], output


def take_samples(batch: Any, members: list[int], n: int) -> Any:
    """The same batch with only some of its samples; see :func:`debias.step.batch.map_samples`."""
    return map_samples(
        batch, n, lambda x: x[torch.tensor(members, device=x.device)], lambda items: [items[i] for i in members]
    )

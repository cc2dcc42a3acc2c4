"""Losses that exist only per batch, such as a detector's: the user's step is run once per group, or once per sample.

The one place with a Python loop over groups or samples. The step runs on the whole batch first, as in plain training:
that is what it logs, what metrics see, what modules keep of it, and what it returns beside the loss. Then it runs on
each part for the part's loss, where BatchNorm has the statistics of the whole batch, and modules hold what they held
before the step. Every step waits for the device once, for the ids that say which parts there are; the first one of an
epoch and logging steps also for the values of parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from debias.errors import LossNotFoundError, RowsError
from debias.step.batch import map_samples
from debias.step.context import Step
from debias.step.kept import Kept
from debias.step.proxy import attach, detach
from debias.step.settle import loss_of, with_loss
from debias.step.statistics import BatchStatistics
from debias.tap.calls import LossCall

if TYPE_CHECKING:
    from debias.step.watcher import Debiaser

__all__ = ["split_losses", "take_samples"]


def split_losses(run: Callable[[Any], Any], step: Step, reweigher: Debiaser) -> Any:
    """Run the user's step, a function of the batch, on each group's samples or on each sample; combine the losses.

    Returns:
        What the step returned for the whole batch, with the debiased loss.

    Raises:
        RowsError: a part of the batch cannot be cut into samples.
        LossNotFoundError: a pass returns no single number.
        UnsupportedStrategyError: a layer has statistics that a part cannot be given, or the step changes parameters.
    """
    if step.of_several:
        raise RowsError(
            f"Expected one training loader with `losses={reweigher.losses!r}`, which cuts the batch by the samples'"
            " groups, but the batch is of several, and nothing says which of another loader's samples belong to a"
            " group. Use `losses='whole'`, or join the datasets: `ConcatDataset`."
        )
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
    parts = [take_samples(step.batch, members, n) for members in passes]  # before the step may change its batch
    statistics = BatchStatistics(step.module)
    kept = Kept(step.module, reads=step.logging or step.batch_idx == 0)
    with statistics.of_whole():
        output = run(step.batch)
    kept.check_parameters(reweigher.losses)
    losses = []
    for part in parts:
        with kept.put_back(), _apart(step.module), statistics.of_part():
            losses.append(_one_number(run(part), reweigher.losses))
    of_parts = torch.stack(losses)
    sizes = of_parts.new_tensor([len(members) for members in passes])
    rows = torch.tensor([members[0] for members in passes], device=sizes.device)
    call = LossCall.of("training_step", of_parts * sizes, sizes, rows)
    return with_loss(output, reweigher.reweigh([call], step)[0])


def _one_number(output: Any, losses: str) -> Tensor:
    loss = loss_of(output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise LossNotFoundError(
            f"Expected the training step to return one number every time with `losses={losses!r}`, but got {found}."
            " Return a loss of zero instead of skipping."
        )
    loss = loss.reshape(())
    return loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss


@contextmanager
def _apart(module: Any) -> Iterator[None]:
    """While this lasts nothing is logged, and metrics do not ask other ranks, which may have fewer parts."""
    proxies = [attach(module, name, lambda original, args, kwargs: None) for name in ("log", "log_dict")]
    for metric in module.modules():
        if isinstance(metric, Metric):
            metric.distributed_available_fn = lambda: False  # until what modules keep is put back
    try:
        yield
    finally:
        for proxy in proxies:
            detach(proxy)


def take_samples(batch: Any, members: list[int], n: int) -> Any:
    """A batch of copies of only some samples; see :func:`debias.step.batch.map_samples`.

    Raises:
        RowsError: a tensor in it cannot be cut into samples.
    """
    return map_samples(
        batch,
        n,
        lambda x: x[torch.tensor(members, device=x.device)],
        lambda items: copy.deepcopy([items[i] for i in members]),
        whole=False,
    )

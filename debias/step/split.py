"""Losses that exist only per batch, such as a detector's: the user's step is run once per group, or once per sample.

The one place with a Python loop over groups or samples. The forward passes are separate: BatchNorm in training mode
sees one group at a time, which differs from one pass over the whole batch (freeze it, as detectors do). What the step
logs is averaged over the passes, weighted by their samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from debias.errors import DebiasError, LossNotFoundError, RowsError
from debias.step.batch import map_samples
from debias.step.context import Step
from debias.step.proxy import attach, detach
from debias.step.settle import with_loss
from debias.tap.calls import LossCall

if TYPE_CHECKING:
    from debias.step.watcher import Debiaser

__all__ = ["split_losses", "take_samples"]


def split_losses(run: Callable[[Any], Any], step: Step, reweigher: Debiaser) -> Any:
    """Run the user's step, a function of the batch, on each group's samples or on each sample; combine the losses.

    Returns:
        The last output of the step, with the debiased loss.

    Raises:
        RowsError: a part of the batch cannot be cut into samples.
        LossNotFoundError: a pass returns no single number.
        DebiasError: BatchNorm refuses a pass of one sample.
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
    losses, output = [], None
    with _logged_once(step.module) as sizes:
        for members in passes:
            sizes.append(len(members))
            try:
                output = run(take_samples(step.batch, members, n))
            except ValueError as error:
                if "Expected more than 1 value per channel" not in str(error):
                    raise
                raise DebiasError(
                    f"Expected `losses={reweigher.losses!r}` to give BatchNorm more than one sample in every pass, but"
                    " a pass has one, of which it knows no variance. Freeze it (`eval()`, as for detectors), use"
                    " GroupNorm, or batches with two samples of each group (`GroupBalancedSampler`)."
                ) from error
            losses.append(_one_number(output, reweigher.losses))
    sizes_of_rows = torch.tensor(sizes, dtype=losses[0].dtype, device=losses[0].device)
    rows = torch.tensor([members[0] for members in passes], device=losses[0].device)
    call = LossCall.of("training_step", torch.stack(losses) * sizes_of_rows, sizes_of_rows, rows)
    return with_loss(output, reweigher.reweigh([call], step)[0])


def _one_number(output: Any, losses: str) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise LossNotFoundError(
            f"Expected the training step to return one number every time with `losses={losses!r}`, but got {found}."
            " Return a loss of zero instead of skipping."
        )
    loss = loss.reshape(())
    return loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss


@contextmanager
def _logged_once(module: Any) -> Iterator[list[int]]:
    """While this lasts numbers that the step logs are collected; then each is logged once, as that of the whole batch.

    Yields a list, to which the number of samples of each pass is added before it begins.
    """
    sizes: list[int] = []
    collected: dict[str, tuple[list[tuple[Any, int]], dict[str, Any]]] = {}

    def log(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(("name", "value", "prog_bar", "logger", "on_step", "on_epoch"), args, strict=False)) | kwargs
        name, value = named.pop("name"), named.pop("value")
        if not isinstance(value, Tensor | int | float):  # a metric, which sees the samples of every pass
            original(*args, **kwargs)
            return
        value = value.detach() if isinstance(value, Tensor) else value
        values, options = collected.setdefault(name, ([], named))
        if values and options.get("batch_size") and named.get("batch_size"):
            options["batch_size"] += named["batch_size"]  # of all passes
        values.append((value, sizes[-1]))

    def log_dict(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(("dictionary", "prog_bar", "logger", "on_step", "on_epoch"), args, strict=False)) | kwargs
        for name, value in named.pop("dictionary").items():
            module.log(name, value, **named)

    with ExitStack() as stack:
        for name, around in (("log", log), ("log_dict", log_dict)):
            stack.callback(detach, attach(module, name, around))
        yield sizes
    for name, (values, options) in collected.items():
        mean = sum(value * size for value, size in values) / sum(size for _, size in values)
        module.log(name, mean, **options)


def take_samples(batch: Any, members: list[int], n: int) -> Any:
    """The same batch with only some of its samples; see :func:`debias.step.batch.map_samples`.

    Raises:
        RowsError: a tensor in it cannot be cut into samples.
    """
    return map_samples(
        batch,
        n,
        lambda x: x[torch.tensor(members, device=x.device)],
        lambda items: [items[i] for i in members],
        whole=False,
    )

"""What is refused before anything has run: strategies, optimisation and samplers that a method cannot work with."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.utils.data import BatchSampler
from torch.utils.data.distributed import DistributedSampler

from debias.errors import DebiasWarning, RowsError, UnsupportedStrategyError
from debias.ops.distributed import world_size

if TYPE_CHECKING:
    from debias.step.watcher import StepWatcher

__all__ = [
    "data_group",
    "refuse_duplicating_sampler",
    "refuse_unsupported",
    "takes_index",
    "takes_iterator",
    "warn_padding",
]

_EVALUATES = {"fit": "validation_step", "validate": "validation_step", "test": "test_step"}
_DATA = "data_parallel"  # as Lightning calls that dimension of the mesh


def takes_index(step: Any) -> bool:
    """Whether Lightning gives a training step the number of its batch."""
    return is_param_in_hook_signature(step, "batch_idx", min_args=2)


def takes_iterator(step: Any) -> bool:
    """Whether a step fetches its batches itself, so that nothing can be carried beside them."""
    return is_param_in_hook_signature(step, "dataloader_iter", explicit=True)


def refuse_unsupported(trainer: Any, module: Any, watcher: StepWatcher, stage: str) -> None:
    """Refuse, before anything has run, what a method cannot do."""
    if stage == "fit" or watcher.monitors:  # else it does nothing in this stage
        _check_strategy(trainer.strategy, watcher)
    who = type(watcher).__name__
    watched = [_EVALUATES[stage]] if watcher.monitors and stage in _EVALUATES else []
    for step in [*watched, "training_step"] if watcher.trains and stage == "fit" else watched:
        if takes_iterator(getattr(module, step)):
            raise UnsupportedStrategyError(
                f"Expected `{step}(batch, ...)` for {who}, but got `{step}(dataloader_iter)`: the batch is fetched"
                " inside the step, where it cannot be read. Take the batch as the first argument."
            )
    if stage != "fit" or not watcher.trains:
        return
    _check_rows(trainer.callbacks)
    if not module.automatic_optimization and watcher.adds_to_loss:
        has_mixin = hasattr(sys.modules[type(watcher).__module__], f"{who}Mixin")  # beside the method, in its file
        mixin = f", or `debias.{who}Mixin` in the step" if has_mixin else ""
        raise UnsupportedStrategyError(
            f"Expected automatic optimisation for {who}, but `automatic_optimization` is False: the loss is used up"
            f" inside the step, so that nothing can be read of it or added to it. Use automatic optimisation{mixin}."
        )
    if not module.automatic_optimization and getattr(watcher, "loss", None) == "sum":
        raise UnsupportedStrategyError(
            f"Expected `loss` of {who} to choose one loss under manual optimisation, but got 'sum': what all losses"
            " add up to is only known when the step has used them. Pass `loss=<index>` or a callable."
        )
    losses = watcher.losses  # type: ignore[attr-defined]
    if losses in ("split", "image") and not module.automatic_optimization:
        raise UnsupportedStrategyError(
            f"Expected `losses={losses!r}` of {who} with automatic optimisation: the step then runs once per"
            f" {'group' if losses == 'split' else 'image'}, and would optimise each time. Use `losses='whole'`, or"
            " `losses='heads'` for torchvision's detectors."
        )
    adding = [type(c).__name__ for c in trainer.callbacks if getattr(c, "adds_to_loss", False)]
    if losses != "whole" and adding:
        raise UnsupportedStrategyError(
            f"Expected `losses={losses!r}` of {who} without penalties or adversaries, but got {', '.join(adding)}:"
            " there is no one loss of the batch that they could read. Remove them, or use `losses='whole'` if the"
            " step calls an ordinary torch loss."
        )
    if getattr(trainer.strategy, "_ddp_kwargs", {}).get("static_graph") and watcher.adds_to_loss:
        raise UnsupportedStrategyError(
            f"Expected DDP without `static_graph=True` for {who}, whose penalty changes the graph when its schedule"
            " starts. Remove `static_graph=True`."
        )


def data_group(strategy: Any) -> Any:
    """The process group of the ranks that see different samples, of a strategy that has a mesh; None for all ranks."""
    mesh: Any = getattr(strategy, "_device_mesh", None)
    return mesh[_DATA].get_group() if mesh is not None and _DATA in (mesh.mesh_dim_names or ()) else None


def _check_strategy(strategy: Any, watcher: StepWatcher) -> None:
    mesh: Any = getattr(strategy, "_device_mesh", None)
    who, kind = type(watcher).__name__, type(strategy).__name__
    if mesh is not None and _DATA not in (mesh.mesh_dim_names or ()):
        raise UnsupportedStrategyError(
            f"Expected the mesh of {kind} to have a dimension {_DATA!r} for {who}, but got {mesh.mesh_dim_names}:"
            " nothing tells which ranks see different samples. Name it so, of size 1 where all see the same."
        )
    names = {cls.__name__ for cls in type(strategy).__mro__}
    if "ModelParallelStrategy" in names and not watcher.shardable:
        raise UnsupportedStrategyError(
            f"Expected a strategy that keeps the model whole on every process for {who}, which copies it or sets it"
            f" back, but got {kind}. Choose `strategy='ddp'`."
        )
    supported = {"SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy"} & names
    excluded = {"DeepSpeedStrategy", "FSDPStrategy", "SingleDeviceXLAStrategy"} & names
    if (not supported or excluded) and not watcher.allow_untested_strategy:
        shards = " To shard the model, choose `ModelParallelStrategy` with `fully_shard`." * bool(excluded)
        raise UnsupportedStrategyError(
            f"Expected the Trainer's `strategy` to be single-device, DDP or `ModelParallelStrategy` for {who}, but got"
            f" {kind}, on which it has not been tested. Choose `strategy='ddp'`, or pass"
            f" `allow_untested_strategy=True` and check the results yourself.{shards}"
        )


def _check_rows(callbacks: list[Any]) -> None:
    """Methods see the same rows, so they cannot be told different things of them."""
    stated = [(c.state_key, c.loss_rows) for c in callbacks if getattr(c, "loss_rows", None) is not None]
    for who, rows in stated[1:]:
        if rows != stated[0][1]:
            raise RowsError(
                f"Expected methods that are used together to state the same `rows`, but got {stated[0][1]!r} of"
                f" {stated[0][0]} and {rows!r} of {who}: what one states counts for all. Pass the same to both or"
                " to one of them; where losses have rows of different kinds, one `rows=callable(call, n)`."
            )


def refuse_duplicating_sampler(loader: Any, trainer: Any) -> None:
    """Refuse a batch sampler that would give every process the same batches."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    if trainer.world_size < 2 or batch_sampler is None or type(batch_sampler) is BatchSampler:
        return
    if not isinstance(getattr(batch_sampler, "sampler", None), DistributedSampler):
        raise UnsupportedStrategyError(
            f"Expected `batch_sampler` to divide the data between {trainer.world_size} processes, but got"
            f" {type(batch_sampler).__name__}, which gives every process the same batches. Pass an index sampler that"
            " subclasses torch's DistributedSampler, such as `GroupBalancedSampler`, as `sampler=`."
        )


def warn_padding(loader: Any) -> None:
    """Lightning's evaluation sampler repeats samples so that all ranks have as many; the metrics then count them
    twice.
    """
    sampler, world = getattr(loader, "sampler", None), world_size()
    if not isinstance(sampler, DistributedSampler) or not getattr(sampler, "pads", True):
        return
    size = len(sampler.dataset)  # type: ignore[arg-type]
    if size % world:
        warnings.warn(
            f"The evaluation loader of {size} samples is padded to a multiple of {world} processes, so group metrics"
            f" count {-size % world} samples twice. Pass `sampler=EvalSampler(dataset)` to its DataLoader.",
            DebiasWarning,
            stacklevel=2,
        )

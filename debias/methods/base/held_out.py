"""What a network's head reads and says of a whole set, once, in evaluation mode; and which layer that head is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from debias.data.counting import empty_groups
from debias.errors import BadRowsError, BatchKeyError, DebiasError, HeadNotFoundError
from debias.ops.distributed import gather
from debias.ops.groups import check_n_groups, name_groups
from debias.step.batch import BatchKey, input_of, read
from debias.step.context import Step
from debias.step.ids import plain_n_groups
from debias.step.samples import INDEX
from debias.step.tagged import split_tags
from debias.tap.head import HeadFinder, submodule

__all__ = ["Evaluating", "HeldOut", "Keys", "find_head", "held_out", "labels", "moved", "refuse_empty", "run_head"]


class Keys(NamedTuple):
    """Where things are in a batch."""

    input: BatchKey
    target: BatchKey
    group: Any
    n_groups: Any


class HeldOut(NamedTuple):
    """Everything float64 or int64, on the CPU, the same on all ranks.

    Attributes:
        features: ``(N, D)``.
        logits: ``(N, C)``.
        targets: class ids ``(N,)`` or labels ``(N, K)``.
        groups: ``(N,)``, None where nobody asked.
        other_logits: of a second network ``(N, C)``, None where there is none.
    """

    features: Tensor
    logits: Tensor
    targets: Tensor
    groups: Tensor | None
    other_logits: Tensor | None


@torch.no_grad()
def held_out(
    module: nn.Module,
    loader: Iterable[Any],
    path: str | None,
    keys: Keys,
    transfer: Any,
    other: nn.Module | None = None,
) -> tuple[nn.Linear, HeldOut]:
    """The head, and what it reads and says of a set; of all ranks, in the order of the set where tags tell it.

    Args:
        module: a forward pass runs the head once.
        loader: of the set.
        path: of the head, None to find it.
        keys: where things are in a batch.
        transfer: moves a batch to the device; None for the module's own way.
        other: a second network of the same architecture.
    """
    head: nn.Linear | None = None
    parts: list[tuple[Tensor, ...]] = []
    with Evaluating(module), Evaluating(other or module):
        for raw in loader:
            batch, tags = moved(raw, module, transfer)
            given = input_of(module, batch, keys.input)
            if head is None:
                head = find_head(module, path, *given)
                name = next(name for name, m in module.named_modules() if m is head)
                second = None if other is None else other.get_submodule(name)
            features, logits = run_head(module, head, *given)
            n, device = len(features), features.device
            others = logits if second is None else run_head(other, second, *given)[1]  # type: ignore[arg-type]
            targets, groups = labels(batch, tags, keys, logits)
            numbers = torch.full((n,), -1, device=device)
            if isinstance(tags.get(INDEX), Tensor):
                numbers = tags[INDEX].to(device)
            parts.append((features, logits, others, targets, groups, numbers))
    if head is None:
        raise DebiasError("Expected a held-out set to refit the last layer on, but the loader yields no batch.")
    features, logits, others, targets, groups, numbers = (gather(torch.cat(x)).cpu() for x in zip(*parts, strict=True))
    rows = torch.arange(len(numbers))
    if bool((numbers >= 0).all()):
        rows = numbers.argsort(stable=True)
        again = numbers[rows][1:] == numbers[rows][:-1]
        rows = rows[torch.cat([torch.ones(1, dtype=torch.bool), ~again])]
    known = targets >= 0 if targets.ndim == 1 else (targets >= 0).any(1)
    rows = rows[known[rows]]
    features = features.double()[rows]
    if not bool(features.isfinite().all()):
        raise BadRowsError(
            "Expected finite features of the held-out set, but some are NaN or infinite. Check the network's weights"
            " and its inputs."
        )
    return head, HeldOut(
        features,
        logits.double()[rows],
        targets[rows],
        None if keys.group is None else groups[rows],
        None if other is None else others.double()[rows],
    )


def labels(
    batch: Any, tags: dict[str, Any], keys: Keys, logits: Tensor, *, alike: bool = True
) -> tuple[Tensor, Tensor]:
    """Targets of a batch, and groups ``(N,)``, -1 where nobody asked.

    Args:
        batch: the batch.
        tags: its tags.
        keys: where things are in it.
        logits: of its samples, or anything of their shape and device.
        alike: whether they are of these samples; else the number of targets is that of the samples.
    """
    device = logits.device
    targets = torch.as_tensor(read(batch, keys.target, tags, argument="target"), device=device)
    n = len(logits) if alike or not targets.ndim else len(targets)
    targets = _targets(targets, n, logits.shape[1])
    if keys.group is None:
        return targets, torch.full((n,), -1, device=device)
    groups = Step(None, logits, "validate", batch, tags).ids(keys.group, plain_n_groups(keys.n_groups))
    if groups.shape != (n,):
        raise BatchKeyError(
            f"Expected `group={keys.group!r}` to hold one id for each of {n} samples, but got shape"
            f" {tuple(groups.shape)}."
        )
    return targets, groups


class Evaluating:
    """Evaluation mode for a while, module by module as it was afterwards."""

    def __init__(self, module: nn.Module) -> None:
        self.modes = [(m, m.training) for m in module.modules()]
        self.module = module

    def __enter__(self) -> None:
        self.module.eval()

    def __exit__(self, *_: Any) -> None:
        for m, mode in self.modes:
            m.training = mode


class _Recorder(TorchFunctionMode):
    """Notes what the head is found by."""

    def __init__(self) -> None:
        super().__init__()
        self.finder = HeadFinder()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.finder.record(func, args, kwargs or {}, out)
        return out


@torch.no_grad()
def find_head(module: nn.Module, path: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Linear:
    """The linear layer that is named, or whose output the module returns."""
    if path is not None:
        found = submodule(module, path, argument="head")
    else:
        recorder = _Recorder()
        with recorder:
            output = module(*args, **kwargs)
        run = recorder.finder.match(output) if isinstance(output, Tensor) else None
        layers = [] if run is None else [m for m in module.modules() if getattr(m, "weight", None) is run.weight]
        if not layers:
            raise HeadNotFoundError(
                "Expected the output of the module to be that of a linear layer, so that it can be refitted, but no"
                " layer was found. Name it: `head='dotted.path'`."
            )
        found = layers[0]
    if type(found) is not nn.Linear or found._parameters.get("weight") is None:
        raise HeadNotFoundError(
            f"Expected the head to be a plain `nn.Linear`, whose weight a fit can replace, but got"
            f" {type(found).__name__}. Name the last linear layer: `head='dotted.path'`."
        )
    return found


def refuse_empty(groups: Tensor, n_groups: Any, *, twice: bool) -> None:
    """Refuse held-out groups ``(N,)`` of which one has no sample, or one alone where they are fitted on in halves.

    Raises:
        BadRowsError: an id is out of range.
        DebiasError: there are too few samples.
    """
    total = check_n_groups(n_groups)
    if bool((groups >= total).any()):
        raise BadRowsError(
            f"Expected group ids below `n_groups={total}`, but got {int(groups.max())}. Number the groups 0 .."
            " n_groups - 1 (-1 = unlabelled), or raise `n_groups`."
        )
    counts = torch.bincount(groups[groups >= 0], minlength=total)
    names = name_groups(n_groups, None)
    if empty := empty_groups(counts, names):
        raise DebiasError(
            f"Expected held-out samples of every group, but there is none of {empty}. Take a larger held-out set,"
            " correct `n_groups`, or choose `method='afr'`, which needs no groups."
        )
    if twice and int(counts.min()) < 2:
        raise DebiasError(
            "Expected at least two held-out samples of each group, one to fit on and one to choose the strength by, but"
            f" group {names[int(counts.argmin())]} has one. Give one strength, `strengths=[0.1]`, to choose none."
        )


@torch.no_grad()
def run_head(module: nn.Module, head: nn.Linear, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What the head reads and says."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = head.register_forward_hook(lambda m, given, output: seen.append((given[0].detach(), output.detach())))
    try:
        module(*args, **kwargs)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0][0].ndim != 2:
        what = f"{len(seen)} times" if len(seen) != 1 else f"on shape {tuple(seen[0][0].shape)}"
        raise HeadNotFoundError(
            f"Expected the head to run once, on features of shape (N, D), but it ran {what}. Name the layer that makes"
            " the logits of whole samples: `head='dotted.path'`."
        )
    return seen[0]


def _targets(target: Tensor, n: int, width: int) -> Tensor:
    """Class ids ``(N,)``, or labels ``(N, K)``, beside logits ``(N, K)``."""
    if width == 1:
        target = target.reshape(n, -1)
    elif target.ndim == 1 and not target.is_floating_point() and target.dtype != torch.bool and len(target) == n:
        return target.long()
    labels = target.nan_to_num(-1.0) if target.is_floating_point() else target.long()
    fits = target.shape == (n, width) and bool(((labels == 0) | (labels == 1) | (labels < 0)).all())
    one_hot = fits and width > 1 and bool((labels.sum(1) == 1).all() & (labels >= 0).all())
    if not fits or one_hot:
        what = f"{tuple(target.shape)} of {target.dtype}{', one-hot classes' if one_hot else ''}"
        raise BatchKeyError(
            f"Expected `target` to hold class ids of shape ({n},), or labels 0 and 1 in the shape of the logits,"
            f" {(n, width)}, but got {what}. Pass `target=` a key, or a callable of the batch that makes them."
        )
    return labels.long()


def moved(raw: Any, module: nn.Module, transfer: Any) -> tuple[Any, dict[str, Any]]:
    """The batch on the module's device, and its tags."""
    batch, tags = split_tags(raw)
    if transfer is not None:
        return transfer(batch), tags
    device = next(iter([*module.parameters(), *module.buffers()]), torch.empty(0)).device
    if hasattr(module, "transfer_batch_to_device"):  # a LightningModule, as its own Trainer would do it
        batch = module.on_before_batch_transfer(batch, 0)  # type: ignore[operator]
        batch = module.transfer_batch_to_device(batch, device, 0)  # type: ignore[operator]
        return module.on_after_batch_transfer(batch, 0), tags  # type: ignore[operator]
    from lightning.fabric.utilities.apply_func import move_data_to_device

    return move_data_to_device(batch, device), tags

"""Losses per image of torchvision's detectors, whose training loss exists only per batch. No Lightning here.

Every detector divides by something of the batch: FCOS and SSD by its foreground anchors, Faster R-CNN by its sampled
anchors and proposals, Mask R-CNN's mask loss by its positive proposals; only RetinaNet averages over images. A method
that weighs images or domains needs a loss per image, each with the image's own divisor. Three ways, all of them with
torchvision's own loss functions, see :func:`detection_losses`:

``"heads"``  the detector's own forward runs once on the batch; only its loss functions are called image by image
``"image"``  the detector runs once per image
``"split"``  the detector runs once per domain

What differs between them: transforms pad the images of one call to a common size, which an image on its own is spared,
and padding moves the anchors near the border; and anchors and proposals that are sampled at random (Faster and Mask
R-CNN) are other draws. With images of one size, and the same draws or none, ``"heads"`` and ``"image"`` agree to
rounding. ``"split"`` has one loss per domain, with the domain's divisor: a domain's images with many boxes count more.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from debias.errors import AmbiguousLossError, DebiasError, LossNotFoundError, RowsError
from debias.step.context import Step
from debias.step.proxy import attach, detach
from debias.tap.calls import LossCall
from debias.tap.selection import select_calls

if TYPE_CHECKING:
    from debias.step.watcher import Debiaser

__all__ = ["DetectionLosses", "DetectorStep", "detection_losses", "detectors", "one_pass"]

_FAMILIES = ("FCOS", "GeneralizedRCNN", "RetinaNet", "SSD")
_SUPPORTED = "FasterRCNN, MaskRCNN, RetinaNet, FCOS and SSD"


@dataclass(eq=False)
class DetectionLosses:
    """A detector's losses, taken apart.

    Attributes:
        losses: by the detector's own names, one value a row, ``(rows,)``, differentiable: what torchvision returns
            for the images of that row alone. A row is an image, or a domain with ``losses="split"``.
        rows: the images of each row, in the order of the batch.
        counts: what torchvision divides each loss by, for each row ``(rows,)``; 1 for RetinaNet, which averages over
            images. None where the detector was run more than once and its own divisors are not looked at.
    """

    losses: dict[str, Tensor]
    rows: list[list[int]]
    counts: dict[str, Tensor] | None = None

    @property
    def total(self) -> Tensor:
        """The sum of a row's losses, ``(rows,)``."""
        return torch.stack(list(self.losses.values())).sum(0)

    def batch(self) -> dict[str, Tensor]:
        """The losses of the whole batch as the detector itself would have returned them, with the batch's divisors.

        Raises:
            DebiasError: the divisors are not known.
        """
        if self.counts is None:
            raise DebiasError(
                "Expected losses whose divisors are known, but these come from several runs of the detector. Use"
                " `losses='heads'`."
            )
        return {
            name: (loss * self.counts[name].clamp_min(1)).sum() / self.counts[name].sum().clamp_min(1)
            for name, loss in self.losses.items()
        }


def detection_losses(
    model: nn.Module,
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    *,
    losses: Literal["heads", "image", "split"] = "heads",
    domains: Tensor | None = None,
) -> DetectionLosses:
    """A detector's training losses by image, or by domain.

    Args:
        model: one of torchvision's FasterRCNN, MaskRCNN, RetinaNet, FCOS or SSD, in training mode. For ``"image"`` and
            ``"split"`` anything that is called like them and returns a dictionary of scalar losses.
        images: float tensors ``(3, H, W)`` of any sizes.
        targets: for each image ``boxes`` ``(n, 4)`` in pixels, ``labels`` ``(n,)``, and what else the detector needs;
            n may be 0.
        losses: ``"heads"``: one pass, about the cost of a plain step; ``"image"``: one pass per image; ``"split"``: one
            pass per domain.
        domains: for ``"split"`` the domain of each image, int64 ``(N,)``.

    Raises:
        DebiasError: the model is not in training mode, or not supported by ``"heads"``, or ``domains`` is missing.
        RowsError: the numbers of images, targets and domains differ.

    Example:
        >>> import torch
        >>> from debias import detection_losses
        >>> from debias.models.detector import tiny_detector
        >>> model = tiny_detector("fcos", num_classes=2)
        >>> images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
        >>> boxes = [torch.tensor([[8.0, 8.0, 24.0, 24.0]]), torch.zeros(0, 4)]
        >>> targets = [{"boxes": b, "labels": torch.ones(len(b), dtype=torch.int64)} for b in boxes]
        >>> detection_losses(model, images, targets).total.shape
        torch.Size([2])
    """
    n = len(images)
    if len(targets) != n or (domains is not None and tuple(domains.shape) != (n,)):
        raise RowsError(
            f"Expected one target and one domain for each of the {n} images, but got {len(targets)} targets and domains"
            f" of shape {None if domains is None else tuple(domains.shape)}."
        )
    if losses not in ("heads", "image", "split"):
        raise DebiasError(f"Expected `losses` to be 'heads', 'image' or 'split', but got {losses!r}.")
    if not model.training:
        raise DebiasError(
            "Expected the detector to be in training mode, where it returns losses, but got one in evaluation mode."
            " Call `model.train()`; keep BatchNorm frozen with FrozenBatchNorm2d."
        )
    if losses == "heads":
        return one_pass(model, model, (list(images), list(targets)), {})
    if losses == "image":
        rows = [[i] for i in range(n)]
    elif domains is None:
        raise DebiasError("Expected `domains` with `losses='split'`, but got None. Pass one id per image.")
    else:
        numbers = domains.tolist()
        rows = [[i for i in range(n) if numbers[i] == number] for number in sorted(set(numbers))]
    parts = [model([images[i] for i in row], [targets[i] for i in row]) for row in rows]
    return DetectionLosses(_stacked(parts), rows)


def detectors(module: nn.Module) -> list[nn.Module]:
    """The torchvision detectors inside a module."""
    return [m for m in module.modules() if _family(m) is not None]


def one_pass(
    model: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> DetectionLosses:
    """Run a detector's forward once, with its losses per image.

    Raises:
        DebiasError: the detector is none of the supported ones.
    """
    with _per_image(model) as counts:
        losses = dict(forward(*args, **kwargs))
    return DetectionLosses(losses, [[i] for i in range(len(next(iter(losses.values()))))], counts)


def _family(model: nn.Module) -> str | None:
    """Which of torchvision's detectors a module is, also a subclass, without importing torchvision."""
    for cls in type(model).__mro__:
        if cls.__module__.startswith("torchvision.models.detection.") and cls.__name__ in _FAMILIES:
            return cls.__name__
    return None


@contextmanager
def _per_image(model: Any) -> Iterator[dict[str, Tensor]]:
    """While this lasts the detector's loss functions return one value per image; yields where the divisors go."""
    counts: dict[str, Tensor] = {}
    family = _family(model)
    with ExitStack() as stack:

        def put(owner: Any, name: str, around: Callable[..., Any], *given: Any) -> None:
            stack.callback(detach, attach(owner, name, functools.partial(around, *given)))

        if family == "GeneralizedRCNN" and not model.roi_heads.has_keypoint():
            sampled: list[Tensor] = []
            losses = "loss_objectness", "loss_rpn_box_reg"
            put(model.rpn, "fg_bg_sampler", _count_anchors, sampled)
            put(model.rpn, "compute_loss", _by_image, counts, losses, lambda _: torch.stack(sampled))
            put(model.roi_heads, "forward", _roi_losses, counts)
        elif family in ("FCOS", "SSD"):
            put(model if family == "SSD" else model.head, "compute_loss", _by_image, counts, (), _foreground)
        elif family == "RetinaNet":
            put(model.head, "compute_loss", _by_image, counts, (), lambda args: torch.ones_like(_foreground(args)))
        else:
            raise DebiasError(
                f"Expected one of torchvision's {_SUPPORTED} for `losses='heads'`, but got {type(model).__name__}. Use"
                " `losses='image'` (one pass per image) or `losses='split'` (one pass per domain), which run any model."
            )
        yield counts


def _by_image(
    counts: dict[str, Tensor], losses: Sequence[str], divisors: Any, function: Any, args: tuple[Any, ...], _: Any = None
) -> Any:
    """What a loss function of the detector returns for each image, stacked; its divisors go to ``counts``.

    Of its arguments lists hold an element for each image, dictionaries tensors ``(N, ...)``, and tensors the rows of
    one image after the other, as many as its element of the first list has.
    """
    sizes = [len(x) for x in next(x for x in args if isinstance(x, list))]

    def parts(x: Any) -> Sequence[Any]:
        if isinstance(x, Tensor):
            return x.split(sizes)
        if isinstance(x, dict):
            return [{name: value[i : i + 1] for name, value in x.items()} for i in range(len(sizes))]
        return [[of_image] for of_image in x]

    found = _stacked([function(*part) for part in zip(*map(parts, args), strict=True)])
    counts.update(dict.fromkeys(losses or found, divisors(args)))
    return found


def _stacked(parts: list[Any]) -> Any:
    """One tensor of tensors, or a tuple or dictionary of such."""
    if isinstance(parts[0], dict):
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return torch.stack(parts) if isinstance(parts[0], Tensor) else tuple(map(torch.stack, zip(*parts, strict=True)))


def _foreground(args: tuple[Any, ...]) -> Tensor:
    """How many anchors of each image are matched with a box; the last argument tells."""
    return torch.stack([(matched >= 0).sum() for matched in args[-1]])


def _count_anchors(sampled: list[Tensor], sampler: Any, args: tuple[Any, ...], _: Any) -> Any:
    """Sample anchors of one image, as the region proposal network is asked for, and count them."""
    positive, negative = sampler(*args)
    sampled.append(positive[0].sum() + negative[0].sum())
    return positive, negative


def _roi_losses(counts: dict[str, Tensor], original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The RoI heads' own forward, with loss functions of its module replaced: they are no methods."""
    function = original.__func__
    own = function.__globals__

    def boxes_of_image(logits: Tensor, boxes: Tensor, labels: list[Tensor], regression: list[Tensor]) -> Any:
        if len(labels[0]):
            return own["fastrcnn_loss"](logits, boxes, labels, regression)
        return logits.sum(), boxes.sum()  # no proposal: zeros, where a mean is NaN

    def boxes(*given: Any) -> Any:
        return _by_image(counts, ("loss_classifier", "loss_box_reg"), rows, boxes_of_image, given)

    def masks(*given: Any) -> Any:
        return _by_image(counts, ("loss_mask",), rows, own["maskrcnn_loss"], given)

    def rows(given: tuple[Any, ...]) -> Tensor:
        per_image = next(x for x in given if isinstance(x, list))
        return torch.tensor([len(x) for x in per_image], device=given[0].device)

    # A copy of the function that looks names up elsewhere; replacing them in torchvision would reach other threads.
    replaced = types.FunctionType(
        function.__code__,
        own | {"fastrcnn_loss": boxes, "maskrcnn_loss": masks},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return replaced(original.__self__, *args, **kwargs)


class DetectorStep:
    """What the detector of one training step runs instead of its forward: the same, with reweighed losses.

    The dictionary that the step receives holds the reweighed mean over images of each of the detector's losses, so that
    what the step does with it (adding, scaling, logging) stays right. A detector in evaluation mode runs as it is.

    Args:
        step: the running step.
        reweigher: the method; its ``loss`` chooses among the detector's losses by position or callable, all of them by
            default.
    """

    def __init__(self, step: Step, reweigher: Debiaser) -> None:
        self.step = step
        self.reweigher = reweigher
        self.called = False

    def __call__(
        self, model: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the detector.

        Raises:
            AmbiguousLossError: it runs a second time in the same step.
            RowsError: it was given other images than the batch's.
        """
        if not model.training:
            return forward(*args, **kwargs)
        if self.called:
            raise AmbiguousLossError(
                "Expected the training step to run its detector once with `losses='heads'`, but it did so twice, and"
                " a method updates its state once a step. Use `losses='image'` or `losses='split'`."
            )
        self.called = True
        found = one_pass(model, forward, args, kwargs)
        if len(found.rows) != self.step.n:
            raise RowsError(
                f"Expected the detector to run on the {self.step.n} images of the batch, but it was given"
                f" {len(found.rows)}. Use `losses='split'` for a step that changes their number."
            )
        calls = [
            LossCall.of(name, losses, torch.ones_like(losses), position=i)
            for i, (name, losses) in enumerate(found.losses.items())
        ]
        choice = self.reweigher.loss
        chosen = select_calls(calls, "sum" if choice is None else choice, type(self.reweigher).__name__)
        means = dict(zip((call.name for call in chosen), self.reweigher.reweigh(chosen, self.step), strict=True))
        return {call.name: means[call.name] if call.name in means else call.mean() for call in calls}

    def finish(self) -> None:
        """Once the step has returned.

        Raises:
            LossNotFoundError: it ran no detector in training mode.
        """
        if not self.called:
            raise LossNotFoundError(
                f"Expected the training step to run one of torchvision's {_SUPPORTED} in training mode with"
                " `losses='heads'`, but it ran none. Use `losses='whole'` for other losses, or `losses='image'` or"
                " `losses='split'` for other detectors."
            )

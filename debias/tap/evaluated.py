"""What an evaluation step shows of its losses: which elements count, and what the network predicted. Torch only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from debias.tap.counted import CountedElements, left_out
from debias.tap.losses import LOSSES, class_weights, unreduced
from debias.tap.predictions import Predictions

__all__ = ["Evaluated", "counted_by"]


class Evaluated:
    """Follows the outputs of the network to the losses, and the losses to what the step makes of them."""

    def __init__(self) -> None:
        self.elements = CountedElements()
        self.predictions = Predictions()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation of the step."""
        return self.predictions.run(func, args, kwargs, self.elements.run)

    def close(self) -> None:
        """Let go of every tensor."""
        self.elements.close()
        self.predictions.close()


def counted_by(func: Any, arguments: dict[str, Any]) -> Callable[[], Tensor | None]:
    """Which elements a loss counts, by its own arguments; None where all."""

    def counted() -> Tensor | None:
        target, weight = arguments.get("target"), arguments.get("weight")
        if LOSSES[func] is class_weights:
            if target is None or target.is_floating_point():
                return None
            return class_weights(torch.ones((), device=target.device), arguments) != 0
        logits = next(iter(arguments.values()))
        if not isinstance(weight, Tensor) or func.__name__ == "multi_margin_loss" or not bool((weight == 0).any()):
            return None
        losses = unreduced(func, arguments | {"weight": None})
        return ~left_out(*torch.broadcast_tensors(weight, losses)) if losses.shape == logits.shape else None

    return counted

"""Whether what a method adds to a loss, or makes of it, can train anything. If not, the run is plain training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from debias.errors import DebiasWarning

__all__ = ["Reach"]

# Custom functions whose parameters are among their inputs; others, such as reentrant checkpoints, may hide theirs.
_OPEN = ("debias.", "torch._functorch.")


class Reach:
    """Say, once a fit, that a method reaches no trainable parameter."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Another fit begins."""
        self._looked = self._said = False

    def check(self, method: Any, values: Sequence[Tensor], step: Any) -> None:
        """Look where the gradients of ``values`` go, in the first step; later only whether there are any.

        A parameter is trainable if one of the Trainer's optimisers holds it: those of a network that belongs to the
        method do not count. Where the graph does not tell, nothing is said.
        """
        if self._said or (self._looked and any(value.requires_grad for value in values)):
            return
        self._looked = True
        if _reaches(method, values, step):
            return
        self._said = True
        if step.trainer.is_global_zero:
            warnings.warn(
                f"{method.state_key} reaches no trainable parameter: it changes nothing, and this is plain training as"
                " long as that is so. What it works on is frozen or detached, in no optimiser, or has the weight 0."
                " Unfreeze the layers that it is to change, or take a method that needs the head alone: one that"
                " reweighs (GroupDRO), or a penalty on the head (HessianAlignment, Fishr).",
                DebiasWarning,
                stacklevel=2,
            )


@torch.compiler.disable
def _reaches(method: Any, values: Sequence[Tensor], step: Any) -> bool:
    held = {id(p) for optimizer in step.trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    own = {id(p) for p in step.module.parameters()}
    # Optimisers may hold copies of the module's parameters, or the user may keep them from the Trainer.
    not_trained = own - held if held and held <= own else set()
    not_trained |= {id(p) for owned in method.owned.values() if owned.module for p in owned.module.parameters()}
    return any(leaf is None or id(leaf) not in not_trained for leaf in _leaves(values))


def _leaves(values: Iterable[Tensor]) -> Iterator[Tensor | None]:
    """Where gradients of ``values`` are added up; None for a place that the graph does not show."""
    nodes: list[Any] = [get_gradient_edge(value).node for value in values if value.requires_grad]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        elif isinstance(node, BackwardCFunction) and not node._forward_cls.__module__.startswith(_OPEN):  # type: ignore[attr-defined]
            yield None
        following = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= following
        nodes.extend(following)

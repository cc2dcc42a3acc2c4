"""A network with its own optimiser that belongs to a callback, not to the user's module.

Registered on the module, an adversary would break OneCycleLR and its like, and make checkpoints unloadable without the
callback. So it is kept beside: created at the first batch, when widths are known, without disturbing anyone's random
numbers; its gradients are averaged over ranks by hand; it steps when the user's optimiser steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from debias.errors import DebiasError
from debias.step.distributed import is_distributed, world_size

__all__ = ["OwnedModule"]


class OwnedModule:
    """A lazily created network, its optimiser and their state.

    Args:
        build: makes the network from the width of its input.
        seed: seed of its initial weights; the global random state is left as it was.
        lr: learning rate, or None for the user's current one (of several groups the highest) times ``lr_ratio``.
        lr_ratio: see ``lr``.
        optimizer: makes the optimiser from parameters and learning rate; SGD with momentum 0.9 by default.
    """

    def __init__(
        self,
        build: Callable[[int], nn.Module],
        *,
        seed: int = 0,
        lr: float | None = None,
        lr_ratio: float = 1.0,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    ) -> None:
        self.build = build
        self.seed = seed
        self.lr = lr
        self.lr_ratio = lr_ratio
        self.optimizer_factory = optimizer
        self.module: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self._stash: dict[str, Any] | None = None

    def create(self, width: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The network, made at the first call; a state loaded earlier is applied now."""
        if self.module is None:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(self.seed)
                module = self.build(width)
            # Device and dtype before the optimiser's state: a later cast would round restored momentum.
            self.module = module.to(device=device, dtype=dtype)
            make = self.optimizer_factory or _sgd
            self.optimizer = make(self.module.parameters(), lr=1.0 if self.lr is None else self.lr)
            if self._stash is not None:
                self._apply(self._stash)
                self._stash = None
        return self.module

    def local_loss(self, per_sample: Tensor, counts: Tensor, global_count: Tensor) -> Tensor:
        """This rank's share of the mean over the global batch, so that averaged gradients are exact.

        Args:
            per_sample: losses of this rank's samples, ``(N,)``.
            counts: 1 where a sample counts, else 0, ``(N,)``.
            global_count: number of samples that count over all ranks, scalar.
        """
        return (per_sample * counts).sum() * (world_size() / global_count.clamp_min(1))

    def step(self, user_optimizer: torch.optim.Optimizer, scaler: Any = None) -> None:
        """Average gradients over ranks and step, through the GradScaler if there is one; then clear gradients."""
        if self.module is None or self.optimizer is None:
            return
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if is_distributed():
            flat = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
            dist.all_reduce(flat)
            flat /= world_size()
            for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = part.view_as(p)
        if self.lr is None:
            # With layer-wise decay the first group is the slowest; a network beside the head learns at the head's rate.
            current = max(group["lr"] for group in user_optimizer.param_groups)
            for group in self.optimizer.param_groups:
                group["lr"] = current * self.lr_ratio
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.unscale_(self.optimizer)
            # One backward pass, one decision: where the user's step is skipped, this one is too.
            ours, users = (scaler._found_inf_per_device(o) for o in (self.optimizer, user_optimizer))
            for device, found in users.items():
                ours[device] = ours[device] + found if device in ours else found
            scaler.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser state; empty before creation."""
        if self.module is None or self.optimizer is None:
            return dict(self._stash or {})
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Apply a state, or keep it until creation; an empty one (saved before creation) resets everything."""
        if not state:
            self.module, self.optimizer, self._stash = None, None, None
        elif self.module is None:
            self._stash = state
        else:
            self._apply(state)

    def _apply(self, state: dict[str, Any]) -> None:
        try:
            self.module.load_state_dict(state["module"])  # type: ignore[union-attr]
        except RuntimeError as error:
            raise DebiasError(
                f"Expected the saved network to fit the one of this run, but got: {error}. Resume with the arguments"
                " the checkpoint was made with."
            ) from None
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[union-attr]
        self.optimizer.zero_grad(set_to_none=True)  # type: ignore[union-attr]


def _sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)

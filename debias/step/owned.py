"""A network with its own optimiser that belongs to a callback, not to the user's module.

Registered on the module, an adversary would break OneCycleLR and its like, and make checkpoints unloadable without the
callback. So it is kept beside: created at the first batch, when widths are known, without disturbing anyone's random
numbers; its gradients are averaged over ranks by hand; it steps when the user's optimiser steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from debias.errors import DebiasError, UnsupportedStrategyError
from debias.ops.distributed import in_place_sum, is_distributed, world_size

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
        self._width: int | None = None
        self._placed: tuple[torch.device, torch.dtype] | None = None  # in this fit

    def new_fit(self) -> None:
        """The next :meth:`create` begins a fit: the network goes on, with a fresh optimiser, as the user's is."""
        self._placed = None

    def create(self, width: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The network, made at the first call and the same on all ranks; a state loaded before is applied now.

        Later calls return the same network; on another device or in another dtype it and its optimiser's state move.

        Raises:
            DebiasError: it was made for another width, or a loaded state is that of another network.
        """
        if self.module is None:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(self.seed)
                module = self.build(width)
            self._start(module, device, dtype, self._stash or {})
            self._width, self._stash = width, None
        elif width != self._width:
            raise DebiasError(
                f"Expected features of width {self._width}, which the network of an earlier step or fit was made for,"
                f" but got {width}. Make a new instance of the method for another model."
            )
        elif self._placed is None:
            self.module.zero_grad(set_to_none=True)  # of a fit that ended between backward pass and step
            self._start(self.module, device, dtype, {})
        elif self._placed != (device, dtype):
            self._start(self.module, device, dtype, self._optimizer_state())
        return self.module  # type: ignore[return-value]

    def _start(self, module: nn.Module, device: torch.device, dtype: torch.dtype, state: dict[str, Any]) -> None:
        # Device and dtype before the optimiser's state: a later cast would round restored momentum.
        module = module.to(device=device, dtype=dtype)
        if "module" in state:
            try:
                module.load_state_dict(state["module"])
            except RuntimeError as error:
                raise DebiasError(
                    f"Expected the saved network to fit the one of this run, but got: {error}. Resume with the"
                    " arguments the checkpoint was made with."
                ) from None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            _share(module)
        make = self.optimizer_factory or functools.partial(torch.optim.SGD, momentum=0.9)
        optimizer = make(module.parameters(), lr=1.0 if self.lr is None else self.lr)
        if state.get("kind") == type(optimizer).__name__:  # what another has kept, it could not go on with
            optimizer.load_state_dict(state["optimizer"])
        self.module, self.optimizer = module, optimizer
        self._placed = device, dtype

    def local_loss(self, per_sample: Tensor, counts: Tensor, global_count: Tensor) -> Tensor:
        """This rank's share of the mean over the global batch, so that averaged gradients are exact.

        Args:
            per_sample: losses of this rank's samples, ``(N,)``.
            counts: 1 where a sample counts, else 0, ``(N,)``.
            global_count: number of samples that count over all ranks, scalar.
        """
        return (per_sample * counts).sum() * (world_size() / global_count.clamp_min(1))

    def step(self, user_optimizer: torch.optim.Optimizer, scaler: Any = None) -> None:
        """Average gradients over ranks and step, through the GradScaler if there is one; then clear gradients.

        Raises:
            UnsupportedStrategyError: the optimiser needs a closure, as one that runs the training step twice (SAM).
        """
        if self.module is None or self.optimizer is None:
            return
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        theirs = [p for group in user_optimizer.param_groups for p in group["params"]]
        if not is_distributed() and all(p.grad is None for p in parameters + theirs):
            return  # there was no loss: momentum and weight decay must not move one network alone
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if is_distributed():
            flat = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
            in_place_sum(flat)
            flat /= world_size()
            for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = part.view_as(p)
        if self.lr is None:
            # With layer-wise decay the first group is the slowest; a network beside the head learns at the head's rate.
            current = max(group["lr"] for group in user_optimizer.param_groups)
            for group in self.optimizer.param_groups:
                group["lr"] = current * self.lr_ratio
        if scaler is None:
            try:
                self.optimizer.step()
            except (TypeError, AssertionError) as error:
                raise UnsupportedStrategyError(
                    f"Expected an optimiser that takes a step without running the training step again, but got"
                    f" {type(self.optimizer).__name__}, which says: {error or 'it needs a closure'}. Use another"
                    " optimiser."
                ) from error
        elif users := _found_inf(user_optimizer, scaler):
            scaler.unscale_(self.optimizer)
            # One backward pass, one decision: where the user's step is skipped, this one is too.
            ours = scaler._found_inf_per_device(self.optimizer)
            for device, found in users.items():
                ours[device] = ours[device] + found if device in ours else found
            scaler.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser state; empty before creation."""
        if self.module is None or self.optimizer is None:
            return dict(self._stash or {})
        return {"module": self.module.state_dict(), **self._optimizer_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state for the next :meth:`create`, which makes the network anew; an empty one (saved before creation)
        resets everything. The state of an optimiser of another class is left out.
        """
        self.module, self.optimizer, self._stash = None, None, dict(state) or None

    def _optimizer_state(self) -> dict[str, Any]:
        optimizer: Any = self.optimizer
        return {"optimizer": optimizer.state_dict(), "kind": type(optimizer).__name__}


@torch.no_grad()
def _share(module: nn.Module) -> None:
    """Give all ranks, also those that see the same samples, the network of the first: one of the user's own was made on
    each of them.
    """
    for x in (*module.parameters(), *module.buffers()):
        value = x.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(value, 0)
        x.copy_(value)


def _found_inf(user_optimizer: torch.optim.Optimizer, scaler: Any) -> dict[torch.device, Tensor]:
    """Whether the user's gradients are finite, by device; empty where their optimiser will not step."""
    found = scaler._found_inf_per_device(user_optimizer)
    # A fused optimiser unscales in its own step, so that nobody has looked yet.
    if not found and getattr(user_optimizer, "_step_supports_amp_scaling", False):
        found = scaler._check_inf_per_device(user_optimizer)
    return found

"""The statistics of :mod:`debias.ops.head_statistics` for any head, by differentiating it (``torch.func``).

Slower by the derivatives it takes, and not for a Hessian's diagonal or whole: those are as large as a head with P
parameters squared, or take P products.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from debias.errors import DebiasError
from debias.ops.head_losses import HeadLoss, filled, numerators
from debias.ops.head_statistics import HeadStatistics

__all__ = ["AutogradHeadStatistics"]


class AutogradHeadStatistics(HeadStatistics):
    """Statistics of any head by domain: shapes ``(E, 1, P)`` for its P trainable parameters.

    Args:
        head: maps features ``(rows, ...)`` to logits ``(rows, C)``.
        features: input of the head, ``(rows, ...)``, or ``(N, T, ...)`` where it makes T rows of each.
        loss: the loss of the rows.
        members: which row is in which domain, boolean ``(rows, E)``.
    """

    def __init__(self, head: nn.Module, features: Tensor, loss: HeadLoss, members: Tensor) -> None:
        super().__init__(features, loss, members)
        self.head = head
        precise = {n: _like(x, features) for n, x in (*head.named_parameters(), *head.named_buffers())}
        self.parameters = {name: precise.pop(name) for name, p in head.named_parameters() if p.requires_grad}
        self._fixed = precise
        if not self.parameters:
            raise DebiasError("Expected the head to have trainable parameters, but got none. Unfreeze it.")

    def _objective(self, parameters: dict[str, Tensor], shares: Tensor) -> Tensor:
        logits = functional_call(self.head, self._fixed | parameters, (self.features,))
        return (self.loss.num(logits.reshape(self.loss.target.shape)) * shares).sum()

    def _flat(self, parts: dict[str, Tensor]) -> Tensor:
        return torch.cat([part.flatten(1) for part in parts.values()], 1).unsqueeze(1)

    def _unflat(self, vectors: Tensor) -> dict[str, Tensor]:
        sizes = [p.numel() for p in self.parameters.values()]
        parts = vectors.flatten(1).split(sizes, 1)
        return {
            name: part.unflatten(1, p.shape) if p.ndim else part[:, 0]
            for (name, p), part in zip(self.parameters.items(), parts, strict=True)
        }

    def by_pairs(self, cheaper: int) -> bool:
        """Not for any head."""
        return False

    def _local_gradients(self) -> Tensor:
        return self._flat(vmap(grad(self._objective), in_dims=(None, 1))(self.parameters, self.membership))

    def local_products(self, vectors: Tensor) -> Tensor:
        """This rank's part of ``H_e V_e`` and, last, ``(mean of the H_e) V``, for vectors ``(E + 1, 1, P)``."""

        # Twice in reverse: torch's forward mode compiles its rules on first use, which warns and takes seconds.
        def directional(parameters: dict[str, Tensor], vector: dict[str, Tensor], share: Tensor) -> Tensor:
            gradients = grad(self._objective)(parameters, share)
            return sum(((gradients[name] * vector[name]).sum() for name in gradients), start=share.new_zeros(()))

        shares = self.all_shares.squeeze(2)
        return self._flat(vmap(grad(directional), in_dims=(None, 0, 1))(self.parameters, self._unflat(vectors), shares))

    @cached_property
    def _sample_flat(self) -> Tensor:
        """Gradients of the rows, ``(rows, P)``."""
        loss, rows = self.loss, self.loss.target.shape
        weight, positive = (filled(x, self.features, (1, 1)).expand(rows) for x in (loss.weight, loss.positive))
        # As few features as belong to as few rows: of tokens (N, T, d), a sample and its T rows.
        units = math.gcd(len(self.features), rows[0])

        def of_unit(parameters: dict[str, Tensor], features: Tensor, *parts: Tensor) -> Tensor:
            logits = functional_call(self.head, self._fixed | parameters, (features,))
            return numerators(loss.kind, logits.reshape(parts[0].shape), *parts) / loss.elements

        if not units:  # which vmap does not take
            width = sum(p.numel() for p in self.parameters.values())
            return self.features.flatten(1).sum(1, keepdim=True).expand(0, width)
        parts = [x.unflatten(0, (units, -1)) for x in (self.features, loss.target, weight, positive)]
        gradients = vmap(jacrev(of_unit), in_dims=(None, 0, 0, 0, 0))(self.parameters, *parts)
        return self._flat({name: x.flatten(0, 1) for name, x in gradients.items()})[:, 0]

    def _local_sample_gradients(self) -> Tensor:
        return (self.membership.T @ self._sample_flat).unsqueeze(1)

    def _local_sample_squares(self) -> Tensor:
        return (self.membership.T @ self._sample_flat.square()).unsqueeze(1)

    def _local_diagonals(self) -> Tensor:
        raise _only_linear("the diagonal of the Hessian")

    def _local_hessians(self) -> Tensor:
        raise _only_linear("the Frobenius distance of Hessians")

    def hessians_fit(self) -> bool:
        """There is no other way."""
        return True


def _like(x: Tensor, features: Tensor) -> Tensor:
    """A head in half precision is differentiated in the precision of its features, which are float32 at least."""
    return x.to(features.dtype) if x.dtype in (torch.float16, torch.bfloat16) else x


def _only_linear(what: str) -> DebiasError:
    return DebiasError(
        f"Expected a linear head for {what}, but got `derivatives='autograd'`. Take `statistic='hgp'` or 'hutchinson',"
        " or name the last linear layer (`head='dotted.path'`)."
    )

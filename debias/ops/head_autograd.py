"""The statistics of :mod:`debias.ops.head_statistics` for any head, by differentiating it (``torch.func``).

Slower by the derivatives it takes, and not for a Hessian's diagonal or whole: those are as large as a head with P
parameters squared, or take P products.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from debias.errors import DebiasError
from debias.ops.distributed import global_sum
from debias.ops.head_statistics import HeadLoss, HeadStatistics, distances_from, filled, numerators

__all__ = ["AutogradHeadStatistics"]


class AutogradHeadStatistics(HeadStatistics):
    """Statistics of any head by domain: shapes ``(E, 1, P)`` for its P trainable parameters.

    Args:
        head: maps features ``(rows, ...)`` to logits ``(rows, C)``.
        features: input of the head, ``(rows, ...)``.
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

    @cached_property
    def gradients(self) -> Tensor:
        """Mean gradients, ``(E, 1, P)``."""
        return global_sum(self._flat(vmap(grad(self._objective), in_dims=(None, 1))(self.parameters, self.shares)))

    def hessian_vector(self, vectors: Tensor) -> Tensor:
        """``H_e V_e`` for vectors ``(E, 1, P)``."""
        return self._products(vectors, self.shares)

    def mean_hessian_vector(self, vector: Tensor) -> Tensor:
        """``(mean of the H_e) V`` for one vector ``(1, P)``."""
        return self._products(vector.unsqueeze(0), self.mean_shares)[0]

    def _products(self, vectors: Tensor, shares: Tensor) -> Tensor:
        # Twice in reverse: torch's forward mode compiles its rules on first use, which warns and takes seconds.
        def directional(parameters: dict[str, Tensor], vector: dict[str, Tensor], share: Tensor) -> Tensor:
            gradients = grad(self._objective)(parameters, share)
            return sum(((gradients[name] * vector[name]).sum() for name in gradients), start=share.new_zeros(()))

        return global_sum(
            self._flat(vmap(grad(directional), in_dims=(None, 0, 1))(self.parameters, self._unflat(vectors), shares))
        )

    @cached_property
    def gradient_variances(self) -> Tensor:
        """Variance of the samples' gradients by domain, ``(E, 1, P)``; holds ``(rows, P)`` gradients."""
        loss, rows = self.loss, self.loss.target.shape
        weight, positive = (filled(x, self.features, (1, 1)).expand(rows) for x in (loss.weight, loss.positive))

        def of_sample(parameters: dict[str, Tensor], feature: Tensor, *parts: Tensor) -> Tensor:
            logits = functional_call(self.head, self._fixed | parameters, (feature.unsqueeze(0),))
            return numerators(loss.kind, logits.reshape(-1), *parts) / loss.elements

        if len(self.features):
            gradients = vmap(grad(of_sample), in_dims=(None, 0, 0, 0, 0))(
                self.parameters, self.features, loss.target, weight, positive
            )
            flat = self._flat(gradients)[:, 0]
        else:  # which vmap does not take
            width = sum(p.numel() for p in self.parameters.values())
            flat = self.features.flatten(1).sum(1, keepdim=True).expand(0, width)
        shares = self.sample_shares
        mean, square = global_sum(torch.stack((shares.T @ flat, shares.T @ flat.square())))
        return (square - mean.square()).unsqueeze(1)

    def gradient_distances(self, *, detach_target: bool = False, relative: bool = False) -> Tensor:
        """``|G_e - mean G|^2``."""
        return distances_from(self.gradients, self.mean(self.gradients), detach_target, self.scale(relative))

    def product_distances(self, *, detach_target: bool = False, relative: bool = False) -> Tensor:
        """``|H_e G_e - (mean H)(mean G)|^2``."""
        target = self.mean_hessian_vector(self.mean(self.gradients))
        return distances_from(self.hessian_vector(self.gradients), target, detach_target, self.scale(relative))

    def diagonal_distances(self, *, detach_target: bool = False, relative: bool = False) -> Tensor:
        """Not available."""
        raise _only_linear("the diagonal of the Hessian")

    @cached_property
    def diagonals(self) -> Tensor:
        """Not available."""
        raise _only_linear("the diagonal of the Hessian")

    @cached_property
    def traces(self) -> Tensor:
        """Not available."""
        raise _only_linear("the trace of the Hessian")

    def squared_hessian_distances(self, *, detach_target: bool = False, relative: bool = False) -> Tensor:
        """Not available."""
        raise _only_linear("the Frobenius distance of Hessians")


def _like(x: Tensor, features: Tensor) -> Tensor:
    """A head in half precision is differentiated in the precision of its features, which are float32 at least."""
    return x.to(features.dtype) if x.dtype in (torch.float16, torch.bfloat16) else x


def _only_linear(what: str) -> DebiasError:
    return DebiasError(
        f"Expected a linear head for {what}, but got `derivatives='autograd'`. Take `statistic='hgp'` or 'hutchinson',"
        " or name the last linear layer (`head='dotted.path'`)."
    )

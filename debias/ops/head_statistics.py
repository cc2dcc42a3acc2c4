"""Gradients and Hessians of the classifier head by domain, in closed form.

For a linear head ``z_i = W f_i + b`` every derivative of the loss with respect to ``(W, b)`` is made of three things,
the head's input ``a_i = (f_i, 1)``, the residual ``r_i = d l_i / d z_i``, the curvature ``S_i = d^2 l_i / d z_i^2``
(:mod:`debias.ops.head_losses`)::

    gradient of sample i            r_i (x) a_i
    mean gradient of domain e       G_e = sum_i w_ie r_i (x) a_i
    Hessian times V                 H_e V = sum_i w_ie (S_i V a_i) (x) a_i
    diagonal of the Hessian         sum_i w_ie diag(S_i) (x) a_i^2
    Hessian                         H_e = sum_i w_ie S_i (x) (a_i a_i^T)
    <H_a, H_b>                      sum_ij w_ia w_jb <S_i, S_j> <a_i, a_j>^2          (Gram identity)

with ``w_ie = 1 / (denominators of domain e)`` for the samples of e, 0 for others. Each is one matrix product over all
domains; no ``(N, C, d)`` tensor is made, and gradients of a penalty built from them need one ordinary backward pass.
Every sum over samples is a sum over ranks too, so the statistics are those of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from debias.ops.distributed import gathers, global_rank, global_sum, global_sums, is_distributed
from debias.ops.domains import domain_shares
from debias.ops.head_distances import (
    distances_by_pairs,
    distances_from,
    gram_of,
    hessian_distances_by_pairs,
    in_blocks,
    sums_over_rows,
    times,
)
from debias.ops.head_losses import HeadLoss

__all__ = ["HeadStatistics"]

# Numbers of all Hessians that cost nothing beside what a step costs anyway, and that ranks may send.
_FEW, _SENT = 2**16, 2**22


@dataclass(eq=False)
class HeadStatistics:
    """Statistics of a linear head by domain, over the global batch.

    Args:
        features: input of the head, ``(rows, d)``.
        loss: the loss of the rows.
        members: which row is in which domain, boolean ``(rows, E)``; a row may be in none.
        bias: whether the head has one; then all statistics have ``d + 1`` columns, the last for the bias.

    Attributes:
        membership: the members that count, as numbers, ``(rows, E)``.
    """

    features: Tensor
    loss: HeadLoss
    members: Tensor
    bias: bool = True
    membership: Tensor = field(init=False)

    def __post_init__(self) -> None:
        den = self.loss.den.detach()
        self.membership = (self.members & (den != 0).unsqueeze(1)).to(den.dtype)
        self._made: dict[str, Tensor] = {}
        self._shared: set[str] = set()  # those that may enter only what every rank computes alike

    # -- sums over the rows of all ranks, by domain ------------------------------------------------

    def ahead(self, *names: str, shared: bool = True) -> None:
        """Make sums that will be needed, and :attr:`den` and :attr:`counts` with the first, in one message.

        Args:
            *names: of sums: a method ``_local_<name>`` makes this rank's.
            shared: see :func:`debias.ops.distributed.global_sum`.
        """
        if not is_distributed():
            return
        if not shared:  # what was made for another purpose is of no use
            for name in self._shared.intersection(names):
                del self._made[name]
                vars(self).pop(name, None)
        missing = [name for name in (*names, "den", "counts") if name not in self._made]
        if missing:
            self._shared = self._shared.union(names) if shared else self._shared.difference(names)
            sums = global_sums([getattr(self, f"_local_{name}")() for name in missing], shared=shared)
            self._made.update(zip(missing, sums, strict=True))

    def _sum(self, name: str) -> Tensor:
        self.ahead(name)
        if name not in self._made:
            self._made[name] = getattr(self, f"_local_{name}")()
        return self._made[name]

    def _local_den(self) -> Tensor:
        return self.loss.den.detach() @ self.membership

    def _local_counts(self) -> Tensor:
        return self.membership.sum(0)

    def _local_gradients(self) -> Tensor:
        return self._by_domain(self.loss.residuals)

    def _local_diagonals(self) -> Tensor:
        return self._by_domain(self.loss.diagonal, squared=True)

    def _local_hessians(self) -> Tensor:
        def of_rows(rows: slice) -> Tensor:
            a = self.features[rows]
            a = torch.cat((a, a.new_ones(len(a), 1)), 1) if self.bias else a
            squares = (a.unsqueeze(2) * a.unsqueeze(1)).flatten(1)
            matrices = self.loss.map(lambda x: x[rows]).matrices
            return sums_over_rows(self.membership[rows].unsqueeze(2) * matrices.unsqueeze(1), squares, bias=False)

        return in_blocks(of_rows, len(self.features), (self.features.shape[1] + self.bias) ** 2)

    def _local_sample_gradients(self) -> Tensor:
        return self._by_domain(self._sample_residuals)

    def _local_sample_squares(self) -> Tensor:
        return self._by_domain(self._sample_residuals.square(), squared=True)

    def _by_domain(self, rows: Tensor, *, squared: bool = False) -> Tensor:
        """``sum_i m_ie c_i (x) a_i``, ``(E, C, D)``, from coefficients ``(rows, C)``, with the membership m."""
        coefficients = self.membership.unsqueeze(2) * rows.unsqueeze(1)
        return sums_over_rows(coefficients, self.features, bias=self.bias, squared=squared)

    @cached_property
    def _sample_residuals(self) -> Tensor:
        """Of a sample's own loss: the mean over its labels, and without division by the batch."""
        return self.loss.residuals / self.loss.elements if self.loss.elements != 1 else self.loss.residuals

    @property
    def den(self) -> Tensor:
        """Denominators by domain, ``(E,)``, without gradient; 0 for a domain that is absent."""
        return self._sum("den")

    @property
    def counts(self) -> Tensor:
        """Samples that count by domain, ``(E,)``."""
        return self._sum("counts")

    # -- weights -----------------------------------------------------------------------------------

    @cached_property
    def present(self) -> Tensor:
        """Which domains are in the global batch, boolean ``(E,)``."""
        return self.den != 0

    @cached_property
    def domain_shares(self) -> Tensor:
        """Weight of each domain in the mean over those that are present, ``(E,)``."""
        return domain_shares(self.present, self.den.dtype)

    @cached_property
    def divisors(self) -> Tensor:
        """The denominators, 1 where a domain is absent, ``(E, 1, 1)``."""
        return (self.den + self.present.logical_not()).view(-1, 1, 1)

    @cached_property
    def shares(self) -> Tensor:
        """Weight of each row in its domain's mean, ``(rows, E)``."""
        return self.membership / self.divisors.view(-1)

    @cached_property
    def all_shares(self) -> Tensor:
        """:attr:`shares` and, last, the weight of each row in the mean over domains, ``(rows, E + 1, 1)``."""
        mean = (self.shares * self.domain_shares).sum(1, keepdim=True)
        return torch.cat((self.shares, mean), 1).unsqueeze(2)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of ``(E, C, D)`` over the domains that are present; those of an absent one are finite."""
        return (values * self.domain_shares.view(-1, 1, 1)).sum(0)

    def scale(self, relative: bool) -> Tensor | None:
        """Weights of the domains in the mean that relative distances are divided by."""
        return self.domain_shares if relative else None

    # -- statistics --------------------------------------------------------------------------------

    @cached_property
    def gradients(self) -> Tensor:
        """Mean gradients G_e, ``(E, C, D)``; 0 for an absent domain."""
        return self._sum("gradients") / self.divisors

    @cached_property
    def diagonals(self) -> Tensor:
        """Diagonals of the Hessians, ``(E, C, D)``."""
        return self._sum("diagonals") / self.divisors

    @cached_property
    def hessians(self) -> Tensor:
        """The Hessians, ``(E, C C, D D)``, and where no two logits share a loss their blocks, ``(E, C, D D)``."""
        return self._sum("hessians") / self.divisors

    def local_products(self, vectors: Tensor) -> Tensor:
        """This rank's part of ``H_e V_e`` and, last, ``(mean of the H_e) V``, for vectors ``(E + 1, C, D)``."""
        curved = self.loss.curvature(self._images(vectors))
        return sums_over_rows(self.all_shares * curved, self.features, bias=self.bias)

    def products(self, vectors: Tensor) -> Tensor:
        """``H_e V_e`` and, last, ``(mean of the H_e) V``, for vectors ``(E + 1, C, D)``, in one message; from these
        every rank computes the same.
        """
        return global_sum(self.local_products(vectors), shared=True)

    def _images(self, vectors: Tensor) -> Tensor:
        """``V a_i`` for every row i, from vectors ``(..., D)``; ``(rows, ...)``."""
        flat, width = vectors.flatten(0, -2), self.features.shape[1]
        weight, bias = (flat[:, :width], flat[:, width]) if self.bias else (flat, None)
        return F.linear(self.features, weight, bias).unflatten(1, vectors.shape[:-1])

    @cached_property
    def gradient_variances(self) -> Tensor:
        """Variance of the samples' gradients by domain, ``(E, C, D)``; 0 for one sample and for none."""
        self.ahead("sample_gradients", "sample_squares")
        counts = self.counts.clamp_min(1).view(-1, 1, 1)
        return self._sum("sample_squares") / counts - (self._sum("sample_gradients") / counts).square()

    # -- squared distances from the mean over domains, ``(E,)``; relative ones are divided by the domains' mean squared
    # norm, or that of the target where it is larger, through which no gradient goes --

    def by_pairs(self, cheaper: int) -> bool:
        """Whether distances are computed from inner products of samples, without making a ``(E, C, D)`` tensor.

        They cost ``rows^2 D``, where sums cost ``rows E C D``, ``cheaper`` times over. Over several ranks sums are
        taken, so that no sample leaves its rank.
        """
        return (
            not is_distributed() and len(self.features) <= cheaper * self.members.shape[1] * self.loss.logits.shape[1]
        )

    @cached_property
    def _gram(self) -> tuple[Tensor, Tensor]:
        return gram_of(self.features, self.bias)

    @cached_property
    def _residuals(self) -> Tensor:
        """Coefficients of the mean gradients and, last, of their mean, ``(rows, E + 1, C)``."""
        return self.all_shares * self.loss.residuals.unsqueeze(1)

    def gradient_distances(self, *, detach_target: bool = False, relative: bool = False) -> Tensor:
        """``|G_e - mean G|^2``."""
        if "_gram" in vars(self) or self.by_pairs(2):  # made already where the Hessian's products were compared first
            return distances_by_pairs(self._residuals, self._gram, detach_target, self.scale(relative))
        return distances_from(self.gradients, self.mean(self.gradients), detach_target, self.scale(relative))

    def product_distances(self, *, detach_target: bool = False, relative: bool = False) -> Tensor:
        """``|H_e G_e - (mean H)(mean G)|^2``."""
        if self.by_pairs(5):
            curved = self.all_shares * self.loss.curvature(times(self._gram[0], self._residuals))
            return distances_by_pairs(curved, self._gram, detach_target, self.scale(relative))
        self.ahead("gradients", shared=False)  # the products take them back to the rows of each rank
        vectors = torch.cat((self.gradients, self.mean(self.gradients).unsqueeze(0)))
        both = self.products(vectors)
        return distances_from(both[:-1], both[-1], detach_target, self.scale(relative))

    def diagonal_distances(self, *, detach_target: bool = False, relative: bool = False) -> Tensor:
        """``|diag H_e - mean diag H|^2``."""
        if self.by_pairs(2):
            own = self.all_shares * self.loss.diagonal.unsqueeze(1)
            gram = gram_of(self.features.square(), self.bias)
            return distances_by_pairs(own, gram, detach_target, self.scale(relative))
        self.ahead("gradients", "diagonals")
        return distances_from(self.diagonals, self.mean(self.diagonals), detach_target, self.scale(relative))

    def estimated_diagonal_distances(
        self, *, n_samples: int, generator: torch.Generator | None, detach_target: bool = False, relative: bool = False
    ) -> Tensor:
        """Those of Hutchinson's estimates by Rademacher vectors, one product after the other as published."""
        shape = self.gradients.shape
        estimates: Any = 0  # for each domain and, last, for the mean over them
        for _ in range(n_samples):
            bits = torch.randint(0, 2, (shape[0] + 1, *shape[1:]), generator=generator, device=self.features.device)
            signs = (2 * bits - 1).to(self.features.dtype)
            if generator is None:  # that of the process, which need not be where those of the other ranks are
                signs = global_sum(signs * (global_rank() == 0))
            estimates = estimates + signs * self.local_products(signs)
        estimates = global_sum(estimates, shared=True) / n_samples
        return distances_from(estimates[:-1], estimates[-1], detach_target, self.scale(relative))

    def hessian_distances(self, *, detach_target: bool = False, relative: bool = False) -> Tensor:
        """``|H_e - mean H|^2`` (Frobenius), from the Hessians or by the Gram identity, whichever is cheaper.

        Over several ranks the Hessians are summed if they are few numbers; else the rows of all ranks are gathered.
        """
        if self.hessians_fit():
            self.ahead("gradients", "hessians")
            return distances_from(self.hessians, self.mean(self.hessians), detach_target, self.scale(relative))
        self.ahead("gradients")
        columns = [self.features, self.shares]

        def note(x: Tensor) -> Tensor:
            columns.append(x)
            return x

        self.loss.map(note)
        gathered = iter(gathers(columns))
        features, shares = next(gathered), next(gathered)
        loss = self.loss.map(lambda _: next(gathered))
        return hessian_distances_by_pairs(
            features, self.bias, loss, shares, self.domain_shares, detach_target, relative
        )  # fmt: skip

    def hessians_fit(self) -> bool:
        """Whether making the Hessians is cheaper than comparing rows in pairs; on all ranks alike."""
        (rows, width), (n_domains, classes) = self.features.shape, (self.members.shape[1], self.loss.logits.shape[1])
        width += self.bias
        numbers = n_domains * self.loss.blocks * width**2
        return numbers <= (_SENT if is_distributed() else max(_FEW, rows * (width + 3 * classes + n_domains)))

"""Mixup, CutMix and LISA's selective pairs: train on mixtures of two samples.

With a partner ``p(i)`` of each sample and one ``share`` a batch, drawn from Beta(alpha, alpha)::

    x'_i = share x_i + (1 - share) x_p(i)                                 Mixup: Zhang et al., ICLR 2018, 1710.09412
    x'_i = x_i with a box of x_p(i) pasted, share = 1 - its area          CutMix: Yun et al., ICCV 2019, 1905.04899
    loss = sum_i share loss(x'_i, y_i) + (1 - share) loss(x'_i, y_p(i))

LISA (Yao et al., ICML 2022, arXiv 2201.00299, section 3) chooses the partners: with probability ``p_same_label`` of the
same label from another domain, so that the domain is no clue to the label, else of the same domain with another label.
Defaults are those of its code on images: alpha 2, p_same_label 0.5, every batch mixed. Mixup was published with alpha
0.2 (ImageNet) and 1 (CIFAR), CutMix with alpha 1, and LISA's code takes 0.2 for CutMix.

Hard labels stay in the batch, so the step's own metrics compare with the sample's own label. The loss is taken apart:
each sample counts ``share`` with its own label, in its own group, and ``1 - share`` with its partner's label in its
partner's group, so Group DRO and penalties see soft memberships. For losses linear in the target (cross-entropy, binary
cross-entropy) this is the loss with soft targets; for others, such as the squared error, it has the same gradient or is
the mixture of the two losses.

Differences from LISA's code: it reads as many samples of each group, where here batches are what the loader gives
(``GroupBalancedSampler`` for the same), and its Mixup draws a share for each sample, where here one share a batch goes
for both forms. SubpopBench's version draws one share as well; it loops over classes and domains, leaves out a sample
with no partner that satisfies the rule and repeats until the batch is full. Here such a sample (a class with one domain
in the batch, an unlabelled sample) stays as it is, as does a batch of one. Costs one pass over the input, an ``(N, N)``
table for selective pairs, and the loss twice (not the network).
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from debias.errors import BatchKeyError, DebiasError
from debias.methods.base import LossOptions, Method
from debias.ops.fields import arguments
from debias.ops.pairs import cutmix, cutmix_box, mixup, random_partners, selective_pairs
from debias.step.batch import BatchKey, describe, replace
from debias.step.context import Step

__all__ = ["GroupMixup", "GroupMixupLayer", "cutmix", "mixup", "selective_pairs"]


@arguments(kw_only=False, alpha="(0, inf)", p_same_label="[0, 1]")
class GroupMixupOptions:
    """Who is mixed with whom, and how.

    Args:
        pairs: who is mixed: ``"any"`` (plain Mixup), ``"same_label"`` across domains, ``"same_domain"`` across labels,
            or ``"selective"``, one of the two rules by chance.
        mix: ``"mixup"`` or, for images ``(N, C, H, W)``, ``"cutmix"``.
        alpha: parameter of the Beta distribution of the share.
        p_same_label: probability of pairs with the same label, for ``pairs="selective"``.
    """

    pairs: Literal["any", "same_label", "same_domain", "selective"] = "selective"
    mix: Literal["mixup", "cutmix"] = "mixup"
    alpha: float = 2.0
    p_same_label: float = 0.5


@arguments
class GroupMixupLayer(GroupMixupOptions, nn.Module):
    """Mixup, CutMix and LISA's selective pairs as an ordinary layer, which draws from torch's global random numbers;
    the identity in eval mode.

    Shape:
        x ``(N, ...)``, for CutMix ``(N, C, H, W)``; labels and domains int64 ``(N,)``, needed unless ``pairs="any"``.
        Output: the new x, partners int64 ``(N,)`` and shares ``(N,)``; the loss is then
        ``(shares * losses(labels) + (1 - shares) * losses(labels[partners])).mean()``.
    """

    def __post_init__(self) -> None:
        nn.Module.__init__(self)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, domains: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix a batch."""
        if not self.training:
            own = torch.arange(x.shape[0], device=x.device)
            return x, own, torch.ones(x.shape[0], device=x.device)
        seed = int(torch.randint(2**62, ()))
        return self.apply_draw(x, *self.draw(torch.Generator(x.device).manual_seed(seed), x.shape, labels, domains))

    def draw(
        self, generator: torch.Generator, shape: torch.Size, labels: Tensor | None, domains: Tensor | None
    ) -> tuple[Tensor, float, tuple[int, int, int, int] | None]:
        """Partners, share and, for CutMix, the box, for a batch of this shape."""
        n, device = shape[0], generator.device
        # Decisions of the whole batch are made on the host, so that nothing waits for them.
        host = np.random.default_rng(generator.initial_seed())
        share, choice, down, across = host.beta(self.alpha, self.alpha), host.random(), host.random(), host.random()
        box = cutmix_box(share, (down, across), (shape[2], shape[3])) if self.mix == "cutmix" else None
        if self.pairs == "any":
            return torch.randperm(n, generator=generator, device=device), share, box
        if labels is None or domains is None:
            raise DebiasError(f"Expected `labels` and `domains` with `pairs={self.pairs!r}`, but got None.")
        same_label = choice < self.p_same_label if self.pairs == "selective" else self.pairs == "same_label"
        scores = torch.rand(n, n, generator=generator, device=device, dtype=torch.float32)
        return random_partners(selective_pairs(labels, domains, same_label=same_label), scores), share, box

    def apply_draw(
        self, x: Tensor, partners: Tensor, share: float, box: tuple[int, int, int, int] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix a batch as drawn."""
        mixed = None
        if box is not None:
            mixed, share = cutmix(x, partners, box)
        alone = partners == torch.arange(x.shape[0], device=x.device)
        shares = alone.to(torch.float64 if x.dtype == torch.float64 else torch.float32) * (1 - share) + share
        return (mixup(x, partners, shares) if mixed is None else mixed), partners, shares


@arguments
class DomainsIfNeeded(LossOptions, Method):
    """A method that asks who is of one domain, if at all.

    Args:
        domain: where the domain ids are: a tag, an index, a name, a dotted path, a callable, or a tuple of these whose
            ids are crossed; not needed for ``pairs="any"``.
        n_domains: number of domains, one per key; only needed where several keys are crossed.
    """

    domain: tuple[BatchKey, ...] | BatchKey | None = field(default=None, kw_only=False)
    n_domains: int | tuple[int, ...] | None = field(default=None, kw_only=False)


@arguments(p="[0, 1]")
class GroupMixup(GroupMixupOptions, DomainsIfNeeded):
    """Train on mixtures of two samples, chosen by label and domain, with hard labels left in the batch.

    Pairs of one label from two domains, and of two labels from one domain, loosen the link between domain and label
    that a shortcut uses.

    Args:
        p: probability that a batch is mixed.
        input: where the input is in the batch, a floating-point tensor ``(N, ...)``.
        target: where the labels are, int64 ``(N,)``; not needed for ``pairs="any"``.
        loss: which loss the labels belong to, if the step computes several; see :class:`debias.Debiaser`.

    Example:
        >>> from debias import GroupDRO, GroupMixup
        >>> callbacks = [GroupMixup(domain="place"), GroupDRO(group="place", n_groups=2)]
    """

    needs = ("domain", "target")
    reference = "Yao et al., ICML 2022, arXiv 2201.00299; Mixup 1710.09412; CutMix 1905.04899"
    works = "Domains or groups are known, and each batch has samples to pair."
    fails = "Labels say something about parts of the input. A sample without a partner stays as it is."
    module_class = GroupMixupLayer

    p: float = 1.0
    input: BatchKey = 0
    target: BatchKey = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        domain, n_domains = self.domain, self.n_domains
        if self.pairs != "any" and domain is None:
            raise DebiasError(
                f"Expected `domain` with `pairs={self.pairs!r}`, but got None. Say where the domain ids are, or use"
                " `pairs='any'`, plain Mixup."
            )
        keys = len(domain) if isinstance(domain, tuple | list) else 1
        if isinstance(domain, tuple | list) and (not isinstance(n_domains, tuple | list) or len(n_domains) != keys):
            raise DebiasError(
                f"Expected `n_domains` to hold one number for each key of `domain={domain!r}`, but got {n_domains!r}."
            )

    def augment(self, step: Step) -> None:
        """Mix the input, and say whose labels it now stands for."""
        x = step.read(self.input, argument="input")
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1 + 3 * (self.module.mix == "cutmix"):
            rule = "images (N, C, H, W)" if self.module.mix == "cutmix" else "a tensor (N, ...)"
            kind = f" of {x.dtype}" if isinstance(x, Tensor) else ""
            raise BatchKeyError(
                f"Expected `input={self.input!r}` to be {rule} of a floating-point type, but got {describe(x)}{kind}."
                " Name the place of the input in the batch."
            )
        mixture = step.mixed(x.shape[0], loss=self.loss, owner=type(self).__name__)
        labels = domains = None
        if self.module.pairs != "any":
            labels = step.ids(self.target, 1, argument="target")
            domains = step.ids(self.domain, self.n_domains or 1, argument="domain")
            for argument, ids in (("target", labels), ("domain", domains)):
                if ids.ndim != 1:
                    raise BatchKeyError(
                        f"Expected `{argument}` of GroupMixup to hold one id per sample, shape (N,), but got a"
                        f" membership of shape {tuple(ids.shape)}: which samples are alike cannot be told. Use"
                        " `pairs='any'`, or give ids."
                    )
        if self.random.chance("mix") >= self.p:
            return
        drawn = self.random.draw("mix", x.device, lambda g: self.module.draw(g, x.shape, labels, domains))
        mixed, partners, shares = self.module.apply_draw(x, *drawn)
        step.batch = replace(step.batch, self.input, mixed)
        mixture.mix(partners, shares)

"""MixStyle: mix the styles of samples inside the network. Zhou et al., ICLR 2021, arXiv 2104.02008, section 2.2.

With mean ``mu`` and standard deviation ``sigma`` of each channel of each sample, without gradient, and a random partner
``p(i)`` of each sample::

    share_i ~ Beta(alpha, alpha)
    mu'_i    = share_i mu_i    + (1 - share_i) mu_p(i)           and sigma' likewise
    x'_i     = sigma'_i (x_i - mu_i) / sigma_i + mu'_i

A forward pass is changed with probability ``p``, the whole batch or none of it; labels stay. Defaults are the published
values: p 0.5, alpha 0.1, variances unbiased with 1e-6 added. Published placement: after the first two residual stages
(OfficeHome, re-identification) or the first three (PACS), never the last. For vision transformers, which the paper does
not have, the layers are the blocks at a quarter and at half the depth, and the statistics those of the patch tokens.

Differences from the authors' code: partners from another domain are found by the samples' domains, where theirs takes
the two halves of the batch for the domains and fails on odd batches; all ranks decide alike whether a pass is changed;
a sample may be the partner of several. A sample whose domain is unknown (negative), or that is alone with its domain in
the batch, keeps its style; so does a batch of one. Costs two passes over the output of each layer, no parameters; with
``sync_stats=True`` one gather of ``2 C + 2`` floats a sample, layer and changed step, which waits for the device.
"""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import torch
from torch import Tensor, nn

from debias.errors import DebiasError
from debias.methods.base import LayerAugmenter
from debias.ops.arguments import checked
from debias.ops.distributed import gather, global_rank, is_distributed
from debias.ops.fields import arguments
from debias.ops.pairs import beta_shares, other_domains, random_partners
from debias.ops.styles import restyle, style
from debias.step.batch import BatchKey

__all__ = ["MixStyle", "MixStyleLayer", "mix_style"]


@checked("x: float N C H W | float N T C, partners: int N < N, shares: float N", eps="[0, inf)")
def mix_style(x: Tensor, partners: Tensor, shares: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Feature maps whose styles are mixed with those of their partners.

    Args:
        x: feature maps ``(N, C, H, W)`` or tokens ``(N, T, D)``.
        partners: int64 ``(N,)``.
        shares: what each sample keeps of its own style, ``(N,)`` in [0, 1].
        eps: added to variances.

    Returns:
        The same shape and dtype. No gradient flows through the statistics.

    Example:
        >>> import torch
        >>> from debias.functional import mix_style
        >>> x = torch.tensor([[[1.0], [3.0]], [[10.0], [30.0]]])
        >>> mix_style(x, torch.tensor([1, 0]), torch.tensor([0.0, 1.0])).flatten().round()
        tensor([10., 30., 10., 30.])
    """
    with torch.no_grad():
        mean, std = style(x, eps=eps)
        mixed = _mixed(mean, std, mean[partners], std[partners], shares)
    return restyle(x, mean, std, *mixed)


def _mixed(mean: Tensor, std: Tensor, means: Tensor, stds: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Styles mixed with those of partners."""
    kept = shares.to(mean.dtype).view(-1, *[1] * (mean.ndim - 1))
    return torch.lerp(means, mean, kept), torch.lerp(stds, std, kept)


@arguments(kw_only=False, of=mix_style, p="[0, 1]", alpha="(0, inf)")
class MixStyleOptions:
    """Options of MixStyle, at the published values.

    Args:
        p: probability that a pass is changed.
        alpha: parameter of the Beta distribution; small values rarely mix, but then strongly.
    """

    p: float = 0.5
    alpha: float = 0.1
    _: KW_ONLY
    eps: float = 1e-6


@arguments
class MixStyleLayer(MixStyleOptions, nn.Module):
    """MixStyle as an ordinary layer, which draws from torch's global random numbers; the identity in eval mode.

    Shape:
        x ``(N, C, H, W)`` or ``(N, T, D)``, domains int64 ``(N,)`` or None for partners of any domain; output like x.
    """

    def __post_init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, x: Tensor, domains: Tensor | None = None) -> Tensor:
        """Mix styles, with probability ``p``."""
        n = x.shape[0]
        if not self.training or n < 2 or float(torch.rand((), dtype=torch.float32)) >= self.p:
            return x
        if domains is None:
            partners = torch.randperm(n, device=x.device)
        else:
            partners = random_partners(other_domains(domains), torch.rand(n, n, device=x.device, dtype=torch.float32))
        alpha = torch.tensor(self.alpha, dtype=torch.float64)
        shares = torch.distributions.Beta(alpha, alpha).sample((n,)).to(x.device, non_blocking=True)
        return mix_style(x, partners, shares, eps=self.eps)


@arguments
class MixStyle(MixStyleOptions, LayerAugmenter):
    """Mix the channel statistics of samples at chosen layers, during training only.

    Channel statistics carry style, such as colour and contrast, while labels stay; a style that changes at random is no
    clue to the label.

    By default the layers are ``layer1`` and ``layer2`` of a ResNet, the blocks at a quarter and half the depth of a
    vision transformer. A layer of a frozen part of the network that is in eval mode stays as it is.

    Args:
        domain: where the domain ids are, for partners from another domain; None for partners of any domain.
        sync_stats: under DDP, partners from the batches of all ranks.
        rows: with ``domain``, how the rows of a layer come from the samples where there are several each.

    Example:
        >>> from debias import MixStyle
        >>> MixStyle(layers=["net.layer1", "net.layer2"], domain="site").state_key
        'MixStyle'
    """

    reference = "Zhou et al., ICLR 2021, arXiv 2104.02008"
    works = "Domains differ in style: colour, contrast, texture."
    fails = "Style tells the class, or domains differ in shape and content."

    domain: BatchKey | None = None
    sync_stats: bool = False
    rows: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.domain, tuple | list):
            raise DebiasError(
                f"Expected `domain` of MixStyle to be one key, but got {self.domain!r}. Tag the crossed ids: which are"
                " alike is all that counts."
            )

    def begin(self, step: Any) -> None:
        """Read the domains, so that an error comes before the step."""
        if self.domain is not None:
            step.ids(self.domain, 1, argument="domain")

    def change(self, x: Tensor, path: str) -> Tensor:
        """Mix the styles of the rows of a layer."""
        if self.random.chance(path) >= self.p:
            return x
        domains = None
        if self.domain is not None:
            ids = self.step.ids(self.domain, 1, argument="domain")  # type: ignore[union-attr]
            domains = self.ids_of_rows(ids, x.shape[0])
        if self.sync_stats and is_distributed():
            return self._among_all(x, path, domains)
        return mix_style(x, *self._draw(path, x.device, x.shape[0], domains, shared=False), eps=self.eps)

    def _draw(
        self, path: str, device: torch.device, n: int, domains: Tensor | None, *, shared: bool
    ) -> tuple[Tensor, Tensor]:
        def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            shares = beta_shares(generator, self.alpha, n, device)
            if domains is None:
                return torch.randperm(n, generator=generator, device=device), shares
            scores = torch.rand(n, n, generator=generator, device=device, dtype=torch.float32)
            return random_partners(other_domains(domains), scores), shares

        return self.random.draw(path, device, sample, shared=shared)

    def _among_all(self, x: Tensor, path: str, domains: Tensor | None) -> Tensor:
        """Partners among the rows of all ranks: their statistics are exchanged, and every rank makes the same draws."""
        with torch.no_grad():
            mean, std = style(x, eps=self.eps)
            known = x.new_zeros(x.shape[0]) if domains is None else domains
            marks = torch.stack((torch.full_like(known, global_rank()), known), dim=1).to(mean.dtype)
            pool = gather(torch.cat([mean.flatten(1), std.flatten(1), marks], dim=1))
            everyone = None if domains is None else pool[:, -1].long()
            partners, shares = self._draw(path, x.device, len(pool), everyone, shared=True)
            # Rows lie in the order of ranks.
            own = (pool[:, -2] < global_rank()).sum() + torch.arange(x.shape[0], device=x.device)
            means, stds = (part.view(-1, *mean.shape[1:]) for part in pool[:, :-2].chunk(2, dim=1))
            mixed = _mixed(mean, std, means[partners[own]], stds[partners[own]], shares[own])
        return restyle(x, mean, std, *mixed)

"""DSU: draw the styles of samples anew, as far as they vary in the batch. Li et al., ICLR 2022, arXiv 2202.03958.

With mean ``mu`` and standard deviation ``sigma`` of each channel of each sample (section 3.2)::

    S_mu = sqrt(var over the batch of mu + eps)          one number a channel; S_sigma likewise
    beta_i = mu_i + factor n_i S_mu        gamma_i = sigma_i + factor m_i S_sigma        n, m ~ N(0, 1)
    x'_i = gamma_i (x_i - mu_i) / sigma_i + beta_i

with ``n_i, m_i`` for each sample and channel. Gradients flow through all statistics, as in the authors' code; ``gamma``
may become negative there too. A forward pass is changed with probability ``p``, the whole batch or none of it. Defaults
are the published ones: p 0.5, factor 1, variances unbiased with 1e-6 added, six places in a ResNet: after ``conv1``,
``maxpool`` and each of the four stages. For vision transformers, which the paper does not have: the blocks at each
quarter of the depth, with statistics of the patch tokens.

Differences from the authors' code: a batch of one has ``S = sqrt(eps)`` where theirs is NaN, as has a channel of one
pixel ``sigma = sqrt(eps)``; all ranks decide alike whether a pass is changed; ``sync_stats=True`` takes ``S`` over the
batches of all ranks, differentiably, at two all-reduces of at most ``2 C + 1`` floats a layer and changed step. Costs
the statistics and their gradient, which are three passes over the output of each layer; no parameters.
"""

from __future__ import annotations

from dataclasses import KW_ONLY

import torch
from torch import Tensor, nn

from debias.methods.base import LayerAugmenter
from debias.ops.distributed import is_distributed
from debias.ops.fields import arguments
from debias.ops.styles import style_shape, uncertain_style

__all__ = ["DSU", "DSULayer", "uncertain_style"]


@arguments(kw_only=False, of=uncertain_style, p="[0, 1]")
class DSUOptions:
    """Options of DSU, at the published values.

    Args:
        p: probability that a pass is changed.
    """

    p: float = 0.5
    factor: float = 1.0
    _: KW_ONLY
    eps: float = 1e-6


@arguments
class DSULayer(DSUOptions, nn.Module):
    """DSU as an ordinary layer, which draws from torch's global random numbers; the identity in eval mode.

    Shape:
        x and output ``(N, C, H, W)`` or ``(N, T, D)``.
    """

    def __post_init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, x: Tensor) -> Tensor:
        """Draw the styles anew, with probability ``p``."""
        if not self.training or float(torch.rand((), dtype=torch.float32)) >= self.p:
            return x
        noise = torch.randn(2, *style_shape(x), device=x.device, dtype=torch.float32)
        return uncertain_style(x, noise, factor=self.factor, eps=self.eps)


@arguments
class DSU(DSUOptions, LayerAugmenter):
    """Draw the channel statistics of samples anew at chosen layers, during training only.

    Channel statistics carry style, such as colour and contrast; a network that sees styles beyond those of its training
    set cannot rely on any of them.

    By default the layers are ``conv1``, ``maxpool`` and the four stages of a ResNet, the blocks at each quarter of the
    depth of a vision transformer. A layer of a frozen part of the network that is in eval mode stays as it is.

    Args:
        sync_stats: under DDP, take the spread over the batches of all ranks.

    Example:
        >>> from debias import DSU
        >>> DSU(p=0.3).state_key
        'DSU'
    """

    reference = "Li et al., ICLR 2022, arXiv 2202.03958"
    works = "The target differs in style, and no domain labels are there."
    fails = "Style tells the class, or batches are small: the spread is that of the batch."
    resnet_layers = ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4")
    vit_blocks = (0.25, 0.5, 0.75, 1.0)

    sync_stats: bool = False

    def change(self, x: Tensor, path: str) -> Tensor:
        """Draw the styles of the rows of a layer anew."""
        if self.random.chance(path) >= self.p:
            return x
        noise = self.random.draw(
            path,
            x.device,
            lambda g: torch.randn(2, *style_shape(x), generator=g, device=g.device, dtype=torch.float32),
        )
        sync = self.sync_stats and is_distributed()
        return uncertain_style(x, noise, factor=self.factor, eps=self.eps, sync_stats=sync)

"""AdvStyle: perturb the styles of samples in the direction that hurts the loss. Zhang et al., arXiv 2301.12643.

As DSU (:mod:`debias.methods.dsu`), with learned spreads ``a_mu, a_sigma`` of each channel of a layer in place of those
of the batch; they *ascend* on the loss that the network descends on::

    beta_i = mu_i + n_i t_mu         gamma_i = sigma_i + m_i t_sigma         n, m ~ N(0, 1)
    t = a                                       intensity="learned"
    t = mix_weight ||S|| a / ||a||              intensity="direction": a gives the direction, the batch the length
    a <- a + lr adv_weight dloss/da             every optimiser step; through momentum 0.9, no weight decay

The authors' code has both: the first with a third each of adversarial, plain DSU and unchanged passes, the second with
halves of adversarial and unchanged ones; these are the defaults of ``p_adversarial`` and ``p_dsu``. Before its first
step ``a`` is the spread ``S`` of DSU over the batches of all ranks. Published: adv_weight 10 (VGG 5), the network's own
learning rate, and the layers of DSU.

Differences from the authors' code: probabilities are arguments (there the one argument is ignored); the spreads are
saved and resumed (there a resumed run starts again from the batch), equal on all ranks, without weight decay, outside
the network, so that its checkpoints are those of plain training; ranks take the same branch; gradients that are not
finite are dropped. Signs of ``a`` mean nothing, since the noise is symmetric. A batch of one is that of DSU. Costs what
DSU costs, ``2 C`` numbers a layer and one all-reduce of them a layer and optimiser step.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from debias.errors import DebiasError
from debias.methods.base import LayerAugmenter
from debias.ops.arguments import MOST, check_count, checked
from debias.ops.distributed import global_sum, is_distributed
from debias.ops.fields import arguments, field_values
from debias.ops.styles import batch_std, restyle, style, style_shape, uncertain_style
from debias.step.owned import OwnedModule

__all__ = ["AdvStyle", "AdvStyleLayer", "adversarial_style"]

Branch = Literal["adversarial", "dsu", "identity"]
_SHARES = {"learned": (1 / 3, 1 / 3), "direction": (1 / 2, 0.0)}  # of adversarial and plain DSU passes, as published


class _Ascend(torch.autograd.Function):
    """The identity, whose gradient is reversed, scaled, and 0 where it is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grad.nan_to_num(0.0, 0.0, 0.0), None


class _Touch(torch.autograd.Function):
    """The first argument, with a gradient of zero for the others: under DDP no parameter may be unused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *unused: Tensor) -> Tensor:
        ctx.save_for_backward(*unused)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(p) for p in ctx.saved_tensors)


@checked("x: float N C H W | float N T C, noise: float 2 N C, spreads: float 2 C", length="[0, inf)", eps="[0, inf)")
def adversarial_style(
    x: Tensor, noise: Tensor, spreads: Tensor, *, strength: float = 1.0, length: float | None = None,
    eps: float = 1e-6, sync_stats: bool = False,
) -> Tensor:  # fmt: skip
    """Feature maps whose styles are drawn with given spreads.

    Args:
        x: feature maps ``(N, C, H, W)`` or tokens ``(N, T, D)``.
        noise: standard normal numbers, ``(2, N, C)`` or ``(2, N, D)``.
        spreads: of means and standard deviations, ``(2, C)`` or ``(2, D)``. Their gradient is reversed, so that
            descending on the loss makes them ascend.
        strength: scales the reversed gradient.
        length: None to take the spreads as they are; else only their directions count, and their lengths are ``length``
            times those of the spreads in the batch.
        eps: added to variances.
        sync_stats: with ``length``, take the spread over the batches of all ranks.

    Returns:
        The same shape and dtype.
    """
    mean, std = style(x, eps=eps)
    spreads = _Ascend.apply(spreads.to(mean.dtype), strength)
    if length is not None:
        in_batch = batch_std(torch.stack((mean, std), dim=1), eps=eps, sync=sync_stats)[0].flatten(1)
        tiny = torch.finfo(spreads.dtype).tiny
        direction = spreads / spreads.norm(dim=1, keepdim=True).clamp_min(tiny)
        spreads = direction * in_batch.norm(dim=1, keepdim=True) * length
    moves = (noise.to(mean.dtype) * spreads.unsqueeze(1)).view(2, *mean.shape)
    return restyle(x, mean, std, mean + moves[0], std + moves[1])


@arguments(
    kw_only=False, p_adversarial="[0, 1]", p_dsu="[0, 1]", adv_weight="[0, inf)", mix_weight="[0, inf)", eps="[0, inf)",
)  # fmt: skip
class AdvStyleOptions:
    """Options of AdvStyle.

    Args:
        intensity: ``"learned"``, or ``"direction"`` to learn the direction and take the length from the batch.
        p_adversarial: probability of an adversarial pass; by default 1/3, with ``"direction"`` 1/2, as published.
        p_dsu: probability of a pass with the spreads of the batch; by default 1/3, with ``"direction"`` 0.
        adv_weight: scales the reversed gradient.
        mix_weight: scales the length, with ``"direction"``.
        eps: added to variances.
    """

    intensity: Literal["learned", "direction"] = "learned"
    p_adversarial: float | None = None
    p_dsu: float | None = None
    adv_weight: float = 1.0
    mix_weight: float = 1.0
    _: KW_ONLY
    eps: float = 1e-6


@arguments
class _Channels(nn.Module):
    """The size of the spreads.

    Args:
        num_channels: channels of the feature maps, or width of the tokens.
    """

    num_channels: int = field(kw_only=False)


@arguments
class AdvStyleLayer(AdvStyleOptions, _Channels):
    """AdvStyle as an ordinary layer with two parameters, which ascend under the network's own optimiser.

    It draws from torch's global random numbers and is the identity in eval mode. Give its parameters no weight decay.
    Under DDP all processes have to draw the same branch: seed torch alike on all of them.

    Shape:
        x and output ``(N, C, H, W)`` or ``(N, T, D)``.
    """

    initialized: Tensor = field(init=False)

    def __post_init__(self) -> None:
        nn.Module.__init__(self)
        self.num_channels = check_count("num_channels", self.num_channels, 1, MOST)
        adversarial, dsu = _SHARES[self.intensity]
        self.p_adversarial = adversarial if self.p_adversarial is None else self.p_adversarial
        self.p_dsu = dsu if self.p_dsu is None else self.p_dsu
        if self.p_adversarial + self.p_dsu > 1 + 1e-9:
            raise DebiasError(
                f"Expected `p_adversarial` and `p_dsu` to sum to at most 1, but got {self.p_adversarial!r} and"
                f" {self.p_dsu!r}. What is left is the share of unchanged passes."
            )
        self.length = None if self.intensity == "learned" else self.mix_weight
        self.spreads = nn.Parameter(torch.full((2, self.num_channels), 0.1))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self._ready = False  # the same on the host, where asking does not wait

    def forward(self, x: Tensor) -> Tensor:
        """Perturb the styles, by chance."""
        if not self.training:
            return x
        self.prepare(x)
        noise = torch.randn(2, *style_shape(x), device=x.device, dtype=torch.float32)
        branch = self.branch(float(torch.rand((), dtype=torch.float32)))
        return _Touch.apply(x, self.spreads) if branch == "identity" else self.change(x, noise, branch)

    def branch(self, chance: float) -> Branch:
        """What happens to a pass, from a number in [0, 1)."""
        adversarial, dsu = self.p_adversarial or 0.0, self.p_dsu or 0.0
        if chance < adversarial:
            return "adversarial"
        return "dsu" if chance < adversarial + dsu else "identity"

    @torch.no_grad()
    def prepare(self, x: Tensor) -> None:
        """Before the first pass that has samples, take the spreads from the batches of all ranks."""
        if self._ready:
            return
        samples = float(global_sum(torch.tensor(float(len(x)), device=x.device))) if is_distributed() else len(x)
        if samples:
            statistics = torch.stack(style(x, eps=self.eps), dim=1)
            self.spreads.copy_(batch_std(statistics, eps=self.eps, sync=is_distributed())[0].flatten(1))
            self.initialized.fill_(True)
            self._ready = True

    def change(self, x: Tensor, noise: Tensor, branch: Branch, *, sync_stats: bool = False) -> Tensor:
        """A pass that is not the identity."""
        if branch == "dsu":
            return _Touch.apply(uncertain_style(x, noise, eps=self.eps, sync_stats=sync_stats), self.spreads)
        return adversarial_style(
            x, noise, self.spreads, strength=self.adv_weight, length=self.length, eps=self.eps, sync_stats=sync_stats
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = bool(self.initialized)


@arguments(lr="[0, inf)", lr_ratio="[0, inf)")
class AdvStyle(AdvStyleOptions, LayerAugmenter):
    """Perturb channel statistics adversarially at chosen layers, during training only.

    Channel statistics carry style, such as colour and contrast; the network meets the styles that it copes with worst,
    so that relying on style does not pay.

    By default the layers are those of :class:`debias.DSU`; each draws its own branch in a step. The spreads ascend in
    steps of their own SGD when the network's optimiser steps; under manual optimisation it is refused.

    Args:
        lr: learning rate of the spreads, or None for the network's times ``lr_ratio``.
        lr_ratio: see ``lr``.
        sync_stats: under DDP, take spreads over the batches of all ranks.

    Example:
        >>> from debias import AdvStyle
        >>> AdvStyle(layers="net.layer[123]", adv_weight=10.0).state_key
        'AdvStyle'
    """

    stateful = True
    reference = "Zhang et al., arXiv 2301.12643"
    works = "The target differs in style from a single source."
    fails = "Style tells the class. Optimisation is manual, which is refused."
    resnet_layers = ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4")
    vit_blocks = (0.25, 0.5, 0.75, 1.0)

    lr: float | None = None
    lr_ratio: float = 1.0
    sync_stats: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._make(1)  # refuses wrong arguments now
        self._saved: dict[str, Any] = {}

    def _make(self, num_channels: int) -> AdvStyleLayer:
        return AdvStyleLayer(num_channels, **field_values(self, AdvStyleLayer))

    @property
    def adds_to_loss(self) -> bool:
        """It has parameters of its own, also before their layers are known."""
        return True

    def found(self, layers: dict[str, nn.Module]) -> None:
        """Spreads for each layer; those of an earlier fit or a checkpoint go on."""
        before, self.owned = self.owned, {}
        for path in layers:
            self.owned[path] = before.get(path) or OwnedModule(self._make, lr=self.lr, lr_ratio=self.lr_ratio)
            if path in self._saved:
                self.owned[path].load_state_dict(self._saved[path])
        self._saved = {}

    def change(self, x: Tensor, path: str) -> Tensor:
        """Perturb the styles of the rows of a layer."""
        n, channels = style_shape(x)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        layer: Any = self.owned[path].create(channels, x.device, dtype)
        layer.prepare(x)
        branch = layer.branch(self.random.chance(path))
        if branch == "identity":
            return x
        noise = self.random.draw(
            path, x.device, lambda g: torch.randn(2, n, channels, generator=g, device=g.device, dtype=dtype)
        )
        return layer.change(x, noise, branch, sync_stats=self.sync_stats and is_distributed())

    def state_dict(self) -> dict[str, Any]:
        """The spreads of each layer and their optimiser's state."""
        state = super().state_dict()
        return state | {"owned": dict(self._saved)} if self._saved and not self.owned else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; spreads of layers that are not known yet are kept until they are found."""
        saved = state_dict.get("owned", {})
        if not self.owned:
            self._saved = dict(saved)
        super().load_state_dict({**state_dict, "owned": {name: saved.get(name, {}) for name in self.owned}})

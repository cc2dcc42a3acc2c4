"""EdgeView: train on images and on their edge maps, so that shape counts. arXiv 2409.19774, section 3.

With ``E(x)`` the edge map of an image, white with black edges, in the values of an image, and both in one batch (which
BatchNorm needs, as its authors say)::

    loss = (sum_i loss(x_i, y_i) + weight sum_i loss(E(x_i), y_i)) / (2 N)

Edges are Canny's: grey values are smoothed by a Gaussian, differentiated by Sobel filters, thinned to the maxima across
the edge, and kept where they are strong (above the high threshold), or weak (above the low one) and connected to a
strong one. The thresholds of an image are ``low`` and ``high`` times a threshold ``t`` of its own gradient magnitudes::

    t: Otsu's, or the mean            low = 0.5 - n        high = 1.5 + n        n ~ N(0, jitter)

Defaults are the published ones: weight 1, sigma drawn from {0, 1, 2} and ``t`` from the rules, for each image, jitter
0.2. Differences from the authors' code: sigma is drawn anew for each image (there the first draw of a worker stays for
the whole run); of its rules Otsu's and the mean are offered, Yen's, isodata and Li's are not, nor is the noise on the
magnitudes, nine tenths of whose draws have no effect there; a weak edge counts if a strong one is within
``hysteresis_steps`` pixels along the edge, where theirs follows it to its end, which would wait for the device.

The batch the step sees holds the images and then their edge maps, with the same labels: the step's own training metrics
are over both. A batch without gradients in an image (one grey) has a white map. Costs a second forward and backward
pass: the batch is twice as large; filters and thinning are a few dozen passes over one grey image each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from debias.errors import BatchKeyError, DebiasError
from debias.methods.base import LossOptions, Method
from debias.ops.edges import canny_edges, otsu_threshold
from debias.ops.fields import arguments
from debias.step.batch import BatchKey, describe, repeated, replace
from debias.step.context import Step

__all__ = ["EdgeView", "EdgeViewLayer", "canny_edges", "otsu_threshold"]

Rule = Literal["otsu", "mean"]
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


@arguments(kw_only=False, of=canny_edges, jitter="[0, inf)")
class EdgeViewOptions:
    """How edge maps are made.

    Args:
        mean: what the data pipeline subtracted from each channel; None where images lie in [0, 1].
        std: what it divided by.
        sigmas: smoothing before the edges, drawn for each image, in pixels, at most 2.
        rules: rules of the threshold, drawn for each image: ``"otsu"``, ``"mean"``.
        jitter: standard deviation of the noise on the factors of the threshold.
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    sigmas: Sequence[float] = (0.0, 1.0, 2.0)
    rules: Sequence[Rule] = ("otsu", "mean")
    jitter: float = 0.2
    hysteresis_steps: int = 16


@arguments
class EdgeViewLayer(EdgeViewOptions, nn.Module):
    """From images to edge maps in the same values, for any loop.

    Shape:
        images ``(N, C, H, W)`` with 1 or 3 channels; output the same: 0 on edges and 1 elsewhere, less ``mean`` and
        divided by ``std``. Without a gradient.
    """

    shift: Tensor = field(init=False)
    scale: Tensor = field(init=False)
    grey: Tensor = field(init=False)

    def __post_init__(self) -> None:
        nn.Module.__init__(self)
        mean, std, sigmas, rules = self.mean, self.std, self.sigmas, self.rules
        if (mean is None) != (std is None) or (mean is not None and len(mean) != len(std or ())):
            raise DebiasError(
                f"Expected `mean` and `std` to be given together, one number a channel, but got {mean!r} and {std!r}."
            )
        if std is not None and not all(s > 0 for s in std):
            raise DebiasError(f"Expected `std` to be positive numbers, but got {std!r}.")
        if not sigmas or not all(isinstance(s, int | float) and 0 <= s <= 2 for s in sigmas):
            raise DebiasError(f"Expected `sigmas` to be numbers from 0 to 2, in pixels, but got {sigmas!r}.")
        if not rules or not set(rules) <= {"otsu", "mean"}:
            raise DebiasError(f"Expected `rules` to be of 'otsu' and 'mean', but got {rules!r}.")
        self.channels = None if mean is None else len(mean)
        # Buffers, since a constant made in a step would wait for the device.
        self.register_buffer("shift", torch.tensor(mean or [0.0]).view(-1, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(std or [1.0]).view(-1, 1, 1), persistent=False)
        self.register_buffer("grey", torch.tensor(_GREY).view(-1, 1, 1), persistent=False)
        self.sigmas, self.rules = list(sigmas), list(rules)

    def forward(self, images: Tensor) -> Tensor:
        """Edge maps, drawn with torch's global random numbers."""
        seed = int(torch.randint(2**62, ()))
        return self.edges(images, self.draw(seed, images.shape[0]).to(images.device))

    def draw(self, seed: int, n: int) -> Tensor:
        """Smoothing, number of the rule and the two factors of each image, float64 ``(4, n)``, on the CPU."""
        host = np.random.default_rng(seed)
        noise = host.normal(0, self.jitter, n)
        drawn = (host.choice(self.sigmas, n), host.integers(len(self.rules), size=n), 0.5 - noise, 1.5 + noise)
        return torch.from_numpy(np.stack(drawn).astype(np.float64))

    @torch.no_grad()
    def edges(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Edge maps as drawn."""
        channels = images.shape[1]
        if self.channels not in (None, channels):
            raise DebiasError(
                f"Expected `mean` and `std` to hold {channels} numbers, one a channel of the images, but got"
                f" {self.channels}."
            )
        if not len(images):
            return images.clone()
        x = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
        mean, std, weights = (buffer.to(x) for buffer in (self.shift, self.scale, self.grey))
        raw = x * std + mean
        grey = (raw * weights).sum(1) if channels == 3 else raw.mean(1)
        sigma, rule, low, high = drawn.to(x.dtype).unbind()

        def threshold(magnitude: Tensor) -> Tensor:
            made = {"otsu": otsu_threshold, "mean": lambda m: m.mean((1, 2))}
            cuts = torch.stack([made[name](magnitude) for name in self.rules])
            return cuts.gather(0, rule.long().unsqueeze(0)).squeeze(0)

        found = canny_edges(
            grey, sigma=sigma, threshold=threshold, low=low, high=high, hysteresis_steps=self.hysteresis_steps
        )
        white = (~found).to(x.dtype).unsqueeze(1).expand_as(x)
        return ((white - mean) / std).to(images.dtype)


@arguments
class ImageInput(LossOptions, Method):
    """A method that reads images.

    Args:
        input: where the images are in the batch: floating point ``(N, C, H, W)``, 1 or 3 channels.
    """

    input: BatchKey = field(default=0, kw_only=False)


@arguments(weight="[0, inf)")
class EdgeView(EdgeViewOptions, ImageInput):
    """Add the edge map of every image to the batch, with the same label.

    Edge maps have shape, but no colour or texture; a network that has to classify them, too, cannot live on colour and
    texture alone.

    Every tensor of the batch with N rows, every list of N and every tag is repeated.

    Args:
        weight: of an edge map's loss against an image's.

    Example:
        >>> from debias import EdgeView
        >>> EdgeView(weight=0.5, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]).weight
        0.5
    """

    needs = ("images",)
    reference = "Efthymiadis et al., WACV 2025, arXiv 2409.19774"
    works = "Shape tells the class and colour or texture misleads."
    fails = "Colour or texture tells the class."
    module_class = EdgeViewLayer

    weight: float = 1.0
    seed: int = 0

    def augment(self, step: Step) -> None:
        """Put the images and their edge maps into the batch."""
        images = step.read(self.input, argument="input")
        maps = self.edge_maps(images)
        n = images.shape[0]
        index = torch.arange(n, device=images.device).repeat(2)
        weights = torch.ones(2 * n, device=images.device)
        weights[n:] = self.weight
        batch = replace(repeated(step.batch, index, n), self.input, torch.cat([images, maps]))
        step.mixed(n, loss=self.loss, owner=type(self).__name__)
        step.repeat(batch, index, weights)

    def edge_maps(self, images: Tensor) -> Tensor:
        """Edge maps of the images of a step."""
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 4 or (
            images.shape[1] not in (1, 3)
        ):  # fmt: skip
            kind = f" of {images.dtype}" if isinstance(images, Tensor) else ""
            raise BatchKeyError(
                f"Expected `input={self.input!r}` to be images (N, C, H, W) of a floating-point type with 1 or 3"
                f" channels, but got {describe(images)}{kind}. Name the place of the images in the batch."
            )
        drawn = self.random.draw(
            "edges", torch.device("cpu"), lambda g: self.module.draw(g.initial_seed(), images.shape[0])
        )
        return self.module.edges(images, drawn.to(images.device, non_blocking=True))

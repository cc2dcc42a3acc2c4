"""Random numbers of each image, a function of its key alone: the same in any batch, on any rank, on any device.

A ``torch.Generator`` gives a batch one stream, so what an image draws depends on its neighbours. Here a counter is
hashed with the key of the image, for all images of a batch at once; integers are the same on CPU and CUDA.
"""

from __future__ import annotations

import math
import zlib
from math import prod

import torch
from torch import Tensor

from debias.ops.arguments import checked

__all__ = ["Draws", "sample_keys"]

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers that looks random: Wellons' lowbias32, github.com/skeeto/hash-prospector."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK  # int64 wraps modulo 2**64, which leaves the low 32 bits right
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


@checked("indices: int N")
def sample_keys(indices: Tensor, name: str, *, seed: int = 0) -> Tensor:
    """One key for each sample index.

    Args:
        indices: int64 ``(N,)``, not negative.
        name: what is drawn, so that an index has another key for each name.
        seed: a seed.

    Returns:
        int64 ``(N,)`` in [0, 2**32), on the device of ``indices``.
    """
    start = zlib.crc32(f"{seed}/{name}".encode())
    return _mix(_mix((indices & _MASK) ^ start) ^ ((indices >> 32) & _MASK))


class Draws:
    """Draws for a batch of images; every call continues the streams of all of them.

    Args:
        keys: int64 ``(N,)`` in [0, 2**32).
        device: where the numbers are needed.
    """

    def __init__(self, keys: Tensor, device: torch.device | str = "cpu") -> None:
        self.keys = keys.to(device, non_blocking=True)
        self._calls = 0

    def bits(self, *shape: int) -> Tensor:
        """Integers in [0, 2**32), int64 ``(N, *shape)``."""
        self._calls += 1
        stream = _mix((self.keys + self._calls * _GOLDEN) & _MASK)
        counters = torch.arange(prod(shape), device=self.keys.device) * _GOLDEN
        return _mix(_mix((stream.unsqueeze(1) + counters) & _MASK) ^ stream.unsqueeze(1)).reshape(-1, *shape)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform in [low, high), float32 ``(N, *shape)``."""
        return low + (high - low) * ((self.bits(*shape) >> 8).float() * 2.0**-24)

    def signed(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform in [low, high) with a random sign: values near zero, which would change nothing, do not occur."""
        return self.uniform(low, high, *shape) * (1 - 2 * (self.bits(*shape) & 1)).float()

    def either(self, low: tuple[float, float], high: tuple[float, float], *shape: int) -> Tensor:
        """Uniform in one of two ranges, each as likely as the other."""
        first = (self.bits(*shape) & 1).bool()
        return torch.where(first, self.uniform(*low, *shape), self.uniform(*high, *shape))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float32 ``(N, *shape)``; Box and Muller."""
        radius = torch.sqrt(-2 * torch.log(1 - self.uniform(0, 1, *shape)))
        return radius * torch.cos(self.uniform(0, 2 * math.pi, *shape))

    def mask(self, probability: Tensor | float, *shape: int) -> Tensor:
        """True with the given probability, bool ``(N, *shape)``; ``probability`` broadcasts."""
        return self.uniform(0, 1, *shape) < probability

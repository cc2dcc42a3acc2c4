"""A sample as a picture inside the page, where it is an image."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from torch import Tensor

from debias.step.batch import TaggedSample

__all__ = ["picture"]

LARGEST = 64  # pixels of the longer side: a page holds dozens


def picture(dataset: Any, index: int) -> str | None:
    """A data address of the image of a sample; None where its first part is no image ``(C, H, W)``, C up to 3.

    The values are stretched to the whole range, as the page does not know how they were normalised.
    """
    try:
        from PIL import Image
    except ImportError:
        return None
    sample = dataset[index]
    sample = sample.sample if isinstance(sample, TaggedSample) else sample
    x = sample[0] if isinstance(sample, tuple | list) and sample else sample
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[0] not in (1, 2, 3) or min(x.shape[1:]) < 2:
        return None
    x = x.detach().cpu().float().nan_to_num()
    x = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-12)
    x = x.expand(3, -1, -1) if x.shape[0] == 1 else torch.cat([x, x.new_zeros(3 - x.shape[0], *x.shape[1:])])
    image = Image.fromarray((255 * x).byte().permute(1, 2, 0).numpy())
    image.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

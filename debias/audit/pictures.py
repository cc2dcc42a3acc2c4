"""A sample as a picture inside the page, where it is an image, or as the start of its text."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from debias.step.tagged import TaggedSample

__all__ = ["shown"]

LARGEST = 64  # pixels of the longer side: a page holds dozens
LONGEST = 120  # characters of a text


def shown(dataset: Any, index: int) -> dict[str, str | None]:
    """``picture``, a data address, of a sample whose first part is an image; ``text`` of one that holds a text."""
    sample = dataset[index]
    sample = sample.sample if isinstance(sample, TaggedSample) else sample
    parts = list(sample.values()) if isinstance(sample, Mapping) else sample
    first = parts[0] if isinstance(parts, tuple | list) and parts else parts
    texts = [x for x in (parts if isinstance(parts, tuple | list) else [parts]) if isinstance(x, str)]
    text = shorten(texts[0], LONGEST, placeholder=" ...") if texts else None
    return {"picture": None if text else _picture(first), "text": text}


def _picture(x: Any) -> str | None:
    """A data address of an image ``(C, H, W)``, C up to 3; None of anything else.

    The values are stretched to the whole range, as the page does not know how they were normalised.
    """
    try:
        from PIL import Image
    except ImportError:
        return None
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

"""What Lightning does anew in every Trainer, batch and log is done once: in a tiny fit that is much of the time."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

import lightning.fabric.utilities.registry
import lightning.pytorch.utilities
import lightning_fabric.utilities.registry
import pytorch_lightning.utilities
import torch
from lightning.pytorch.trainer.connectors.logger_connector import result as lightning_results
from pytorch_lightning.trainer.connectors.logger_connector import result as pl_results

# Every Trainer looks through all installed packages for callbacks.
for registry in (lightning.fabric.utilities.registry, lightning_fabric.utilities.registry):
    registry.entry_points = functools.cache(registry.entry_points)


def _unless_there(move: Any) -> Any:
    """Leave a value on the CPU that is to be moved there: every `log` would copy all its fields."""

    def to(value: Any, device: Any, *args: Any, **options: Any) -> Any:
        stays = torch.device(device).type == value.device.type == "cpu"
        return value if stays else move(value, device, *args, **options)

    return to


for logged in (lightning_results._ResultMetric, pl_results._ResultMetric):
    logged.to = _unless_there(logged.to)

# Every Trainer reads its own signature, and every batch those of the hooks.
_arguments = functools.lru_cache(inspect.getfullargspec)
for package in (lightning.pytorch.utilities, pytorch_lightning.utilities):
    package.argparse.inspect = SimpleNamespace(signature=functools.cache(inspect.signature))
    package.signature_utils.inspect = SimpleNamespace(
        getfullargspec=lambda hook: _arguments(getattr(hook, "__func__", hook))
    )

"""What the server of :mod:`_support.forked` has imported when it forks; importing this computes nothing."""

from importlib import import_module
from importlib.util import find_spec

import pytorch_lightning  # noqa: F401
import torch

import debias
import debias.cli.compare

torch.set_num_threads(1)
for name in ("matplotlib.pyplot", "sklearn.datasets", "torchdata.stateful_dataloader", "wandb"):
    if find_spec(name.partition(".")[0]):
        import_module(name)
for name in debias.__all__:
    getattr(debias, name)

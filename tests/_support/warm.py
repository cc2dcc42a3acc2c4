"""What the server of :mod:`_support.forked` has imported when it forks; importing this computes nothing."""

import gc
from importlib import import_module
from importlib.util import find_spec

import torch

import _support.fits  # noqa: F401
import debias
import debias.cli.compare

torch.set_num_threads(1)
for name in ("matplotlib.pyplot", "sklearn.datasets", "torchdata.stateful_dataloader", "wandb.sdk.launch"):
    if find_spec(name.partition(".")[0]):
        import_module(name)
for name in debias.__all__:
    getattr(debias, name)
gc.collect()
gc.freeze()  # or the first collections of each child would copy all of it

"""Whole runs of models that are sharded, importable by the processes of :class:`_support.ranks.Ranks`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from _support.cases import build, takes
from _support.fits import Classifier, loader, make_trainer, val_loader
from debias import Debiaser, GroupMonitor

# Rows of a batch, and of the last one, on each rank that sees other samples.
SIZES: dict[int, Any] = {1: ((16,), (7,)), 2: ((5, 11), (4, 3)), 4: ((3, 2, 7, 4), (1, 2, 2, 2))}


class Sharded(Classifier):
    """Linear layers are divided along the tensor-parallel dimension of the mesh, modules along the other one."""

    def __init__(self, *, checkpointed: bool = False, policy: torch.dtype | None = None) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        precise = {"reduce_dtype": torch.float64, "output_dtype": torch.float64}
        self.policy = {} if policy is None else {"mp_policy": MixedPrecisionPolicy(param_dtype=policy, **precise)}

    def configure_model(self) -> None:
        if isinstance(self.head.weight, torch.distributed.tensor.DTensor):  # configured again, to be resumed
            return
        mesh: Any = self.device_mesh
        if self.checkpointed:
            self.backbone = checkpoint_wrapper(self.backbone)
        if mesh["tensor_parallel"].size() > 1:
            for layer in (self.backbone[0], self.head):
                plan = ColwiseParallel(output_layouts=Replicate())
                parallelize_module(layer, mesh["tensor_parallel"], plan)
        if mesh["data_parallel"].size() > 1:
            for module in (self.backbone, self.head, self):
                fully_shard(module, mesh=mesh["data_parallel"], **self.policy)


def strategy(data: int, tensor: int = 1, **options: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data, tensor, **({"save_distributed_checkpoint": False, "process_group_backend": "gloo"} | options)
    )


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters, made whole."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): (p.full_tensor() if hasattr(p, "full_tensor") else p)
        .detach()
        .clone()
        for name, p in module.named_parameters()
    }


def methods(name: str, **options: Any) -> list[Debiaser]:
    return build(name, **{key: value for key, value in options.items() if key in takes(name)})


def result(trainer: Any, module: nn.Module, callbacks: list[Any]) -> dict[str, Any]:
    metrics = {k: v.detach().clone() for k, v in trainer.callback_metrics.items() if "group" in k or "accuracy" in k}
    return {"parameters": whole(module), "methods": [x.state_dict() for x in callbacks], "metrics": metrics}


def fit(
    rank: int,
    name: str,
    data: int = 1,
    tensor: int = 1,
    *,
    module: dict[str, Any] | None = None,
    method: dict[str, Any] | None = None,
    save: Path | None = None,
    resume: Path | None = None,
    sharded_checkpoint: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train on 39 rows with global batches of 16; parameters, method state, metrics. One process is not sharded."""
    callbacks: list[Any] = [*methods(name, **(method or {})), GroupMonitor("place", 3)]
    options = {"max_epochs": 2} | options
    if save is resume is None:
        options = {"check_val_every_n_epoch": options["max_epochs"]} | options
    kind: type[Classifier] = Classifier
    if data * tensor > 1:
        kind = Sharded
        options |= {"devices": data * tensor, "use_distributed_sampler": False}
        options["strategy"] = strategy(data, tensor, save_distributed_checkpoint=sharded_checkpoint)
    extra = []
    if save is not None or resume is not None:  # Lightning warns where a run is resumed without it
        folder, keep = (save, -1) if resume is None else (resume.parent, 0)
        extra = [ModelCheckpoint(folder, filename="one", every_n_epochs=1, save_top_k=keep, monitor=None)]
        options["enable_checkpointing"] = True
    trainer = make_trainer([*callbacks, *extra], **options)
    network = kind(**(module or {}))
    sizes, last = SIZES[data]
    batches = loader(sizes=sizes, last=last, rank=rank // tensor)
    with warnings.catch_warnings():  # torch's, of a layer that is sharded both ways: nothing here works in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        trainer.fit(network, batches, val_loader(), ckpt_path=resume)
    return result(trainer, network, callbacks)


def fits(rank: int, runs: list[tuple[str, dict[str, Any]]], data: int, tensor: int) -> list[dict[str, Any]]:
    """Several runs in one task."""
    return [fit(rank, name, data, tensor, **options) for name, options in runs]

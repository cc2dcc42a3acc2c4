"""Models that are sharded: FSDP2 on two processes as one process, and what is refused. Two gloo processes, no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from _support.fits import Classifier, loader, make_trainer, val_loader
from debias import CORAL, IRM, MMD, DomainAdversarial, Fishr, GroupDRO, HessianAlignment, VREx
from debias.errors import HeadNotFoundError, UnsupportedStrategyError

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("needs FSDP2 under its public name", allow_module_level=True)

METHODS: dict[str, Any] = {
    "GroupDRO": lambda **o: GroupDRO("place", 3, step_size=0.5, **o),
    "VREx": lambda **o: VREx("place", 3, **o),
    "IRM": lambda **o: IRM("place", 3, penalty_weight=0.1, **o),
    "CORAL": lambda **o: CORAL("place", 3, features="backbone", **o),
    "MMD": lambda **o: MMD("place", 3, features="backbone", **o),
    "DomainAdversarial": lambda **o: DomainAdversarial("place", 3, features="backbone", schedule="constant", **o),
    "Fishr": lambda **o: Fishr("place", 3, **o),
    "Fishr, head named": lambda **o: Fishr("place", 3, head="head", **o),
    "HessianAlignment": lambda **o: HessianAlignment("place", 3, **o),
    "CORAL, no features named": lambda **o: CORAL("place", 3, **o),
}


class Sharded(Classifier):
    """Parameters are spread over the processes in one of two ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def configure_model(self) -> None:
        mesh: Any = self.device_mesh
        if self.how == "tensor_parallel":
            parallelize_module(self.head, mesh["tensor_parallel"], ColwiseParallel(output_layouts=Replicate()))
        else:
            for module in (self.backbone, self.head, self):
                fsdp.fully_shard(module, mesh=mesh["data_parallel"])


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in module.named_parameters()
    }


def sharded(rank: int, name: str, how: str = "fsdp", **options: Any) -> dict[str, torch.Tensor]:
    """Train on 39 rows with 5 + 11 and at last 4 + 3 rows a batch."""
    sizes = (2, 1) if how == "fsdp" else (1, 2)
    strategy = ModelParallelStrategy(*sizes, save_distributed_checkpoint=False, process_group_backend="gloo")
    method = METHODS[name](**({"allow_untested_strategy": True} | options))
    options = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}
    trainer = make_trainer([method], max_epochs=2, limit_val_batches=0, **options)
    module = Sharded(how)
    trainer.fit(module, loader(sizes=(5, 11), last=(4, 3), rank=rank), val_loader())
    return whole(module)


@pytest.mark.parametrize("name", ["GroupDRO", "VREx", "IRM", "CORAL", "MMD", "DomainAdversarial"])
def test_two_shards_train_as_one_process(ranks, name):
    module = Classifier()
    make_trainer([METHODS[name]()], max_epochs=2, limit_val_batches=0).fit(
        module, loader(sizes=(16,), last=(7,)), val_loader()
    )
    for found in ranks.run(sharded, name):
        torch.testing.assert_close(found, whole(module), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["Fishr", "Fishr, head named", "HessianAlignment", "CORAL, no features named"])
def test_a_head_that_is_sharded_is_refused_on_all_ranks(ranks, name):
    ranks.raises(HeadNotFoundError, r"parameters of the module are sharded.*`features='dotted.path'`", sharded, name)


@pytest.mark.parametrize("name", ["GroupDRO", "CORAL"])
def test_processes_that_see_the_same_batch_are_refused(ranks, name):
    """Also at the user's own risk: CORAL divides by numbers of samples less one, and was silently wrong."""
    message = r"another part of the batch.*tensor_parallel_size=2"
    ranks.raises(UnsupportedStrategyError, message, sharded, name, "tensor_parallel")


def without_leave(rank: int) -> None:
    sharded(rank, "GroupDRO", allow_untested_strategy=False)


def test_sharding_needs_the_users_leave(ranks):
    ranks.raises(UnsupportedStrategyError, "ModelParallelStrategy.*`allow_untested_strategy=True`", without_leave)

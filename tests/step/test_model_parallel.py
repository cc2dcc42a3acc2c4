"""Models that are sharded: FSDP2, tensor parallelism and both give what one process gives. Gloo processes, no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

from _support import sharded
from _support.cases import exact, names_where
from _support.fits import Classifier, deviation, loader, make_trainer, train, val_loader
from debias import (
    EvalSampler,
    Fishr,
    GroupDRO,
    HessianAlignment,
    InferGroups,
    LastLayerRetraining,
    LearningFromFailure,
)
from debias.errors import HeadNotFoundError, UnsupportedStrategyError
from debias.ops.distributed import data_parallel, global_rank, global_sum, world_size

# A double that multiplies by the weight of the head itself, which is sharded when the step has ended.
EXACT = [name for name in names_where(lambda m: m.shardable) if exact(name) and name != "FeatureNorm"]
# One of each kind: reweighs, sums by domain, head statistics, features, gathered features, owned networks.
KINDS = ["GroupDRO", "CVaRDRO", "VREx", "IRM", "Fishr", "HessianAlignment", "CORAL", "MMD", "DomainAdversarial"]
NAMED: Any = {"method": {"head": "head"}}  # tensor-parallel heads are not found
ONCE: Any = {"max_epochs": 1}
# Augmentations draw by rank, and ranks that see the same rows draw the same, so one data-parallel rank is one process.
DRAWS = ["MixStyle", "DSU", "AdvStyle", "GroupMixup"]


def expected(name: str, **options: Any) -> dict[str, Any]:
    """What one process gives; made once, however many it is compared with."""
    key = f"{name} {options}"
    if key not in _EXPECTED:
        _EXPECTED[key] = sharded.fit(0, name, **options)
    return _EXPECTED[key]


_EXPECTED: dict[str, Any] = {}


def close(found: Any, wanted: Any, at_most: float = 1e-10) -> None:
    assert deviation(found, wanted) < at_most


@pytest.mark.parametrize("name", EXACT)
def test_two_shards_train_as_one_process(ranks, name):
    """Uneven rows, absent domains; parameters, the method's state, and the metrics of a monitor."""
    wanted = expected(name)
    for found in ranks.run(sharded.fit, name, 2):
        close(found, wanted)


@pytest.mark.parametrize("name", [*KINDS, *DRAWS])
def test_two_halves_of_each_layer_train_as_one_process(ranks, name):
    """Both processes see the same rows, which count once."""
    wanted = expected(name, **NAMED)
    for (found,) in ranks.run(sharded.fits, [(name, NAMED)], 1, 2):
        close(found, wanted)


def test_four_processes_train_as_one(four_ranks):
    """Two by two: both ways of sharding at once, with accumulation in one of the runs."""
    runs = [(name, NAMED | ONCE) for name in KINDS] + [("GroupDRO", NAMED | {"accumulate_grad_batches": 2})]
    results = four_ranks.run(sharded.fits, runs, 2, 2)
    for (name, options), *found in zip(runs, *results, strict=True):
        for each in found:
            close(each, expected(name, **options))


def test_four_shards_train_as_one_process(four_ranks):
    runs: list[Any] = [(name, ONCE) for name in ("GroupDRO", "Fishr", "CORAL", "DomainAdversarial")]
    results = four_ranks.run(sharded.fits, runs, 4, 1)
    for (name, options), *found in zip(runs, *results, strict=True):
        for each in found:
            close(each, expected(name, **options))


@pytest.mark.parametrize("name", ["GroupDRO", "Fishr", "CORAL", "DomainAdversarial"])
def test_activation_checkpoints_change_nothing(ranks, name):
    """The network in front of the head runs again in the backward pass."""
    options: Any = {"module": {"checkpointed": True}}
    wanted = expected(name)
    for (found,) in ranks.run(sharded.fits, [(name, options)], 2, 1):
        close(found, wanted)


@pytest.mark.parametrize("name", ["GroupDRO", "Fishr", "CORAL", "DomainAdversarial"])
def test_a_mixed_precision_policy(ranks, name):
    """The layers compute in float32, from float64 parameters; what methods compute is at least float32."""
    options: Any = {"module": {"policy": torch.float32}}
    wanted = expected(name)
    for (found,) in ranks.run(sharded.fits, [(name, options)], 2, 1):
        close(found["parameters"], wanted["parameters"], 1e-4)
        assert deviation(found["parameters"], wanted["parameters"]) > 1e-10  # else nothing was cast


@pytest.mark.parametrize("name", ["GroupDRO", "Fishr", "DomainAdversarial"])
def test_half_precision_inside_of_layers(ranks, name):
    """Logits come out in float64, and the head is still known to be linear."""
    options: Any = {"module": {"policy": torch.bfloat16}}
    wanted = expected(name)
    for (found,) in ranks.run(sharded.fits, [(name, options)], 2, 1):
        assert 1e-6 < deviation(found["parameters"], wanted["parameters"]) < 0.05


# A ramp would be as long as the run that is to be resumed.
CONSTANT: Any = {"method": {"schedule": "constant"}}


# -- checkpoints -----------------------------------------------------------------------------------


def saved_and_resumed(rank: int, name: str, folder: Path, kind: str, worlds: tuple[tuple[int, int], ...]) -> Any:
    """One epoch on one mesh, the second on another."""
    first, second = worlds
    distributed: Any = {"sharded_checkpoint": kind == "sharded", "method": {"head": "head", "schedule": "constant"}}
    sharded.fit(rank, name, *first, save=folder, max_epochs=1, **distributed)
    return sharded.fit(rank, name, *second, resume=folder / "one.ckpt", max_epochs=2, **distributed)


@pytest.mark.parametrize("kind", ["sharded", "full"])
@pytest.mark.parametrize("name", ["GroupDRO", "Fishr", "DomainAdversarial"])
def test_a_checkpoint_resumes_on_another_mesh(ranks, name, kind, tmp_path):
    """From two shards to two halves of each layer: the state of method and adversary, too."""
    wanted = expected(name, **CONSTANT)
    for found in ranks.run(saved_and_resumed, name, tmp_path, kind, ((2, 1), (1, 2))):
        close(found, wanted)


def saved(rank: int, name: str, folder: Path, kind: str) -> None:
    sharded.fit(rank, name, 2, save=folder, max_epochs=1, sharded_checkpoint=kind == "sharded", **CONSTANT)


def resumed(rank: int, name: str, folder: Path) -> Any:
    return sharded.fit(rank, name, 4, resume=folder / "one.ckpt", **CONSTANT)


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_a_checkpoint_resumes_on_more_ranks(ranks, four_ranks, kind, tmp_path):
    for name in ("GroupDRO", "DomainAdversarial"):
        folder = tmp_path / name
        ranks.run(saved, name, folder, kind)
        for found in four_ranks.run(resumed, name, folder):
            close(found, expected(name, **CONSTANT))


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_checkpoints_load_without_debias(ranks, kind, tmp_path):
    """Nothing of the method's is among the module's weights; with plain torch, in one process."""
    ranks.run(saved, "DomainAdversarial", tmp_path, kind)
    path = tmp_path / "one.ckpt"
    checkpoint = _load_distributed_checkpoint(path) if kind == "sharded" else torch.load(path, weights_only=True)
    module = Classifier()
    module.load_state_dict(checkpoint["state_dict"])
    close(dict(module.named_parameters()), expected("DomainAdversarial", max_epochs=1, **CONSTANT)["parameters"])


def test_a_full_checkpoint_resumes_in_one_process(ranks, tmp_path):
    ranks.run(saved, "DomainAdversarial", tmp_path, "full")
    close(
        expected("DomainAdversarial", resume=tmp_path / "one.ckpt", **CONSTANT),
        expected("DomainAdversarial", **CONSTANT),
    )


# -- what is refused -------------------------------------------------------------------------------


class VocabularyParallel(sharded.Sharded):
    """The head is sharded along its classes, and the loss is computed from the shards."""

    def configure_model(self) -> None:
        mesh: Any = self.device_mesh
        plan = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(self.head, mesh["tensor_parallel"], plan)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        with loss_parallel():
            return F.cross_entropy(self(batch[0]), batch[1])


def along_classes(rank: int, method: Any) -> None:
    options = {"devices": 2, "strategy": sharded.strategy(1, 2), "use_distributed_sampler": False}
    make_trainer([method], limit_val_batches=0, **options).fit(VocabularyParallel(), loader(), val_loader())


@pytest.mark.parametrize("method", [GroupDRO("place", 3), Fishr("place", 3), HessianAlignment("place", 3, head="head")])
def test_a_head_that_is_sharded_along_classes_is_refused(ranks, method):
    message = r"logits of `cross_entropy` to be whole.*sharded along its classes.*output_layouts=Replicate\(\)"
    ranks.raises(HeadNotFoundError, message, along_classes, method)


@pytest.mark.parametrize(("shards", "head"), [((2, 1), None), ((1, 2), "head")])
def test_derivatives_by_autograd_need_a_whole_head(ranks, shards, head):
    options: Any = {"method": {"derivatives": "autograd", "head": head}}
    message = r"whole on every process for `derivatives='autograd'`.*Take `derivatives='closed_form'`"
    ranks.raises(HeadNotFoundError, message, sharded.fits, [("Fishr", options)], *shards)


def test_a_tensor_parallel_head_is_named(ranks):
    message = r"tensor-parallel heads are not\). Name it: `head='dotted.path'`"
    ranks.raises(HeadNotFoundError, message, sharded.fit, "Fishr", 1, 2)


def copying(rank: int, method: Any) -> None:
    options = {"devices": 2, "strategy": sharded.strategy(2), "use_distributed_sampler": False}
    make_trainer([method], **options).fit(sharded.Sharded(), loader(), val_loader())


@pytest.mark.parametrize(
    ("method", "options"),
    [(LearningFromFailure, {}), (InferGroups, {}), (LastLayerRetraining, {"group": "place", "n_groups": 3})],
)
def test_methods_that_copy_the_model_are_refused(ranks, method, options):
    message = r"keeps the model whole on every process.*strategy='ddp'"
    ranks.raises(UnsupportedStrategyError, message, copying, method(**options))


def without_data_dimension(rank: int) -> None:
    strategy = sharded.strategy(1, 2)
    setup = strategy.setup_environment

    def other() -> None:
        setup()
        strategy._device_mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor_parallel",))
        strategy.lightning_module._device_mesh = strategy._device_mesh

    strategy.setup_environment = other
    train(sharded.Sharded(), [GroupDRO("place", 3)], devices=2, strategy=strategy, use_distributed_sampler=False)


def test_a_mesh_without_a_data_dimension_is_refused(ranks):
    message = r"to have a dimension 'data_parallel' for GroupDRO, but got \('tensor_parallel',\)"
    ranks.raises(UnsupportedStrategyError, message, without_data_dimension)


# -- loops of your own -----------------------------------------------------------------------------


def in_a_loop(rank: int) -> tuple[float, int, int, int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    with data_parallel(mesh["data_parallel"].get_group()):
        inside = (
            float(global_sum(torch.tensor(1.0 + rank // 2))),
            global_rank(),
            world_size(),
            len(EvalSampler(range(9))),
        )
    assert world_size() == 4
    return inside


def test_a_loop_of_your_own_names_the_ranks_that_see_different_samples(four_ranks):
    assert four_ranks.run(in_a_loop) == [(3.0, 0, 2, 5), (3.0, 0, 2, 5), (3.0, 1, 2, 4), (3.0, 1, 2, 4)]

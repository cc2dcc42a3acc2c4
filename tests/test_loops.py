"""The loops of docs/loops.md: two ranks with uneven rows train as one process with all of them."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from _support.fits import loader, places, problem, tagged

PAGE = Path(__file__).parents[1] / "docs" / "loops.md"
N = 27  # a batch of 16 and one of 11 rows


def page(*packages: str) -> Any:
    """What the page defines, without the lines that train, and without the blocks that need other packages."""
    found: dict[str, Any] = {"__name__": "page"}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S):
        if set(re.findall(r"^from (accelerate|transformers) ", code, re.M)) <= set(packages):
            tree = ast.parse(code)
            tree.body = [
                x for x in tree.body if isinstance(x, ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef)
            ]
            exec(compile(tree, str(PAGE), "exec"), found)
    return SimpleNamespace(**found)


def trained(rank: int, how: str, world: int = 1, folder: str = "") -> dict[str, torch.Tensor]:
    """Parameters and state after one epoch in one of the loops."""
    loops = page(how)
    torch.manual_seed(0)
    objective = loops.Objective().double()
    share = {"sizes": (5, 11), "last": (4, 7), "rank": rank} if world > 1 else {}
    if how == "plain":
        loops.train(DistributedDataParallel(objective) if world > 1 else objective, loader(N, **share))
    elif how == "fabric":
        strategy = DDPStrategy(process_group_backend="gloo") if world > 1 else "auto"
        fabric = Fabric(accelerator="cpu", devices=world, strategy=strategy)
        fabric.launch()
        loops.train_with_fabric(fabric, objective, loader(N, **share))
    elif how == "accelerate":
        loops.train_with_accelerate(objective, DataLoader(tagged(problem(N)), batch_size=16 // world))
    else:
        (x, y), place = problem(N).tensors, places(N)
        rows = [{"x": x[i], "y": y[i], "place": place[i]} for i in range(N)]
        options = {"per_device_train_batch_size": 16 // world, "train_sampling_strategy": "sequential"}
        loops.train_with_transformers(objective, rows, folder, disable_tqdm=True, **options)
    return {name: x.clone() for name, x in objective.state_dict().items()}


def launched(rank: int, how: str, folder: str) -> dict[str, torch.Tensor]:
    """The same on one of two ranks, as a launcher would start it."""
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    try:
        return trained(rank, how, 2, folder)
    finally:
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU"):
            os.environ.pop(name)
        if how in ("accelerate", "transformers"):
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("how", ["plain", "fabric", "accelerate", "transformers"])
def test_two_uneven_ranks_train_as_one_process(ranks, how, tmp_path):
    if how in ("accelerate", "transformers"):
        pytest.importorskip("accelerate")
        pytest.importorskip(how)
    expected = trained(0, "plain")
    for found in ranks.run(launched, how, str(tmp_path)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def share_of_mean(rank: int, sizes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    losses = torch.arange(16.0, dtype=torch.float64).split(sizes)[rank].requires_grad_()
    mean = page().global_mean(losses**2)
    return mean.detach(), torch.autograd.grad(mean, losses)[0]


def test_the_global_mean_is_that_of_all_rows(ranks):
    mean, gradient = share_of_mean(0, (16,))
    found = ranks.run(share_of_mean, (5, 11))
    assert [float(value) for value, _ in found] == [float(mean)] * 2
    # DDP divides by the number of ranks.
    torch.testing.assert_close(torch.cat([part for _, part in found]) / 2, gradient, rtol=0, atol=1e-12)

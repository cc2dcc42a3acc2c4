"""A tiny problem, a plain module that knows nothing of debias, and Trainers that print and write nothing."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

import _support.quick  # noqa: F401 - before the first Trainer
from debias import EvalSampler, tag

N_GROUPS = 3
N_PERSONS = 5
# Places come in blocks of 16, one block a global batch: the first five rows of a block hold no place 2, the second
# block holds none at all, and one row is unlabelled.
_BLOCK = [0, 1, 0, 1, 0, 0, 1, 0, 2, 0, 1, 0, 0, 1, 0, 2]


def problem(n: int = 39, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> TensorDataset:
    """``n`` rows ``(x, y)`` with two classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + 0.5 * torch.randn(n, generator=generator, dtype=torch.float64) > 0).long()
    return TensorDataset(x.to(dtype), y)


def places(n: int) -> torch.Tensor:
    """The group of each row; see the comment at the top."""
    ids = torch.tensor(_BLOCK).repeat(-(-n // 16))[:n]
    ids[16:32] = ids[16:32].clamp(max=1)
    ids[min(20, n - 1)] = -1
    return ids


def tagged(dataset: Dataset, **changed: Any) -> Any:
    """The dataset with the tags that methods ask for."""
    n = len(dataset)  # type: ignore[arg-type]
    return tag(dataset, **({"place": places(n), "person": torch.arange(n) % N_PERSONS} | changed))


class Tokens(nn.Module):
    """Three tokens from each row."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, 3, self.width)


class _Steps:
    """What a user writes; nothing here knows of debias."""

    def __init__(self, optimizer: str = "sgd", lr: float = 0.1) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # In between, three tokens of width two, for methods that change feature maps.
            self.backbone = nn.Sequential(nn.Linear(4, 6), Tokens(), nn.Flatten(), nn.Tanh())
            self.head = nn.Linear(6, 2)
        self.double()
        self.optimizer = optimizer
        self.lr = lr

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y), batch_size=len(y), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=self.lr / 10)
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Classifier(_Steps, L.LightningModule):
    pass


class OtherClassifier(_Steps, pl.LightningModule):
    """The same in the ``pytorch_lightning`` package."""


PACKAGES = {"lightning": (L, Classifier), "pytorch_lightning": (pl, OtherClassifier)}


class Manual(Classifier):
    """Manual optimisation."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Share(DistributedSampler):
    """Rank r's part of every global batch: the ranks' parts lie side by side and may be of different sizes."""

    def __init__(self, dataset: Any, sizes: tuple[int, ...], last: tuple[int, ...], rank: int) -> None:
        super().__init__(dataset, num_replicas=len(sizes), rank=rank, shuffle=False)
        total, n = sum(sizes), len(dataset)
        whole = n // total * total
        assert n - whole == sum(last)
        start = sum(sizes[:rank])
        self.rows = [begin + start + i for begin in range(0, whole, total) for i in range(sizes[rank])]
        self.rows += list(range(whole + sum(last[:rank]), whole + sum(last[: rank + 1])))

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def loader(
    n: int = 39,
    *,
    sizes: tuple[int, ...] = (16,),
    last: tuple[int, ...] | None = None,
    rank: int = 0,
    bare: bool = False,
    **changed: Any,
) -> DataLoader:
    """Training batches of 16 rows over all ranks, in order; the last one has what is left, ``last`` per rank.

    Args:
        n: number of rows.
        sizes: rows per batch of each rank.
        last: rows of the last batch of each rank.
        rank: whose loader it is.
        bare: without tags, for training without debias.
        **changed: other tags.
    """
    dataset = problem(n) if bare else tagged(problem(n), **changed)
    sampler = Share(dataset, sizes, (n % sum(sizes),) if last is None else last, rank)
    return DataLoader(dataset, batch_size=sizes[rank], sampler=sampler)


def val_loader(n: int = 21, *, bare: bool = False) -> DataLoader:
    """Validation rows, each exactly once over all ranks, in two whole batches and one that is not."""
    dataset = problem(n, seed=1) if bare else tagged(problem(n, seed=1))
    return DataLoader(dataset, batch_size=8, sampler=EvalSampler(dataset))


def make_trainer(callbacks: Any = (), *, package: Any = L, **options: Any) -> Any:
    """A Trainer that prints and writes nothing, unless told otherwise."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "max_epochs": 1,
    }
    return package.Trainer(callbacks=list(callbacks), **(quiet | options))


def train(module: Any, callbacks: Any = (), *, bare: bool = False, **options: Any) -> Any:
    """Train on the default rows, one epoch unless told otherwise; the Trainer."""
    trainer = make_trainer(callbacks, **options)
    trainer.fit(module, loader(bare=bare), val_loader(bare=bare))
    return trainer


def parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of everything the module's own checkpoint holds."""
    return {name.removeprefix("_orig_mod."): value.detach().clone() for name, value in module.state_dict().items()}


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dictionaries and lists, by path."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{prefix}/{key}").items()}
    if isinstance(state, list | tuple):
        return {k: v for i, value in enumerate(state) for k, v in flat(value, f"{prefix}/{i}").items()}
    return {prefix: state.detach().clone() if isinstance(state, torch.Tensor) else state}


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested states; NaN, the loss of a group that a batch lacks, equals itself."""
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(
        value.dtype == b[key].dtype
        and torch.equal(value.isnan(), b[key].isnan())
        and torch.equal(value.nan_to_num(), b[key].nan_to_num())
        if isinstance(value, torch.Tensor)
        else value == b[key]
        for key, value in a.items()
    )


def deviation(a: Any, b: Any) -> float:
    """Largest deviation of nested states, relative to the largest entry of each tensor; other leaves must be equal."""
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    worst = 0.0
    for key, value in a.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key
            continue
        assert torch.equal(value.isnan(), b[key].isnan()), key
        difference = (value - b[key]).nan_to_num().abs().max() / value.nan_to_num().abs().max().clamp_min(1e-300)
        worst = max(worst, float(difference))
    return worst

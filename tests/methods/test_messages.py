"""What a step sends over two ranks, in messages and bytes: a method that sends more than it did waits more often."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from _support import runs
from _support.cases import METHODS, arguments
from _support.doubles import DOUBLES
from _support.fits import Classifier, Share, Tokens, make_trainer, problem, val_loader
from debias import CORAL, IRM, Debiaser, Fishr, HessianAlignment, VREx, tag
from debias.cli.listing import methods

SENDS = ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor")
PAGE = Path(__file__).parents[2] / "docs" / "large_models.md"
# Groups or domains, persons, width of the features, classes, rows of the larger of two ranks.
SETTINGS = [{"G": 3, "I": 5, "d": 6, "C": 2, "n": 11}, {"G": 4, "I": 7, "d": 12, "C": 3, "n": 12}]


class Wide(Classifier):
    """Any width and number of classes; notes what the second step sends: the first one finds out what the step does."""

    def __init__(self, width: int, classes: int, seen: list[int]) -> None:
        super().__init__()
        layers = [nn.Linear(4, width), Tokens(width // 3), nn.Flatten(), nn.Tanh()]
        self.backbone, self.head = nn.Sequential(*layers).double(), nn.Linear(width, classes).double()
        self.seen = seen

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.clear()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.found = len(self.seen), sum(self.seen)


def batches(setting: dict[str, int], rank: int) -> DataLoader:
    """Two batches, of five rows on one rank and more on the other."""
    sizes = 5, setting["n"]
    numbers = torch.arange(2 * sum(sizes))
    data = TensorDataset(problem(len(numbers)).tensors[0], numbers % setting["C"])
    tags = tag(data, place=numbers % setting["G"], person=numbers % setting["I"])
    return DataLoader(tags, batch_size=sizes[rank], sampler=Share(tags, sizes, (0, 0), rank))


def sent(
    rank: int, given: list[tuple[type[Debiaser], dict[str, Any]]], setting: dict[str, int], *, epochs: int = 1
) -> tuple[int, int]:
    """Messages and bytes of a step of these methods, forward and backward, without those of DDP itself."""
    seen: list[int] = []

    def counted(name: str) -> Any:
        plain = getattr(torch.distributed, name)

        def send(*args: Any, **kwargs: Any) -> Any:
            x = args[1] if name.startswith("all_gather") else args[0]
            seen.append(x.numel() * x.element_size())
            return plain(*args, **kwargs)

        return mock.patch.object(torch.distributed, name, send)

    callbacks = [method(**({"name": str(i)} | options)) for i, (method, options) in enumerate(given)]
    options = {"devices": 2, "strategy": runs.ddp(), "use_distributed_sampler": False, "max_epochs": epochs}
    trainer = make_trainer(callbacks, limit_train_batches=2, log_every_n_steps=100, **options)
    model = Wide(setting["d"], setting["C"], seen)
    patches = [counted(name) for name in SENDS]
    for patch in patches:
        patch.start()
    try:
        trainer.fit(model, batches(setting, rank), val_loader())
    finally:
        for patch in patches:
            patch.stop()
    return model.found


PUBLIC = [name for name in METHODS if METHODS[name] not in DOUBLES]
VARIANTS: dict[str, dict[str, Any]] = {
    "IRM, squared": {"form": "squared"},
    "HessianAlignment, diagonal": {"statistic": "diagonal"},
    "HessianAlignment, frobenius": {"statistic": "frobenius"},
    "HessianAlignment, hutchinson": {"statistic": "hutchinson", "n_samples": 3},
    "HessianAlignment, autograd": {"derivatives": "autograd"},
}


def nothing_inferred(record: Any, targets: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(targets), dtype=torch.int64)


STAGES: dict[str, dict[str, Any]] = {
    "JustTrainTwice": {"epochs": 1},
    "InferGroups": {"method": nothing_inferred, "epochs": 1, "name": "x"},
}
# It changes nothing while training; it is an augmentation of images, as EdgeView is.
ELSEWHERE = {"LastLayerRetraining", "CraftedShifts"}


def sent_by_all(rank: int, setting: dict[str, int]) -> dict[str, tuple[int, int]]:
    """What each registered method sends, and those of its variants that send something else."""
    sizes = {"n_groups": "G", "n_domains": "G", "n_identities": "I", "n_classes": "C"}
    found = {}
    for name in (*PUBLIC, *VARIANTS):
        known = {k: setting[sizes[k]] if k in sizes else v for k, v in arguments(name.split(",")[0]).items()}
        found[name] = sent(rank, [(METHODS[name.split(",")[0]], known | VARIANTS.get(name, {}))], setting)
    for name, options in STAGES.items():
        found[name] = sent(rank, [(methods()[name], options)], setting, epochs=2)
    return found


def table() -> dict[str, tuple[int, str]]:
    """Messages and the formula of the numbers sent, by method, as the page has them."""
    rows = re.findall(r"^\| (`\w+`[^|]*) \| (\d+) \| `([^`]+)`", PAGE.read_text(), re.M)
    return {
        name: (int(messages), formula)
        for names, messages, formula in rows
        for name in re.sub(r"`(\w+)`", r"\1", names).replace(" and ", "; ").split("; ")
    }


def test_the_page_names_every_method():
    known = {name.split(",")[0] for name in table()}
    assert known == set(methods()) - ELSEWHERE, known ^ set(methods())


@pytest.mark.parametrize("setting", SETTINGS, ids=["small", "large"])
def test_messages_and_bytes_of_every_method_are_those_of_the_page(ranks: Any, setting: dict[str, int]) -> None:
    first, second = ranks.run(sent_by_all, setting, timeout=120)
    assert first == second
    G, d, C = setting["G"], setting["d"], setting["C"]
    sizes = setting | {"D": C * (d + 1), "P": 5 * d + C * (d + 1), "A": 256 * (d + G + 258) + G, "W": 2, "c": d // 3}
    expected = {name: (messages, 8 * eval(formula, {}, sizes)) for name, (messages, formula) in table().items()}
    assert first == expected


# Penalties on the same loss share the sums by domain.
TOGETHER: dict[str, Any] = {
    "V-REx twice": ([(VREx, {}), (VREx, {"penalty_weight": 2.0})], 2),
    "five": ([(VREx, {}), (IRM, {}), (Fishr, {}), (HessianAlignment, {}), (CORAL, {})], 10),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_penalties_share_messages(ranks: Any, name: str) -> None:
    given, expected = TOGETHER[name]
    given = [(method, {"domain": "place", "n_domains": 3} | options) for method, options in given]
    assert [messages for messages, _ in ranks.run(sent, given, SETTINGS[0])] == [expected, expected]

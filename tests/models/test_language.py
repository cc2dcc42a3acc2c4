"""The language model of `recipes/tokens`: its losses by domain, sharded as in one process, and with weights loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

from _support.fits import Share, deviation, make_trainer
from _support.sharded import strategy, whole
from debias import GroupDRO, GroupMonitor, VREx
from debias.cli.recipes import recipes_folder
from debias.data import TokenDomains
from debias.functional import group_dro_weights
from debias.models.language import LanguageModel

pytest.importorskip("transformers")

CONFIG = yaml.safe_load((recipes_folder() / "tokens" / "base.yaml").read_text())["model"]["init_args"]["config"]
SMALL: Any = {"n_documents": 60}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def model(**options: Any) -> LanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Dropout draws by rank.
        config = CONFIG | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return LanguageModel(**({"config": config, "optimizer": sgd} | options)).double()


METHODS: Any = {
    "GroupDRO": lambda: GroupDRO("group", 3, step_size=0.5),
    "VREx": lambda: VREx("group", 3),
}


def trained(rank: int, name: str, shards: int = 1) -> dict[str, Any]:
    """Two epochs of two batches; parameters, the method's state, and accuracies by domain."""
    method, monitor = METHODS[name](), GroupMonitor("group", 3)
    options: Any = {"max_epochs": 2}
    if shards > 1:
        options |= {"strategy": strategy(shards), "devices": shards, "use_distributed_sampler": False}
    trainer = make_trainer([method, monitor], **options)
    network, data = model(), TokenDomains(**SMALL)
    data.setup()
    sizes = (30,) if shards == 1 else (11, 19)
    sampler = Share(data.train_set, sizes, (0,) * shards, rank)
    trainer.fit(network, DataLoader(data.train_set, sizes[rank], sampler=sampler), data.val_dataloader())
    metrics = {k: v.clone() for k, v in trainer.callback_metrics.items() if "accuracy" in k}
    return {"parameters": whole(network), "method": method.state_dict(), "metrics": metrics}


@pytest.mark.parametrize("name", METHODS)
def test_two_shards_train_as_one_process(ranks, name):
    expected = trained(0, name)
    for found in ranks.run(trained, name, 2):
        assert deviation(found, expected) < 1e-10


def test_a_domains_loss_is_the_mean_over_its_tokens():
    """One step of GroupDRO by hand."""
    data = TokenDomains(**SMALL)
    data.setup()
    network, twin, method = model(), model(), METHODS["GroupDRO"]()
    loader = DataLoader(data.train_set, 60)
    make_trainer([method], max_steps=1, limit_val_batches=0).fit(network, loader, data.val_dataloader())
    tokens, group = data.train_set.dataset.tokens, data.train_set.tags["group"]
    losses = F.cross_entropy(twin(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
    by_domain = torch.stack([losses[group == g].mean() for g in range(3)])
    weights = group_dro_weights(torch.zeros(3).double(), by_domain.detach(), step_size=0.5).exp()
    (by_domain @ weights).backward()
    sgd(twin.parameters()).step()
    assert deviation(dict(network.named_parameters()), dict(twin.named_parameters())) < 1e-10
    assert by_domain.detach().max() - by_domain.detach().min() > 1e-3


def test_pretrained_weights_are_loaded(tmp_path: Path):
    """From a folder here; a name would be looked up on the hub."""
    saved = model()
    saved.network.save_pretrained(tmp_path)
    loaded = model(pretrained=str(tmp_path), config={"attn_pdrop": 0.5}).double()
    tokens: Tensor = torch.arange(8).unsqueeze(0)
    assert torch.allclose(loaded.eval()(tokens), saved.eval()(tokens))
    assert loaded.network.config.attn_pdrop == 0.5

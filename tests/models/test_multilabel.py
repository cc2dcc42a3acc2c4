"""The module of the action-unit recipes: masked loss, layer decay, warm-up, weights, and an adversary beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from _support.fits import make_trainer
from debias import IdentityAdversarial, tag
from debias.models.multilabel import MultiLabelClassifier

pytest.importorskip("timm")
TINY = {"img_size": 32, "patch_size": 16, "depth": 2, "embed_dim": 12, "num_heads": 2, "global_pool": "avg"}


def make(**options):
    torch.manual_seed(0)
    arguments = {"backbone_args": TINY, "lr": 0.01, "warmup_epochs": 1.0} | options
    return MultiLabelClassifier(3, "vit_tiny_patch16_224", **arguments)


def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, 32, 32, generator=g)
    y = torch.randint(-1, 2, (12, 3), generator=g).float()
    return DataLoader(tag(TensorDataset(x, y), identity=torch.arange(12) % 4), batch_size=4)


def test_missing_labels_are_left_out():
    model = make().eval()
    x, y = data().dataset.dataset.tensors
    model.log = lambda *a, **k: None
    known = y >= 0
    expected = F.binary_cross_entropy_with_logits(model(x)[known], y[known])
    torch.testing.assert_close(model.training_step((x, y), 0), expected)
    torch.testing.assert_close(model.training_step((x, torch.full_like(y, -1)), 0), torch.tensor(0.0))


def test_layer_decay_warm_up_and_an_adversary_at_the_heads_rate():
    model, rates = make(), []
    method = IdentityAdversarial("identity", 4, strength=2.0)
    step = method.owned["adversary"].step

    def stepped(optimizer, scaler=None):
        step(optimizer, scaler)
        users = [group["lr"] for group in optimizer.param_groups]
        rates.append((min(users), max(users), method.owned["adversary"].optimizer.param_groups[0]["lr"]))

    method.owned["adversary"].step = stepped
    trainer = make_trainer([method], max_epochs=3)
    trainer.fit(model, data(), data())
    assert len(rates) == 9
    assert all(low == pytest.approx(high * 0.65**3) for low, high, _ in rates)  # embedding, two blocks, head
    assert all(own == high for _, high, own in rates)
    top = [high for _, high, _ in rates]
    assert top[0] < 1e-4
    assert max(top) == pytest.approx(0.01)
    assert top.index(max(top)) == 3
    assert top[-1] < 0.001
    assert method.owned["adversary"].module.in_features == 12
    assert type(method.owned["adversary"].optimizer) is torch.optim.AdamW


@pytest.mark.parametrize("under", [None, "model", "state_dict"])
def test_weights_without_a_fitting_head(tmp_path, under):
    other = MultiLabelClassifier(5, "vit_tiny_patch16_224", backbone_args=TINY).network.state_dict()
    path = tmp_path / "weights.pt"
    torch.save(other if under is None else {under: other, "epoch": 3}, path)
    model = make(weights=str(path))
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, other[name]) == ("head" not in name), name


def test_weights_of_another_network(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"`weights` for the network, but none of .*weights.pt"):
        make(weights=str(tmp_path / "weights.pt"))

"""The plain classifier of the recipes."""

import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from debias.models.classifier import Classifier


def loader(n_classes: int = 2) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(n_classes, (24,), generator=generator)), batch_size=8)


def trainer(folder, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=folder, max_epochs=1, **quiet, **options)


@pytest.mark.parametrize(
    ("backbone", "num_classes"), [("mlp", 2), ("cnn", 3), ("mlp", 1), ("test_resnet", 2)], ids=lambda v: str(v)
)
def test_trains_and_logs(tmp_path, backbone, num_classes):
    model = Classifier(backbone, num_classes, image_size=8, width=8)
    before = [p.detach().clone() for p in model.parameters()]
    run = trainer(tmp_path)
    run.fit(model, loader(max(num_classes, 2)), loader(max(num_classes, 2)))
    assert {"train/loss", "val/loss"} <= set(run.callback_metrics)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    logits = torch.cat(run.predict(model, loader()))
    assert logits.shape == (24, num_classes)


def test_binary_loss_is_the_two_class_loss_with_one_logit_at_zero(tmp_path):
    model = Classifier("mlp", 1, image_size=8, width=8)
    (logged,) = trainer(tmp_path).validate(model, loader(), verbose=False)
    x, y = loader().dataset.tensors
    logit = model(x)
    expected = torch.nn.functional.cross_entropy(torch.cat([torch.zeros_like(logit), logit], 1), y)
    assert logged["val/loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("backbone", ["mlp", "cnn"])
def test_xavier_weights_and_zero_biases(backbone):
    torch.manual_seed(0)
    model = Classifier(backbone, image_size=8, width=64, init="xavier_uniform")
    for module in model.network:
        if hasattr(module, "weight"):
            fan_in, fan_out = torch.nn.init._calculate_fan_in_and_fan_out(module.weight)
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
            assert not module.bias.any()


def test_l2_is_part_of_the_training_loss_with_the_gradient_of_weight_decay():
    x, y = loader().dataset.tensors
    gradients, logged = [], []
    for l2 in (0.0, 0.03):
        torch.manual_seed(0)
        model = Classifier("mlp", image_size=8, width=8, l2=l2)
        model.log = lambda name, value, **_: logged.append(value.item())
        loss = model.training_step((x, y), 0)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        weights = [p.detach() for p in model.parameters()]
        assert loss.item() - logged[-1] == pytest.approx(l2 * sum(p.norm().item() ** 2 for p in weights), abs=1e-6)
    assert any(p.ndim == 1 for p in weights)  # biases are part of it
    for plain, with_l2, weight in zip(*gradients, weights, strict=True):
        torch.testing.assert_close(with_l2, plain + 2 * 0.03 * weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l2": -1.0}, "`l2` to be a finite number of at least 0, but got -1.0"),
        ({"l2": float("nan")}, "`l2` to be a finite"),
        ({"init": "he"}, "`init` to be `torch` or `xavier_uniform`, but got `he`"),
        ({"init": "xavier_uniform", "backbone": "test_resnet"}, "only with the backbones `mlp`, `cnn` and `strided`"),
    ],
)
def test_bad_init_and_l2(options, message):
    with pytest.raises(ValueError, match=message):
        Classifier(**options)


def test_optimizer_and_scheduler_are_built_by_the_factories():
    model = Classifier(
        image_size=8,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.3),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    )
    built = model.configure_optimizers()
    assert built["optimizer"].defaults["lr"] == 0.3
    assert built["lr_scheduler"].step_size == 2
    plateau = Classifier(image_size=8, lr_scheduler=lambda o: ReduceLROnPlateau(o, monitor="val/loss"))
    assert plateau.configure_optimizers()["lr_scheduler"]["monitor"] == "val/loss"


def test_checkpoint_loads_with_weights_only(tmp_path):
    model = Classifier(image_size=8, width=8, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    run = trainer(tmp_path)
    run.fit(model, loader(), loader())
    run.save_checkpoint(tmp_path / "model.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert again.hparams["width"] == 8
    torch.testing.assert_close(again.state_dict(), model.state_dict())


def test_pretrained_weights_come_from_timm(tmp_path):
    source = timm.create_model("test_resnet", num_classes=5)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    local = {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth"), "num_classes": 5}}
    model = Classifier("test_resnet", 2, pretrained=True, backbone_args=local)
    expected = source.state_dict()
    for name, value in model.network.state_dict().items():
        if not name.startswith("fc."):
            torch.testing.assert_close(value, expected[name])
    assert model.network.fc.out_features == 2


def test_frozen_layers_and_their_batch_norms_stay_as_they_are(tmp_path):
    frozen = ["conv1", "bn1", "layer1"]
    model = Classifier("test_resnet", 2, freeze=frozen, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    trainer(tmp_path).fit(model, loader(), loader())
    changed = {
        name.split(".")[0]
        for name, value in model.network.state_dict().items()
        if name in before and not torch.equal(value, before[name])
    }
    assert not changed.intersection(frozen)
    assert {"layer2", "layer4", "fc"} <= changed
    with pytest.raises(ValueError, match=r"submodules of the backbone, but there is no `blocks.9`"):
        Classifier("test_resnet", 2, freeze=["conv1", "blocks.9"])


def test_pretrained_without_timm_backbone_is_refused():
    with pytest.raises(ValueError, match="only with a timm backbone, but got `mlp`"):
        Classifier("mlp", pretrained=True)

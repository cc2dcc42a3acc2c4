"""Methods that change the outputs of layers: which layers, when, and nothing left afterwards."""

from __future__ import annotations

import lightning as L
import pytest
import timm
import torch
import torchvision
from torch import nn

from _support.fits import deviation, make_trainer, parameters, same
from _support.images import Evaluated, Pictures, batches, train
from debias import DSU, MixStyle
from debias.errors import DebiasError, RowsError
from debias.methods.base.layers import LayerAugmenter, default_layers, find_layers, prefix_tokens


class Double(LayerAugmenter):
    """Doubles the outputs of layers and counts how often."""

    def __init__(self, layers=None, **options):
        super().__init__(layers, name=None, **options)
        self.paths, self.shapes = [], []

    def change(self, x, path):
        self.paths.append(path)
        self.shapes.append(tuple(x.shape))
        return 2 * x


class Around(L.LightningModule):
    """A module around a network."""

    def __init__(self, net):
        super().__init__()
        self.net = net


def resnet():
    return torchvision.models.resnet18(num_classes=2)


def torchvision_vit():
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=5, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=2
    )


def timm_vit(**options):
    return timm.models.VisionTransformer(img_size=32, patch_size=16, embed_dim=8, depth=5, num_heads=2, **options)


# ------------------------------------------------------------ which layers


@pytest.mark.parametrize(
    ("net", "mixstyle", "dsu"),
    [
        (
            resnet,
            ["net.layer1", "net.layer2"],
            ["net.conv1", "net.maxpool", "net.layer1", "net.layer2", "net.layer3", "net.layer4"],
        ),
        (
            lambda: timm.create_model("resnet10t", num_classes=2),
            ["net.layer1", "net.layer2"],
            ["net.conv1", "net.maxpool", "net.layer1", "net.layer2", "net.layer3", "net.layer4"],
        ),
        (
            torchvision_vit,
            [f"net.encoder.layers.encoder_layer_{i}" for i in (1, 2)],
            [f"net.encoder.layers.encoder_layer_{i}" for i in (1, 2, 3, 4)],
        ),
        (timm_vit, ["net.blocks.1", "net.blocks.2"], [f"net.blocks.{i}" for i in (1, 2, 3, 4)]),
    ],
    ids=["torchvision resnet", "timm resnet", "torchvision vit", "timm vit"],
)
def test_default_layers(net, mixstyle, dsu):
    module = Around(net())
    assert list(default_layers(module, MixStyle.resnet_layers, MixStyle.vit_blocks)) == mixstyle
    assert list(default_layers(module, DSU.resnet_layers, DSU.vit_blocks)) == dsu
    for path, layer in default_layers(module, DSU.resnet_layers, DSU.vit_blocks).items():
        assert module.get_submodule(path) is layer


def test_a_network_without_known_layers_asks_for_them():
    with pytest.raises(DebiasError, match=r"`layers` to be given.*but got none.*Name the layers"):
        train(Pictures(), [MixStyle()])


def test_two_networks_ask_for_layers():
    module = nn.ModuleDict({"student": resnet(), "teacher": resnet()})
    with pytest.raises(DebiasError, match=r"2 of them, at 'student', 'teacher'"):
        default_layers(module, ["layer1"], [0.5])


def test_globs_match_within_one_part_of_a_path():
    module = Around(resnet())
    assert list(find_layers(module, ["net.layer[12]", "net.layer4.*"])) == [
        "net.layer1", "net.layer2", "net.layer4.0", "net.layer4.1",
    ]  # fmt: skip
    assert list(find_layers(module, ["*.conv1"])) == ["net.conv1"]


def test_paths_know_nothing_of_compilation():
    module = Around(torch.compile(resnet(), backend="eager"))
    assert list(find_layers(module, ["net.layer1"])) == ["net.layer1"]
    assert list(default_layers(module, ["layer1"], [0.5])) == ["net.layer1"]


@pytest.mark.parametrize(
    ("path", "near"), [("net.layr1", "net.layer1"), ("layer2", "net.layer2"), ("net.layer1.*.conv9", "There are")]
)
def test_a_path_that_matches_nothing_offers_the_nearest(path, near):
    with pytest.raises(DebiasError, match=rf"`layers`.*'{path.replace('*', '[*]')}' matches none.*") as caught:
        find_layers(Around(resnet()), [path])
    assert near in str(caught.value) or "Near: " in str(caught.value)
    if near != "There are":
        assert near in str(caught.value)


@pytest.mark.parametrize("layers", [[], [""], [3], ""])
def test_layers_are_paths(layers):
    with pytest.raises(DebiasError, match="`layers` to be dotted paths"):
        MixStyle(layers)


@pytest.mark.parametrize("count", [-1, 1.0, True])
def test_prefix_tokens_is_a_number(count):
    with pytest.raises(DebiasError, match="`prefix_tokens`"):
        MixStyle(["a"], prefix_tokens=count)


@pytest.mark.parametrize("layer", ["head", "pair"])
def test_a_layer_with_another_output_is_refused(layer):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Other(Pictures):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            return super().forward(self.pair(x)[0])

    got = {"head": r"shape \(8, 3\)", "pair": "tuple"}[layer]
    with pytest.raises(DebiasError, match=rf"output of the layer '{layer}' .*, but got {got}"):
        train(Other(), [Double(layer)])


# ------------------------------------------------------------ tokens


@pytest.mark.parametrize(
    ("net", "before"),
    [(torchvision_vit, 1), (timm_vit, 1), (lambda: timm_vit(reg_tokens=3), 4),
     (lambda: timm_vit(class_token=False, global_pool="avg"), 0)],
    ids=["torchvision", "timm", "timm with registers", "timm without class token"],
)  # fmt: skip
def test_the_class_token_is_left_alone(net, before):
    class Vision(Around):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, double, seen = Vision(net()), Double(), []
    for layer in default_layers(module, (), Double.vit_blocks).values():
        layer.register_forward_hook(lambda _, __, out: seen.append(out.detach()))  # before ours
    after = []

    class Look(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            for layer in default_layers(pl_module, (), Double.vit_blocks).values():
                layer.register_forward_hook(lambda _, __, out: after.append(out.detach()))

    data = torch.utils.data.TensorDataset(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))
    make_trainer([double, Look()]).fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    assert double.shapes == [(2, 4, 8)] * 2
    for old, new in zip(seen, after, strict=True):
        assert torch.equal(new[:, :before], old[:, :before])
        assert torch.equal(new[:, before:], 2 * old[:, before:])


def test_patch_embedding_has_no_class_token():
    assert prefix_tokens(Around(timm_vit()), "net.patch_embed") == 0
    assert prefix_tokens(Around(resnet()), "net.layer1") == 0


# ------------------------------------------------------------ when


def test_layers_change_inside_the_training_step_only():
    """Also in training mode, a forward pass outside the step is the user's own."""
    outside = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.look(pl_module, batch)

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.look(pl_module, (torch.ones(2, 2, 6, 6, dtype=torch.float64),))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.look(pl_module, batch)

        def look(self, module, batch):
            before = len(double.paths)
            assert module.training
            module(batch[0])
            outside.append(len(double.paths) - before)

    double = Double(["stem", "stage"])
    train(Pictures(), [Look(), double], max_epochs=2)
    assert double.paths == ["stem", "stage"] * 6
    assert outside == [0] * 18


def test_a_layer_in_eval_mode_is_left_alone():
    class Frozen(Pictures):
        def on_train_epoch_start(self):
            self.stem.eval()

    double = Double(["stem", "stage"])
    train(Frozen(), [double])
    assert double.paths == ["stage"] * 3


METHODS = {"MixStyle": lambda: MixStyle(["stem", "stage"], p=1.0), "DSU": lambda: DSU(["stem", "stage"], p=1.0)}


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_prediction_and_export_are_untouched(method):
    model, callback = Evaluated(), METHODS[method]()
    make_trainer([callback]).fit(model, batches(), batches(bare=True))
    twin = Evaluated()
    twin.load_state_dict(model.state_dict())
    results = []
    for module, callbacks in ((model, [callback]), (twin, [])):
        trainer = make_trainer(callbacks)
        loader = batches(bare=True)
        numbers = trainer.validate(module, loader, verbose=False) + trainer.test(module, loader, verbose=False)
        predictions = torch.cat(trainer.predict(module, loader))
        module.eval()
        exported = torch.export.export(Plain(module), (images(),))
        results.append((numbers, predictions, exported.module()(images()), str(exported.graph)))
    (numbers, predictions, outputs, graph), (plain_numbers, *plain) = results
    assert numbers == plain_numbers
    assert torch.equal(predictions, plain[0])
    assert torch.equal(outputs, plain[1])
    assert graph == plain[2]


class Plain(nn.Module):
    """What is exported: the layers, without the Trainer that Lightning leaves on its module."""

    def __init__(self, module):
        super().__init__()
        self.stem, self.stage, self.head = module.stem, module.stage, module.head

    def forward(self, x):
        return self.head(self.stage(self.stem(x)).mean((2, 3)))


def images():
    return torch.rand(2, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("method", METHODS)
def test_validation_within_a_fit_is_that_of_the_weights(method):
    class Check(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            twin = Evaluated()
            twin.load_state_dict(pl_module.state_dict())
            plain = make_trainer().validate(twin, batches(bare=True), verbose=False)[0]["val_loss"]
            seen.append((float(trainer.callback_metrics["val_loss"]), plain))

    seen = []
    make_trainer([METHODS[method](), Check()], max_epochs=2).fit(Evaluated(), batches(), batches(bare=True))
    assert len(seen) == 2
    assert all(a == b for a, b in seen)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_replays_the_draws(method, reentrant):
    class Checkpointed(Pictures):
        def forward(self, x):
            part = torch.utils.checkpoint.checkpoint(self.features, x.requires_grad_(), use_reentrant=reentrant)
            return self.head(part.mean((2, 3)))

        def features(self, x):
            return self.stage(self.stem(x))

    results = []
    for module in (Pictures(), Checkpointed()):
        train(module, [METHODS[method]()])
        results.append(parameters(module))
    assert deviation(*results) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_seed_and_name_decide_the_draws(method):
    def run(**changed):
        model = Pictures()
        train(model, [type(METHODS[method]())(["stem", "stage"], p=1.0, **changed)])
        return parameters(model)

    assert same(run(), run(seed=0))
    assert not same(run(), run(seed=1))
    assert not same(run(), run(name="other"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("p", [-0.1, 1.1, True, "half"])
def test_p_is_a_probability(method, p):
    with pytest.raises(DebiasError, match=r"`p` to be a number in \[0, 1\], but got"):
        type(METHODS[method]())(["stem"], p=p)


# ------------------------------------------------------------ rows


def test_rows_of_several_views():
    augmenter = Double(["stem"])
    ids = torch.tensor([3, 5])
    assert augmenter.ids_of_rows(ids, 2) is ids
    with pytest.raises(RowsError, match="one row for each of the 2 samples, but got 4"):
        augmenter.ids_of_rows(ids, 4)
    assert MixStyle(["stem"], rows="tiled").ids_of_rows(ids, 4).tolist() == [3, 5, 3, 5]
    assert MixStyle(["stem"], rows="interleaved").ids_of_rows(ids, 4).tolist() == [3, 3, 5, 5]

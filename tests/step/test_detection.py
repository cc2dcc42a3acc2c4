"""Losses per image of torchvision's detectors against the detectors themselves."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

pytest.importorskip("torchvision")

from lightning.pytorch.callbacks import ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader
from torchvision.models import detection

from _support.fits import flat, make_trainer, parameters, same
from _support.runs import ddp
from _support.scenes import DOMAINS, KINDS, SAMPLED, Scenes, Trained, pairs, scene, scene_loader, scenes
from debias import DomainPenalisation, GroupDRO, GroupReweighting, detection_losses, tag
from debias.errors import AmbiguousLossError, DebiasError, LossNotFoundError, RowsError, UnsupportedStrategyError
from debias.models.detector import tiny_detector
from debias.step.detection import detectors, one_pass


def model(kind, **options):
    torch.manual_seed(0)
    return tiny_detector(kind, 3, **options).double()


def sampling(kind):
    return SAMPLED if "rcnn" in kind else {}


def seeded(function, *args, **kwargs):
    torch.manual_seed(7)
    return function(*args, **kwargs)


def gap(a, b):
    """Largest difference; not relative, since biases in front of a GroupNorm hold rounding alone."""
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    return max(
        float((x.double() - b[k].double()).abs().max())
        for k, x in a.items()
        if isinstance(x, torch.Tensor) and x.numel()
    )


# Labels of the anchors are float32, whatever the images are, so the objectness loss is.
TOLERANCE = {"rtol": 2e-7, "atol": 1e-12}

# ------------------------------------------------------------ against the detector itself


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [((64, 64),), ((64, 64), (48, 64), (64, 40))], ids=["one size", "sizes"])
def test_with_the_batchs_own_divisors_they_are_torchvisions_losses(kind, sizes):
    """Also where anchors and proposals are drawn: the draws are those of the detector's own pass."""
    network, (images, targets) = model(kind, **sampling(kind)), scenes(sizes=sizes)
    plain = seeded(network, images, targets)
    found = seeded(detection_losses, network, images, targets).batch()
    assert plain.keys() == found.keys()
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], msg=name, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_torchvisions(kind):
    network, (images, targets) = model(kind, **sampling(kind)), scenes()
    weights = [p for p in network.parameters() if p.requires_grad]
    plain = torch.autograd.grad(sum(seeded(network, images, targets).values()), weights)
    batch = seeded(detection_losses, network, images, targets).batch()
    found = torch.autograd.grad(sum(batch.values()), weights)
    for a, b in zip(plain, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_and_one_pass_per_image_agree(kind):
    """Images of one size, no BatchNorm, and no draw: each image's losses are those of the detector run on it alone."""
    network, (images, targets) = model(kind), scenes()
    heads = detection_losses(network, images, targets)
    alone = [network([image], [target]) for image, target in zip(images, targets, strict=True)]
    for losses in (heads, detection_losses(network, images, targets, losses="image")):
        assert losses.rows == [[0], [1], [2], [3]]
        for name, values in losses.losses.items():
            torch.testing.assert_close(values, torch.stack([a[name] for a in alone]), msg=name, **TOLERANCE)
        torch.testing.assert_close(losses.total, torch.stack([sum(a.values()) for a in alone]), **TOLERANCE)
    weights = [p for p in network.parameters() if p.requires_grad]
    for i in range(4):
        a = torch.autograd.grad(heads.total[i], weights, retain_graph=True)
        b = torch.autograd.grad(sum(alone[i].values()), weights)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_by_domain_they_are_those_of_the_detector_on_the_domain(kind):
    network, (images, targets) = model(kind), scenes()
    found = detection_losses(network, images, targets, losses="split", domains=torch.tensor([5, 2, 5, 2]))
    assert found.rows == [[1, 3], [0, 2]]
    for row, i in ((found.rows[0], 0), (found.rows[1], 1)):
        plain = network([images[j] for j in row], [targets[j] for j in row])
        for name in plain:
            torch.testing.assert_close(found.losses[name][i], plain[name], msg=name, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_domain_of_one_image_has_that_images_loss(kind):
    network, (images, targets) = model(kind), scenes()
    split = detection_losses(network, images, targets, losses="split", domains=torch.tensor([3, 1, 0, 2]))
    order = [row[0] for row in split.rows]
    assert order == [2, 1, 3, 0]
    torch.testing.assert_close(split.total, detection_losses(network, images, targets).total[order], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_no_image_has_a_box(kind):
    images, _ = scenes(2)
    targets = [
        {"boxes": torch.zeros(0, 4).double(), "labels": torch.zeros(0).long(), "masks": torch.zeros(0, 64, 64)}
    ] * 2
    network = model(kind)
    for losses in ("heads", "image"):
        total = detection_losses(network, images, targets, losses=losses).total
        assert total.isfinite().all()
        assert (total > 0).all() or kind == "ssd"  # whose negatives are three times its positives
        total.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_an_image_without_proposals_has_no_box_loss():
    network, (images, targets) = model("faster_rcnn", rpn_post_nms_top_n_train=0), scenes()
    found = detection_losses(network, images, targets)
    assert found.counts["loss_classifier"].tolist() == [1, 2, 0, 1]  # true boxes are proposals
    assert found.losses["loss_classifier"][2] == 0
    assert found.total.isfinite().all()
    plain = network(images, targets)
    for name, value in found.batch().items():
        torch.testing.assert_close(value, plain[name], msg=name, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_detector_is_left_as_it_was(kind):
    network, (images, targets) = model(kind), scenes()
    before = {name: set(vars(m)) for name, m in network.named_modules()}
    functions = dict(vars(detection.roi_heads))
    sampler = network.rpn.fg_bg_sampler if "rcnn" in kind else None
    detection_losses(network, images, targets)
    with pytest.raises(Exception, match="box"):
        detection_losses(network, images, [{"boxes": torch.ones(4)}] * 4)
    assert before == {name: set(vars(m)) for name, m in network.named_modules()}
    assert all(vars(detection.roi_heads)[name] is function for name, function in functions.items())
    assert sampler is None or network.rpn.fg_bg_sampler is sampler


# ------------------------------------------------------------ arguments


def test_wrong_arguments():
    network, (images, targets) = model("fcos"), scenes(2)
    with pytest.raises(RowsError, match="one target and one domain for each of the 2 images, but got 1 targets"):
        detection_losses(network, images, targets[:1])
    with pytest.raises(RowsError, match=r"domains of shape \(3,\)"):
        detection_losses(network, images, targets, losses="split", domains=torch.zeros(3).long())
    with pytest.raises(DebiasError, match="`domains` with `losses='split'`"):
        detection_losses(network, images, targets, losses="split")
    with pytest.raises(DebiasError, match="`losses` to be 'heads', 'image' or 'split', but got 'whole'"):
        detection_losses(network, images, targets, losses="whole")
    with pytest.raises(DebiasError, match="divisors are known"):
        detection_losses(network, images, targets, losses="image").batch()
    with pytest.raises(DebiasError, match="in training mode"):
        detection_losses(network.eval(), images, targets)


def test_a_detector_that_is_not_supported_is_named():
    class Own(torch.nn.Module):
        def forward(self, images, targets):
            return {"loss": torch.stack([x.mean() for x in images]).mean()}

    images, targets = scenes(2)
    with pytest.raises(DebiasError, match=r"FasterRCNN, MaskRCNN, RetinaNet, FCOS and SSD.*but got Own.*'image'"):
        detection_losses(Own(), images, targets)
    found = detection_losses(Own(), images, targets, losses="image")
    torch.testing.assert_close(found.total, torch.stack([x.mean() for x in images]))
    keypoints = detection.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    with pytest.raises(DebiasError, match="but got KeypointRCNN"):
        one_pass(keypoints, keypoints, (images, targets), {})


def test_subclasses_are_found():
    class Mine(detection.FCOS):
        pass

    network = model("fcos")
    network.__class__ = Mine
    assert detectors(torch.nn.Sequential(torch.nn.Identity(), network)) == [network]
    assert detection_losses(network, *scenes(2)).total.shape == (2,)


# ------------------------------------------------------------ through the Trainer


def fit(callbacks, module=None, **options):
    module = Trained() if module is None else module
    trainer = make_trainer(callbacks, **({"max_epochs": 2} | options))
    trainer.fit(module, scene_loader())
    return parameters(module)


def by_hand(weigh, *, kind="fcos", epochs=2):
    """SGD on ``weigh(losses, domains)`` of losses from one run of the detector per image."""
    module = Trained(kind)
    module.train()
    optimizer = module.configure_optimizers()
    for epoch in range(epochs):
        for start in (0, 4, 8):
            rows = range(start, min(start + 4, 10))
            losses = torch.stack([sum(module.network([x], [y]).values()) for x, y in map(scene, rows)])
            optimizer.zero_grad()
            weigh(epoch, losses, DOMAINS[list(rows)]).backward()
            optimizer.step()
    return parameters(module)


def dro(step_size):
    q = [1 / 3] * 3

    def weigh(epoch, losses, domains):
        means = [losses[domains == d].mean() if (domains == d).any() else losses.sum() * 0 for d in range(3)]
        grown = [a * math.exp(step_size * m.item()) for a, m in zip(q, means, strict=True)]
        q[:] = [a / sum(grown) for a in grown]
        return sum(a * m for a, m in zip(q, means, strict=True))

    return weigh


def penalised():
    kept, weights = [[], [], []], [[1.0, 1.0, 1.0]]

    def weigh(epoch, losses, domains):
        if epoch == len(weights):
            exps = [math.exp(sum(k) / len(k)) for k in kept]
            weights.append([3 * e / sum(exps) for e in exps])
            kept[:] = [[], [], []]
        for loss, d in zip(losses.tolist(), domains.tolist(), strict=True):
            kept[d].append(loss)
        return (torch.tensor(weights[epoch], dtype=losses.dtype)[domains] * losses).mean()

    return weigh


@pytest.mark.parametrize("losses", ["heads", "image"])
def test_group_dro_trains_on_the_losses_of_the_images(losses):
    expected = by_hand(dro(0.5))
    assert gap(fit([GroupDRO("site", 3, step_size=0.5, losses=losses)]), expected) < 1e-9
    assert gap(by_hand(dro(0.4)), expected) > 1e-6


@pytest.mark.parametrize("kind", ["fcos", "faster_rcnn"])
@pytest.mark.parametrize("losses", ["heads", "image"])
def test_domain_penalisation_trains_on_the_losses_of_the_images(losses, kind):
    callback = DomainPenalisation("site", 3, losses=losses)
    expected = by_hand(penalised(), kind=kind)
    assert gap(fit([callback], Trained(kind)), expected) < (1e-9 if kind == "fcos" else 1e-5)
    assert float(callback.module.weights.std()) > 1e-3


def test_split_trains_on_the_losses_of_the_domains():
    module = Trained().train()
    optimizer = module.configure_optimizers()
    for start in (0, 4, 8):
        rows = list(range(start, min(start + 4, 10)))
        domains = DOMAINS[rows].tolist()
        optimizer.zero_grad()
        for d in set(domains):
            images, targets = pairs([scene(i) for i, e in zip(rows, domains, strict=True) if e == d])
            (len(images) / len(rows) * sum(module.network(images, targets).values())).backward()
        optimizer.step()
    found = fit([DomainPenalisation("site", 3, losses="split")], max_epochs=1)
    assert gap(found, parameters(module)) < 1e-9


def test_the_step_receives_the_detectors_own_names_and_may_scale_them():
    class Scaled(Trained):
        def training_step(self, batch, batch_idx):
            losses = self.network(*batch)
            assert {k: v.ndim for k, v in losses.items()} == dict.fromkeys(names, 0)
            return losses["classification"] + 0.5 * losses["bbox_regression"] + 0 * losses["bbox_ctrness"]

    names = ["classification", "bbox_regression", "bbox_ctrness"]
    found = fit([GroupReweighting("site", 3, power=0, losses="heads")], Scaled(), max_epochs=1)
    module = Scaled().train()
    optimizer = module.configure_optimizers()
    for start in (0, 4, 8):
        each = [module.network([x], [y]) for x, y in map(scene, range(start, min(start + 4, 10)))]
        optimizer.zero_grad()
        (sum(x["classification"] + 0.5 * x["bbox_regression"] for x in each) / len(each)).backward()
        optimizer.step()
    assert gap(found, parameters(module)) < 1e-9


def test_a_detector_in_evaluation_mode_predicts():
    class Teaching(Trained):
        def training_step(self, batch, batch_idx):
            self.network.eval()
            with torch.no_grad():
                assert {"boxes", "scores"} <= self.network(batch[0])[0].keys()
            self.network.train()
            return super().training_step(batch, batch_idx)

    callbacks = [[GroupDRO("site", 3, losses="heads")] for _ in range(2)]
    assert same(fit(callbacks[0], Teaching(), max_epochs=1), fit(callbacks[1], max_epochs=1))


def test_loss_chooses_among_the_detectors_losses():
    """Only the classification loss is reweighed, and only it moves the weights."""
    chosen = GroupDRO("site", 3, step_size=0.5, losses="heads", loss=lambda call: call.name == "classification")
    by_position = GroupDRO("site", 3, step_size=0.5, losses="heads", loss=0)
    every = GroupDRO("site", 3, step_size=0.5, losses="heads")
    runs = [fit([callback], max_epochs=1) for callback in (chosen, by_position, every)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])
    assert not torch.equal(chosen.module.weights, every.module.weights)


def test_average_loss_is_the_mean_over_images():
    logged = []

    class Seen(Trained):
        def log(self, name, value, **options):
            logged.append((name, value.item()))
            super().log(name, value, **options)

    from lightning.pytorch.loggers.logger import DummyLogger

    fit([DomainPenalisation("site", 3, losses="heads")], Seen(), max_epochs=1, logger=DummyLogger())
    first = Trained().train()
    mean = sum(sum(first.network([x], [y]).values()).item() for x, y in map(scene, range(4))) / 4
    assert dict(reversed(logged))["train/average_loss"] == pytest.approx(mean, rel=1e-9)


def test_manual_optimisation_works_with_heads_only():
    class Manual(Trained):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(sum(self.network(*batch).values()))
            optimizer.step()

    automatic = fit([GroupDRO("site", 3, losses="heads")])
    assert gap(fit([GroupDRO("site", 3, losses="heads")], Manual()), automatic) < 1e-12
    for losses in ("split", "image"):
        with pytest.raises(UnsupportedStrategyError, match="with automatic optimisation"):
            fit([GroupDRO("site", 3, losses=losses)], Manual())


# ------------------------------------------------------------ the tap is not confused


def test_losses_inside_a_detector_are_not_the_steps():
    """They are of anchors; nothing is taken for a sample."""
    with pytest.raises(LossNotFoundError, match=r"groups or domains also take .*`losses='heads'` for torchvision's"):
        fit([GroupDRO("site", 3)])


def test_a_loss_next_to_the_detector_can_be_the_one_that_is_meant():
    class Both(Trained):
        def training_step(self, batch, batch_idx):
            images, targets = batch
            counts = torch.tensor([float(len(t["boxes"])) for t in targets], dtype=torch.float64)
            guess = self.network.backbone(torch.stack(list(images))).mean((1, 2, 3))
            return torch.nn.functional.mse_loss(guess, counts) + sum(self.network(*batch).values())

    callback = GroupDRO("site", 3, step_size=0.5, rows="interleaved", loss=0)
    fit([callback], Both())
    assert float(callback.module.weights.std()) > 1e-3


def test_the_module_is_put_back_and_copies_are_plain():
    class Copied(Trained):
        def training_step(self, batch, batch_idx):
            assert "forward" in vars(self.network)
            twin = copy.deepcopy(self.network)
            assert type(twin.forward).__name__ == "method"
            assert twin.forward.__self__ is twin
            pickle.loads(pickle.dumps(self.network))
            return super().training_step(batch, batch_idx)

    module = Copied()
    fit([GroupDRO("site", 3, losses="heads")], module, max_epochs=1)
    assert "forward" not in vars(module.network)
    with pytest.raises(LossNotFoundError):
        fit([GroupDRO("site", 3)], module)
    assert "forward" not in vars(module.network)


def test_what_heads_mode_refuses():
    class Twice(Trained):
        def training_step(self, batch, batch_idx):
            return sum(self.network(*batch).values()) + sum(self.network(*batch).values())

    class Fewer(Trained):
        def training_step(self, batch, batch_idx):
            return sum(self.network(batch[0][:1], batch[1][:1]).values())

    class Without(Trained):
        def training_step(self, batch, batch_idx):
            return self.network.backbone(torch.stack(list(batch[0]))).mean()

    for module, error, match in (
        (Twice(), AmbiguousLossError, "run its detector once"),
        (Fewer(), RowsError, "on the 4 images of the batch, but it was given 1"),
        (Without(), LossNotFoundError, "FCOS and SSD in training mode .* but it ran none"),
    ):
        with pytest.raises(error, match=match):
            fit([GroupDRO("site", 3, losses="heads")], module)
    from _support.doubles import LogitVariance

    with pytest.raises(UnsupportedStrategyError, match=r"`losses='heads'` of GroupDRO without .*but got LogitVariance"):
        fit([GroupDRO("site", 3, losses="heads"), LogitVariance()])
    with pytest.raises(LossNotFoundError, match="Methods that reweigh groups or domains also take `losses='split'`"):
        fit([LogitVariance()])


# ------------------------------------------------------------ resuming


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11 with torch 2.15
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # the resumed run saves elsewhere on purpose
@pytest.mark.parametrize("step", [4, 5])
def test_domain_penalisation_of_a_detector_resumes_bitwise(tmp_path, step):
    """In the second of three epochs of three batches; the weights of the third need all its losses."""

    def run(folder, ckpt_path=None):
        callback, module = DomainPenalisation("site", 3, losses="heads"), Trained()
        save = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = make_trainer([callback, save], enable_checkpointing=True, max_epochs=3)
        loader = StatefulDataLoader(tag(Scenes(), site=DOMAINS), 4, collate_fn=pairs)
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        return {"parameters": parameters(module), "method": callback.state_dict(), "step": trainer.global_step}

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", ckpt_path=tmp_path / "whole" / f"step={step}.ckpt")
    assert whole["step"] == resumed["step"] == 9
    assert same(whole, resumed)


# ------------------------------------------------------------ two processes


def on_ranks(rank, name, losses, sizes, last, kind="fcos"):
    callback = {"dro": GroupDRO, "penalised": DomainPenalisation}[name]("site", 3, losses=losses)
    module = Trained(kind)
    options = {"devices": len(sizes), "strategy": ddp()} if len(sizes) > 1 else {}
    trainer = make_trainer([callback], max_epochs=3, use_distributed_sampler=False, **options)
    trainer.fit(module, scene_loader(sizes=sizes, last=last, rank=rank))
    return {"parameters": parameters(module), "method": callback.state_dict()}


@pytest.mark.parametrize("name", ["dro", "penalised"])
@pytest.mark.parametrize("losses", ["heads", "image"])
def test_two_uneven_ranks_are_one_process(ranks, name, losses):
    first, second = ranks.run(on_ranks, name, losses, (1, 3), (1, 1))
    assert same(first, second)
    whole = on_ranks(0, name, losses, (4,), (2,))
    assert gap(whole["method"], first["method"]) < 1e-12
    assert gap(whole["parameters"], first["parameters"]) < 1e-9


def test_split_trains_on_two_ranks(ranks):
    first, second = ranks.run(on_ranks, "penalised", "split", (2, 2), (1, 1))
    assert same(first, second)

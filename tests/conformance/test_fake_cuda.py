"""Methods and monitors on a device that is not the CPU, shown on any machine: see ``_support/fake_cuda.py``."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.data import DataLoader

from _support import blobs
from _support.cases import METHODS, build
from _support.fake_cuda import CUDA, OnFakeCuda, WaitingCopies, can_fake, waits_on_cuda
from _support.fits import Classifier, Manual, loader
from _support.images import Evaluated, batches
from debias import (
    CORAL,
    DSU,
    IRM,
    AdvStyle,
    AttributeProbe,
    EdgeView,
    Fishr,
    GroupDRO,
    GroupMixup,
    GroupMonitor,
    GroupReweighting,
    HessianAlignment,
    JustTrainTwice,
    MixStyle,
    SampleRecorder,
    VREx,
)
from debias.ops.shifts import FAMILIES, transforms_of
from debias.ops.shifts.draws import Draws

pytestmark = pytest.mark.skipif(not can_fake(), reason="this version of torch cannot fake copies to CUDA")

SQUARES = lambda z, y: F.mse_loss(z, F.one_hot(y, 2).to(z.dtype))  # noqa: E731
LABELS = lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 2).to(z.dtype))  # noqa: E731


WEIGHTED = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0], dtype=torch.float64), ignore_index=-1, label_smoothing=0.1)


def masked(z, y):
    losses = F.cross_entropy(z, y, reduction="none")
    mask = (y >= 0).to(losses.dtype)
    return (losses * mask).sum() / mask.sum()


def normalised(z, y):
    weights = z.detach().softmax(1)[:, 0]
    return (F.cross_entropy(z, y, reduction="none") * (weights / weights.sum())).sum()


def over_constants(z, y):
    constant = torch.full((), 2.0, device=z.device, dtype=z.dtype)  # a number in a tensor, as of a buffer
    return (F.cross_entropy(z, y, reduction="none") / constant * 2.0).mean() / constant


class Model(OnFakeCuda, Classifier):
    def __init__(self, loss=F.cross_entropy):
        super().__init__()
        self.loss = copy.deepcopy(loss)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self(x), y)

    def validation_step(self, batch, batch_idx):
        return {"loss": self.training_step(batch, batch_idx), "logits": self(batch[0]), "targets": batch[1]}


class Photographs(OnFakeCuda, blobs.Net):
    def __init__(self):
        super().__init__(channels=3)


class Images(OnFakeCuda, Evaluated):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)


def test_a_step_mixes_no_devices_and_waits_for_nothing(method):
    assert waits_on_cuda(Model(), build(method), loader()) == []


@pytest.mark.parametrize(
    ("callback", "loss"),
    [
        (lambda: HessianAlignment("place", 3), SQUARES),
        (lambda: HessianAlignment("place", 3, statistic="diagonal"), LABELS),
        (lambda: HessianAlignment("place", 3, statistic="frobenius", scale_free=True), F.cross_entropy),
        (lambda: HessianAlignment("place", 3, statistic="hutchinson", n_samples=2), F.cross_entropy),
        (lambda: HessianAlignment("place", 3), WEIGHTED),
        (lambda: Fishr("place", 3), LABELS),
        (lambda: IRM("place", 3), WEIGHTED),
        (lambda: IRM("place", 3, form="squared"), SQUARES),
        (lambda: CORAL("place", 3, features="backbone"), LABELS),
        (lambda: GroupDRO("place", 3), masked),
        (lambda: GroupDRO("place", 3), normalised),
        (lambda: GroupDRO("place", 3), over_constants),
        (lambda: IRM("place", 3), normalised),
        (lambda: GroupDRO("place", 3), LABELS),
        (lambda: GroupDRO("place", 3), WEIGHTED),
        (lambda: GroupDRO("place", 3), lambda z, y: F.cross_entropy(z, z.detach().softmax(1))),
        (lambda: GroupDRO("place", 3), lambda z, y: F.smooth_l1_loss(z[:, 0], y.to(z.dtype))),
        (lambda: GroupDRO("place", 3, normalize_loss=True, adjustment=1.0, group_counts=[3, 2, 1]), masked),
        (lambda: GroupDRO("place", 3, alpha=0.3, group_counts=[3, 2, 1]), F.cross_entropy),
        (lambda: GroupDRO("place", 3, loss="sum"), lambda z, y: F.cross_entropy(z, y) + 0.5 * SQUARES(z, y)),
        (lambda: GroupReweighting("place", 3, group_counts=[3, 2, 1]), F.cross_entropy),
    ],
)  # fmt: skip
def test_options_mix_no_devices_and_wait_for_nothing(callback, loss):
    assert waits_on_cuda(Model(loss), [callback()], loader()) == []


class Moving(Model):
    """Its loss is given the module and the inputs, too."""

    def training_step(self, batch, batch_idx):
        return self.loss(self, *batch)


def tokens(net, x):
    return net(x.unsqueeze(1).repeat(1, 3, 1).flatten(0, 1)).view(len(x), 3, 2)


def consistent(net, x, y):
    """Two losses, one on what the network predicts for the inputs before they are flipped."""
    z = net(x).detach()
    sure = z.softmax(1).amax(1) > 0.5
    return F.cross_entropy(net(x), y) + (F.cross_entropy(net(x.flip(1)), z.argmax(1), reduction="none") * sure).mean()


@pytest.mark.parametrize("method", [lambda: GroupDRO("place", 3, loss="sum"), lambda: VREx("place", 3, loss="sum")])
@pytest.mark.parametrize(
    "loss",
    [
        lambda net, x, y: F.cross_entropy(tokens(net, x).view(-1, 2), y.repeat_interleave(3)),
        lambda net, x, y: F.cross_entropy(tokens(net, x).transpose(1, 2), y[:, None].expand(-1, 3)),
        lambda net, x, y: F.cross_entropy(tokens(net, x).transpose(0, 1).flatten(0, 1), y.repeat(3)),
        lambda net, x, y: F.cross_entropy(net(torch.cat([x, x.flip(1)])), torch.cat([y, y])),
        consistent,
    ],
)
def test_rows_that_are_moved_wait_for_nothing(method, loss):
    assert waits_on_cuda(Moving(loss), [method()], loader()) == []


@pytest.mark.parametrize(
    "callback",
    [
        lambda: MixStyle(layers="stem", domain="place"),
        lambda: DSU(layers=["stem", "stage"]),
        lambda: AdvStyle(layers="stem"),
        lambda: GroupMixup("place", mix="cutmix"),
    ],
)
def test_feature_maps_mix_no_devices_and_wait_for_nothing(callback):
    assert waits_on_cuda(Images(), [callback()], batches()) == []


def test_ids_in_a_list_are_brought_to_the_device_without_waiting():
    class Listed(Model):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            x, y = super().transfer_batch_to_device(batch, device, dataloader_idx)
            return x, y, [0, 1, 2, -1] * 4 if len(x) == 16 else [0] * len(x)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

    assert waits_on_cuda(Listed(), [GroupDRO(2, 3)], loader(bare=True)) == []


def test_edge_maps_mix_no_devices_and_wait_for_nothing():
    assert waits_on_cuda(Photographs(), [EdgeView()], DataLoader(blobs.dataset(24, 3), 8)) == []


class ByHand(OnFakeCuda, Manual):
    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        unsure = torch.special.entr(logits.detach().softmax(1))[:, 0]  # the values of which only a first step looks at
        self.manual_backward((F.cross_entropy(logits, batch[1], reduction="none") * unsure).mean())


@pytest.mark.parametrize("method", [GroupDRO, GroupReweighting])
def test_a_manual_step_waits_for_nothing(method):
    assert waits_on_cuda(ByHand(), [method("place", 3)], loader()) == []


def prior(z, y):
    return F.cross_entropy(z + torch.arange(2, dtype=z.dtype, device=z.device), y)


def mask_in_place(z, y):
    z = 2 * z
    z += torch.tensor([0.0, -1e9]).to(z.device, non_blocking=True)
    return F.cross_entropy(z.view(-1, 2) - z.flip(1), y)


@pytest.mark.parametrize("loss", [F.cross_entropy, prior, mask_in_place])
@pytest.mark.parametrize("recorder", [lambda: SampleRecorder("samples.npz"), lambda: JustTrainTwice(epochs=1)])
def test_recording_what_a_step_predicts_waits_for_nothing(recorder, loss):
    assert waits_on_cuda(Model(loss), [recorder()], loader(), max_epochs=2) == []


# kornia looks at values in these, and does in these what cannot be faked.
LOOKED_AT = {"bilateral_blur", "cartoon", "canny_edges"}
NOT_FAKED = {"jpeg", "motion_blur", "snowflakes", "rain"}


@pytest.mark.parametrize("family", FAMILIES)
def test_crafted_shifts_mix_no_devices_and_wait_for_nothing(family):
    """The transforms; which image gets which is decided on the host."""
    for transform in transforms_of(family, 3):
        name = getattr(transform, "func", transform).__name__
        if name in NOT_FAKED:
            continue
        raises = pytest.raises(DataDependentOutputException) if name in LOOKED_AT else contextlib.nullcontext()
        with FakeTensorMode(), WaitingCopies() as copies, raises:
            images, keys = torch.empty(5, 3, 16, 16, device=CUDA), torch.empty(5, dtype=torch.int64, device=CUDA)
            assert transform(images, Draws(keys, CUDA)).device == CUDA
        assert copies.found == []


@pytest.mark.parametrize("monitor", [lambda: GroupMonitor("place", 3), lambda: AttributeProbe("person", 5)])
def test_a_monitor_mixes_no_devices(monitor):
    """Fake tensors and inference mode do not go together."""
    waits = waits_on_cuda(Model(LABELS), [monitor()], loader(), stage="validate", inference_mode=False)
    assert waits == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: x[x > 0], "nonzero"),
        (lambda x: x + torch.ones(len(x), 1), "devices"),
    ],
)
def test_what_waits_or_mixes_devices_is_noticed(change, match):
    class Faulty(METHODS["LogitVariance"]):
        def penalise(self, call, step):
            if call.logits.device == CUDA:
                change(call.logits.detach())
            return super().penalise(call, step)

    with pytest.raises(Exception, match=match):
        waits_on_cuda(Model(), [Faulty()], loader())


@pytest.mark.parametrize(
    "waiting", [lambda x: x.new_tensor([1.0]), lambda x: x.cpu(), lambda x: x.copy_(torch.ones(2))]
)
def test_a_copy_that_waits_is_noticed(waiting):
    class Waits(METHODS["LogitVariance"]):
        def penalise(self, call, step):
            waiting(call.logits.detach())
            return super().penalise(call, step)

    assert len(waits_on_cuda(Model(), [Waits()], loader())) == 2

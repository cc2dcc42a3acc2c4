"""What all monitors do alike: names that clash, several loaders in any form, arguments that are refused at once."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, TensorDataset

from _support.fits import Classifier, make_trainer, problem, tagged, val_loader
from _support.runs import ddp
from debias import (
    AttributeProbe,
    BoxStability,
    DetectionMonitor,
    GroupDRO,
    GroupMonitor,
    MultilabelF1Monitor,
    ShiftedValidation,
    tag,
)
from debias.errors import DebiasError, RowsError


def rows(n=12):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    labels = (torch.rand(n, 2, generator=g) > 0.5).double()
    number = torch.arange(n)
    return tag(TensorDataset(x, labels), place=number % 3, site=(number // 3) % 2, label=number % 2)


def loader(n=12):
    return DataLoader(rows(n), batch_size=4)


class Labels(Classifier):
    """Two binary labels, from two losses if asked for."""

    losses = 1

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        for _ in range(self.losses):
            F.binary_cross_entropy_with_logits(self(x), y)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.validation_step(batch, batch_idx)


def validate(callbacks, loaders=None, model=None, **options):
    trainer = make_trainer(callbacks, **options)
    trainer.validate(Labels() if model is None else model, loader() if loaders is None else loaders, verbose=False)
    return {k: float(v) for k, v in trainer.callback_metrics.items()}


# -- names -----------------------------------------------------------------------------------------


MONITORS = {
    "group": (lambda **o: GroupMonitor("place", 3, **o), "val/accuracy"),
    "multilabel": (lambda **o: MultilabelF1Monitor(["a", "b"], **o), "val/f1"),
    "probe": (lambda **o: AttributeProbe("place", 3, **o), "val/place_probe/accuracy"),
    "shifts": (lambda **o: ShiftedValidation(families=["blur"], input=0, target=1, **o), "val_shift/mean"),
    "stability": (lambda **o: BoxStability(["backbone.0"], **o), "val/box_stability"),
    "detection": (lambda **o: DetectionMonitor("place", 3, **o), "val/map"),
}


def make(kind, **options):
    if kind == "shifts":
        pytest.importorskip("kornia")
    if kind == "detection":
        pytest.importorskip("pycocotools")
    return MONITORS[kind][0](**options)


@pytest.mark.parametrize("kind", MONITORS)
def test_two_that_would_log_the_same_names(kind):
    logged = MONITORS[kind][1]
    # Two of one key in checkpoints are refused by the Trainer itself.
    options = {"group": "place", "n_groups": 3} if kind == "multilabel" else {}
    first, second = make(kind), make(kind, **options)
    with pytest.raises(DebiasError, match=f"different `name` for each .* and .* would both log `{logged}`"):
        validate([first, second])
    trainer, model = make_trainer([first, make(kind, name="other")]), Labels()
    for callback in (first, trainer.callbacks[1]):
        callback.setup(trainer, model, "validate")


def test_of_different_kinds():
    clash = [AttributeProbe("place", 3), GroupMonitor("place", 3, name="place_probe")]
    for callbacks in (clash, clash[::-1]):
        with pytest.raises(DebiasError, match="would both log `val/place_probe/accuracy`"):
            validate(callbacks)
    both = validate([AttributeProbe("place", 3), GroupMonitor("place", 3), MultilabelF1Monitor(["a", "b"])])
    assert {"val/accuracy", "val/f1", "val/place_probe/accuracy"} <= set(both)


def test_multilabel_monitors_by_name():
    options = {"n_groups": 3, "group": "place"}, {"n_groups": 2, "group": "site"}
    alone = [validate([MultilabelF1Monitor(["a", "b"], **o)]) for o in options]
    first = MultilabelF1Monitor(["a", "b"], **options[0])
    second = MultilabelF1Monitor(["a", "b"], name="by_site", **options[1])
    both = validate([first, second])
    renamed = {k.replace("val/", "val/by_site/"): v for k, v in alone[1].items()}
    assert both == pytest.approx(alone[0] | renamed, nan_ok=True)
    assert "val/by_site/f1_by_group/1" in both
    assert first.state_key == "MultilabelF1Monitor(place)"  # as in checkpoints from before there were names
    assert second.state_key == "MultilabelF1Monitor(by_site)"
    assert MultilabelF1Monitor(["a"]).state_key == "MultilabelF1Monitor"


# -- loaders ---------------------------------------------------------------------------------------

FORMS = {
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "dict": lambda a, b: {"clean": a, "shifted": b},
    "nested": lambda a, b: {"clean": [a], "shifted": (b,)},
    "combined": lambda a, b: CombinedLoader({"clean": a, "shifted": b}, "sequential"),
}


@pytest.mark.parametrize("form", FORMS)
def test_several_loaders_in_any_form(form):
    def monitors():
        return [GroupMonitor("place", 3), AttributeProbe("place", 3)]

    alone = validate(monitors(), loader(12)), validate(monitors(), loader(15))
    expected = {f"{k}/dataloader_idx_{i}": v for i, logged in enumerate(alone) for k, v in logged.items()}
    assert validate(monitors(), FORMS[form](loader(12), loader(15))) == pytest.approx(expected, nan_ok=True)


def test_a_dictionary_of_test_loaders():
    trainer = make_trainer([GroupMonitor("place", 3)])
    trainer.test(Labels(), {"clean": loader(12), "shifted": loader(15)}, verbose=False)
    assert {"test/accuracy/dataloader_idx_0", "test/accuracy/dataloader_idx_1"} <= set(trainer.callback_metrics)
    trainer.validate(Labels(), {"one": loader(12)}, verbose=False)
    assert "val/accuracy" in trainer.callback_metrics


def _warned(rank, form):
    plain, tight = loader(7), loader(8)
    loaders = plain if form is None else FORMS[form](tight, plain)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        validate([GroupMonitor("place", 3)], loaders, devices=2, strategy=ddp())
    return [str(w.message) for w in caught if "padded to a multiple" in str(w.message)]


@pytest.mark.parametrize("form", [None, "list", "dict"])
def test_padding_is_warned_of_in_any_form(ranks, form):
    for messages in ranks.run(_warned, form):
        assert len(messages) == 1
        assert "of 7 samples is padded to a multiple of 2 processes" in messages[0]


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["first", "sum", -1, 1.0, True])
@pytest.mark.parametrize("kind", ["group", "multilabel", "probe"])
def test_a_loss_that_chooses_none(kind, loss):
    with pytest.raises(DebiasError, match=f"`loss` to be None, an index >= 0 or a callable, but got {loss!r}"):
        make(kind, loss=loss)


@pytest.mark.parametrize(("kind", "argument"), [("multilabel", "group"), ("stability", "domain")])
def test_as_many_numbers_as_keys(kind, argument):
    for key, n in ((("place", "site"), 6), ("place", (3, 2)), (("place", "site"), (3,))):
        with pytest.raises(DebiasError, match=rf"`n_{argument}s` to hold one number for each key of `{argument}="):
            make(kind, **{argument: key, f"n_{argument}s": n})
    assert make(kind).total == 1


def test_as_many_numbers_as_keys_where_they_come_first():
    with pytest.raises(DebiasError, match="`n_groups` to hold one number for each key"):
        GroupMonitor(("place", "site"), 6)
    with pytest.raises(DebiasError, match="`n_domains` to hold one number for each key"):
        DetectionMonitor(("place", "site"), 6)


def test_multilabel_f1_by_crossed_groups():
    crossed = validate([MultilabelF1Monitor(["a", "b"], group=("place", "site"), n_groups=(3, 2))])
    data = rows()
    data = tag(data, both=data.tags["place"] * 2 + data.tags["site"])
    by_hand = validate([MultilabelF1Monitor(["a", "b"], group="both", n_groups=6)], DataLoader(data, batch_size=4))
    assert crossed["val/f1_by_group/2_1"] == pytest.approx(by_hand["val/f1_by_group/5"], nan_ok=True)
    assert sorted(map(str, crossed.values())) == sorted(map(str, by_hand.values()))


def test_multilabel_f1_of_a_chosen_loss():
    model = Labels()
    model.losses = 2
    expected = validate([MultilabelF1Monitor(["a", "b"])])
    chosen = MultilabelF1Monitor(["a", "b"], loss=lambda call: call.position == 1)
    assert validate([chosen], model=model) == expected
    with pytest.raises(DebiasError, match="compute one loss for MultilabelF1Monitor, but got 2"):
        validate([MultilabelF1Monitor(["a", "b"])], model=model)
    with pytest.raises(RowsError, match="one column per name"):
        validate([MultilabelF1Monitor(["a"], loss=0)], model=model)


def test_what_a_frozen_network_returned_in_training_is_not_kept():
    class Frozen(Labels):
        def training_step(self, batch, batch_idx):
            self.backbone.eval()
            return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

        def on_train_batch_end(self, outputs, batch, batch_idx):
            kept.append(monitor._captured)

    kept, monitor = [], GroupMonitor("place", 3, logits="backbone", target="label")
    make_trainer([GroupDRO("place", 3), monitor]).fit(Frozen(), loader(), loader())
    assert kept == [None] * 3


def uneven(rank, sizes):
    data = tagged(problem(sizes[rank]))
    trainer = make_trainer([GroupMonitor("place", 3)], devices=2, strategy=ddp(), use_distributed_sampler=False)
    try:
        trainer.fit(Classifier(), DataLoader(data, 4), val_loader())
    except DebiasError as error:
        return str(error)
    return trainer.global_step


def test_ranks_with_different_numbers_of_training_batches_are_refused(ranks):
    told = ranks.run(uneven, (16, 24))
    assert all("`train_dataloader` has [4, 6] of them" in text for text in told)
    assert ranks.run(uneven, (16, 13)) == [4, 4]  # batches of other sizes

"""Several methods and monitors in one list: none of them disturbs what another one reads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from _support.blobs import Net, dataset, labels
from _support.fits import N_GROUPS, N_PERSONS, Classifier, deviation, loader, make_trainer, parameters, same, val_loader
from debias import (
    AttributeProbe,
    GroupDRO,
    GroupMixup,
    GroupMonitor,
    GroupReweighting,
    HessianAlignment,
    IdentityAdversarial,
    MixStyle,
    ShiftedValidation,
    VREx,
)
from debias.errors import DebiasError, RowsError
from debias.step.context import Step


def fitted(callbacks, module=None):
    module = Classifier() if module is None else module
    make_trainer(callbacks, max_epochs=2).fit(module, loader(), val_loader())
    assert "training_step" not in vars(module)
    return parameters(module)


def penalty(**options):
    return HessianAlignment(domain="place", n_domains=N_GROUPS, **options)


def adversary(**options):
    return IdentityAdversarial(identity="person", n_identities=N_PERSONS, **options)


@pytest.mark.parametrize("features", [None, "net.2"])
def test_a_monitor_that_runs_the_network_again_leaves_the_features_of_the_next_one(features):
    pytest.importorskip("kornia", reason="crafted shifts need Python 3.11")
    data = dataset(label=labels(23), place=torch.arange(23) % 2)

    def validated(order):
        monitors = [
            AttributeProbe(attribute="label", n_values=3, features=features),
            GroupMonitor(group="place", n_groups=2),
            ShiftedValidation(families=["geometric"]),
        ]
        trainer = make_trainer([monitors[i] for i in order])
        for _ in range(2):  # the head is found in the first batch and hooked from the second on
            trainer.validate(Net(), DataLoader(data, batch_size=8), verbose=False)
        return trainer.callback_metrics

    expected = validated([0, 1, 2])
    assert expected["val/label_probe/accuracy"] >= 0
    for order in ([2, 0, 1], [2, 1, 0]):
        assert same(validated(order), expected)


def test_a_penalty_that_runs_the_head_again_leaves_the_features_of_the_next_one():
    def methods():
        return [penalty(derivatives="autograd"), adversary(features="head", strength=0.5)]

    first, second = fitted(methods()), fitted(methods()[::-1])
    assert deviation(first, second) < 1e-12
    assert deviation(first, fitted(methods()[:1])) > 1e-3


def test_penalties_on_mixed_samples_do_not_depend_on_their_order():
    def methods():
        mixing = [GroupMixup(domain="place", seed=1), GroupDRO(group="place", n_groups=N_GROUPS)]
        return [*mixing, penalty(), adversary(strength=0.5), VREx(domain="place", n_domains=N_GROUPS)]

    assert deviation(fitted(methods()), fitted(methods()[::-1])) < 1e-12


class Twice(Classifier):
    """A loss with every sample twice, in an order that cannot be followed."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        order = _twice(None, len(y)).numpy()
        logits = torch.stack([self(x)[int(i)] for i in order])
        return F.cross_entropy(logits, torch.from_numpy(y.numpy()[order]))


def _twice(call, n):
    return torch.cat([torch.arange(n).flip(0), torch.arange(n)])


@pytest.mark.parametrize("other", [MixStyle(layers=["backbone.1"], p=0.0), GroupReweighting("place", N_GROUPS)])
def test_rows_that_one_method_states_count_beside_methods_that_state_none(other):
    asked = []

    def rows(call, n):
        asked.append(n)
        return _twice(call, n)

    fitted([other, VREx(domain="place", n_domains=N_GROUPS, rows=rows)], Twice())
    assert asked


def test_methods_that_state_other_rows_are_refused_before_training():
    def method(rows, name=None):
        return VREx(domain="place", n_domains=N_GROUPS, rows=rows, name=name)

    match = r"same `rows`, but got 'tiled' of GroupReweighting\(place\) and 'interleaved' of VREx\(place\)"
    first = GroupReweighting("place", N_GROUPS, rows="tiled")
    with pytest.raises(RowsError, match=match):
        fitted([first, method("interleaved")], Never())
    with pytest.raises(RowsError, match=r"'interleaved' of VREx\(a\) and <function _twice .* of VREx\(b\)"):
        fitted([method("interleaved", "a"), method(None), method(_twice, "b")], Never())
    layers = MixStyle(layers=["backbone.1"], p=0.0, domain="place", rows="tiled")  # of a layer, not of the loss
    fitted([layers, method(_twice, "a"), method(None), method(_twice, "b")], Twice())


class Never(Classifier):
    def training_step(self, batch, batch_idx):
        raise AssertionError


def test_ids_out_of_range_are_told_by_the_number_of_groups():
    tags = {"a": torch.tensor([0, 7, -5]), "b": torch.tensor([1, 0, 1])}
    step = Step(None, Classifier(), "train", None, tags)
    for ids, count in ((step.ids("a", 4), 4), (step.ids(("a", "b"), (4, 2)), 8)):
        assert (ids >= count).tolist() == [False, True, False]
        assert (ids < 0).tolist() == [False, False, True]


def test_augmenters_that_mean_different_losses_are_refused():
    step = Step(None, Classifier(), "train", None, {})
    step.mixed(4, loss=0, owner="GroupMixup")
    assert step.mixed(4, owner="EdgeView").loss == 0
    assert step.mixed(4, loss=0, owner="EdgeView").loss == 0
    with pytest.raises(DebiasError, match="to mean the same loss, but got `loss=0` and `loss=1`"):
        step.mixed(4, loss=1, owner="EdgeView")


def test_the_same_keys_crossed_with_other_counts_are_other_ids():
    step = Step(None, Classifier(), "train", None, {"a": torch.tensor([0, 1, 1]), "b": torch.tensor([1, 0, 1])})
    assert step.ids(("a", "b"), (2, 2)).tolist() == [1, 2, 3]
    assert step.ids(["a", "b"], [2, 5]).tolist() == [1, 5, 6]
    assert step.ids(("a", "b"), (2, 2)).tolist() == [1, 2, 3]

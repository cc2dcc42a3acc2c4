"""What a method cannot do is refused before anything ran: the argument, the rule, what was received, what to do."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from _support.cases import build
from _support.doubles import LogitVariance
from _support.fits import Classifier, loader, make_trainer, parameters, problem, same, tagged, train, val_loader
from _support.runs import Manual, Skipping, ddp, fit
from debias import GroupDRO, GroupMonitor, GroupReweighting
from debias.errors import BadRowsError, BatchKeyError, DebiasError, UnsupportedStrategyError
from debias.step.proxy import StepProxy


def refused(error, match, callbacks, model=None, *, batches=None, **options):
    """The run raises, trains nothing and leaves nothing behind."""
    model = Classifier() if model is None else model
    before, names = parameters(model), set(vars(model))
    with pytest.raises(error, match=match):
        make_trainer(callbacks, **options).fit(model, loader() if batches is None else batches, val_loader())
    assert same(parameters(model), before)
    assert set(vars(model)) - names <= {"_hparams"}
    assert not any(isinstance(value, StepProxy) for value in vars(model).values())


# ------------------------------------------------------------ strategies


class FSDPStrategy(SingleDeviceStrategy):
    """Stands in, by its name, for a strategy that splits the module."""


@pytest.mark.parametrize("watcher", [lambda **o: GroupDRO("place", 3, **o), lambda **o: GroupMonitor("place", 3, **o)])
def test_untested_strategy(watcher):
    strategy = FSDPStrategy(device="cpu", accelerator=None)
    match = r"to be single-device or DDP for Group\w+, but got FSDPStrategy.*`allow_untested_strategy=True`"
    refused(UnsupportedStrategyError, match, [watcher()], strategy=strategy)
    model = Classifier()
    train(model, [watcher(allow_untested_strategy=True)], strategy=FSDPStrategy(device="cpu", accelerator=None))
    assert not same(parameters(model), parameters(Classifier()))


# ------------------------------------------------------------ the user's module


class Iterates(Classifier):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return super().training_step(batch, 0)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor:UserWarning")  # Lightning's own
def test_dataloader_iter():
    match = r"`training_step\(batch, ...\)` for GroupDRO, but got `training_step\(dataloader_iter\)`"
    refused(UnsupportedStrategyError, match, build("GroupDRO"), Iterates())


class LBFGS(Classifier):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=2)


def test_lbfgs():
    refused(UnsupportedStrategyError, "step once per batch for GroupDRO, but got LBFGS", build("GroupDRO"), LBFGS())


def test_manual_optimisation_with_a_penalty():
    match = "automatic optimisation for LogitVariance, but `automatic_optimization` is False.*Use automatic"
    refused(UnsupportedStrategyError, match, build("LogitVariance"), Manual())


# ------------------------------------------------------------ callbacks


def test_two_reweighers():
    match = (
        r"at most one method that reweighs the loss in `callbacks`, but got GroupDRO, GroupReweighting\. Remove all but"
    )
    refused(DebiasError, match, [GroupDRO("place", 3), GroupReweighting("place", 3)])


def test_a_reweigher_and_two_penalties_go_together():
    model = Classifier()
    train(model, [GroupDRO("place", 3), LogitVariance(), LogitVariance(name="second")])
    one = Classifier()
    train(one, [GroupDRO("place", 3), LogitVariance(weight=0.2)])
    for name, value in parameters(model).items():
        torch.testing.assert_close(value, parameters(one)[name], rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------ the batch


def test_missing_tag():
    match = (
        r"(?s)`group='place'` to name a part of the batch or a tag, but the batch is a list of 2 and the tags"
        r" are none\..*`tag\(dataset, place=ids\)`"
    )
    refused(BatchKeyError, match, build("GroupDRO"), batches=loader(bare=True))


def test_wrong_tag_names_those_that_are_there():
    match = r"`group='colour'` .*the tags are \['person', 'place'\]"
    refused(BatchKeyError, match, [GroupDRO("colour", 3, group_counts=[1, 1, 1])])


def test_float_ids():
    match = r"`group='place'` to hold integer ids of shape \(N,\), but got a tensor of shape \(16,\) of torch.float32"
    refused(BatchKeyError, match, build("GroupDRO"), batches=loader(place=torch.zeros(39)))


def test_ids_of_two_axes():
    match = r"ids of shape \(N,\), or a boolean membership \(N, G\), but got shape \(16, 2\) of torch.int64"
    refused(BatchKeyError, match, build("GroupDRO"), batches=loader(place=torch.zeros(39, 2, dtype=torch.long)))


def test_membership_of_another_width():
    match = r"membership `group='place'` to have shape \(N, 3\), but got \(16, 2\)"
    refused(BatchKeyError, match, build("GroupDRO"), batches=loader(place=torch.zeros(39, 2, dtype=torch.bool)))


def test_a_group_without_training_samples():
    match = r"every group to have training samples, but got none of 2"
    refused(DebiasError, match, build("GroupReweighting"), batches=loader(place=torch.arange(39) % 2))


def test_head_that_is_not_there():
    match = r"`head` to be the dotted path of a submodule, but got 'classifier'. There are: .*backbone.0"
    refused(DebiasError, match, build("FeatureNorm", head="classifier"))


# ------------------------------------------------------------ on two ranks: all raise, none hangs


def _refused(rank, name, options):
    fit(rank, name, (8, 8), (4, 3), **options)


def _batch_sampler(rank, kind):
    dataset = tagged(problem(32))
    sampler = kind(RandomSampler(dataset) if kind is Duplicating else SequentialSampler(dataset), 8, drop_last=False)
    trainer = make_trainer(build("GroupDRO"), devices=2, strategy=ddp(), use_distributed_sampler=False)
    trainer.fit(Classifier(), DataLoader(dataset, batch_sampler=sampler), val_loader())


class Duplicating(BatchSampler):
    pass


@pytest.mark.parametrize(
    ("error", "match", "name", "options"),
    [
        (
            BadRowsError,
            "below `n_groups=3`, but 1 rows had",
            "GroupDRO",
            {"tags": {"place": [0, 1, 2] * 12 + [0, 5, 1]}},
        ),
        (BadRowsError, "finite losses, but 1 rows had a NaN", "GroupDRO", {"poison": 11}),
        (
            UnsupportedStrategyError,
            "without `static_graph=True`",
            "LogitVariance",
            {"strategy": {"static_graph": True}},
        ),
        (UnsupportedStrategyError, "automatic optimisation", "Adversary", {"module": "manual"}),
        (BatchKeyError, "the tags are", "GroupDRO", {"method": {"group": "nothing", "group_counts": [1, 1, 1]}}),
    ],
    ids=["bad id on rank 1", "NaN loss on rank 1", "static graph", "manual", "missing tag"],
)
def test_all_ranks_raise(ranks, error, match, name, options):
    ranks.raises(error, match, _refused, name, options)


def test_a_custom_batch_sampler_under_ddp(ranks):
    match = "to divide the data between 2 processes, but got Duplicating, which gives every process the same"
    ranks.raises(UnsupportedStrategyError, match, _batch_sampler, Duplicating)


def test_none_from_the_training_step_on_one_rank(ranks):
    """The rank that skips says so; the other is not left waiting for it."""
    waiting, skipping = ranks.outcomes(_refused, "GroupDRO", {"module": "skipping"}, timeout=60)
    assert isinstance(skipping.error, DebiasError)
    assert "to return a loss on every rank, but got None" in str(skipping.error)
    assert waiting.error is not None


def test_none_from_the_training_step_in_one_process_skips_the_batch():
    model = Skipping()
    train(model, build("GroupDRO"))
    assert not same(parameters(model), parameters(Classifier()))

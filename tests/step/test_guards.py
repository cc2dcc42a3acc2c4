"""What a method cannot do is refused before anything ran: the argument, the rule, what was received, what to do."""

from __future__ import annotations

import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from _support.cases import build
from _support.doubles import LogitVariance
from _support.fits import (
    Classifier,
    deviation,
    loader,
    make_trainer,
    parameters,
    problem,
    same,
    tagged,
    train,
    val_loader,
)
from _support.runs import Manual, Skipping, ddp, fit
from debias import ClassBalanced, GroupDRO, GroupMonitor, GroupReweighting, SampleRecorder, VREx, untag
from debias.errors import BadRowsError, BatchKeyError, DebiasError, UnsupportedStrategyError
from debias.ops import arguments
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


class DeepSpeedStrategy(SingleDeviceStrategy):
    """Another one."""


@pytest.mark.parametrize("watcher", [lambda **o: GroupDRO("place", 3, **o), lambda **o: GroupMonitor("place", 3, **o)])
@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_untested_strategy(watcher, kind):
    strategy = kind(device="cpu", accelerator=None)
    match = (
        rf"to be single-device, DDP or `ModelParallelStrategy` for Group\w+, but got {kind.__name__}"
        r".*`allow_untested_strategy=True`.*To shard the model, choose `ModelParallelStrategy` with `fully_shard`"
    )
    refused(UnsupportedStrategyError, match, [watcher()], strategy=strategy)
    model = Classifier()
    train(model, [watcher(allow_untested_strategy=True)], strategy=kind(device="cpu", accelerator=None))
    assert not same(parameters(model), parameters(Classifier()))


def test_a_method_that_only_trains_stops_no_evaluation():
    """Not even under a strategy that it was not tested on: it does nothing there."""
    for run in ("validate", "test"):
        for callbacks in ([GroupDRO("place", 3)], [GroupDRO("place", 3), VREx("place", 3)]):
            trainer = make_trainer(callbacks, strategy=FSDPStrategy(device="cpu", accelerator=None))
            getattr(trainer, run)(Evaluated(), val_loader(), verbose=False)
        trainer = make_trainer([GroupMonitor("place", 3)], strategy=FSDPStrategy(device="cpu", accelerator=None))
        with pytest.raises(UnsupportedStrategyError, match="for GroupMonitor, but got FSDPStrategy"):
            getattr(trainer, run)(Evaluated(), val_loader(), verbose=False)


class Evaluated(Classifier):
    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)


# ------------------------------------------------------------ the user's module


class Iterates(Classifier):
    def training_step(self, dataloader_iter):
        (x, y), _, _ = next(dataloader_iter)
        return F.cross_entropy(self(x), y)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor:UserWarning")  # Lightning's own
def test_dataloader_iter():
    match = r"`training_step\(batch, ...\)` for GroupDRO, but got `training_step\(dataloader_iter\)`"
    refused(UnsupportedStrategyError, match, build("GroupDRO"), Iterates())


class Fetches(Classifier):
    def validation_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        super().validation_step(batch, 0)

    test_step = validation_step


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor:UserWarning")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument:UserWarning")
def test_dataloader_iter_in_evaluation():
    """Nothing says of what batch the tags are: a monitor would read those of the last training batch."""
    match = r"`{}\(batch, ...\)` for GroupMonitor, but got `{}\(dataloader_iter\)`"
    for run, step in (("validate", "validation_step"), ("test", "test_step")):
        with pytest.raises(UnsupportedStrategyError, match=match.format(step, step)):
            getattr(make_trainer([GroupMonitor("place", 3)]), run)(Fetches(), val_loader(bare=True), verbose=False)
    step = "validation_step"
    refused(UnsupportedStrategyError, match.format(step, step), [GroupMonitor("place", 3)], Fetches())
    make_trainer([GroupDRO("place", 3)]).fit(Fetches(), loader(), val_loader(bare=True))
    with pytest.raises(BatchKeyError, match=r"dataloader_iter` pass `untag\(loader\)`"):
        make_trainer([GroupMonitor("place", 3)]).fit(Iterates(), loader(), val_loader())
    make_trainer([GroupMonitor("place", 3)]).fit(Iterates(), untag(loader()), val_loader())


class LBFGS(Classifier):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=2)


def test_lbfgs():
    refused(UnsupportedStrategyError, "step once per batch for GroupDRO, but got LBFGS", build("GroupDRO"), LBFGS())


class Twice(torch.optim.SGD):
    """Calls the closure twice a batch, as sharpness-aware minimisation does."""

    def step(self, closure):
        with torch.enable_grad():
            closure()
            loss = closure()
        super().step()
        return loss


class Sharp(Classifier):
    def configure_optimizers(self):
        return Twice(self.parameters(), lr=0.1)


def test_an_optimiser_that_runs_the_step_twice():
    """Refused before the state has changed a second time; a method without state does not mind."""
    once, twice = GroupDRO("place", 3), GroupDRO("place", 3)
    train(Classifier(), [once], limit_train_batches=1)
    refused(UnsupportedStrategyError, "step once per batch for GroupDRO, but got Twice", [twice], Sharp())
    assert same(once.module.state_dict(), twice.module.state_dict())
    train(Sharp(), [VREx("place", 3)])
    match = "without running the training step again, but got Twice"
    for method in ("DomainAdversarial", "LearningFromFailure"):  # whose networks have one of the same class
        refused(UnsupportedStrategyError, match, build(method), Sharp())


@pytest.mark.parametrize("base", [LBFGS, Sharp])
def test_fixed_weights_do_not_mind_a_step_that_runs_several_times(base):
    class Doubled(base):
        def training_step(self, batch, batch_idx):
            return 2 * super().training_step(batch, batch_idx)

    watched, own = base(), Doubled()
    weights = GroupReweighting("place", 3, group_weights=[2, 2, 2])
    make_trainer([weights]).fit(watched, loader(place=torch.arange(39) % 3), val_loader())
    train(own, bare=True)
    assert deviation(parameters(watched), parameters(own)) < 1e-12


def test_manual_optimisation_with_a_penalty():
    match = "automatic optimisation for LogitVariance, but `automatic_optimization` is False.*Use automatic"
    refused(UnsupportedStrategyError, match, build("LogitVariance"), Manual())
    for callback, way in ((VREx("place", 3), ", or `debias.VRExMixin` in the step"), (SampleRecorder("x.npz"), "")):
        refused(UnsupportedStrategyError, rf"Use automatic optimisation{way}\.$", [callback], Manual())


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
        r" are none\..*`DataLoader\(tag\(dataset, place=ids\)\)`"
    )
    refused(BatchKeyError, match, build("GroupDRO"), batches=loader(bare=True))


def test_wrong_tag_names_those_that_are_there():
    match = r"`group='colour'` .*the tags are \['index', 'person', 'place'\]"
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


class Grouped(Classifier):
    """A hook of its own adds the ids to the batch."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [*batch, (batch[0][:, 0] > 0).long()]

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[:2], batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch[:2], batch_idx)


def test_ids_that_the_training_set_does_not_show_can_be_counted_by_the_user():
    match = r"`group=2` to name a part of the batch.*pass `group_counts=\[...\]`"
    refused(BatchKeyError, match, [GroupReweighting(2, 2)], Grouped(), batches=loader(bare=True))
    make_trainer([GroupReweighting(2, 2, group_counts=[19, 20])]).fit(Grouped(), loader(bare=True), val_loader())

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(problem())

    refused(DebiasError, r"Pass `class_counts=\[...\]`", [ClassBalanced(2)], batches=DataLoader(Stream(), 4))


def fit_and_collect(callbacks, batches, **options):
    """The texts of the warnings of a run; of nothing but debias's own."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callbacks, **options).fit(Classifier(), batches, val_loader())
    return [str(w.message) for w in caught if "GroupDRO(" in str(w.message) or "GroupMonitor(" in str(w.message)]


@pytest.mark.parametrize("joined", [False, True])
def test_groups_that_the_tags_do_not_hold_are_named_once(joined):
    batches = loader()
    if joined:
        part = batches.dataset
        batches = DataLoader(ConcatDataset([part, Subset(part, [1, 0])]), batch_size=16)
    names = ["a", "b", "c", "d", "e"]
    said = fit_and_collect([GroupDRO("place", 5, group_names=names), GroupMonitor("place", 5)], batches, max_epochs=2)
    assert [text.split(" was given")[0] for text in said] == ["GroupMonitor(place)", "GroupDRO(place)"] or [
        text.split(" was given")[0] for text in said
    ] == ["GroupDRO(place)", "GroupMonitor(place)"]
    assert any("the tags of the training set hold no sample of groups d, e. If" in text for text in said)
    assert any("training and validation set hold no sample of groups 3, 4: their" in text for text in said)


def test_groups_are_not_looked_for_where_that_takes_a_pass_over_the_data():
    class Counted(TensorDataset):
        read = 0

        def __getitem__(self, i):
            Counted.read += 1
            return super().__getitem__(i)

    x, y = problem().tensors
    said = fit_and_collect(
        [GroupDRO(lambda batch: batch[1], 5, name="label")], DataLoader(Counted(x, y), batch_size=13), max_epochs=1
    )
    assert said == []
    assert Counted.read == len(x)


def test_a_monitor_says_nothing_of_groups_that_are_held_out():
    """Leaving a domain out of training is not a mistake; it is in the validation set."""
    x, y = problem(n=32).tensors
    held_out = DataLoader(tagged(TensorDataset(x, y), place=torch.arange(32) % 2), batch_size=16)
    assert fit_and_collect([GroupMonitor("place", 3)], held_out, max_epochs=1) == []


@pytest.mark.parametrize("on_host", [True, False])
def test_a_run_without_any_label_is_said_once(on_host):
    """On other devices the rows are counted in a buffer, which is read at the end of an epoch."""
    batches = loader(place=torch.full((39,), -1))
    model, callback = Classifier(), GroupDRO("place", 3, group_counts=[1, 1, 1], adjustment=1.0)
    before = parameters(model)
    with (
        mock.patch.object(arguments, "on_host", return_value=on_host),
        pytest.warns(UserWarning, match="no labelled") as caught,
    ):
        make_trainer([callback], max_epochs=2, log_every_n_steps=2).fit(model, batches, val_loader())
    said = [str(w.message) for w in caught if "no labelled sample" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith("GroupDRO(place) has seen no labelled sample in this epoch: all ids of `group='place'`")
    assert same(parameters(model), before)


@pytest.mark.parametrize("on_host", [True, False])
def test_one_label_is_enough_to_say_nothing(on_host):
    """Also where only the first batch of an epoch holds it."""
    place = torch.full((39,), -1)
    place[3] = 1
    with mock.patch.object(arguments, "on_host", return_value=on_host):
        callback = GroupDRO("place", 3, group_counts=[1, 1, 1], adjustment=1.0)
        make_trainer([callback], max_epochs=2, log_every_n_steps=1).fit(Classifier(), loader(place=place), val_loader())


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


WEIGHT = torch.tensor([1.0, 4.0], dtype=torch.float64)
SUMS = {
    "weights over a count": lambda x, z, y: F.cross_entropy(z, y, WEIGHT, reduction="sum") / len(x),
    "ignored over a count": lambda x, z, y: F.cross_entropy(z, ignored(x, y), reduction="sum") / len(x),
    "mask over a count": lambda x, z, y: (F.cross_entropy(z, y, reduction="none") * (x[:, 0] > 0)).sum() / len(x),
    "undivided": lambda x, z, y: F.cross_entropy(z, y, reduction="sum"),
    "over a constant": lambda x, z, y: F.cross_entropy(z, y, reduction="sum") / 100,
    "weights": lambda x, z, y: F.cross_entropy(z, y, WEIGHT, reduction="sum") / WEIGHT[y].sum(),
    "ignored": lambda x, z, y: (
        F.cross_entropy(z, ignored(x, y), reduction="sum") / (ignored(x, y) >= 0).sum().clamp(min=1)
    ),
    "mask": lambda x, z, y: (F.cross_entropy(z, y, reduction="none") * (x[:, 0] > 0)).sum() / (x[:, 0] > 0).sum(),
    "mean of a mask": lambda x, z, y: (F.cross_entropy(z, y, reduction="none") * (x[:, 0] > 0)).mean(),
    "count": lambda x, z, y: 0.5 * F.cross_entropy(z, y, reduction="sum") / len(x),
}


def ignored(x, y):
    return torch.where(x[:, 0] > 0, y, -100)


class Sums(Classifier):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def training_step(self, batch, batch_idx):
        x, y = batch
        return SUMS[self.name](x, self(x), y)


def _sums(rank, name, method, batches, nothing):
    data = loader(sizes=(8, 5), last=(0, 0), rank=rank, n=26)
    if nothing:  # of what rank 1 has counts
        data.dataset.dataset.tensors[0][8:13, 0] = -1.0
    options = {"devices": 2, "strategy": ddp(), "use_distributed_sampler": False, "limit_train_batches": batches}
    make_trainer(build(method), **options).fit(Sums(name), data, val_loader())


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("undivided", "GroupDRO"),
        ("undivided", "VREx"),
        ("over a constant", "GroupDRO"),
    ],
)
def test_a_sum_that_is_not_divided_by_what_it_runs_over(ranks, name, method):
    match = r"divide the sum of `cross_entropy` by what it runs over.*`losses.sum\(\) / mask.sum"
    ranks.raises(DebiasError, match, _sums, name, method, 1, False)


@pytest.mark.parametrize(
    ("name", "nothing"),
    [
        ("weights", False),
        ("ignored", True),
        ("mask", False),
        ("mean of a mask", False),
        ("count", False),
        ("weights over a count", False),
        ("ignored over a count", True),
        ("mask over a count", False),
    ],
)
def test_a_sum_that_is(ranks, name, nothing):
    ranks.run(_sums, name, "GroupDRO", 2, nothing)


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

"""Steps fed by several loaders: whose sample is a row, and what becomes of losses and features of the others."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset, default_collate

from _support.runs import ddp
from debias import (
    CORAL,
    MMD,
    DomainAdversarial,
    Fishr,
    GroupDRO,
    GroupMixup,
    GroupMonitor,
    GroupReweighting,
    HessianAlignment,
    VREx,
    tag,
    untag,
)
from debias.errors import AmbiguousLossError, BatchKeyError, DebiasError, HeadNotFoundError, RowsError
from debias.functional import coral_penalty, group_dro_weights, mmd_penalty
from debias.step.loaders import open_batch
from debias.step.tagged import TaggedBatch, TaggedSample
from debias.tap.rows import RowTracker

D, C = 4, 3
random = torch.Generator().manual_seed(0)
QUIET: Any = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1,
}  # fmt: skip


def samples(n: int) -> TensorDataset:
    x = torch.randn(n, D, generator=random).double()
    return TensorDataset(x, torch.randint(C, (n,), generator=random))


SOURCE, TARGET = samples(12), samples(6)
PLACES = torch.tensor([0, 0, 1, 1, 1, 2, 0, 1, 0, 2, 1, 1]), torch.tensor([1, 2, 2, 0, 1, 1])
SIZES = 4, 2  # three batches each


class Model(L.LightningModule):
    def __init__(self, step: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.head = nn.Sequential(nn.Linear(D, 5), nn.Tanh()).double(), nn.Linear(5, C).double()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loaders(tags: str = "both", sizes: tuple[int, int] = SIZES) -> list[DataLoader]:
    """Two loaders, of which both, the first or none are tagged."""
    sets = [
        tag(data, place=places) if tags == "both" or (tags == "source" and data is SOURCE) else data
        for data, places in zip((SOURCE, TARGET), PLACES, strict=True)
    ]
    return [DataLoader(data, batch_size=size) for data, size in zip(sets, sizes, strict=True)]


def one_loader() -> DataLoader:
    """The same batches from one loader: in each four samples of the one set, then two of the other."""
    data = tag(ConcatDataset([SOURCE, TARGET]), place=torch.cat(PLACES))
    order = [[*range(4 * i, 4 * i + 4), 12 + 2 * i, 13 + 2 * i] for i in range(3)]
    return DataLoader(data, batch_sampler=order)


def fit(step: Any, given: Any, *callbacks: Any, **options: Any) -> dict[str, Tensor]:
    model = Model(step)
    L.Trainer(callbacks=list(callbacks), **(QUIET | options)).fit(model, given)
    return model.state_dict()


def joined(model: Model, batch: Any) -> Tensor:
    """One pass over the samples of all loaders."""
    parts = list(batch.values()) if isinstance(batch, dict) else batch
    x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return F.cross_entropy(model(x), y)


def one(model: Model, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def two_passes(model: Model, batch: Any) -> Tensor:
    """The usual style of domain adaptation: a loss of the source, and features of the target."""
    (x, y), (target, _) = batch
    loss = F.cross_entropy(model(x), y)
    model.body(target)
    return loss


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def differ(found: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert not torch.allclose(found["body.0.weight"], other["body.0.weight"], rtol=0, atol=1e-8)


# -- one loader against the same data in two -------------------------------------------------------

METHODS = {
    "GroupDRO": lambda: GroupDRO("place", 3, step_size=0.5),
    "GroupReweighting": lambda: GroupReweighting("place", 3),
    "VREx": lambda: VREx("place", 3),
    "CORAL": lambda: CORAL("place", 3),
    "MMD": lambda: MMD("place", 3, features="body"),
    "DomainAdversarial": lambda: DomainAdversarial("place", 3, schedule="constant"),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "nested"])
def test_two_loaders_are_as_one_with_the_same_samples(name, kind):
    given: Any = loaders()
    step: Any = joined
    if kind == "dict":
        given = dict(zip(("source", "target"), given, strict=True))
    elif kind == "tuple":
        given = tuple(given)
    elif kind == "nested":
        given = {"labelled": {"source": given[0]}, "others": [given[1]]}
        step = lambda model, batch: joined(model, [batch["labelled"]["source"], batch["others"][0]])  # noqa: E731
    expected = fit(one, one_loader(), METHODS[name]())
    equal(fit(step, given, METHODS[name]()), expected)
    differ(expected, fit(one, untag(one_loader())))


@pytest.mark.parametrize("method", [CORAL, MMD])
def test_two_passes_are_as_one_over_all_samples(method):
    """Each pass by itself, and features of the source alone would give no penalty."""
    penalty = {CORAL: coral_penalty, MMD: mmd_penalty}[method]

    def by_hand(model: Model, batch: Any) -> Tensor:
        features = model.body(torch.cat((batch[0][0], batch[1][0])))
        return one(model, batch[0]) + penalty(features, torch.tensor([0] * 4 + [1] * 2), 2)

    found = fit(two_passes, loaders("none"), method("loader", 2, features="body"))
    equal(found, fit(by_hand, loaders("none")))
    differ(found, fit(two_passes, loaders("none")))


def test_an_adversary_tells_the_loaders_apart_in_two_passes():
    """As from one loader, in one pass, with a loss of the source alone."""

    def one_pass(model: Model, batch: Any) -> Tensor:
        features = model.body(batch[0])
        return F.cross_entropy(model.head(features[:4]), batch[1][:4])

    def method(domain: str) -> DomainAdversarial:
        return DomainAdversarial(domain, 2, features="body", schedule="constant")

    data = tag(ConcatDataset([SOURCE, TARGET]), domain=[0] * 12 + [1] * 6)
    expected = fit(one_pass, DataLoader(data, batch_sampler=one_loader().batch_sampler), method("domain"))
    found = fit(two_passes, loaders("none"), method("loader"))
    equal(found, expected)
    differ(found, fit(two_passes, loaders("none")))


@pytest.mark.parametrize("how", ["features", "head"])
def test_views_of_one_loader_are_joined(how):
    """Two passes over views of a batch are as one over both."""

    def passes(model: Model, batch: Any) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(model(x), y)
        if how == "features":
            model.body(x.flip(1))
        else:
            model(x.flip(1))
        return loss

    def by_hand(model: Model, batch: Any) -> Tensor:
        x, y, place = batch
        features = model.body(torch.cat((x, x.flip(1))))
        return F.cross_entropy(model(x), y) + coral_penalty(features, place.repeat(2), 3)

    data = TensorDataset(*SOURCE.tensors, PLACES[0])
    named = {"features": "body"} if how == "features" else {"head": "head"}
    method = CORAL("place", 3, **named)
    found = fit(passes, DataLoader(tag(SOURCE, place=PLACES[0]), batch_size=4), method)
    equal(found, fit(by_hand, DataLoader(data, batch_size=4)))


@pytest.mark.parametrize("head", [None, "head"])
@pytest.mark.parametrize("method", [Fishr, HessianAlignment])
def test_a_penalty_on_the_head_takes_the_run_that_made_the_loss(method, head):
    def two_runs(model: Model, batch: Any) -> Tensor:
        model(batch[1][0])
        loss = one(model, batch[0])
        model(batch[1][0])
        return loss

    found = fit(two_runs, loaders("source"), method("place", 3, head=head), max_epochs=2)
    source = loaders("source")[0]
    equal(found, fit(one, source, method("place", 3, head=head), max_epochs=2))
    differ(found, fit(one, untag(source), max_epochs=2))


def test_classes_of_a_conditional_adversary_are_of_the_labelled_loader():
    def method(domain: str) -> DomainAdversarial:
        options: Any = {"features": "body", "schedule": "constant", "target": "label", "n_classes": C}
        return DomainAdversarial(domain, 2, conditional=True, **options)

    def one_pass(model: Model, batch: Any) -> Tensor:
        return F.cross_entropy(model.head(model.body(batch[0])[:4]), batch[1][:4])

    source, target = samples(12), samples(6)
    label, domain = source.tensors[1], torch.arange(12) % 2
    given = [DataLoader(tag(source, label=label, domain=domain), batch_size=4), DataLoader(target, batch_size=2)]
    joined_data = tag(
        ConcatDataset([source, target]),
        label=torch.cat((label, torch.full((6,), -1))),
        domain=torch.cat((domain, torch.full((6,), -1))),
    )
    expected = fit(one_pass, DataLoader(joined_data, batch_sampler=one_loader().batch_sampler), method("domain"))
    equal(fit(two_passes, given, method("domain")), expected)


def test_a_teacher_without_gradients_gives_no_features():
    def step(model: Model, batch: Any) -> Tensor:
        with torch.no_grad():
            model.body(batch[0].flip(1))
        return one(model, batch)

    data = DataLoader(tag(SOURCE, place=PLACES[0]), batch_size=4)
    equal(fit(step, data, CORAL("place", 3, features="body")), fit(one, data, CORAL("place", 3, features="body")))


# -- whose loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GroupDRO", "GroupReweighting", "VREx"])
@pytest.mark.parametrize("sizes", [(4, 2), (4, 4)])
def test_a_loss_of_untagged_samples_alone_is_the_users(name, sizes):
    """Also where both loaders give equally many samples: nothing is borrowed."""

    def both(model: Model, batch: Any) -> Tensor:
        return one(model, batch[0]) + one(model, batch[1])

    def target_as_other_term(model: Model, batch: Any) -> Tensor:
        (x, y), (target, labels) = batch
        target_loss = -model(target).log_softmax(1)[torch.arange(len(labels)), labels].mean()
        return F.cross_entropy(model(x), y) + target_loss

    def method() -> Any:
        return {
            "GroupDRO": lambda **o: GroupDRO("place", 3, step_size=0.5, **o),
            "GroupReweighting": lambda **o: GroupReweighting("place", 3, **o),
            "VREx": lambda **o: VREx("place", 3, **o),
        }[name]

    found = fit(both, loaders("source", sizes), method()())
    equal(found, fit(target_as_other_term, loaders("source", sizes), method()(loss=0)))
    differ(found, fit(both, loaders("none", sizes)))


def test_losses_of_several_loaders_are_added_up_by_group():
    """The loss of a group is what the step returns for its samples alone."""

    def both(model: Model, batch: Any) -> Tensor:
        return one(model, batch[0]) + one(model, batch[1])

    log_weights = torch.zeros(3).double()

    def by_hand(model: Model, batch: Any) -> Tensor:
        total = torch.zeros(3).double()
        for x, y, place in batch:
            losses = F.cross_entropy(model(x), y, reduction="none")
            members = F.one_hot(place, 3).double()
            total = total + losses @ members / members.sum(0).clamp_min(1)
        log_weights.copy_(group_dro_weights(log_weights, total.detach(), step_size=0.5))
        return total @ log_weights.exp()

    sets = [TensorDataset(*data.tensors, places) for data, places in zip((SOURCE, TARGET), PLACES, strict=True)]
    plain = [DataLoader(data, batch_size=size) for data, size in zip(sets, SIZES, strict=True)]
    equal(fit(both, loaders(), GroupDRO("place", 3, step_size=0.5, loss="sum")), fit(by_hand, plain))


def test_a_consistency_loss_is_left_where_the_other_loss_is_chosen():
    """Of two outputs of the network nobody can tell whose they are."""

    def step(model: Model, batch: Any) -> Tensor:
        target = batch[1][0]
        return one(model, batch[0]) + F.mse_loss(model(target), model(target.flip(1)).detach())

    def by_hand(model: Model, batch: Any) -> Tensor:
        target = batch[1][0]
        return one(model, batch[0]) + (model(target) - model(target.flip(1)).detach()).square().mean()

    for sizes in (SIZES, (4, 4)):
        found = fit(step, loaders("source", sizes), GroupDRO("place", 3, step_size=0.5, loss=0))
        equal(found, fit(by_hand, loaders("source", sizes), GroupDRO("place", 3, step_size=0.5, loss=0)))
        with pytest.raises(AmbiguousLossError, match=r"2: cross_entropy, mse_loss.*`loss=<index>`"):
            fit(step, loaders("source", sizes), GroupDRO("place", 3))


REFUSED = {
    "tagged and untagged samples in one loss": (joined, "source", RowsError, r"those of a loader.*without them"),
    "two losses, none chosen": (
        lambda m, b: one(m, b[0]) + one(m, b[1]),
        "both",
        AmbiguousLossError,
        r"one loss.*`loss='sum'`",
    ),
    "a loss of the untagged loader alone": (
        lambda m, b: one(m, b[1]),
        "source",
        RowsError,
        r"those of '0', but.*others?",
    ),
    "targets of unknown origin": (
        lambda m, b: F.cross_entropy(
            torch.cat([m(x) for x, _ in b]), torch.tensor([label for _, y in b for label in y.tolist()])
        ),
        "both",
        RowsError,
        "cannot be followed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("sizes", [(4, 2), (4, 4)])
def test_what_cannot_be_told_is_refused(name, sizes):
    step, tags, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        fit(step, loaders(tags, sizes), GroupDRO("place", 3))


def test_a_batch_of_several_loaders_is_not_cut_by_group():
    for tags in ("both", "source"):
        with pytest.raises(RowsError, match="one training loader with `losses='split'`"):
            fit(joined, loaders(tags, (4, 4)), GroupDRO("place", 3, losses="split"))


def test_samples_of_several_loaders_are_not_mixed():
    mixup = GroupMixup(input="0.0", target="0.1", pairs="any")
    with pytest.raises(BatchKeyError, match="samples of one loader where GroupMixup mixes"):
        fit(joined, loaders(), mixup, GroupDRO("place", 3))
    fit(lambda m, b: one(m, b[0]), loaders("source"), mixup, GroupDRO("place", 3))


def test_features_that_miss_a_loader_are_refused():
    source_only = lambda model, batch: one(model, batch[0])  # noqa: E731
    with pytest.raises(RowsError, match=r"every loader that has ids, but it ran on none of '1'"):
        fit(source_only, loaders("none"), CORAL("loader", 2, features="body"))
    with pytest.raises(RowsError, match=r"Name a module of a network that is given the batch itself"):
        fit(source_only, loaders("none"), CORAL("loader", 2, head="head"))
    with pytest.raises(HeadNotFoundError, match=r"features to be named.*`features='dotted.path'`"):
        fit(two_passes, loaders("none"), CORAL("loader", 2))

    def both(model: Model, batch: Any) -> Tensor:
        model(batch[1][0])
        return one(model, batch[0])

    with pytest.raises(HeadNotFoundError, match=r"ran several times.*`features='dotted.path'`"):
        fit(both, loaders("source"), CORAL("place", 3))


def test_features_of_an_untagged_loader_are_left_out():
    """Of equally many samples, too."""
    method = lambda: CORAL("place", 3, features="body")  # noqa: E731
    found = fit(two_passes, loaders("source", (4, 2)), method())
    equal(found, fit(one, DataLoader(tag(SOURCE, place=PLACES[0]), batch_size=4), method()))


# -- keys ------------------------------------------------------------------------------------------


def test_a_place_in_the_batch_is_of_its_loader():
    """`"source.2"` are ids of the source, also where the target has as many samples."""
    sets = [TensorDataset(*data.tensors, places) for data, places in zip((SOURCE, TARGET), PLACES, strict=True)]
    given = {name: DataLoader(data, batch_size=2) for name, data in zip(("source", "target"), sets, strict=True)}
    of = lambda name: lambda model, batch: one(model, batch[name])  # noqa: E731
    found = fit(of("source"), given, GroupDRO("source.2", 3, step_size=0.5), limit_train_batches=3)
    alone = DataLoader(tag(SOURCE, place=PLACES[0]), batch_size=2)
    equal(found, fit(one, alone, GroupDRO("place", 3, step_size=0.5), limit_train_batches=3))
    with pytest.raises(DebiasError):
        fit(of("target"), given, GroupDRO("source.2", 3))
    with pytest.raises(BatchKeyError, match=r"callable `group`.*2 ids, and 2 of 'source', 2 of 'target'"):
        fit(of("source"), given, GroupDRO(lambda batch: batch["source"][2], 3, name="place"))
    with pytest.raises(BatchKeyError, match=r"tag of a loader.*'source', 'target'"):
        fit(of("source"), given, GroupDRO("plaec", 3))


def test_keys_that_are_crossed_are_of_the_same_loader():
    given = [
        DataLoader(tag(SOURCE, place=PLACES[0]), batch_size=4),
        DataLoader(tag(TARGET, time=PLACES[1]), batch_size=2),
    ]
    with pytest.raises(BatchKeyError, match=r"same loader, but got `time` from '1' and others from '0'"):
        fit(lambda m, b: one(m, b[0]), given, GroupDRO(("place", "time"), (3, 3)))


def test_methods_may_read_the_ids_of_different_loaders():
    """Alone each would do the same."""
    given = [
        DataLoader(tag(SOURCE, place=PLACES[0]), batch_size=4),
        DataLoader(tag(TARGET, time=PLACES[1]), batch_size=2),
    ]

    def by_hand(model: Model, batch: Any) -> Tensor:
        return one(model, batch[0]) + coral_penalty(model.body(batch[1][0]), batch[1][2], 3)

    found = fit(two_passes, given, GroupDRO("place", 3, step_size=0.5), CORAL("time", 3, features="body"))
    target = DataLoader(TensorDataset(*TARGET.tensors, PLACES[1]), batch_size=2)
    equal(found, fit(by_hand, [given[0], target], GroupDRO("place", 3, step_size=0.5, loss=0)))


def test_a_tag_called_loader_is_that_tag():
    data = DataLoader(tag(SOURCE, loader=PLACES[0]), batch_size=4)
    found = fit(one, data, GroupDRO("loader", 3, step_size=0.5))
    equal(found, fit(one, DataLoader(tag(SOURCE, place=PLACES[0]), batch_size=4), GroupDRO("place", 3, step_size=0.5)))


# -- how loaders are walked ------------------------------------------------------------------------


class Seen(CORAL):
    """Keeps the ids of each step."""

    def penalise(self, call: Any, step: Any) -> Tensor:
        vars(self).setdefault("seen", []).append(self.sample_ids(step).tolist())
        return super().penalise(call, step)


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_loaders_are_told_apart_in_every_mode(mode):
    """The source has three batches of 4 and the target two of 3; in `max_size` the third batch has no target."""

    def step(model: Model, batch: Any) -> Tensor:
        for part in batch[1:]:
            if part is not None:
                model.body(part[0])
        return one(model, batch[0])

    method = Seen("loader", 2, features="body")
    fit(step, CombinedLoader(loaders("none", (4, 3)), mode), method)
    both, source = [0] * 4 + [1] * 3, [0] * 4
    assert (
        method.seen
        == {
            "min_size": [both] * 2,
            "max_size": [both, both, source],
            "max_size_cycle": [both] * 3,
        }[mode]
    )


class Reloading(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loaders("none")


def test_loaders_that_are_made_anew_are_told_apart():
    method = Seen("loader", 2, features="body")
    fit(two_passes, Reloading(), method, max_epochs=2, reload_dataloaders_every_n_epochs=1)
    assert method.seen == [[0] * 4 + [1] * 2] * 6


def test_loaders_with_workers_and_a_collate_function_are_told_apart():
    method = Seen("loader", 2, features="body")
    sets = zip((SOURCE, TARGET), SIZES, strict=True)
    given = [DataLoader(x, size, num_workers=1, collate_fn=lambda items: default_collate(items)) for x, size in sets]
    before = [loader.collate_fn for loader in given]
    fit(two_passes, given, method)
    assert method.seen == [[0] * 4 + [1] * 2] * 3
    assert [loader.collate_fn for loader in given] == before


class Own:
    """Batches without a DataLoader."""

    def __iter__(self) -> Any:
        return iter(DataLoader(TARGET, batch_size=2))

    def __len__(self) -> int:
        return 3


def test_a_loader_of_unknown_size_is_refused_only_where_its_samples_are_meant():
    given = [loaders("source")[0], Own()]
    fit(two_passes, given, GroupDRO("place", 3))
    with pytest.raises(BatchKeyError, match=r"DataLoader that collates.*domain='loader'.*'1'"):
        fit(two_passes, given, CORAL("loader", 2, features="body"))


def test_what_loaders_gave_is_found_at_any_depth():
    tagged = TaggedBatch((1, 2), {"place": torch.zeros(2)})
    bare, parts = open_batch({"a": [tagged, None], "b": (4, 5)})
    assert bare == {"a": [(1, 2), None], "b": (4, 5)}
    assert [(part.path, part.loader, part.n) for part in parts] == [(("a", 0), 0, 2), (("b",), 2, None)]
    plain = [(torch.zeros(1), torch.ones(1)), "text"]
    bare, parts = open_batch(plain)
    assert bare is plain
    assert [part.path for part in parts] == [()]


def test_tagged_samples_are_no_loaders():
    """A list of them is a batch that nobody has collated; beside a batch one is what its loader gave."""
    sample, batch = TaggedSample(1, {"place": torch.tensor(2)}), TaggedBatch(3, {}, 4)
    samples = [sample, sample]
    bare, parts = open_batch(samples)
    assert bare is samples
    assert [(part.path, part.tags) for part in parts] == [((), {})]
    bare, parts = open_batch([sample, batch])
    assert bare == [1, 3]
    assert [(part.path, part.loader, part.n) for part in parts] == [((0,), 0, None), ((1,), 1, 4)]


# -- two ranks -------------------------------------------------------------------------------------


def on_ranks(rank: int, name: str, world: int) -> dict[str, Tensor]:
    """Each of two ranks has another share of both loaders, in one batch."""
    shares = {1: [(slice(None), slice(None))], 2: [(slice(0, 3), slice(0, 5)), (slice(3, None), slice(5, None))]}
    given = []
    for data, places, share in zip((SOURCE, TARGET), PLACES, shares[world][rank], strict=True):
        part = TensorDataset(*(x[share] for x in data.tensors))
        given.append(DataLoader(tag(part, place=places[share]), batch_size=12))
    methods = {
        "GroupDRO": lambda: [GroupDRO("place", 3, step_size=0.5)],
        "two losses": lambda: [GroupDRO("place", 3, step_size=0.5, loss="sum")],
        "CORAL": lambda: [CORAL("loader", 2, features="body"), GroupDRO("place", 3, loss=0)],
        "MMD": lambda: [MMD("loader", 2, features="body"), GroupDRO("place", 3, loss=0)],
        "DomainAdversarial": lambda: [DomainAdversarial("loader", 2, features="body", schedule="constant")],
    }
    steps = {"GroupDRO": joined, "two losses": lambda m, b: one(m, b[0]) + one(m, b[1])}
    options = {} if world == 1 else {"devices": 2, "strategy": ddp(), "use_distributed_sampler": False}
    return fit(steps.get(name, two_passes), given, *methods[name](), max_epochs=3, **options)


@pytest.mark.parametrize("name", ["GroupDRO", "two losses", "CORAL", "MMD", "DomainAdversarial"])
def test_two_uneven_ranks_are_as_one_process(ranks, name):
    """Rank 0 has 3 and 5 samples of the loaders, rank 1 has 9 and 1."""
    expected = on_ranks(0, name, 1)
    for found in ranks.run(on_ranks, name, 2):
        equal(found, expected)


# Two batches of the source on each rank; the target has two on rank 0 and one on rank 1.
SHARES: dict[int, Any] = {
    1: [((0, 1, 2, 3, 8, 9, 4, 5, 6, 7, 10, 11), 6, (0, 1, 4, 5, 2, 3), 4)],
    2: [((0, 1, 2, 3, 4, 5, 6, 7), 4, (0, 1, 2, 3), 2), ((8, 9, 10, 11), 2, (4, 5), 2)],
}


def ending(rank: int, name: str, world: int) -> dict[str, Tensor]:
    """The target ends earlier on one rank than on the other."""

    def step(model: Model, batch: Any) -> Tensor:
        if batch[1] is not None:
            model.body(batch[1][0])
        return one(model, batch[0])

    source, size, target, target_size = SHARES[world][rank]
    sets = Subset(tag(SOURCE, place=PLACES[0]), source), Subset(TARGET, target)
    given = [DataLoader(data, batch_size=n) for data, n in zip(sets, (size, target_size), strict=True)]
    method = {
        "CORAL": lambda: CORAL("loader", 2, features="body"),
        "MMD": lambda: MMD("loader", 2, features="body"),
        "DomainAdversarial": lambda: DomainAdversarial("loader", 2, features="body", schedule="constant"),
    }[name]()
    options = {} if world == 1 else {"devices": 2, "strategy": ddp(), "use_distributed_sampler": False}
    return fit(step, CombinedLoader(given, "max_size"), method, GroupDRO("place", 3, loss=0), **options)


@pytest.mark.parametrize("name", ["CORAL", "MMD", "DomainAdversarial"])
def test_a_loader_may_end_earlier_on_one_rank(ranks, name):
    expected = ending(0, name, 1)
    for found in ranks.run(ending, name, 2):
        equal(found, expected)


def refused_on_ranks(rank: int, case: str) -> None:
    options = {"devices": 2, "strategy": ddp(), "use_distributed_sampler": False}
    if case == "features":
        fit(lambda m, b: one(m, b[0]), loaders("none"), CORAL("loader", 2, features="body"), **options)
    else:
        fit(joined, loaders("source"), GroupDRO("place", 3), **options)


@pytest.mark.parametrize(
    ("case", "message"), [("features", "ran on none of '1'"), ("tags", "those of a loader without")]
)
def test_all_ranks_refuse_together(ranks, case, message):
    ranks.raises(RowsError, message, refused_on_ranks, case)


def test_features_of_a_stranger_have_no_sample():
    """As many as there are samples with ids: their rows are not those."""
    x, stranger = torch.randn(4, D), torch.randn(4, D)
    tracker = RowTracker((x,), 4, strangers=[(stranger,)])
    assert tracker.of_layer(x.tanh(), [x]) is None
    assert tracker.of_layer(stranger.tanh(), [stranger]) is False
    assert tracker.loaders_of(stranger) == {1}
    assert tracker.loaders_of(x.tanh()) is None


@dataclass(slots=True)
class Slotted:
    x: Tensor


@pytest.mark.parametrize("make", [Slotted, lambda x: MappingProxyType({"x": x}), lambda x: {"a": (Slotted(x),)}])
def test_strangers_are_known_whatever_their_batch_is_made_of(make):
    stranger = torch.randn(4, D)
    tracker = RowTracker((torch.randn(4, D),), 4, strangers=[make(stranger)])
    assert tracker.loaders_of(stranger) == {1}
    assert tracker.resolve([stranger], 4) is False


class Watched(Model):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        one(self, batch)


class Iterating(Watched):
    """Fetches its training batches itself."""

    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, _, _ = next(dataloader_iter)
        return one(self, batch[0] if self.step == "several" else batch)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor:UserWarning")  # Lightning's own
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument:UserWarning")
def test_a_step_that_fetches_its_batches_gets_them_bare():
    """Beside a monitor, which only looks at the validation."""
    data = DataLoader(tag(SOURCE, place=PLACES[0]), batch_size=4)
    for plain in (DataLoader(SOURCE, batch_size=4), loaders("none")):
        module = Iterating(None if isinstance(plain, DataLoader) else "several")
        L.Trainer(callbacks=[GroupMonitor("place", 3)], **QUIET).fit(module, plain, data)


class Looking(L.Callback):
    """Iterates the training loader by itself, as for statistics of BatchNorm."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.batch = next(iter(trainer.train_dataloader))


def test_a_single_loader_without_tags_yields_what_it_does_without_debias():
    looking = Looking()
    data = DataLoader(tag(SOURCE, place=PLACES[0]), batch_size=4)
    L.Trainer(callbacks=[looking, GroupMonitor("place", 3)], **QUIET).fit(
        Watched(one), DataLoader(SOURCE, batch_size=4), data
    )
    assert isinstance(looking.batch, list)

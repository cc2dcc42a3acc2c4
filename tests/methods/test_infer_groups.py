"""Groups inferred in stage one of a fit: as in two runs by hand, across ranks, across resumes and kills."""

import random

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

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
from _support.runs import ddp
from debias import (
    EvalSampler,
    GroupBalancedSampler,
    GroupDRO,
    GroupMonitor,
    GroupReweighting,
    IdentityAdversarial,
    InferGroups,
    JustTrainTwice,
    LearningFromFailure,
    VREx,
    tag,
)
from debias.errors import DebiasError, UnsupportedStrategyError
from debias.functional import eiil_groups, error_groups, george_groups, spare_groups, useful_groups

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


def by_hand(method, stage_one=2, *, per_class=False, **options):
    """Groups of the training set, from a run of its own."""
    model = Classifier()
    train(model, bare=True, max_epochs=stage_one)
    x, y = problem()[:]
    with torch.no_grad():
        z = model(x)
        if method == "errors":
            return error_groups(z, y, per_class=per_class)
        if method == "eiil":
            return eiil_groups(z, y, per_class=per_class)
        if method == "spare":
            return spare_groups(z.softmax(1), y, **options)[0]
        if method == "george":
            return george_groups(model.backbone(x), y, **options)[0]
        return useful_groups(z, y, F.cross_entropy(z, y, reduction="none"), per_class=per_class)


def as_two_runs(ids, callbacks, epochs):
    model = Classifier()
    trainer = make_trainer(callbacks, max_epochs=epochs)
    trainer.fit(model, loader(inferred=ids), val_loader())
    return parameters(model), [c.state_dict() for c in callbacks]


CASES = {
    "errors": ({}, lambda: [GroupDRO("inferred", 2, step_size=0.5)]),
    "eiil": ({"per_class": True}, lambda: [GroupDRO("inferred", 4, step_size=0.5)]),
    "spare": ({"options": {"n_clusters": 2}}, lambda: [GroupReweighting("inferred", 4)]),
    "george": ({"options": {"max_clusters": 2, "clusterer": "kmeans"}}, lambda: [GroupDRO("inferred", 4)]),
    "useful": ({}, lambda: [VREx(domain="inferred", n_domains=2, penalty_weight=1.0)]),
}


@pytest.mark.parametrize("method", CASES)
def test_one_fit_is_two_runs_by_hand(method):
    options, methods = CASES[method]
    flat = {k: v for k, v in options.items() if k != "options"} | options.get("options", {})
    ids = by_hand(method, **flat)
    expected, states = as_two_runs(ids, methods(), 3)
    model, infer, callbacks = Classifier(), InferGroups(method, 2, **options), methods()
    train(model, [infer, *callbacks], max_epochs=5)
    assert torch.equal(infer.ids, ids)
    assert len(ids.unique()) > 1
    assert same(expected, parameters(model))
    for state, callback in zip(states, callbacks, strict=True):
        assert same({**state, "epoch": 4}, callback.state_dict())


def test_an_adversary_and_an_own_callable_work_too():
    def odd(record, labels):
        assert set(record) == {"logits", "loss"}
        assert record["logits"].shape == (39, 2)
        return torch.arange(len(labels)) % 3

    expected, _ = as_two_runs(torch.arange(39) % 3, [IdentityAdversarial(identity="inferred", n_identities=3)], 2)
    model = Classifier()
    train(model, [InferGroups(odd, 1), IdentityAdversarial(identity="inferred", n_identities=3)], max_epochs=3)
    assert same(expected, parameters(model))


def test_the_training_pass_can_be_observed():
    a, b = (InferGroups("errors", 1, observe=o) for o in ("pass", "training"))
    twice = JustTrainTwice(1)
    for method in (a, b, twice):
        train(Classifier(), [method], max_epochs=2)
    assert torch.equal(b.ids, twice.ids)
    assert not torch.equal(a.ids, b.ids)
    train(Classifier(), [InferGroups("george", 1, observe="training", options={"max_clusters": 2})], max_epochs=2)


def test_monitors_of_the_validation_set():
    model, infer = Classifier(), InferGroups("errors", 2, validation=True)
    seen = []

    class Look(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            seen.append(trainer.callback_metrics.get("val/worst_group_accuracy", torch.tensor(7.0)).item())

    data = tag(problem(21, seed=1))
    monitor = GroupMonitor("inferred", 2)
    trainer = make_trainer([infer, monitor, Look()], max_epochs=4, num_sanity_val_steps=1)
    trainer.fit(model, loader(), DataLoader(data, 4, sampler=EvalSampler(data)))
    plain = Classifier()
    train(plain, bare=True, max_epochs=2)
    x, y = problem(21, seed=1)[:]
    with torch.no_grad():
        groups = error_groups(plain(x), y)
        right = (model(x).argmax(1) == y).double()
    assert torch.equal(infer.validation_ids, groups)
    worst = min(right[groups == g].mean().item() for g in (0, 1))
    assert trainer.callback_metrics["val/worst_group_accuracy"].item() == pytest.approx(worst)


def run(rank=0, sizes=(16,), last=(7,), method="eiil", observe="pass"):
    many = {"devices": 2, "strategy": ddp(), "use_distributed_sampler": False} if len(sizes) > 1 else {}
    model, infer, dro = Classifier(), InferGroups(method, 2, observe=observe), GroupDRO("inferred", 2, step_size=0.5)
    trainer = make_trainer([infer, dro], max_epochs=4, **many)
    trainer.fit(model, loader(sizes=sizes, last=last, rank=rank), val_loader())
    return {"parameters": parameters(model), "ids": infer.ids, "dro": dro.state_dict()}


@pytest.mark.parametrize(("method", "observe"), [("eiil", "pass"), ("errors", "training"), ("useful", "pass")])
def test_two_uneven_ranks_are_one_process(ranks, method, observe):
    first, second = ranks.run(run, (5, 11), (2, 5), method, observe)
    assert same(first, second)
    assert deviation(run(method=method, observe=observe), first) < 1e-12


def shuffled():
    return StatefulDataLoader(
        tagged(problem(39)), batch_size=7, sampler=GroupBalancedSampler(torch.arange(39) % 3, 7, seed=3)
    )


class Killed(Exception):
    pass


class Kill(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Killed


def resumable(folder, *, ckpt_path=None, observe="pass", kill=None):
    """Six steps an epoch, two epochs of stage one, two of stage two."""
    model, infer, dro = Classifier(optimizer="adam"), InferGroups("errors", 2, observe=observe), GroupDRO("inferred", 2)
    steps = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    ends = ModelCheckpoint(
        folder, filename="end{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=False
    )
    extra = [] if kill is None else [Kill(kill)]
    trainer = make_trainer([infer, dro, *extra, steps, ends], enable_checkpointing=True, max_epochs=4)
    trainer.fit(model, shuffled(), val_loader(), ckpt_path=ckpt_path)
    state = {k: v for k, v in infer.state_dict().items() if k != "stale"}
    return {
        "model": parameters(model),
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "method": [state, dro.state_dict()],
    }


@pytest.mark.parametrize("observe", ["pass", "training"])
def test_resuming_is_bitwise_in_both_stages_and_in_the_switch(tmp_path, observe):
    whole = resumable(tmp_path / "whole", observe=observe)
    for name in ("step=4", "step=10", "endepoch=0", "endepoch=1", "step=13", "step=20", "endepoch=2"):
        path = tmp_path / "whole" / f"{name}.ckpt"
        torch.load(path, weights_only=True)
        assert same(whole, resumable(tmp_path / name, ckpt_path=path, observe=observe)), name


def killed(folder, kills, seed):
    """A run that is killed at random steps, each time resumed from its latest checkpoint of a step within an epoch."""
    draw, path, count = random.Random(seed), None, 0
    while True:
        done = 0 if path is None else int(path.stem.partition("=")[2])
        kill = draw.randint(done, 23) if count < kills else None
        count += 1
        try:
            return resumable(folder / str(count), ckpt_path=path, kill=kill), count - 1
        except Killed:
            found = [p for p in folder.rglob("step=*.ckpt") if int(p.stem.partition("=")[2]) % 6]
            path = max(found, key=lambda p: int(p.stem.partition("=")[2]), default=None)


def test_a_run_that_is_killed_again_and_again_is_not_lost(tmp_path):
    result, kills = killed(tmp_path / "killed", 3, 0)
    assert kills == 3
    assert same(resumable(tmp_path / "whole"), result)


@pytest.mark.slow
def test_forty_kills(tmp_path):
    whole, total = resumable(tmp_path / "whole"), 0
    for seed in range(10):
        result, kills = killed(tmp_path / str(seed), 4, seed)
        assert same(whole, result)
        total += kills
    assert total == 40


def test_afterwards_nothing_is_left():
    model, infer, dro = Classifier(), InferGroups("eiil", 1), GroupDRO("inferred", 2)
    data = loader()
    for epochs, error in ((3, None), (3, ValueError)):
        extra = [] if error is None else [Raise()]
        infer, dro = InferGroups("eiil", 2), GroupDRO("inferred", 2)
        trainer = make_trainer([infer, dro, *extra], max_epochs=epochs)
        if error is None:
            trainer.fit(model, data, val_loader())
        else:
            with pytest.raises(ValueError, match="stop"):
                trainer.fit(model, data, val_loader())
        assert not {"on_train_start", "on_train_epoch_end", "on_before_optimizer_step"} & set(vars(dro))
        assert set(data.dataset.tags) == {"place", "person", "index"}
        assert not {"training_step", "validation_step", "log", "log_dict"} & set(vars(model))
        assert not trainer.fit_loop.min_epochs


class Raise(L.Callback):
    def on_train_batch_end(self, *_):
        raise ValueError("stop")


def test_a_fit_that_was_broken_off_in_stage_one_begins_anew():
    """With another module: what the first one started from must not come back."""
    infer = InferGroups("errors", 2)
    with pytest.raises(ValueError, match="stop"):
        train(Classifier(lr=0.5), [infer, Raise()], max_epochs=4)
    model, other = Classifier(), Classifier()
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p += 0.1
            q += 0.1
    train(model, [infer], max_epochs=4)
    train(other, [InferGroups("errors", 2)], max_epochs=4)
    assert same(parameters(model), parameters(other))


class Scaled(Classifier):
    def forward(self, x):
        return super().forward(x) / 2


def test_a_head_that_is_not_found_is_named():
    options = {"max_clusters": 2, "clusterer": "kmeans"}
    with pytest.raises(DebiasError, match=r"features to have shape \(N, D\)"):
        train(Scaled(), [InferGroups("george", 1, options=options)], max_epochs=2)
    model = Scaled()
    train(model, [InferGroups("george", 1, options=options, head="head")], max_epochs=2)
    assert not model.head._forward_pre_hooks
    named, found = (InferGroups("george", 1, options=options, head=head) for head in ("head", None))
    for method in (named, found):
        train(Classifier(), [method], max_epochs=2)
    assert torch.equal(named.ids, found.ids)
    with pytest.raises(DebiasError, match="one class of each sample"):
        eiil_groups(torch.zeros(3, 2), torch.zeros(3, 2), per_class=True)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(problem())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: InferGroups("kmeans"), "`method` to be one of 'errors', 'eiil'"),
        (lambda: InferGroups("spare", per_class=True), "`per_class` for"),
        (lambda: InferGroups("george", validation=True), "`validation=True` for"),
        (lambda: InferGroups(epochs=0), "`epochs`"),
        (
            lambda: InferGroups("spare", options={"clusters": 2}),
            "`options` to hold options of `spare_groups`, 'n_clu",
        ),
        (
            lambda: InferGroups("spare", options={"n_clusters": [2, 1]}),
            r"`n_clusters` to be a number in \[2, 1000000\]",
        ),
        (lambda: InferGroups("george", options={"clusterer": "ward"}), "`clusterer` to be 'gmm' or 'kmeans'"),
        (lambda: InferGroups(lambda record, labels: labels, options={"seed": 1}), "no `options` where `method`"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(DebiasError, match=match):
        make()


@pytest.mark.parametrize(
    ("callbacks", "match"),
    [
        (lambda: [GroupDRO("inferred", 2), InferGroups()], r"before GroupDRO\(inferred\)"),
        (lambda: [InferGroups(), InferGroups(name="b")], "one method in two stages"),
        (lambda: [InferGroups(), WeightAveraging()], "no WeightAveraging beside InferGroups"),
        (lambda: [InferGroups(epochs=4)], "`max_epochs=4`"),
        (lambda: [InferGroups(tag="place")], "no tag `place` of its own"),
    ],
)
def test_bad_lists_are_refused_before_training(callbacks, match):
    model = Classifier()
    before = parameters(model)
    with pytest.raises((DebiasError, UnsupportedStrategyError), match=match):
        train(model, callbacks(), max_epochs=4)
    assert same(before, parameters(model))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (lambda: problem(), r"every training sample .*`tag\(dataset\)`"),
        (lambda: Stream(), "map-style training set for InferGroups"),
        (lambda: ConcatDataset([tag(problem()), tag(problem())]), "joins 2 sets"),
    ],
)
def test_bad_sets_are_refused_before_training(data, match):
    model = Classifier()
    before = parameters(model)
    with pytest.raises(DebiasError, match=match):
        make_trainer([InferGroups()], max_epochs=2).fit(model, DataLoader(data(), 16), val_loader(bare=True))
    assert same(before, parameters(model))


def test_what_inference_finds_has_to_fit_the_method():
    def all_zero(record, labels):
        return torch.zeros(len(labels), dtype=torch.long)

    with pytest.raises(DebiasError, match=r"(?s)each of the 2 groups that GroupDRO\(inferred\).*left group 1 empty"):
        train(Classifier(), [InferGroups(all_zero), GroupDRO("inferred", 2)], max_epochs=2)
    with pytest.raises(DebiasError, match=r"Expected 2 groups, as GroupDRO\(inferred\) does, but.*has found 4"):
        train(Classifier(), [InferGroups("eiil", per_class=True), GroupDRO("inferred", 2)], max_epochs=2)
    with pytest.raises(DebiasError, match=r"integer ids of shape \(39,\)"):
        train(Classifier(), [InferGroups(lambda record, labels: torch.zeros(3))], max_epochs=2)


def test_a_set_that_changes_its_length_is_refused(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=2)
    make_trainer([InferGroups(), save], max_epochs=2, enable_checkpointing=True).fit(
        Classifier(), loader(), val_loader()
    )
    again = ModelCheckpoint(tmp_path / "again", filename="x", every_n_train_steps=2)
    with pytest.raises(DebiasError, match=r"keep its length, 39 samples.*but got 45"):
        make_trainer([InferGroups(), again], max_epochs=3, enable_checkpointing=True).fit(
            Classifier(), loader(45), val_loader(), ckpt_path=save.best_model_path
        )


class Growing(Classifier):
    """Loads its training set anew every epoch, ten samples longer."""

    rows = 29

    def train_dataloader(self):
        self.rows += 10
        return DataLoader(tag(problem(self.rows)), 16)


@pytest.mark.parametrize("make", [lambda: InferGroups(epochs=1), lambda: JustTrainTwice(1), LearningFromFailure])
def test_a_set_that_grows_within_a_fit_is_refused(make):
    trainer = make_trainer([make()], max_epochs=3, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(DebiasError, match=r"keep its length, 39 samples when .* saw it first, but got 49"):
        trainer.fit(Growing(), val_dataloaders=val_loader())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_a_validation_set_that_will_not_do_is_said_before_training():
    model = Classifier()
    before = parameters(model)
    with pytest.raises(DebiasError, match="a validation set for `validation=True`"):
        make_trainer([InferGroups(validation=True)], max_epochs=2, limit_val_batches=0).fit(model, loader())
    with pytest.raises(DebiasError, match="every validation sample to carry its number"):
        make_trainer([InferGroups(validation=True)], max_epochs=2).fit(model, loader(), val_loader(bare=True))
    assert same(before, parameters(model))

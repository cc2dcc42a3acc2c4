"""The worst part of a class, parted by a plainly trained network, against counting by hand."""

import pytest
import torch
from torch.utils.data import DataLoader

from _support.fits import Classifier, loader, make_trainer, parameters, problem, same, val_loader
from _support.runs import ddp
from debias import EnvironmentMonitor, EvalSampler, GroupMonitor, tag
from debias.errors import DebiasError

N = 21


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = Classifier()
    trainer = make_trainer([], max_epochs=1)
    trainer.fit(model, loader(bare=True), val_loader(bare=True))
    trainer.save_checkpoint(tmp_path / "erm.ckpt")
    return str(tmp_path / "erm.ckpt")


def by_hand(model, checkpoint):
    """Accuracy of each class where the reference is right and where it is wrong, of the parts that occur."""
    x, y = problem(N, seed=1)[:]
    reference = Classifier()
    reference.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    with torch.no_grad():
        wrong, right = reference(x).argmax(1) != y, model(x).argmax(1) == y
    parts = {(c, w): (y == c) & (wrong == w) for c in (0, 1) for w in (False, True)}
    return {part: right[rows].double().mean().item() for part, rows in parts.items() if rows.any()}


def val():
    data = tag(problem(N, seed=1))
    return DataLoader(data, 4, sampler=EvalSampler(data))


def run(checkpoint, **options):
    model = Classifier()
    trainer = make_trainer([EnvironmentMonitor(checkpoint, 2, **options)], max_epochs=3)
    trainer.fit(model, loader(), val())
    return model, {k: v.item() for k, v in trainer.callback_metrics.items()}


@pytest.mark.parametrize(
    "options", [{"method": "eiil"}, {"method": "errors"}, {"input": lambda batch: {"x": batch[0]}}]
)
def test_parts_are_those_that_the_reference_gets_right_and_wrong(checkpoint, options):
    model, metrics = run(checkpoint, **options)
    expected = by_hand(model, checkpoint)
    assert len(expected) > 2  # the reference is wrong somewhere
    names = {(c, w): f"val/inferred/accuracy_by_group/class {c} {'hard' if w else 'easy'}" for c, w in expected}
    assert {part: metrics[name] for part, name in names.items()} == pytest.approx(expected)
    assert metrics["val/inferred/worst_group_accuracy"] == pytest.approx(min(expected.values()))
    assert min(expected.values()) < max(expected.values())


def test_two_ranks_log_what_one_process_does(checkpoint, ranks):
    expected = by_hand(Classifier(), checkpoint)
    for metrics in ranks.run(_validate, checkpoint):
        assert metrics["val/inferred/worst_group_accuracy"] == pytest.approx(min(expected.values()))


def _validate(rank, checkpoint):
    trainer = make_trainer([EnvironmentMonitor(checkpoint, 2)], devices=2, strategy=ddp())
    trainer.validate(Classifier(), val(), verbose=False)
    return {k: v.item() for k, v in trainer.callback_metrics.items()}


def test_training_is_as_without_it(checkpoint):
    plain = Classifier()
    make_trainer([], max_epochs=3).fit(plain, loader(bare=True), val_loader(bare=True))
    assert same(parameters(run(checkpoint)[0]), parameters(plain))


def test_several_of_them_and_a_users_own_environments_stay_apart(checkpoint):
    """A tag of the data may be called like what this monitor makes."""
    data = tag(problem(N, seed=1), environment=torch.arange(N) // 11)
    own = GroupMonitor("environment", 2)
    monitors = [EnvironmentMonitor(checkpoint, 2), EnvironmentMonitor(checkpoint, 2, method="errors", name="errors")]
    found = []
    for callbacks in ([*monitors, own], [monitors[1]], [own]):
        trainer = make_trainer(callbacks)
        trainer.validate(Classifier(), DataLoader(data, 4), verbose=False)
        found.append({k: v.item() for k, v in trainer.callback_metrics.items()})
    together, *alone = found
    for metrics in alone:
        assert metrics == pytest.approx({k: v for k, v in together.items() if k in metrics}, abs=0, nan_ok=True)
    assert [together[f"val/accuracy_count/{g}"] for g in (0, 1)] == [11, 10]


def test_a_target_that_is_missing_is_in_no_part(checkpoint):
    x, y = problem(N, seed=1)[:]
    target = torch.where(torch.arange(N) < 10, y, -1)
    data = tag(torch.utils.data.TensorDataset(x, y), known=target)
    monitor = EnvironmentMonitor(checkpoint, 2, target="known")
    trainer = make_trainer([monitor])
    trainer.validate(Classifier(), DataLoader(data, 4), verbose=False)
    counts = [int(v) for k, v in trainer.callback_metrics.items() if "/accuracy_count/" in k]
    assert len(counts) == 4
    assert sum(counts) == 10


def test_a_checkpoint_that_is_not_there_or_of_another_network_is_said_before_training(checkpoint, tmp_path):
    with pytest.raises(
        DebiasError, match=r"Expected `reference` to be a checkpoint that can be read.*Correct the path"
    ):
        run(str(tmp_path / "nowhere.ckpt"))
    torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "other.ckpt")
    with pytest.raises(DebiasError, match="Expected `reference` to hold the weights of the same network"):
        run(str(tmp_path / "other.ckpt"))
    with pytest.raises(DebiasError, match="Expected `method` to be 'eiil' or 'errors', but got 'spare'"):
        EnvironmentMonitor("erm.ckpt", 2, method="spare")

"""Just Train Twice: against the algorithm in a loop, across ranks and resumes, and beside other callbacks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from _support.fits import (
    Classifier,
    Manual,
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
from debias import GroupBalancedSampler, JustTrainTwice, tag
from debias.errors import DebiasError, UnsupportedStrategyError

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


def spelled_out(epochs, stage_one, upweight, observe, n=39):
    """Two trainings from the same weights, the second with weights of the first's errors."""
    data = problem(n)
    wrong = {}
    for stage in (1, 2):
        model = Classifier()
        optimizer = model.configure_optimizers()
        for epoch in range(stage_one if stage == 1 else epochs - stage_one):
            for start in range(0, n, 16):
                rows = list(range(start, min(start + 16, n)))
                x, y = data[rows]
                logits = model(x)
                losses = F.cross_entropy(logits, y, reduction="none")
                if stage == 1 and epoch == stage_one - 1 and observe == "training":
                    wrong |= {i: bool(logits[k].argmax() != y[k]) for k, i in enumerate(rows)}
                if stage == 2:
                    raw = [1 + upweight if wrong[i] else 1 for i in range(n)]
                    losses = losses * torch.tensor([raw[i] / (sum(raw) / n) for i in rows], dtype=torch.float64)
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
        if stage == 1 and observe == "pass":
            x, y = data[:]
            wrong = dict(enumerate((model(x).argmax(1) != y).tolist()))
    return parameters(model), wrong


@pytest.mark.parametrize("observe", ["training", "pass"])
def test_against_the_algorithm_in_a_loop(observe):
    expected, wrong = spelled_out(5, 2, 9.0, observe)
    model, method = Classifier(), JustTrainTwice(2, 9.0, observe=observe)
    train(model, [method], max_epochs=5)
    assert method.ids.tolist() == [int(wrong[i]) for i in range(39)]
    assert 0 < sum(wrong.values()) < 39
    assert deviation(expected, parameters(model)) < 1e-12


def test_a_pass_gives_steps_what_lightning_gives_them():
    class Loose(Classifier):
        def training_step(self, *args):
            assert len(args) == 2
            return super().training_step(*args)

    loose, model = Loose(), Classifier()
    for each in (loose, model):
        train(each, [JustTrainTwice(1, 9.0, observe="pass")], max_epochs=3)
    assert same(parameters(loose), parameters(model))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_a_pass_sees_batches_as_steps_do():
    class Changed(Classifier):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [2 * batch[0] + 1, batch[1]]

    x, y = problem()[:]
    changed, model, methods = Changed(), Classifier(), [JustTrainTwice(1, 9.0, observe="pass") for _ in range(2)]
    train(changed, methods[:1], max_epochs=3)
    make_trainer(methods[1:], max_epochs=3).fit(model, DataLoader(tagged(TensorDataset(2 * x + 1, y)), 16))
    assert methods[0].ids.tolist() == methods[1].ids.tolist()
    assert same(parameters(changed), parameters(model))
    single = DataLoader(tagged(problem(dtype=torch.float32)), 16)
    make_trainer([JustTrainTwice(1, observe="pass")], max_epochs=2, precision="64-true").fit(Classifier(), single)


def test_both_ways_of_observing_differ():
    """Without this the test above could not tell one from the other."""
    assert spelled_out(5, 2, 9.0, "training")[1] != spelled_out(5, 2, 9.0, "pass")[1]


def run(rank=0, sizes=(16,), last=(7,), observe="training"):
    many = {"devices": 2, "strategy": ddp(), "use_distributed_sampler": False} if len(sizes) > 1 else {}
    model, method = Classifier(), JustTrainTwice(2, 9.0, observe=observe)
    trainer = make_trainer([method], max_epochs=5, **many)
    trainer.fit(model, loader(sizes=sizes, last=last, rank=rank), val_loader())
    return {
        "parameters": parameters(model),
        "ids": method.ids,
        "optimizer": trainer.optimizers[0].state_dict()["state"],
    }


@pytest.mark.parametrize("observe", ["training", "pass"])
def test_two_uneven_ranks_are_one_process(ranks, observe):
    first, second = ranks.run(run, (5, 11), (2, 5), observe)
    assert same(first, second)
    assert deviation(run(observe=observe), first) < 1e-12


def shuffled(**options):
    return StatefulDataLoader(
        tagged(problem(39)), batch_size=7, sampler=GroupBalancedSampler(torch.arange(39) % 3, 7, seed=3), **options
    )


def resumable(folder, *, ckpt_path=None, observe="training", when="batch"):
    """Six steps an epoch, two epochs of stage one, two of stage two."""
    model, method = Classifier(optimizer="adam"), JustTrainTwice(2, 9.0, observe=observe)
    saving = {"every_n_train_steps": 1} if when == "batch" else {"every_n_epochs": 1, "save_on_train_epoch_end": False}
    save = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **saving)
    trainer = make_trainer([method, save], enable_checkpointing=True, max_epochs=4)
    trainer.fit(model, shuffled(), val_loader(), ckpt_path=ckpt_path)
    state = {k: v for k, v in method.state_dict().items() if k != "stale"}
    return {"model": parameters(model), "optimizer": trainer.optimizers[0].state_dict()["state"], "method": state}


@pytest.mark.parametrize("observe", ["training", "pass"])
def test_resuming_is_bitwise_in_both_stages_and_in_the_switch(tmp_path, observe):
    """Inside stage one, at its end, at the first steps of stage two, later; and where validation has ended."""
    for when, steps in (("batch", (4, 10, 13, 16)), ("validation", (6, 12, 18))):
        whole = resumable(tmp_path / when, observe=observe, when=when)
        for step in steps:
            path = tmp_path / when / f"step={step}.ckpt"
            torch.load(path, weights_only=True)
            assert same(whole, resumable(tmp_path / f"{when}{step}", ckpt_path=path, observe=observe, when=when)), step


def test_without_its_state_a_resumed_run_differs(tmp_path):
    whole = resumable(tmp_path / "a")
    path = tmp_path / "a" / "step=16.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["JustTrainTwice"]["ids"] = 1 - checkpoint["callbacks"]["JustTrainTwice"]["ids"]
    torch.save(checkpoint, path)
    assert not same(whole, resumable(tmp_path / "b", ckpt_path=path))


class Scheduled(Classifier):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def test_schedulers_start_again_and_the_module_is_left_plain():
    model = Scheduled()
    before = set(vars(model)) | {"_hparams"}
    trainer = train(model, [JustTrainTwice(2)], max_epochs=3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)
    assert {k for k in set(vars(model)) - before if not k.startswith("_")} == set()
    assert list(model.state_dict()) == list(Classifier().state_dict())
    assert not trainer.fit_loop.min_epochs


class Worse(Classifier):
    """Validation gets worse from epoch to epoch: the best network of the whole run is one of stage one."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 1.0 + self.trainer.current_epoch, batch_size=len(batch[1]))


def test_no_network_of_stage_one_is_kept_or_stopped_at(tmp_path):
    save = ModelCheckpoint(tmp_path, monitor="val_loss", filename="best", save_last=True)
    stop = EarlyStopping("val_loss", patience=1)
    model, method = Worse(), JustTrainTwice(3)
    trainer = make_trainer([method, save, stop], max_epochs=9, enable_checkpointing=True)
    trainer.fit(model, loader(), val_loader())
    assert trainer.current_epoch == 5  # epoch 3 is the best of stage two, epoch 4 uses the patience up
    assert float(save.best_model_score) == 4.0
    best = torch.load(save.best_model_path, weights_only=True)
    assert best["epoch"] == 3
    assert best["callbacks"]["JustTrainTwice"]["stage"] == 2
    kept = {p.name: torch.load(p, weights_only=True)["epoch"] for p in tmp_path.glob("*.ckpt")}
    assert kept == {"best-v1.ckpt": 3, "last.ckpt": 3}


def test_manual_optimisation_works():
    a, b = Classifier(), Manual()
    train(a, [JustTrainTwice(1, 9.0)], max_epochs=3)
    train(b, [JustTrainTwice(1, 9.0)], max_epochs=3)
    assert same(parameters(a), parameters(b))
    with pytest.raises(UnsupportedStrategyError, match=r"automatic.*`observe='pass'`.*pass `observe='training'`"):
        train(Manual(), [JustTrainTwice(1, observe="pass")], max_epochs=3)


def test_fitting_twice_goes_on_in_stage_two():
    model, method = Classifier(), JustTrainTwice(1, 9.0)
    train(model, [method], max_epochs=2)
    ids = method.ids.clone()
    train(model, [method], max_epochs=1)
    assert method.stage == 2
    assert torch.equal(ids, method.ids)


class Perfect(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x) * 0 + 9.0 * F.one_hot(y, 2) + 0 * self(x), y)


BAD = [
    ({}, [], {"max_epochs": 2}, "fewer than the Trainer's, `max_epochs=2`"),
    ({}, [], {"max_epochs": 9, "max_steps": 6}, "end before `max_steps=6`, but 2 epochs take 6 steps"),
    ({"observe": "both"}, [], {}, "`observe` to be 'training' or 'pass'"),
    ({"epochs": 0}, [], {}, "`epochs`"),
    ({"loss": "sum"}, [], {}, "`loss` to choose one loss"),
    ({}, [JustTrainTwice(1, name="b")], {}, "at most one method that reweighs|one method in two stages"),
    ({}, [StochasticWeightAveraging(0.1)], {}, "no StochasticWeightAveraging beside JustTrainTwice"),
    ({}, [WeightAveraging()], {}, "no WeightAveraging beside JustTrainTwice"),
    ({}, [BackboneFinetuning()], {}, "no BaseFinetuning beside JustTrainTwice: it would unfreeze"),
    ({}, [ModelPruning("l1_unstructured")], {}, "no ModelPruning beside JustTrainTwice: it would prune"),
]


@pytest.mark.parametrize(("options", "others", "trainer", "match"), BAD, ids=[b[3][:30] for b in BAD])
def test_bad_input_is_said_before_training(options, others, trainer, match):
    model = Classifier()
    before = parameters(model)
    with pytest.raises((DebiasError, UnsupportedStrategyError), match=match):
        train(
            model,
            [JustTrainTwice(**({"epochs": 2} | options)), *copy.deepcopy(others)],
            **({"max_epochs": 4} | trainer),
        )
    assert same(before, parameters(model))


def test_bad_data():
    with pytest.raises(DebiasError, match="its number in the dataset for JustTrainTwice"):
        train(Classifier(), [JustTrainTwice(1)], bare=True, max_epochs=2)
    with pytest.raises(DebiasError, match="leave errors that JustTrainTwice could up-weight, but all 39"):
        train(Perfect(), [JustTrainTwice(1)], max_epochs=2)
    method = JustTrainTwice(1)
    train(model := Classifier(), [method], max_epochs=2)
    with pytest.raises(DebiasError, match=r"keep its length, 39 samples.*but got 20"):
        make_trainer([method]).fit(model, DataLoader(tag(problem(20)), 4), val_loader())


def test_another_module_begins_with_stage_one_and_the_same_one_goes_on():
    method, alone = JustTrainTwice(1), JustTrainTwice(1)
    models = [Classifier(), Classifier(), Classifier()]
    for model, callback in zip(models, (method, method, alone), strict=True):
        train(model, [callback], max_epochs=2)
    assert same(parameters(models[1]), parameters(models[2]))
    assert torch.equal(method.ids, alone.ids)
    train(models[1], [method], max_epochs=1)
    assert method.stage == 2

"""Resuming is bitwise; checkpoints cross between runs with and without a method, whose state is not in the module's."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader

from _support.cases import METHODS, build
from _support.fits import Classifier, flat, make_trainer, parameters, places, problem, same, tagged, val_loader
from debias import GroupBalancedSampler, GroupDRO
from debias.errors import DebiasError

# torchdata 0.11 calls a function that torch 2.15 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    # Lightning's ModelCheckpoint; the resumed runs save elsewhere on purpose.
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


def shuffled(*, bare):
    """A stateful loader whose order is its own state's, not the global random state's."""
    dataset = problem(39) if bare else tagged(problem(39))
    return StatefulDataLoader(dataset, batch_size=7, sampler=GroupBalancedSampler(places(39), 7, seed=3))


def run(name, folder, *, ckpt_path=None, when="batch", optimizer="adam", **options):
    model, callbacks = Classifier(optimizer=optimizer), build(name)
    saving = {"every_n_train_steps": 8} if when == "batch" else {"every_n_epochs": 1, "save_on_train_epoch_end": False}
    save = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **saving)
    trainer = make_trainer([*callbacks, save], enable_checkpointing=True, **({"max_epochs": 3} | options))
    bare = name is None
    trainer.fit(model, shuffled(bare=bare), val_loader(bare=bare), ckpt_path=ckpt_path)
    return {
        "parameters": parameters(model),
        "optimizer": flat(trainer.optimizers[0].state_dict()),
        "methods": flat([callback.state_dict() for callback in callbacks]),
        "step": trainer.global_step,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing interrupts, each made once: what came out, and the folder of the checkpoints."""

    @functools.cache
    def made(name, when="batch"):
        folder = tmp_path_factory.mktemp("whole")
        return run(name, folder, when=when), folder

    return made


@pytest.mark.parametrize("name", [None, *METHODS])
@pytest.mark.parametrize(("when", "step"), [("batch", 8), ("validation", 6), ("validation", 12)])
def test_resuming_is_bitwise(name, when, step, whole, tmp_path):
    """An epoch has 6 batches: after batch 8, and at the end of the validation of the first and of the second epoch."""
    expected, folder = whole(name, when)
    resumed = run(name, tmp_path, when=when, ckpt_path=folder / f"step={step}.ckpt")
    assert expected["step"] == resumed["step"] == 18
    assert same(expected, resumed)


def test_without_its_state_a_resumed_run_differs(tmp_path):
    """The comparison above sees a method's state."""
    whole = run("GroupDRO", tmp_path)
    path = tmp_path / "step=8.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (key,) = [key for key in checkpoint["callbacks"] if key.startswith("GroupDRO")]
    checkpoint["callbacks"][key]["module"]["log_weights"] += torch.tensor([0.3, -0.2, 0.1])
    torch.save(checkpoint, path)
    assert not same(whole, run("GroupDRO", tmp_path / "again", ckpt_path=path))


def test_checkpoints_hold_the_bare_module_and_load_safely(method, whole):
    _, folder = whole(method)
    checkpoint = torch.load(folder / "step=8.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(Classifier().state_dict())
    assert len(checkpoint["optimizer_states"]) == 1
    assert build(method)[0].state_key in checkpoint["callbacks"]
    model = Classifier()
    model.load_state_dict(checkpoint["state_dict"])


def test_a_run_with_a_method_goes_on_without_it(method, whole, tmp_path):
    path = whole(method)[1] / "step=8.ckpt"
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        resumed = run(None, tmp_path / "without", ckpt_path=path, max_epochs=2)
    assert resumed["step"] == 12


def test_a_run_without_a_method_goes_on_with_it(method, whole, tmp_path):
    """To the third epoch: a method may leave its first one, here the second, as it is."""
    plain, folder = whole(None)
    path = folder / "step=8.ckpt"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = run(method, tmp_path / "with", ckpt_path=path, max_epochs=3)
    said = [str(w.message) for w in caught if "starts afresh" in str(w.message)]
    assert len(said) == METHODS[method].stateful
    assert resumed["step"] == 18
    assert not same(resumed["parameters"], plain["parameters"])


def test_another_number_of_groups_is_refused(tmp_path):
    state = GroupDRO("place", 3).state_dict()
    with pytest.raises(DebiasError, match=r"(?s)state of GroupDRO\(place\) to fit.*number of groups"):
        GroupDRO("place", 4).load_state_dict(state)

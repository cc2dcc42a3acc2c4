"""The data and the module of the recipe of domain adaptation, in runs of a second."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import RandomSampler

from _support.fits import make_trainer
from debias import CORAL, DomainAdversarial
from debias.data import DigitsAdaptation, GroupBalancedSampler
from debias.errors import DebiasError
from debias.models.adapted import AdaptedClassifier


def digits(**options: Any) -> DigitsAdaptation:
    data = DigitsAdaptation(**options)
    data.setup()
    return data


def test_batches_hold_labelled_samples_of_the_source_and_unlabelled_ones_of_the_target():
    data = digits(batch_size=32)
    loaders = data.train_dataloader()
    source, target = next(iter(loaders["source"])).batch, next(iter(loaders["target"]))
    assert source[0].shape == target.shape == (32, 3, 8, 8)
    assert source[1].shape == (32,)
    # The source lies on black, the target on a colour: the darkest pixel tells.
    assert (source[0].amin((1, 2, 3)) == 0).all()
    assert (target.amin((2, 3)).amax(1) > 0).all()
    assert data.group_counts.sum() == len(data.train_set)


def test_sets_are_of_different_samples_and_the_same_for_a_seed():
    one, again, other = digits(seed=1), digits(seed=1), digits(seed=2)
    assert torch.equal(one.target_set.tensors[0], again.target_set.tensors[0])
    assert not torch.equal(one.target_set.tensors[0], other.target_set.tensors[0])
    sets = [one.train_set.dataset, one.val_set.dataset, one.test_set.dataset, one.target_set]
    images = torch.cat([data.tensors[0] for data in sets])
    assert len(images.unique(dim=0)) == len(images) == 1797
    with pytest.raises(DebiasError, match=r"`n_domains` to be 2, source and target, but got 3"):
        DigitsAdaptation(n_domains=3)


def test_the_source_can_be_balanced():
    loaders = digits(balance="group").train_dataloader()
    assert isinstance(loaders["source"].sampler, GroupBalancedSampler)
    assert isinstance(loaders["target"].sampler, RandomSampler)


METHODS = {
    "dann": lambda: DomainAdversarial("loader", 2, features="network.4", strength=0.1, ramp_steps=20),
    "coral": lambda: CORAL("loader", 2, features="network.4"),
}


def trained(*callbacks: Any, epochs: int = 2, path: Any = None, resume: Any = None) -> dict[str, torch.Tensor]:
    pl.seed_everything(0, verbose=False)
    model = AdaptedClassifier(
        "mlp", 10, in_channels=3, image_size=8, width=16, optimizer=functools.partial(torch.optim.Adam, lr=1e-3)
    )
    trainer = make_trainer([*callbacks], max_epochs=epochs)
    trainer.fit(model, DigitsAdaptation(), ckpt_path=resume)
    if path is not None:
        trainer.save_checkpoint(path)
    return model.state_dict()


@pytest.mark.parametrize("name", METHODS)
def test_methods_train_in_two_passes_and_go_on_after_a_resume(name, tmp_path):
    whole = trained(METHODS[name](), epochs=2)
    trained(METHODS[name](), epochs=1, path=tmp_path / "half.ckpt")
    torch.testing.assert_close(trained(METHODS[name](), resume=tmp_path / "half.ckpt"), whole, rtol=0, atol=0)
    ignored = CORAL("loader", 2, features="network.4", penalty_weight=0.0)
    assert not torch.equal(whole["network.1.weight"], trained(ignored)["network.1.weight"])

"""CraftedShifts through real Trainers: what a batch becomes, its draws, resuming, ranks, and what is left behind."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from _support.blobs import Net, dataset, eval_loader, images, labels
from _support.fits import Share, make_trainer, parameters, same
from _support.runs import ddp
from debias import CraftedShifts, GroupDRO, ShiftedValidation
from debias.errors import BatchKeyError, DebiasError
from debias.ops.shifts import FOLDS, crafted_shift
from debias.step.proxy import StepProxy


class Seen(Net):
    """Keeps what its training step receives."""

    def __init__(self, **options):
        super().__init__(**options)
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append([part.clone() for part in batch])
        return super().training_step(batch, batch_idx)


def fit(callbacks, module=None, *, n=23, epochs=1, data=None, **options):
    module = Seen() if module is None else module
    trainer = make_trainer(callbacks, max_epochs=epochs, **options)
    trainer.fit(module, DataLoader(dataset(n), 8) if data is None else data, eval_loader())
    return module, trainer


def test_a_share_of_the_samples_is_shifted_and_labels_and_originals_stay():
    kept = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kept.append(batch[0].clone())

    module, _ = fit([Look(), CraftedShifts(families=["arithmetic", "geometric", "colour"])], n=400)
    x, y = (torch.cat([batch[k] for batch in module.batches]) for k in (0, 1))
    assert torch.equal(torch.cat(kept), images(400))  # the batch itself is not changed
    assert torch.equal(y, labels(400))
    assert x.min() >= 0
    assert x.max() <= 1
    same_image = (x == images(400)).flatten(1).all(1)
    assert abs(float(same_image.float().mean()) - 0.25) < 0.07


@pytest.mark.parametrize(("original", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_the_share_of_originals(original, expected):
    module, _ = fit([CraftedShifts(families="second", original=original)])
    same_image = torch.cat([b[0] for b in module.batches]).eq(images(23)).flatten(1).all(1)
    assert float(same_image.float().mean()) == expected


def test_sources_are_drawn_uniformly_and_are_the_families_that_are_named():
    method = CraftedShifts(families="first")
    generator = torch.Generator().manual_seed(0)
    sources, keys = method._draw(60000, generator)
    assert torch.bincount(sources, minlength=6).div(10000).sub(1).abs().max() < 0.05
    assert len(keys.unique()) > 59990
    x = images(6)
    drawn = []
    method.random.draw = lambda place, device, sample: drawn.append(sample(generator)) or drawn[-1]
    step = type("Step", (), {"batch": [x, labels(6)], "batch_idx": 0, "read": lambda self, key, argument: x})()
    method.augment(step)
    for i, (source, key) in enumerate(zip(*(part.tolist() for part in drawn[0]), strict=True)):
        expected = x[i : i + 1]
        if source:
            expected = crafted_shift(expected, FOLDS["first"][source - 1], torch.tensor([key]))
        torch.testing.assert_close(step.batch[0][i : i + 1], expected, rtol=1e-5, atol=1e-5)


class Inputs(Net):
    """Keeps all that its network is given."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        return super().forward(x)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_true_precisions_give_the_same_images(precision):
    x = (images(12) * 64).round() / 64  # exact in all of them
    data = DataLoader(TensorDataset(x, labels(12)), 6)
    seen = {}
    for kind in ("32-true", precision):
        module = Inputs()
        callbacks = [CraftedShifts(original=0.1), ShiftedValidation()]
        trainer = make_trainer(callbacks, max_epochs=2, precision=kind)
        trainer.fit(module, data, data)
        seen[kind] = module.inputs
        assert "val_shift/mean" in trainer.callback_metrics
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}[precision]
    assert len(seen[precision]) == len(seen["32-true"])
    for found, expected in zip(seen[precision], seen["32-true"], strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, expected.to(dtype))


def test_draws_follow_the_seed_and_differ_by_step_and_epoch():
    def inputs(**options):
        return torch.stack([b[0] for b in fit([CraftedShifts(**options)], n=16, epochs=2)[0].batches])

    first = inputs()
    assert torch.equal(first, inputs())
    assert not torch.equal(first, inputs(seed=1))
    assert not torch.equal(first[:2], first[2:])  # epochs


def test_resuming_is_bitwise(tmp_path):
    whole, _ = fit([CraftedShifts()], epochs=4)
    _, trainer = fit([CraftedShifts()], epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    module = Net()
    trainer = make_trainer([CraftedShifts()], max_epochs=4)
    trainer.fit(module, DataLoader(dataset(), 8), eval_loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert same(parameters(module), parameters(whole))
    assert not same(parameters(module), parameters(fit([])[0]))


def rank_inputs(rank):
    data = dataset(16)
    loader = DataLoader(data, 4, sampler=Share(data, (4, 4), (0, 0), rank))
    module = Seen()
    trainer = make_trainer([CraftedShifts()], devices=2, strategy=ddp(), use_distributed_sampler=False)
    trainer.fit(module, loader, eval_loader())
    return [batch[0] for batch in module.batches], parameters(module)


def test_ranks_draw_differently_and_train_the_same_network(ranks):
    (first, a), (second, b) = ranks.run(rank_inputs)
    assert same(a, b)
    # The global batches are rows 0 to 7 and 8 to 15; each rank has four of them.
    originals = images(16).view(2, 2, 4, *images(1).shape[1:]).unbind(1)
    changed = [(torch.stack(part) != x).flatten(2).any(2) for part, x in zip((first, second), originals, strict=True)]
    assert not torch.equal(*changed)


def one_rank_out_of_range(rank):
    x = images(16)
    x[5] = 3.0
    data = TensorDataset(x, labels(16))
    loader = DataLoader(data, 4, sampler=Share(data, (4, 4), (0, 0), rank))
    trainer = make_trainer([CraftedShifts()], devices=2, strategy=ddp(), use_distributed_sampler=False)
    trainer.fit(Net(), loader, eval_loader())


def test_all_ranks_raise_together(ranks):
    ranks.raises(DebiasError, r"training batch 0 to hold images in \[0, 1\].* 1 of them", one_rank_out_of_range)


def test_evaluation_and_prediction_are_bit_identical():
    def run(callbacks):
        trainer = make_trainer(callbacks)
        module = Net()
        (metrics,) = trainer.validate(module, eval_loader(), verbose=False)
        predict = DataLoader(images(23), 8)
        module.predict_step = lambda batch, batch_idx: module(batch)
        return metrics, torch.cat(trainer.predict(module, predict))

    (plain, a), (with_method, b) = run([]), run([CraftedShifts()])
    assert plain == with_method
    assert torch.equal(a, b)


@pytest.mark.parametrize("error", [None, ValueError])
def test_nothing_is_left_behind(error):
    class Interrupt(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if error is not None:
                raise error

    module, method = Net(), CraftedShifts()
    before = set(vars(module))
    trainer = make_trainer([method, Interrupt()])
    if error is None:
        trainer.fit(module, DataLoader(dataset(), 8), eval_loader())
    else:
        with pytest.raises(error):
            trainer.fit(module, DataLoader(dataset(), 8), eval_loader())
    assert set(vars(module)) - before <= {"_hparams"}
    assert not [v for v in vars(module).values() if isinstance(v, StepProxy)]
    assert method.engine is None
    assert same(copy.deepcopy(method).state_dict(), method.state_dict())


def test_with_group_dro_and_the_monitor():
    data = DataLoader(dataset(place=labels(23)), 8)
    module, trainer = fit(
        [CraftedShifts(families="first"), GroupDRO("place", 3), ShiftedValidation(families="second")], data=data
    )
    alone, _ = fit([GroupDRO("place", 3)], data=data)
    assert not same(parameters(module), parameters(alone))
    assert 0 <= float(trainer.callback_metrics["val_shift/held_out_mean"]) <= 1


def test_normalised_images_and_bytes_are_shifted_as_the_plain_ones():
    plain, _ = fit([CraftedShifts(families=["arithmetic"])])
    normal = DataLoader(TensorDataset((images(23) - 0.4) / 0.3, labels(23)), 8)
    module, _ = fit([CraftedShifts(families=["arithmetic"], mean=0.4, std=0.3)], data=normal)
    found = torch.cat([b[0] for b in module.batches])
    kept = torch.cat([b[0] for b in plain.batches]) == images(23)
    torch.testing.assert_close(0.4 + 0.3 * found, torch.cat([b[0] for b in plain.batches]), rtol=1e-4, atol=1e-4)
    assert torch.equal(found[kept.flatten(1).all(1)], ((images(23) - 0.4) / 0.3)[kept.flatten(1).all(1)])

    class Bytes(Seen):
        def training_step(self, batch, batch_idx):
            x, y = batch
            self.batches.append([x, y])
            return F.cross_entropy(self(x.float() / 255), y)

    coded = DataLoader(TensorDataset((images(23) * 255).round().to(torch.uint8), labels(23)), 8)
    module, _ = fit([CraftedShifts(families=["arithmetic"])], Bytes(), data=coded)
    found = torch.cat([b[0] for b in module.batches])
    assert found.dtype == torch.uint8
    assert (found.float() / 255 - torch.cat([b[0] for b in plain.batches])).abs().mean() < 0.01


@pytest.mark.parametrize("n", [1, 3])
def test_small_and_odd_batches(n):
    module, _ = fit([CraftedShifts()], data=DataLoader(dataset(n), n))
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": "both"}, "`families` to be 'first', 'second', 'all'"),
        ({"original": 1.5}, "`original` to be a share from 0 to 1, but got 1.5"),
        ({"std": 0.5}, "both `mean` and `std`"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(DebiasError, match=message):
        CraftedShifts(**options)


@pytest.mark.parametrize(
    ("target", "found"),
    [
        (torch.zeros(23, 1, 12, 12), r"a tensor of shape \(8, 1, 12, 12\)"),
        (torch.zeros(23, 12, 12).long(), r"a tensor of shape \(8, 12, 12\)"),
        ({"boxes": torch.zeros(23, 2, 4)}, "`boxes`"),
    ],
)
def test_targets_that_would_stay_behind(target, found):
    """Of images that the family moves; with the families that the message names nothing is refused."""

    class Dense(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0], labels(len(batch[0]))), batch_idx)

    of = (lambda i: {"boxes": target["boxes"][i]}) if isinstance(target, dict) else target.__getitem__
    data = DataLoader([(x, of(i)) for i, x in enumerate(images(23))], 8)
    with pytest.raises(DebiasError, match=rf"'geometric' moves, but got {found}.*`families=\['blur'\]`"):
        fit([CraftedShifts(families=["geometric", "blur"])], Dense(), data=data)
    fit([CraftedShifts(families=["blur"])], Dense(), data=data)


def test_wrong_batches():
    with pytest.raises(BatchKeyError, match=r"`input='image'` to name a part"):
        fit([CraftedShifts(input="image")])
    normal = DataLoader(TensorDataset(4 * images(23) - 2, labels(23)), 8)
    with pytest.raises(DebiasError, match=r"training batch 0 to hold images in \[0, 1\].*`mean` and `std`"):
        fit([CraftedShifts()], data=normal)
    late = images(23)
    late[20] = 7.0
    with pytest.raises(DebiasError, match=r"training batch 2 .*but 1 of them leave it"):
        fit([CraftedShifts()], data=DataLoader(TensorDataset(late, labels(23)), 8))

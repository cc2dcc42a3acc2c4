"""ShiftedValidation through real Trainers: numbers by hand, one image at a time; nothing is left behind."""

from __future__ import annotations

import warnings

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from _support.blobs import Net, dataset, eval_loader, images, labels
from _support.fits import make_trainer, parameters, same
from _support.runs import ddp
from debias import CraftedShifts, EvalSampler, GroupMonitor, ShiftedValidation, tag
from debias.errors import BatchKeyError, DebiasError, HeadNotFoundError, LossNotFoundError
from debias.ops.shifts import FAMILIES, FOLDS, crafted_shift, sample_keys
from debias.step.indices import evaluation_order

FAST = ["arithmetic", "colour", "geometric"]


def by_hand(module, n=23, families=FAMILIES, *, seed=0, channels=1):
    """Accuracy of each family, one image at a time."""
    x, y = images(n, channels), labels(n)
    module = module.eval()
    found = {}
    with torch.no_grad():
        for family in families:
            hits = 0
            for i in range(n):
                key = sample_keys(torch.tensor([i]), family, seed=seed)
                hits += int(module(crafted_shift(x[i : i + 1], family, key)).argmax() == y[i])
            found[family] = hits / n
        found["original"] = float((module(x).argmax(1) == y).double().mean())
    return found


def validate(module, monitor, data=None, callbacks=(), **options):
    trainer = make_trainer([*callbacks, monitor], **options)
    trainer.validate(module, eval_loader() if data is None else data, verbose=False)
    return {k: float(v) for k, v in trainer.callback_metrics.items()}


def shifts_of(logged, prefix="val_shift/"):
    return {k.removeprefix(prefix): v for k, v in logged.items() if k.startswith(prefix)}


def test_logged_values_are_those_of_one_image_at_a_time():
    module = Net()
    logged = shifts_of(validate(module, ShiftedValidation()))
    expected = by_hand(module)
    assert {k: logged[k] for k in expected} == pytest.approx(expected)
    mean = sum(expected[family] for family in FAMILIES) / 10
    assert logged["mean"] == logged["held_out_mean"] == pytest.approx(mean)
    assert set(logged) == {*FAMILIES, "original", "mean", "held_out_mean"}
    assert len(set(expected.values())) > 3


@pytest.mark.parametrize("batch_size", [1, 5, 23])
def test_the_batch_size_changes_nothing(batch_size):
    monitor = ShiftedValidation(families=FAST)
    expected = by_hand(Net(), families=FAST)
    logged = shifts_of(validate(Net(), monitor, eval_loader(batch_size=batch_size)))
    assert {k: logged[k] for k in expected} == pytest.approx(expected)


def test_every_epoch_has_the_same_shifts_and_the_sanity_check_logs_nothing():
    class Constant(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    seen = []

    class Read(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(shifts_of({k: float(v) for k, v in trainer.callback_metrics.items()}))

    trainer = make_trainer([ShiftedValidation(families=FAST), Read()], max_epochs=3, num_sanity_val_steps=2)
    trainer.fit(Constant(), DataLoader(dataset(), 8, shuffle=True), eval_loader())
    assert seen[0] == {}
    assert seen[1] == seen[2] == seen[3]
    assert seen[1]["mean"] == pytest.approx(np.mean([by_hand(Constant(), families=FAST)[f] for f in FAST]))


def on_ranks(rank, world, sampler):
    data = dataset()
    loader = DataLoader(data, 4, sampler=EvalSampler(data) if sampler else None)
    options = {"devices": world, "strategy": ddp(), "use_distributed_sampler": not sampler} if world > 1 else {}
    return shifts_of(validate(Net(), ShiftedValidation(families=FAST), loader, **options))


def test_two_ranks_give_the_numbers_of_one(ranks):
    alone = on_ranks(0, 1, True)
    expected = by_hand(Net(), families=FAST)
    assert {k: alone[k] for k in expected} == pytest.approx(expected)
    assert ranks.run(on_ranks, 2, True) == [alone, alone]


def padded_ranks(rank):
    """22 samples for two ranks: Lightning's own sampler has nothing to pad."""
    loader = DataLoader(dataset(22), 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using `DistributedSampler` with the dataloaders")
        return shifts_of(validate(Net(), ShiftedValidation(families=FAST), loader, devices=2, strategy=ddp()))


def test_lightnings_own_sampler_is_understood(ranks):
    first, second = ranks.run(padded_ranks)
    assert first == second
    expected = by_hand(Net(), 22, FAST)
    assert {k: first[k] for k in expected} == pytest.approx(expected)


class Watched(Net):
    """Counts what is run, and how."""

    def __init__(self, **options):
        super().__init__(**options)
        self.steps, self.forwards, self.modes = 0, 0, []
        self.noisy = nn.Dropout(0.5)

    def forward(self, x):
        self.forwards += 1
        self.modes.append((self.training, self.noisy.training, torch.is_inference_mode_enabled()))
        return super().forward(self.noisy(x))

    def validation_step(self, batch, batch_idx):
        self.steps += 1
        with torch.enable_grad():
            super().validation_step(batch, batch_idx)


def test_the_validation_step_runs_once_and_the_module_is_put_back():
    flags = []

    class Look(L.Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            pl_module.noisy.train()  # Monte Carlo dropout: the user's own choice

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            flags.append([m.training for m in pl_module.modules()])
            flags.append(torch.equal(batch[0], images(23)[8 * batch_idx : 8 * batch_idx + 8]))

    module = Watched()
    trainer = make_trainer([Look(), ShiftedValidation(families=FAST)], inference_mode=False)
    trainer.validate(module, eval_loader(), verbose=False)
    assert module.steps == 3
    assert module.forwards == 3 * (1 + 4)
    assert module.modes == 3 * [(False, True, False), *4 * [(False, False, True)]]
    assert flags == 3 * [[m is module.noisy for m in module.modules()], True]


def test_flags_are_put_back_when_forward_raises():
    class Broken(Watched):
        def forward(self, x):
            if self.forwards:
                raise ValueError("broken")
            return super().forward(x)

    class Train(L.Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            pl_module.noisy.train()

    module = Broken()
    trainer = make_trainer([Train(), ShiftedValidation(families=FAST)])
    with pytest.raises(ValueError, match="broken"):
        trainer.validate(module, eval_loader(), verbose=False)
    assert module.noisy.training
    assert "validation_step" not in vars(module)


def test_training_is_the_same_with_and_without():
    """Dropout draws from the global generator, in a forward that draws when evaluating, too."""

    class Random(Net):
        def forward(self, x):
            return super().forward(x + 0.01 * torch.rand_like(x))

    def run(callbacks):
        torch.manual_seed(5)
        module = Random(dropout=0.5)
        trainer = make_trainer(callbacks, max_epochs=3)
        trainer.fit(module, DataLoader(dataset(), 8), eval_loader())
        return parameters(module), float(trainer.callback_metrics["val_loss"]), torch.get_rng_state().tolist()

    (plain, *rest), (watched, *others) = run([]), run([ShiftedValidation(families=FAST)])
    assert same(plain, watched)
    assert rest == others


def test_checkpoint_and_early_stopping(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val_shift/mean", mode="max", save_top_k=1)
    stop = EarlyStopping("val_shift/held_out_mean", mode="max", patience=1)
    module = Net()
    trainer = make_trainer(
        [best, ShiftedValidation(families=FAST), stop], max_epochs=4, enable_checkpointing=True, num_sanity_val_steps=2
    )
    trainer.fit(module, DataLoader(dataset(), 8), eval_loader())
    module.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    expected = by_hand(module, families=FAST)
    assert float(best.best_model_score) == pytest.approx(sum(expected[f] for f in FAST) / 3)


def test_families_that_are_trained_on_are_left_out_of_the_held_out_mean():
    trainer = make_trainer([CraftedShifts(families="first"), ShiftedValidation()], max_epochs=1)
    trainer.fit(Net(), DataLoader(dataset(), 8), eval_loader())
    logged = shifts_of({k: float(v) for k, v in trainer.callback_metrics.items()})
    assert logged["held_out_mean"] == pytest.approx(sum(logged[f] for f in FOLDS["second"]) / 5)
    assert logged["mean"] == pytest.approx(sum(logged[f] for f in FAMILIES) / 10)
    logged = shifts_of(validate(Net(), ShiftedValidation(families="first"), callbacks=[CraftedShifts(families="all")]))
    assert "held_out_mean" not in logged
    assert "mean" in logged


def test_names_stages_and_loaders():
    module = Net()
    monitors = [ShiftedValidation(families=FAST, name="other", seed=7), ShiftedValidation(families=FAST)]
    trainer = make_trainer(monitors)
    trainer.test(module, [eval_loader(), eval_loader(11)], verbose=False)
    logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
    for i, n in enumerate((23, 11)):
        for seed, prefix in ((0, "test_shift/"), (7, "test_shift/other/")):
            expected = by_hand(module, n, FAST, seed=seed)
            assert {f: logged[f"{prefix}{f}/dataloader_idx_{i}"] for f in expected} == pytest.approx(expected)
    with pytest.raises(DebiasError, match="would both log `val_shift/mean`"):
        validate(Net(), ShiftedValidation(), callbacks=[ShiftedValidation()])


def test_another_monitor_reads_what_the_step_computed():
    data = DataLoader(dataset(place=labels(23)), 8)
    alone = validate(Net(), GroupMonitor("place", 3, logits="net", target=1), data)
    for order in (0, 1):
        both = [ShiftedValidation(families=FAST), GroupMonitor("place", 3, logits="net", target=1)]
        logged = validate(Net(), both[order], data, [both[1 - order]])
        assert {k: v for k, v in logged.items() if "shift" not in k} == alone


# -- where things are, and what they look like -----------------------------------------------------


def test_normalised_images_and_bytes():
    class Normal(Net):
        def forward(self, x):
            return super().forward(x * 0.25 + 0.5)

    class Bytes(Net):
        def forward(self, x):
            assert x.dtype == torch.uint8
            return super().forward(x.float() / 255)

    x, y = images(23), labels(23)
    expected = shifts_of(validate(Net(), ShiftedValidation(families=["geometric", "colour"])))
    normal = DataLoader(TensorDataset((x - 0.5) / 0.25, y), 8)
    for mean, std in ((0.5, 0.25), ([0.5], [0.25])):
        logged = validate(Normal(), ShiftedValidation(families=["geometric", "colour"], mean=mean, std=std), normal)
        assert shifts_of(logged) == pytest.approx(expected)
    coded = DataLoader(TensorDataset((x * 255).round().to(torch.uint8), y), 8)
    logged = shifts_of(validate(Bytes(), ShiftedValidation(families=["geometric"]), coded))
    assert logged["geometric"] == pytest.approx(expected["geometric"], abs=0.1)


class Dictionary(Net):
    """Batches are dictionaries, and the module has no forward of images."""

    def validation_step(self, batch, batch_idx):
        self.log("loss", F.cross_entropy(self.net(batch["image"]), batch["label"]))

    def forward(self, batch):
        return {"scores": self.net(batch["image"])}


@pytest.mark.parametrize("logits", ["net", lambda module, batch: module(batch)["scores"]])
def test_keys_and_logits(logits):
    class Items(TensorDataset):
        def __getitem__(self, i):
            return {"image": images(23)[i], "label": int(labels(23)[i])}

    data = DataLoader(Items(labels(23)), 8)
    monitor = ShiftedValidation(families=FAST, input="image", target="label", logits=logits)
    logged = shifts_of(validate(Dictionary(), monitor, data))
    expected = by_hand(Net(), families=FAST)
    assert {k: logged[k] for k in expected} == pytest.approx(expected)
    with pytest.raises(LossNotFoundError, match=r"logits as a tensor, but got a dict with keys \['scores'\]"):
        validate(
            Dictionary(),
            ShiftedValidation(input="image", target="label", logits=lambda module, batch: module(batch)),
            data,
        )


def test_binary_logits():
    class Binary(Net):
        def forward(self, x):
            return self.net(x)[:, :1]

        def validation_step(self, batch, batch_idx):
            self(batch[0])

    data = DataLoader(TensorDataset(images(23), labels(23) % 2), 8)
    logged = shifts_of(validate(Binary(), ShiftedValidation(families=["blur"]), data))
    with torch.no_grad():
        found = ((Net().net(images(23))[:, 0] > 0).long() == labels(23) % 2).float().mean()
    assert logged["original"] == pytest.approx(float(found))


def test_an_index_tag_where_the_order_is_not_fixed():
    shuffled = DataLoader(dataset(index=torch.arange(23)), 8, sampler=torch.randperm(23).tolist())
    monitor = ShiftedValidation(families=FAST, index="index")
    logged = shifts_of(validate(Net(), monitor, shuffled))
    expected = by_hand(Net(), families=FAST)
    assert {k: logged[k] for k in expected} == pytest.approx(expected)
    with pytest.raises(BatchKeyError, match=r"fixed order.* but got list.*`index='index'`"):
        validate(Net(), ShiftedValidation(families=FAST), shuffled)


class Own(BatchSampler):
    pass


@pytest.mark.parametrize(
    ("loader", "found"),
    [
        (lambda data: DataLoader(data, 4, sampler=torch.utils.data.RandomSampler(data)), "RandomSampler"),
        (lambda data: DataLoader(data, batch_sampler=Own(SequentialSampler(data), 4, False)), "Own"),
        (lambda data: DataLoader(data, batch_size=None), "DataLoader"),
        (lambda data: object(), "object"),
    ],
)
def test_orders_that_cannot_be_known(loader, found):
    with pytest.raises(BatchKeyError, match=f"fixed order.* but got {found}"):
        evaluation_order(loader(dataset()))


def test_orders_that_are_known():
    data = dataset()
    assert evaluation_order(DataLoader(data, 4)).tolist() == list(range(23))
    assert evaluation_order(eval_loader()).tolist() == list(range(23))
    share = torch.utils.data.DistributedSampler(data, 2, 1, shuffle=False)
    assert evaluation_order(DataLoader(data, 4, sampler=share)).tolist() == [*range(1, 23, 2), 0]
    share = torch.utils.data.DistributedSampler(data, 2, 1, shuffle=True)
    with pytest.raises(BatchKeyError, match="DistributedSampler"):
        evaluation_order(DataLoader(data, 4, sampler=share))


def test_a_batch_that_was_filtered_needs_an_index():
    class Fewer(Net):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [part[1:] for part in batch]

    with pytest.raises(BatchKeyError, match=r"batch 0 to hold the 8 samples that its loader drew, but got 7 images"):
        validate(Fewer(), ShiftedValidation(families=FAST))


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: (x - 0.5) / 0.25,
            r"validate batch 0 .*in \[0, 1\].* 8 of them .*values from -1.999 .*`mean` and",
        ),
        (lambda x: 255 * x, r"in \[0, 255\], divide by 255"),
        (lambda x: torch.where(x > 0.9, torch.nan, x), r"in \[0, 1\] for crafted shifts"),
        (lambda x: x.flatten(1), r"shape \(N, C, H, W\).*but got \(8, 144\)"),
        (lambda x: x.long(), "floating-point images"),
    ],
)
def test_images_out_of_range_are_refused(change, message):
    data = DataLoader(TensorDataset(change(images(23)), labels(23)), 8)

    class Any(Net):
        def forward(self, x):
            return super().forward(x.float())

    with pytest.raises(DebiasError, match=message):
        validate(Any(), ShiftedValidation(families=FAST), data)


def one_rank_out_of_range(rank):
    x = images(22)
    x[3] = 2.0  # on rank 1, in its first batch
    data = TensorDataset(x, labels(22))
    loader = DataLoader(data, 4, sampler=EvalSampler(data))
    return validate(Net(), ShiftedValidation(families=FAST), loader, devices=2, strategy=ddp())


def test_all_ranks_raise_together(ranks):
    ranks.raises(DebiasError, r"all ranks to hold images in \[0, 1\].* 1 of them", one_rank_out_of_range)


def test_no_way_to_logits():
    class NoForward(L.LightningModule):
        def validation_step(self, batch, batch_idx):
            pass

    with pytest.raises(LossNotFoundError, match=r"NoForward to define `forward\(images\)`.*logits='dotted.path'"):
        validate(NoForward(), ShiftedValidation())
    with pytest.raises(HeadNotFoundError, match="`logits` to be the dotted path of a submodule, but got 'nett'"):
        validate(Net(), ShiftedValidation(logits="nett"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": "third"}, "`families` to be 'first', 'second', 'all'"),
        ({"mean": 0.5}, "both `mean` and `std`"),
        ({"mean": [0.5], "std": [0.0]}, "`std` to be positive"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(DebiasError, match=message):
        ShiftedValidation(**options)


@pytest.mark.parametrize(("key", "message"), [("picture", "`input='picture'` to name a part"), (1, "floating-point")])
def test_wrong_keys(key, message):
    with pytest.raises(DebiasError, match=message if key != 1 else r"\(N, C, H, W\)"):
        validate(Net(), ShiftedValidation(input=key))


def test_targets_of_pixels():
    """The family that moves pixels away from them is refused; the others are scored."""
    module = nn.Conv2d(1, 3, 1)

    class Dense(L.LightningModule):
        def forward(self, x):
            return module(x)

        def validation_step(self, batch, batch_idx):
            pass

    x = images(8)
    target = module(x).argmax(1)
    target[:, :2] = 255  # counts nowhere
    data = DataLoader(TensorDataset(x, target), 4)
    blurred = ShiftedValidation(families=["blur"], ignore_index=255)
    with pytest.raises(DebiasError, match="`ignore_index`"):
        validate(Dense(), ShiftedValidation(families=["blur"]), data)
    with pytest.raises(DebiasError, match=r"\(4, 12, 12\), which would stay.*`families=\['blur'\]`"):
        validate(Dense(), ShiftedValidation(families=["blur", "geometric"]), data)
    assert shifts_of(validate(Dense(), blurred, data))["original"] == 1


def test_a_target_that_is_no_tensor():
    with pytest.raises(BatchKeyError, match=r"`target=.*` to name a tensor"):
        validate(Net(), ShiftedValidation(target=lambda batch: "label"))


def test_the_other_lightning_package():
    pl = pytest.importorskip("pytorch_lightning")

    class Other(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net().net

        def forward(self, x):
            return self.net(x)

        def validation_step(self, batch, batch_idx):
            pass

    expected = by_hand(Net(), families=FAST)
    logged = shifts_of(validate(Other(), ShiftedValidation(families=FAST), package=pl))
    assert {k: logged[k] for k in expected} == pytest.approx(expected)


def test_tagged_samples_reach_it_bare():
    data = tag(TensorDataset(images(23), labels(23)), place=labels(23))
    logged = shifts_of(validate(Net(), ShiftedValidation(families=FAST), DataLoader(data, 8)))
    expected = by_hand(Net(), families=FAST)
    assert {k: logged[k] for k in expected} == pytest.approx(expected)

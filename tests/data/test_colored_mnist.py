"""ColoredMNIST on tiny files that the test writes, in both layouts, whole and broken; and on a real one if given.

``MNIST_NPZ=/path/to/mnist.npz pytest tests/data/test_colored_mnist.py`` runs the tests of the real file.
"""

from __future__ import annotations

import os
import pickle
import sys

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, DistributedSampler

from _support.runs import ddp
from debias import GroupDRO, GroupMonitor
from debias.cli import main
from debias.cli.recipes import recipes_folder
from debias.data import ColoredMNIST, EvalSampler, GroupBalancedSampler
from debias.errors import DataError, DebiasError
from debias.models.classifier import Classifier

N, N_TEST = 6012, 60  # 5010 to train on, 1002 held out
REAL = os.environ.get("MNIST_NPZ", "")


def arrays(n=N, n_test=N_TEST):
    """Images that tell which one they are: the number of the sample, in pixels that subsampling keeps."""
    random = np.random.RandomState(0)
    made = {}
    for part, size in (("train", n), ("test", n_test)):
        x = random.randint(1, 256, (size, 28, 28)).astype(np.uint8)
        x[:, 0, 0], x[:, 0, 2] = np.arange(size) // 250 + 1, np.arange(size) % 250 + 1
        made |= {f"x_{part}": x, f"y_{part}": random.randint(0, 10, size)}
    return made


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("mnist") / "mnist.npz"
    np.savez(path, **arrays())
    return path


def write_idx(root, made):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, part in (("train", "train"), ("t10k", "test")):
        x, y = made[f"x_{part}"], made[f"y_{part}"].astype(np.uint8)
        header = np.array([0x803, *x.shape], dtype=">i4").tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + x.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(np.array([0x801, len(y)], ">i4").tobytes() + y.tobytes())


def make(root, **options):
    data = ColoredMNIST(root, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def parts(dataset):
    x, y = dataset.dataset.tensors
    return x, y, dataset.tags["color"], dataset.tags["domain"], dataset.tags["group"]


def numbers(x):
    """Which sample of the file each image is."""
    corner = (x[:, :, 0, :2] * 255).round().long().amax(1)
    return (corner[:, 0] - 1) * 250 + corner[:, 1] - 1


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(parts(a), parts(b), strict=True))


# what is drawn


def test_training_is_the_first_five_sixths_once_and_the_test_is_the_rest(npz):
    data = make(npz)
    x, _, _, domain, _ = parts(data.train_set)
    assert x.shape == (5010, 2, 14, 14)
    assert x.dtype == torch.float32
    assert sorted(numbers(x).tolist()) == list(range(5010))
    assert torch.bincount(domain).tolist() == [2505, 2505]
    assert numbers(parts(data.test_set)[0]).tolist() == list(range(5010, 6012))
    official = make(npz, test_images="official")
    assert numbers(parts(official.test_set)[0]).tolist() == list(range(N_TEST))
    assert same(official.train_set, data.train_set)
    assert set(data.test_set.tags["domain"].tolist()) == {-1}


def test_images_are_every_second_pixel_in_the_channel_of_the_color(npz):
    source = arrays()["x_train"]
    for size, stride in ((14, 2), (28, 1)):
        data = make(npz, image_size=size)
        x, y, color, _, group = parts(data.train_set)
        rows = torch.arange(len(x))
        number = numbers(x[:, :, :, :: 2 // stride])
        assert torch.equal(x[rows, color], torch.from_numpy(source[number, ::stride, ::stride]).float() / 255)
        assert (x[rows, 1 - color] == 0).all()
        assert torch.equal(group, 2 * y + color)


def test_grey_is_the_test_set_in_both_channels_without_color_or_group(npz):
    data = make(npz)
    x, y, color, domain, group = parts(data.grey_set)
    assert torch.equal(x[:, 0], x[:, 1])
    assert torch.equal(x[:, 0], parts(data.test_set)[0].sum(1))
    assert torch.equal(y, parts(data.test_set)[1])
    assert {*color.tolist(), *domain.tolist(), *group.tolist()} == {-1}


def assert_share(mask, p):
    """``mask`` looks like independent draws of probability ``p``; 4.5 standard errors."""
    n = len(mask)
    assert abs(float(mask.double().mean()) - p) < 4.5 * (p * (1 - p) / n) ** 0.5 + 1e-12


@pytest.mark.parametrize("options", [{}, {"label_noise": 0.1, "color_flips": [0.5, 0.3, 0.0], "test_color_flip": 1.0}])
def test_noise_and_colors_are_drawn_with_the_probabilities_that_are_given(npz, options):
    data = make(npz, **options)
    digits = torch.from_numpy(arrays()["y_train"])
    noise, flips = options.get("label_noise", 0.25), options.get("color_flips", [0.2, 0.1])
    assert data.n_domains == len(flips)
    x, y, color, domain, _ = parts(data.train_set)
    mistaken, flipped = y != (digits[numbers(x)] < 5), color != y
    for e, flip in enumerate(flips):
        here = domain == e
        assert_share(mistaken[here], noise)
        assert_share(flipped[here], flip)
    assert_share(flipped[mistaken & (domain == 0)], flips[0])  # independent of each other
    x, y, color, _, _ = parts(data.test_set)
    assert_share(y != (digits[numbers(x)] < 5), noise)
    assert_share(color != y, options.get("test_color_flip", 0.9))


def test_class_imbalanced_environments(npz):
    digits = torch.from_numpy(arrays()["y_train"])[:5010]
    low, high = int((digits < 5).sum()), int((digits >= 5).sum())
    counts = {}
    for split in ("imbalanced", "imbalanced_reference"):
        x, _, _, domain, _ = parts(make(npz, split=split).train_set)
        assert sorted(numbers(x).tolist()) == list(range(5010))
        below = digits[numbers(x)] < 5
        counts[split] = [[int((below & (domain == e)).sum()), int((~below & (domain == e)).sum())] for e in (0, 1)]
    a, b = round(0.97 * low), round(0.03 * high)
    assert counts["imbalanced"] == [[a, b], [low - a, high - b]]
    # 0.97 * 5010 is more than there are of the class: all of it; and 0.03 * 5010 = 150.3
    assert counts["imbalanced_reference"] == [[low, 150], [0, high - 150]]


def test_everything_follows_the_seed_and_only_the_seed(npz):
    data = make(npz, seed=3)
    np.random.seed(9)
    torch.manual_seed(9)
    again = make(npz, seed=3, batch_size=7, full_batch=True, test_images="official")
    assert same(data.train_set, again.train_set)
    other = make(npz, seed=4)
    assert not torch.equal(numbers(parts(data.train_set)[0]), numbers(parts(other.train_set)[0]))
    assert not torch.equal(parts(data.test_set)[1], parts(other.test_set)[1])
    first, second = ([b.tags["group"].tolist() for b in make(npz, seed=3).train_dataloader()] for _ in range(2))
    assert first == second


def test_validation_is_held_out_of_each_environment_and_changes_nothing_else(npz):
    whole, data = make(npz), make(npz, val_fraction=0.2)
    assert torch.bincount(data.val_set.tags["domain"]).tolist() == [501, 501]
    assert torch.bincount(data.train_set.tags["domain"]).tolist() == [2004, 2004]
    known = {n: rest for n, *rest in zip(*map(torch.Tensor.tolist, _rows(whole.train_set)), strict=True)}
    seen = []
    for dataset in (data.train_set, data.val_set):
        for n, *rest in zip(*map(torch.Tensor.tolist, _rows(dataset)), strict=True):
            assert known[n] == rest
            seen.append(n)
    assert sorted(seen) == sorted(known)
    assert same(whole.test_set, data.test_set)
    assert isinstance(data.val_dataloader().sampler, EvalSampler)


def _rows(dataset):
    x, y, color, domain, _ = parts(dataset)
    return numbers(x), y, color, domain


# loaders


def test_batches(npz):
    data = make(npz, batch_size=32)
    batch = next(iter(data.train_dataloader()))
    x, y = batch.batch
    assert x.shape == (32, 2, 14, 14)
    assert y.shape == (32,)
    assert y.dtype == torch.int64
    assert set(batch.tags) == {"group", "color", "domain", "environment", "index"}
    assert torch.equal(batch.tags["domain"], batch.tags["environment"])
    assert data.group_counts.tolist() == torch.bincount(data.train_groups, minlength=4).tolist()
    assert data.group_names[3] == "digit 0-4 green"
    color, grey = data.test_dataloader()
    assert (next(iter(color)).tags["group"] >= 0).all()
    assert (next(iter(grey)).tags["group"] < 0).all()
    binary = make(npz, target="binary")
    y = binary.train_set.dataset.tensors[1]
    assert y.dtype == torch.float32
    assert torch.equal(y, parts(data.train_set)[1][:, None].float())
    assert torch.equal(binary.train_groups, data.train_groups)


def test_balanced_batches(npz):
    data = make(npz, batch_size=32, balance="domain")
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, GroupBalancedSampler)
    assert torch.bincount(next(iter(loader)).tags["domain"]).tolist() == [16, 16]


def test_the_full_batch_is_everything_made_once(npz):
    data = make(npz, full_batch=True)
    loader = data.train_dataloader()
    (batch,), (again,) = list(loader), list(data.train_dataloader())
    assert len(loader) == len(loader.dataset) == len(list(loader.dataset)) == 1
    assert batch is again
    for mine, theirs in zip([*batch.batch, *(batch.tags[k] for k in ("color", "domain", "group"))],
                            parts(data.train_set), strict=True):  # fmt: skip
        assert torch.equal(mine, theirs)
    assert torch.equal(data.transfer_batch_to_device(batch.batch, torch.device("cpu"), 0)[0], batch.batch[0])


def test_the_full_batch_is_moved_once(npz):
    data = make(npz, full_batch=True)
    (batch,) = data.train_dataloader()
    first, second = (data.transfer_batch_to_device(batch.batch, torch.device("meta"), 0) for _ in range(2))
    assert first[0].device.type == "meta"
    assert first[0] is second[0]
    tagged = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert tagged.batch[0] is first[0]
    assert tagged.tags["group"].device.type == "meta"
    assert data.transfer_batch_to_device(batch.batch, torch.device("cpu"), 0)[0].device.type == "cpu"
    other = [torch.zeros(3), torch.zeros(3)]
    assert data.transfer_batch_to_device(other, torch.device("meta"), 0)[0].shape == (3,)
    kept = data.transfer_batch_to_device(batch.batch, torch.device("meta"), 0)[0]
    data.teardown("fit")
    assert data.transfer_batch_to_device(batch.batch, torch.device("meta"), 0)[0] is not kept


def test_a_datamodule_survives_pickling(npz):
    for fraction in (0.0, 0.2):
        again = pickle.loads(pickle.dumps(ColoredMNIST(npz, full_batch=True, val_fraction=fraction)))
        again.setup()
        assert len(next(iter(again.train_dataloader())).batch[0]) == len(again.train_set)


# under the Trainer


QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def fit(data, callbacks=(), **options):
    torch.manual_seed(0)
    model = Classifier("mlp", 1, in_channels=2, image_size=14, width=8)
    trainer = L.Trainer(callbacks=list(callbacks), enable_checkpointing=False, **QUIET, **options)
    trainer.fit(model, datamodule=data)
    return trainer, model


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_step_is_an_epoch_there_is_no_validation_and_two_tests(npz):
    data = ColoredMNIST(npz, full_batch=True, n_domains=2)
    seen = []

    class Shapes(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen.append((trainer.current_epoch, index, tuple(batch[0].shape)))

    # GroupDRO asks for the group counts, which the one-batch dataset must answer.
    dro = GroupDRO("group", 4, adjustment=1.0)
    trainer, model = fit(
        data, [Shapes(), dro, GroupMonitor("group", 4)], max_steps=3, max_epochs=-1, log_every_n_steps=1
    )
    assert seen == [(e, 0, (5010, 2, 14, 14)) for e in range(3)]
    assert not trainer.enable_validation
    assert torch.equal(dro.module.counts, data.group_counts.double())
    trainer.test(model, datamodule=data, verbose=False)
    logged = trainer.callback_metrics
    model.eval()
    for index, dataset in enumerate((data.test_set, data.grey_set)):
        x, y, *_ = parts(dataset)
        accuracy = ((model(x).squeeze(1) > 0) == y).double().mean().item()
        assert logged[f"test/accuracy/dataloader_idx_{index}"].item() == pytest.approx(accuracy, abs=1e-6)


def test_minibatches_with_validation(npz):
    data = ColoredMNIST(npz, val_fraction=0.1, batch_size=1000, grey_test=False)
    trainer, model = fit(data, [GroupMonitor("group", 4)], max_epochs=1)
    assert trainer.global_step == 5
    assert "val/worst_group_accuracy" in trainer.callback_metrics
    trainer.test(model, datamodule=data, verbose=False)
    assert "test/accuracy" in trainer.callback_metrics


class Double(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(392, 1).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.binary_cross_entropy_with_logits(self.net(x.flatten(1).double()).squeeze(1), y.double())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def _fit_double(rank, path, options=None):
    data = ColoredMNIST(path, full_batch=True)
    sizes = []

    class Sizes(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            assert isinstance(trainer.train_dataloader.sampler, DistributedSampler)
            sizes.append(len(batch[0]))

    options = options if options is not None else {"strategy": ddp(), "devices": 2}
    callbacks = [GroupDRO("group", 4, step_size=0.1), Sizes()]
    trainer = L.Trainer(max_steps=3, max_epochs=-1, callbacks=callbacks, enable_checkpointing=False, **QUIET, **options)
    model = Double()
    trainer.fit(model, datamodule=data)
    return sizes, model.net.weight.detach().clone()


def test_two_ranks_share_the_full_batch_and_train_as_one_process(tmp_path, ranks):
    np.savez(tmp_path / "mnist.npz", **arrays(62, 6))  # 51 to train on: 26 and 25
    (first, a), (second, b) = ranks.run(_fit_double, tmp_path)
    assert (first, second) == ([26] * 3, [25] * 3)
    (whole, alone) = _fit_double(0, tmp_path, {"devices": 1})
    assert whole == [51] * 3
    assert torch.equal(a, b)
    torch.testing.assert_close(a, alone, rtol=1e-12, atol=1e-14)


# sources


def test_the_same_from_every_layout(tmp_path, npz, monkeypatch):
    made = arrays()
    write_idx(tmp_path / "idx", made)
    expected = make(npz)
    assert same(make(npz.parent).train_set, expected.train_set)
    from_idx = make(tmp_path / "idx", download=True)  # all there: nothing is downloaded
    assert same(from_idx.train_set, expected.train_set)
    assert same(from_idx.test_set, expected.test_set)

    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "download", lambda self: write_idx(tmp_path / "new", made))
    assert same(make(tmp_path / "new", download=True).test_set, expected.test_set)


def test_a_failed_download_says_why(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    def fail(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(MNIST, "download", fail)
    with pytest.raises(DataError, match=r"download MNIST into .*, but got: Error downloading train.* Try again"):
        make(tmp_path, download=True)
    with pytest.raises(DataError, match=r"a folder to download MNIST into, but got .*mnist.npz, which names a file"):
        make(tmp_path / "mnist.npz", download=True)


def test_a_missing_file_says_what_was_looked_for_and_how_to_get_it(tmp_path):
    with pytest.raises(DataError, match=r"looked for .*nowhere as a file.*mnist.npz and .*raw, but found nothing") as e:
        make(tmp_path / "nowhere")
    assert "x_train, y_train, x_test, y_test" in str(e.value)
    assert "`download=True`" in str(e.value)
    with pytest.raises(DataError, match="neither of them there"):
        make(tmp_path)
    with pytest.raises(DataError, match=r"takes effect in `prepare_data\(\)`"):
        ColoredMNIST(tmp_path, download=True).setup()
    write_idx(tmp_path, arrays(12, 6))
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="neither of them there"):
        make(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_test": None}, r"to hold the arrays .*, but x_test is missing from \['x_train', 'y_train', 'y_test'\]"),
        ({"x_train": np.zeros((60, 784), np.uint8)}, r"train images of .* but got uint8 of shape \(60, 784\)"),
        ({"x_test": np.zeros((6, 28, 28))}, r"test images of .* to be uint8 of shape .*, but got float64"),
        ({"x_test": np.zeros((0, 28, 28), np.uint8)}, r"test images of .* of shape \(0, 28, 28\)"),
        ({"y_train": np.zeros(59, int)}, r"train labels of .* to be 60 integers from 0 to 9.* of shape \(59,\)"),
        ({"y_train": np.full(60, 10)}, "integers from 0 to 9"),
        ({"y_test": np.zeros(6)}, "test labels .* but got float64"),
    ],
    ids=["missing", "flat", "float", "empty", "too few", "no digit", "no integers"],
)
def test_wrong_arrays(tmp_path, changed, message):
    made = {k: v for k, v in {**arrays(60, 6), **changed}.items() if v is not None}
    np.savez(tmp_path / "mnist.npz", **made)
    with pytest.raises(DataError, match=message):
        make(tmp_path)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "mnist.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"mnist.npz to be a readable `.npz` file, but got: .* Set `root`"):
        make(tmp_path)
    np.save(tmp_path / "alone.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"readable `.npz` file"):
        make(tmp_path / "alone.npy")
    write_idx(tmp_path / "idx", arrays(12, 6))
    file = tmp_path / "idx" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"torchvision to read the files in .*raw, but got: .*Remove them"):
        make(tmp_path / "idx")


def test_too_few_images(tmp_path):
    np.savez(tmp_path / "mnist.npz", **arrays(1, 1))
    with pytest.raises(DataError, match=r"none for environment 0, 1 from 0 training images"):
        make(tmp_path)
    np.savez(tmp_path / "mnist.npz", **arrays(12, 1))
    with pytest.raises(DataError, match=r"`val_fraction=0.01` holds out 0 of the 5 of environment 0"):
        make(tmp_path, val_fraction=0.01)


def test_a_missing_torchvision_names_the_extra(tmp_path, monkeypatch):
    write_idx(tmp_path, arrays(12, 6))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(DebiasError, match=r"`torchvision` to be installed.*pip install 'lightning-debias\[images\]'"):
        make(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_groups": 2}, DataError, "`n_groups` to be 4, label x colour, but got 2"),
        ({"n_domains": 3}, DataError, "`n_domains` to be 2, one per value of `color_flips`, but got 3"),
        ({"label_noise": 1.5}, DebiasError, "`label_noise` to be from 0 to 1, but got 1.5"),
        ({"color_flips": (0.2, -1)}, DebiasError, "`color_flips` to be from 0 to 1, but got -1"),
        ({"color_flips": ()}, DebiasError, "one share per training environment, but got none"),
        ({"test_color_flip": 2}, DebiasError, "`test_color_flip`"),
        ({"split": "imbalanc"}, DebiasError, "one of even, imbalanced, .* Did you mean 'imbalanced'"),
        ({"split": "imbalanced", "color_flips": (0.1,)}, DebiasError, "two values of `color_flips`.* but got 1"),
        ({"target": "logit"}, DebiasError, "`target` to be one of class, binary, but got 'logit'"),
        ({"test_images": "all"}, DebiasError, "`test_images` to be one of held_out, official"),
        ({"image_size": 16}, DebiasError, "`image_size` to be 14 or 28 pixels, but got 16"),
        ({"val_fraction": 1.0}, DebiasError, "`val_fraction` to be at least 0 and below 1, but got 1.0"),
        ({"balance": "color"}, DebiasError, '"group" or "domain" or "environment", but got \'color\''),
        ({"balance": "group", "full_batch": True}, DebiasError, "no `balance` with `full_batch`"),
        ({"batch_size": 0}, DebiasError, "`batch_size`"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        ColoredMNIST("mnist.npz", **options)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize(
    ("overlay", "steps"), [([], ["--trainer.max_steps", "2"]), (["minibatch"], ["--trainer.max_epochs", "1"])]
)
def test_the_recipe_runs(npz, tmp_path, monkeypatch, overlay, steps):
    monkeypatch.chdir(tmp_path)
    folder = recipes_folder()
    files = [folder / "colored_mnist" / f"{name}.yaml" for name in ("base", *overlay)] + [
        folder / "methods" / "erm.yaml"
    ]
    words = ["fit", *(word for file in files for word in ("--config", str(file))), "--data.root", str(npz), *steps]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
    main([*words, *quiet, "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert checkpoint.stem == ("best" if overlay else "last")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert [tuple(w.shape) for w in weights.values() if w.ndim == 2] == [(390, 392), (390, 390), (1, 390)]


@pytest.mark.skipif(not os.path.isfile(REAL), reason="MNIST_NPZ names no file")
def test_the_real_file_is_the_published_protocol():
    data = make(REAL, full_batch=True)
    x, _, _, domain, _ = parts(data.train_set)
    assert x.shape == (50000, 2, 14, 14)
    assert torch.bincount(domain).tolist() == [25000, 25000]
    assert len(data.test_set) == len(data.grey_set) == 10000
    assert isinstance(data.train_dataloader(), DataLoader)
    x, y, color, domain, _ = parts(make(REAL, split="imbalanced_reference", label_noise=0.0).train_set)
    below = [int((y[domain == e] == 1).sum()) for e in (0, 1)]
    other = [int((y[domain == e] == 0).sum()) for e in (0, 1)]
    assert (below, other) == ([25538, 0], [1500, 22962])
    for e, flip in enumerate((0.2, 0.1)):
        assert_share((color != y)[domain == e], flip)

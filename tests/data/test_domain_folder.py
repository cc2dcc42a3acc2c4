"""DomainFolder on tiny folders, whole and broken."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
import torch
from PIL import Image

from debias.data import DomainFolder
from debias.errors import DataError, DebiasError

DOMAINS = {"art": 5, "cartoon": 10, "photo": 4}  # images per class


@pytest.fixture
def root(tmp_path):
    for domain, n in DOMAINS.items():
        for label in ("dog", "elephant"):
            folder = tmp_path / domain / label
            folder.mkdir(parents=True)
            for number in range(n):
                Image.new("RGB", (9, 7), number).save(folder / f"{number}.{'png' if number else 'JPG'}")
    (tmp_path / "photo" / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "photo" / "dog" / "._0.png").write_text("no image")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def make(root, test_domain="photo", **options):
    data = DomainFolder(root, test_domain, **{"image_size": 8, "batch_size": 4, "num_workers": 0, **options})
    data.setup()
    return data


def files(dataset):
    return {f"{path.parent.parent.name}/{path.parent.name}/{path.name}" for path in dataset.paths}


def test_one_domain_is_left_out(root):
    data = make(root)
    assert (data.n_domains, data.n_classes, data.n_groups) == (2, 2, 4)
    assert data.domain_names == ["art", "cartoon"]
    assert data.class_names == ["dog", "elephant"]
    assert data.group_names == ["dog in art", "dog in cartoon", "elephant in art", "elephant in cartoon"]
    assert {name.split("/")[0] for name in files(data.train_set) | files(data.val_set)} == {"art", "cartoon"}
    assert {name.split("/")[0] for name in files(data.test_set)} == {"photo"}
    assert len(data.test_set) == 8
    assert Counter(data.val_set.tags["domain"].tolist()) == {0: 2, 1: 4}  # a fifth of each domain
    assert Counter(data.train_set.tags["domain"].tolist()) == {0: 8, 1: 16}
    assert not files(data.train_set) & files(data.val_set)


def test_one_domain_is_the_only_one_to_train_on(root):
    data = make(root, test_domain=None, train_domain="art", n_domains=1, n_groups=2)
    assert data.domain_names == ["art"]
    assert {name.split("/")[0] for name in files(data.train_set) | files(data.val_set)} == {"art"}
    assert {name.split("/")[0] for name in files(data.test_set)} == {"cartoon", "photo"}
    assert len(data.test_set) == 28
    assert set(data.test_set.tags["domain"].tolist()) == {-1}
    # The same samples are held out as where another domain is left out.
    left_out = files(make(root).val_set)
    assert files(data.val_set) == {name for name in left_out if name.startswith("art/")}


def test_the_domains_are_said_once(root):
    with pytest.raises(DebiasError, match=r"either `test_domain`.*or `train_domain`.*but got 'photo' and 'art'"):
        make(root, train_domain="art")
    with pytest.raises(DebiasError, match="but got None and None"):
        make(root, test_domain=None)
    with pytest.raises(
        DataError, match=r"`train_domain` to be one of the domains .* but got 'arts'. Did you mean 'art'"
    ):
        make(root, test_domain=None, train_domain="arts")


def test_tags(root):
    data = make(root, test_domain="art")
    for dataset in (data.train_set, data.val_set):
        of_samples = zip(*dataset.tags.values(), strict=True)
        for i, (path, label, tags) in enumerate(zip(dataset.paths, dataset.labels, of_samples, strict=True)):
            domain = data.domain_names.index(path.parent.parent.name)
            assert label == data.class_names.index(path.parent.name)
            assert dict(zip(dataset.tags, tags, strict=True)) == {
                "group": 2 * label + domain,
                "domain": domain,
                "label": label,
                "index": i,
            }
    assert data.group_counts.tolist() == torch.bincount(data.train_groups, minlength=4).tolist()
    assert set(data.test_set.tags["domain"].tolist()) == set(data.test_set.tags["group"].tolist()) == {-1}
    assert data.test_set.tags["label"].tolist() == [0] * 5 + [1] * 5
    x, y = next(iter(data.val_dataloader())).batch
    assert x.shape == (4, 3, 8, 8)
    assert y.dtype == torch.int64
    assert data.train_set[0].sample[0].shape == (3, 8, 8)


def test_the_split_follows_the_seed_and_not_the_test_domain(root):
    of_art = lambda data: {name for name in files(data.val_set) if name.startswith("cartoon")}  # noqa: E731
    reference = of_art(make(root, test_domain="photo"))
    assert of_art(make(root, test_domain="art")) == reference
    assert of_art(make(root)) == reference
    assert len({frozenset(of_art(make(root, seed=seed))) for seed in range(5)}) > 1


def test_augmentation_can_be_left_out(root):
    gradient = Image.linear_gradient("L").convert("RGB")
    plain, augmented = make(root, augment=False).train_set.transform, make(root).train_set.transform
    assert torch.equal(plain(gradient), plain(gradient))
    assert not torch.equal(augmented(gradient), augmented(gradient))


@pytest.mark.parametrize("balance", ["domain", "group"])
def test_balanced_batches(root, balance):
    for batch in make(root, balance=balance).train_dataloader():
        counts = Counter(batch.tags[balance].tolist())
        assert set(counts.values()) == ({2} if balance == "domain" else {1})


def test_names_that_do_not_fit(root):
    with pytest.raises(
        DataError, match=r"one of the domains \['art', 'cartoon', 'photo'\].*'foto'. Did you mean 'photo'"
    ):
        make(root, test_domain="foto")
    with pytest.raises(DataError, match=r"`n_domains` to be 2, the number of training domains, but got 3"):
        make(root, n_domains=3)
    with pytest.raises(DataError, match=r"`n_groups` to be 4, classes x training domains, but got 2"):
        make(root, n_groups=2)
    data = make(root, n_domains=2, n_groups=4)
    data.setup("test")  # a second time


def test_classes_that_differ_between_domains(root):
    (root / "art" / "giraffe").mkdir()
    with pytest.raises(DataError, match=r"same classes, but 'cartoon' lacks 'giraffe'; 'photo' lacks 'giraffe'. Add"):
        make(root)
    for domain in DOMAINS:
        (root / domain / "giraffe").mkdir(exist_ok=True)
    with pytest.raises(DataError, match=r"hold images .*, but 3 hold none, the first of them .*art/giraffe"):
        make(root)


def test_what_is_missing_on_disk(root, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(DataError, match=r"folder .*nowhere with one folder per domain.*but got nothing there"):
        make(empty / "nowhere")
    with pytest.raises(DataError, match=r"at least 2 domains, one of them to leave out, but got no folder"):
        make(empty)
    for name in ("a", "b"):
        (empty / name).mkdir()
    with pytest.raises(DataError, match=r"one folder per class in each domain of .*, but got none in a, b"):
        make(empty, test_domain="a")
    for name in ("a", "b"):
        (empty / name / "dog").mkdir()
        Image.new("RGB", (4, 4)).save(empty / name / "dog" / "0.png")
    with pytest.raises(DataError, match=r"the domain 'a' to have images to train on and to hold out, but got 1"):
        make(empty, test_domain="b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0}, "`val_fraction` to be between 0 and 1, ends excluded, but got 0"),
        ({"val_fraction": 1.0}, "`val_fraction`"),
        ({"balance": "label"}, '`balance` to be None or "group" or "domain", but got \'label\''),
        ({"image_size": 0}, "`image_size`"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(DebiasError, match=message):
        DomainFolder("folder", "photo", **options)


def test_importing_the_data_package_is_light():
    heavy = ("sklearn", "torchvision", "PIL", "lightning")
    code = f"import sys, debias.data; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

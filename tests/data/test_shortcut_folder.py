"""ShortcutFolder on tiny folders: the style tells the label in training, not at test."""

import pytest
import torch
from PIL import Image

from debias.data import ShortcutFolder
from debias.errors import DataError, DebiasError

SIZES = {"photo": 40, "sketch": 100}  # images of each class


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("styles")
    for style, n in SIZES.items():
        for name in ("dog", "elephant", "giraffe", "horse"):
            (folder / style / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (4, 4), i).save(folder / style / name / f"{i}.png")
    return folder


def make(root, **options):
    data = ShortcutFolder(root, **{"image_size": 4, "batch_size": 8, "num_workers": 0, "agreement": 0.9} | options)
    data.setup()
    return data


def test_styles_agree_with_labels_in_training_and_not_at_test(root):
    data = make(root)
    # Three fifths of 80 photographs: 48 are 90 % of 53, of which 5 are in the other style.
    assert data.group_counts.tolist() == [48, 5, 5, 48]
    assert torch.bincount(data.val_set.tags["group"]).tolist() == [15, 2, 2, 15]
    assert torch.bincount(data.test_set.tags["group"]).tolist() == [16, 16, 16, 16]
    assert data.group_names[1] == "dog+elephant in sketch"
    tags = data.train_set.tags
    assert torch.equal(tags["group"], 2 * tags["label"] + tags["style"])
    for dataset in (data.train_set, data.val_set, data.test_set):
        for path, label, style in zip(dataset.paths, dataset.labels, dataset.tags["style"].tolist(), strict=True):
            assert label == int(path.parent.name in ("giraffe", "horse"))
            assert style == int(path.parent.parent.name == "sketch")
    x, y = next(iter(data.val_dataloader())).batch
    assert x.shape == (8, 3, 4, 4)
    assert y.dtype == torch.int64


def test_no_image_is_in_two_sets(root):
    data = make(root, seed=3)
    sets = [set(map(str, d.paths)) for d in (data.train_set, data.val_set, data.test_set)]
    assert sum(map(len, sets)) == len(set.union(*sets))
    assert sets[0] == set(map(str, make(root, seed=3).train_set.paths)) != set(map(str, make(root).train_set.paths))


def test_images_are_normalised_as_the_network_expects(root):
    pixel = Image.open(make(root).val_set.paths[0]).getpixel((0, 0))[0] / 255
    for options, value in (({}, (pixel - 0.485) / 0.229), ({"mean": (0.5,) * 3, "std": (0.5,) * 3}, 2 * pixel - 1)):
        for augment in (False, True):
            data = make(root, augment=augment, **options)
            assert data.val_set[0].sample[0][0, 0, 0].item() == pytest.approx(value, abs=1e-6)
        x = make(root, **options).train_set[0].sample[0]
        assert x[0].std() < 1e-6  # one colour


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"styles": ("photo", "sketches")}, DataError, "(?s)`styles`.*'sketches'. Did you mean 'sketch'"),
        ({"classes_1": ("zebra",)}, DataError, "`classes_1`"),
        ({"classes_1": ("dog",)}, DebiasError, "different folders"),
        ({"agreement": 1.0}, DebiasError, "`agreement`"),
        ({"agreement": 0.999}, DataError, "none of"),
        ({"n_groups": 3}, DataError, "`n_groups`"),
    ],
)
def test_bad_input(root, options, error, match):
    with pytest.raises(error, match=match):
        make(root, **options)

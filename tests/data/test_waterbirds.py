"""Waterbirds on tiny copies of the official folder, whole and broken."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image

from debias.data import Waterbirds
from debias.errors import DataError, DebiasError

HEADER = "img_id,img_filename,y,split,place,place_filename"
# y, place, split: training 2 + 1 + 1 + 2 by group, one of each group for validation, two samples at test
ROWS = [(0, 0, 0), (0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 1, 0)]
ROWS += [(y, place, 1) for y in (0, 1) for place in (0, 1)] + [(0, 1, 2), (1, 0, 2)]


def write(root, rows=ROWS, header=HEADER):
    lines = [header]
    for number, (y, place, split) in enumerate(rows):
        name = f"{number % 3:03}.Bird/bird_{number}.jpg"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB" if number else "L", (40 + number, 30), number).save(root / name)
        lines.append(f"{number},{name},{y},{split},{place},/o/ocean/1.jpg")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    return root


def make(root, **options):
    data = Waterbirds(root, **{"image_size": 14, "batch_size": 3, "num_workers": 0, **options})
    data.setup()
    return data


def test_the_official_layout(tmp_path):
    data = make(write(tmp_path))
    assert [len(s) for s in (data.train_set, data.val_set, data.test_set)] == [6, 4, 2]
    assert data.train_groups.tolist() == [0, 0, 1, 2, 3, 3]
    assert data.group_counts.tolist() == [2, 1, 1, 2]
    assert data.group_names[1] == "landbird on water"
    first = next(iter(data.test_dataloader()))
    x, y = first.batch
    assert x.shape == (2, 3, 14, 14)
    assert x.dtype == torch.float32
    assert y.tolist() == [0, 1]
    assert first.tags["group"].tolist() == [1, 2]
    assert first.tags["place"].tolist() == [1, 0]
    assert sum(len(batch.batch[1]) for batch in data.train_dataloader()) == 6


def test_evaluation_is_normalised_and_training_is_augmented(tmp_path):
    root = write(tmp_path)
    plain, augmented = make(root, augment=False), make(root)
    white = Image.new("RGB", (50, 30), (255, 255, 255))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((1 - mean) / std)[:, None, None].expand(3, 14, 14)
    for data in (plain.train_set, plain.val_set, augmented.val_set, augmented.train_set):
        torch.testing.assert_close(data.transform(white), expected)
    gradient = Image.linear_gradient("L").convert("RGB")
    assert torch.equal(plain.train_set.transform(gradient), plain.train_set.transform(gradient))
    views = [augmented.train_set.transform(gradient) for _ in range(5)]
    assert any(not torch.equal(views[0], view) for view in views[1:])


def test_evaluation_crops_the_centre_of_a_squashed_square(tmp_path):
    transform = make(write(tmp_path), image_size=224).val_set.transform
    image = Image.new("RGB", (512, 256))  # white strip of 1/16 of the width at the left edge: cropped away
    image.paste((255, 255, 255), (0, 0, 32, 256))
    assert transform(image).shape == (3, 224, 224)
    assert transform(image).max() < 0
    image.paste((255, 255, 255), (0, 0, 64, 256))  # 1/8: half of it stays, 16 columns
    assert (transform(image)[0, 100] > 0).sum() == 16


def test_balanced_batches(tmp_path):
    data = make(write(tmp_path), balance="group", batch_size=4)
    assert all(sorted(batch.tags["group"].tolist()) == [0, 1, 2, 3] for batch in data.train_dataloader())
    lacking = make(write(tmp_path, [row for row in ROWS if row != (0, 1, 0)]), balance="group")
    with pytest.raises(DataError, match=r"training samples of every group.*got none of landbird on water"):
        lacking.train_dataloader()


def test_what_is_missing_on_disk(tmp_path):
    with pytest.raises(DataError, match=r"folder .*nowhere with `metadata.csv`.*but got nothing there. Correct `root`"):
        make(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"file .*metadata.csv, but it is missing. Download"):
        make(tmp_path)
    root = write(tmp_path)
    (root / "001.Bird/bird_4.jpg").unlink()
    (root / "002.Bird/bird_5.jpg").unlink()
    with pytest.raises(DataError, match=r"12 images .* but 2 are missing, the first of them .*bird_4.jpg"):
        make(root)
    write(tmp_path, [row for row in ROWS if row[2] != 1])
    with pytest.raises(DataError, match=r"to have validation rows \(`split` 1\), but got none"):
        make(root)


def test_what_is_wrong_in_the_table(tmp_path):
    write(tmp_path, header=HEADER.replace("place,", "background,"))
    with pytest.raises(
        DataError, match=r"columns img_filename, y, place and split, but place is missing from \['img_id"
    ):
        make(tmp_path)
    write(tmp_path, [*ROWS[:2], (2, 0, 0), *ROWS[3:]])
    with pytest.raises(DataError, match=r"column `y` of .* to be one of 0, 1, but got '2' in line 4"):
        make(tmp_path)
    write(tmp_path, [(0, 0, ""), *ROWS])
    with pytest.raises(DataError, match=r"column `split` .* one of 0, 1, 2, but got '' in line 2"):
        make(tmp_path)
    (tmp_path / "metadata.csv").write_text("img_filename,y,place,split\n,0,0,0\n")
    with pytest.raises(DataError, match=r"`img_filename` .* line 2 is empty"):
        make(tmp_path)
    (tmp_path / "metadata.csv").write_text("img_filename,y,place,split\n\nshort.jpg,0\n")
    with pytest.raises(DataError, match=r"`place` .* but got None in line 3"):
        make(tmp_path)


def test_an_image_that_cannot_be_read(tmp_path):
    data = make(write(tmp_path))
    (tmp_path / "000.Bird/bird_0.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"bird_0.jpg to be a readable image, but got: .*Download or extract"):
        data.train_set[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_groups": 2}, "`n_groups` to be 4, bird x background, but got 2"),
        ({"balance": "place"}, '`balance` to be None or "group"'),
        ({"image_size": 0}, "`image_size` to be at least 1 pixel, but got 0"),
        ({"num_workers": -1}, "`num_workers`"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(DebiasError, match=message):
        Waterbirds("folder", **options)


def test_a_missing_torchvision_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DebiasError, match=r"`torchvision` to be installed.*pip install 'lightning-debias\[images\]'"):
        make(write(tmp_path))

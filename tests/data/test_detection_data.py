"""Detection data on tiny folders, whole and broken; generated shapes."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("torchvision")

from PIL import Image

from _support.fits import make_trainer
from debias import DomainPenalisation
from debias.data import BCCD, GWHD, COCOFolder, ShapesDetection, VOCFolder
from debias.errors import DataError, DebiasError
from debias.models.detector import Detector

# -- generated shapes
# ------------------------------------------------------------------------------------------


def test_shapes_are_drawn_from_the_seed():
    a, b, c = (ShapesDetection(n_train=20, n_eval=8, seed=seed) for seed in (0, 0, 1))
    for data in (a, b, c):
        data.setup()
    assert torch.equal(a.train_set.images, b.train_set.images)
    assert not torch.equal(a.train_set.images, c.train_set.images)
    assert not torch.equal(a.val_set.images, a.test_set.images)
    assert a.group_counts.tolist() == [8, 6, 4, 2]
    assert a.domain_names == ["studio", "texture", "dusk", "fog"]
    assert torch.bincount(a.val_set.tags["domain"]).tolist() == [2, 2, 2, 2]


def test_boxes_of_shapes_enclose_what_is_drawn():
    """On the even background of the first domain, pixels that differ from the corner's are the shapes'."""
    data = ShapesDetection(n_train=30, n_eval=4, shares=(1, 0, 0, 0))
    data.setup()
    seen = set()
    for i in range(30):
        image, target = data.train_set[i].sample
        drawn = (image != image[:, :1, :1]).any(0)
        covered = torch.zeros_like(drawn)
        for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            rows, columns = slice(round(y1), round(y2)), slice(round(x1), round(x2))
            covered[rows, columns] = True
            share = drawn[rows, columns].float().mean()
            assert share == pytest.approx({1: 0.785, 2: 1.0}[label], abs=0.06)
            seen.add(label)
        assert not (drawn & ~covered).any()
        assert ((target["boxes"] >= 0) & (target["boxes"] <= 64)).all()
    assert seen == {1, 2}


def test_domains_differ():
    data = ShapesDetection(n_train=8, n_eval=40)
    data.setup()
    domains, images = data.test_set.tags["domain"], data.test_set.images.float()
    light = [float(images[domains == d].mean()) for d in range(4)]
    contrast = [float(images[domains == d].flatten(1).std(1).mean()) for d in range(4)]
    assert light[2] < min(light) + 1e-9
    assert light[0] > 150
    assert contrast[3] < min(contrast[:2]) / 3


def test_fog_hides_shapes_that_are_there():
    """Shapes in fog are darker than what is around them, by far less than elsewhere, and smaller, but on average so."""
    data = ShapesDetection(n_train=8, n_eval=200)
    data.setup()
    darker, sides = [[] for _ in range(4)], [[] for _ in range(4)]
    for (image, target), domain in zip((s.sample for s in data.test_set), data.test_set.tags["domain"], strict=True):
        grey, free = image.double().mean(0), torch.ones(64, 64, dtype=torch.bool)
        for x1, y1, x2, y2 in target["boxes"].round().int().tolist():
            free[y1:y2, x1:x2] = False
        for x1, y1, x2, y2 in target["boxes"].tolist():
            margin = (x2 - x1) / 4  # the middle half is the shape's, be it disc or square
            rows, columns = (slice(round(a + margin), round(b - margin)) for a, b in ((y1, y2), (x1, x2)))
            darker[domain].append(float(grey[free].mean() - grey[rows, columns].mean()))
            sides[domain].append((x2 - x1) / 64)
    studio, _, dusk, fog = (sum(values) / len(values) for values in darker)
    assert 0.2 * studio > fog > 0.05 * studio
    assert dusk == pytest.approx(0.2 * studio, rel=0.1)
    for values in sides[:3]:
        assert 0.2 <= min(values) < 0.22 < 0.38 < max(values) <= 0.4
    assert 1 / 6 - 1e-6 <= min(sides[3]) < 0.18 < 0.31 < max(sides[3]) <= 1 / 3 + 1e-6


def test_the_light_of_fog_is_uneven():
    """Without shapes a studio is even; in fog the patches are as strong as the shapes, beyond the noise."""
    data = ShapesDetection(n_train=8, n_eval=200)
    data.setup()
    found = [[] for _ in range(4)]
    for (image, target), domain in zip((s.sample for s in data.test_set), data.test_set.tags["domain"], strict=True):
        if not len(target["boxes"]):
            blocks = image.double().mean(0).reshape(8, 8, 8, 8).mean((1, 3))  # noise is averaged out over 64 pixels
            found[domain].append(float(blocks.std()))
    assert all(found)
    assert max(found[0]) < 1e-6
    assert max(found[2]) < 0.005
    assert min(found[3]) > 0.005
    assert 0.015 < sum(found[3]) / len(found[3]) < 0.04


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_domains": 3}, "`n_domains` to be 4"),
        ({"n_train": 0}, "`n_train` to be an integer of at least 1, but got 0"),
        ({"image_size": 16}, "`image_size`"),
        ({"shares": (1, 1)}, "`shares` to be 4 numbers"),
        ({"balance": "group"}, '`balance` to be None or "domain"'),
        ({"batch_size": 0}, "`batch_size`"),
    ],
)
def test_wrong_arguments_of_shapes(options, match):
    with pytest.raises(DebiasError, match=match):
        ShapesDetection(**options)


def test_a_domain_without_a_training_image_is_an_error_at_set_up():
    data = ShapesDetection(n_train=8, n_eval=4, shares=(1, 1, 1, 0), batch_size=4)
    trainer = make_trainer([DomainPenalisation("domain", 4, losses="heads", domain_names=["a", "b", "c", "fog"])])
    with pytest.raises(DebiasError, match="every domain to have training samples, but got none of fog"):
        trainer.fit(Detector("tiny_fcos", 3), datamodule=data)


# -- folders
# ---------------------------------------------------------------------------------------------------

BOXES = [[(1, 2, 11, 12), (0, 0, 40, 30)], [], [(5, 5, 9, 20)]]


def picture(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (40, 30), (number, 10, 20))
    image.putpixel((0, 0), (255, 255, 255))
    image.save(path)


def gwhd(root, rows=None):
    """Three images a split; the second has no box."""
    domains = {"train": "aab", "val": "bcc", "test": "dda"}
    for split, names in domains.items():
        lines = ["image_name,BoxesString,domain"]
        for number, domain in enumerate(names):
            picture(root / "images" / f"{split}{number}.png", number)
            boxes = ";".join(" ".join(map(str, b)) for b in BOXES[number]) or "no_box"
            lines.append(f"{split}{number}.png,{boxes},{domain}")
        (root / f"competition_{split}.csv").write_text("\n".join(lines) + "\n")
    return root


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_gwhd(tmp_path):
    data = GWHD(gwhd(tmp_path), batch_size=3, num_workers=0, augment=False, n_domains=2)
    data.setup()
    assert data.domain_names == ["a", "b", "c", "d"]  # of training first
    assert data.n_domains == 2
    assert data.group_counts.tolist() == [2, 1, 0, 0]
    batch = next(iter(data.val_dataloader()))
    images, targets = batch.batch
    assert batch.tags["domain"].tolist() == [1, 2, 2]
    assert images[0].shape == (3, 30, 40)
    assert images[1][0, 5, 5] == pytest.approx(1 / 255)
    assert [t["boxes"].tolist() for t in targets] == [[list(map(float, b)) for b in boxes] for boxes in BOXES]
    assert targets[1]["boxes"].shape == (0, 4)
    assert targets[0]["labels"].tolist() == [1, 1]
    assert next(iter(data.test_dataloader())).tags["domain"].tolist() == [3, 3, 0]


def test_flips_take_the_boxes_along(tmp_path):
    data = GWHD(gwhd(tmp_path), num_workers=0, augment=True)
    data.setup()
    seen = {}
    torch.manual_seed(0)
    for _ in range(20):
        image, target = data.train_set[0].sample
        seen[bool(image[0, 0, 0] == 1)] = target["boxes"].tolist()
    assert seen == {True: [[1, 2, 11, 12], [0, 0, 40, 30]], False: [[29, 2, 39, 12], [0, 0, 40, 30]]}
    assert all(data.val_set[0].sample[0][0, 0, 0] == 1 for _ in range(20))


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("1 2 11 12", "1 2 11", "BoxesString in competition_train.csv, line 2 to be boxes .* but got '1 2 11'"),
        ("1 2 11 12", "1 2 x 12", "but got '1 2 x 12'"),
        ("1 2 11 12", "11 2 1 12", r"box 0 of competition_train.csv, line 2 \(image train0.png\) to have x2 > x1"),
        ("5 5 9 20", "5 5 9 5", "box 0 of competition_train.csv, line 4 .* to have x2 > x1 and y2 > y1"),
        ("1 2 11 12", "-1 2 11 12", "line 2 .* to lie inside the image"),
        (
            "train1.png",
            "other.png",
            "the image .*other.png that competition_train.csv, line 3 names, but it is missing",
        ),
        ("train1.png", "", "an image and a domain in competition_train.csv, line 3"),
        ("BoxesString", "boxes", "columns image_name, BoxesString, domain, but BoxesString is missing"),
    ],
)
def test_broken_tables_of_gwhd(tmp_path, old, new, match):
    change(gwhd(tmp_path) / "competition_train.csv", old, new)
    with pytest.raises(DataError, match=match):
        GWHD(tmp_path).setup()


def test_a_box_outside_the_image_is_said_with_its_row(tmp_path):
    change(gwhd(tmp_path) / "competition_train.csv", "0 0 40 30", "0 0 41 30")
    data = GWHD(tmp_path, augment=False)
    data.setup()
    with pytest.raises(
        DataError, match=r"box 1 of competition_train.csv, line 2 .* inside the image of 40 x 30 pixels"
    ):
        data.train_set[0]
    clipped = GWHD(tmp_path, augment=False, invalid="clip")
    clipped.setup()
    assert clipped.train_set[0].sample[1]["boxes"].tolist() == [[1, 2, 11, 12], [0, 0, 40, 30]]
    change(tmp_path / "competition_train.csv", "0 0 41 30", "50 0 60 30")
    clipped.setup()
    target = clipped.train_set[0].sample[1]
    assert target["boxes"].tolist() == [[1, 2, 11, 12]]
    assert target["labels"].tolist() == [1]


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(DataError, match=r"the folder .* but got nothing there"):
        GWHD(tmp_path / "none").setup()
    gwhd(tmp_path)
    (tmp_path / "images" / "val0.png").write_bytes(b"no image")
    data = GWHD(tmp_path)
    data.setup()
    with pytest.raises(DataError, match=r"val0.png \(competition_val.csv, line 2\) to be a readable image"):
        data.val_set[0]
    with pytest.raises(DataError, match="`n_domains` to be 2, the number of training domains, but got 3"):
        GWHD(tmp_path, n_domains=3).setup()
    (tmp_path / "competition_test.csv").unlink()
    with pytest.raises(DataError, match=r"competition_test.csv .* but it is missing"):
        GWHD(tmp_path).setup()
    with pytest.raises(DebiasError, match="`invalid` to be 'error' or 'clip', but got 'drop'"):
        GWHD(tmp_path, invalid="drop")


def voc(root, table=True):
    lines = ["image,domain"]
    for split in ("train", "val", "test"):
        names = [f"{split}{i}" for i in range(3)]
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for number, name in enumerate(names):
            picture(root / "JPEGImages" / f"{name}.png", number)
            objects = "".join(
                f"<object><name>{'RBC' if number else 'WBC'}</name><bndbox><xmin>{a + 1}</xmin><ymin>{b + 1}</ymin>"
                f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
                for a, b, c, d in BOXES[number]
            )
            (root / "Annotations").mkdir(exist_ok=True)
            (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
            lines.append(f"{name},{'lab' if number else 'field'}")
    if table:
        (root / "domains.csv").write_text("\n".join(lines) + "\n")
    return root


def test_voc_folder(tmp_path):
    data = VOCFolder(voc(tmp_path), ["RBC", "WBC"], augment=False, num_workers=0)
    data.setup()
    assert data.domain_names == ["field", "lab"]
    assert data.group_counts.tolist() == [1, 2]
    for i, boxes in enumerate(BOXES):
        target = data.test_set[i].sample[1]
        assert target["boxes"].tolist() == [list(map(float, b)) for b in boxes]
        assert target["labels"].tolist() == [1 if i else 2] * len(boxes)


@pytest.mark.parametrize(
    ("file", "old", "new", "match"),
    [
        (
            "Annotations/train2.xml",
            "<name>RBC",
            "<name>RBX",
            "class in train2.xml, object 0 to be one of RBC, WBC, but got",
        ),
        ("Annotations/train2.xml", "<xmin>6</xmin>", "", "four numbers in the bndbox of train2.xml, object 0"),
        ("Annotations/train2.xml", "<xmax>9", "<xmax>3", r"box 0 of train2.xml \(image train2.png\) to have x2 > x1"),
        ("Annotations/train2.xml", "</annotation>", "", "train2.xml to be XML"),
        ("domains.csv", "val1,lab\n", "", "a domain for the image 'val1' of val.txt, line 2"),
        (
            "domains.csv",
            "val1,lab",
            "val1,lag",
            "domain in domains.csv, line 6 to be one of field, lab, but got 'lag'. Did",
        ),
        ("domains.csv", "image,", "name,", "columns image and domain"),
        ("ImageSets/Main/val.txt", "val1", "none", "a domain for the image 'none'"),
    ],
)
def test_broken_voc_folders(tmp_path, file, old, new, match):
    change(voc(tmp_path) / file, old, new)
    with pytest.raises(DataError, match=match):
        VOCFolder(tmp_path, ["RBC", "WBC"], domain_names=["field", "lab"]).setup()


def test_bccd_makes_domains(tmp_path):
    voc(tmp_path, table=False)
    names = [f"train{i % 3}" for i in range(11)]
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("\n".join(names))
    data = BCCD(tmp_path, augment=False)
    data.setup()
    assert data.group_counts.tolist() == [5, 3, 2, 1]
    assert data.val_set.tags["domain"].tolist() == [0, 1, 2]
    assert [name[2:] for name in data.domain_names] == ["as taken", "other stain", "dark", "blurred"]
    white = [data.train_set[i].sample[0][:, 0, 0] for i in (0, 5, 8, 10)]  # the one white pixel, in every domain
    assert white[0].tolist() == [1, 1, 1]
    assert white[1].tolist() == pytest.approx([1, 1, 1])
    assert float(white[2].max()) == pytest.approx(0.33, abs=0.01)
    assert float(white[3].max()) < 0.1
    plain, stained = data.train_set[3].sample[0][:, 9, 9] * 255, data.train_set[6].sample[0][:, 9, 9] * 255
    assert plain.tolist() == pytest.approx([0, 10, 20])
    assert stained.tolist() == pytest.approx([6, 16, 3], abs=1.01)


def coco(root):
    for split in ("train", "val", "test"):
        images, annotations = [], []
        for number in range(3):
            picture(root / "images" / f"{split}{number}.png", number)
            images.append({"id": 10 + number, "file_name": f"{split}{number}.png", "domain": "xy"[number % 2]})
            for a, b, c, d in BOXES[number]:
                item = {"id": len(annotations), "image_id": 10 + number, "category_id": 7, "bbox": [a, b, c - a, d - b]}
                annotations.append(item)
        annotations.append({"id": 99, "image_id": 11, "category_id": 3, "bbox": [0, 0, 5, 5], "iscrowd": 1})
        categories = [{"id": 7, "name": "cell"}, {"id": 3, "name": "dust"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


def test_coco_folder(tmp_path):
    data = COCOFolder(coco(tmp_path), augment=False, num_workers=0)
    data.setup()
    assert data.class_names == ["dust", "cell"]
    assert data.group_counts.tolist() == [2, 1]
    for i, boxes in enumerate(BOXES):
        target = data.val_set[i].sample[1]
        assert target["boxes"].tolist() == [list(map(float, b)) for b in boxes]
        assert target["labels"].tolist() == [2] * len(boxes)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"domain": "y"', '"site": "y"', "train.json, image 11 to have the field `domain`"),
        ("[5, 5, 4, 15]", "[5, 5, 4]", r"`bbox` of train.json, annotation 2 to be \[x, y, width, height\]"),
        ("[5, 5, 4, 15]", "[5, 5, 0, 15]", r"box 0 of train.json, image 12 \(image train2.png\) to have x2 > x1"),
        ('"image_id": 12', '"image_id": 13', "annotation 2 to belong to an image"),
        ('"category_id": 7, "bbox": [5', '"category_id": 8, "bbox": [5', "category of train.json, annotation 2"),
        ('"images": [', '"pictures": [', "to hold images, annotations and categories"),
        ('"categories"', "categories", "train.json to be JSON"),
    ],
)
def test_broken_coco_files(tmp_path, old, new, match):
    change(coco(tmp_path) / "train.json", old, new)
    with pytest.raises(DataError, match=match):
        COCOFolder(tmp_path).setup()

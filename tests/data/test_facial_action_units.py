"""Frames and tables in the layouts of BP4D and DISFA, made by the test, whole and broken."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from debias.data import FacialActionUnits
from debias.data.facial_action_units import PARTITIONS
from debias.errors import DataError, DebiasError

SUBJECTS = [f"S{i}" for i in range(9)]


def write(root, subjects=SUBJECTS, *, units=("AU1", "AU12"), name="labels.csv", values=None):
    """Three frames of each subject in a folder of its own."""
    records = []
    for i, subject in enumerate(subjects):
        for frame in range(3):
            image = f"{subject}/T1/{frame:04}.jpg"
            (root / image).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 16), (10 * i, 40 * frame, 0)).save(root / image)
            cells = values(i, frame) if values else [(i + frame) % 2, -1 if frame == 2 else 1]
            records.append({"image": image, "subject": subject, **dict(zip(units, cells, strict=True))})
    if name.endswith("json"):
        (root / name).write_text(json.dumps(records))
    else:
        lines = [",".join(records[0])] + [",".join(str(value) for value in r.values()) for r in records]
        (root / name).write_text("\n".join(lines) + "\n")
    return root


def make(root, **options):
    data = FacialActionUnits(root, **{"image_size": 8, "num_workers": 0, "batch_size": 4, **options})
    data.setup()
    return data


@pytest.mark.parametrize("name", ["labels.csv", "labels.json"])
def test_frames_and_units(tmp_path, name):
    data = make(write(tmp_path, name=name), table=name, augment=False)
    assert data.unit_names == ["AU1", "AU12"]
    parts = [set(data.subjects[part]) for part in ("train", "val", "test")]
    assert sorted(s for part in parts for s in part) == SUBJECTS  # nobody twice
    assert [len(part) for part in parts] == [5, 1, 3]
    assert data.n_identities == 5
    batch = next(iter(data.test_dataloader()))
    x, y = batch.batch
    assert x.shape == (4, 3, 8, 8)
    assert y.dtype == torch.float32
    assert y[:3, 1].tolist() == [1, 1, -1]
    subject = SUBJECTS.index(data.subjects["test"][0])
    assert y[:3, 0].tolist() == [(subject + frame) % 2 for frame in range(3)]
    assert batch.tags["identity"].tolist() == [0, 0, 0, 1]
    assert data.train_set.tags["identity"].tolist() == [i for i in range(5) for _ in range(3)]
    assert sum(len(b.batch[0]) for b in data.train_dataloader()) == 15


def test_clips_are_a_column_or_the_folder_and_may_be_cut(tmp_path):
    root = write(tmp_path)
    assert make(root).train_set.tags["clip"].tolist() == [i for i in range(5) for _ in range(3)]  # S0/T1, S1/T1, ...
    assert make(root, clip_frames=2).test_set.tags["clip"].tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5]
    lines = (root / "labels.csv").read_text().splitlines()
    clips = ["clip", *(["T1", "T2", "T1"] * 9)]  # the same names for every subject
    (root / "labels.csv").write_text("\n".join(f"{line},{clip}" for line, clip in zip(lines, clips, strict=True)))
    assert make(root).test_set.tags["clip"].tolist() == [0, 1, 0, 2, 3, 2, 4, 5, 4]
    assert make(root, clip_frames=1).test_set.tags["clip"].tolist() == list(range(9))
    with pytest.raises(DebiasError, match="argument `clip_frames` to be an integer >= 1, but got 0"):
        make(root, clip_frames=0)


def test_intensities_and_missing_cells(tmp_path):
    root = write(tmp_path, values=lambda i, frame: [[0, 1, 2][frame], [9, "", 5][frame]])
    data = make(root, threshold=2, partition=[["S0"], SUBJECTS[1:]], units=["AU12", "AU1"])
    labels = torch.stack([y for _, y in (data.test_set.dataset[i] for i in range(3))])
    assert labels.tolist() == [[-1, 0], [-1, 0], [1, 1]]


def test_folds_cover_everybody_once(tmp_path):
    root = write(tmp_path)
    tests = [set(make(root, fold=fold).subjects["test"]) for fold in range(3)]
    assert sorted(s for part in tests for s in part) == SUBJECTS
    assert make(root, seed=1).subjects != make(root, seed=2).subjects


@pytest.mark.parametrize(("name", "sizes"), [("bp4d", [14, 14, 13]), ("disfa", [9, 9, 9])])
def test_published_partitions(tmp_path, name, sizes):
    folds = [fold.split() for fold in PARTITIONS[name]]
    assert [len(fold) for fold in folds] == sizes
    everybody = [subject for fold in folds for subject in fold]
    assert len(set(everybody)) == sum(sizes)
    if name == "bp4d":
        assert set(everybody) == {f"F{i:03}" for i in range(1, 24)} | {f"M{i:03}" for i in range(1, 19)}
    data = make(
        write(tmp_path, everybody), partition=name, fold=2, n_identities=sum(sizes[:2]) - 6 + (name == "disfa") * 2
    )
    assert data.subjects["test"] == sorted(folds[2])


def test_the_same_subject_in_two_folds():
    with pytest.raises(DataError, match=r"without a common subject, but got B \(folds 0 and 1\), C \(folds 1 and 2\)"):
        FacialActionUnits("folder", partition=[["A", "B"], ["B", "C"], ["C", "D"]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "bp4"}, "`partition` .* one of bp4d, disfa, but got 'bp4'. Did you mean 'bp4d'"),
        ({"partition": 1}, "`partition` to be at least 2 folds"),
        ({"fold": 3}, "`fold` to be from 0 to 2, but got 3"),
        ({"val_fraction": 0.0}, "`val_fraction`"),
        ({"image_size": 0}, "`image_size` to be at least 1 pixel"),
        ({"balance": "place"}, '`balance` to be None or "group" or "identity"'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(DebiasError, match=message):
        FacialActionUnits("folder", **options)


def test_what_is_missing_or_wrong(tmp_path):
    with pytest.raises(DataError, match=r"folder .*nowhere with the images and the table"):
        make(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"table .*labels.csv, but it is missing"):
        make(tmp_path)
    root = write(tmp_path)
    with pytest.raises(DataError, match=r"column 'AU2', but it has image, subject, AU1, AU12. Did you mean 'AU12'"):
        make(root, units=["AU2"])
    with pytest.raises(DataError, match="`n_identities` to be 5, the subjects in training, but got 41"):
        make(root, n_identities=41)
    with pytest.raises(DataError, match=r"S1, S2, .* are in none"):
        make(root, partition=[["S0"], ["T1", "T2"]])
    with pytest.raises(DataError, match="at least 12 subjects for as many folds, but got 9"):
        make(root, partition=12)
    with pytest.raises(DataError, match="subjects in fold 1 and at least two outside it, but got 0 and 9"):
        make(root, partition=[SUBJECTS, ["T1"]], fold=1)
    (root / "S3/T1/0001.jpg").unlink()
    with pytest.raises(DataError, match=r"27 images .* but 1 are missing, the first of them .*0001.jpg"):
        make(root)
    write(root, values=lambda i, frame: [7, 0])
    with pytest.raises(DataError, match=r"column `AU1` .* from 0 to 5, .* but got '7' in record 1"):
        make(root)
    write(root, units=("unit1", "unit2"))
    with pytest.raises(DataError, match=r"columns AU1, AU2, \.\.\., but got image, subject, unit1, unit2"):
        make(root)
    (root / "labels.csv").write_text("image,subject,AU1\n,S1,0\n")
    with pytest.raises(DataError, match="an `image` and a `subject` in record 1"):
        make(root)
    (root / "labels.json").write_text("{")
    with pytest.raises(DataError, match=r"labels.json to be JSON, but got"):
        make(root, table="labels.json")
    (root / "labels.json").write_text("{}")
    with pytest.raises(DataError, match=r"labels.json to be a list of records, but got dict"):
        make(root, table="labels.json")

"""The plain detector that the recipes train, the detection recipes, and the command that compares methods on them."""

from __future__ import annotations

import csv
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pycocotools")
pytest.importorskip("torchvision")

from _support.fits import make_trainer
from _support.forked import run
from debias.cli import main
from debias.data import ShapesDetection
from debias.errors import DebiasError
from debias.models.detector import Detector, tiny_detector

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


@pytest.mark.parametrize("kind", ["fcos", "faster_rcnn", "retinanet", "ssd"])
def test_a_tiny_detector_learns(kind):
    """Its loss on a few images falls, and it predicts boxes inside the image."""
    torch.manual_seed(0)
    data = ShapesDetection(n_train=8, n_eval=4, shares=(1, 0, 0, 0))
    data.setup()
    model = Detector(f"tiny_{kind}", 3, optimizer=lambda p: torch.optim.Adam(p, 3e-3))
    batch = next(iter(data.train_dataloader())).batch
    optimizer = model.configure_optimizers()
    model.log = lambda *args, **kwargs: None
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < 0.95 * losses[0]
    model.eval()
    for prediction in model.predict_step(batch, 0):
        assert {"boxes", "scores", "labels"} <= prediction.keys()
        assert ((prediction["boxes"] >= 0) & (prediction["boxes"] <= 64)).all()


def test_torchvisions_own_architectures():
    model = Detector("ssdlite320_mobilenet_v3_large", 3)
    assert type(model.network).__name__ == "SSD"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"architecture": "yolo"}, "`architecture` to be one of tiny_faster_rcnn, .* but got 'yolo'"),
        ({"architecture": "tiny_yolo"}, "`kind` to be one of faster_rcnn, .* but got 'yolo'"),
        ({"architecture": "tiny_fcos", "pretrained": True}, "`pretrained` only with torchvision's own"),
    ],
)
def test_wrong_arguments(options, match):
    with pytest.raises(DebiasError, match=match):
        Detector(**options)


def test_the_checkpoint_loads(tmp_path):
    model = Detector("tiny_retinanet", 3)
    trainer = make_trainer()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert Detector.load_from_checkpoint(tmp_path / "model.ckpt").hparams.architecture == "tiny_retinanet"


def test_names_of_parameters_are_those_of_torchvision():
    assert any(name.startswith("head.classification_head") for name in tiny_detector("fcos", 2).state_dict())


@pytest.mark.parametrize("dataset", ["shapes_detection", "bccd", "gwhd"])
@pytest.mark.parametrize("method", ["group_dro", "domain_penalisation"])
def test_recipes_resolve(dataset, method, capsys):
    files = [word for name in ("base", method) for word in ("--config", str(RECIPES / dataset / f"{name}.yaml"))]
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *files, "--print_config"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "losses: heads" in printed
    assert "debias.DetectionMonitor" in printed


@pytest.mark.parametrize("method", ["group_dro", "domain_penalisation"])
def test_the_embedded_recipe_runs(method, tmp_path):
    words = [sys.executable, "-m", "debias", "fit"]
    words += ["--config", str(RECIPES / "shapes_detection" / "base.yaml")]
    words += ["--config", str(RECIPES / "shapes_detection" / f"{method}.yaml")]
    words += ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--data.n_train=16", "--data.n_eval=8"]
    words += ["--trainer.accelerator=cpu", "--trainer.default_root_dir", str(tmp_path)]
    done = run(words, cwd=tmp_path, timeout=250)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("detections/val-epoch=0.png"))
    assert list(tmp_path.rglob("best.ckpt"))


def command(*words):
    spec = importlib.util.spec_from_file_location("detection_benchmark", ROOT / "benchmarks" / "detection.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(list(words))


def test_one_command_makes_the_table(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    small = ["--epochs", "1", "--n_train", "8", "--n_eval", "4", "--out", str(out)]
    rows = command("table", "--seeds", "2", *small)
    assert len(rows) == 8
    read = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["method"] for row in read[:4]] == ["ERM", "ERM, loss per image", "GroupDRO", "DomainPenalisation"]
    printed = capsys.readouterr().out
    assert "| shapes, 2 seeds, test | map | average domain map | worst domain map |" in printed
    assert sum(line.startswith("| DomainPenalisation |") for line in printed.splitlines()) == 1
    # In its first epoch domain penalisation is plain training on the losses of the images.
    first = {name: float(read[1][name]) for name in ("map", "detection_accuracy")}
    assert first == pytest.approx({name: float(read[3][name]) for name in first}, nan_ok=True)
    assert not math.isnan(float(read[0]["detection_accuracy"]))


def test_the_table_of_one_method_on_one_domain(tmp_path, capsys):
    words = ["--methods", "ERM", "--shares", "0", "0", "0", "1", "--seeds", "1", "--epochs", "1"]
    (row,) = command("table", *words, "--n_train", "8", "--n_eval", "8", "--out", str(tmp_path / "rows.csv"))
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3].endswith("| average domain accuracy | studio | texture | dusk | fog |")
    assert printed[-1].startswith("| ERM |")
    assert printed[-1].endswith(f"| {100 * row['map_by_domain/fog']:.1f} |")


def test_overhead_is_measured():
    found = command("overhead", "--architecture", "tiny_retinanet", "--size", "64", "--repeats", "2")
    assert set(found) == {"plain", "heads", "image"}
    assert min(found.values()) > 0

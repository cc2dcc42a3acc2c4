"""What loggers are told: arguments of methods under flat keys, best values, names of groups that none changes."""

import re

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from torch.utils.data import DataLoader, TensorDataset

from _support.offline_wandb import read_offline_runs
from debias import IRM, GroupDRO, GroupMonitor, GroupReweighting, MixStyle, tag
from debias.step.loggers import hyperparameters, safe_names

NAMES = ["age<65", "age>=65", "land/water", "age>65"]


class Recorder(Logger):
    """A logger of somebody's own, which keeps what it is told."""

    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.told, self.metrics = [], {}

    def log_hyperparams(self, params, *args, **kwargs):
        self.told.append(dict(params))

    def log_metrics(self, metrics, step=None):
        self.metrics |= metrics


class Model(L.LightningModule):
    def __init__(self, width=3):
        super().__init__()
        self.save_hyperparameters()
        self.head = torch.nn.Linear(width, 2)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(batch[0]), batch[1])

    validation_step = training_step

    def on_validation_epoch_end(self):
        self.log("val/falling", -float(self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(L.LightningDataModule):
    place_names = NAMES

    def train_dataloader(self):
        x, y = torch.randn(16, 3), torch.arange(16) % 2
        return DataLoader(tag(TensorDataset(x, y), place=torch.arange(16) % 4), 8)

    val_dataloader = train_dataloader


def fit(folder, loggers, *methods, **options):
    torch.manual_seed(0)
    model = Model()
    trainer = L.Trainer(
        default_root_dir=folder, max_epochs=2, accelerator="cpu", logger=loggers, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[*methods, GroupMonitor("place", 4), ModelCheckpoint(monitor="val/falling", mode="max")],
        **options,
    )  # fmt: skip
    trainer.fit(model, Data())
    return model


def test_any_logger_is_told_the_arguments_beside_the_hyperparameters_of_the_module(tmp_path):
    recorder, csv = Recorder(), CSVLogger(tmp_path, name="", version="")
    model = fit(tmp_path, [recorder, csv], GroupDRO("place", 4, step_size=0.5))
    first = recorder.told[0]  # what TensorBoard shows
    assert (first["width"], first["GroupDRO/step_size"], first["GroupDRO/group"]) == (3, 0.5, "place")
    assert model.hparams == {"width": 3}
    kept = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert (kept["width"], kept["GroupDRO/step_size"], kept["GroupDRO/alpha"]) == (3, 0.5, None)


def test_hyperparameters_that_the_module_keeps_to_itself_are_told_to_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(Model, "save_hyperparameters", lambda self: None)
    recorder = Recorder()
    fit(tmp_path, recorder, GroupDRO("place", 4))
    assert all("width" not in told for told in recorder.told)


def test_a_run_without_a_method_tells_nothing(tmp_path):
    recorder = Recorder()
    fit(tmp_path, recorder)
    assert recorder.told == [{"width": 3}]


def test_wandb_has_arguments_in_its_config_and_best_values_in_its_summary(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    fit(tmp_path, WandbLogger(save_dir=tmp_path, project="p"), GroupDRO("place", 4, step_size=0.5))
    wandb.finish()
    (run,) = read_offline_runs(tmp_path)
    assert (run.config["GroupDRO/step_size"], run.config["width"]) == (0.5, 3)
    assert (run.summary["best/val/falling"], run.summary["val/falling"]) == (0, -1)


def test_tensorboard_shows_arguments_and_hyperparameters_in_one_table(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    fit(tmp_path, TensorBoardLogger(tmp_path, name="", version=""), GroupDRO("place", 4, step_size=0.5))
    events = EventAccumulator(str(tmp_path)).Reload()
    data = HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info.hparams
    assert (data["GroupDRO/step_size"].number_value, data["width"].number_value) == (0.5, 3)
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("val/accuracy_by_group/")]
    assert len(tags) == 4


def test_instances_of_one_class_are_told_apart_and_objects_are_named():
    twice = [IRM("place", 2, penalty_weight=1.0), IRM("hospital", 2, penalty_weight=2.0)]
    found = hyperparameters([*twice, MixStyle(layers=["layer1"])])
    assert (found["IRM/place/penalty_weight"], found["IRM/hospital/penalty_weight"]) == (1.0, 2.0)
    assert found["MixStyle/layers"] == ["layer1"]
    by_callable = hyperparameters([GroupReweighting(len, 2, name="of")])
    assert by_callable["GroupReweighting/group"] == "len"


def mlflow(name):
    return re.sub("[^a-zA-Z0-9_/. -]+", "", name)


def tensorboard(name):
    return re.sub(r"[^-/\w\.]", "_", name)


@pytest.mark.parametrize(
    "names",
    [
        NAMES,
        ["a", "a/b"],
        ["猫", "狗"],
        ["a b", "a_b"],
        ["A", "a"],
        ["a<5", "a lt 5"],
        ["", "."],
        ["x,y", "x y", "x%y"],
    ],
)
def test_no_logger_takes_two_groups_for_one(names):
    made = safe_names(names)
    for rule in (str, mlflow, tensorboard, lambda name: mlflow(name).lower()):
        assert len({rule(name) for name in made}) == len(names)
    assert all(name and "/" not in name and tensorboard(name) == name.replace(" ", "_") for name in made)


def test_plain_names_stay():
    names = ["landbird on water", "digit 0-4 red", "3", "0_1", "Zürich"]
    assert safe_names(names) == names


def test_names_in_the_data_module_reach_monitors_and_methods(tmp_path):
    recorder = Recorder()
    fit(tmp_path, recorder, GroupDRO("place", 4))
    safe = ["age lt 65", "age ge 65", "land-water", "age gt 65"]
    for key in ("val/accuracy_by_group", "train/group_weight"):
        assert [name.removeprefix(f"{key}/") for name in recorder.metrics if name.startswith(f"{key}/")] == safe


def test_names_that_are_given_or_of_another_number_stay(tmp_path, monkeypatch):
    recorder = Recorder()
    fit(tmp_path, recorder, GroupDRO("place", 4, group_names=["a", "b", "c", "d"]))
    assert "train/group_weight/a" in recorder.metrics
    monkeypatch.setattr(Data, "place_names", ["one"])
    recorder = Recorder()
    fit(tmp_path / "again", recorder, GroupDRO("place", 4))
    assert "train/group_weight/0" in recorder.metrics

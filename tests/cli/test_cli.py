"""The command line, as a user meets it: as a process where a process matters, else through ``main``."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from _support.forked import run
from debias.cli import main
from debias.cli.listing import methods
from debias.cli.recipes import recipes_folder
from debias.cli.suggest import explain, nearest

ROOT = Path(__file__).parents[2]
RECIPES = recipes_folder()
BASE = str(RECIPES / "colored_digits" / "base.yaml")
GROUP_DRO = str(RECIPES / "methods" / "group_dro.yaml")
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


def debias(*words: str, cwd: Path, new: bool = False, **env: str) -> subprocess.CompletedProcess:
    """Run ``python -m debias`` with a home of its own, so that nobody is logged in anywhere; in a new interpreter?"""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    home = {"HOME": str(cwd), "NETRC": str(cwd / "netrc"), "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    command, options = [sys.executable, "-m", "debias", *words], {"cwd": cwd, "env": {**inherited, **home, **env}}
    if not new:
        return run(command, timeout=240, **options)
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, **options)


def printed_config(capsys, *words: str) -> dict:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *words, "--print_config"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    return yaml.safe_load(out)


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code in (1, 2)
    return capsys.readouterr().err


def class_names(config: dict) -> list[str]:
    return [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]


# parsing


def test_the_config_is_printed_wherever_it_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--print_config", "--config", BASE, "--config", GROUP_DRO])
    assert yaml.safe_load(capsys.readouterr().out) == printed_config(capsys, "--config", BASE, "--config", GROUP_DRO)


def test_method_file_appends_and_interpolates(capsys):
    config = printed_config(capsys, "--config", BASE, "--config", GROUP_DRO, "--trainer.callbacks.step_size", "0.2")
    assert class_names(config) == ["GroupMonitor", "ModelCheckpoint", "GroupDRO"]
    method = config["trainer"]["callbacks"][2]["init_args"]
    assert (method["group"], method["n_groups"], method["step_size"]) == ("group", 4, 0.2)


def test_two_methods_append_in_order(capsys):
    reweight = str(RECIPES / "methods" / "reweight.yaml")
    config = printed_config(capsys, "--config", BASE, "--config", reweight, "--config", GROUP_DRO)
    assert class_names(config)[2:] == ["GroupReweighting", "GroupDRO"]


def test_interpolation_follows_the_command_line(tmp_path, capsys):
    (tmp_path / "data.yaml").write_text(Path(BASE).read_text().replace("n_groups: 4", "n_groups: 6"))
    config = printed_config(capsys, "--config", str(tmp_path / "data.yaml"), "--config", GROUP_DRO)
    assert [c["init_args"].get("n_groups") for c in config["trainer"]["callbacks"]] == [6, None, 6]
    config = printed_config(capsys, "--config", BASE, "--config", GROUP_DRO, "--data.n_groups", "8")
    assert [c["init_args"].get("n_groups") for c in config["trainer"]["callbacks"]] == [8, None, 8]
    config = printed_config(capsys, "--config", BASE, "--seed_everything", "7")
    assert config["data"]["init_args"]["seed"] == 7


def test_printed_config_is_a_config(tmp_path, capsys):
    config = printed_config(capsys, "--config", BASE, "--config", GROUP_DRO)
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(config))
    assert printed_config(capsys, "--config", str(tmp_path / "whole.yaml")) == config


def test_crossed_keys_survive_from_yaml_to_yaml(tmp_path, capsys):
    crossed = "{group: [color, 1], n_groups: [2, 2]}"
    (tmp_path / "method.yaml").write_text(
        f"trainer:\n  callbacks+:\n    - class_path: debias.GroupDRO\n      init_args: {crossed}\n"
    )
    config = printed_config(capsys, "--config", BASE, "--config", str(tmp_path / "method.yaml"))
    assert config["trainer"]["callbacks"][2]["init_args"]["group"] == ["color", 1]


def test_modules_in_the_folder_of_the_command_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["debias", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert sys.path[-1] == str(tmp_path)


# errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.max_epoch", "5"], "`trainer.max_epoch` is not a key; the nearest is `trainer.max_epochs`."),
        (["--modle.width", "5"], "`modle` is not a key; the nearest is `model`."),
        (["--data.batchsize", "5"], "`batchsize` is not an argument of .*ColoredDigits; the nearest is `batch_size`."),
        (["--data.batch_size", "five"], "Expected `batch_size` of .*ColoredDigits to be int, but got five."),
        (
            ["--trainer.callbacks.step_sise", "1"],
            "`step_sise` is not an argument of .*DRO; the nearest is `step_size`.",
        ),
        (["--trainer.callbacks+", "debias.GroupDOR"], "`debias.GroupDOR` .* the nearest is `debias.GroupDRO`."),
        (["--model.optimizer", "torch.optim.SDG"], "`torch.optim.SDG` .* the nearest is `torch.optim.SGD`."),
        (["--model.optimizer.lrr", "1"], "`lrr` is not an argument of torch.optim.Adam; the nearest is `lr`."),
        (["--trainer.max_epochs", "x"], "Expected `trainer.max_epochs` to be one of int, NoneType, but got x."),
        (["--config", "recipes/nothing.yaml"], "there is none. `debias recipes copy"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_unknown_or_wrong_option(capsys, words, message):
    error = refused(capsys, "fit", "--config", BASE, "--config", GROUP_DRO, *words)
    assert error.startswith("error: ")
    assert "usage:" not in error
    assert len(error.splitlines()) == 2
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer:\n  max_epoch: 3\n", "`trainer.max_epoch` is not a key; the nearest is `trainer.max_epochs`."),
        ("trainer:\n  calbacks+: []\n", "`trainer.calbacks` is not a key; the nearest is `trainer.callbacks`."),
        ("daata:\n  seed: 3\n", "`daata` is not a key; the nearest is `data`."),
        ("data:\n  init_args:\n    sede: 3\n", "the nearest is `seed`."),
        (
            "model:\n  class_path: debias.models.classifier.Clasifier\n",
            "the nearest is `debias.models.classifier.Classifier`.",
        ),
        (
            "trainer:\n  callbacks+:\n    - class_path: debias.GroupDRO\n      init_args:\n"
            "        group: group\n        n_groups: 4\n        step_sise: 3\n",
            "`step_sise` is not an argument of debias.GroupDRO; the nearest is `step_size`. It takes: group, n_groups,",
        ),
    ],
)
def test_unknown_key_in_a_file(tmp_path, capsys, text, message):
    (tmp_path / "user.yaml").write_text(text)
    assert message in refused(capsys, "fit", "--config", BASE, "--config", str(tmp_path / "user.yaml"))


def test_unknown_command_and_recipe_name_the_nearest(capsys, tmp_path):
    assert "unknown command `metods`; the nearest is `methods`." in refused(capsys, "metods")
    error = refused(capsys, "recipes", "copy", "colored_digit", str(tmp_path))
    assert "one of bccd, bp4d, colored_digits, colored_mnist, " in error
    assert "but got `colored_digit`; the nearest is `colored_digits`." in error


def test_missing_extra_says_how_to_install_it():
    message = "Problem with given class_path 'a.B':\n    No module named 'torchvision'"
    assert explain(message, []) == "`torchvision` is not installed; `pip install 'lightning-debias[images]'` brings it."


def test_other_messages_pass_unchanged():
    assert explain("something else", ["a.b"]) == "something else"
    assert nearest("zzz", ["b", "a"]) == ". Known are: a, b."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.n_groups", "5"], "error: Expected argument `n_groups` to be 4, label x colour, but got 5"),
        (["--config", GROUP_DRO, "--trainer.callbacks.step_size", "-1"], "error: Expected `step_size`"),
    ],
)
def test_error_of_debias_is_a_message_without_traceback(capsys, words, message):
    error = refused(capsys, "fit", "--config", BASE, *words, *QUIET)
    assert error.splitlines()[-1].startswith(message)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_untrained_network_is_said_to_be_one(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([stage, "--config", BASE, *QUIET, "--trainer.logger=false"])
    said = capsys.readouterr().err
    assert f"note: `debias {stage}` got no `--ckpt_path`, so it runs an untrained network" in said


def test_missing_data_are_said_before_weights_are_looked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("weights were looked for"))
    error = refused(capsys, "fit", "--config", str(ROOT / "recipes" / "waterbirds" / "base.yaml"), *QUIET)
    assert "Expected the data in data/waterbirds, but there is nothing there." in error


def test_a_method_file_without_its_base(capsys):
    error = refused(capsys, "fit", "--config", GROUP_DRO, *QUIET)
    assert "to set `data.init_args.n_groups`, which `trainer.callbacks[0].init_args.n_groups` refers to" in error
    assert "--config recipes/<name>/base.yaml" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_checkpoint_that_is_not_there(capsys, stage):
    error = refused(
        capsys, stage, "--config", BASE, "--ckpt_path", "nowhere/best.ckpt", "--trainer.logger", "false", *QUIET
    )
    assert error.splitlines()[-1].startswith("error: Expected `ckpt_path` to name a checkpoint, but there is none at")


def test_a_required_argument_that_no_file_gives(tmp_path, capsys):
    (tmp_path / "method.yaml").write_text(Path(GROUP_DRO).read_text().replace("n_groups:", "# n_groups:"))
    error = refused(capsys, "fit", "--config", BASE, "--config", str(tmp_path / "method.yaml"), *QUIET)
    assert error.startswith("error: Expected `n_groups` of debias.GroupDRO, but the config does not give it.")
    assert len(error.splitlines()) == 2


# listings


def test_methods_lists_needs_and_references(capsys):
    main(["methods"])
    out = capsys.readouterr().out
    assert "GroupDRO" in out
    assert "Sagawa" in out
    assert "Mixin" not in out


def test_a_narrow_terminal_leaves_names_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["methods"])
    out = capsys.readouterr().out
    assert all(f"│ {name} " in out for name in methods())


def test_listings_work_without_rich(capsys, monkeypatch):
    monkeypatch.setattr("debias.cli.table.find_spec", lambda name: None)
    main(["methods"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["method", "recipe"]
    assert any(line.startswith("GroupDRO") for line in lines[1:])


def test_recipes_are_listed_and_copied_and_never_overwritten(tmp_path, capsys):
    main(["recipes"])
    out = capsys.readouterr().out
    assert "colored_digits" in out
    assert ", ".join(sorted(file.stem for file in (RECIPES / "methods").glob("*.yaml"))) in out

    main(["recipes", "copy", "colored_digits", str(tmp_path)])
    copied = sorted(str(file.relative_to(tmp_path / "recipes")) for file in tmp_path.rglob("*.yaml"))
    assert "colored_digits/base.yaml" in copied
    assert "methods/group_dro.yaml" in copied

    (tmp_path / "recipes" / "methods" / "erm.yaml").write_text("# mine\n")
    capsys.readouterr()
    error = refused(capsys, "recipes", "copy", "colored_digits", str(tmp_path))
    assert str(tmp_path / "recipes" / "colored_digits" / "base.yaml") in error
    assert "Nothing was copied" in error
    main(["recipes", "copy", "waterbirds", str(tmp_path)])
    assert f"kept    {tmp_path / 'recipes' / 'methods' / 'erm.yaml'}" in capsys.readouterr().out
    assert (tmp_path / "recipes" / "methods" / "erm.yaml").read_text() == "# mine\n"
    assert printed_config(capsys, "--config", str(tmp_path / "recipes" / "colored_digits" / "base.yaml"))


# runs


def test_help_and_version_as_a_process(tmp_path):
    done = debias("--help", cwd=tmp_path, new=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("fit", "validate", "test", "demo", "methods", "recipes"))
    assert debias("--version", cwd=tmp_path, new=True).stdout.startswith("debias ")


def test_fit_then_validate_and_test_a_copied_recipe(tmp_path):
    main(["recipes", "copy", "colored_digits", str(tmp_path)])
    files = ["--config", "recipes/colored_digits/base.yaml", "--config", "recipes/methods/group_dro.yaml"]
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"]
    done = debias("fit", *files, "--trainer.max_epochs", "2", *logger, *QUIET, cwd=tmp_path, new=True)
    assert done.returncode == 0, done.stderr
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("Best checkpoint: "))
    assert (tmp_path / line.split()[2]).samefile(checkpoint)
    assert "(val/worst_group_accuracy = 0." in line

    logs = tmp_path / "logs" / "lightning_logs" / "version_0"
    with (logs / "metrics.csv").open() as file:
        assert {"train/loss", "val/loss", "val/worst_group_accuracy", "val/accuracy"} <= set(next(csv.reader(file)))
    assert "search" in yaml.safe_load(Path(BASE).read_text())
    assert "search" not in yaml.safe_load((logs / "config.yaml").read_text())
    saved = ["--config", str(logs / "config.yaml"), "--ckpt_path", str(checkpoint)]
    for stage, metric in (("validate", "val/worst_group_accuracy"), ("test", "test/worst_group_accuracy")):
        done = debias(stage, *saved, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert metric in done.stdout

    refit = ["--retrain.method", "dfr", "--retrain.group", "group", "--retrain.n_groups", "4"]
    refit += ["--retrain.strengths", "[0.1]", "--output", "repaired.ckpt"]
    done = debias("retrain", *saved, *refit, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Refitted `network.5` on 359 samples (dfr, strength 0.1): repaired.ckpt" in done.stdout
    before, after = (torch.load(p, weights_only=True) for p in (checkpoint, tmp_path / "repaired.ckpt"))
    changed = [k for k, v in after["state_dict"].items() if not torch.equal(v, before["state_dict"][k])]
    assert changed == ["network.5.weight", "network.5.bias"]
    done = debias("test", *saved[:2], "--ckpt_path", "repaired.ckpt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = debias("retrain", *saved, "--retrain.method", "dfr", cwd=tmp_path)
    assert done.returncode == 1
    assert "error: Expected `group` and `n_groups` for `method='dfr'`" in done.stderr


def test_wandb_without_login_runs_offline_and_says_where_it_lies(tmp_path):
    logger = ["--trainer.logger", "WandbLogger", "--trainer.logger.project", "digits"]
    done = debias("fit", "--config", BASE, "--trainer.max_epochs", "1", *logger, *QUIET, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("W&B ran offline"))
    folder = tmp_path / line.rpartition(" ")[2]
    assert list(folder.glob("*.wandb"))
    config = yaml.safe_load((folder / "files" / "debias_config.yaml").read_text())
    assert config["data"]["class_path"] == "debias.data.colored_digits.ColoredDigits"
    assert "search" not in config
    assert f"wandb sync {line.rpartition(' ')[2]}" in done.stdout
    assert not (tmp_path / "config.yaml").exists()  # where Lightning would put it, and then refuse the next run


@pytest.mark.parametrize(
    ("environment", "offline"),
    [({}, True), ({"WANDB_API_KEY": "x"}, False), ({"WANDB_MODE": "online"}, False), ({"NETRC": "netrc"}, False)],
    ids=["nobody", "key", "mode", "netrc"],
)
def test_wandb_goes_offline_only_without_login(tmp_path, monkeypatch, environment, offline):
    from debias.cli.training import offline_without_login

    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "")  # an empty one counts as none, and puts back what the test sets
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    (tmp_path / "netrc").write_text("machine wandb.example\n  login user\n  password secret\n")
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    offline_without_login()
    assert (os.environ["WANDB_MODE"] == "offline") is offline

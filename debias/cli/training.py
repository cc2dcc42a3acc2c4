"""``debias fit | validate | test | predict``: LightningCLI, with clear errors and a home for offline W&B runs."""

from __future__ import annotations

import netrc
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NoReturn
from urllib.parse import urlparse

import jsonargparse  # noqa: F401 - Lightning does without it until the first parser is made
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import OmegaConf

from debias.cli import TRAINING, example
from debias.cli.errors import readable_errors
from debias.cli.suggest import explain
from debias.errors import DebiasError
from debias.extras import needs_extra
from debias.step.loggers import is_wandb

__all__ = ["DebiasCLI", "config_words", "offline_without_login", "parse_config", "refuse_bad_checkpoint", "train"]


def train(stage: str, args: Sequence[str]) -> None:
    """Parse ``args``, build the trainer, model and data that they name, and run one stage.

    Args:
        stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        args: the words after ``debias <stage>``.
    """
    with readable_errors():
        DebiasCLI(stage, args).run_stage()


def config_words(contents: Sequence[dict[str, Any]]) -> list[str]:
    """Contents of config files as words of a command line, without any file.

    Args:
        contents: as :func:`debias.compare.search.read_config` reads them, in the order in which they are merged.
    """
    return [word for content in contents for word in ("--config", OmegaConf.to_yaml(OmegaConf.create(content)))]


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are one message that names the nearest key instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Explain ``message`` and exit with status 2."""
        if not self.exit_on_error:  # the parser of a nested class: the outermost one explains
            super().error(message, ex)
        message = explain(message, (action.dest for action in self._actions))
        sys.stderr.write(f"error: {message}\ntip: `{self.prog} --help` lists the options.\n")
        self.exit(2)


class SaveConfig(SaveConfigCallback):
    """Keep the resolved config with the run: in the log folder, or in W&B where that is the logger.

    W&B's log folder is shared by all runs, where Lightning would refuse to start the second one.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save once, before the stage starts."""
        self.save_to_log_dir = trainer.log_dir is not None and not _wandb_loggers(trainer)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand the config to W&B, as hyperparameters to compare runs by and as a file to run it again."""
        for logger in _wandb_loggers(trainer):
            config = self.parser.dump(self.config, skip_none=False)
            logger.log_hyperparams(self.config.as_dict())
            Path(logger.experiment.dir, self.config_filename.replace("config", "debias_config")).write_text(config)


class DebiasCLI(LightningCLI):
    """LightningCLI for one stage.

    LightningCLI's own subcommands put every key below the name of the stage, where ``${data.init_args.n_groups}`` no
    longer finds it; a parser for each stage keeps the keys, and interpolation across files, as they are written.

    Args:
        stage: the Trainer's method to run.
        args: command-line words.
    """

    def __init__(self, stage: str, args: Sequence[str]) -> None:
        self.stage = stage
        super().__init__(
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=SaveConfig if stage == "fit" else None,
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            parser_kwargs={
                "parser_mode": "omegaconf+",
                "prog": f"debias {stage}",
                "allow_abbrev": False,
                "description": TRAINING[stage],
                "epilog": f"Example: {example(stage)}",
            },
            # Behind all files and values, or it prints what they have made up to where it stands.
            args=sorted(args, key=lambda word: word.split("=")[0] == "--print_config"),
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of the stage itself, such as ``--ckpt_path``, and the ranges that a recipe may hold."""
        parser.add_argument(
            "--search",
            type=dict[str, Any] | None,
            default=None,
            help="Ranges of hyperparameters, for `debias compare`; without any effect here.",
        )
        self.stage_arguments = self.add_stage_arguments(parser)

    def add_stage_arguments(self, parser: LightningArgumentParser) -> list[str]:
        """Add the arguments of the Trainer's method; their names."""
        skip: set[str | int] = set(LightningCLI.subcommands()[self.stage])
        names = parser.add_method_arguments(Trainer, self.stage, skip=skip)
        parser.set_defaults(weights_only=True)  # a checkpoint is data, wherever it is from, unless the user says else
        return names

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; unlike LightningCLI without a warning that arguments were handed over.

        The ranges to search are of no run, so neither its ``config.yaml`` nor its hyperparameters hold them.
        """
        self.config = parser.parse_args(args)
        self.config.pop("search", None)

    def before_instantiate_classes(self) -> None:
        """Refuse a missing data folder before weights are looked for; send W&B offline where nobody is logged in."""
        _refuse_missing_data(self.config.get("data"))
        if any(is_wandb(path) for path in _logger_classes(self.config)):
            offline_without_login()

    def run_stage(self) -> None:
        """Run the stage, then say where its results lie."""
        arguments = {name: self.config_init[name] for name in self.stage_arguments}
        refuse_bad_checkpoint(arguments.get("ckpt_path"), arguments.get("weights_only", True))
        if self.stage != "fit" and arguments.get("ckpt_path") is None:
            _say_that_nothing_was_trained(self.stage)
        try:
            getattr(self.trainer, self.stage)(self.model, datamodule=self.datamodule, **arguments)
        finally:
            _say_where_offline_runs_lie(self.trainer)
        if self.stage == "fit":
            _say_where_checkpoint_lies(self.trainer)


class _Parsed(Exception):  # noqa: N818 - it is no error
    """A config was parsed: the one argument."""


class _ConfigCheck(DebiasCLI):
    """``debias fit`` as far as its config is parsed, with one parser however often that happens."""

    made: ClassVar[LightningArgumentParser | None] = None

    def setup_parser(self, *args: Any) -> None:
        """Make the parser the first time; it takes as long as parsing a short config."""
        if _ConfigCheck.made is None:
            super().setup_parser(*args)
            _ConfigCheck.made = self.parser
        self.parser = _ConfigCheck.made

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and go no further."""
        super().parse_arguments(parser, args)
        raise _Parsed(self.config)


def parse_config(args: Sequence[str]) -> dict[str, Any]:
    """The config that ``debias fit`` would run, without building anything.

    Raises:
        SystemExit: it cannot be parsed; the reason is printed to stderr.
    """
    with readable_errors():
        try:
            _ConfigCheck("fit", args)
        except _Parsed as parsed:
            return parsed.args[0].as_dict()
    raise AssertionError("nothing was parsed")


def refuse_bad_checkpoint(path: Any, weights_only: Any = True) -> None:
    """Refuse a path without a checkpoint. Names that Lightning looks up itself, and addresses, are left to it."""
    from debias.compare.keeping import check_checkpoint

    if not isinstance(path, str | Path) or str(path) in ("best", "last", "hpc") or re.match(r"\w+:", str(path)):
        return
    if not Path(path).exists():
        raise DebiasError(
            f"Expected `ckpt_path` to name a checkpoint, but there is none at {path}. `debias fit` prints the"
            " path of the best one at its end."
        )
    if weights_only is not False:
        check_checkpoint(Path(path), "Name another one, or pass `--weights_only false` if you trust that file.")


def _refuse_missing_data(data: Any) -> None:
    """Refuse a `root` of a data module of debias where nothing is; those of others may make theirs."""
    arguments = getattr(data, "init_args", None) or {}
    root = arguments.get("root")
    ours = str(getattr(data, "class_path", "")).startswith("debias.data.")
    if ours and root is not None and not arguments.get("download", False) and not Path(root).exists():
        raise DebiasError(
            f"Expected the data in {root}, but there is nothing there. Put them there, or set `data.init_args.root` to"
            " their folder."
        )


@rank_zero_only
def _say_that_nothing_was_trained(stage: str) -> None:
    print(
        f"note: `debias {stage}` got no `--ckpt_path`, so it runs an untrained network, as the module initialises it."
        f" Pass `--ckpt_path <file>`; `debias fit` prints the path of the best one at its end.",
        file=sys.stderr,
    )


@rank_zero_only
def _say_where_checkpoint_lies(trainer: Trainer) -> None:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path:
            score = callback.best_model_score
            reached = f" ({callback.monitor} = {score:.4g})" if callback.monitor and score is not None else ""
            print(f"Best checkpoint: {callback.best_model_path}{reached}")


@rank_zero_only
def _say_where_offline_runs_lie(trainer: Trainer) -> None:
    if _wandb_loggers(trainer):
        import wandb

        if wandb.run is not None and wandb.run.offline:
            folder = Path(wandb.run.dir).parent
            print(f"W&B ran offline. The run lies in {folder}\nSend it with: wandb sync {folder}")


def _wandb_loggers(trainer: Trainer) -> list[Any]:
    return [logger for logger in trainer.loggers if is_wandb(type(logger))]


def _logger_classes(config: Any) -> Iterator[type]:
    """Import the classes of the loggers that the config names."""
    loggers = config.get("trainer.logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if hasattr(logger, "class_path"):
            module, _, name = logger.class_path.rpartition(".")
            yield getattr(import_module(module), name)


def offline_without_login() -> bool:
    """Let W&B run offline where it would otherwise ask for a key or fail; processes started later inherit this.

    Returns:
        Whether nobody is logged in, and nothing else says how W&B is to run.
    """
    with needs_extra("wandb"):
        import wandb

    chosen = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    # Not `wandb.setup()`, which reads the environment once and for all.
    server = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
    nobody = not any(map(os.environ.get, chosen)) and not _in_netrc(server)
    if nobody:
        os.environ["WANDB_MODE"] = "offline"
    return nobody


def _in_netrc(url: str) -> bool:
    """Look for the password that ``wandb login`` stores."""
    places = [os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]
    for place in filter(None, places):
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(str(place)).authenticators(urlparse(url).hostname or ""):
                return True
    return False

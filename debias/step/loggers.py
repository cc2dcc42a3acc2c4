"""What loggers are told beside the values of steps: arguments of methods, best values, names that all of them keep."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

__all__ = ["hyperparameters", "is_wandb", "log_best", "log_hyperparameters", "safe_names"]

# Tell instances and clusters apart, and change no number.
_NOT_LOGGED = ("name", "allow_untested_strategy")
_WORDS = {
    "<=": " le ",
    ">=": " ge ",
    "!=": " ne ",
    "==": " eq ",
    "<": " lt ",
    ">": " gt ",
    "=": " eq ",
    "/": "-",
    ",": " ",
}
_OPERATORS = re.compile("|".join(map(re.escape, _WORDS)))
# What loggers put in the place of characters: MLflow, on a disk that does not tell capitals, and TensorBoard.
_CHANGED = (re.compile(r"[^a-z0-9_. -]+"), ""), (re.compile(r"[^\w.]+"), "_")


def hyperparameters(callbacks: Sequence[Any]) -> dict[str, Any]:
    """Arguments of the methods among ``callbacks`` under flat keys: ``GroupDRO/step_size``.

    Of several instances of one class the instance's name stands between: ``GroupDRO/place/step_size``. What is neither
    a number, a text, a truth value, None nor a list of these is its name or that of its class.

    Args:
        callbacks: of a Trainer; all but methods are left out.
    """
    methods = [c for c in callbacks if getattr(c, "monitors", None) is False]
    several = Counter(type(method).__name__ for method in methods)
    found: dict[str, Any] = {}
    for i, method in enumerate(methods):
        kind = type(method).__name__
        prefix = kind if several[kind] == 1 else f"{kind}/{method.name or i}"
        given = vars(method)
        for name in inspect.signature(type(method).__init__).parameters:
            if name in given and name not in _NOT_LOGGED:
                found[f"{prefix}/{name}"] = _plain(given[name])
    return found


def log_hyperparameters(trainer: Any, pl_module: Any, more: Mapping[str, Any] | None = None) -> None:
    """Tell every logger the arguments of all methods, before Lightning tells the hyper-parameters of the user's own.

    Those are handed on as well, and stay as they are: TensorBoard shows what it is told first. ``more`` is what else to
    tell, under flat keys.
    """
    found = {**(more or {}), **hyperparameters(trainer.callbacks)}
    if not found:
        return
    own: dict[str, Any] = {}
    for owner in (pl_module, trainer.datamodule):
        if getattr(owner, "_log_hyperparams", False):
            own |= {key: value for key, value in owner.hparams_initial.items() if key != "_class_path"}
    for logger in trainer.loggers:
        logger.log_hyperparams({**own, **found})


@rank_zero_only
def log_best(trainer: Any) -> None:
    """Put the best value of each monitored metric into the summary of W&B runs, as ``best/val/worst_group_accuracy``.

    What W&B itself keeps of a metric is the last value.
    """
    best = {
        f"best/{kept.monitor}": float(kept.best_model_score)
        for kept in trainer.checkpoint_callbacks
        if getattr(kept, "monitor", None) and getattr(kept, "best_model_score", None) is not None
    }
    for logger in trainer.loggers if best else ():
        if is_wandb(type(logger)):
            logger.experiment.summary.update(best)


def is_wandb(logger: type) -> bool:
    """Recognise WandbLogger of either Lightning package, and its subclasses, without importing wandb."""
    return any(base.__name__ == "WandbLogger" for base in logger.__mro__)


def safe_names(names: Sequence[str]) -> list[str]:
    """Names of groups as parts of the names of metrics: none is changed by a logger, and no two become the same.

    A slash would begin a folder in MLflow, where other characters vanish and in TensorBoard become an underscore.
    Comparisons become words: ``"age<65"`` is ``"age lt 65"``. Names that some logger could take for each other get
    their numbers behind.

    Example:
        >>> safe_names(["age<65", "age>=65", "land/water", "a b", "a_b"])
        ['age lt 65', 'age ge 65', 'land-water', 'a b_3', 'a_b_4']
    """
    made = [_safe(str(name)) for name in names]
    unclear = {i for i, name in enumerate(made) if not name.strip(".")}  # nothing, or the folder above
    for changed, by in _CHANGED:
        kept = [changed.sub(by, name.lower()) for name in made]
        unclear |= {i for i, name in enumerate(kept) if not name or kept.count(name) > 1}
    return [f"{name}_{i}" if i in unclear else name for i, name in enumerate(made)]


def _safe(name: str) -> str:
    words = _OPERATORS.sub(lambda found: _WORDS[found[0]], name)
    return " ".join(re.sub(r"[^\w.\- ]+", "_", words).split())


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return getattr(value, "__qualname__", type(value).__qualname__)

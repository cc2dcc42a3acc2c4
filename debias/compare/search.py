"""Hyperparameters of a grid: the ranges that recipes declare, random draws from them, and where a value is set."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from debias.errors import DebiasError

__all__ = ["Space", "applies", "callbacks", "class_name", "draw_settings", "override", "read_config", "read_spaces"]

KINDS = ("choices", "uniform", "log_uniform", "integers")
DIGITS = 4


@dataclass(frozen=True)
class Space:
    """The values of one hyperparameter.

    Attributes:
        kind: ``"choices"``, ``"uniform"``, ``"log_uniform"`` (uniform in the logarithm) or ``"integers"``.
        values: the choices; else the lowest and the highest value, both included.
    """

    kind: str
    values: tuple[Any, ...]

    def draw(self, random: np.random.RandomState) -> Any:
        """Draw one value: a choice as it is written, an int, or a float of four significant digits.

        Example:
            >>> import numpy as np
            >>> from debias.compare.search import Space
            >>> Space("log_uniform", (0.001, 0.1)).draw(np.random.RandomState(0))
            0.01252
        """
        if self.kind == "choices":
            return self.values[random.randint(len(self.values))]
        low, high = self.values
        if self.kind == "integers":
            return int(random.randint(low, high + 1, dtype=np.int64))
        if self.kind == "log_uniform":
            value = math.exp(random.uniform(math.log(low), math.log(high)))
        else:
            value = random.uniform(low, high)
        return min(max(float(f"{value:.{DIGITS}g}"), float(low)), float(high))


def read_spaces(search: Mapping[str, Any], source: str) -> dict[str, Space]:
    """Read a ``search:`` section.

    Args:
        search: by key, a list of choices, or one of ``{choices: [...]}``, ``{uniform: [low, high]}``,
            ``{log_uniform: [low, high]}`` and ``{integers: [low, high]}``.
        source: the file it is from, for messages.

    Raises:
        DebiasError: a key or a range is not of this form.

    Example:
        >>> from debias.compare.search import read_spaces
        >>> read_spaces({"GroupDRO.step_size": {"log_uniform": [0.001, 0.1]}}, "group_dro.yaml")
        {'GroupDRO.step_size': Space(kind='log_uniform', values=(0.001, 0.1))}
    """
    if not isinstance(search, Mapping):
        raise DebiasError(f"Expected `search` in {source} to map hyperparameters to ranges, but got {search!r}.")
    return {_key(key, source): _space(given, f"`search: {key}` in {source}") for key, given in search.items()}


def draw_settings(spaces: Mapping[str, Space], number: int, seed: int) -> list[dict[str, Any]]:
    """Draw settings at random, each different from the others.

    The first is empty: the recipe's own values, as the first trial of DomainBed's sweeps is its defaults. The
    settings of a smaller ``number`` come first in those of a larger one, so that runs made before are not repeated.

    Args:
        spaces: by key.
        number: of settings. Fewer are returned where ``spaces`` holds no more, a single one where it is empty.
        seed: of the draws; has no influence on anything else.

    Raises:
        DebiasError: ``number`` is below 1.
    """
    if number < 1:
        raise DebiasError(f"Expected `number` of settings to be at least 1, but got {number}.")
    random = np.random.RandomState(seed)
    settings: list[dict[str, Any]] = [{}]
    for _ in range(100 * number):  # a few choices are exhausted sooner than that with all but certainty
        if len(settings) == number:
            break
        drawn = {key: space.draw(random) for key, space in spaces.items()}
        if drawn not in settings:
            settings.append(drawn)
    return settings


def override(files: Sequence[dict[str, Any]], key: str, value: Any) -> None:
    """Set a hyperparameter in the contents of config files, in place.

    ``GroupDRO.step_size`` is an argument of the callback of that class, and is set where that callback is listed.
    Anything else is a path from the root, such as ``trainer.max_epochs``, and is set in the last file, which wins.

    Args:
        files: in the order in which they are merged, as `read_config` reads them.
        key: of the hyperparameter.
        value: to set.

    Raises:
        DebiasError: no callback of that class is there, or several, or something on the path is no mapping.
    """
    first, *rest = key.split(".")
    if not files or not all((first, *rest)):
        raise DebiasError(f"Expected `key` to be names joined by dots, and a file to set it in, but got `{key}`.")
    if not _names_callback(key):
        _set(files[-1], [first, *rest], value, key)
        return
    listed = list(callbacks(files))
    found = [(entries, i) for entries, i in listed if class_name(entries[i]) == first]
    if not found:
        names = sorted({name for entries, i in listed if (name := class_name(entries[i]))})
        close = difflib.get_close_matches(first, names, n=1, cutoff=0.5)
        there = f"the nearest is `{close[0]}` of" if close else "there are"
        raise DebiasError(
            f"Expected `{key}` to begin with the class of a callback that the config lists, but none is a {first};"
            f" {there} {', '.join(names) or 'none at all'}."
        )
    if len(found) > 1:
        raise DebiasError(
            f"Expected one callback of class {first} for `{key}`, but the config lists {len(found)} of them. Leave that"
            " key out, and write the value into the file."
        )
    if not rest:
        raise DebiasError(f"Expected `key` to name an argument, such as `{first}.weight`, but got `{key}`.")
    entries, i = found[0]
    if isinstance(entries[i], str):
        entries[i] = {"class_path": entries[i]}
    _set(entries[i], ["init_args", *rest], value, key)


def applies(files: Sequence[dict[str, Any]], key: str) -> bool:
    """Whether `override` has a place for ``key``: always for a path from the root, else where the callback is listed.

    Args:
        files: in the order in which they are merged.
        key: of the hyperparameter.
    """
    name = key.partition(".")[0]
    return not _names_callback(key) or any(class_name(entries[i]) == name for entries, i in callbacks(files))


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML config file, with every ``${...}`` left as it is written.

    Args:
        path: the file; an empty one is an empty config.

    Raises:
        DebiasError: it cannot be read, or is not a mapping.
    """
    try:
        # OmegaConf reads 1e-3 as a number, but takes a lone word for a key.
        if isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict | NoneType):
            return dict(OmegaConf.to_container(OmegaConf.load(path), resolve=False))  # type: ignore[arg-type]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise DebiasError(f"Expected {path} to be a YAML config, but it cannot be read: {reason}") from error
    raise DebiasError(f"Expected {path} to be a mapping of config keys, but it is a list or a single value.")


def _key(key: Any, source: str) -> str:
    if not isinstance(key, str) or not all(key.split(".")):
        raise DebiasError(
            f"Expected the keys of `search` in {source} to be hyperparameters, such as `GroupDRO.step_size` or"
            f" `model.init_args.optimizer.init_args.lr`, but got {key!r}."
        )
    return key


def _space(given: Any, what: str) -> Space:
    if isinstance(given, list | tuple):
        given = {"choices": given}
    if not isinstance(given, Mapping) or len(given) != 1 or next(iter(given)) not in KINDS:
        raise DebiasError(f"Expected {what} to be a list of choices, or one of {', '.join(KINDS)}, but got {given!r}.")
    ((kind, values),) = given.items()
    if kind == "choices":
        if not isinstance(values, list | tuple) or not values:
            raise DebiasError(f"Expected {what} to list at least one choice, but got {values!r}.")
        return Space(kind, tuple(values))
    rule = "integers" if kind == "integers" else "numbers above 0" if kind == "log_uniform" else "numbers"
    if not _is_range(kind, values):
        raise DebiasError(
            f"Expected {what} to be two {rule}, `{kind}: [low, high]` with low below high, but got {values!r}."
        )
    return Space(kind, tuple(values))


def _is_range(kind: str, values: Any) -> bool:
    if not isinstance(values, list | tuple) or len(values) != 2:
        return False
    numbers = int if kind == "integers" else (int, float)
    if any(isinstance(v, bool) or not isinstance(v, numbers) or not -(2**63) <= v < 2**63 - 1 for v in values):
        return False  # NumPy draws no others
    return bool(values[0] < values[1]) and (kind != "log_uniform" or values[0] > 0)


def _names_callback(key: str) -> bool:
    """Classes are written with a capital, keys of the config without one."""
    return key[:1].isupper()


def callbacks(files: Sequence[dict[str, Any]]) -> Iterator[tuple[Any, Any]]:
    """The callbacks that are left once the files are merged, each as what holds it and its place there."""
    trainers = [file["trainer"] for file in files if isinstance(file.get("trainer"), dict)]
    replacing = [i for i, trainer in enumerate(trainers) if "callbacks" in trainer]
    for trainer in trainers[replacing[-1] if replacing else 0 :]:
        for name in ("callbacks", "callbacks+"):
            listed = trainer.get(name)
            if isinstance(listed, list):
                yield from ((listed, i) for i in range(len(listed)))
            elif listed is not None:
                yield trainer, name


def class_name(callback: Any) -> str:
    """The class of a callback in a config, without its module; empty where it names none."""
    path = callback.get("class_path") if isinstance(callback, dict) else callback
    return path.rpartition(".")[2] if isinstance(path, str) else ""


def _set(content: dict[str, Any], path: Sequence[str], value: Any, key: str) -> None:
    for i, name in enumerate(path[:-1]):
        if content.get(name) is None:
            content[name] = {}
        if not isinstance(content[name], dict):
            raise DebiasError(
                f"Expected `{'.'.join(path[: i + 1])}` to hold further keys, so that `{key}` can be set, but it is"
                f" {content[name]!r}."
            )
        content = content[name]
    content[path[-1]] = value

"""The runs of a comparison: methods x settings of hyperparameters x seeds, and the folder and files of each.

Everything that a run depends on lies in its folder before it starts, so it can be made by any process that is handed
the folder's path, also on another machine.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from debias.compare.records import RECORD, SPEC, read_spec, write_json
from debias.compare.schema import digest, refuse_links
from debias.compare.search import applies, draw_settings, override, read_config, read_spaces
from debias.errors import DebiasError

__all__ = ["BASELINES", "LOCK", "Recipe", "RunSpec", "expand", "prepare", "setting_id", "settings_of", "spec_hash"]

# Always compared: without plain training on balanced batches nobody can tell a method from resampling.
BASELINES = ("erm", "balanced")
LOCK = ".lock"


@dataclass(frozen=True)
class Recipe:
    """A folder with a ``base.yaml``, and the method files that go with it.

    Attributes:
        name: of the folder.
        folder: where ``base.yaml`` and the recipe's own method files lie.
        shared: where the method files for every recipe lie.
        extra: further config files, merged after the base and before the method.
        fixed: hyperparameters set for all runs, by key.
    """

    name: str
    folder: Path
    shared: Path
    extra: tuple[Path, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)

    def methods(self) -> list[str]:
        """Names of all methods, whether they fit this recipe or not: shared files, and own ones that add a callback."""
        own = [file for file in self.folder.glob("*.yaml") if "callbacks+" in (read_config(file).get("trainer") or {})]
        return sorted({file.stem for file in [*own, *self.shared.glob("*.yaml")]} - {"base"})

    def files(self, method: str) -> list[Path]:
        """The base file, further ones, the method's: the recipe's own takes the place of the shared one."""
        own = self.folder / f"{method}.yaml"
        last = own if own.is_file() else self.shared / f"{method}.yaml"
        return [self.folder / "base.yaml", *self.extra, last]

    def configs(self, method: str, params: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Contents of these files, with what is fixed and with ``params`` set; without their ``search`` sections.

        Raises:
            DebiasError: a file cannot be read, or a key names a callback that the method does not have.
        """
        contents = [read_config(path) for path in self.files(method)]
        for content in contents:
            content.pop("search", None)
        for key, value in {k: v for k, v in self.fixed.items() if applies(contents, k)}.items():
            override(contents, key, value)
        for key, value in (params or {}).items():
            override(contents, key, value)
        return contents

    def spaces(self, method: str) -> dict[str, Any]:
        """The search spaces that the base and the method file declare, but of what is fixed; the method's win."""
        found: dict[str, Any] = {}
        for path in self.files(method):
            found |= read_spaces(read_config(path).get("search") or {}, str(path))
        return {key: space for key, space in found.items() if key not in self.fixed}

    @property
    def hash(self) -> str:
        """Of what all runs share: the base file and what is fixed, not their order or comments."""
        contents = [read_config(path) for path in (self.folder / "base.yaml", *self.extra)]
        for content in contents:
            content.pop("search", None)
        return _hash([contents, self.fixed])


@dataclass(frozen=True)
class RunSpec:
    """One run that is to be made.

    Attributes:
        id: its name and that of its folder: method, setting if it is not the recipe's own, held-out domain, seed.
        method: name of the method's file.
        seed: of data, initialisation and order.
        params: hyperparameters of the grid, by key.
        held_out: the training domain that it does not see, or None.
    """

    id: str
    method: str
    seed: int
    params: dict[str, Any] = field(default_factory=dict)
    held_out: int | None = None


def settings_of(
    recipe: Recipe,
    methods: Sequence[str],
    *,
    vary: Mapping[str, Sequence[Any]] | None = None,
    draws: int = 1,
    draw_seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """The settings of hyperparameters of each method, the same for all seeds.

    Args:
        recipe: what is trained.
        methods: names of method files.
        vary: values of a key, all combinations of them; a key ``GroupDRO.step_size`` concerns the methods with that
            callback alone, a path from the root such as ``model.init_args.width`` all of them, ERM included.
        draws: settings drawn from each method's ``search`` section; the first is the recipe's own.
        draw_seed: another one gives other draws.

    Raises:
        DebiasError: a key of ``vary`` concerns no method, or ``draws`` is more than 1 and no method declares a space.
    """
    if draws < 1:
        raise DebiasError(f"Expected `draws` to be at least 1, but got {draws}.")
    vary = vary or {}
    contents = {method: recipe.configs(method) for method in methods}
    for key in vary:
        if not any(applies(files, key) for files in contents.values()):
            raise DebiasError(
                f"Expected `vary` to name a callback of a compared method, but none of {', '.join(methods)} has"
                f" `{key.partition('.')[0]}`. Write `GroupDRO.step_size=0.01,0.1`, or a path from the root."
            )
    settings = {}
    for method in methods:
        here = {key: values for key, values in vary.items() if applies(contents[method], key)}
        pairs = [[(key, value) for value in values] for key, values in here.items()]
        combinations = [dict(combination) for combination in itertools.product(*pairs)]
        drawn = draw_settings(recipe.spaces(method), draws, draw_seed) if draws > 1 else [{}]
        merged = [one | two for one in drawn for two in combinations]
        settings[method] = list({_hash(params): params for params in merged}.values())
    if draws > 1 and not any(map(recipe.spaces, methods)):
        raise DebiasError(
            f"Expected a `search:` section in the recipe `{recipe.name}` or its methods to draw from, but there is"
            " none. Declare one, or leave out `draws`."
        )
    return settings


def expand(
    settings: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int], domains: int | None = None
) -> list[RunSpec]:
    """All runs, seed by seed, so that an interrupted comparison has whole seeds.

    Args:
        settings: of each method.
        seeds: one run per method, setting and seed.
        domains: number of training domains to hold out one by one, for leave-one-domain-out; or None.
    """
    held_out = [None, *range(domains or 0)]
    runs = []
    for seed, (method, own), domain in itertools.product(seeds, settings.items(), held_out):
        for params in own:
            parts = [method, setting_id(params), "" if domain is None else f"without{domain}"]
            name = "-".join([*filter(None, parts), f"seed{seed}"])
            runs.append(RunSpec(name, method, seed, dict(params), domain))
    return runs


def setting_id(params: Mapping[str, Any]) -> str:
    """What a setting is called in the name of a run; nothing where it is the recipe's own."""
    return _hash(params)[:6] if params else ""


def prepare(recipe: Recipe, runs: Sequence[RunSpec], out: Path) -> list[Path]:
    """Make the folder of each run, with what it is to do; what is there already must be the same.

    Args:
        recipe: what is trained.
        runs: all of them; checked before the first is written.
        out: folder of the comparison.

    Returns:
        The folders, ``out/runs/<id>``.

    Raises:
        DebiasError: ``out`` cannot be written, leads somewhere else, or holds runs of another recipe or
            configuration. Nothing is overwritten.
    """
    shared = recipe.hash
    wanted: dict[str, dict[str, Any]] = {}
    for run in runs:
        configs = recipe.configs(run.method, run.params)
        wanted[run.id] = {
            "recipe": recipe.name, "recipe_hash": shared, "id": run.id, "method": run.method, "seed": run.seed,
            "params": run.params, "held_out": run.held_out, "configs": configs,
        }  # fmt: skip
    folders = [out / "runs" / run.id for run in runs]
    try:
        out.mkdir(parents=True, exist_ok=True)
        refuse_links(out)
        # Two commands that begin at once: the second one sees all that the first one wrote.
        with FileLock(out / LOCK):
            _refuse_other_runs(out, recipe, {run.method for run in runs})
            for folder, spec in zip(folders, wanted.values(), strict=True):
                if (folder / SPEC).exists():
                    _refuse_difference(recipe, folder, read_spec(folder), spec)
            for folder, spec in zip(folders, wanted.values(), strict=True):
                if (folder / SPEC).exists():
                    continue
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / SPEC, spec)
    except OSError as error:
        raise DebiasError(
            f"Expected `out` to be a folder that can be written, but got {out} ({error}). Name another with `--out`."
        ) from error
    return folders


def spec_hash(spec: Mapping[str, Any]) -> str:
    """Of all that a run is to do. Who has checked a spec hands this to the process that makes the run."""
    return digest(dict(spec))


def _refuse_other_runs(out: Path, recipe: Recipe, methods: Collection[str]) -> None:
    """Any run that is there counts, also one that this grid does not contain, such as one of another seed."""
    shared = recipe.hash
    for file in sorted(out.glob(f"runs/*/{SPEC}")):
        spec = read_spec(file.parent)
        if spec["recipe_hash"] == shared:
            if spec["method"] in methods:
                _refuse_difference(recipe, file.parent, spec, {**spec, "configs": _configs_now(recipe, spec)})
            continue
        if spec["recipe"] != recipe.name:
            what = f"the recipe `{spec['recipe']}`, not of `{recipe.name}`"
        else:
            now = recipe.configs(spec["method"], spec.get("params")) if spec["method"] in recipe.methods() else []
            named = _named(recipe, spec["method"], spec["configs"]), _named(recipe, spec["method"], now)
            what = f"`{recipe.name}` with another base or `--set`: {_difference(*named)}"
        finished = any(out.glob(f"runs/*/{RECORD}"))
        advice = "" if finished else f", or delete {out / 'runs'}, where nothing has finished or failed yet"
        raise DebiasError(
            f"Expected `out` to be empty or to hold runs of this comparison, but {out} holds runs of {what}. Nothing"
            f" was changed. Name another folder with `--out`{advice}."
        )


def _configs_now(recipe: Recipe, spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    try:
        return recipe.configs(spec["method"], spec.get("params"))
    except DebiasError:  # the method has lost the callback that a parameter of this run is of
        return recipe.configs(spec["method"])


def _named(recipe: Recipe, method: str, configs: Sequence[Any]) -> dict[str, Any]:
    """The contents of config files by the names of the files."""
    names = [path.name for path in recipe.files(method)]
    return {f"{name}:": content for name, content in zip(names, configs, strict=False)}


def _refuse_difference(recipe: Recipe, folder: Path, there: Mapping[str, Any], spec: Mapping[str, Any]) -> None:
    keys = ("id", "recipe", "method", "seed", "params", "held_out", "configs")
    plain = json.loads(json.dumps({key: spec.get(key) for key in keys}))
    old: dict[str, Any] = {key: there.get(key) for key in keys}
    if old != plain:
        for content in (old, plain):
            content["configs"] = _named(recipe, spec["method"], content["configs"] or [])
        raise DebiasError(
            f"Expected the run `{spec['id']}` to be configured as before, but {folder} was made with another"
            f" configuration: {_difference(old, plain)}. Nothing was changed. Name another folder with `--out`, or"
            " delete that one to make the run again."
        )


def _difference(old: Any, new: Any) -> str:
    """Name the first value that differs."""
    before, now = _flat(old), _flat(new)
    for key in [*now, *before]:
        was, is_ = before.get(key, "nothing"), now.get(key, "nothing")
        if was != is_:
            return f"`{key.removeprefix('configs.').replace(':.', ': ')}` was {was}, and is {is_}"
    return "what differs is only the order"


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping | list):
        items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else enumerate(value)
        flat: dict[str, Any] = {}
        for name, part in items:
            flat |= _flat(part, f"{key}.{name}" if key else str(name))
        return flat or {key: value}
    return {key: value}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]

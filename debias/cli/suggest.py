"""Clear errors for unknown keys and classes: jsonargparse says what is wrong, this says what was meant."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable
from importlib import import_module

from debias.extras import install_hint

__all__ = ["class_arguments", "explain", "nearest"]

_CLASS = r"Problem with given class_path '(?P<path>[\w.]+)':\s+"


def nearest(word: str, candidates: Iterable[str]) -> str:
    """End a sentence about the unknown ``word``: with the nearest candidate, or else with all of them.

    Example:
        >>> nearest("step_sise", ["group", "step_size"])
        '; the nearest is `step_size`.'
    """
    known = sorted(set(candidates))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; the nearest is `{close[0]}`."
    return f". Known are: {', '.join(known)}." if known else "."


def class_arguments(cls: type) -> list[str]:
    """Name the constructor arguments of ``cls``, following ``**kwargs`` into its base classes.

    Example:
        >>> import torch
        >>> "lr" in class_arguments(torch.optim.SGD)
        True
    """
    names: dict[str, None] = {}
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if init is None or base is object:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        names.update(dict.fromkeys(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(names)


def explain(message: str, keys: Iterable[str]) -> str:
    """Replace a message of jsonargparse about an unknown key or class by one that names the nearest.

    Args:
        message: what the parser says.
        keys: all keys that the parser itself accepts, such as ``trainer.max_epochs``.

    Returns:
        The new message; the old one where it is about something else, or is worded in another way.
    """
    if found := re.search(_CLASS + r"Option '(?P<key>[^']+)' is not accepted", message):
        return _unknown_argument(found["path"], found["key"])
    if found := re.search(
        r"Option '(?P<key>[^']+)' is not accepted\. Got value: \w+\(class_path='(?P<path>[^']+)'", message
    ):
        return _unknown_argument(found["path"], found["key"])
    if found := re.search(r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'", message):
        return _unknown_key(f"{found['group']}.{found['key']}", keys)
    if found := re.search(r"Option '(?P<key>[^']+)' is not accepted", message):
        return _unknown_key(found["key"], keys)
    if found := re.search(r"[Uu]nrecognized arguments: --(?P<key>[^\s=]+)", message):
        return _unknown_key(found["key"], keys)
    if (found := re.search(r"No module named '(?P<module>[\w.]+)'", message)) and (
        hint := install_hint(found["module"])
    ):
        return hint
    if found := re.search(r"module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'", message):
        return _unknown_class(f"{found['module']}.{found['name']}")
    if found := re.search(_CLASS + r"No module named", message):
        return _unknown_class(found["path"])
    if found := re.search(_CLASS + r"the following arguments are required: (?P<names>[\w, ]+)", message):
        names = found["names"].strip()
        line = f"{names.partition(',')[0]}: ..."
        return (
            f"Expected `{names}` of {found['path']}, but the config does not give it. Write `{line}` below `init_args`."
        )
    if found := re.search(r"Expected a dot import path string: (?P<path>\w+)", message):
        return _unknown_class(found["path"])
    if found := re.search(
        _CLASS + r'Parser key "(?P<key>\w+)":\s+Expected (?:a )?(?P<rule>.+?)\. Got value: (?P<value>.+)', message
    ):
        rule = re.sub(r"<class '([^']+)'>", r"\1", found["rule"])
        return f"Expected `{found['key']}` of {found['path']} to be {rule}, but got {found['value']}."
    union = r'^Parser key "(?P<key>[^"]+)":.*Union.*Subtypes: \[(?P<types>.+?)\]\n.*Given value: (?P<value>.+)$'
    if "class_path" not in message and (found := re.search(union, message, re.DOTALL)):
        types = re.sub(r"<class '([^']+)'>", r"\1", found["types"])
        return f"Expected `{found['key']}` to be one of {types}, but got {found['value']}."
    if found := re.search(r"File does not exist: '(?P<path>[^']+)'", message):
        way_out = " `debias recipes copy <name> .` puts a recipe here." if "recipes" in found["path"] else ""
        return f"Expected a config file at {found['path']}, but there is none.{way_out}"
    return message


def _unknown_key(key: str, keys: Iterable[str]) -> str:
    """Compare ``key`` with the keys of its group; its first part with the top level where there is no such group."""
    key = key.rstrip("+")
    keys = list(keys)
    group = key.rpartition(".")[0]
    if inside := [k for k in keys if group and k.startswith(f"{group}.")]:
        return f"`{key}` is not a key{nearest(key, inside)}"
    first = key.partition(".")[0]
    return f"`{first}` is not a key{nearest(first, {k.partition('.')[0] for k in keys})}"


def _unknown_argument(path: str, key: str) -> str:
    try:
        module, _, name = path.rpartition(".")
        accepted = class_arguments(getattr(import_module(module), name))
    except Exception:  # a factory or an unusual signature: the sentence is right without the list
        return f"`{key}` is not an argument of {path}."
    end = nearest(key.removeprefix("init_args."), accepted)
    known = f" It takes: {', '.join(accepted)}." if accepted and "nearest" in end else ""
    return f"`{key}` is not an argument of {path}{end}{known}"


def _unknown_class(path: str) -> str:
    from debias import _public

    modules = _public()
    public = [f"debias.{name}" for name in modules]
    module, _, name = path.rpartition(".")
    if not module:
        close = nearest(f"debias.{name}", public)
        return f"`{path}` is not a class that is known by its short name; write the full path{close}"
    try:
        names = [f"{module}.{n}" for n in dir(import_module(module)) if not n.startswith("_")]
    except ImportError as error:
        end = nearest(path, [*public, *(f"{m}.{n}" for n, m in modules.items())])
        return f"`{path}` cannot be imported" + (end if "nearest" in end else f": {error}.")
    return f"`{path}` cannot be imported{nearest(path, names)}"

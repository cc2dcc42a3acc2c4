"""A second network: a copy of the user's module with the weights of a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from debias.errors import DebiasError

__all__ = ["second_network"]


def second_network(module: nn.Module, given: Any, argument: str) -> nn.Module:
    """The network that a user names.

    Args:
        module: of the same architecture; it stays as it is.
        given: a module, which is returned; a state dict; a checkpoint; or the path of one, loaded with
            ``weights_only=True``.
        argument: the user's argument, for error messages.

    Raises:
        DebiasError: the file cannot be read, or the weights are of another network.
    """
    if isinstance(given, nn.Module):
        return given
    if not isinstance(given, Mapping):
        path = given
        try:
            given = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
            raise DebiasError(
                f"Expected `{argument}` to be a checkpoint that can be read, but reading {path} failed: {error}."
                " Correct the path, or load it yourself and pass the state dict."
            ) from error
    state = given.get("state_dict", given) if isinstance(given, Mapping) else given
    twin = copy.deepcopy(module)
    try:
        twin.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise DebiasError(f"Expected `{argument}` to hold the weights of the same network, but got: {error}.") from None
    return twin

"""``import debias`` costs no more than ``import torch``, and warns about nothing."""

import subprocess
import sys

import pytest

HEAVY = [
    "lightning",
    "pytorch_lightning",
    "torchmetrics",
    "torchvision",
    "kornia",
    "sklearn",
    "timm",
    "wandb",
    "matplotlib",
]


def fresh(code: str) -> str:
    """Run ``code`` in a new interpreter where every warning is an error."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["debias", "debias.cli"])
def test_import_loads_nothing_heavy(module):
    loaded = fresh(f"import sys, {module}; print(*sys.modules)").split()
    assert module in loaded
    assert not set(HEAVY) & set(loaded)


def test_public_names_are_listed_and_reachable():
    """``test_extras.py`` reaches all of them in a new interpreter, too, with the core's dependencies alone."""
    import debias

    assert all(getattr(debias, name) is not None for name in debias.__all__)
    assert {"GroupDRO", "GroupMonitor", "tag", "__version__"} <= set(dir(debias))


def test_unknown_name_is_an_attribute_error():
    import debias

    with pytest.raises(AttributeError, match="has no attribute 'GroupDOR'"):
        debias.GroupDOR  # noqa: B018

"""The gallery: a row for every family and every style augmentation that is there, on the same images."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from debias.cli import gallery, main
from debias.errors import DataError, DebiasError
from debias.ops.shifts import FAMILIES, crafted_shift, sample_keys


def test_the_command_writes_one_picture(tmp_path, capsys):
    main(["gallery", "--out", str(tmp_path / "new" / "all.png"), "--size", "32", "--draws", "1"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "all.png")
    with Image.open(tmp_path / "new" / "all.png") as image:
        assert image.width > 300
        assert image.height > image.width
        assert np.asarray(image.convert("RGB")).std() > 20


class Negative(nn.Module):
    """A style augmentation that another file brings."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        assert self.training
        return x + self.p * torch.rand_like(x) - 0.5, "what else a layer returns"


def test_rows_are_the_families_and_the_styles(monkeypatch):
    module = ModuleType("some_style")
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("some_style", None)
    module.Negative = Negative
    monkeypatch.setitem(sys.modules, "some_style", module)
    layers = (
        ("negative", "some_style", "Negative", lambda channels: {"p": 1.0}),
        ("absent", "no_such_style", "Absent", lambda channels: {}),
    )
    monkeypatch.setattr(gallery, "_LAYERS", layers)
    batches = gallery.example_images(16)
    assert [tuple(b.shape) for b in batches] == [(2, 3, 16, 16), (2, 1, 8, 8)]
    state = torch.get_rng_state()
    found = gallery.rows(batches, draws=2, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert list(found) == ["original", *FAMILIES, "negative"]
    assert all(len(images) == 8 for images in found.values())
    for i in (0, 1):
        assert torch.equal(found["original"][i], batches[0][0])
    expected = crafted_shift(batches[1][:1], "blur", sample_keys(torch.tensor([4]), "blur", seed=3))
    torch.testing.assert_close(found["blur"][4], expected[0])
    assert all(image.min() >= 0 and image.max() <= 1 for images in found.values() for image in images)


def test_images_of_ones_own_are_cropped_to_their_middle(tmp_path):
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 10:30] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "own.png")
    x = gallery.read_images([tmp_path / "own.png"], 12)
    assert x.shape == (1, 3, 12, 12)
    torch.testing.assert_close(x[0, 0], torch.ones(12, 12))
    assert x[0, 1:].max() == 0
    gallery.run(tmp_path / "own_gallery.png", [tmp_path / "own.png"], size=12, draws=1)
    assert (tmp_path / "own_gallery.png").stat().st_size > 3000


def test_errors(tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text.png to be a readable image"):
        gallery.run(tmp_path / "out.png", [tmp_path / "text.png"])
    with pytest.raises(DebiasError, match="`size` >= 8"):
        gallery.run(tmp_path / "out.png", size=4)
    with pytest.raises(SystemExit):
        main(["gallery", "--draws", "0"])
    assert capsys.readouterr().err.startswith("error: Expected `size` >= 8, `draws` >= 1")
    assert not (tmp_path / "out.png").exists()

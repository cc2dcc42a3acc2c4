"""What a newcomer reads and changes: at most ten minutes from the landing page, and five lines of an own script."""

import importlib
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/index.md", "docs/quickstart.md", "docs/no_group_labels.md"]


@pytest.fixture
def reading_time(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("reading_time")


def test_every_door_is_ten_minutes_of_reading_at_most(reading_time):
    paths = list(reading_time.paths())
    assert {title for title, _ in paths} == {"I have groups", "I have no groups", "I compare or research"}
    for title, names in paths:
        assert sum(reading_time.minutes(reading_time.page(name)) for name in names) <= 10, (title, names)


def test_words_are_those_that_a_page_shows(reading_time):
    text = (
        "# One title\n\n:::{container} door\n**Two** [words](page.md), | a | `row` |\n|---|---|\n:::\n\n"
        "```python\nx = 1\n```\n\n```{toctree}\n:hidden:\n\npage\n```\n"
    )
    assert reading_time.words(text) == (6, 3)


def diff(page):
    """The first diff of a page: the script before, and after."""
    (lines, *_) = re.findall(r"^```diff\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    before = [line[2:] for line in lines.splitlines() if not line.startswith("+")]
    return "\n".join(before), "\n".join(line[2:] for line in lines.splitlines())


@pytest.mark.parametrize("page", PAGES)
def test_five_lines_change_at_most(page):
    before, after = diff(page)
    assert 0 < len(after.splitlines()) - len(before.splitlines()) <= 5


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def run(script, **names):
    """Metrics of a script with a model and a quiet trainer."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    model = Classifier()
    model.net(names.pop("example"))
    found = dict(names, model=model, DataLoader=DataLoader, Path=Path)
    found["L"] = SimpleNamespace(Trainer=partial(L.Trainer, accelerator="cpu", log_every_n_steps=1, **quiet))
    exec(script, found)
    return found["trainer"].callback_metrics


def test_the_quickstarts_diff_logs_the_worst_group_of_images_in_folders(tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    image = pytest.importorskip("PIL.Image")
    datasets = pytest.importorskip("torchvision.datasets")
    transforms = pytest.importorskip("torchvision.transforms")
    monkeypatch.chdir(tmp_path)
    rows = ["file,place"]
    for i in range(24):
        name = f"{i:04d}.png"
        folder = Path("images", "val" if i % 3 == 0 else "train", ["landbird", "waterbird"][i // 3 % 2])
        folder.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (4, 4), (10 * i, 0, 0)).save(folder / name)
        rows.insert(1, f"{name},{['land', 'water'][i // 6 % 2]}")
    Path("places.csv").write_text("\n".join(rows))
    before, after = diff("docs/quickstart.md")
    names = {"ImageFolder": datasets.ImageFolder, "ToTensor": transforms.ToTensor, "example": torch.ones(1, 3, 4, 4)}
    assert not run(before, **names)
    metrics = run(after, **names)
    assert 0 <= metrics["val/worst_group_accuracy"] <= 1
    counts = [int(metrics[f"val/accuracy_count/{label}_{place}"]) for label in (0, 1) for place in (0, 1)]
    assert counts == [2, 2, 2, 2]


def test_the_diff_without_groups_logs_the_worst_class():
    x, y = torch.randn(16, 3), torch.arange(16) % 2
    names = {"train": TensorDataset(x, y), "val": TensorDataset(x, y), "example": x}
    before, after = diff("docs/no_group_labels.md")
    assert not run(before, **names)
    assert 0 <= run(after, **names)["val/class/worst_group_accuracy"] <= 1

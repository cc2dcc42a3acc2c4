"""What a core installation can do: import debias from where it was installed, and fit with a method and a monitor."""

import sys
import warnings

warnings.simplefilter("error")
import debias  # noqa: E402

assert debias.__file__.startswith(sys.argv[1]), debias.__file__
warnings.simplefilter("default")

import lightning as L  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from debias import GroupDRO, GroupMonitor, tag  # noqa: E402


class Model(L.LightningModule):
    """Knows nothing of debias."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):  # noqa: ANN001, ANN201
        """A plain loss."""
        x, y = batch
        return torch.nn.functional.cross_entropy(self.head(x), y)

    validation_step = training_step

    def configure_optimizers(self):  # noqa: ANN201
        """A plain optimiser."""
        return torch.optim.SGD(self.parameters(), 0.1)


data = tag(TensorDataset(torch.randn(32, 3), torch.arange(32) % 2), place=torch.arange(32) % 4)
trainer = L.Trainer(
    max_epochs=2, accelerator="cpu", callbacks=[GroupDRO("place", 4), GroupMonitor("place", 4)], logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(Model(), DataLoader(data, 8), DataLoader(data, 8))
assert "val/worst_group_accuracy" in trainer.callback_metrics
print(f"debias {debias.__version__} from {debias.__file__}: fitted")

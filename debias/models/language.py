"""A causal language model from ``transformers`` that knows nothing of debias: what the recipe of tokens trains."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from debias.extras import needs_extra

__all__ = ["LanguageModel"]


class LanguageModel(pl.LightningModule):
    """Train a causal language model on batches of token ids, int64 ``(N, length)``, by the mean loss of all tokens.

    Under ``ModelParallelStrategy`` each block, and what is around the blocks, is sharded by FSDP2 along the
    data-parallel dimension. Logs ``train/loss``, ``val/loss`` and ``test/loss``.

    Args:
        model_type: an architecture of ``transformers``, for random weights.
        config: its sizes, such as ``{"vocab_size": 64, "n_layer": 2}``; of a pretrained model what is to be changed.
        pretrained: a name or folder that ``transformers`` loads weights from; takes the place of ``model_type``.
        optimizer: builds the optimiser from the parameters.

    Raises:
        DebiasError: ``transformers`` is not installed (extra ``loops``).
    """

    def __init__(
        self,
        model_type: str = "gpt2",
        *,
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer"])
        self.optimizer_factory = optimizer
        with needs_extra("loops"):
            from transformers import AutoConfig, AutoModelForCausalLM
        if pretrained is not None:
            self.network: nn.Module = AutoModelForCausalLM.from_pretrained(pretrained, **(config or {}))
        else:
            self.network = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(config or {})))
        self.network.train()  # weights that are loaded come in evaluation mode

    def configure_model(self) -> None:
        """Shard the network where the strategy has a mesh."""
        mesh: Any = self.device_mesh
        if mesh is None or mesh["data_parallel"].size() < 2 or any(_is_sharded(p) for p in self.parameters()):
            return
        from torch.distributed.fsdp import fully_shard

        blocks = set(getattr(self.network, "_no_split_modules", None) or ())
        for module in self.network.modules():
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh["data_parallel"])
        fully_shard(self.network, mesh=mesh["data_parallel"])

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute logits of the token after each, ``(N, length, vocabulary)``."""
        return self.network(input_ids=tokens, use_cache=False).logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Compute the mean loss of a batch."""
        return self._loss(batch, "train")

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the validation loss."""
        self._loss(batch, "val")

    def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the test loss."""
        self._loss(batch, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimiser."""
        return self.optimizer_factory(self.parameters())

    def _loss(self, tokens: Tensor, stage: str) -> Tensor:
        logits = self(tokens)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.log(f"{stage}/loss", loss, prog_bar=stage == "train", batch_size=len(tokens), sync_dist=stage != "train")
        return loss


def _is_sharded(p: Tensor) -> bool:
    return hasattr(p, "device_mesh")

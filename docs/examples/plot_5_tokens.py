"""
Tokens: a label for each token
==============================

Is a token a name? In formal text names begin with a capital letter. In chats, which are rare in training, they do not,
but follow a greeting. The loss flattens all tokens; each text has one group.
"""

import lightning as L
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from debias import GroupDRO, GroupMonitor, tag

WORD, CAPITAL, GREETING, PADDING = 0, 1, 2, 3


def texts(n, chats, seed):
    random = torch.Generator().manual_seed(seed)
    chat = torch.rand(n, generator=random) < chats
    tokens = torch.full((n, 12), WORD)
    labels = (torch.rand(n, 12, generator=random) < 0.2).long()
    labels[:, 0] = 0
    tokens[labels.bool() & ~chat[:, None]] = CAPITAL
    greets = labels.bool()[:, 1:] & chat[:, None]
    tokens[:, :-1][greets] = GREETING
    end = torch.randint(8, 13, (n, 1), generator=random)
    after = torch.arange(12) >= end
    return tag(TensorDataset(tokens.masked_fill(after, PADDING), labels.masked_fill(after, -100)), genre=chat.long())


class Tagger(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(4, 8)
        self.read = torch.nn.LSTM(8, 16, batch_first=True)
        self.head = torch.nn.Linear(16, 2)

    def training_step(self, batch, batch_idx):
        tokens, labels = batch
        logits = self.head(self.read(self.embed(tokens))[0])
        return F.cross_entropy(logits.view(-1, 2), labels.view(-1), ignore_index=-100)

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


def curve(*methods):
    """Accuracy of tokens in chats, epoch by epoch."""
    L.seed_everything(0, verbose=False)
    seen = []
    read = L.pytorch.callbacks.LambdaCallback(
        on_validation_end=lambda trainer, _: seen.append(
            100 * float(trainer.callback_metrics["val/accuracy_by_group/chat"])
        )
    )
    trainer = L.Trainer(
        max_epochs=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[*methods, GroupMonitor("genre", 2, group_names=["formal", "chat"]), read],
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=5,
    )  # fmt: skip
    trainer.fit(Tagger(), DataLoader(texts(500, 0.05, 0), 32, shuffle=True), DataLoader(texts(200, 0.5, 1), 200))
    return seen


# %%
# Padding (``ignore_index``) counts neither in the loss nor in the accuracy.

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for name, values in {"ERM": curve(), "GroupDRO": curve(GroupDRO("genre", 2, step_size=0.5))}.items():
    axis.plot(range(1, len(values) + 1), values, marker="o", label=name)
axis.set(xlabel="epoch", ylabel="tokens of chats that are right, %", ylim=(None, 100))
axis.legend()
plt.show()

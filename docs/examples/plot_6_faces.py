"""
Faces: the person must not matter
=================================

A network that sees few people learns to recognise them. ``IdentityAdversarial`` works against that;
``AttributeProbe`` measures how well the identity can still be read from the features, on people never seen.
"""

import lightning as L
import matplotlib.pyplot as plt
import torch

from debias import AttributeProbe, IdentityAdversarial
from debias.data import IdentityShortcut
from debias.models.classifier import Classifier


def measured(*methods):
    L.seed_everything(0, verbose=False)
    data = IdentityShortcut(n_identities=24, n_test_identities=12, images=30, seed=0)
    model = Classifier(
        "strided", num_classes=2, in_channels=1, image_size=24, width=16,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 2e-3),
    )  # fmt: skip
    trainer = L.Trainer(
        max_epochs=15, accelerator="cpu", callbacks=[*methods, AttributeProbe("identity", 12, every_n_epochs=15)],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=5,
    )  # fmt: skip
    trainer.fit(model, data)
    return data, *(trainer.callback_metrics[f"val/identity_probe/{name}"] for name in ("accuracy", "chance"))


# %%
# The adversary's own optimiser is fast and damped; see the page on identity-adversarial training for why.


def damped(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, weight_decay=0.03)


adversary = IdentityAdversarial("identity", 24, strength=0.3, identity_loss="ce", lr=1.0, optimizer=damped)
data, plain, chance = measured()
_, hidden, _ = measured(adversary)

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), width_ratios=(1.4, 1), layout="constrained")
faces = [data.train_set[30 * person + i].sample[0][0] for i in range(3) for person in range(5)]
left.imshow(torch.cat([torch.cat(faces[r : r + 5], 1) for r in range(0, 15, 5)]).numpy(), cmap="gray")
left.set_title("each column is a person", fontsize=10)
left.set_axis_off()
right.bar(["ERM", "adversarial"], [100 * float(plain), 100 * float(hidden)])
right.axhline(100 * float(chance), color="gray", linestyle="--", label="chance")
right.set(ylabel="identity read from features, %", ylim=(0, 100))
right.legend()
plt.show()

"""
Object detection by domain
==========================

Boxes on four backgrounds, of which fog is rare in training. ``DetectionMonitor`` measures the mAP of each domain;
``DomainPenalisation`` gives the domains with a high loss more weight, on an unmodified detector.
"""

import lightning as L
import matplotlib.pyplot as plt
import torch

from debias import DetectionMonitor, DomainPenalisation
from debias.data import ShapesDetection
from debias.models.detector import Detector

L.seed_everything(0, verbose=False)
data = ShapesDetection(n_train=80, n_eval=8, batch_size=8, seed=0)
penalise = DomainPenalisation("domain", 4, losses="heads")  # names of the domains come from the data module
trainer = L.Trainer(
    max_epochs=5, check_val_every_n_epoch=5, accelerator="cpu", callbacks=[penalise, DetectionMonitor("domain", 4)],
    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
model = Detector("tiny_fcos", 3, optimizer=lambda parameters: torch.optim.Adam(parameters, 2e-3))
trainer.fit(model, data)
scores = {name: trainer.callback_metrics[f"val/map_by_domain/{name}"] for name in data.domain_names}

# %%
# Each image below is from one domain, with the boxes that were found; the bars are the weights of the last epoch.

domains = data.val_set.tags["domain"].tolist()
full = [len(data.val_set[i].sample[1]["boxes"]) > 0 for i in range(len(domains))]
figure, axes = plt.subplots(1, 5, figsize=(11, 2.6), width_ratios=(1, 1, 1, 1, 1.4), layout="constrained")
model.eval()
for domain, (name, axis) in enumerate(zip(data.domain_names, axes[:4], strict=True)):
    image, _ = data.val_set[list(zip(domains, full, strict=True)).index((domain, True))].sample
    with torch.no_grad():
        found = model([image])[0]
    axis.imshow(image.permute(1, 2, 0).numpy())
    for (left, top, right, bottom), score in zip(found["boxes"].tolist(), found["scores"].tolist(), strict=True):
        if score > 0.3:
            axis.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, color="tab:orange"))
    axis.set_title(f"{name}: mAP {100 * float(scores[name]):.0f} %", fontsize=9)
    axis.set_axis_off()
axes[4].barh(data.domain_names, penalise.module.weights.tolist())
axes[4].set_xlabel("weight")
plt.show()

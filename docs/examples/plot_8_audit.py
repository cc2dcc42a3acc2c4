"""
Audit a table of predictions
============================

No model and no training: a table with targets, predictions and whatever else is known of the samples. The audit says
whom the model hurts, which column pulls its predictions, and what to do.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from debias.audit import audit_predictions

random = np.random.default_rng(0)
ill = random.integers(0, 2, 2000)
portable = np.where(random.random(2000) < 0.8, ill, 1 - ill)  # who is very ill is scanned in bed
guess = np.where(random.random(2000) < 0.35, portable, np.where(random.random(2000) < 0.1, 1 - ill, ill))
table = pd.DataFrame(
    {
        "target": np.array(["healthy", "ill"])[ill],
        "prediction": np.array(["healthy", "ill"])[guess],
        "scanner": np.array(["fixed", "portable"])[portable],
        "hospital": random.integers(0, 4, 2000),
    }
)
report = audit_predictions(table)
for finding in report.findings:
    print("-", finding)

# %%
# ``report.save("audit")`` writes the page. Here is the accuracy of each label with each scanner.

right = (table["target"] == table["prediction"]).groupby([table["target"], table["scanner"]]).agg(["mean", "size"])
error = 1.96 * np.sqrt(right["mean"] * (1 - right["mean"]) / right["size"])
figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
axis.errorbar(100 * right["mean"], range(len(right)), xerr=100 * error, fmt="o", capsize=3)
axis.axvline(100 * (table["target"] == table["prediction"]).mean(), color="gray", linestyle="--", label="average")
names = [f"{target}, {scanner} (n = {n})" for (target, scanner), n in right["size"].items()]
axis.set(yticks=range(len(right)), yticklabels=names, xlim=(0, 100), xlabel="accuracy with 95 % interval, %")
axis.legend(loc="lower left")
plt.show()

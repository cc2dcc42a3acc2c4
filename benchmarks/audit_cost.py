"""What an audit of 100,000 samples x 20 columns x 512 features costs: seconds of processor time, and memory.

    python benchmarks/audit_cost.py --slices 5

Predictions and features are drawn: nothing is trained.
"""

import argparse
import resource
import time

import numpy as np
import pandas as pd

from debias.audit.collect import HEAD
from debias.audit.features import erasure_table, probe_table
from debias.audit.run import Settings, examine
from debias.audit.samples import Samples


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--slices", type=int, default=5)
    options = parser.parse_args()
    random, n = np.random.default_rng(0), options.samples
    y, place = random.integers(0, 2, n), random.integers(0, 2, n)
    z = np.where(random.random(n) < 0.2, place, np.where(random.random(n) < 0.9, y, 1 - y))
    frame = {f"category {i}": random.integers(0, 2 + i % 8, n).astype(str) for i in range(13)}
    frame |= {f"number {i}": random.normal(size=n) for i in range(6)} | {"place": place}
    features = random.normal(size=(n, 512)).astype(np.float32)
    features[:, 0] += y
    features[:, 1] += place
    head = np.zeros((512, 2))
    head[:2] = [-1, 1]
    score = z + random.normal(0, 0.3, n)
    samples = Samples(
        "classification", y, z, ("0", "1"), np.stack([-score, score], 1), "accuracy", y == z, True,
        pd.DataFrame(frame), features={HEAD: features},
    )  # fmt: skip
    started = time.time(), time.process_time()
    more = [
        ("probes", lambda s, t: probe_table(s, confidence=0.95, seed=0)),
        ("erasure", lambda s, t: erasure_table(s, lambda x: x @ head, HEAD, seed=0)),
    ]
    report = examine(samples, Settings(slices=options.slices), title="cost", more=more)
    print(*report.findings, sep="\n")
    print(f"{time.time() - started[0]:.0f} s, {time.process_time() - started[1]:.0f} s of processor time")
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()

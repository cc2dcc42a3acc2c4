"""ERM, GroupDRO and DomainPenalisation for object detection in one table; and what a loss per image costs.

    python benchmarks/detection.py table                                  # generated shapes
    python benchmarks/detection.py table --methods ERM --shares 0 0 0 1   # plain training on fog alone
    python benchmarks/detection.py table --data bccd --root <folder>      # blood cells
    python benchmarks/detection.py overhead                               # seconds per step, batch 4

All methods share data, network, optimiser, epochs and the seed's order of images; the last epoch is tested, so nothing
is chosen. ``GroupReweighting`` with power 0 is ERM on the methods' own losses: the mean over images of each image's
loss, where plain training has the batch's divisors.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import time
import warnings
from pathlib import Path

import lightning as L
import torch

from debias import DetectionMonitor, DomainPenalisation, GroupDRO, GroupReweighting
from debias.data import BCCD, ShapesDetection
from debias.models.detector import Detector, tiny_detector

METHODS = {
    "ERM": lambda n: [],
    "ERM, loss per image": lambda n: [GroupReweighting("domain", n, power=0, losses="heads")],
    "GroupDRO": lambda n: [GroupDRO("domain", n, step_size=0.01, losses="heads")],
    "DomainPenalisation": lambda n: [DomainPenalisation("domain", n, losses="heads")],
}
EPOCHS = {"shapes": 20, "bccd": 30}
VALUES = ("map", "average_domain_map", "worst_domain_map", "worst_domain_map_50", "average_domain_accuracy")


def run(method: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train and test once."""
    L.seed_everything(seed, verbose=False)
    if args.data == "shapes":
        data = ShapesDetection(seed=seed, n_train=args.n_train, n_eval=args.n_eval, shares=args.shares)
        model = Detector("tiny_fcos", 3, optimizer=lambda p: torch.optim.Adam(p, 2e-3))
    else:
        data = BCCD(args.root, seed=seed)
        model = Detector("tiny_fcos", 4, options={"image_size": 160}, optimizer=lambda p: torch.optim.Adam(p, 2e-3))
    data.setup()
    n = len(data.domain_names)
    monitor = DetectionMonitor("domain", n, domain_names=[name.replace(" ", "_") for name in data.domain_names])
    trainer = L.Trainer(
        max_epochs=args.epochs or EPOCHS[args.data],
        accelerator=args.accelerator,
        devices=1,
        callbacks=[monitor, *METHODS[method](n)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    started = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - started
    (found,) = trainer.test(model, data, verbose=False)
    return {key.removeprefix("test/"): value for key, value in found.items()} | {"seconds": seconds}


def table(args: argparse.Namespace) -> list[dict[str, object]]:
    """Every method with every seed; prints mean and standard deviation, writes every run to a CSV file."""
    rows: list[dict[str, object]] = []
    for seed in range(args.seeds):
        for method in args.methods:
            rows.append({"method": method, "seed": seed, **run(method, seed, args)})
            print(f"# {method}, seed {seed}: {rows[-1]['seconds']:.0f} s", flush=True)
            with args.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    columns = [*VALUES, *(name for name in rows[0] if name.startswith("map_by_domain/"))]
    heads = [name.removeprefix("map_by_domain/").replace("_", " ") for name in columns]
    print(f"| {args.data}, {args.seeds} seeds, test | " + " | ".join(heads) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for method in args.methods:
        cells = []
        for name in columns:
            values = [100 * float(row[name]) for row in rows if row["method"] == method]  # type: ignore[arg-type]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        print(f"| {method} | " + " | ".join(cells) + " |")
    return rows


def overhead(args: argparse.Namespace) -> dict[str, float]:
    """Seconds per step, forward and backward, of the detector itself and of its losses per image; and their ratio."""
    from torchvision.models import detection

    from debias import detection_losses

    device = torch.device("cuda" if args.accelerator == "gpu" else "cpu")
    torch.manual_seed(0)
    if args.architecture.startswith("tiny_"):
        model = tiny_detector(args.architecture.removeprefix("tiny_"), 2, image_size=args.size)
    else:
        builder = getattr(detection, args.architecture)
        model = builder(weights=None, weights_backbone=None, num_classes=2, min_size=args.size, max_size=args.size)
    model.to(device).train()
    images = [torch.rand(3, args.size, args.size, device=device) for _ in range(args.batch)]
    corner = torch.rand(20, 2, device=device) * args.size * 0.7
    boxes = torch.cat([corner, corner + args.size * 0.2], 1)
    targets = [{"boxes": boxes, "labels": torch.ones(20, dtype=torch.int64, device=device)} for _ in images]

    def step(way: str) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        # CPU time of this process, where nothing else tells how busy the machine is.
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        started = clock()
        if way == "plain":
            loss = torch.stack(list(model(images, targets).values())).sum()
        else:
            loss = detection_losses(model, images, targets, losses=way).total.mean()  # type: ignore[arg-type]
        loss.backward()
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - started

    ways = ("plain", "heads", "image")
    for way in ways:
        step(way)
    # Ways take turns, so that what else the machine does hits all alike.
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way in ways:
            times[way].append(step(way))
    found = {way: statistics.median(values) for way, values in times.items()}
    for way, seconds in found.items():
        print(f"{args.architecture} {args.size} px, batch {args.batch}, {device.type}, {way}: {seconds:.4f} s,"
              f" {seconds / found['plain']:.2f} of a plain step")  # fmt: skip
    return found


def main(words: list[str] | None = None) -> object:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "gpu"))
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("table")
    one.add_argument("--data", default="shapes", choices=("shapes", "bccd"))
    one.add_argument("--root", default="data/bccd", help="folder of BCCD")
    one.add_argument("--seeds", type=int, default=3)
    one.add_argument("--epochs", type=int, default=None)
    one.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    one.add_argument("--n_train", type=int, default=800, help="training images of shapes")
    one.add_argument("--n_eval", type=int, default=400, help="test images of shapes")
    one.add_argument(
        "--shares", type=float, nargs=4, default=(4, 3, 2, 1), help="training images of shapes by domain; fog is last"
    )
    one.add_argument("--out", type=Path, default=Path("detection.csv"))
    one.set_defaults(call=table)
    two = commands.add_parser("overhead")
    two.add_argument("--architecture", default="fcos_resnet50_fpn")
    two.add_argument("--size", type=int, default=256)
    two.add_argument("--batch", type=int, default=4)
    two.add_argument("--repeats", type=int, default=5)
    two.set_defaults(call=overhead)
    args = parser.parse_args(words)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        return args.call(args)


if __name__ == "__main__":
    main()

"""What the penalties on the head cost, forward and backward, against differentiating twice.

    python benchmarks/penalty_cost.py
    python benchmarks/penalty_cost.py --table small
    python benchmarks/penalty_cost.py --table many

Three ways, interleaved, the smallest of the repetitions: the plain head and its loss; the same with a penalty of this
package; with the penalty by double backward, written here the way published code does it, domain by domain.
Hutchinson's estimator with 300 vectors is timed at 10 and 50 vectors and extrapolated; the two timings show whether
that is linear. Float32, 32 samples a domain, d = 2048. On one thread of a CPU what is timed is the process's CPU time,
so that another process on the machine counts little; on several threads (``--threads 2``) the time on the clock, so
nothing else should run; on CUDA the time on the clock after a synchronisation.
``--table small`` times the modules on an MLP 20-32-2, where each operation has next to nothing to do, and ``--table
many`` what grows with rows and domains, forward and backward.

Peak memory is that of the tensors of one step, above those before it. Operations are the tensor operations of a step,
views included: what a step costs where each is a kernel to be launched and none has much to do.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from debias import CORALPenalty, HessianAlignmentPenalty, IRMPenalty, MMDPenalty, VRExPenalty
from debias.functional import (
    coral_penalty,
    hessian_alignment_penalty,
    irm_penalty,
    mmd_penalty,
    vrex_penalty,
)
from debias.methods.fishr import FishrPenalty
from debias.ops.domains import make_members
from debias.ops.head_losses import make_head_loss
from debias.ops.head_statistics import HeadStatistics

SIZES = [(7, 3), (65, 3), (345, 5)]
PER_DOMAIN, WIDTH = 32, 2048


class Case:
    """A head, its input, and one method per function; all return the scalar to differentiate."""

    def __init__(self, classes: int, domains: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        n = PER_DOMAIN * domains
        self.classes, self.n_domains = classes, domains
        self.head = nn.Linear(WIDTH, classes).to(device)
        self.features = torch.randn(n, WIDTH, generator=generator).relu().to(device).requires_grad_()
        self.targets = torch.randint(0, classes, (n,), generator=generator).to(device)
        self.domains = (torch.arange(n) % domains).to(device)
        self.rows = [torch.arange(e, n, domains, device=device) for e in range(domains)]

    # the plain head and this package

    def plain(self) -> Tensor:
        return F.cross_entropy(self.head(self.features), self.targets)

    def ours(self, penalty: Callable[[Tensor], Tensor]) -> Tensor:
        logits = self.head(self.features)
        return F.cross_entropy(logits, self.targets) + penalty(logits)

    def alignment(self, statistic: str) -> Tensor:
        return self.ours(
            lambda z: hessian_alignment_penalty(
                self.features, z, self.targets, self.domains, self.n_domains, statistic=statistic
            )
        )

    def fishr(self) -> Tensor:
        members = make_members(self.domains, self.n_domains, len(self.domains))
        module = FishrPenalty(self.n_domains, ema=0.0)
        return self.ours(
            lambda z: module.of(
                HeadStatistics(self.features, make_head_loss("cross_entropy", z, self.targets), members)
            )
        )

    def irm(self) -> Tensor:
        return self.ours(lambda z: irm_penalty(z, self.targets, self.domains, self.n_domains, form="squared"))

    def vrex(self) -> Tensor:
        return self.ours(
            lambda z: vrex_penalty(F.cross_entropy(z, self.targets, reduction="none"), self.domains, self.n_domains)
        )

    def coral(self) -> Tensor:
        return self.ours(lambda z: coral_penalty(self.features, self.domains, self.n_domains))

    def mmd(self) -> Tensor:
        return self.ours(lambda z: mmd_penalty(self.features, self.domains, self.n_domains))

    # by differentiating twice

    def losses(self, scale: Tensor | float = 1.0) -> list[Tensor]:
        return [F.cross_entropy(self.head(self.features[r]) * scale, self.targets[r]) for r in self.rows]

    def gradient(self, loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss, list(self.head.parameters()), create_graph=True)
        return torch.cat([p.flatten() for p in parts])

    def product(self, gradient: Tensor, vector: Tensor) -> Tensor:
        parts = torch.autograd.grad(gradient, list(self.head.parameters()), vector, create_graph=True)
        return torch.cat([p.flatten() for p in parts])

    def norm_times_gradient(self, gradient: Tensor) -> Tensor:
        """``H g`` as published: ``|g| d|g|``."""
        norm = gradient.norm()
        parts = torch.autograd.grad(norm, list(self.head.parameters()), create_graph=True)
        return norm * torch.cat([p.flatten() for p in parts])

    def double_hgp(self) -> Tensor:
        losses = self.losses()
        mean = torch.stack(losses).mean()
        target = self.gradient(mean)
        target_product = self.norm_times_gradient(target).detach()
        penalty = torch.zeros((), device=mean.device)
        for loss in losses:
            own = self.gradient(loss)
            penalty = penalty + 1e-4 * (self.norm_times_gradient(own) - target_product).square().sum()
            penalty = penalty + 5e-3 * (own - target.detach()).square().sum()
        return mean + penalty / len(losses)

    def double_hutchinson(self, vectors: int) -> Tensor:
        losses = self.losses()
        mean = torch.stack(losses).mean()

        def diagonal(gradient: Tensor) -> Tensor:
            total = torch.zeros_like(gradient)
            for _ in range(vectors):
                z = torch.randint_like(gradient, 2) * 2 - 1
                total = total + z * self.product(gradient, z)
            return total / vectors

        target = self.gradient(mean)
        target_diagonal = diagonal(target).detach()
        penalty = torch.zeros((), device=mean.device)
        for loss in losses:
            own = self.gradient(loss)
            penalty = penalty + 1e-3 * (diagonal(own) - target_diagonal).square().sum()
            penalty = penalty + 5e-3 * (own - target.detach()).square().sum()
        return mean + penalty / len(losses)

    def double_fishr(self) -> Tensor:
        parameters = dict(self.head.named_parameters())

        def loss(parameters: dict[str, Tensor], f: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(self.head, parameters, (f.unsqueeze(0),)), y.unsqueeze(0))

        variances = []
        for r in self.rows:
            parts = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, self.features[r], self.targets[r])
            gradients = torch.cat([p.flatten(1) for p in parts.values()], 1)
            variances.append((gradients - gradients.mean(0)).square().mean(0))
        stacked = torch.stack(variances)
        return torch.stack(self.losses()).mean() + 1000 * (stacked - stacked.mean(0)).square().mean()

    def double_irm(self) -> Tensor:
        scale = torch.ones((), device=self.features.device, requires_grad=True)
        losses = self.losses(scale)
        slopes = [torch.autograd.grad(loss, scale, create_graph=True)[0] for loss in losses]
        return torch.stack(losses).mean() + 100 * torch.stack(slopes).square().mean()

    def step(self, name: str) -> None:
        """Forward and backward."""
        for p in (self.features, *self.head.parameters()):
            p.grad = None
        method, _, argument = name.partition(":")
        function = getattr(self, method)
        (function(int(argument) if argument.isdigit() else argument) if argument else function()).backward()
        if self.features.is_cuda:
            torch.cuda.synchronize()


# What is compared with what.
PAIRS = {
    "HGP": ("alignment:hgp", "double_hgp"),
    "diagonal": ("alignment:diagonal", None),
    "frobenius": ("alignment:frobenius", None),
    "Fishr": ("fishr", "double_fishr"),
    "IRM": ("irm", "double_irm"),
    "V-REx": ("vrex", None),
    "CORAL": ("coral", None),
    "MMD": ("mmd", None),
}


def timings(case: Any, names: list[str], seconds: float) -> dict[str, float]:
    """Smallest seconds a step; the methods take turns, so that all see the same machine."""
    alone = not case.features.is_cuda and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        case.step(name)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[names[-1]]) < 3:
        for name in names:
            start = clock()
            case.step(name)
            taken[name].append(clock() - start)
    return {name: min(values) for name, values in taken.items()}


def memory(case: Any, name: str) -> float:
    """MiB of tensors allocated at the peak of one step, above those before it."""
    if case.features.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case.step(name)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        case.step(name)
    events = profiler.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 2**20


class CountOperations(TorchDispatchMode):
    """Counts the tensor operations that run inside it."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


def operations(case: Any, name: str) -> int:
    """Tensor operations of one step."""
    with CountOperations() as count:
        case.step(name)
    return count.operations


class Small:
    """The modules of a plain loop on a small network, in place of a :class:`Case`."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(20, 32), nn.ReLU()), nn.Linear(32, 2)
        self.features = torch.randn(32, 20)  # as they enter
        self.targets, self.domains = torch.randint(2, (32,)), torch.randint(4, (32,))
        rows, of_head = (self.domains,), (self.targets, self.domains)
        made = {name: HessianAlignmentPenalty(4, statistic=name) for name in ("hgp", "diagonal", "frobenius")}
        self.penalties: dict[str, Callable[[Tensor, Tensor], Tensor | float]] = {
            "plain": lambda f, z: 0.0,
            "V-REx": partial(lambda m, f, z: m(self.losses(z), *rows), VRExPenalty(4)),
            "IRM": partial(lambda m, f, z: m(z, *of_head), IRMPenalty(4)),
            "IRM squared": partial(lambda m, f, z: m(z, *of_head), IRMPenalty(4, form="squared")),
            "Fishr": partial(lambda m, f, z: m(f, z, *of_head), FishrPenalty(4)),
            **{name: partial(lambda m, f, z: m(f, z, *of_head), module) for name, module in made.items()},
            "CORAL": partial(lambda m, f, z: m(f, *rows), CORALPenalty(4)),
            "MMD": partial(lambda m, f, z: m(f, *rows), MMDPenalty(4)),
        }  # fmt: skip

    def step(self, name: str) -> None:
        """Forward and backward."""
        for p in (*self.body.parameters(), *self.head.parameters()):
            p.grad = None
        features = self.body(self.features)
        logits = self.head(features)
        (F.cross_entropy(logits, self.targets) + self.penalties[name](features, logits)).backward()

    def losses(self, logits: Tensor) -> Tensor:
        """Of the rows."""
        return F.cross_entropy(logits, self.targets, reduction="none")


def small(seconds: float) -> list[list[Any]]:
    """What the modules add to a small network's step: microseconds and tensor operations."""
    case = Small()
    found = timings(case, list(case.penalties), seconds)
    plain = operations(case, "plain")
    rows: list[list[Any]] = [["penalty", "us more", "operations more"]]
    return rows + [
        [name, (seconds - found["plain"]) * 1e6, operations(case, name) - plain]
        for name, seconds in found.items()
        if name != "plain"
    ]


MANY = [("V-REx", 131072, 1000), ("IRM", 131072, 300), ("frobenius", 4096, 4), ("frobenius", 16384, 4)]


class Many:
    """Many rows or domains in front of a small head, in place of a :class:`Case`."""

    def __init__(self, rows: int, domains: int) -> None:
        torch.manual_seed(0)
        self.features, self.head = torch.randn(rows, 32, requires_grad=True), nn.Linear(32, 2)
        self.targets, self.domains = torch.randint(2, (rows,)), torch.randint(domains, (rows,))
        self.n_domains = domains

    def step(self, name: str) -> None:
        """Forward and backward."""
        self.features.grad = None
        logits, rows = self.head(self.features), (self.domains, self.n_domains)
        if name == "V-REx":
            value = vrex_penalty(F.cross_entropy(logits, self.targets, reduction="none"), *rows)
        elif name == "IRM":
            value = irm_penalty(logits, self.targets, *rows)
        else:
            value = hessian_alignment_penalty(self.features, logits, self.targets, *rows, statistic=name)
        value.backward()


def many() -> list[list[Any]]:
    """What grows with rows and domains: milliseconds and MiB of a step, the smallest of three."""
    found: list[list[Any]] = [["penalty", "rows", "domains", "ms", "MiB"]]
    for name, rows, domains in MANY:
        case = Many(rows, domains)
        found.append([name, rows, domains, timings(case, [name], 0)[name] * 1e3, memory(case, name)])
    return found


def show(title: str, rows: list[list[Any]], out: Path | None) -> None:
    """Print a table and write it as CSV."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "penalty" else "right")
    for row in rows[1:]:
        table.add_row(*(f"{x:.1f}" if isinstance(x, float) else "" if x is None else str(x) for x in row))
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    if out:
        with out.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def main() -> None:
    """Time, print a table and write a CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="per pair of (C, E) and group of methods")
    parser.add_argument("--table", choices=("heads", "small", "many"), default="heads")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", nargs="+", type=int, default=[0, 1, 2], help="which of the (C, E)")
    parser.add_argument("--out", type=Path, default=None, help="CSV")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.table == "small":
        show("MLP 20-32-2, 32 rows, 4 domains, forward and backward", small(args.seconds), args.out)
    elif args.table == "many":
        show("Head 32-2, forward and backward", many(), args.out)
    else:
        heads(args)


def heads(args: argparse.Namespace) -> None:
    """The penalties on heads of several sizes, against differentiating twice."""
    rows = []
    for classes, domains in [SIZES[i] for i in args.sizes]:
        case = Case(classes, domains, args.device)
        quick = ["plain", *(name for pair in PAIRS.values() for name in pair if name)]
        found = timings(case, quick, args.seconds)
        slow = timings(case, ["alignment:diagonal", "double_hutchinson:10", "double_hutchinson:50"], args.seconds)
        ten, fifty = slow["double_hutchinson:10"], slow["double_hutchinson:50"]
        slope = (fifty - ten) / 40
        estimate = fifty + 250 * slope
        for label, (mine, double) in PAIRS.items():
            rows.append(
                [f"{classes}, {domains}", label, found["plain"] * 1e3, found[mine] * 1e3,
                 found[double] * 1e3 if double else None, found[double] / found[mine] if double else None,
                 memory(case, mine), memory(case, double) if double else None,
                 operations(case, mine), operations(case, double) if double else None]
            )  # fmt: skip
        rows.append(
            [f"{classes}, {domains}", "Hutchinson, m = 300 (extrapolated) against diagonal", found["plain"] * 1e3,
             slow["alignment:diagonal"] * 1e3, estimate * 1e3, estimate / slow["alignment:diagonal"],
             None, None, None, None]
        )  # fmt: skip
        print(
            f"({classes}, {domains}): Hutchinson {ten * 1e3:.1f} ms at 10 vectors, {fifty * 1e3:.1f} ms at 50:"
            f" {fifty / ten:.2f} times (5 if all of it were linear)", flush=True,
        )  # fmt: skip
    header = ["C, E", "penalty", "plain ms", "debias ms", "double ms", "ratio", "debias MiB", "double MiB"]
    header += ["debias ops", "double ops"]
    title = f"Head with penalty, forward and backward; d = {WIDTH}, {PER_DOMAIN} samples a domain"
    show(title, [header, *rows], args.out)


if __name__ == "__main__":
    main()

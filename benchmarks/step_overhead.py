"""What a method costs per training step: real Lightning loops with and without it, in turn, in one process.

    python benchmarks/step_overhead.py --models mlp resnet18 vit_tiny --steps 200 --threads 1
    python benchmarks/step_overhead.py --models mlp --methods Nothing Reading GroupDRO --by-hand --threads 1

For every model, plain Lightning and each registered method train in alternating blocks of a few steps, in reversed
order every other round, so that a busy machine slows both alike. A step is the time from the end of a batch to that of
the next: tags taken off the batch, transfer, step, backward, optimiser, callbacks. The batches are made beforehand, so
what the DataLoader's workers do is not in it, and nothing is logged: these are the steps between logging steps.

``Nothing`` is a method that does nothing, and ``Reading`` one that takes the loss apart, with the groups of its rows,
and puts it together again: what a method costs before its own mathematics. ``--by-hand`` adds a module whose own step
holds the tensor operations of GroupDRO, in the same loop and without debias: nothing that is fed by callbacks can cost
less than those operations and ``Nothing`` together.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import logging
import platform
import statistics
import time
import warnings
from collections import Counter
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

import debias
from debias.step.tagged import TaggedBatch

N_GROUPS = 4
WARM_UP = 3  # steps at the start of a block that are not counted: the first one learns the structure of the step
PLAIN, BY_HAND = "plain", "by hand"
IMAGES = ("AdvStyle", "DSU", "EdgeView", "MixStyle")  # need feature maps or images, which the MLP has not
# Operations whose result the host waits for, or whose output size depends on the data.
SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "_unique2", "equal", "is_nonzero")


class Model(L.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-6, momentum=0.9)  # at published weights penalties go far


class ByHand(Model):
    """Group DRO written into the module itself, with the operations and checks that the method has on a CPU."""

    def __init__(self, network, size):
        super().__init__(network)
        self.register_buffer("log_weights", torch.zeros(N_GROUPS, dtype=torch.float64))
        self.register_buffer("ones", torch.ones((), dtype=torch.float64).expand(size))
        self.register_buffer("ids", torch.arange(N_GROUPS + 1))

    def training_step(self, batch, batch_idx):
        x, y, group = batch
        logits = self.network(x)
        F.cross_entropy(logits, y)  # what the step of an unmodified module receives, and logs
        losses = F.cross_entropy(logits, y, reduction="none")
        counted = (y != -100).to(losses.dtype)
        place = torch.bucketize(group, self.ids, right=True)  # ids out of range have places of their own
        rows = torch.stack((losses.detach(), counted, self.ones))
        table = rows.new_zeros(3, N_GROUPS + 3).scatter_add_(1, place.expand(3, -1), rows)
        table.tolist()  # bad rows raise
        num, den, _ = table.narrow(1, 1, N_GROUPS).unbind()
        divisors = den + den.logical_not()
        self.log_weights.add_(num / divisors, alpha=0.01).clamp_(-1e300, 1e300)
        factors = losses.new_zeros(N_GROUPS + 3)
        torch.div(self.log_weights.softmax(0), divisors, out=factors.narrow(0, 1, N_GROUPS))
        return losses.dot(factors.index_select(0, place))


def mlp():
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2)), (20,), 32


def resnet18():
    from torchvision.models import resnet18

    return resnet18(num_classes=2), (3, 64, 64), 32


def vit_tiny():
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=16, num_classes=2), (3, 64, 64), 32


class Nothing(debias.Debiaser):
    """A method that does nothing."""

    def augment(self, step):
        pass


class Reading(debias.Debiaser):
    """Takes the loss apart and puts it together again."""

    def sample_ids(self, step):
        return step.ids("group", N_GROUPS)

    def reweigh(self, calls, step):
        for call in calls:
            call.of_rows(self.sample_ids(step))
        return [call.num.sum() / call.den.sum() for call in calls]


MODELS = {"mlp": mlp, "resnet18": resnet18, "vit_tiny": vit_tiny}
DETAILS = {
    "mlp": "MLP 20-32-2, batch 32",
    "resnet18": "ResNet-18 (torchvision), 64 px, batch 32",
    "vit_tiny": "ViT-tiny (timm), patch 16, 64 px, batch 32",
}


def registered():
    """Every exported method, with the arguments that any of them may ask for; not those that train in two stages."""
    given = {"n_groups": N_GROUPS, "group_counts": [10 + i for i in range(N_GROUPS)], "group": "group"}
    given |= {"domain": "group", "n_domains": N_GROUPS, "identity": "group", "n_identities": N_GROUPS, "target": 1}
    given |= {"n_classes": 2, "class_counts": [10, 11]}
    made = {"Nothing": Nothing, "Reading": Reading}
    for name in debias.__all__:
        cls = getattr(debias, name)
        if not (inspect.isclass(cls) and issubclass(cls, debias.Debiaser) and cls is not debias.Debiaser):
            continue
        parameters = inspect.signature(cls).parameters
        if "epochs" in parameters:
            continue
        arguments = {key: value for key, value in given.items() if key in parameters and key != "target"}
        if "target" in parameters and parameters["target"].default is inspect.Parameter.empty:
            arguments["target"] = given["target"]
        made[name] = lambda cls=cls, arguments=arguments: cls(**arguments)
    return made


class Clock(L.Callback):
    """Durations in nanoseconds from the end of one batch to the end of the next."""

    now = staticmethod(time.perf_counter_ns)

    def __init__(self):
        self.durations = []
        self.last = None

    def on_train_batch_end(self, trainer, pl_module, *args):
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        now = self.now()
        if self.last is not None:
            self.durations.append(now - self.last)
        self.last = now


class CountSyncs(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.operations += 1
        masked = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        to_host = name == "_to_copy" and args[0].device.type != "cpu" and str((kwargs or {}).get("device")) == "cpu"
        if name in SYNCS or masked or to_host:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Around(L.Callback):
    """Enters a context at the start of one step and leaves it at its end, optimiser included."""

    def __init__(self, context, step):
        self.context, self.step = context, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.step:
            self.context.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.step:
            self.context.__exit__(None, None, None)


class Repeated:
    """A loader of ready-made batches, and the dataset that they would be of, for methods that number its samples."""

    def __init__(self, batches, steps, n_samples):
        self.batches, self.steps = batches, steps
        self.dataset = debias.tag(TensorDataset(torch.zeros(n_samples)))

    def __len__(self):
        return self.steps

    def __iter__(self):
        return (self.batches[i % len(self.batches)] for i in range(self.steps))


class Arm:
    """One training run that can go on for a few steps at a time."""

    def __init__(self, model, make, accelerator, *, by_hand=False):
        torch.manual_seed(0)
        network, shape, size = MODELS[model]()
        self.module = ByHand(network, size) if by_hand else Model(network)
        self.methods = [make()] if make is not None else []
        self.accelerator = accelerator
        self.batches = []
        self.n_samples = 4 * size
        for i in range(4):
            batch = (torch.randn(size, *shape), torch.randint(2, (size,)))
            tags = {"group": torch.randint(N_GROUPS, (size,))}
            if by_hand:
                batch = (*batch, tags["group"])
            if any("index" in method.needs for method in self.methods):
                tags["index"] = torch.arange(i * size, (i + 1) * size)
            self.batches.append(TaggedBatch(batch, tags) if self.methods else batch)

    def run(self, steps, *callbacks):
        """Train for ``steps`` steps in a real Lightning loop."""
        trainer = L.Trainer(
            max_epochs=1,
            callbacks=[*self.methods, *callbacks],
            accelerator=self.accelerator,
            devices=1,
            logger=False,
            log_every_n_steps=10**9,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(self.module, Repeated(self.batches, steps, self.n_samples))

    def durations(self, steps):
        """Nanoseconds of each of ``steps`` steps."""
        clock = Clock()
        self.run(steps + WARM_UP, clock)
        return clock.durations[-steps:]

    def operations(self):
        """Tensor operations of one step, views included, and those among them that make the host wait."""
        count = CountSyncs()
        self.run(5, Around(count, 3))
        return count.operations, sum(count.counts.values())

    def memory(self):
        """Bytes of tensors allocated at the peak of one step, above those before it."""
        if self.accelerator == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run(5)
            return torch.cuda.max_memory_allocated() - before
        activities = [torch.profiler.ProfilerActivity.CPU]
        profiler = torch.profiler.profile(activities=activities, profile_memory=True)
        self.run(5, Around(profiler, 3))
        events = sorted(
            (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
        )
        now = peak = 0
        for event in events:
            now += event.nbytes()
            peak = max(peak, now)
        return peak


def fast(durations):
    """The fastest tenth of all steps ends here: what else a machine does only ever adds."""
    return sorted(durations)[len(durations) // 10]


def measure(model, methods, steps, block, accelerator, *, by_hand=False):
    """A row for plain Lightning, for each method, and for Group DRO without debias."""
    arms = {PLAIN: Arm(model, None, accelerator)}
    if by_hand:
        arms[BY_HAND] = Arm(model, None, accelerator, by_hand=True)
    methods = {name: make for name, make in methods.items() if model != "mlp" or name not in IMAGES}
    arms |= {name: Arm(model, make, accelerator) for name, make in methods.items()}
    for arm in arms.values():
        arm.durations(block)  # caches, thread pools, lazily made optimiser states
    times, every = {name: [] for name in arms}, {name: [] for name in arms}
    for round_ in range(max(steps // block, 2)):
        for name in list(arms)[:: 1 if round_ % 2 == 0 else -1]:
            durations = arms[name].durations(block)
            every[name] += durations
            times[name].append(statistics.median(durations))
    rows = []
    plain_operations, _ = arms[PLAIN].operations()
    for name, arm in arms.items():
        operations, syncs = arm.operations()
        pairs = list(zip(times[name], times[PLAIN], strict=True))
        extra = sorted((own - plain) / 1e3 for own, plain in pairs)
        rows.append(
            {
                "model": model,
                "method": name,
                "step_us": statistics.median(times[name]) / 1e3,
                "extra_us": statistics.median(extra),
                "extra_us_low": extra[len(extra) // 4],
                "extra_us_high": extra[-1 - len(extra) // 4],
                "ratio": statistics.median(own / plain for own, plain in pairs),
                "fast_ratio": fast(every[name]) / fast(every[PLAIN]),
                "peak_mib": arm.memory() / 2**20,
                "extra_operations": operations - plain_operations,
                "host_syncs": syncs,
                "blocks": len(pairs),
                "steps_per_block": block,
            }
        )
    return rows


def machine(accelerator):
    """What the numbers depend on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next(
            (x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), name
        )
    if accelerator == "cuda":
        name += f", {torch.cuda.get_device_name()}"
    return (
        f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__},"
        f" lightning {L.__version__}, debias {debias.__version__}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=registered(), default=["GroupDRO", "GroupReweighting"])
    parser.add_argument("--steps", type=int, default=200, help="timed steps of each method and model")
    parser.add_argument("--block", type=int, default=10, help="steps before it is another method's turn")
    parser.add_argument("--groups", type=int, default=N_GROUPS, help="number of groups, domains or identities")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="of this process, where others keep the machine busy")
    parser.add_argument("--by-hand", action="store_true", help="time a module that does GroupDRO itself, too")
    parser.add_argument("--out", type=Path, default=None, help="write the rows as CSV")
    options = parser.parse_args()
    globals()["N_GROUPS"] = options.groups

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.cpu_time:
        Clock.now = staticmethod(time.process_time_ns)
    methods = {name: make for name, make in registered().items() if name in options.methods}

    print(machine(options.accelerator))
    rows = []
    for model in options.models:
        print(f"\n{DETAILS[model]}")
        print(
            f"{'method':<20}{'step':>12}{'extra':>11}{'quartiles':>20}{'ratio':>8}{'fast':>8}{'peak memory':>14}"
            f"{'operations':>12}{'host syncs':>12}"
        )
        rows_of_model = measure(
            model, methods, options.steps, options.block, options.accelerator, by_hand=options.by_hand
        )
        for row in rows_of_model:
            rows.append(row)
            quartiles = f"{row['extra_us_low']:.0f} .. {row['extra_us_high']:.0f}"
            print(
                f"{row['method']:<20}{row['step_us']:>9.0f} us{row['extra_us']:>8.0f} us{quartiles:>20}"
                f"{row['ratio']:>8.3f}{row['fast_ratio']:>8.3f}{row['peak_mib']:>10.2f} MiB"
                f"{row['extra_operations']:>+12}{row['host_syncs']:>12}",
                flush=True,
            )
    if options.out is not None:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(f"\n{options.out}")


if __name__ == "__main__":
    main()

"""Box stability: how far a detector's boxes move when features are dropped. Yang et al., ICLR 2024.

*Bounding Box Stability against Feature Dropout Reflects Detector Generalization across Environments*. With the boxes
b_i found in an image, and the boxes c_j found when the outputs of chosen layers pass through dropout::

    BoS = mean over images of  max over matchings m of  sum_i IoU(b_i, c_m(i)) / number of b_i

The matching is one to one (Hungarian), as in the paper; a box that finds no partner counts 0. No labels are used, so it
estimates on an unlabelled test set how a detector generalises: higher is more stable. Only values of the same detector,
layers and rate compare.

The paper drops features in the backbone; layers, rate and the least score of a box are the user's to name here, and the
defaults are not the paper's. Costs one more forward pass per evaluation batch and draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from debias.errors import DebiasError, LossNotFoundError
from debias.extras import needs_extra
from debias.monitors._epoch import EpochMonitor, by_group
from debias.monitors.detection_monitor import find_predictions
from debias.ops.arguments import check_count, check_number, checked
from debias.ops.distributed import global_rank, global_sum
from debias.ops.groups import check_n_groups, name_groups
from debias.step.batch import BatchKey
from debias.step.context import Step
from debias.step.ids import check_keys, plain_key, plain_n_groups
from debias.tap.calls import LossCall
from debias.tap.head import submodule
from debias.tap.hooks import Hook

__all__ = ["BoxStability", "box_stability"]


def box_stability(boxes: Tensor, perturbed: Tensor) -> Tensor:
    """Mean overlap of the boxes of an image with those found under perturbation, matched one to one.

    Args:
        boxes: x1, y1, x2, y2, ``(n, 4)``, n > 0.
        perturbed: the same, ``(m, 4)``; m may be 0.

    Returns:
        Scalar in [0, 1], float64.

    Example:
        >>> import torch
        >>> from debias.monitors.box_stability import box_stability
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
        >>> box_stability(boxes, torch.tensor([[0.0, 0.0, 10.0, 5.0]]))
        tensor(0.2500, dtype=torch.float64)
    """
    with needs_extra("detection"):
        from scipy.optimize import linear_sum_assignment
        from torchvision.ops import box_iou

    overlap = box_iou(boxes.double(), perturbed.double()).nan_to_num(0).cpu()  # boxes without an area
    rows, columns = linear_sum_assignment(overlap.numpy(), maximize=True)
    return overlap[torch.from_numpy(rows), torch.from_numpy(columns)].sum() / len(boxes)


class BoxStability(EpochMonitor):
    """Log how stable a detector's boxes are against dropout in two named layers: ``val/box_stability``.

    Evaluation metrics and predictions of the module stay as they are: the second pass runs after the step, in
    evaluation mode, with draws of its own. Images without a box are left out. With ``domain`` it is logged by domain
    too, as ``val/box_stability_by_domain/<name>``, unless there are more than 100. The formula stands at the top of
    :mod:`debias.monitors.box_stability`.

    Args:
        layers: dotted paths of the layers whose outputs are dropped; tensors of shape ``(N, C, ...)``, whole channels.
        predictions: dotted path of the submodule that predicts; by default the module itself.
        rate: probability of dropping a channel, in (0, 1).
        score_threshold: boxes below it are left out.
        draws: perturbed passes per batch, averaged.
        domain: where the domain ids are, to tell domains apart; see :class:`debias.DetectionMonitor`.
        n_domains: number of domains, one per key.
        domain_names: one name per domain.
        seed: seed of the draws. They depend on the position of a batch in the epoch and on the rank.
        name: prefix of several monitors' logged names.
        allow_untested_strategy: run under a strategy that was not tested.

    Raises:
        DebiasError: an argument is out of range, or a layer's output is no tensor of at least two dimensions.
        HeadNotFoundError: a layer is not there.
        LossNotFoundError: the evaluation step did not run what ``predictions`` names.
    """

    reference: ClassVar[str] = "Yang et al., ICLR 2024"
    _value_names = ("box_stability",)

    @checked(score_threshold="[0, 1]")
    def __init__(
        self,
        layers: list[str],
        *,
        predictions: str | None = None,
        rate: float = 0.15,
        score_threshold: float = 0.5,
        draws: int = 1,
        domain: tuple[BatchKey, ...] | BatchKey | None = None,
        n_domains: int | tuple[int, ...] = 1,
        domain_names: list[str] | None = None,
        seed: int = 0,
        name: str | None = None,
        allow_untested_strategy: bool = False,
    ) -> None:
        super().__init__(name=name, allow_untested_strategy=allow_untested_strategy)
        if isinstance(layers, str) or not layers:
            raise DebiasError(f"Expected `layers` to be a list of dotted paths, but got {layers!r}.")
        if domain is not None:
            check_keys(domain, n_domains, "domain")
        self.layers = list(layers)
        self.predictions = predictions
        self.rate = check_number("rate", rate, "(0, 1)")
        self.score_threshold = score_threshold
        self.draws = check_count("draws", draws)
        self.domain = plain_key(domain)
        self.n_domains = plain_n_groups(n_domains)
        self.total = check_n_groups(n_domains, "domain")
        self.domain_names = name_groups(n_domains, domain_names, "domain")
        self.seed = seed
        self._handles: list[Any] = []
        self._predictor: Any = None
        self._seen: tuple[Any, Any, Any] | None = None
        self._generator: torch.Generator | None = None
        self._sums: list[Tensor] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the engine; watch the layers and what predicts."""
        super().setup(trainer, pl_module, stage)
        if not self._handles:
            self._handles = [
                submodule(pl_module, path, argument="layers").register_forward_hook(Hook(self._drop))
                for path in self.layers
            ]
            self._predictor = (
                pl_module
                if self.predictions is None
                else submodule(pl_module, self.predictions, argument="predictions")
            )
            hook: Callable[..., Any] = Hook(self._keep)
            self._handles.append(self._predictor.register_forward_hook(hook, with_kwargs=True))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        while self._handles:
            self._handles.pop().remove()
        self._seen, self._generator, self._sums, self._predictor = None, None, [], None
        super().teardown(trainer, pl_module, stage)

    def observe(self, step: Step, calls: list[LossCall], forward_output: Any, output: Any) -> None:
        """Run the batch again with dropout, and compare the boxes."""
        if self._seen is None:
            raise LossNotFoundError(
                "Expected the evaluation step to run what predicts for BoxStability, but it did not. Pass"
                " `predictions='dotted.path'` of the submodule that the step calls."
            )
        (args, kwargs, plain), self._seen = self._seen, None
        plain = find_predictions(None, None, plain, None, "BoxStability")
        n = len(plain)
        ids = [0] * n if self.domain is None else step.ids(self.domain, self.n_domains, argument="domain").tolist()
        sums = self._sums[step.dataloader_idx]
        for draw in range(self.draws):
            key = (self.seed, draw, step.batch_idx, step.dataloader_idx, global_rank())
            self._generator = torch.Generator().manual_seed(hash(key) & 0x7FFFFFFFFFFFFFFF)
            try:
                with torch.no_grad():
                    perturbed = self._predictor(*args, **kwargs)
            finally:
                self._generator = None
            for before, after, d in zip(plain, perturbed, ids, strict=True):
                boxes = before["boxes"][before["scores"] > self.score_threshold]
                if len(boxes):
                    value = box_stability(boxes, after["boxes"][after["scores"] > self.score_threshold])
                    for place in {self.total, d} if 0 <= d < self.total else {self.total}:
                        sums[:, place] += torch.stack((value, torch.ones_like(value)))

    def _drop(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._generator is None:
            return None
        if not isinstance(output, Tensor) or output.ndim < 2:
            raise DebiasError(
                f"Expected the layers of BoxStability to return a tensor (N, C, ...), but {type(module).__name__}"
                f" returned {type(output).__name__}. Name layers inside the backbone, such as `network.backbone.4`."
            )
        shape = (*output.shape[:2], *[1] * (output.ndim - 2))
        kept = torch.rand(shape, generator=self._generator, dtype=torch.float32) >= self.rate
        return output * kept.to(output) / (1 - self.rate)

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._in_step(module):
            self._seen = args, kwargs, output

    def _start(self, trainer: Any, pl_module: Any, loaders: list[Any]) -> None:
        self._sums = [torch.zeros(2, self.total + 1, dtype=torch.float64) for _ in loaders]

    def _values(self, trainer: Any, pl_module: Any, stage: str) -> list[dict[str, Tensor]]:
        tables = []
        for sums in self._sums:
            total, count = global_sum(sums.to(pl_module.device))
            scores = total / count
            by_domain = {} if self.domain is None else {"box_stability_by_domain": scores[:-1]}
            tables.append(by_group({"box_stability": scores[-1], **by_domain}, self.domain_names))
        return tables

"""Calibration: the moments of what a layer sees in images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsconv_surgery.calibration.hooks import observe_layers
from dsconv_surgery.calibration.images import ENOUGH, Images, held_out
from dsconv_surgery.calibration.side_by_side import network_pair
from dsconv_surgery.network.discovery import ConvSite
from dsconv_surgery.network.geometry import ConvSpec, Size
from dsconv_surgery.schemes import Objective, kernel_tensor
from dsconv_surgery.support import distributed
from dsconv_surgery.support.copies import evaluation_copy

CHUNK = 2**24  # patch entries worked on at a time (64 MiB in float32)
DOUBLE_SIDE = 640  # up to this length of a patch the solves run in float64


class Moments:
    """Streaming sums over the patches p of one layer's input and the outputs t wanted for them, fit and held-out images apart.

    Sums over chunks run in float32, their total in float64. Where fewer patches are drawn than a patch is long, they are kept
    instead of their second moment.

    Args:
        spec: the layer's geometry.
        weight: (groups, out, in, height, width) in float64.
        positions: how many patches all the calls together have; of which `patches` at most are drawn.
        hold: keep every fourth image apart.
    """

    def __init__(self, spec: ConvSpec, weight: Tensor, positions: int, patches: int, seed: int, hold: bool) -> None:
        self.spec, self.weight = spec, weight.flatten(2)
        self.side = self.weight.shape[2]
        self.share = min(1.0, patches / max(positions, 1))
        self.as_rows = math.ceil(self.share * positions) < self.side
        self.seed, self.hold = seed, hold
        self.seen = 0
        g, _, n = self.weight.shape
        zeros = {"gram": (g, n, n), "mean": (g, n), "count": ()}
        self._patch = [{key: self._zero(shape) for key, shape in zeros.items() if key != "gram" or not self.as_rows} for _ in range(2)]
        self._rows: list[list[Tensor]] = [[], []]
        self.retarget()

    def _zero(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.weight.device)

    def retarget(self, targets: Any = None) -> Any:
        """Give up the targets, for others that are to be added with the same patches, or for those that this gave up before."""
        g, o, n = self.weight.shape
        given_up = getattr(self, "_target", None)
        self._target: list[dict[str, Tensor]] = targets or [
            {"cross": self._zero((g, o, n)), "spread": self._zero((g, o, o)), "wanted": self._zero((g, o))} for _ in range(2)
        ]
        self._draws = torch.Generator().manual_seed(self.seed)
        self._again, self.seen = self.seen > 0, 0
        return given_up

    def add(self, x: Tensor, target: Tensor | None, first: int) -> None:
        """One call's input and the output wanted, (batch, out, ...); `first` numbers the first image. None: what W gives."""
        device = self.weight.device
        self.seen += x.shape[0]
        x = x.to(device, torch.float32)
        total = _positions(self.spec, x)
        drawn = (
            total if self.share >= 1 else max(1, min(total, math.floor(self.share * total + float(torch.rand((), generator=self._draws)))))
        )
        chosen = torch.randperm(total, generator=self._draws)[:drawn].sort().values.to(device) if drawn < total else None
        step = max(1, CHUNK // (self.side * self.spec.groups * drawn))
        for at in range(0, x.shape[0], step):
            part = x[at : at + step]
            p = _patches(self.spec, part, chosen)
            wanted = None if target is None else _outputs(self.spec, target[at : at + step].to(device, torch.float32), chosen)
            held = held_out(first + at, part.shape[0]) & self.hold
            for fold in range(2):
                mask = (held if fold else ~held).to(device)
                if bool(mask.any()):
                    self._sum(
                        fold, p[mask].transpose(0, 1).flatten(1, 2), None if wanted is None else wanted[mask].transpose(0, 1).flatten(1, 2)
                    )

    def _sum(self, fold: int, p: Tensor, t: Tensor | None) -> None:
        """(g, patches, n) and (g, patches, o)."""
        if not self._again:
            sums = self._patch[fold]
            if self.as_rows:
                self._rows[fold].append(p)
            else:
                sums["gram"] += p.mT @ p
            sums["mean"] += p.sum(1)
            sums["count"] += p.shape[1]
        if t is not None:
            sums = self._target[fold]
            sums["cross"] += t.mT @ p
            sums["spread"] += t.mT @ t
            sums["wanted"] += t.sum(1)

    def sum_over_ranks(self) -> None:
        """To be called when all has been added: with several processes, each has seen its part of the images."""
        if distributed.process_and_world_size()[1] == 1:
            return
        for fold in range(2):
            for value in (*(() if self._again else self._patch[fold].values()), *self._target[fold].values()):
                value.copy_(distributed.all_reduce_sum(value))
            if self.as_rows and not self._again:
                g, _, n = self.weight.shape
                self._rows[fold] = [distributed.all_gather_rows(torch.cat([self._zero((g, 0, n)).float(), *self._rows[fold]], 1))]

    @property
    def count(self) -> int:
        """Patches drawn."""
        return int(sum(float(fold["count"]) for fold in self._patch))

    @property
    def holds_out(self) -> bool:
        return all(float(fold["count"]) > 0 for fold in self._patch)

    def objective(self, fold: str = "all", centred: bool = True, exact: bool = False) -> Objective:
        """The least-squares objective of the "fit", "held" or "all" images, on centred moments or not.

        `exact`: the target is what the layer's own weight W gives, `t = W p`, whatever was added.
        """
        folds = {"fit": (0,), "held": (1,), "all": (0, 1)}[fold]
        count = sum(float(self._patch[f]["count"]) for f in folds)
        mean, wanted = self.means(fold)
        dtype = torch.float64 if self.side <= DOUBLE_SIDE else torch.float32
        if self.as_rows:
            rows = torch.cat([r for f in folds for r in self._rows[f]], 1).double()
            gram = (rows - mean.unsqueeze(1) if centred else rows) / math.sqrt(count)
        else:
            gram = sum((self._patch[f]["gram"] for f in folds), torch.zeros(())) / count
            if centred:
                gram = gram - mean.unsqueeze(2) * mean.unsqueeze(1)
        if exact:
            cross = (self.weight @ gram.mT) @ gram if self.as_rows else self.weight @ gram
            spread = cross @ self.weight.mT
        else:
            cross = sum((self._target[f]["cross"] for f in folds), torch.zeros(())) / count
            spread = sum((self._target[f]["spread"] for f in folds), torch.zeros(())) / count
            if centred:
                cross = cross - wanted.unsqueeze(2) * mean.unsqueeze(1)
                spread = spread - wanted.unsqueeze(2) * wanted.unsqueeze(1)
        return Objective(self.weight.to(dtype), cross.to(dtype), gram.to(dtype), spread, rows=self.as_rows, centred=centred)

    def means(self, fold: str = "all") -> tuple[Tensor, Tensor]:
        """Of the patches, (g, n), and of the targets, (g, o)."""
        folds = {"fit": (0,), "held": (1,), "all": (0, 1)}[fold]
        count = sum(float(self._patch[f]["count"]) for f in folds)
        return (
            sum((self._patch[f]["mean"] for f in folds), torch.zeros(())) / count,
            sum((self._target[f]["wanted"] for f in folds), torch.zeros(())) / count,
        )


def moments_for(spec: ConvSpec, weight: Tensor, sizes: Iterable[Size], images: Images, hold: bool) -> Moments:
    """Empty sums for a layer called with these sizes on a plan's example; `hold` if there are enough images for it."""
    positions = -(-positions_of(spec, sizes) * images.count // images.example)
    return Moments(spec, weight, positions, images.settings.patches, images.settings.seed, hold and images.count >= ENOUGH)


def positions_of(spec: ConvSpec, sizes: Iterable[Size]) -> int:
    """How many patches a layer has in all its calls of these sizes."""
    return sum(math.prod(spec.out_size(size)) for size in sizes)


def _positions(spec: ConvSpec, x: Tensor) -> int:
    """Patches per image."""
    return max(1, x[0].numel() // x.shape[-1]) if spec.kind == "linear" else math.prod(spec.out_size((1, *x.shape[-2:])))


def _patches(spec: ConvSpec, x: Tensor, chosen: Tensor | None) -> Tensor:
    """What the kernel is laid on at the chosen output positions: (images, groups, positions, in x height x width)."""
    if spec.kind == "linear":
        return _rows(x, chosen)
    (kh, kw), (sh, sw), (dh, dw) = spec.kernel, spec.stride, spec.dilation
    _, out_height, out_width = spec.out_size((x.shape[0], *x.shape[-2:]))
    if spec.padding == "same":
        top, left = (dh * (kh - 1)) // 2, (dw * (kw - 1)) // 2
        sides = (left, dw * (kw - 1) - left, top, dh * (kh - 1) - top)
    else:
        sides = (spec.padding[1], spec.padding[1], spec.padding[0], spec.padding[0])
    if any(sides):
        x = F.pad(x, sides, mode="constant" if spec.padding_mode == "zeros" else spec.padding_mode)
    every = torch.arange(out_height * out_width, device=x.device) if chosen is None else chosen
    corner = (every // out_width) * sh * x.shape[-1] + (every % out_width) * sw
    taps = (torch.arange(kh, device=x.device) * dh * x.shape[-1])[:, None] + torch.arange(kw, device=x.device) * dw
    index = (taps.flatten()[:, None] + corner).flatten()  # taps x positions
    seen = x.flatten(2)[..., index].unflatten(2, (kh * kw, len(every)))  # images, channels, taps, positions
    return seen.unflatten(1, (spec.groups, -1)).flatten(2, 3).mT


def _outputs(spec: ConvSpec, target: Tensor, chosen: Tensor | None) -> Tensor:
    """(images, groups, positions, out)."""
    if spec.kind == "linear":
        return _rows(target, chosen)
    flat = target.flatten(2)
    return (flat if chosen is None else flat[..., chosen]).unflatten(1, (spec.groups, -1)).mT


def _rows(x: Tensor, chosen: Tensor | None) -> Tensor:
    """Of a linear layer's input or output, (images, 1, rows, features)."""
    rows = x.reshape(x.shape[0], 1, -1, x.shape[-1])
    return rows if chosen is None else rows[:, :, chosen]


def layer_moments(model: nn.Module, images: Images, sites: Sequence[ConvSite]) -> Callable[[str], Objective]:
    """What each layer of a dense network sees on calibration images, as the objective `E |(W - V) p|^2` by its name.

    One pass for all layers, when the first of them is asked for. Centred where the mean of an error can be made up for.
    """
    gathered: dict[str, tuple[Moments, bool]] = {}

    def gather() -> None:
        dense = evaluation_copy(model)
        source = network_pair(dense, images, [site.name for site in sites])
        source.close()
        for site in sites:
            weight = kernel_tensor(site.spec, model.get_submodule(site.name).get_parameter("weight"))
            moments = moments_for(site.spec, weight, site.sizes, images, hold=False)
            gathered[site.name] = moments, site.spec.bias or source.after[site.name].norm is not None
        for first, inputs in images:

            def saw(name: str, x: Tensor, _: Tensor, first: int = first) -> None:
                gathered[name][0].add(x, None, first)

            observe_layers(dense, [site.name for site in sites], saw, inputs)
        for moments, _ in gathered.values():
            moments.sum_over_ranks()

    def objective(name: str) -> Objective:
        if not gathered:
            gather()
        moments, centred = gathered[name]
        return moments.objective("all", centred, exact=True)

    return objective

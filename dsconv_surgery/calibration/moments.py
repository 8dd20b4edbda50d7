"""Moments of a layer's input patches and of its target outputs on images: all that a fit needs to know of the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsconv_surgery.calibration.hooks import observe_layers
from dsconv_surgery.calibration.images import MIN_TO_HOLD_OUT, Images, held_out
from dsconv_surgery.calibration.side_by_side import network_pair
from dsconv_surgery.network.discovery import ConvSite
from dsconv_surgery.network.geometry import ConvSpec, Size
from dsconv_surgery.schemes import LinAlgError, Objective, kernel_tensor, naming_layer
from dsconv_surgery.support import distributed
from dsconv_surgery.support.copies import evaluation_copy, to_device
from dsconv_surgery.support.fidelity import ROUNDING
from dsconv_surgery.support.progress import Progress

CHUNK_VALUES = 2**24  # patch values processed at a time (64 MiB in float32)
BLOCK = 512  # side of the blocks in which symmetric products are summed
PLAN_VALUES = 2**23  # values of patches that a layer's errors are measured on before a plan
DOUBLE_LENGTH = 640  # fits run in float64 for patches up to this length, in float32 for longer ones
WIDE_LENGTH = 1024  # layers with longer patches are wide: a fit takes long, so plans and cuts search less
FOLDS = {"fit": slice(0, 1), "held": slice(1, 2), "all": slice(0, 2)}


class Moments:
    """Running sums over the patches p of a layer's input and the target outputs t, separately for fit images and held-out images.

    Sums over a chunk are in float32 and about the chunk's means, so that a small variance beside a large mean is not lost; their total
    is in float64 and about zero. About `patches` are drawn if there are more `positions`. If fewer
    patches are drawn than a patch has values, they are stored instead of their second moment. `weight` is W in float64, (groups,
    out, in, height, width). With `hold`, every fourth image is held out.
    """

    def __init__(self, spec: ConvSpec, weight: Tensor, positions: int, patches: int, seed: int, hold: bool) -> None:
        self.spec, self.weight = spec, weight.flatten(2)
        self.length = self.weight.shape[2]
        self._fraction = min(1.0, patches / max(positions, 1))  # of patches drawn
        self.as_rows = math.ceil(self._fraction * positions) < self.length
        self._seed, self._hold = seed, hold
        g, _, n = self.weight.shape
        self._patch_sums = self._zeros(mean=(g, n), count=(), **({} if self.as_rows else {"gram": (g, n, n)}))
        self._rows: list[list[Tensor]] = [[], []]  # patches of each fold
        self.start_targets()
        self._patches_complete = False  # True once only targets are added

    def _zeros(self, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
        """Zero sums for both folds: (fold, ...)."""
        return {key: self.weight.new_zeros(2, *shape, dtype=torch.float64) for key, shape in shapes.items()}

    def start_targets(self) -> None:
        """Begin new sums for other targets: the same calls must be added again, and draw the same patches."""
        g, o, n = self.weight.shape
        self.target_sums = self._zeros(cross=(g, o, n), spread=(g, o, o), mean=(g, o))
        self._draws = torch.Generator("cpu").manual_seed(self._seed)
        self._patches_complete = True

    def add(self, x: Tensor, target: Tensor | None, first_image: int) -> None:
        """Add one call of the layer: its input and its target output, (images, out, ...).

        Without a target, only `objective(exact=True)` can be used.
        """
        device = self.weight.device
        x = x.to(device, torch.float32)
        linear = self.spec.kind == "linear"
        total = max(1, x[0].numel() // x.shape[-1]) if linear else math.prod(self.spec.out_size((1, *x.shape[-2:])))
        positions = self._draw(total)
        step = max(1, CHUNK_VALUES // (self.length * self.spec.groups * (total if positions is None else len(positions))))
        for start in range(0, x.shape[0], step):
            part = slice(start, start + step)
            p = extract_patches(self.spec, x[part], positions)
            t = None if target is None else _rows_of(self.spec, target[part].to(device, torch.float32), positions)
            held = held_out(first_image + start, p.shape[0]) & self._hold
            for fold, mask in enumerate((~held, held)):
                if bool(mask.any()):
                    selected = to_device(mask.nonzero().squeeze(1), device)  # a mask on the device would make the CPU wait
                    self._add_rows(fold, _merged(p[selected]), None if t is None else _merged(t[selected]))

    def _draw(self, total: int) -> Tensor | None:
        """The output positions to use in each image of a call; None for all of them."""
        if self._fraction >= 1:
            return None
        count = max(
            1,
            min(
                total, math.floor(self._fraction * total + float(torch.rand((), generator=self._draws, dtype=torch.float32, device="cpu")))
            ),
        )
        return (
            to_device(torch.randperm(total, generator=self._draws, device="cpu")[:count].sort().values, self.weight.device)
            if count < total
            else None
        )

    def _add_rows(self, fold: int, p: Tensor, t: Tensor | None) -> None:
        """Add patches (g, rows, n) and targets (g, rows, o) to the sums of a fold."""
        patches = _Centred.of(p)
        if not self._patches_complete:
            if self.as_rows:
                self._rows[fold].append(p)
            else:
                patches.add_products(patches, self._patch_sums["gram"][fold])
            self._patch_sums["mean"][fold].add_(patches.total)
            self._patch_sums["count"][fold].add_(p.shape[1])
        if t is not None:
            targets = _Centred.of(t)
            targets.add_products(patches, self.target_sums["cross"][fold])
            targets.add_products(targets, self.target_sums["spread"][fold])
            self.target_sums["mean"][fold].add_(targets.total)

    def all_reduce(self) -> None:
        """Sum over all processes, each of which has added its part of the images; to be called after the last `add`."""
        patch_sums = {} if self._patches_complete else self._patch_sums
        for value in (*patch_sums.values(), *self.target_sums.values()):
            value.copy_(distributed.all_reduce_sum(value))
        if self.as_rows and not self._patches_complete:
            empty = self.weight.new_zeros(self.weight.shape[0], 0, self.length, dtype=torch.float32)
            self._rows = [[distributed.all_gather_rows(torch.cat([empty, *rows], 1))] for rows in self._rows]

    def count(self, fold: str = "all") -> float:
        """The number of patches drawn."""
        return float(self._patch_sums["count"][FOLDS[fold]].sum())

    def objective(self, fold: str = "all", centred: bool = True, exact: bool = False) -> Objective:
        """The least-squares objective on the "fit", "held" or "all" images.

        `centred` moments are about the means, for layers whose bias takes up the mean of the error. With `exact`, the target is the
        layer's output on its input, `t = W p`, and targets that were added are ignored. LinAlgError if the moments are not finite.
        """
        mean, target_mean = self.means(fold)
        if self.as_rows:
            rows = torch.cat([chunk for chunks in self._rows[FOLDS[fold]] for chunk in chunks], 1).double()
            squares = rows.square().mean(1)
            gram = (rows - mean.unsqueeze(1) if centred else rows) / math.sqrt(self.count(fold))
        else:
            gram = self._average(self._patch_sums["gram"], fold)
            squares = gram.diagonal(dim1=1, dim2=2).clone()
            if centred:
                gram.baddbmm_(mean.unsqueeze(2), mean.unsqueeze(1), alpha=-1)
        size = float((self.weight.square().sum(1) * squares).sum())  # of the terms that outputs are sums of
        if exact:
            cross = (self.weight @ gram.mT) @ gram if self.as_rows else self.weight @ gram
            spread = cross @ self.weight.mT
        else:
            cross, spread = (self._average(self.target_sums[key], fold) for key in ("cross", "spread"))
            size += float(spread.diagonal(dim1=1, dim2=2).sum())
            if centred:
                cross = cross - target_mean.unsqueeze(2) * mean.unsqueeze(1)
                spread = spread - target_mean.unsqueeze(2) * target_mean.unsqueeze(1)
        dtype = torch.float64 if self.length <= DOUBLE_LENGTH else torch.float32
        if not math.isfinite(size + float(squares.sum())):
            raise LinAlgError("its inputs or outputs there are not finite, or too large for float32.")
        floor = ROUNDING * size
        return Objective(self.weight.to(dtype), cross.to(dtype), gram.to(dtype), spread, rows=self.as_rows, centred=centred, floor=floor)

    def means(self, fold: str = "all") -> tuple[Tensor, Tensor]:
        """The means of patches, (g, n), and of targets, (g, o)."""
        return self._average(self._patch_sums["mean"], fold), self._average(self.target_sums["mean"], fold)

    def _average(self, sums: Tensor, fold: str) -> Tensor:
        return sums[FOLDS[fold]].sum(0).div_(self.count(fold))


@dataclass(frozen=True)
class _Centred:
    """Rows about a mean close to their own: `rows = mean + deviations`."""

    mean: Tensor  # (g, n) in float64
    deviations: Tensor  # (g, rows, n) in float32
    total: Tensor  # sum of the rows, (g, n) in float64
    sum: Tensor  # sum of the deviations, the same

    @classmethod
    def of(cls, rows: Tensor) -> _Centred:
        mean = rows.mean(1, keepdim=True)
        deviations = rows - mean
        exact_mean, rest = mean.squeeze(1).double(), deviations.sum(1).double()
        return cls(exact_mean, deviations, rows.shape[1] * exact_mean + rest, rest)

    def add_products(self, other: _Centred, total: Tensor) -> None:
        """Add `sum a b^T` over rows a and the other's rows b to a float64 total, (g, n, m)."""
        step = BLOCK if other is self else total.shape[1]
        for start in range(0, total.shape[1], step):  # a product with itself is symmetric: half of its blocks are enough
            rest = slice(start if other is self else 0, None)
            block = self.deviations[..., start : start + step].mT @ other.deviations[..., rest]
            total[:, start : start + step, rest].add_(block)
            if other is self:
                total[:, start + step :, start : start + step].add_(block[..., step:].mT)
        left, right = torch.stack([self.mean, self.sum], 2), torch.stack([other.total, other.mean], 1)
        total.baddbmm_(left, right)


def moments_for(spec: ConvSpec, weight: Tensor, sizes: Iterable[Size], images: Images, values: int | None = None) -> Moments:
    """Empty moments for a layer that a plan's example input calls with these sizes; images are held out if there are enough.

    With `values`, patches are drawn that have about so many values together.
    """
    positions = -(-positions_of(spec, sizes) * images.count // images.example)
    length, patches, hold = weight.numel() // weight.shape[1], images.settings.patches, images.count >= MIN_TO_HOLD_OUT
    if values is not None:
        patches = max(1, min(patches, values // length))
    return Moments(spec, weight, positions, patches, images.settings.seed, hold)


def positions_of(spec: ConvSpec, sizes: Iterable[Size]) -> int:
    """The number of output positions, each of which has a patch, in calls with these input sizes."""
    return sum(math.prod(spec.out_size(size)) for size in sizes)


def extract_patches(spec: ConvSpec, x: Tensor, positions: Tensor | None) -> Tensor:
    """The input values under the kernel at some output positions, or at all: (images, groups, positions, in x height x width)."""
    if spec.kind == "linear":
        return _rows_of(spec, x, positions)
    (kh, kw), (sh, sw), (dh, dw) = spec.kernel, spec.stride, spec.dilation
    _, out_height, out_width = spec.out_size((x.shape[0], *x.shape[-2:]))
    rows, columns = (dh * (kh - 1), dw * (kw - 1)) if spec.padding == "same" else (2 * spec.padding[0], 2 * spec.padding[1])
    if rows or columns:  # as torch: the extra row or column of an even kernel is at the bottom or right
        sides = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        x = F.pad(x, sides, mode="constant" if spec.padding_mode == "zeros" else spec.padding_mode)
    shape = (*x.shape[:2], kh, kw, out_height, out_width)
    down, right = x.stride()[2:]
    windows = x.as_strided(shape, (*x.stride()[:2], dh * down, dw * right, sh * down, sw * right))  # a view, which takes no memory
    if positions is None:
        positions = torch.arange(out_height * out_width, device=x.device)
    values = windows[..., positions // out_width, positions % out_width]  # images, channels, kh, kw, positions
    return values.unflatten(1, (spec.groups, -1)).flatten(2, 4).mT


def _rows_of(spec: ConvSpec, values: Tensor, positions: Tensor | None) -> Tensor:
    """A layer's outputs, or a linear layer's inputs, at some positions, or at all: (images, groups, positions, channels)."""
    if spec.kind == "linear":
        rows = values.reshape(values.shape[0], 1, -1, values.shape[-1])
        return rows if positions is None else rows[:, :, positions]
    flat = values.flatten(2)
    return (flat if positions is None else flat[..., positions]).unflatten(1, (spec.groups, -1)).mT


def _merged(rows: Tensor) -> Tensor:
    """(images, groups, positions, n) to (groups, images x positions, n)."""
    return rows.transpose(0, 1).flatten(1, 2)


def layer_moments(
    model: nn.Module, images: Images, sites: Sequence[ConvSite], progress: Progress
) -> Callable[[str], tuple[Objective, Objective, Tensor]]:
    """A function from a layer's name to its objectives `E |(W - V) p|^2` on calibration images, and the mean of its patches, (g, n).

    The first objective is to fit to, the second to measure errors by, on held-out images if there are enough images; the mean is of the
    images to fit to. The first call gathers the moments of all layers in one pass of the dense network. Moments are centred where the
    layer has a bias or a BatchNorm follows, which take up the mean of the error.
    """
    names = [site.name for site in sites]

    @cache
    def gather() -> dict[str, tuple[Moments, bool]]:
        dense = evaluation_copy(model)
        with closing(network_pair(dense, images, names)) as pair:
            following = pair.following
        result = {}
        for site in sites:
            weight = kernel_tensor(site.spec, model.get_submodule(site.name).get_parameter("weight"))
            moments = moments_for(site.spec, weight, site.sizes, images, values=PLAN_VALUES)
            result[site.name] = moments, site.spec.bias or following[site.name].batchnorm is not None

        def add(first_image: int, name: str, x: Tensor, _output: Tensor) -> None:
            result[name][0].add(x, None, first_image)

        with progress.bar("gather moments", images.count, "image") as bar:
            for first_image, count, inputs in images:
                observe_layers(dense, names, partial(add, first_image), inputs, first_image)
                bar.update(count)
        for moments, _ in result.values():
            moments.all_reduce()
        return result

    def objectives(name: str) -> tuple[Objective, Objective, Tensor]:
        moments, centred = gather()[name]
        with naming_layer(name):
            if min(map(moments.count, ("fit", "held"))) > 0:
                fit, judge = (moments.objective(fold, centred, exact=True) for fold in ("fit", "held"))
                return fit, judge, moments.means("fit")[0]
            objective = moments.objective("all", centred, exact=True)
            return objective, objective, moments.means()[0]

    return objectives

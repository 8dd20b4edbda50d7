"""Factorise for the data: layer after layer in running order, on what the network already cut sees, towards what the dense one gives."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dsconv_surgery import schemes
from dsconv_surgery.calibration.hooks import Following, LayerCall, NetworkPair
from dsconv_surgery.calibration.images import Images, held_out
from dsconv_surgery.calibration.moments import moments_for
from dsconv_surgery.calibration.output_metric import output_metrics
from dsconv_surgery.calibration.side_by_side import network_pair
from dsconv_surgery.plan import Cut
from dsconv_surgery.schemes import Factors, Objective
from dsconv_surgery.support import distributed

RIDGES = (1.0, 0.1, 0.01)  # of the inputs' mean square, from strong to weak, as long as held-out images gain; the first if there are none
TRIAL, WIDE_TRIAL = 30, 6  # iterations of the search while choosing by held-out images, and where a patch is longer than
WIDE_SIDE = 1024


@dataclass(frozen=True)
class Fitted:
    """What calibration found for one layer."""

    factors: Factors
    bias: Tensor | None  # new values for the layer's bias
    norm: str | None  # the BatchNorm after it whose running mean ...
    shift: Tensor | None  # ... is lowered by this
    error: float  # squared relative error of the output on the calibration images, given what the cut network feeds the layer


@dataclass
class Steps:
    """The parts of a calibrated cut; all of them unless an ablation says otherwise."""

    sequential: bool = True
    shortcut: bool = True
    relu: bool = True
    metric: bool = True
    bias: bool = True
    norms: Literal["better", "never"] = "better"
    iterations: int | None = None
    ridges: Sequence[float] = field(default=RIDGES)


def reconstruct(
    model: nn.Module, cuts: Iterable[Cut], images: Images, starts: Mapping[str, Factors], progress: bool, steps: Steps | None = None
) -> dict[str, Fitted]:
    """Factors and biases of every cut for a network's calibration images; the model is not changed.

    For each layer `E |t - V p|^2 + ridge |V - W|^2` is lowered over the kernels V that the scheme can write: p are patches of the
    layer's input in the network cut so far, t what the dense network has there - its own output, plus what a shortcut that is
    added later has lost (asymmetric reconstruction, Zhang et al. 2015). The ridge is chosen by held-out images. Then, where a ReLU
    follows, outputs that it cuts off anyway are no longer asked for.

    Args:
        model: in evaluation mode.
        cuts: what to cut.
        images: to calibrate on.
        starts: factors to begin with, by layer, where there are some.
        progress: show a bar over layers.
        steps: parts to leave out.
    """
    steps = steps or Steps()
    by_name = {cut.name: cut for cut in cuts}
    source = network_pair(model, images, list(by_name))
    found: dict[str, Fitted] = {}
    try:
        metrics = output_metrics(model, images, list(by_name)) if steps.metric else {}
        with tqdm(total=len(by_name), desc="calibrate", unit="layer", disable=not progress) as bar:
            for names in source.groups():
                fits: dict[str, _Fit] = {}
                for name in names:
                    after = source.after[name]
                    norm = None if after.norm is None else model.get_submodule(after.norm)
                    fits[name] = _Fit(by_name[name], model.get_submodule(name), after, norm, images, metrics.get(name), steps)
                for call in source.calls(names):
                    fits[call.name].add(call)
                for name, fit in fits.items():
                    found[name] = fit.solve(source, starts.get(name))
                    source.install(name, *fit.modules(found[name]))
                    bar.update()
    finally:
        source.close()
    if missed := [name for name in by_name if name not in found]:
        raise ValueError(
            f"{missed[0]}: not called on the calibration images, so there is nothing to fit it to ({len(missed)} such layers). "
            "Leave it out with plan.without(...), or calibrate on images that reach it."
        )
    return found


class _Fit:
    """One layer's way from moments to factors."""

    def __init__(
        self, cut: Cut, layer: nn.Module, after: Following, norm: Any, images: Images, metric: Tensor | None, steps: Steps
    ) -> None:
        self.cut, self.layer, self.after, self.steps = cut, layer, after, steps
        self.scheme = schemes.get_scheme(cut.scheme)
        self.weight = schemes.kernel_tensor(cut.spec, layer.get_parameter("weight"))
        self.moments = moments_for(cut.spec, self.weight, cut.sizes, images, hold=True)
        self.wide = self.moments.side > WIDE_SIDE
        self.metric = None if metric is None else _root(metric, cut.spec.groups)
        self.norm = norm
        # Without a bias and a BatchNorm to take it up, the mean of the error is not free: moments stay uncentred.
        self.centred = steps.bias and (cut.spec.bias or after.norm is not None)

    def add(self, call: LayerCall, target: Tensor | None = None) -> None:
        x = call.cut if self.steps.sequential else call.dense
        self.moments.add(x, self._wanted(call) if target is None else target, call.first)

    def solve(self, source: NetworkPair, start: Factors | None) -> Fitted:
        """Choose the ridge, fit, fit with the ReLU in mind, and last of all on the held-out images, too."""
        self.moments.sum_over_ranks()
        plain = self.moments.objective("all", self.centred)
        held = self.moments.objective("held", self.centred) if self.moments.holds_out else None
        ridge, factors = self._ridge(start, held)
        if self.after.relu and self.steps.relu and held is not None and factors is not None:
            factors = self._through_relu(source, ridge, factors)
        iterations = WIDE_TRIAL if self.wide and held is not None and self.steps.iterations is None else self.steps.iterations
        factors = self._fit(self.moments.objective("all", self.centred), ridge, factors, iterations)
        bias, own = self._bias(factors), self.cut.spec.bias
        error = plain.value(self.scheme.kernel(self.cut.spec.one_group(), factors))
        return Fitted(factors, bias if own else None, None if own else self.after.norm, None if own else bias, error)

    def modules(self, fitted: Fitted) -> tuple[nn.Module, nn.Module | None]:
        """The chain, and the BatchNorm after it with its mean shifted, as the cut network is to run them."""
        chain = schemes.build(self.cut.chain, self.layer, fitted.factors)
        if fitted.bias is not None:
            set_bias(chain, fitted.bias)
        if fitted.shift is None:
            return chain, None
        norm = copy.deepcopy(self.norm)
        norm.running_mean -= fitted.shift.to(norm.running_mean)
        return chain, norm

    def _fit(self, objective: Objective, ridge: float, start: Factors | None, iterations: int | None) -> Factors:
        pulled = objective.ridged(ridge * max(objective.scale, 1e-12))
        weight = self.layer.get_parameter("weight")
        return schemes.fit(
            self.scheme, self.cut.spec, weight, self.cut.rank, pulled, start=start, metric=self.metric, iterations=iterations
        )

    def _ridge(self, start: Factors | None, held: Objective | None) -> tuple[float, Factors | None]:
        """The ridge under which held-out images are reproduced best, and the factors fitted with it."""
        if held is None or len(self.steps.ridges) == 1:
            return self.steps.ridges[0], start
        objective = self.moments.objective("fit", self.centred)
        factors, chosen, least, kept = start, self.steps.ridges[0], math.inf, start
        for ridge in self.steps.ridges:
            if self.wide:  # by the best kernel of any structure, one linear solve
                error = held.value(objective.ridged(ridge * objective.scale).target())
            else:
                factors = self._fit(objective, ridge, factors, TRIAL)
                error = held.value(self.scheme.kernel(self.cut.spec.one_group(), factors))
            if error >= least:
                break
            chosen, least, kept = ridge, error, factors
        return chosen, self._fit(objective, chosen, start, WIDE_TRIAL) if self.wide else kept

    def _bias(self, factors: Factors) -> Tensor | None:
        """What brings the mean of the output where it should be: (out,)."""
        if not self.centred:
            return None
        mean, wanted = self.moments.means()
        kernel = self.scheme.kernel(self.cut.spec.one_group(), factors).flatten(2).double()
        return (wanted - (kernel @ mean.unsqueeze(2)).squeeze(2)).flatten()

    def _affine(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The BatchNorm after the layer as `gain y + offset`."""
        if self.norm is None:
            return 1.0, 0.0
        norm = self.norm
        gain = (norm.running_var + norm.eps).rsqrt()
        offset = -gain * norm.running_mean
        if norm.weight is not None:
            gain, offset = gain * norm.weight, offset * norm.weight + norm.bias
        shape = (-1,) if self.cut.spec.kind == "linear" else (-1, 1, 1)
        return gain.detach().to(like).reshape(shape), offset.detach().to(like).reshape(shape)

    def _wanted(self, call: LayerCall) -> Tensor:
        """The dense layer's output, and what the shortcut beside it has lost."""
        if call.shortcut is None or not self.steps.shortcut or not self.steps.sequential:
            return call.wanted
        gain, _ = self._affine(call.wanted)
        return call.wanted + _divided(call.shortcut[0] - call.shortcut[1], gain, torch.zeros_like(call.wanted))

    def _through_relu(self, source: NetworkPair, ridge: float, factors: Factors) -> Factors:
        """Ask for the outputs after the ReLU only: where the dense one is cut off, any negative value will do.

        The target `t' = t where t > 0, min(V p, 0) elsewhere` makes a quadratic that bounds the error behind the ReLU (Zhang et
        al. 2015 solve for an auxiliary variable instead). Kept only if held-out images, behind the ReLU, are the better for it.
        """
        before = self._running(factors)
        linear = self.moments.retarget()
        for call in source.calls([self.cut.name]):
            gain, offset = self._affine(call.wanted)
            lost, aside = call.shortcut or (0.0, 0.0)
            asked, given = gain * call.wanted + offset + lost, gain * before(call) + offset + aside
            target = torch.where(asked > 0, asked, given.clamp(max=0))
            self.add(call, _divided(target - offset - aside, gain, call.wanted))
        self.moments.sum_over_ranks()
        better = self._fit(self.moments.objective("fit", self.centred), ridge, factors, WIDE_TRIAL if self.wide else TRIAL)
        after = self._running(better)
        errors = torch.zeros(2, dtype=torch.float64)
        for call in source.calls([self.cut.name]):
            held = held_out(call.first, call.wanted.shape[0])
            gain, offset = self._affine(call.wanted)
            lost, aside = call.shortcut or (0.0, 0.0)
            asked = (gain * call.wanted + offset + lost)[held].relu()
            for at, run in enumerate((before, after)):
                errors[at] += float((asked - (gain * run(call) + offset + aside)[held].relu()).square().sum())
        if float(distributed.all_reduce_sum(errors).diff()) < 0:
            return better
        self.moments.retarget(linear)
        return factors

    def _running(self, factors: Factors) -> Callable[[LayerCall], Tensor]:
        """The layer's output with these factors, its bias set or its mean shifted as it will be."""
        chain = schemes.build(self.cut.chain, self.layer, factors).eval()
        bias = self._bias(factors)
        shift: Tensor | float = 0.0
        if bias is not None and self.cut.spec.bias:
            set_bias(chain, bias)
        elif bias is not None:
            shift = bias.to(self.layer.get_parameter("weight")).reshape((-1,) if self.cut.spec.kind == "linear" else (-1, 1, 1))

        def run(call: LayerCall) -> Tensor:
            with torch.no_grad():
                return chain(call.cut if self.steps.sequential else call.dense) + shift

        return run


def _divided(value: Tensor, gain: Tensor | float, otherwise: Tensor) -> Tensor:
    """value / gain, something else where a gain is too small to make up for anything."""
    if isinstance(gain, float):
        return value / gain
    usable = gain.abs() > 1e-2 * gain.abs().max()
    return torch.where(usable, value / torch.where(usable, gain, 1.0), otherwise)


def _root(metric: Tensor, groups: int) -> Tensor:
    """A symmetric root of each group's block of an (out, out) second moment, kept away from zero, (g, o, o)."""
    side = metric.shape[0] // groups
    blocks = torch.stack([metric[at : at + side, at : at + side] for at in range(0, metric.shape[0], side)])
    mean = blocks.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)[:, None, None]
    values, vectors = torch.linalg.eigh(blocks / mean)
    return (vectors * (values.clamp(min=0) + 1e-3).sqrt().unsqueeze(1)) @ vectors.mT


def set_bias(chain: nn.Module, bias: Tensor) -> None:
    """Give a chain's last link another bias."""
    last: Any = list(chain.children())[-1]
    with torch.no_grad():
        last.bias.copy_(bias)

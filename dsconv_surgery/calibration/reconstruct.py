"""Fit the factors of all cuts to calibration images, layer by layer in running order."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsconv_surgery import schemes
from dsconv_surgery.calibration.hooks import Following, LayerCall
from dsconv_surgery.calibration.images import Images, held_out
from dsconv_surgery.calibration.moments import WIDE_LENGTH, moments_for
from dsconv_surgery.calibration.output_metric import output_metrics
from dsconv_surgery.calibration.side_by_side import NetworkPair, network_pair
from dsconv_surgery.plan import Cut
from dsconv_surgery.schemes import Factors, Objective
from dsconv_surgery.support import distributed
from dsconv_surgery.support.progress import Progress

CALIBRATE = "calibrate"  # a phase
# Strengths of the pull towards the weights, in units of the inputs' mean square. They are tried in this order for as long as the
# error on held-out images falls; without held-out images the first is used.
RIDGES = (1.0, 0.1, 0.01)
TRIAL, WIDE_FIT = 30, 6  # iterations of a fit that chooses the ridge, and of fits in wide layers


@dataclass(frozen=True)
class Fitted:
    """The fit of one layer."""

    factors: Factors
    bias: Tensor | None  # takes up the mean of the error: new values of the layer's bias, or subtracted from a running mean
    batchnorm: str | None  # without a bias, the name of the BatchNorm after the layer, which has this running mean
    error: float  # squared relative error of the output on all calibration images, for inputs from the cut network


def reconstruct(
    model: nn.Module, cuts: Iterable[Cut], images: Images, starts: Mapping[str, Factors], progress: Progress
) -> dict[str, Fitted]:
    """Factors and biases of all cuts, fitted to calibration images; the model is not changed.

    For each layer, over the kernels V that its scheme can write, minimise `E |t - V p|^2 + ridge |V - W|^2`. The patches p are of
    the layer's input in the network cut so far. The target t is the layer's output in the dense network plus the error of a
    shortcut that is added later (asymmetric reconstruction, Zhang et al. 2015). Held-out images choose the ridge. Where a ReLU
    follows, a second fit ignores differences that the ReLU removes.

    The model must be in evaluation mode. Factors in `starts` are started from. ValueError if no image reaches one of the layers.
    """
    by_name = {cut.name: cut for cut in cuts}
    results: dict[str, Fitted] = {}
    params = {name: cut.spec.params for name, cut in by_name.items()}
    with progress.layers(CALIBRATE, params) as begin, closing(network_pair(model, images, list(by_name))) as pair:
        metrics = output_metrics(model, images, list(by_name))
        for names in pair.groups():
            fits: dict[str, _LayerFit] = {}
            for name in names:
                begin(name)
                with schemes.naming_layer(name):
                    fits[name] = _LayerFit(by_name[name], model, pair.following[name], images, metrics.get(name))
            for call in pair.calls(names):
                fits[call.name].add(call)
            for name, fit in fits.items():
                with schemes.naming_layer(name):
                    results[name] = fit.solve(pair, starts.get(name))
    if missing := [name for name in by_name if name not in results]:
        raise ValueError(
            f"{missing[0]}: not called on the calibration images, so there is nothing to fit it to ({len(missing)} such layers). "
            "Leave it out with plan.without(...), or calibrate on images that reach it."
        )
    return results


class _LayerFit:
    """The moments of one layer, and the fit of its factors."""

    def __init__(self, cut: Cut, model: nn.Module, following: Following, images: Images, metric: Tensor | None) -> None:
        self.cut, self.following = cut, following
        self.layer = model.get_submodule(cut.name)
        self.batchnorm: Any = None if following.batchnorm is None else model.get_submodule(following.batchnorm)
        self.scheme = schemes.get_scheme(cut.scheme)
        weight = schemes.kernel_tensor(cut.spec, self.layer.get_parameter("weight"))
        self.moments = moments_for(cut.spec, weight, cut.sizes, images)
        self.wide = self.moments.length > WIDE_LENGTH
        self.metric = None if metric is None else _root(metric, cut.spec.groups)
        self.per_channel = (-1,) if cut.spec.kind == "linear" else (-1, 1, 1)  # shape of a value per channel

    @property
    def centred(self) -> bool:
        """Whether a bias or a BatchNorm takes up the mean of the error."""
        return self.cut.spec.bias or self.batchnorm is not None

    def add(self, call: LayerCall) -> None:
        self.moments.add(call.cut_input, self._target(call), call.first_image)

    def solve(self, pair: NetworkPair, start: Factors | None) -> Fitted:
        """Choose the ridge and whether to fit behind the ReLU on held-out images, fit to all images, and install the chain."""
        self.moments.all_reduce()
        plain = self.moments.objective("all", self.centred)
        held = self.moments.objective("held", self.centred) if min(map(self.moments.count, ("fit", "held"))) > 0 else None
        ridge, factors = self._choose_ridge(start, held)
        if self.following.relu and held is not None and factors is not None:
            factors = self._fit_behind_relu(pair, ridge, factors)
        iterations = WIDE_FIT if self.wide and held is not None else None
        factors = self._fit(self.moments.objective("all", self.centred), ridge, factors, iterations)
        bias, chain = self._bias(factors), schemes.build(self.cut.chain, self.layer, factors)
        batchnorm = None if self.cut.spec.bias else copy.deepcopy(self.batchnorm)
        correct_mean(chain, batchnorm, bias)
        pair.install(self.cut.name, chain, batchnorm)
        return Fitted(factors, bias, None if batchnorm is None else self.following.batchnorm, plain.value(self._kernel(factors)))

    def _target(self, call: LayerCall) -> Tensor:
        """The dense layer's output, plus the error of the shortcut."""
        if call.shortcut is None:
            return call.target
        gain, _ = self._affine(call.target)
        return call.target + _divided(call.shortcut[0] - call.shortcut[1], gain, torch.zeros_like(call.target))

    def _kernel(self, factors: Factors) -> Tensor:
        return self.scheme.kernel(self.cut.spec.one_group(), factors)

    def _fit(self, objective: Objective, ridge: float, start: Factors | None, iterations: int | None) -> Factors:
        spec, weight, ridged = self.cut.spec, self.layer.get_parameter("weight"), objective.ridged(ridge * objective.scale)
        return schemes.fit(self.scheme, spec, weight, self.cut.rank, ridged, start=start, metric=self.metric, iterations=iterations)

    def _choose_ridge(self, start: Factors | None, held: Objective | None) -> tuple[float, Factors | None]:
        """The ridge of least error on held-out images, and the factors fitted with it."""
        if held is None:
            return RIDGES[0], start
        objective = self.moments.objective("fit", self.centred)
        factors, best_ridge, least, best_factors = start, RIDGES[0], math.inf, start
        for ridge in RIDGES:
            if self.wide:  # judged by the best kernel of any structure, which is one linear solve
                error = held.value(objective.ridged(ridge * objective.scale).target())
            else:
                factors = self._fit(objective, ridge, factors, TRIAL)
                error = held.value(self._kernel(factors))
            if error >= least:
                break
            best_ridge, least, best_factors = ridge, error, factors
        if not self.wide:
            return best_ridge, best_factors
        # a few iterations gain little on an approximation, and take longer
        return best_ridge, self._fit(objective, best_ridge, start, 0 if schemes.can_approximate(self.scheme) else WIDE_FIT)

    def _bias(self, factors: Factors) -> Tensor | None:
        """The vector that added to the chain's output makes the mean error zero, (out,); None if nothing takes it up."""
        if not self.centred:
            return None
        mean, target_mean = self.moments.means()
        return (target_mean - (self._kernel(factors).flatten(2).double() @ mean.unsqueeze(2)).squeeze(2)).flatten()

    def _fit_behind_relu(self, pair: NetworkPair, ridge: float, factors: Factors) -> Factors:
        """Factors for the outputs behind the ReLU, if they lower the error on held-out images; else the same factors.

        With s the dense network's value before the ReLU and y the cut network's, the new target is `s where s > 0, min(y, 0)
        elsewhere`: its squared error bounds the error behind the ReLU from above. (Zhang et al. 2015 solve for an auxiliary
        variable instead.)
        """
        output, linear = self._cut_before_relu(factors), self.moments.target_sums
        self.moments.start_targets()
        for call in pair.calls([self.cut.name]):
            dense, cut = self._before_relu(call.target, call, 0), output(call)
            gain, offset = self._affine(call.target)
            added = 0.0 if call.shortcut is None else call.shortcut[1]
            target = torch.where(dense > 0, dense, cut.clamp(max=0)) - offset - added
            self.moments.add(call.cut_input, _divided(target, gain, call.target), call.first_image)
        self.moments.all_reduce()
        iterations = 1 if schemes.has_optimum(self.scheme) else 0
        trial = self._fit(self.moments.objective("fit", self.centred), ridge, factors, iterations)
        outputs = [output, self._cut_before_relu(trial)]
        errors = self.moments.weight.new_zeros(2)
        for call in pair.calls([self.cut.name]):
            mask = held_out(call.first_image, call.target.shape[0])
            if not bool(mask.any()):
                continue
            held = call.select(mask)
            dense = self._before_relu(held.target, held, 0).relu()
            for index, output in enumerate(outputs):
                errors[index] += (dense - output(held).relu()).square().sum().to(errors)
        if float(distributed.all_reduce_sum(errors).diff()) < 0:
            return trial
        self.moments.target_sums = linear
        return factors

    def _affine(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The BatchNorm after the layer as `gain y + offset`, with the type and device of an output."""
        if self.batchnorm is None:
            return output.new_ones(()), output.new_zeros(())
        gain = (self.batchnorm.running_var + self.batchnorm.eps).rsqrt()
        offset = -gain * self.batchnorm.running_mean
        if self.batchnorm.weight is not None:
            gain, offset = gain * self.batchnorm.weight, offset * self.batchnorm.weight + self.batchnorm.bias
        return gain.detach().to(output).reshape(self.per_channel), offset.detach().to(output).reshape(self.per_channel)

    def _before_relu(self, output: Tensor, call: LayerCall, side: int) -> Tensor:
        """A layer's output behind the BatchNorm and the sum, with the addend of the dense (0) or the cut network (1)."""
        gain, offset = self._affine(output)
        return gain * output + offset + (0.0 if call.shortcut is None else call.shortcut[side])

    def _cut_before_relu(self, factors: Factors) -> Callable[[LayerCall], Tensor]:
        """The cut network's value before the ReLU for these factors, its mean corrected by the bias or the shift of the BatchNorm."""
        chain = schemes.build(self.cut.chain, self.layer, factors).eval()
        bias = self._bias(factors)
        shift: Tensor | float = 0.0
        if self.cut.spec.bias:
            correct_mean(chain, None, bias)
        elif bias is not None:
            shift = bias.to(self.layer.get_parameter("weight")).reshape(self.per_channel)

        @torch.no_grad()
        def run(call: LayerCall) -> Tensor:
            return self._before_relu(chain(call.cut_input) + shift, call, 1)

        return run


def _divided(value: Tensor, gain: Tensor, otherwise: Tensor) -> Tensor:
    """`value / gain`; `otherwise` for channels with a gain near zero, which no output could compensate."""
    usable = gain.abs() > 1e-2 * gain.abs().max()
    return torch.where(usable, value / torch.where(usable, gain, 1.0), otherwise)


def _root(metric: Tensor, groups: int) -> Tensor:
    """The symmetric square root of each group's block of a second moment (out, out), regularised: (g, o, o)."""
    side = metric.shape[0] // groups
    blocks = torch.stack([metric[start : start + side, start : start + side] for start in range(0, metric.shape[0], side)])
    mean = blocks.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)[:, None, None]
    values, vectors = torch.linalg.eigh(blocks / mean)
    return (vectors * (values.clamp(min=0) + 1e-3).sqrt().unsqueeze(1)) @ vectors.mT


def correct_mean(chain: nn.Module, batchnorm: Any, bias: Tensor | None) -> None:
    """Subtract a vector from the running mean of the BatchNorm after a chain; without a BatchNorm, make it the last link's bias."""
    *_, last = chain.children()
    if bias is not None and batchnorm is not None:
        batchnorm.running_mean -= bias.to(batchnorm.running_mean)
    elif bias is not None:
        last.get_parameter("bias").detach().copy_(bias)

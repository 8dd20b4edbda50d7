"""Cut: carry out a plan on a copy of the model, and fold a cut model back. The only code that edits a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dsconv_surgery import schemes
from dsconv_surgery.calibration.batchnorm import reestimate_batchnorm
from dsconv_surgery.calibration.images import Calibration, Images
from dsconv_surgery.calibration.reconstruct import reconstruct, set_bias
from dsconv_surgery.network.geometry import ConvSpec
from dsconv_surgery.network.graph_rewrite import collapse_calls, expand_calls
from dsconv_surgery.network.layers import check_finite, check_unwrapped, irreplaceable_layers, is_layer, named_layers
from dsconv_surgery.plan import Cut, Plan
from dsconv_surgery.schemes import Factors, build, factorize, get_scheme, is_channels_last, kernel_of, links_of, make_layer
from dsconv_surgery.support.copies import deepcopy_memo, evaluation_copy
from dsconv_surgery.support.formatting import did_you_mean


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    calibration: Calibration | Iterable[Any] | None = None,
    init: Literal["factorize", "empty"] = "factorize",
    progress: bool = False,
) -> nn.Module:
    """A new model in which each cut's layer is an nn.Sequential of plain smaller layers.

    The argument stays as it is, bit for bit. The result has the same class, device, dtype, training flags, `requires_grad` and
    hooks; given an `fx.GraphModule`, the chain's links become nodes of its graph. A layer reached under several names is
    replaced under all of them.

    With calibration images the layers are factorised in running order, each on what it is given by the network cut so far, towards
    what the dense network has there: `E |t - V p|^2 + ridge |V - W|^2` is lowered over the kernels V that the scheme can write,
    the ridge chosen by every fourth image, held out (asymmetric reconstruction, Zhang et al. 2015). The mean of the error goes
    into the layer's bias or into the running mean of the BatchNorm after it; BatchNorm statistics are estimated anew only if
    held-out images say so.

    Args:
        model: the network that the plan was made for, with any weights.
        plan: from `make_plan`, or read from JSON.
        calibration: batches of unlabelled images, or a `Calibration`; a plan made with some needs some.
        init: "factorize" the model's weights; "empty" leaves the new weights uninitialised, for loading some.
        progress: show a bar over layers.

    Raises:
        ValueError: the plan does not fit the model (every mismatch is listed), weights that are not finite or not there, no
            calibration for a calibrated plan, or images that do not fit.
        TypeError: the model is compiled, scripted or wrapped for data parallelism.

    Example:
        >>> small = apply_plan(model, Plan.from_json(text))
    """
    if init not in ("factorize", "empty"):
        raise ValueError(f"init={init!r}: expected 'factorize' or 'empty'.")
    if calibration is not None:
        if init == "empty":
            raise ValueError("init='empty' leaves nothing to calibrate. Leave out calibration=, or init=.")
        return cut_calibrated(model, plan, Images(calibration, plan.input_shapes), {}, progress)[0]
    if plan.calibrated and init == "factorize":
        raise ValueError(
            "the plan was made with calibration, which its ranks and errors count on: pass calibration= (a few hundred unlabelled images), "
            "init='empty' to load weights, or make a plan without calibration."
        )
    return build_cut_model(model, plan, init, {}, progress)


def cut_calibrated(
    model: nn.Module, plan: Plan, images: Images, starts: Mapping[str, Factors], progress: bool
) -> tuple[nn.Module, dict[str, float]]:
    """A model cut for calibration images, and by layer the output's squared relative error on them; `starts`: factors to begin with."""
    check_unwrapped(model)
    _check_fit(model, plan)
    for cut in plan.cuts:
        _check_weight(cut, model.get_submodule(cut.name).get_parameter("weight"))
    dense = evaluation_copy(model)
    fitted = reconstruct(dense, plan.cuts, images, starts, progress)
    result = build_cut_model(model, plan, "factorize", {name: found.factors for name, found in fitted.items()}, progress=False)
    for name, found in fitted.items():
        if found.bias is not None:
            set_bias(result.get_submodule(name), found.bias)
        if found.batchnorm is not None and found.shift is not None:
            norm: Any = result.get_submodule(found.batchnorm)
            norm.running_mean -= found.shift.to(norm.running_mean)
    reestimate_batchnorm(dense, result, images)
    return result, {name: found.error for name, found in fitted.items()}


def build_cut_model(model: nn.Module, plan: Plan, init: str, made: Mapping[str, Factors], progress: bool) -> nn.Module:
    """`apply_plan`, with factors that are known already."""
    check_unwrapped(model)
    _check_fit(model, plan)
    replacements: dict[str, nn.Module] = {}
    for cut in tqdm(plan.cuts, desc="cut", unit="layer", disable=not progress):
        layer = model.get_submodule(cut.name)
        factors = None if init == "empty" else made[cut.name] if cut.name in made else _factors(cut, layer.get_parameter("weight"))
        replacements[cut.name] = build(cut.chain, layer, factors)
    result = _copy_with(model, replacements)
    expand_calls(result, {cut.name: list(cut.chain) for cut in plan.cuts})
    return result


def fold_back(model: nn.Module, plan: Plan) -> nn.Module:
    """A new, dense model from a cut one: each chain multiplied out into the single layer that computes the same.

    Args:
        model: what `apply_plan(..., plan)` or `load` gave, fine-tuned or not.
        plan: the plan that it was cut by.

    Raises:
        ValueError: a cut of the plan is not there, or its links are not as the plan says.

    Example:
        >>> dense = fold_back(small, plan)
    """
    check_unwrapped(model)
    check_cut(model, plan)
    replacements: dict[str, nn.Module] = {}
    for cut in plan.cuts:
        replacements[cut.name] = _dense(cut, model.get_submodule(cut.name))
    result = _copy_with(model, replacements)
    collapse_calls(result, {cut.name: list(cut.chain) for cut in plan.cuts})
    return result


def _dense(cut: Cut, chain: nn.Module) -> nn.Module:
    """The single layer that a chain of links amounts to."""
    kernel = chain_kernel(cut, chain)
    last: Any = list(chain.children())[-1]
    layer: Any = make_layer(cut.spec, last.weight)
    with torch.no_grad():
        layer.weight.copy_(kernel.reshape(layer.weight.shape))
        if cut.spec.bias:
            layer.bias.copy_(last.bias)
    layer.weight.requires_grad_(last.weight.requires_grad)
    if cut.spec.bias:
        layer.bias.requires_grad_(last.bias.requires_grad)
    if any(is_channels_last(link.get_parameter("weight")) for link in chain.children()):
        layer.to(memory_format=torch.channels_last)
    return layer.train(chain.training)


def check_cut(model: nn.Module, plan: Plan) -> None:
    """Raise ValueError unless a model holds the chains of a plan's cuts."""
    problems = [
        f"{cut.name}: expected the links {', '.join(cut.chain)} of {cut.scheme!r} at rank {cut.rank}, found {_found(model, cut.name)}"
        for cut in plan.cuts
        if not links_of(cut.chain, _at(model, cut.name))
    ]
    if problems:
        raise ValueError("the model was not cut by this plan. " + "; ".join(problems) + ". Pass the plan that came with it.")


def chain_kernel(cut: Cut, chain: nn.Module) -> Tensor:
    """The dense kernel, in float64, of a cut's nn.Sequential as it is now."""
    return kernel_of(get_scheme(cut.scheme), cut.spec, _chain_factors(cut, chain))


def degeneracy(cut: Cut, chain: nn.Module) -> float | None:
    """The measure of that name of a cut's nn.Sequential as it is now; None for schemes without terms that can cancel."""
    return schemes.degeneracy(get_scheme(cut.scheme), cut.spec, _chain_factors(cut, chain))


def _chain_factors(cut: Cut, chain: nn.Module) -> Factors:
    return {name: _grouped(cut.spec, link.get_parameter("weight")) for name, link in chain.named_children()}


def _grouped(spec: ConvSpec, weight: Tensor) -> Tensor:
    weight = weight.detach().to("cpu" if weight.device.type == "mps" else weight.device, torch.float64)
    return weight.reshape(spec.groups, -1, *weight.shape[1:], *(1,) * (4 - weight.ndim))


def _factors(cut: Cut, weight: Tensor) -> Factors:
    _check_weight(cut, weight)
    return next(factorize(get_scheme(cut.scheme), cut.spec, weight, [cut.rank]))


def _check_weight(cut: Cut, weight: Tensor) -> None:
    if weight.is_meta:
        raise ValueError(f"{cut.name}: its weights are on the meta device: nothing to factorise. Load them first, or use init='empty'.")
    check_finite(cut.name, weight)


def _check_fit(model: nn.Module, plan: Plan) -> None:
    """Raise ValueError, with every mismatch, unless each cut's layer is there as the plan knew it."""
    names = {name for every in named_layers(model).values() for name in every}
    fixed = irreplaceable_layers(model)
    problems: list[str] = []
    for cut in plan.cuts:
        layer = _at(model, cut.name)
        if not is_layer(layer):
            problems.append(
                f"{cut.name}: expected {cut.spec}, found {_found(model, cut.name)}.{did_you_mean(cut.name, names - {cut.name})}"
            )
        elif layer in fixed:
            problems.append(f"{cut.name}: expected {cut.spec}, found a layer to be left alone: {fixed[layer]}")
        elif ConvSpec.of(layer) != cut.spec:
            problems.append(f"{cut.name}: expected {cut.spec}, found {ConvSpec.of(layer)}.")
    if problems:
        more = f" ... and {len(problems) - 5} more." if len(problems) > 5 else ""
        raise ValueError(f"the plan was made for another network. {' '.join(problems[:5])}{more} Make a plan for this one with make_plan.")


def _at(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return nn.Identity()


def _found(model: nn.Module, name: str) -> str:
    try:
        return str(model.get_submodule(name)).replace("\n", "")[:200]
    except AttributeError:
        return "no such layer"


def _copy_with(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """A deep copy in which some submodules are others, wherever and however the model refers to them."""
    memo: dict[int, Any] = deepcopy_memo(model) | {id(model.get_submodule(name)): module for name, module in replacements.items()}
    if id(model) in memo:
        return memo[id(model)]
    result = copy.deepcopy(model, memo)
    for name, module in replacements.items():
        if result.get_submodule(name) is not module:  # a class with its own way of copying
            result.set_submodule(name, module)
    return result

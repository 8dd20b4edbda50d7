"""Cut a copy of a model as a plan says, and fold a cut model back. The only code that edits models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsconv_surgery.calibration.images import Calibration, Images, drawn, images_for
from dsconv_surgery.calibration.reconstruct import CALIBRATE, correct_mean, reconstruct
from dsconv_surgery.network.batchnorm_folding import has_folded_batchnorm
from dsconv_surgery.network.geometry import ConvSpec
from dsconv_surgery.network.graph_rewrite import collapse_calls, expand_calls
from dsconv_surgery.network.layers import (
    carry_attributes,
    check_finite,
    check_finite_state,
    check_unwrapped,
    irreplaceable_layers,
    is_layer,
    named_layers,
    weight_property_readers,
)
from dsconv_surgery.network.self_check import DenseRunError, check_computes_same
from dsconv_surgery.plan import Cut, Plan
from dsconv_surgery.schemes import Factors, build, factorize, get_scheme, is_channels_last, kernel_of, links_of
from dsconv_surgery.support.copies import copy_model, evaluation_copy, model_device
from dsconv_surgery.support.formatting import did_you_mean
from dsconv_surgery.support.input_description import InputsNotKeptError
from dsconv_surgery.support.inputs import Inputs, as_inputs
from dsconv_surgery.support.modes import standard_modes
from dsconv_surgery.support.progress import Progress
from dsconv_surgery.support.random_state import seeded
from dsconv_surgery.support.user_warning import warn_user

COMPUTE_FACTORS = "compute factors"  # a phase


@standard_modes()
def apply_plan(
    model: nn.Module,
    plan: Plan,
    *example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    calibration: Calibration | Iterable[Any] | str | None = None,
    prepare: Callable[[Any], Any] | None = None,
    output: Callable[[Any], Any] | None = None,
    init: Literal["factorize", "empty"] = "factorize",
    check: bool = True,
    progress: bool | None = None,
) -> nn.Module:
    """Make a new model in which the layer of each cut is an nn.Sequential of smaller, plain layers.

    The model that is passed in stays bit-identical. The result has the same class, device, dtype, training flags, `requires_grad`
    and hooks. In an `fx.GraphModule`, the links become nodes of the graph. A layer with several names is replaced under all of them.

    With calibration images, layers are fitted in running order. Input patches p come from the network compressed so far, targets t
    from the dense network. The kernel V that the scheme can write minimises `E |t - V p|^2 + ridge |V - W|^2`, W the weight
    (asymmetric reconstruction, Zhang et al. 2015). Held-out images, every fourth, choose the ridge. The mean of the error goes into
    the bias, or into the running mean of the BatchNorm that follows.

    Args:
        model: the network that the plan was made for, with any weights.
        plan: from `make_plan`, or read from JSON.
        example_inputs, example_kwargs: the arguments of the network for the check. Without them, it runs on calibration images, or on
            random inputs of the shapes that the plan was made for.
        calibration: batches of unlabelled images, a `Calibration` or "synthetic"; required if the plan was made with calibration.
        prepare, output: as for `make_plan`.
        init: "factorize" the model's weights, or leave the new weights "empty", to load a state_dict afterwards.
        check: run the cut network, and the dense one with the output of each cut layer replaced by the output of its chain. They must
            compute the same. A model on the meta device, and init="empty", are not checked.
        progress: show a bar for each phase: True, False, or None for in a terminal only.

    Raises:
        ValueError: the plan does not fit the model (mismatches are listed), weights are not finite or on the meta device, the plan
            needs calibration, the images do not fit the model, or the check failed (the first layer with another output is named).
        TypeError: the model is compiled, scripted or wrapped for data parallelism.

    Example:
        >>> small = apply_plan(model, Plan.from_json(text))
    """
    if init not in ("factorize", "empty"):
        raise ValueError(f"init={init!r}: expected 'factorize' or 'empty'.")
    inputs = as_inputs(example_inputs, example_kwargs)
    passed = bool(inputs.args or inputs.kwargs)
    if calibration is not None:
        if init == "empty":
            raise ValueError("init='empty' has no weights to calibrate. Leave out calibration= or init=.")
        if passed:
            images = images_for(model, calibration, inputs, prepare, output)
        else:
            example = plan.inputs.rebuild("meta")
            images = Images(drawn(model, calibration, example), example, prepare, output)
        _, _, first_images = next(iter(images))
        check_on = (inputs if passed else first_images) if check else None
        return cut_calibrated(model, plan, images, {}, Progress(progress, (CALIBRATE,)), check_on)[0]
    if plan.calibrated and init == "factorize":
        raise ValueError(
            f"the plan was made with {'synthetic images' if plan.calibrated == 'synthetic' else 'calibration'}. Pass calibration= (a few "
            "hundred unlabelled images, or 'synthetic'), pass init='empty' to load weights afterwards, or make a plan without calibration."
        )
    result = build_cut_model(model, plan, init, {}, Progress(progress, (COMPUTE_FACTORS,)), inputs if check and passed else None)
    if check and init != "empty" and plan.cuts and not passed:
        _check_on_random_inputs(model, result, plan)
    return result


def cut_calibrated(
    model: nn.Module, plan: Plan, images: Images, starts: Mapping[str, Factors], progress: Progress, check_on: Inputs | None
) -> tuple[nn.Module, dict[str, float]]:
    """A cut model, and the output error of each cut on the calibration images.

    Args:
        starts: factors to start from.
        check_on: inputs of the self-check; None for no check.
    """
    _check_fit(model, plan)
    check_finite_state(model)
    for cut in plan.cuts:
        _finite_weight(model, cut)
    dense = evaluation_copy(model)
    fitted = reconstruct(dense, plan.cuts, images, starts, progress)
    factors = {name: fit.factors for name, fit in fitted.items()}
    result = build_cut_model(model, plan, "factorize", factors, progress, check_on)
    for name, fit in fitted.items():
        batchnorm = None if fit.batchnorm is None else result.get_submodule(fit.batchnorm)
        correct_mean(result.get_submodule(name), batchnorm, fit.bias)
    return result, {name: fit.error for name, fit in fitted.items()}


def build_cut_model(
    model: nn.Module, plan: Plan, init: str, fitted: Mapping[str, Factors], progress: Progress, check_on: Inputs | None
) -> nn.Module:
    """`apply_plan` without calibration; layers in `fitted` have their factors already. `check_on`: as for `cut_calibrated`."""
    _check_fit(model, plan)
    if init != "empty":
        check_finite_state(model)
    replacements: dict[str, nn.Module] = {}
    readers = weight_property_readers(model)
    missing = {cut.name: cut.spec.params for cut in plan.cuts if cut.name not in fitted and init != "empty"}
    with progress.layers(COMPUTE_FACTORS, missing) as begin:
        for cut in plan.cuts:
            factors = fitted.get(cut.name)
            if cut.name in missing:
                begin(cut.name)
                factors = next(factorize(get_scheme(cut.scheme), cut.spec, _finite_weight(model, cut), [cut.rank]))
            layer = model.get_submodule(cut.name)
            replacements[cut.name] = build(cut.chain, layer, factors, layer in readers)
    result = _copy_with(model, replacements)
    expand_calls(result, {cut.name: list(cut.chain) for cut in plan.cuts})
    if check_on is not None and init != "empty" and plan.cuts:
        check_computes_same(model, result, _last_links(plan), check_on)
    return result


def _last_links(plan: Plan) -> dict[str, str]:
    return {cut.name: list(cut.chain)[-1] for cut in plan.cuts}


def _check_on_random_inputs(model: nn.Module, result: nn.Module, plan: Plan) -> None:
    """The self-check on random inputs of the shapes that the plan was made for; a warning if the network does not take them."""
    dtype = next(tensor.dtype for tensor in model.parameters() if tensor.is_floating_point())
    try:
        with seeded(0):
            inputs = plan.inputs.rebuild(model_device(model), dtype)
        check_computes_same(model, result, _last_links(plan), inputs)
    except (InputsNotKeptError, DenseRunError) as error:
        warn_user(f"apply_plan: the cut network was not checked, because {error}")


@standard_modes()
def fold_back(model: nn.Module, plan: Plan) -> nn.Module:
    """Make a new, dense model from a cut one: each chain is multiplied out to one layer that computes the same.

    Args:
        model: the result of `apply_plan(..., plan)` or `load`, fine-tuned or not. It is not changed.
        plan: the plan that the model was cut by.

    Raises:
        ValueError: the chains in the model are not those of the plan, or hold a BatchNorm that `fold_batchnorm` folded into them.

    Example:
        >>> dense = fold_back(small, plan)
    """
    check_cut(model, plan)
    result = _copy_with(model, {cut.name: _dense_layer(cut, model.get_submodule(cut.name)) for cut in plan.cuts})
    collapse_calls(result, {cut.name: list(cut.chain) for cut in plan.cuts})
    return result


def _dense_layer(cut: Cut, chain: nn.Module) -> nn.Module:
    """The layer that computes the same as a chain."""
    *_, last = chain.children()
    kernel = kernel_of(get_scheme(cut.scheme), cut.spec, chain_factors(cut, chain))
    layer: Any = build({"dense": cut.spec}, last, {"dense": kernel})[0]
    if any(is_channels_last(link.get_parameter("weight")) for link in chain.children()):
        layer.to(memory_format=torch.channels_last)
    carry_attributes(chain, layer)
    return layer.train(chain.training)


def chain_factors(cut: Cut, chain: nn.Module) -> Factors:
    """The weights of a cut's nn.Sequential as a scheme sees them, in float64."""
    factors: Factors = {}
    for name, link in chain.named_children():
        weight = link.get_parameter("weight").detach()
        weight = weight.to("cpu" if weight.device.type == "mps" else weight.device, torch.float64)
        factors[name] = weight.reshape(cut.spec.groups, -1, *weight.shape[1:], *(1,) * (4 - weight.ndim))
    return factors


def check_cut(model: nn.Module, plan: Plan) -> None:
    """Raise ValueError, with the mismatches, if a model does not hold the chains of a plan."""
    check_unwrapped(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    problems: list[str] = []
    for cut in plan.cuts:
        layer = modules.get(cut.name)
        if isinstance(layer, nn.Sequential) and len(layer) and has_folded_batchnorm(layer[-1]):
            raise ValueError(
                f"{cut.name}: expected the chain of the plan, found one with a BatchNorm that fold_batchnorm folded into it. Pass the cut "
                "network from before fold_batchnorm."
            )
        if layer is None or not links_of(cut.chain, layer):
            links = ", ".join(cut.chain)
            problems.append(f"{cut.name}: expected the links {links} of {cut.scheme!r} at rank {cut.rank}, found {_described(layer)}.")
    if problems:
        raise ValueError(f"the model was not cut by this plan. {listed(problems)} Pass the plan that the model was cut by.")


def _check_fit(model: nn.Module, plan: Plan) -> None:
    """Raise ValueError, with the mismatches, if a layer of the plan is missing, has changed or cannot be replaced."""
    check_unwrapped(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = [name for names in named_layers(model).values() for name in names]
    reasons = irreplaceable_layers(model)
    problems: list[str] = []
    for cut in plan.cuts:
        layer = modules.get(cut.name)
        if layer is None or not is_layer(layer):
            problem = f"{_described(layer)}.{did_you_mean(cut.name, layers)}"
        elif layer in reasons:
            problem = f"a layer that cannot be cut: {reasons[layer]}"
        elif (spec := ConvSpec.of(layer)) != cut.spec:
            problem = f"{spec}."
            if replace(spec, bias=cut.spec.bias) == cut.spec:
                problem += " Only the bias differs: pass fold_batchnorm(model, ...) if the plan was made for it."
        else:
            continue
        problems.append(f"{cut.name}: expected {cut.spec}, found {problem}")
    if problems:
        raise ValueError(f"the plan was made for another network. {listed(problems)} Make a plan for this network with make_plan.")


def _finite_weight(model: nn.Module, cut: Cut) -> Tensor:
    """The weight of the layer to cut; ValueError if it has no values, or values that are not finite."""
    weight = model.get_submodule(cut.name).get_parameter("weight")
    if weight.is_meta:
        message = "expected weights to factorise, found a tensor on the meta device. Load weights, or use init='empty'."
        raise ValueError(f"{cut.name}: {message}")
    check_finite(cut.name, weight)
    return weight


def _described(module: nn.Module | None) -> str:
    return "no such layer" if module is None else str(module).replace("\n", "")[:200]


def listed(problems: list[str]) -> str:
    """The first problems, and how many more there are."""
    return " ".join(problems[:5]) + (f" ... and {len(problems) - 5} more." if len(problems) > 5 else "")


def _copy_with(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """A deep copy in which some submodules are replaced, wherever and however the model refers to them."""
    result = copy_model(model, {id(model.get_submodule(name)): module for name, module in replacements.items()})
    if result in replacements.values():  # the model is a lone layer
        return result
    for name, module in replacements.items():
        if result.get_submodule(name) is not module:  # the class has a __deepcopy__ that ignores the memo
            result.set_submodule(name, module)
    return result

"""MACs and parameters of every layer are equal, as integers, to those that torch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dsconv_surgery import Plan, apply_plan, make_plan
from dsconv_surgery.network.discovery import ConvSite, Skip, survey_model
from dsconv_surgery.plan import Cut
from dsconv_surgery.schemes import get_scheme, refusal, scheme_names
from dsconv_surgery.support.input_description import describe_inputs
from dsconv_surgery.support.inputs import Inputs

models = pytest.importorskip("torchvision.models")

FAMILIES = {  # a small member of each family, and an image size
    "alexnet": 64,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11": 64,
    "vit_b_32": 224,
    "wide_resnet50_2": 64,
}
ATTENTION = {"maxvit_t", "swin_t", "swin_v2_t", "vit_b_32"}
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def on_meta(name: str, **settings: Any) -> nn.Module:
    """A torchvision network without memory for its weights."""
    if name in ("googlenet", "inception_v3"):
        settings["init_weights"] = False
    if name.startswith("regnet"):  # computes its widths with tensors
        return models.get_model(name, weights=None, **settings).eval().to("meta")
    with torch.device("meta"):
        return models.get_model(name, weights=None, **settings).eval()


def counted(model: nn.Module, *inputs: Any) -> tuple[dict[str, int], int]:
    """MACs by layer name, and the total, from torch's flop counter, with gradients on to avoid fused attention."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    by_module = counter.get_flop_counts()
    root = type(model).__name__
    macs: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            flops = sum(by_module.get(f"{root}.{name}" if name else root, {}).values())
            assert flops % 2 == 0
            macs[name] = flops // 2
    return macs, counter.get_total_flops() // 2


def check(model: nn.Module, *inputs: Any) -> int:
    """Compare every layer and the totals; returns the MACs outside of layers."""
    survey = survey_model(model, Inputs(*inputs))
    macs, total = counted(model, *inputs)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    assert [layer.name for layer in survey.layers] == list(layers)
    assert {name: cost.macs for name, cost in survey.costs.items()} == macs
    assert {name: cost.params for name, cost in survey.costs.items()} == {
        name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()
    }
    for layer in survey.layers:  # the cost from the geometry is the counted one
        if isinstance(layer, ConvSite):
            assert layer.cost == survey.costs[layer.name]
    assert survey.total.params == sum(p.numel() for p in model.parameters())
    assert survey.total.macs == sum(macs.values())
    assert survey.total.macs + survey.outside.macs == total
    return survey.outside.macs


@pytest.mark.parametrize("name", FAMILIES)
def test_predicted_costs_are_the_counted_ones(name: str) -> None:
    """For every torchvision classifier family. Only attention has MACs outside of layers."""
    remainder = check(on_meta(name), torch.empty(2, 3, FAMILIES[name], FAMILIES[name], device="meta"))
    assert (remainder > 0) == (name in ATTENTION)


def test_every_family_is_there() -> None:
    """Fails if torchvision adds a family, whose builders are in a new module."""
    plain = [name for name in models.list_models(models) if not name.startswith("quantized")]
    modules = {models.get_model_builder(name).__module__ for name in plain}
    assert modules == {models.get_model_builder(name).__module__ for name in FAMILIES}


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_count_only_where_they_run(name: str) -> None:
    """They run in training mode only. Costs are those of evaluation mode, in which they are skips without MACs, in both modes."""
    x = torch.empty(2, 3, 96, 96, device="meta")
    model = on_meta(name, aux_logits=True)
    heads = [n for n, module in model.named_modules() if isinstance(module, LAYERS) and n.lower().startswith("aux")]
    assert heads
    check(model, x)
    evaluation = survey_model(model, Inputs(x))
    assert {layer.name for layer in evaluation.layers if isinstance(layer, Skip)} == set(heads)
    assert all(evaluation.costs[head].macs == 0 for head in heads)
    assert survey_model(model.train(), Inputs(x)) == evaluation


def test_a_layer_that_runs_twice_counts_twice() -> None:
    """Each call counts with the size of its input."""

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(3, 5, (3, 1), stride=(2, 1), padding="valid", bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x).sum() + self.head(x[..., ::2, ::3]).sum()

    model, x = Pyramid(), torch.rand(2, 3, 17, 12)
    assert check(model, x) == 0
    assert survey_model(model, Inputs(x)).total.macs == 2 * 5 * 9 * (8 * 12 + 4 * 4)


def test_transposed_and_one_dimensional_convolutions_count_too() -> None:
    """They cannot be cut, but a budget is a fraction of the whole network."""
    model = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.Flatten(2), nn.Conv1d(6, 3, 5, dilation=2), nn.Unflatten(2, (1, -1, 1))
    )
    model.append(nn.Conv3d(3, 2, (1, 3, 1)))
    assert check(model, torch.rand(2, 4, 5, 7)) == 0
    assert survey_model(model, Inputs(torch.rand(2, 4, 5, 7))).total.macs > 0


def hand_made(model: nn.Module, x: torch.Tensor, scheme: str) -> Plan:
    """A plan that cuts every possible layer with a scheme at half the full rank."""
    survey = survey_model(model, Inputs(x))
    cuts: list[Cut] = []
    for layer in survey.layers:
        if isinstance(layer, ConvSite) and not refusal(get_scheme(scheme), layer.spec):
            full: Any = get_scheme(scheme).full_rank(layer.spec.one_group())
            rank = max(1, full // 2) if isinstance(full, int) else (max(1, full[0] // 2), max(1, full[1] // 3))
            cuts.append(Cut(layer.name, scheme, rank, layer.spec, layer.sizes))
    return Plan(tuple(cuts), (), describe_inputs(Inputs(x)), "by hand", None, survey.total, survey.outside)


@pytest.mark.parametrize("scheme", scheme_names())
@pytest.mark.parametrize("name", ["resnext50_32x4d", "mobilenet_v3_small", "convnext_tiny"])
def test_a_plan_predicts_the_cost_of_the_cut_network(name: str, scheme: str) -> None:
    """The predicted cost is that of a survey and that of the flop counter."""
    model, x = on_meta(name), torch.empty(1, 3, 64, 64, device="meta")
    plan = hand_made(model, x, scheme)
    cut = apply_plan(model, plan, init="empty")
    assert len(plan.cuts) > 5
    assert survey_model(cut, Inputs(x)).total == plan.total_after != plan.total
    assert check(cut, x) == 0
    assert sum(counted(cut, x)[0].values()) == plan.total_after.macs


def test_make_plan_predicts_the_cost_of_the_cut_network() -> None:
    """With real weights and several schemes. The counted MACs are within the budget."""
    model, x = models.shufflenet_v2_x0_5(weights=None).eval(), torch.rand(2, 3, 64, 64)
    plan = make_plan(model, x, schemes=["depthwise", "spatial", "channel", "bottleneck"], rule="uniform")
    cut = apply_plan(model, plan)
    assert survey_model(cut, Inputs(x)).total == plan.total_after
    macs, total = counted(cut, x)
    assert sum(macs.values()) == total == plan.total_after.macs <= plan.total.macs / 2

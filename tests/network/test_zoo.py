"""Whole networks: find, cut, forward, backward, save and load them, with equal outputs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dsconv_surgery import Budget, Plan, apply_plan, find_convs, fold_back, load, make_plan, save
from dsconv_surgery.network.discovery import ConvSite, Skip, survey_model
from dsconv_surgery.support.inputs import Inputs

models = pytest.importorskip("torchvision.models")
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # for its zoo.py


@dataclass(frozen=True)
class Network:
    """How to build a network, the schemes to cut it with, and the fraction of its MACs to keep."""

    builder: Callable[..., nn.Module]
    schemes: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...] = ()
    exclude: tuple[str, ...] = ()
    keep: float = 0.6

    def build(self) -> nn.Module:
        return self.builder(weights=None, **dict(self.settings))


ZOO = {
    "mobilenet_v2": Network(models.mobilenet_v2, ("spatial", "bottleneck")),
    "resnext50": Network(models.resnext50_32x4d, ("pointwise_depthwise", "bottleneck")),
    "googlenet": Network(models.googlenet, ("tucker", "bottleneck"), (("init_weights", False), ("aux_logits", True))),
    "deeplabv3": Network(
        models.segmentation.deeplabv3_resnet50, ("spatial", "bottleneck"), (("weights_backbone", None), ("num_classes", 3))
    ),
    "resnet50": Network(models.resnet50, ("channel", "bottleneck")),
    "densenet121": Network(models.densenet121, ("depthwise", "bottleneck")),
    "convnext_tiny": Network(models.convnext_tiny, ("cp_split", "bottleneck")),
    "vgg16_bn": Network(models.vgg16_bn, ("spatial", "channel"), exclude=("classifier.*",)),  # 25088 x 4096: for time
}
QUICK = ("mobilenet_v2", "resnext50", "googlenet", "deeplabv3")


def zoo() -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ZOO]


def tensors_of(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def equal(output: Any, other: Any) -> bool:
    tensors, others = tensors_of(output), tensors_of(other)
    return len(tensors) == len(others) > 0 and all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def with_gradient(model: nn.Module) -> set[str]:
    """The parameters with a gradient."""
    return {name for name, p in model.named_parameters() if p.grad is not None}


def layer_names(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)}


def check_cut(model: nn.Module, cut: nn.Module, plan: Plan) -> None:
    """Class and flags are the same, cuts are chains of plain layers with the bias on the last, and no layer is forgotten."""
    assert type(cut) is type(model)
    assert cut.training == model.training
    for planned in plan.cuts:
        chain: Any = cut.get_submodule(planned.name)
        assert type(chain) is nn.Sequential
        assert {type(link) for link in chain} == {type(model.get_submodule(planned.name))}
        assert [link.bias is not None for link in chain] == [False] * (len(chain) - 1) + [planned.spec.bias]
    assert {planned.name for planned in (*plan.cuts, *plan.skips)} == layer_names(model)


@pytest.mark.parametrize("name", zoo())
def test_zoo(name: str, tmp_path: Path) -> None:
    """Cut in training mode, train a step, save and load. Outputs in evaluation mode are equal bit for bit."""
    network = ZOO[name]
    model, x = network.build(), torch.rand(2, 3, 64, 64)
    before = snapshot(model)
    plan = make_plan(model, x, schemes=network.schemes, exclude=network.exclude, budget=Budget(macs=network.keep), rule="uniform")
    cut = apply_plan(model, plan)
    check_cut(model, cut, plan)
    assert {planned.scheme for planned in plan.cuts} == set(network.schemes)
    after = survey_model(cut, Inputs(x)).total
    assert after == plan.total_after
    assert after.macs <= network.keep * plan.total.macs
    assert sum(p.numel() for p in cut.parameters()) == after.params

    dense_shapes = [t.shape for t in tensors_of(model(x))]
    model.load_state_dict(before)  # undo the BatchNorm updates
    outputs = tensors_of(cut(x))
    assert [t.shape for t in outputs] == dense_shapes
    sum(t.square().mean() for t in outputs).backward()
    assert with_gradient(cut) == {n for n, _ in cut.named_parameters()}
    assert all(bool(p.grad.isfinite().all()) for p in cut.parameters())
    assert not with_gradient(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    save(cut, tmp_path, plan)
    torch.manual_seed(1)
    loaded = load(network.build(), tmp_path)
    assert type(loaded) is type(model)
    cut.eval()
    loaded.eval()
    with torch.no_grad():
        assert equal(loaded(x), cut(x))
        assert not equal(loaded(x), model.eval()(x))  # the cut changed the outputs


# Small models of many kinds; `python tests/benchmarks/zoo.py` runs all.
SERVED = (
    "torchvision:mnasnet0_5", "torchvision:quantized_shufflenet_v2_x0_5", "torchvision:squeezenet1_1", "torchvision:shufflenet_v2_x1_0",
    "timm:lcnet_035", "timm:mobilenetv3_small_050", "timm:starnet_s1", "timm:test_byobnet", "timm:test_coatnet", "timm:test_convnext",
    "timm:test_convnext2", "timm:test_convnext3", "timm:test_efficientnet", "timm:test_efficientnet_evos", "timm:test_efficientnet_gn",
    "timm:test_efficientnet_ln", "timm:test_mambaout", "timm:test_maxvit", "timm:test_nfnet", "timm:test_resnet", "timm:test_vit",
    "timm:test_vit2", "timm:test_vit3", "timm:test_vit4", "timm:test_vit_relpos",
)  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_a_model_is_served_end_to_end(name: str) -> None:
    """Find, plan, cut, run, train, save and load; each layer is a site or a skip with its reason."""
    row: dict[str, Any] = {}
    import_module("zoo").serve(name, row)
    assert row["served"]
    assert row["unexplained"] == []


def test_geometry_of_the_special_ones() -> None:
    """ResNeXt has groups, DeepLab dilation, MobileNet depthwise layers."""
    x = torch.rand(2, 3, 64, 64)
    specs = {
        name: [layer.spec for layer in find_convs(ZOO[name].build(), x) if isinstance(layer, ConvSite)]
        for name in ("resnext50", "deeplabv3", "mobilenet_v2")
    }
    assert sum(spec.groups == 32 for spec in specs["resnext50"]) == 16
    assert {spec.dilation for spec in specs["deeplabv3"]} == {(n, n) for n in (1, 2, 4, 12, 24, 36)}
    assert sum(spec.groups == spec.in_channels > 1 for spec in specs["mobilenet_v2"]) == 17


def test_googlenet_keeps_its_auxiliary_heads() -> None:
    """They run in training mode only, so they are skipped, in both modes, and still run after the cut."""
    model, x = ZOO["googlenet"].build(), torch.rand(2, 3, 64, 64)
    heads = {name for name in layer_names(model) if name.startswith("aux")}
    plan = make_plan(model, x, schemes="bottleneck", include=["aux*", "fc"], budget=Budget(macs=0.9999), rule="uniform")
    assert {planned.name for planned in plan.cuts} == {"fc"}
    cut = apply_plan(model, plan)
    logits, aux2, aux1 = cut(x)
    assert logits.shape == aux2.shape == aux1.shape == (2, 1000)

    model.eval()
    skips = {layer.name: layer.reason for layer in find_convs(model, x) if isinstance(layer, Skip)}
    assert set(skips) == heads
    assert all(reason == "it is never called on the example inputs in evaluation mode." for reason in skips.values())
    small = apply_plan(model, make_plan(model, x, schemes="bottleneck", include="inception3a*", budget=Budget(macs=0.99), rule="uniform"))
    assert isinstance(small(x), Tensor)
    assert len(small.train()(x)) == 3  # training runs the heads


def detector() -> nn.Module:
    """Faster R-CNN with few proposals, for speed."""
    return models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64,
        rpn_pre_nms_top_n_train=50, rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=20,
        box_batch_size_per_image=16, box_score_thresh=0.0, box_detections_per_img=5,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("nms")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torchvision's own
def test_faster_rcnn(tmp_path: Path) -> None:
    """A network that can be neither traced nor run on fake tensors, and calls its heads with five sizes."""
    model, images = detector().eval(), [torch.rand(3, 64, 64)]
    before = snapshot(model)
    sites = {layer.name: layer for layer in survey_model(model, Inputs(images)).layers if isinstance(layer, ConvSite)}
    assert set(sites) == layer_names(model)
    assert sites["rpn.head.conv.0.0"].sizes == tuple((1, side, side) for side in (16, 8, 4, 2, 1))

    plan = make_plan(model, images, schemes=["spatial", "bottleneck"], budget=Budget(macs=0.6), rule="uniform")
    cut = apply_plan(model, plan)
    check_cut(model, cut, plan)
    assert "rpn.head.conv.0.0" in {planned.name for planned in plan.cuts}
    assert survey_model(cut, Inputs(images)).total.params == plan.total_after.params
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    targets = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    for network in (model, cut):
        sum(network.train()(images, targets).values()).backward()
    reached = with_gradient(model)
    assert reached
    chains = {planned.name: list(planned.chain) for planned in plan.cuts}
    expected: set[str] = set()
    for name in reached:
        layer, _, kind = name.rpartition(".")
        links = chains.get(layer)
        if links is None:
            expected.add(name)
        else:
            expected |= {f"{layer}.{link}.weight" for link in links} if kind == "weight" else {f"{layer}.{links[-1]}.bias"}
    assert with_gradient(cut) == expected

    save(cut, tmp_path, plan)
    torch.manual_seed(1)
    loaded = load(detector(), tmp_path).eval()
    cut.eval()
    with torch.no_grad():
        assert tensors_of(cut(images))[0].numel()  # there are boxes to compare
        assert equal(loaded(images), cut(images))


def targets_of(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]


def test_a_graph_module_is_cut_node_by_node(tmp_path: Path) -> None:
    """Links become nodes, outputs are those of the cut eager network, and fold_back restores the graph."""
    model, x = models.resnet18(weights=None).eval(), torch.rand(2, 3, 64, 64)
    graph = fx.symbolic_trace(model)
    original = targets_of(graph)
    plan = make_plan(graph, x, schemes=["depthwise", "bottleneck"], rule="uniform")
    assert plan == make_plan(model, x, schemes=["depthwise", "bottleneck"], rule="uniform")
    plan = plan.replace("layer1.0.conv1", scheme="tucker", rank=(20, 30)).replace("layer1.0.conv2", scheme="spatial", rank=40)
    assert {planned.scheme for planned in plan.cuts} == {"tucker", "depthwise", "spatial", "bottleneck"}
    cut = apply_plan(graph, plan)
    assert isinstance(cut, fx.GraphModule)
    cut.graph.lint()
    chains = {planned.name: [f"{planned.name}.{link}" for link in planned.chain] for planned in plan.cuts}
    assert targets_of(cut) == [link for target in original for link in chains.get(target, [target])]
    assert targets_of(graph) == original
    eager = apply_plan(model, plan)
    assert set(cut.state_dict()) == set(eager.state_dict())
    with torch.no_grad():
        expected = eager(x)
        assert torch.equal(cut(x), expected)
        assert not torch.equal(expected, model(x))

    save(cut, tmp_path, plan)
    with torch.no_grad():
        assert torch.equal(load(fx.symbolic_trace(models.resnet18(weights=None).eval()), tmp_path)(x), expected)
        assert torch.equal(load(models.resnet18(weights=None).eval(), tmp_path)(x), expected)

    dense = fold_back(cut, plan)
    dense.graph.lint()
    assert targets_of(dense) == original
    assert [type(m) for _, m in dense.named_modules()][1:] == [type(m) for _, m in graph.named_modules()][1:]
    with torch.no_grad():
        torch.testing.assert_close(dense(x), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fold_back(eager, plan)(x), dense(x))


class ReadsAttributes(nn.Module):
    """The forward reads attributes of layers, and the dtype of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.other = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16 * 64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.to(next(self.parameters()).dtype))
        if self.other.bias is not None:
            x = self.other(x)
        return self.fc(x.reshape(-1, self.fc.in_features))


def test_layers_whose_attributes_are_read_stay() -> None:
    """An nn.Sequential has no `in_features`, so the layer is a skip. Reading a dtype does not make a skip."""
    model, x = ReadsAttributes().eval(), torch.rand(2, 3, 8, 8)
    conv, other, fc = find_convs(model, x)
    assert isinstance(conv, ConvSite)
    assert other == Skip("other", "its bias is read by ReadsAttributes.forward, so the layer must stay.")
    assert fc == Skip("fc", "its in_features is read by ReadsAttributes.forward, so the layer must stay.")
    assert type(model.fc) is nn.Linear  # only a copy is watched
    plan = make_plan(model, x, schemes="spatial", budget=Budget(macs=0.95), rule="uniform")
    assert [planned.name for planned in plan.cuts] == ["conv"]
    assert apply_plan(model, plan)(x).shape == (2, 64)

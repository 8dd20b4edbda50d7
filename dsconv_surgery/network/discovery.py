"""Find the convolutions and linear layers of a model, with their input sizes and counted MACs, and the reasons why some stay dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dsconv_surgery.network.call_recorder import record_calls
from dsconv_surgery.network.geometry import ConvSpec, Cost, Size
from dsconv_surgery.network.layers import check_unwrapped, class_path, irreplaceable_layers, named_layers
from dsconv_surgery.support.formatting import TOTAL, Displayed, TableContent, counted
from dsconv_surgery.support.inputs import Inputs, as_inputs
from dsconv_surgery.support.modes import standard_modes


@dataclass(frozen=True)
class ConvSite:
    """A layer that can be cut: its name, other names of the same module, its geometry, and the input size of each call."""

    name: str
    aliases: tuple[str, ...]
    spec: ConvSpec
    sizes: tuple[Size, ...]

    @property
    def cost(self) -> Cost:
        return Cost(self.spec.params, sum(self.spec.macs(size) for size in self.sizes))


@dataclass(frozen=True)
class Skip:
    """A layer that stays as it is, and the reason, a sentence."""

    name: str
    reason: str


@dataclass(frozen=True)
class Survey:
    """The layers of a model in module order, their costs by name, the cost of the whole model, and the cost outside of layers."""

    layers: tuple[ConvSite | Skip, ...]
    costs: dict[str, Cost]
    # All parameters; MACs of convolutions and linear layers.
    total: Cost
    # Parameters that belong to no layer, and MACs of other operations: functional convolutions, attention, LSTMs, layers in plain lists.
    outside: Cost
    # Parameters that `model.parameters()` does not have, as of layers in plain lists. They are part of `outside`, but not of `total`.
    unregistered_params: int = 0
    ends: tuple[str, ...] = ()  # the first convolution and the last layer that the network calls
    types: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # the class of each layer and its bases, as in "nn.Conv2d"

    def skip_reason(self, name: str) -> str | None:
        """Why a layer cannot be cut, or None."""
        return next((layer.reason for layer in self.layers if isinstance(layer, Skip) and layer.name == name), None)


class Layers(list[ConvSite | Skip], Displayed):
    """The list of `find_convs`: `str()` and notebooks show it as a table with costs."""

    def __init__(self, survey: Survey) -> None:
        super().__init__(survey.layers)
        self._survey = survey

    @property
    def total(self) -> Cost:
        """All parameters of the network, and the MACs of its layers."""
        return self._survey.total

    def __repr__(self) -> str:
        sites, total = sum(isinstance(layer, ConvSite) for layer in self), self.total
        return f"<Layers: {counted(sites, 'site')}, {counted(len(self) - sites, 'skip')}, {total.params:,} parameters, {total.macs:,} MACs>"

    def table(self) -> TableContent:
        costs = [
            (layer.name, layer.reason if isinstance(layer, Skip) else str(layer.spec), self._survey.costs[layer.name]) for layer in self
        ]
        costs += [("outside layers", "", self._survey.outside), (TOTAL, "", self._survey.total)]
        rows = [(name, description, f"{cost.params:,}", f"{cost.macs:,}") for name, description, cost in costs]
        return TableContent("", ("layer", "geometry, or why it stays dense", "params", "MACs"), tuple(rows))


@standard_modes()
def find_convs(model: nn.Module, *example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> Layers:
    """Find every convolution and linear layer of a model: a site that can be cut, or a skip with its reason.

    A copy of the model runs in evaluation mode on fake tensors, so nothing is computed, and models larger than memory or on the meta
    device work, too. Only a model whose shapes depend on data runs on real tensors, without gradients.

    Args:
        model: any nn.Module. It is not changed.
        example_inputs: the arguments of `model(*example_inputs, **example_kwargs)`: tensors, and nests of tensors, numbers and flags. Only
            shapes, dtypes and devices of tensors matter.
        example_kwargs: keyword arguments.

    Returns:
        `ConvSite(name, aliases, spec, sizes)` or `Skip(name, reason)` for each layer, in module order: a list. Print it as a table.

    Raises:
        TypeError: the model is compiled, scripted or wrapped for data parallelism.
        ValueError: the model does not run on the inputs, cannot be copied, or its forward belongs to another network.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 3, 2))
        >>> for layer in find_convs(model, torch.rand(1, 3, 16, 16)):
        ...     print(layer)
        ConvSite(name='0', aliases=(), spec=ConvSpec(in_channels=3, ...), sizes=((1, 16, 16),))
        Skip(name='1', reason='nn.ConvTranspose2d is not a plain nn.Conv2d or nn.Linear.')
    """
    return Layers(survey_model(model, as_inputs(example_inputs, example_kwargs)))


def survey_model(model: nn.Module, inputs: Inputs, replaceable: bool = True) -> Survey:
    """The layers and costs of a model. Without `replaceable`, it is not tested whether layers can be replaced."""
    check_unwrapped(model)
    reasons = irreplaceable_layers(model)
    names = named_layers(model)
    candidates = [layer_names[0] for layer, layer_names in names.items() if layer not in reasons] if replaceable else []
    record = record_calls(model, inputs, candidates)
    layers: list[ConvSite | Skip] = []
    costs: dict[str, Cost] = {}
    for module, (name, *aliases) in names.items():
        calls = record.calls.get(name, [])
        costs[name] = Cost(sum(p.numel() for p in module.parameters()), sum(macs for _, macs in calls))
        reason = reasons.get(module)
        if not reason and name in record.reads:
            reason = f"its {record.reads[name]} is read outside its own call, so the layer must stay."
        elif not reason and not calls:
            reason = "it is never called on the example inputs in evaluation mode."
        elif not reason and name in record.type_dependent:
            reason = "the network treats it by its type or its attributes, and would compute something else with other layers in its place."
        layers.append(Skip(name, reason) if reason else ConvSite(name, tuple(aliases), ConvSpec.of(module), tuple(s for s, _ in calls)))
    in_layers = sum(costs.values(), Cost(0, 0))
    registered = {id(p): p.numel() for layer in names for p in layer.parameters()}
    total = Cost(sum(p.numel() for p in model.parameters()), in_layers.macs)
    outside = Cost(total.params - sum(registered.values()) + record.unregistered_params, record.macs - in_layers.macs)
    called = list(record.calls)  # by their first call
    convolutions = [name for name in called if not isinstance(model.get_submodule(name), nn.Linear)]
    ends = tuple(dict.fromkeys(convolutions[:1] + called[-1:]))
    types = {name: tuple(class_path(kind) for kind in type(layer).__mro__ if kind is not object) for layer, (name, *_) in names.items()}
    return Survey(tuple(layers), costs, total, outside, record.unregistered_params, ends, types)

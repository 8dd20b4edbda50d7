"""Every registered scheme, against the layer it replaces: one table of geometries drives them all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dsconv_surgery import register_scheme, schemes
from dsconv_surgery.network.discovery import ConvSite
from dsconv_surgery.network.geometry import ConvSpec, Rank, chain_cost
from dsconv_surgery.planning.damage import DamageEstimator
from dsconv_surgery.planning.option_errors import OptionErrors
from dsconv_surgery.schemes import als
from dsconv_surgery.support.cache import Cache

EVERY = schemes.scheme_names()
CLOSED_FORM = ("depthwise", "pointwise_depthwise", "spatial", "channel", "bottleneck")
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Conv2d:
    """A float64 convolution over the whole range of geometries that torch takes."""
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (7, 7), (3, 1), (1, 5), (2, 3)]))
    groups = draw(st.sampled_from(["one", "two", "depthwise"]))
    channels = draw(st.sampled_from([2, 4, 6]))
    out = channels * draw(st.sampled_from([1, 2])) if groups == "depthwise" else draw(st.sampled_from([2, 4, 8]))
    padding: str | int | tuple[int, int] = draw(st.sampled_from(["same", "valid", 0, 1, (2, 1), (0, 3)]))
    stride = (1, 1) if padding == "same" else draw(st.sampled_from([(1, 1), (2, 2), (2, 1)]))
    return nn.Conv2d(
        channels,
        out,
        kernel,
        stride=stride,
        padding=padding,
        dilation=draw(st.sampled_from([1, 2, (1, 3)])),
        groups={"one": 1, "two": 2, "depthwise": channels}[groups],
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=torch.float64,
    )


def cut(scheme_name: str, conv: nn.Module, rank: Rank | None = None) -> nn.Sequential:
    scheme, spec = schemes.get_scheme(scheme_name), ConvSpec.of(conv)
    rank = full_rank(scheme_name, spec) if rank is None else rank
    factors = next(schemes.factorize(scheme, spec, conv.get_parameter("weight"), [rank]))
    return schemes.build(schemes.chain_of(scheme, spec, rank), conv, factors)


def full_rank(scheme_name: str, spec: ConvSpec) -> Rank:
    return schemes.get_scheme(scheme_name).full_rank(spec.one_group())


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=120, deadline=None)
@given(conv=convolutions(), seed=st.integers(0, 9))
def test_full_rank_reproduces_the_layer(name: str, conv: nn.Conv2d, seed: int) -> None:
    """Same outputs to 1e-10, same output size, and the cost that the chain's geometry says - or a refusal in a sentence."""
    spec = ConvSpec.of(conv)
    why = schemes.refusal(schemes.get_scheme(name), spec)
    if why is not None:
        assert why.endswith(".")
        assert len(why) > 20
        return
    x = torch.randn(2, spec.in_channels, 23, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    chain = cut(name, conv)
    expected = conv(x)
    assert relative(chain(x), expected) <= 1e-10
    assert sum(p.numel() for p in chain.parameters()) == sum(
        s.params for s in schemes.chain_of(schemes.get_scheme(name), spec, full_rank(name, spec)).values()
    )
    assert spec.out_size((2, 23, 21)) == (2, *expected.shape[2:])


@pytest.mark.parametrize("name", EVERY)
def test_exact_from_full_rank_on_and_for_linear_layers(name: str) -> None:
    """Only bottleneck takes linear layers and 1x1 kernels; the stride of the latter sits on its first link."""
    linear, pointwise = nn.Linear(12, 7, dtype=torch.float64), nn.Conv2d(12, 7, 1, stride=2, padding=1, dtype=torch.float64)
    for layer, x in ((linear, torch.randn(5, 3, 12, dtype=torch.float64)), (pointwise, torch.randn(2, 12, 9, 8, dtype=torch.float64))):
        if name == "bottleneck":
            chain = cut(name, layer)
            assert relative(chain(x), layer(x)) <= 1e-10
            assert [type(link) for link in chain] == [type(layer)] * 2
        else:
            assert "bottleneck" in str(schemes.refusal(schemes.get_scheme(name), ConvSpec.of(layer)))


GEOMETRIES = [
    nn.Conv2d(6, 8, 3, padding=1, bias=False),
    nn.Conv2d(8, 12, (3, 2), groups=2),
    nn.Conv2d(6, 6, 3, groups=6),
    nn.Conv2d(9, 4, (1, 5)),
    nn.Conv2d(10, 6, 1),
]


def _workings(conv: nn.Conv2d) -> OptionErrors:
    """A layer by itself, judged by its weights."""
    site = ConvSite("layer", (), ConvSpec.of(conv), ((1, 16, 16),))
    return OptionErrors(site, conv, EVERY, DamageEstimator(conv, [site], None, Cache(False)))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("at", range(len(GEOMETRIES)))
def test_errors_reported_are_errors_measured_at_every_rank(name: str, at: int) -> None:
    """What a table says about a rank is what the factors of that rank do, to 1e-8 either way; bounds are never too low."""
    conv = GEOMETRIES[at].double()
    spec, scheme = ConvSpec.of(conv), schemes.get_scheme(name)
    if schemes.refusal(scheme, spec):
        pytest.skip(f"refused: {schemes.refusal(scheme, spec)}")
    workings = _workings(conv)
    ranks = list(scheme.ranks(spec.one_group()))
    bounds = workings.bounds(name, ranks)
    for number, rank in enumerate(ranks):
        chain = cut(name, conv, rank)
        kernel = schemes.kernel_of(scheme, spec, {k: grouped(spec, link.get_parameter("weight")) for k, link in chain.named_children()})
        weight = conv.weight.detach()
        measured = float((weight - kernel).square().sum() / weight.square().sum())
        assert abs(workings.measure(name, rank) - measured) <= 1e-8
        if bounds is not None:
            assert bounds[number] >= measured - 1e-8
            if name in CLOSED_FORM:
                assert abs(bounds[number] - measured) <= 1e-8


def grouped(spec: ConvSpec, weight: Tensor) -> Tensor:
    return weight.detach().reshape(spec.groups, -1, *weight.shape[1:])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("at", range(len(GEOMETRIES)))
def test_error_never_increases_with_rank(name: str, at: int) -> None:
    """Along one call's curve; for Tucker against every smaller pair."""
    conv = GEOMETRIES[at].double()
    spec, scheme = ConvSpec.of(conv), schemes.get_scheme(name)
    if schemes.refusal(scheme, spec):
        pytest.skip(f"refused: {schemes.refusal(scheme, spec)}")
    ranks = list(scheme.ranks(spec.one_group()))
    errors = [
        schemes.relative_error(conv.weight, schemes.kernel_of(scheme, spec, factors))
        for factors in schemes.factorize(scheme, spec, conv.weight, ranks)
    ]
    assert errors[-1] <= 1e-20
    for rank, error in zip(ranks, errors, strict=True):
        for smaller, worse in zip(ranks, errors, strict=True):
            if isinstance(rank, int) and isinstance(smaller, int):
                above = smaller <= rank
            else:
                above = not isinstance(rank, int) and not isinstance(smaller, int) and smaller[0] <= rank[0] and smaller[1] <= rank[1]
            if above:
                assert error <= worse + 1e-12


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_closed_forms_are_optimal(name: str) -> None:
    """The error equals that of numpy's full SVD of the unfolding that MATHS names, at every rank."""
    conv = nn.Conv2d(6, 8, 1 if name == "bottleneck" else 3).double()
    w = conv.weight.detach().numpy()
    unfoldings = {
        "depthwise": [w[:, i].reshape(8, -1) for i in range(6)],
        "pointwise_depthwise": [w[o].reshape(6, -1) for o in range(8)],
        "spatial": [w.transpose(1, 2, 0, 3).reshape(w.shape[1] * w.shape[2], -1)],
        "channel": [w.reshape(8, -1)],
        "bottleneck": [w.reshape(8, -1)],
    }[name]
    import numpy as np

    squares = [np.linalg.svd(m, compute_uv=False) ** 2 for m in unfoldings]
    full = full_rank(name, ConvSpec.of(conv))
    assert isinstance(full, int)
    bounds = _workings(conv).bounds(name, range(1, full + 1))
    assert bounds is not None
    for rank, error in enumerate(bounds, 1):
        optimum = sum(s[rank:].sum() for s in squares) / (w**2).sum()
        assert abs(error - optimum) <= 1e-12


@pytest.mark.parametrize(("name", "rank"), [("cp", 6), ("cp_split", 6), ("tucker", (3, 4))])
def test_iterative_schemes_find_a_planted_structure(name: str, rank: Rank) -> None:
    """A kernel that has the scheme's form at a rank is recovered exactly in most of eight draws, and nearly in the others; groups too."""
    scheme = schemes.get_scheme(name)
    spec = ConvSpec(16, 20, (3, 3), groups=2)
    errors: list[float] = []
    for seed in range(8):
        torch.manual_seed(seed)
        chain = schemes.chain_of(scheme, spec, rank)
        planted = {link: grouped(spec, torch.randn(s.weight_shape, dtype=torch.float64)) for link, s in chain.items()}
        weight = schemes.kernel_of(scheme, spec, planted)
        found = next(schemes.factorize(scheme, spec, weight, [rank]))
        errors.append(schemes.relative_error(weight, schemes.kernel_of(scheme, spec, found)))
    assert sum(error <= 1e-12 for error in errors) >= 6
    assert max(errors) <= 0.1


def test_cp_is_no_worse_than_depthwise_of_the_same_rank() -> None:
    """CP contains depthwise with m kernels at R = m I, and its search starts there."""
    conv = nn.Conv2d(8, 12, 3).double()
    workings = _workings(conv)
    for m in (1, 2, 4):
        assert workings.measure("cp", 8 * m) <= workings.measure("depthwise", m)


def test_cp_minds_what_the_channels_have_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    """The response to an input that is the same in all channels is off by less than a least-squares fit of the weights leaves it."""
    # no import

    scheme, spec = schemes.get_scheme("cp"), ConvSpec(24, 24, (3, 3))
    weight = torch.randn(spec.weight_shape, dtype=torch.float64)

    def off() -> float:
        found = schemes.kernel_of(scheme, spec, next(schemes.factorize(scheme, spec, weight, [20])))
        return float((weight - found).sum(1).square().sum() / weight.sum(1).square().sum())

    minded = off()
    monkeypatch.setattr(als, "COMMON", 0.0)
    assert minded < 0.5 * off()


def test_depthwise_weights_fit_the_building_block() -> None:
    """The state_dict of a cut fits DepthwiseSeparableConv2d, and both compute the same."""
    from dsconv_surgery import DepthwiseSeparableConv2d

    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1)
    chain = cut("depthwise", conv, 2)
    block = DepthwiseSeparableConv2d(6, 8, kernels_per_layer=2, stride=2, padding=1)
    block.load_state_dict(chain.state_dict())
    x = torch.randn(2, 6, 9, 9)
    assert torch.equal(block(x), chain(x))


@settings(max_examples=60, deadline=None)
@given(conv=convolutions(), m=st.integers(1, 3))
def test_costs_are_those_of_the_layers(conv: nn.Conv2d, m: int) -> None:
    """Predicted MACs against torch's flop counter, as integers, for the layer and for chains cut from it."""
    from torch.utils.flop_counter import FlopCounterMode

    spec = ConvSpec.of(conv)
    x = torch.randn(2, spec.in_channels, 23, 21, dtype=torch.float64)
    layers: list[tuple[nn.Module, dict[str, ConvSpec]]] = [(conv, {"dense": spec})]
    for name in ("depthwise", "pointwise_depthwise", "spatial", "channel"):
        scheme = schemes.get_scheme(name)
        full = full_rank(name, spec)
        if not schemes.refusal(scheme, spec) and isinstance(full, int) and m <= full:
            layers.append((cut(name, conv, m), schemes.chain_of(scheme, spec, m)))
    for layer, chain in layers:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x)
        cost = chain_cost(chain, ((2, 23, 21),))
        assert cost.macs == counter.get_total_flops() // 2
        assert cost.params == sum(p.numel() for p in layer.parameters())


def test_a_new_scheme_is_one_class_and_one_registration() -> None:
    """Registered, it is found by name, planned with and cut with; its name cannot be taken twice."""
    from dsconv_surgery import Budget, compress

    class Narrow(type(schemes.get_scheme("channel"))):  # type: ignore[misc]
        name = "narrow"

    try:
        register_scheme(Narrow())
        with pytest.raises(ValueError, match="narrow"):
            register_scheme(Narrow())
        small = compress(nn.Sequential(nn.Conv2d(8, 16, 3)), torch.rand(1, 8, 9, 9), budget=Budget(macs=0.5), schemes="narrow")
        assert small.plan.cuts[0].scheme == "narrow"
        assert small.report.macs_saved >= 0.5
    finally:
        schemes._SCHEMES.pop("narrow", None)


def test_tensorly_is_left_as_found() -> None:
    """Its backend is global state; factorising does not even import it."""
    import subprocess
    import sys

    code = """
import dsconv_surgery, sys, torch
dsconv_surgery.compress(torch.nn.Conv2d(8, 8, 3), torch.rand(1, 8, 9, 9))
assert "tensorly" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_full_rank_is_finite_and_assumed_ranks_are_checked() -> None:
    """The largest rank of each scheme is what MATHS says, and one more is refused with the layer named."""
    spec = ConvSpec(4, 6, (3, 3))
    expected = {"depthwise": 6, "pointwise_depthwise": 4, "cp": 24, "cp_split": 36, "tucker": (4, 6), "spatial": 12, "channel": 6}
    for name, full in expected.items():
        assert full_rank(name, spec) == full
        above = full + 1 if isinstance(full, int) else (full[0], full[1] + 1)
        with pytest.raises(ValueError, match=r"^stem: .*rank"):
            schemes.check_rank("stem", schemes.get_scheme(name), spec, above)

"""Each registered scheme against the layer that it replaces."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.tenalg import multi_mode_dot
from torch import Tensor, nn

from dsconv_surgery import register_scheme, schemes
from dsconv_surgery.network.discovery import ConvSite
from dsconv_surgery.network.geometry import ConvSpec, Rank, chain_cost
from dsconv_surgery.planning.damage import DamageEstimator
from dsconv_surgery.planning.option_errors import OptionErrors
from dsconv_surgery.schemes import Factors, Objective, Scheme, als, registry
from dsconv_surgery.support.cache import Cache

ALL = schemes.scheme_names()
CLOSED_FORM = ("depthwise", "pointwise_depthwise", "spatial", "channel", "bottleneck")
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Conv2d:
    """A float64 convolution of any geometry that torch supports."""
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


def relative(output: Tensor, expected: Tensor) -> float:
    return float((output - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=120, deadline=None)
@given(conv=convolutions(), seed=st.integers(0, 9))
def test_full_rank_reproduces_the_layer(name: str, conv: nn.Conv2d, seed: int) -> None:
    """Same outputs to 1e-10, same output size, as many parameters as the chain's geometry says; or a refusal, which is a sentence."""
    spec = ConvSpec.of(conv)
    reason = schemes.refusal(schemes.get_scheme(name), spec)
    if reason is not None:
        assert reason.endswith(".")
        assert len(reason) > 20
        return
    x = torch.randn(2, spec.in_channels, 23, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    chain = cut(name, conv)
    expected = conv(x)
    assert relative(chain(x), expected) <= 1e-10
    assert sum(p.numel() for p in chain.parameters()) == sum(
        s.params for s in schemes.chain_of(schemes.get_scheme(name), spec, full_rank(name, spec)).values()
    )
    assert spec.out_size((2, 23, 21)) == (2, *expected.shape[2:])


@pytest.mark.parametrize("name", ALL)
def test_only_bottleneck_takes_layers_without_taps(name: str) -> None:
    """Bottleneck is exact for linear layers and strided 1x1 kernels; the refusals of the others name it."""
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


def _option_errors(conv: nn.Conv2d) -> OptionErrors:
    """The errors of one layer's options, from its weights."""
    site = ConvSite("layer", (), ConvSpec.of(conv), ((1, 16, 16),))
    return OptionErrors(site, conv, ALL, DamageEstimator(conv, [site], None, Cache(False)))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("index", range(len(GEOMETRIES)))
def test_reported_errors_are_measured_errors_at_every_rank(name: str, index: int) -> None:
    """The error in the planner's table is that of the factors, to 1e-8; bounds are never too low, and exact for closed forms."""
    conv = GEOMETRIES[index].double()
    spec, scheme = ConvSpec.of(conv), schemes.get_scheme(name)
    if schemes.refusal(scheme, spec):
        pytest.skip(f"refused: {schemes.refusal(scheme, spec)}")
    option_errors = _option_errors(conv)
    ranks = list(scheme.ranks(spec.one_group()))
    bounds = option_errors.bounds(name, ranks)
    for position, rank in enumerate(ranks):
        chain = cut(name, conv, rank)
        kernel = schemes.kernel_of(scheme, spec, {k: grouped(spec, link.get_parameter("weight")) for k, link in chain.named_children()})
        weight = conv.weight.detach()
        measured = float((weight - kernel).square().sum() / weight.square().sum())
        assert abs(option_errors.measure(name, rank) - measured) <= 1e-8
        if bounds is not None:
            assert bounds[position] >= measured - 1e-8
            if name in CLOSED_FORM:
                assert abs(bounds[position] - measured) <= 1e-8


def grouped(spec: ConvSpec, weight: Tensor) -> Tensor:
    return weight.detach().reshape(spec.groups, -1, *weight.shape[1:])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("index", range(len(GEOMETRIES)))
def test_error_never_increases_with_rank(name: str, index: int) -> None:
    """Along the ranks of one call; for pairs, against each pair that is smaller in both."""
    conv = GEOMETRIES[index].double()
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
                comparable = smaller <= rank
            else:
                comparable = not isinstance(rank, int) and not isinstance(smaller, int) and smaller[0] <= rank[0] and smaller[1] <= rank[1]
            if comparable:
                assert error <= worse + 1e-12


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_closed_forms_are_optimal(name: str) -> None:
    """The error at every rank equals that of numpy's full SVD of the unfolding."""
    conv = nn.Conv2d(6, 8, 1 if name == "bottleneck" else 3).double()
    w = conv.weight.detach().numpy()
    unfoldings = {
        "depthwise": [w[:, i].reshape(8, -1) for i in range(6)],
        "pointwise_depthwise": [w[o].reshape(6, -1) for o in range(8)],
        "spatial": [w.transpose(1, 2, 0, 3).reshape(w.shape[1] * w.shape[2], -1)],
        "channel": [w.reshape(8, -1)],
        "bottleneck": [w.reshape(8, -1)],
    }[name]
    squares = [np.linalg.svd(m, compute_uv=False) ** 2 for m in unfoldings]
    full = full_rank(name, ConvSpec.of(conv))
    assert isinstance(full, int)
    bounds = _option_errors(conv).bounds(name, range(1, full + 1))
    assert bounds is not None
    for rank, error in enumerate(bounds, 1):
        optimum = sum(s[rank:].sum() for s in squares) / (w**2).sum()
        assert abs(error - optimum) <= 1e-12


@pytest.mark.parametrize(("name", "rank"), [("cp", 6), ("cp_split", 6), ("tucker", (3, 4))])
def test_iterative_schemes_recover_a_planted_structure(name: str, rank: Rank) -> None:
    """A grouped kernel of the scheme's form is recovered exactly in at least six of eight draws, and nearly in the others."""
    scheme = schemes.get_scheme(name)
    spec = ConvSpec(16, 20, (3, 3), groups=2)
    errors: list[float] = []
    for seed in range(8):
        torch.manual_seed(seed)
        chain = schemes.chain_of(scheme, spec, rank)
        planted = {link: grouped(spec, torch.randn(s.weight_shape, dtype=torch.float64)) for link, s in chain.items()}
        weight = schemes.kernel_of(scheme, spec, planted)
        factors = next(schemes.factorize(scheme, spec, weight, [rank]))
        errors.append(schemes.relative_error(weight, schemes.kernel_of(scheme, spec, factors)))
    assert sum(error <= 1e-12 for error in errors) >= 6
    assert max(errors) <= 0.1


def test_cp_is_no_worse_than_depthwise_of_the_same_rank() -> None:
    """CP contains depthwise with m kernels at R = m I, and its search starts there."""
    conv = nn.Conv2d(8, 12, 3).double()
    option_errors = _option_errors(conv)
    for m in (1, 2, 4):
        assert option_errors.measure("cp", 8 * m) <= option_errors.measure("depthwise", m)


def test_cp_preserves_the_mean_of_the_input_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that are the same in all channels have at most half the error of a plain least-squares fit of the weights."""
    scheme, spec = schemes.get_scheme("cp"), ConvSpec(24, 24, (3, 3))
    weight = torch.randn(spec.weight_shape, dtype=torch.float64)

    def error() -> float:
        kernel = schemes.kernel_of(scheme, spec, next(schemes.factorize(scheme, spec, weight, [20])))
        return float((weight - kernel).sum(1).square().sum() / weight.sum(1).square().sum())

    weighted = error()
    monkeypatch.setattr(als, "COMMON", 0.0)
    assert weighted < 0.5 * error()


def test_terms_do_not_cancel_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best terms of this kernel do not exist: without a penalty, the search follows ever larger terms to the limit of sweeps."""
    a, b = (torch.randn(3, 9, 4, dtype=torch.float64) for _ in range(2))
    parts = [(a[0], a[1], b[2]), (a[0], b[1], a[2]), (b[0], a[1], a[2])]
    tensor = sum(torch.einsum("or,ir,kr->oik", *part) for part in parts)[None]  # of border rank 8 at most, and of higher rank

    def energy() -> float:
        terms = next(als.decompose(tensor, (9,), [8], 81))
        return als._term_energy(terms) / float(als._kernel(terms).square().sum())

    penalized = energy()
    monkeypatch.setattr(als, "PENALTY", 0.0)
    assert penalized < 10
    assert energy() > 5 * penalized


@pytest.mark.parametrize("tap_shape", [(9,), (3, 3)], ids=["cp", "cp_split"])
def test_wide_layers_are_decomposed_as_in_float64(tap_shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rough terms of a wide layer differ from those of float64 arithmetic by rounding only."""
    left, right = (torch.randn(size, 96, dtype=torch.float64) for size in (128, 128 * 9))
    tensor = ((left * 0.97 ** torch.arange(96)) @ right.T).unflatten(1, (128, 9))[None]
    rank = 140
    assert tensor.numel() * rank > als.WIDE

    def terms() -> als.Terms:
        return next(als.decompose(tensor, tap_shape, [rank], 1152, rough=True))

    result = terms()
    assert {factor.dtype for factor in result} == {torch.float64}
    assert {factor.dtype for factor in als._in_precision(tensor, result)} == {torch.float32}
    monkeypatch.setattr(als, "_in_precision", lambda _tensor, terms: terms)
    monkeypatch.setattr(als, "RIDGE", als.SINGLE_RIDGE)
    for factor, exact in zip(result, terms(), strict=True):
        assert relative(factor, exact) < 3e-5


def test_depthwise_weights_fit_the_building_block() -> None:
    """The state_dict of a chain loads into DepthwiseSeparableConv2d, and both have the same outputs."""
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
    """Predicted MACs equal those of torch's flop counter, for the layer and for chains."""
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
    """A registered scheme is found by name, planned with and cut with; its name cannot be taken twice."""
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
        registry._SCHEMES.pop("narrow", None)


class Duck:
    """The methods of a scheme, without its base class."""

    name = "duck"
    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> object:
        if name.startswith("_") or name == "term_energy":
            raise AttributeError(name)
        return getattr(schemes.get_scheme("channel"), name)


def test_any_object_with_the_methods_of_a_scheme_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lacks a method is refused with the method's name."""
    monkeypatch.setattr(registry, "_SCHEMES", dict(registry._SCHEMES))
    with pytest.raises(TypeError, match=r"has no term_energy. Derive it from dsconv_surgery.schemes.Scheme"):
        register_scheme(Duck())  # type: ignore[arg-type]
    monkeypatch.setattr(Duck, "term_energy", lambda self, factors: None, raising=False)
    register_scheme(Duck())  # type: ignore[arg-type]
    conv = nn.Conv2d(6, 8, 3).double()
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    assert relative(cut("duck", conv)(x), conv(x)) <= 1e-10
    costs = [schemes.option_cost(schemes.get_scheme(name), ConvSpec.of(conv), 2, ((2, 9, 9),)) for name in ("duck", "channel")]
    assert costs[0] == costs[1]


class Dense(Scheme):
    """A 1x1 that copies the input, then the layer itself: only what the base class has no default for."""

    name = "dense"

    def full_rank(self, spec: ConvSpec) -> Rank:
        return 2, 3

    def chain(self, spec: ConvSpec, rank: Rank) -> dict[str, ConvSpec]:
        return {"copy": ConvSpec(spec.in_channels, spec.in_channels), "layer": spec}

    def factorize(self, spec: ConvSpec, weight: Tensor, ranks: list[Rank], rough: bool = False) -> Iterator[Factors]:
        eye = torch.eye(spec.in_channels, dtype=weight.dtype)[None, ..., None, None].expand(len(weight), *(-1,) * 4)
        yield from ({"copy": eye, "layer": weight} for _ in ranks)

    def kernel(self, spec: ConvSpec, factors: Factors) -> Tensor:
        return torch.einsum("gorhw,gri->goihw", factors["layer"], factors["copy"].flatten(2))


def test_defaults_of_the_base_class() -> None:
    """Layers without taps are refused; all ranks up to the full one are offered; no spectrum, no closed form, no terms."""
    scheme, spec = Dense(), ConvSpec(4, 6, (3, 3), groups=2, bias=True)
    assert "bottleneck" in str(schemes.refusal(scheme, ConvSpec(4, 6)))
    assert schemes.refusal(scheme, spec) is None
    assert list(scheme.ranks(spec)) == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    assert list(schemes.get_scheme("cp").ranks(ConvSpec(2, 3, (3, 3)))) == [1, 2, 3, 4, 5, 6]
    conv = nn.Conv2d(4, 6, 3, groups=2)
    factors = next(schemes.factorize(scheme, spec, conv.weight, [(2, 3)]))
    assert torch.equal(schemes.kernel_of(scheme, spec, factors).float(), conv.weight)
    assert schemes.spectrum(scheme, spec, conv.weight) is None
    assert schemes.degeneracy(scheme, spec, factors) is None
    assert not schemes.can_approximate(scheme)
    nothing = torch.zeros(1, 3, 18)
    with pytest.raises(NotImplementedError, match="has no factors on data"):
        scheme.approximate(spec.one_group(), schemes.Objective(nothing, nothing, torch.eye(18)[None], torch.zeros(1, 3, 3)), (1, 1))
    with pytest.raises(TypeError, match="abstract"):
        Scheme()  # type: ignore[abstract]


def test_degeneracy_is_the_energy_of_terms_that_cancel() -> None:
    """One for a single term; a term and minus half of it have five times the energy of their sum."""
    spec = ConvSpec(2, 2, (3, 3))
    for name, taps in (("cp", {"depthwise": torch.rand(1, 1, 1, 3, 3)}), ("cp_split", None)):
        scheme = schemes.get_scheme(name)
        taps = taps or {"vertical": torch.rand(1, 1, 1, 3, 1), "horizontal": torch.rand(1, 1, 1, 1, 3)}
        single = {"reduce": torch.rand(1, 1, 2, 1, 1), **taps, "expand": torch.rand(1, 2, 1, 1, 1)}
        assert schemes.degeneracy(scheme, spec, single) == pytest.approx(1.0)
        pair = {link: factor.repeat_interleave(2, 2 if link == "expand" else 1) for link, factor in single.items()}
        pair["reduce"][:, 1] *= 2
        pair["expand"][:, :, 1] *= -0.25
        assert schemes.degeneracy(scheme, spec, pair) == pytest.approx((1 + 0.25) / 0.25)
    assert schemes.degeneracy(schemes.get_scheme("channel"), spec, {}) is None


def test_pointwise_depthwise_is_fitted_to_layers_with_one_output_channel_per_group() -> None:
    """The last link is depthwise with one group, so all of its outputs share their features."""
    conv = nn.Conv2d(8, 2, 3, groups=2)
    scheme, spec = schemes.get_scheme("pointwise_depthwise"), ConvSpec.of(conv)
    weight = schemes.kernel_tensor(spec, conv.weight).flatten(2)
    patches = torch.randn(2, 200, weight.shape[2], dtype=torch.float64).cumsum(2)
    targets = patches @ weight.mT
    objective = Objective(weight, targets.mT @ patches, patches.mT @ patches, targets.mT @ targets)
    start = next(schemes.factorize(scheme, spec, conv.weight, [1]))
    fitted = schemes.fit(scheme, spec, conv.weight, 1, objective, start=start)
    errors = [objective.value(schemes.kernel_of(scheme, spec, factors).unflatten(0, (2, -1))) for factors in (fitted, start)]
    assert errors[0] < 0.9 * errors[1]


def test_only_tucker_imports_tensorly() -> None:
    """It takes a second to import."""
    code = """
import dsconv_surgery, sys, torch
for scheme, imported in (("cp", False), ("tucker", True)):
    dsconv_surgery.compress(torch.nn.Conv2d(8, 8, 3), torch.rand(1, 8, 9, 9), schemes=scheme)
    assert ("tensorly" in sys.modules) == imported, scheme
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(("in_all_threads", "in_this_thread"), list(product(("numpy", "pytorch"), repeat=2)))
def test_tucker_leaves_the_backend_of_tensorly(in_all_threads: str, in_this_thread: str) -> None:
    """Between two factorisations, after them and after an error: the caller may have chosen a backend, for one thread or for all."""
    scheme, spec = schemes.get_scheme("tucker"), ConvSpec(4, 6, (3, 3))

    def backends() -> list[str]:
        with ThreadPoolExecutor() as pool:
            return [pool.submit(tensorly.get_backend).result(), tensorly.get_backend()]

    before = tensorly.get_backend()
    try:
        tensorly.set_backend(in_all_threads)
        tensorly.set_backend(in_this_thread, local_threadsafe=True)
        for _ in schemes.factorize(scheme, spec, torch.randn(6, 4, 3, 3), [(1, 1), (2, 2)]):
            assert backends() == [in_all_threads, in_this_thread]
        schemes.spectrum(scheme, spec, torch.randn(6, 4, 3, 3))
        with pytest.raises(torch.linalg.LinAlgError):
            schemes.spectrum(scheme, spec, torch.full((6, 4, 3, 3), torch.nan))
        assert backends() == [in_all_threads, in_this_thread]
    finally:
        tensorly.set_backend(before)


def test_hooi_of_one_group_is_a_tucker_tensor() -> None:
    """Its reconstruction is the scheme's kernel, its factors are orthonormal, and its core is the kernel's projection on them."""
    from dsconv_surgery.schemes.hooi import hooi, hosvd

    scheme, spec = schemes.get_scheme("tucker"), ConvSpec(5, 6, (3, 2))
    weight = torch.randn(spec.weight_shape, dtype=torch.float64)
    tensor = weight.flatten(2)
    result = hooi(tensor, (4, 3), [hosvd(tensor)])
    factors = next(schemes.factorize(scheme, spec, weight, [(3, 4)]))
    assert result.rank == (4, 3, 6)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        assert relative(result.to_tensor().reshape(weight.shape), schemes.kernel_of(scheme, spec, factors)) <= 1e-14
        core = multi_mode_dot(tensor, result.factors, transpose=True)
    assert relative(result.core, core) <= 1e-14
    for factor in result.factors:
        assert relative(factor.T @ factor, torch.eye(factor.shape[1], dtype=torch.float64)) <= 1e-14


def test_ranks_above_the_full_rank_are_refused() -> None:
    """Full ranks are as the schemes define them; one more is refused with the layer's name."""
    spec = ConvSpec(4, 6, (3, 3))
    expected = {"depthwise": 6, "pointwise_depthwise": 4, "cp": 24, "cp_split": 36, "tucker": (4, 6), "spatial": 12, "channel": 6}
    for name, full in expected.items():
        assert full_rank(name, spec) == full
        above = full + 1 if isinstance(full, int) else (full[0], full[1] + 1)
        with pytest.raises(ValueError, match=r"^stem: .*rank"):
            schemes.check_rank("stem", schemes.get_scheme(name), spec, above)


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 4, 3, 9), (2, 3, 4, 4)], ids=str)
def test_components_of_slices_are_those_of_the_svd(shape: tuple[int, ...]) -> None:
    """Largest first, with orthonormal right vectors, also for a slice of zeros and one of rank one."""
    slices = torch.randn(shape, dtype=torch.float64)
    slices[0, 0] = 0
    slices[0, 1] = slices[0, 1, :, :1] * torch.ones(shape[3], dtype=torch.float64)
    scaled, values, right = als._components(slices)
    torch.testing.assert_close(scaled.mT @ right, slices, rtol=0, atol=1e-12)
    torch.testing.assert_close(values, torch.linalg.svdvals(slices), rtol=0, atol=1e-7)
    torch.testing.assert_close(right @ right.mT, torch.eye(right.shape[2], dtype=torch.float64).expand(*shape[:2], -1, -1))

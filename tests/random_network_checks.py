"""What has to hold for a random network: `check(description)` lists what does not, and `shrink` makes a failing network smaller.

The reference for a cut network is built without the library: the dense network, in which hooks replace the output of each cut layer by
the output of its chain.
"""

from __future__ import annotations

import io
import logging
import math
import random
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, is_dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from random_networks import DEFAULTS, IMAGES, Arguments, Case, Description, make_case
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from dsconv_surgery import Budget, Plan, apply_plan, compare, compress, find_convs, fold_back, load, make_plan, save
from dsconv_surgery.network.discovery import ConvSite, Skip
from dsconv_surgery.plan import Cut
from dsconv_surgery.schemes import get_scheme, scheme_names

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}  # norm of the difference over the norm of the outputs
CALIBRATED = 0.4  # share of the networks that are calibrated, too
ITERATIVE = ("cp", "cp_split", "tucker")  # only for small layers, for time
SMALL = 1500  # weights
EXACT = ("spatial", "channel", "depthwise", "pointwise_depthwise", "tucker", "bottleneck")  # closed forms: exact at full rank
# torch's own, once in a process, for the dense network too; and what is true of random networks with small layers.
EXPECTED_WARNINGS = ("padding='same' with even kernel lengths", "weights look untrained", "chains are known to be slow")


@dataclass(frozen=True)
class Failure:
    """A check that failed, and why."""

    check: str
    message: str
    trace: str = ""

    @property
    def kind(self) -> str:
        """The failure without numbers and names of layers, to count failures of the same kind."""
        text = re.sub(r"[\w.]*\d[\w.]*", "N", self.message)
        return f"{self.check}: {text[:110]}"


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _noticed(failures: list[Failure], name: str, expected: str | None) -> Iterator[None]:
    """Add exceptions, unexpected warnings and log lines of a check to the failures."""
    log, loggers, printed = _Log(), [logging.getLogger(), logging.getLogger("torch")], io.StringIO()
    for logger in loggers:
        logger.addHandler(log)
    try:
        with warnings.catch_warnings(record=True) as caught, redirect_stderr(printed):
            warnings.simplefilter("always")
            yield
    except AssertionError as error:
        failures.append(Failure(name, str(error)))
    except Exception as error:
        failures.append(Failure(name, f"{type(error).__name__}: {error}", traceback.format_exc()))
    finally:
        for logger in loggers:
            logger.removeHandler(log)
    texts = [f"warning {w.category.__name__}: {w.message}" for w in caught] + [f"log: {line}" for line in log.lines]
    texts += [f"printed: {printed.getvalue().strip()}"] if printed.getvalue().strip() else []
    ignored = (*EXPECTED_WARNINGS, *((expected,) if expected else ()))
    failures += [Failure(name, text) for text in dict.fromkeys(texts) if not any(word in text for word in ignored)]


# --- running networks ------------------------------------------------------------------------------------------------------------
def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if is_dataclass(output) or isinstance(output, SimpleNamespace):
        output = vars(output)
    items = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


def run(model: nn.Module, inputs: Arguments, seed: int = 1) -> list[Tensor]:
    """Outputs without gradients; each run with the same seed draws the same random numbers."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return [tensor.clone() for tensor in tensors_of(inputs.call(model))]


def difference(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """The norm of the difference over the norm of what was expected."""
    assert [t.shape for t in outputs] == [t.shape for t in expected], "the outputs have other shapes"
    assert all(bool(t.isfinite().all()) for t in outputs), "outputs are not finite"
    squares = sum(float((a - b).double().square().sum()) for a, b in zip(outputs, expected, strict=True))
    return (squares / max(sum(float(b.double().square().sum()) for b in expected), 1e-300)) ** 0.5


def copy_of(case: Case, model: nn.Module) -> nn.Module:
    """Another network of the case with the weights of `model`, made without the library."""
    other = case.build(0)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


def reference(case: Case, model: nn.Module, cut: nn.Module, plan: Plan) -> nn.Module:
    """The dense network, in which hooks replace the output of each cut layer by that of its chain; BatchNorm as in the cut network."""
    other, shared = copy_of(case, model), cut.state_dict()
    other.load_state_dict({name: shared.get(name, value) for name, value in model.state_dict().items()})
    for planned in plan.cuts:
        chain = cut.get_submodule(planned.name)
        other.get_submodule(planned.name).register_forward_hook(
            lambda layer, args, kwargs, output, chain=chain: chain(*args, **kwargs), with_kwargs=True, prepend=True
        )
    return other


def counted_macs(model: nn.Module, inputs: Arguments) -> int:
    with FlopCounterMode(display=False) as counter:
        run(model.eval(), inputs)
    return counter.get_total_flops() // 2


def state(model: nn.Module) -> dict[str, Any]:
    """All that must not change: values, modes, flags."""
    tensors = {name: (t.detach().clone(), t.requires_grad) for name, t in (*model.named_parameters(), *model.named_buffers())}
    return tensors | {f"{name}:": (type(module), module.training, set(vars(module))) for name, module in model.named_modules()}


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def equal(a: Any, b: Any) -> bool:
        return a[1:] == b[1:] and (torch.equal(a[0], b[0]) if isinstance(a[0], Tensor) else a[0] is b[0])

    return [name for name in {**before, **after} if name not in before or name not in after or not equal(before[name], after[name])]


# --- plans -----------------------------------------------------------------------------------------------------------------------
def schemes_for(site: ConvSite, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if get_scheme(name).refuses(site.spec.one_group()) is None]


def plan_with(plan: Plan, sites: list[ConvSite], choose: Callable[[ConvSite], tuple[str, Any] | None]) -> Plan:
    """A plan that cuts each site as chosen."""
    chosen = [(site, choice) for site in sites if (choice := choose(site))]
    cuts = tuple(Cut(site.name, *choice, site.spec, site.sizes) for site, choice in chosen)
    names = {cut.name for cut in cuts}
    return replace(plan, cuts=cuts, skips=tuple(skip for skip in plan.skips if skip.name not in names))


def full_rank(rng: random.Random, site: ConvSite) -> tuple[str, Any] | None:
    names = schemes_for(site, EXACT)
    scheme = rng.choice(names) if names else None
    return (scheme, get_scheme(scheme).full_rank(site.spec.one_group())) if scheme else None


def low_rank(rng: random.Random, site: ConvSite) -> tuple[str, Any] | None:
    small = math.prod(site.spec.weight_shape) <= SMALL
    names = schemes_for(site, tuple(name for name in scheme_names() if small or name not in ITERATIVE))
    if not names or rng.random() < 0.15:
        return None
    scheme = rng.choice(names)
    full = get_scheme(scheme).full_rank(site.spec.one_group())
    ranks = tuple(rng.randint(1, max(1, round(0.6 * r))) for r in (full if isinstance(full, tuple) else (full,)))
    return scheme, ranks if isinstance(full, tuple) else ranks[0]


def settings_for(rng: random.Random, model: nn.Module, inputs: Arguments, sites: list[ConvSite]) -> dict[str, Any]:
    """Random settings of a plan that the network can meet."""
    names = ["channel", "bottleneck"]  # in closed form, so quick
    if len(sites) <= 4 and all(math.prod(site.spec.weight_shape) <= SMALL for site in sites):
        names.append(rng.choice([name for name in scheme_names() if name not in (*names, "tucker")]))
    lowest = make_plan(model, *inputs.args, example_kwargs=inputs.kwargs or None, schemes=names, rule="fixed", rank=1, cache=False)
    if rng.random() < 0.4:
        return {"schemes": names, "rule": "fixed", "rank": rng.choice((1, 2, 3))}
    measure = rng.choice(("macs", "params"))
    fraction = getattr(lowest.total_after, measure) / getattr(lowest.total, measure)
    budget = Budget(**{measure: min(fraction + rng.uniform(0.2, 0.8) * (1 - fraction), 1.0)})
    return {"schemes": names, "rule": rng.choice(("budget", "budget", "uniform", "equal_error")), "budget": budget}


# --- checks ----------------------------------------------------------------------------------------------------------------------
class Check:
    """The checks of one network; each adds to `failures`."""

    def __init__(self, description: Description, calibrated: bool) -> None:
        self.case, self.rng, self.failures = make_case(description), random.Random(description.seed), []
        self.is_calibrated = calibrated
        self.tolerance = TOLERANCE[(DEFAULTS | description.features)["dtype"]]
        self.model, self.inputs = self.case.build(description.seed), self.case.inputs
        self.args, self.keywords = self.inputs.args, {"example_kwargs": self.inputs.kwargs} if self.inputs.kwargs else {}
        self.outputs = run(copy_of(self.case, self.model), self.inputs)
        assert all(bool(t.isfinite().all()) for t in self.outputs), "the dense outputs are not finite: mend the generator"
        self.tolerance = max(self.tolerance, 100 * self.rounding())

    def noticed(self, name: str) -> Any:
        return _noticed(self.failures, name, self.case.warned)

    def rounding(self) -> float:
        """How far outputs move if weights are rounded; a normalisation of activations that hardly vary makes this large."""
        other = copy_of(self.case, self.model)
        for parameter in other.parameters():
            parameter.data *= 1 + torch.finfo(parameter.dtype).eps * torch.randn_like(parameter)
        outputs = run(other, self.inputs)
        return 0.0 if self.case.depends_on_values else difference(outputs, self.outputs)

    def run_all(self) -> list[Failure]:
        before = state(self.model)
        if self.case.refused:
            with self.noticed("refusal"):
                self.refuses()
            return self.failures
        with self.noticed("find"):
            self.find()
        if self.failures or not self.sites:
            return self.failures
        for name in ("full rank", "reduced rank", *(("calibrated",) if self.is_calibrated else ())):
            with self.noticed(name):
                getattr(self, name.replace(" ", "_"))()
            problems = changed(before, state(self.model))
            if problems:
                self.failures.append(Failure(name, f"the dense model changed: {problems[:3]}"))
                break
        return self.failures

    def refuses(self) -> None:
        message = "it was not refused"
        try:
            plan = make_plan(self.model, *self.args, **self.keywords, schemes=("channel", "bottleneck"), rule="fixed", rank=1, cache=False)
            apply_plan(self.model, plan, *self.args, **self.keywords)
        except (ValueError, TypeError) as error:
            message = str(error)
        assert self.case.refused in message, f"expected an error that names {self.case.refused!r}, got: {message}"

    def find(self) -> None:
        layers = find_convs(self.model, *self.args, **self.keywords)
        kinds = nn.modules.conv._ConvNd | nn.Linear
        names = {name for name, module in self.model.named_modules() if isinstance(module, kinds)}
        missing = names - {layer.name for layer in layers}
        assert not missing, f"neither site nor skip: {missing}"
        self.sites = [layer for layer in layers if isinstance(layer, ConvSite)]
        if not self.sites:
            return
        plan = make_plan(self.model, *self.args, **self.keywords, schemes=("channel", "bottleneck"), rule="fixed", rank=1, cache=False)
        self.base = replace(plan, skips=(*plan.skips, *(Skip(cut.name, "not chosen.") for cut in plan.cuts)), cuts=())

    def full_rank(self) -> None:
        plan = plan_with(self.base, self.sites, lambda site: full_rank(self.rng, site))
        cut = apply_plan(self.model, plan, *self.args, **self.keywords)
        error = difference(run(cut, self.inputs), self.outputs)
        assert error < self.tolerance, f"outputs differ from the dense network's by {error:.1e}"

    def reduced_rank(self) -> None:
        if self.rng.random() < 0.5:
            plan = plan_with(self.base, self.sites, lambda site: low_rank(self.rng, site))
            cut = apply_plan(self.model, plan, *self.args, **self.keywords)
        else:
            plan = make_plan(
                self.model, *self.args, **self.keywords, cache=False, **settings_for(self.rng, self.model, self.inputs, self.sites)
            )
            cut = apply_plan(self.model, plan, *self.args, **self.keywords)
        shared, before = cut.state_dict(), self.model.state_dict()
        assert all(torch.equal(before[name], value) for name, value in shared.items() if name in before), "values of other layers changed"
        self.check_cut(cut, plan)

    def check_cut(self, cut: nn.Module, plan: Plan) -> None:
        """What has to hold for every cut network."""
        assert type(cut) is type(self.model) or isinstance(self.model, fx.GraphModule), f"the class became {type(cut)}"
        modes = {name: module.training for name, module in self.model.named_modules()}
        assert all(module.training == modes[name] for name, module in cut.named_modules() if name in modes), "training flags differ"
        before = {name: tensor.clone() for name, tensor in cut.state_dict().items()}
        outputs = run(cut, self.inputs)
        expected = run(reference(self.case, self.model, cut, plan), self.inputs)
        error = difference(outputs, expected)
        assert error < self.tolerance, f"outputs differ from the reference by {error:.1e}"
        cut.load_state_dict(before)
        self.check_costs(cut, plan)
        self.check_gradients(cut.train(self.model.training), plan)
        cut.load_state_dict(before)
        with tempfile.TemporaryDirectory() as folder:
            save(cut, folder, plan)
            loaded = load(self.case.build(99), folder)
        saved = difference(run(loaded.train(self.model.training), self.inputs), outputs)
        assert saved == 0, f"outputs differ after save and load by {saved:.1e}"
        folded = difference(run(fold_back(cut, plan), self.inputs), outputs)
        assert folded < self.tolerance, f"outputs differ after fold_back by {folded:.1e}"

    def check_costs(self, cut: nn.Module, plan: Plan) -> None:
        report = compare(self.model, cut, *self.args, **self.keywords, plan=plan)
        for name, model, cost, planned in (("dense", self.model, report.before, plan.total), ("cut", cut, report.after, plan.total_after)):
            params = sum(p.numel() for p in model.parameters())
            assert cost.params == planned.params == params, f"{name} params: report {cost.params}, plan {planned.params}, counted {params}"
            may_differ = name == "cut" and self.case.depends_on_values  # the cut network may run other layers
            assert cost.macs == planned.macs or may_differ, f"{name} MACs: report {cost.macs}, plan {planned.macs}"
        for name, model, macs in (
            ("dense", copy_of(self.case, self.model), report.before.macs + report.outside_before.macs),
            ("cut", cut, report.after.macs + report.outside_after.macs),
        ):
            counted = counted_macs(model, self.inputs)  # in evaluation mode, as the report counts
            assert macs == counted, f"{name} MACs: report {macs}, counted {counted}"

    def check_gradients(self, cut: nn.Module, plan: Plan) -> None:
        dense = copy_of(self.case, self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                reached = with_gradient(dense, self.inputs)
            except RuntimeError:  # the dense network cannot be trained, because of an operation in place
                return
        after = with_gradient(cut, self.inputs)
        for planned in plan.cuts:
            if f"{planned.name}.weight" in reached:
                missing = {f"{planned.name}.{link}.weight" for link in planned.chain} - after
                assert not missing, f"no gradient: {missing}"

    def calibrated(self) -> None:
        """Compress for random images: finite errors, and outputs no worse than without the images."""
        settings, batches = settings_for(self.rng, self.model, self.inputs, self.sites), [inputs.batch for inputs in self.case.batches]
        small = compress(self.model, *self.args, **self.keywords, calibration=batches, cache=False, **settings)
        plan = small.plan
        for planned in plan.cuts:
            error = planned.error
            assert error is not None, f"no error of {planned.name}"
            assert -1e-9 <= error <= 1.1, f"{planned.scheme} of rank {planned.rank}: error {error}"
        self.check_cut(small.model, plan)
        if not plan.cuts:
            return
        errors = self.errors(small.model, plan)
        if not self.case.depends_on_values and is_worse(*errors):  # otherwise the networks may run other layers
            # Errors of several layers may cancel by chance, without the images, too; those of one layer cannot.
            for planned in plan.cuts:
                alone = replace(plan, cuts=(planned,), skips=(*plan.skips, *(Skip(c.name, "dense.") for c in plan.cuts if c != planned)))
                cut = apply_plan(self.model, alone, *self.args, **self.keywords, calibration=batches)
                alone_errors = self.errors(cut, alone)
                assert not is_worse(*alone_errors), (
                    f"calibrated outputs are worse: error {errors[0]:.2e}, without images {errors[1]:.2e}; with {planned.name} cut alone "
                    f"{alone_errors[0]:.2e}, {alone_errors[1]:.2e}"
                )
        report = compare(self.model, small.model, *self.args, **self.keywords, plan=plan, data=batches)
        error = report.fidelity.error
        assert abs(error - errors[0]) <= 0.01 * errors[0] + 1e-9, f"compare reports the error {error:.3e}, measured {errors[0]:.3e}"

    def errors(self, calibrated: nn.Module, plan: Plan) -> tuple[float, float]:
        """Squared relative errors of the outputs on the calibration images: of the calibrated network, and of one cut without images."""
        free = apply_plan(self.model, replace(plan, calibrated=False), *self.args, **self.keywords)
        dense, errors = copy_of(self.case, self.model).eval(), []
        for cut in (calibrated.eval(), free.eval()):
            # The library seeds by the number of a batch's first image.
            firsts = [index * IMAGES for index in range(len(self.case.batches))]
            pairs = [(run(cut, i, first), run(dense, i, first)) for first, i in zip(firsts, self.case.batches, strict=True)]
            outputs, expected = ([t for pair in pairs for t in pair[k]] for k in (0, 1))
            errors.append(difference(outputs, expected) ** 2)
        return errors[0], errors[1]


def is_worse(error: float, without_images: float) -> bool:
    return error > 1.1 * without_images + 1e-6


def with_gradient(model: nn.Module, inputs: Arguments) -> set[str]:
    """The parameters that a loss gives a gradient."""
    torch.manual_seed(1)
    losses = [tensor.square().mean() for tensor in tensors_of(inputs.call(model)) if tensor.requires_grad]
    if losses:
        sum(losses).backward()
    reached = {name for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    model.zero_grad()
    return reached


def check(description: Description, calibrated: bool | None = None) -> list[Failure]:
    """What does not hold for a network."""
    return Check(description, is_calibrated(description) if calibrated is None else calibrated).run_all()


def is_calibrated(description: Description) -> bool:
    return random.Random(description.seed + 1).random() < CALIBRATED


def shrink(description: Description, kind: str, calibrated: bool | None = None) -> Description:
    """A smaller network with a failure of the same kind: fewer blocks, default features."""

    def fails(candidate: Description) -> bool:
        try:
            return any(failure.kind == kind for failure in check(candidate, calibrated))
        except Exception:
            return False

    changed_one = True
    while changed_one:
        changed_one = False
        smaller = [
            replace(description, blocks=description.blocks[:i] + description.blocks[i + 1 :]) for i in range(len(description.blocks))
        ]
        smaller = [candidate for candidate in smaller if candidate.blocks]
        for name, value in description.features.items():
            if value != DEFAULTS[name]:
                smaller.append(replace(description, features=description.features | {name: DEFAULTS[name]}))
        for candidate in smaller:
            if fails(candidate):
                description, changed_one = candidate, True
                break
    return description

"""The planner: which layers to cut, with which scheme, at which rank; it meets latency budgets within a tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dsconv_surgery.budget import Budget, BudgetError
from dsconv_surgery.calibration.images import Calibration, Images, images_for
from dsconv_surgery.network.discovery import Skip, survey_model
from dsconv_surgery.network.layers import check_finite_state
from dsconv_surgery.network.untrained import warn_if_untrained
from dsconv_surgery.plan import Cut, Plan
from dsconv_surgery.planning.cut_latency import CutTimer, warn_of_missed_budget
from dsconv_surgery.planning.damage import DamageEstimator
from dsconv_surgery.planning.layer_latency import LayerTimer
from dsconv_surgery.planning.option_errors import OptionErrors
from dsconv_surgery.planning.options import layer_options, preset_option
from dsconv_surgery.planning.rules import checked_choice
from dsconv_surgery.planning.settings import PlanSettings, takes_plan_settings
from dsconv_surgery.planning.site_selection import DENSE_END, select_sites, warn_of_cost_outside
from dsconv_surgery.planning.slow_chains import warn_if_slow
from dsconv_surgery.planning.tables import Choice, Option, Table, allowed_costs, smallest_total
from dsconv_surgery.schemes import Factors
from dsconv_surgery.support import distributed
from dsconv_surgery.support.cache import Cache
from dsconv_surgery.support.copies import model_device
from dsconv_surgery.support.input_description import describe_inputs
from dsconv_surgery.support.inputs import Inputs, as_inputs
from dsconv_surgery.support.latency import Stopwatch
from dsconv_surgery.support.modes import standard_modes
from dsconv_surgery.support.progress import Progress
from dsconv_surgery.support.runtimes import find_runtime
from dsconv_surgery.surgery import COMPUTE_FACTORS

LATENCY_TRIES, LATENCY_TOLERANCE = 4, 0.02  # plans tried to meet a latency budget, and by how much it may be missed
TIME_LAYERS, JUDGE_OPTIONS, TIME_CUT = "time layers", "judge options", "time the cut network"  # phases
FactorsByLayer = dict[str, Factors]  # factors that planning computed, so that the cut need not compute them again


@standard_modes()
@takes_plan_settings
def make_plan(
    model: nn.Module,
    *example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    calibration: Calibration | Iterable[Any] | str | None = None,
    prepare: Callable[[Any], Any] | None = None,
    output: Callable[[Any], Any] | None = None,
    cache: bool | str | Path = True,
    progress: bool | None = None,
    **settings: Any,
) -> Plan:
    """Choose for every layer whether to cut it, with which scheme and at which rank.

    `error = sum_oiyx (W - V)^2 / sum_oiyx W^2` for a kernel W and its replacement V. With calibration images it is the error of the
    layer's outputs, `E |(W - V) p|^2 / E |W p|^2` over patches p of the layer's input. The model does not change.

    Args:
        model: any nn.Module.
        example_inputs, example_kwargs: what `model(*example_inputs, **example_kwargs)` takes: tensors, and nests of tensors, numbers, flags
            and None. MACs are counted for the whole example batch.
        calibration: batches of unlabelled images, a `Calibration`, or "synthetic" for procedural images (see `Calibration.synthetic`).
            Options are then judged by the layer's outputs on these images, and layers by how much their errors change the network's
            outputs. Batches have the structure of the example inputs.
        prepare: converts batches of another structure: a function from a batch to the example inputs' structure, or to an `Inputs`.
        output: a function from the network's output to the tensors to compare, such as `lambda result: result.logits`. By default, all
            floating-point tensors of the output are compared.
        cache: where to keep measurements for the next plan: True for the user's cache folder (or the one named by the environment
            variable DSCONV_SURGERY_CACHE), a folder, or False for nowhere.
        progress: show a bar for each phase: True, False, or None for in a terminal only. With `logging`, the logger "dsconv_surgery" gets
            a line for each phase at level INFO.
        settings: any fields of `PlanSettings`, such as budget, schemes and exclude.

    Returns:
        A `Plan`, which `apply_plan` carries out. With calibration images, its errors are estimates; those in the plan of `compress` are
        measured.

    Raises:
        ValueError: settings that are unknown or contradict each other, a pattern that matches no layer, a budget out of reach (the
            smallest reachable one is named), weights that are missing or not finite, calibration images that do not fit.
        TypeError: the model is compiled, scripted or wrapped for data parallelism.

    Example:
        >>> plan = make_plan(model, torch.rand(1, 3, 224, 224), budget=Budget(params=0.4), schemes=["cp"], exclude="conv1")
        >>> print(plan)
    """
    checked, inputs = PlanSettings(**settings), as_inputs(example_inputs, example_kwargs)
    images = None if calibration is None else images_for(model, calibration, inputs, prepare, output)
    planner = Planner(model, inputs, checked, images, cache, Progress(progress, planning_phases(checked, images is not None)))
    return planner.plan(checked.effective_budget)[0]


def planning_phases(settings: PlanSettings, calibrated: bool) -> tuple[str, ...]:
    """The phases of a plan."""
    timed = "latency" in settings.measures
    phases = {TIME_LAYERS: timed, JUDGE_OPTIONS: True, COMPUTE_FACTORS: not calibrated, TIME_CUT: timed}
    return tuple(title for title, needed in phases.items() if needed)


class Planner:
    """Builds a network's option tables once and makes plans for any number of budgets from them."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        settings: PlanSettings,
        images: Images | None,
        cache: bool | str | Path = True,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.inputs, self.settings, self.images = model, inputs, settings, images
        self.progress = progress or Progress(False)
        self._survey = survey_model(model, inputs)
        check_finite_state(model)
        warn_if_untrained(model)
        self._sites, self._skips = select_sites(self._survey, settings, images is not None)
        self.total = self._survey.total
        if settings.effective_budget is not None:
            warn_of_cost_outside(self._survey, settings.measures)
        # Processes that share the images must compute the same things at the same time, so none of them reads its own cache.
        store, timer = Cache(cache if distributed.process_and_world_size()[1] == 1 else False), None
        self._stopwatch = Stopwatch()
        if "latency" in settings.measures:
            runtime = find_runtime(settings.runtime)
            timer = LayerTimer(model, inputs, store, self._stopwatch, runtime)
            self._cut_timer = CutTimer(model, inputs, self._stopwatch, runtime)
            self.total = replace(self.total, latency=self._cut_timer.dense)
        damages = self._damages = DamageEstimator(model, self._sites, images, store, self.progress)
        self._tables: dict[str, Table] = {}
        self._errors: dict[str, OptionErrors] = {}
        self._preset: dict[str, Option] = {}  # chosen by the user
        self._warned = False  # of slow chains, in one of several plans
        with self.progress.layers(TIME_LAYERS, {site.name: 1 for site in self._sites if timer is not None}) as begin:
            for site in self._sites:
                if timer is not None:
                    begin(site.name)
                layer = model.get_submodule(site.name)
                names = (site.name, *site.aliases)
                options: tuple[Table, OptionErrors] | Skip
                if preset := settings.preset_option(names):
                    options = preset_option(site, layer, preset, damages, timer)
                    self._preset[site.name] = options[0].options[preset[0]][0]
                else:
                    multiple = settings.multiple_for(names)
                    options = layer_options(site, layer, settings.schemes_for(names), settings.measures, damages, timer, multiple)
                if isinstance(options, Skip):
                    self._skips.append(options)
                else:
                    self._tables[site.name], self._errors[site.name] = options

    def check(self, budget: Budget) -> None:
        """Raise BudgetError if not even the cheapest option of every layer meets a budget."""
        try:
            with self._naming_dense_ends():
                self._allowed(budget)
        except BudgetError:
            self._stopwatch.warn()  # busy times may be the reason
            raise

    def _allowed(self, budget: Budget) -> dict[str, float]:
        return allowed_costs(self._tables, self.total, budget, [skip.reason for skip in self._skips], self._preset)

    @contextmanager
    def _naming_dense_ends(self) -> Iterator[None]:
        """Add to a BudgetError that `exclude=()` cuts the layers that stayed dense for want of images."""
        try:
            yield
        except BudgetError as error:
            if "exclude=()" in str(error) or all(skip.reason != DENSE_END for skip in self._skips):
                raise
            raise BudgetError(f"{error} Or pass exclude=() to cut the first convolution and the last layer, too.") from None

    def smallest_fraction(self, measure: str) -> float:
        """The fraction of the network's cost that is left with the cheapest option of every layer."""
        if not self._tables:
            return 1.0
        dense = sum(getattr(table.dense, measure) for table in self._tables.values())
        saved = dense - smallest_total(self._tables, (measure,))[measure]
        return float(1 - saved / getattr(self.total, measure))

    def plan_without_cuts(self, budget: Budget) -> Plan:
        """The plan that keeps every layer dense."""
        return self._as_plan(budget, dict.fromkeys(self._tables))[0]

    def plan(self, budget: Budget | None) -> tuple[Plan, FactorsByLayer]:
        """A plan for a budget, with the factors that were computed for the chosen options.

        Args:
            budget: None for a rule that takes no budget.
        """
        with ExitStack() as stack:
            stack.callback(self._damages.close)
            stack.enter_context(self._naming_dense_ends())
            stack.callback(self._stopwatch.warn)  # if there is no plan, too: busy times may be the reason
            allowed = {} if budget is None else self._allowed(budget)
            if budget is not None and budget.latency is not None:
                return self._plan_for_latency(budget, allowed)
            plan, factors = self._as_plan(budget, self._choose(allowed))
            if model_device(self.model).type == "cpu" and not self._warned:
                self._warned = warn_if_slow(plan)
            return plan, factors

    def _choose(self, allowed: Mapping[str, float]) -> Choice:
        """The rule's choice; rules measure options when they need them, layer by layer."""
        with self.progress.layers(JUDGE_OPTIONS, {name: table.dense.params for name, table in self._tables.items()}) as begin:
            for name, errors in self._errors.items():
                errors.on_measure = partial(begin, name)
            free = {name: table for name, table in self._tables.items() if name not in self._preset}
            choice = checked_choice(free, allowed, vars(self.settings), self.settings.rule_text)
            return {name: self._preset.get(name, choice.get(name)) for name in self._tables}

    def _plan_for_latency(self, budget: Budget, allowed: dict[str, float]) -> tuple[Plan, FactorsByLayer]:
        """Layer times do not add up to a network's time, so time the whole cut network (random weights) and correct the budget."""
        target = (budget.latency or 1.0) * self.total.latency
        free = {name: table for name, table in self._tables.items() if name not in self._preset}
        smallest = smallest_total(free, tuple(allowed))["latency"]
        tries: list[tuple[float, tuple[Plan, FactorsByLayer]]] = []
        for _ in range(LATENCY_TRIES):
            try:
                choice = self._choose(allowed)
            except BudgetError:  # the corrected limit is out of reach: use the best plan so far
                if not tries:
                    raise
                break
            plan, factors = self._as_plan(budget, choice)
            saved = [option.cost.latency - self._tables[name].dense.latency for name, option in choice.items() if option]
            predicted = self.total.latency + sum(saved)
            with self.progress.bar(TIME_CUT, 1, "network"):
                timing = self._cut_timer.time(plan, predicted)
            latency = timing.after
            too_slow = latency > (1 + LATENCY_TOLERANCE) * target
            tries.append((abs(latency - target) + target * too_slow, (replace(plan, timing=timing), factors)))
            if (target * (1 - LATENCY_TOLERANCE) <= latency and not too_slow) or not plan.cuts:
                break
            allowed = {**allowed, "latency": max(allowed["latency"] + target - latency, smallest)}
        plan, factors = min(tries, key=lambda attempt: attempt[0])[1]
        if plan.cuts and plan.timing:
            warn_of_missed_budget(plan.timing, target / self.total.latency)
        return plan, factors

    def _as_plan(self, budget: Budget | None, choice: Choice) -> tuple[Plan, FactorsByLayer]:
        cuts: list[Cut] = []
        skips = list(self._skips)
        factors: FactorsByLayer = {}
        sites = {site.name: site for site in self._sites}
        for name, option in self._with_errors(choice).items():
            if option is None:
                skips.append(Skip(name, f"rule {self.settings.rule_text} chose no option for it."))
                continue
            site, errors = sites[name], self._errors[name]
            cuts.append(Cut(name, option.scheme, option.rank, site.spec, site.sizes, option.error, option.damage))
            if (option.scheme, option.rank) in errors.factors:
                factors[name] = errors.factors[option.scheme, option.rank]
        order = {layer.name: index for index, layer in enumerate(self._survey.layers)}
        skips.sort(key=lambda skip: order[skip.name])
        inputs, rule = describe_inputs(self.inputs), self.settings.rule_text
        calibrated: bool | Literal["synthetic"] = self.images is not None and ("synthetic" if self.images.synthetic else True)
        return Plan(tuple(cuts), tuple(skips), inputs, rule, budget, self.total, self._survey.outside, calibrated), factors

    def _with_errors(self, choice: Choice) -> Choice:
        """The chosen options with their errors: measured, or with images estimated where estimates are at hand; the cut measures them."""
        missing = {name: option for name, option in choice.items() if option is not None and option.error is None}
        missing = {name: option for name, option in missing.items() if not self.model.get_submodule(name).get_parameter("weight").is_meta}
        if self.images is not None:
            errors = {name: self._tables[name].estimate_errors([o])[0] for name, o in missing.items() if self._errors[name].sampled}
            return {**choice, **{name: replace(missing[name], error=error) for name, error in errors.items()}}
        measured: dict[str, Option] = {}
        with self.progress.layers(COMPUTE_FACTORS, {name: self._tables[name].dense.params for name in missing}) as begin:
            for name, option in missing.items():
                begin(name)
                measured[name] = self._tables[name].measure(option)
        return {**choice, **measured}

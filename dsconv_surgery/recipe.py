"""A recipe: everything that a compression needs but the network and the images, as a TOML file."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import tomli_w
from pydantic import ConfigDict, TypeAdapter
from torch import Tensor, nn

from dsconv_surgery.budget import Budget
from dsconv_surgery.calibration.images import Calibration
from dsconv_surgery.compression import Compressed, check_max_drop, compress
from dsconv_surgery.finetuning.fine_tune import fine_tune
from dsconv_surgery.finetuning.history import History
from dsconv_surgery.finetuning.settings import FineTune
from dsconv_surgery.network.geometry import Rank
from dsconv_surgery.planning.settings import PlanSettings, as_tuple
from dsconv_surgery.report import compare
from dsconv_surgery.support.copies import channels_last_copy
from dsconv_surgery.support.formatting import did_you_mean
from dsconv_surgery.support.records import json_schema, parse_json
from dsconv_surgery.surgery import fold_back

HOMES = (Path(__file__).parent / "recipes", Path(__file__).parent.parent / "recipes")  # in a wheel, in a clone


@dataclass(frozen=True)
class Images:
    """How calibration images are used: how many of those given, and `Calibration`'s settings."""

    images: int = 512
    patches: int = 2**17
    memory: int = 2**31

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class Recipe:
    """What to cut, how, and by how much: `compress`'s keywords, kept in a file.

    Args:
        description: a sentence for people.
        model: torchvision:NAME, timm:NAME or package.module:callable, for the command line.
        input: shape of the example input, batch first, for the command line.
        budget, schemes, rule, energy, rank, include, exclude, multiple, max_drop: as for `compress`.
        channels_last: take a copy of model and inputs in this memory format, in which networks once cut are often faster on CPUs.
        calibration: how to use calibration images, which then have to be given; none to go by the weights.
        fine_tune: settings of a fine-tuning after the cut, for which training batches then have to be given.
        stages: reach the budget in so many cuts, in even proportions, with a fine-tuning after each: between them the factors are
            multiplied out (`fold_back`), and the network as it then is is cut anew.
        seed: of whatever is drawn.

    Raises:
        ValueError: settings that do not fit each other.

    Example:
        >>> small = Recipe.load("resnet18-half-latency").run(model, torch.rand(1, 3, 224, 224), calibration=batches)
    """

    description: str = ""
    model: str = ""
    input: tuple[int, ...] = (1, 3, 224, 224)
    budget: Budget | None = None
    schemes: tuple[str, ...] | None = None
    rule: str = "budget"
    energy: float | None = None
    rank: Rank | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    multiple: int | None = None
    max_drop: float | None = None
    channels_last: bool = False
    calibration: Images | None = field(default=None)
    fine_tune: FineTune | None = None
    stages: int = 1
    seed: int = 0

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("schemes", "include", "exclude"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_tuple(getattr(self, name)))
        check_max_drop(self.max_drop)
        PlanSettings(self.budget, self.schemes, self.rule, self.energy, self.rank, self.include, self.exclude, self.multiple)
        if isinstance(self.stages, bool) or not isinstance(self.stages, int) or self.stages < 1:
            raise ValueError(f"stages={self.stages!r}: expected a whole number of cuts, 1 or more.")
        if self.stages > 1 and (self.fine_tune is None or self.budget is None or self.max_drop is not None):
            raise ValueError(
                f"stages={self.stages} needs fine_tune and a budget, and no max_drop: each stage is cut to a part of the budget."
            )

    def run(
        self,
        model: nn.Module,
        *example_inputs: Any,
        calibration: Calibration | Iterable[Any] | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        train: Iterable[Any] | None = None,
        validate: Callable[[nn.Module], float] | None = None,
        cache: bool | str | Path = True,
        progress: bool = False,
    ) -> Compressed:
        """`compress` with this recipe's settings and then, if it says so, `fine_tune` with the dense network as the teacher.

        Args:
            model, example_inputs, cache, progress: as for `compress`.
            calibration: batches of unlabelled images, where the recipe asks for some; no more than it says are used. Of a `Calibration`
                its batches: the settings are the recipe's.
            evaluate: a network's score, where the recipe has a `max_drop`.
            train, validate: batches, with labels or without, and a score by epoch, where the recipe has `fine_tune`; see there.

        Raises:
            ValueError: images, batches or a score that the recipe asks for are not given, or given where it asks for none.

        Example:
            >>> small = Recipe(budget=Budget(macs=0.5)).run(model, torch.rand(1, 3, 224, 224))
        """
        if (self.calibration is None) != (calibration is None):
            asks = "no calibration images" if self.calibration is None else f"{self.calibration.images} calibration images"
            raise ValueError(f"recipe: it asks for {asks}; found calibration={'none' if calibration is None else 'some'}.")
        if isinstance(calibration, Calibration):
            calibration = calibration.batches
        images: Calibration | None = None
        if self.calibration is not None and calibration is not None:
            few = calibration if iter(calibration) is calibration else _First(calibration, self.calibration.images)
            images = Calibration(few, self.calibration.patches, self.calibration.memory, self.seed)
        if (self.fine_tune is None) != (train is None):
            asks = "no training batches" if self.fine_tune is None else "training batches (train=)"
            raise ValueError(f"recipe: it asks for {asks}; found {'none' if train is None else 'some'}.")
        if self.channels_last:
            model, example_inputs = channels_last_copy(model, example_inputs)
        stages: list[History] = []
        dense = model
        for stage in range(1, self.stages + 1):
            part = None if self.budget is None else Budget(**{m: keep ** (stage / self.stages) for m, keep in self.budget.limits().items()})
            small = compress(
                dense,
                *example_inputs,
                budget=part,
                schemes=self.schemes,
                rule=self.rule,
                energy=self.energy,
                rank=self.rank,
                include=self.include,
                exclude=self.exclude,
                calibration=images,
                multiple=self.multiple,
                max_drop=self.max_drop,
                evaluate=evaluate,
                cache=cache,
                progress=progress,
            )
            if self.fine_tune is not None and train is not None:
                settings = replace(self.fine_tune, seed=self.seed + stage - 1)
                stages.append(fine_tune(small.model, train, teacher=model, validate=validate, settings=settings, progress=progress))
            if stage < self.stages:
                dense = fold_back(small.model, small.plan)
        if not stages:
            return small
        report = replace(compare(model, small.model, *example_inputs, plan=small.plan), tries=small.report.tries)
        return Compressed(small.model, small.plan, report, tuple(stages))

    def to_toml(self) -> str:
        """As `load` reads it; what is as it would be anyway is left out."""
        plain = asdict(Recipe())
        changed = {key: value for key, value in asdict(self).items() if value != plain[key]}
        if self.fine_tune is not None and self.fine_tune.clip is None:  # TOML knows no None, and to leave it out means the default
            changed["fine_tune"]["clip"] = math.inf
        return tomli_w.dumps(_without_none(changed))

    @classmethod
    def from_toml(cls, text: str, what: str = "recipe") -> Recipe:
        """Read TOML; ValueError says what is wrong, where, and the nearest known key."""
        try:
            found = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{what}: not TOML: {error}.") from None
        return parse_json(cls, _ADAPTER_ANY.dump_json(found), what)

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """Read a TOML file, or a recipe that comes with the library, by its name (see `Recipe.known`)."""
        path = Path(name_or_path)
        if not path.is_file() and path.suffix != ".toml":
            known = cls.known()
            if str(name_or_path) not in known:
                raise ValueError(f"recipe {str(name_or_path)!r}: no such file or recipe.{did_you_mean(str(name_or_path), known)}")
            path = known[str(name_or_path)]
        return cls.from_toml(path.read_text(), str(name_or_path))

    @staticmethod
    def known() -> dict[str, Path]:
        """The recipes that come with the library: names, and files."""
        return {path.stem: path for home in HOMES for path in sorted(home.glob("*.toml"))}

    @staticmethod
    def schema() -> dict[str, Any]:
        """The JSON schema of a recipe's file."""
        return json_schema(Recipe)


class _First:
    """The first so many images of batches that can be gone through again."""

    def __init__(self, batches: Iterable[Any], count: int) -> None:
        self._batches, self._count = batches, count

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        left = self._count
        for batch in self._batches:
            inputs = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
            if left <= 0:
                return
            yield tuple(t[:left] if isinstance(t, Tensor) else t for t in inputs)
            left -= len(inputs[0]) if inputs and isinstance(inputs[0], Tensor) else 0


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list | tuple) else value


_ADAPTER_ANY = TypeAdapter(Any, config=ConfigDict(ser_json_inf_nan="constants"))  # not as null, which would be None

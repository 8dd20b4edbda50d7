"""Recipe: everything that a compression needs except the network and the images, as a TOML file."""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter
from torch import nn

from dsconv_surgery.budget import Budget
from dsconv_surgery.calibration.images import Calibration, named_calibration
from dsconv_surgery.calibration.synthetic import Synthetic
from dsconv_surgery.compression import MAX_DROP_TRIES, Compressed, check_max_drop, compress
from dsconv_surgery.finetuning.fine_tune import fine_tune
from dsconv_surgery.finetuning.history import History
from dsconv_surgery.finetuning.recovery import RECOVERY
from dsconv_surgery.finetuning.settings import FineTune
from dsconv_surgery.planning.settings import PlanSettings, as_tuple, plan_keywords
from dsconv_surgery.report import compare
from dsconv_surgery.support.atomic_files import read_file
from dsconv_surgery.support.copies import channels_last_copy
from dsconv_surgery.support.formatting import did_you_mean
from dsconv_surgery.support.inputs import Inputs, InputStructure, as_inputs, checked_prepare, prepared
from dsconv_surgery.support.records import QUOTED, checked_record, json_schema, parse_json, quoted, shortened
from dsconv_surgery.surgery import fold_back

Count = Annotated[int, Field(ge=1, description="a whole number, 1 or more")]
FOLDERS = (Path(__file__).parent / "recipes", Path(__file__).parent.parent / "recipes")  # in a wheel, in a clone
LONGEST_KEY = 1000  # parts of a dotted key


@checked_record("CalibrationSettings(images=512)")
class CalibrationSettings:
    """How many calibration images a recipe uses, whether they are synthetic, and the settings of `Calibration` for them."""

    images: Count = 512
    synthetic: bool = False
    patches: Count = 2**15
    memory: Count = 2**31


@checked_record("Recipe(budget=Budget(macs=0.5), schemes=['cp', 'bottleneck'])")
class Recipe(PlanSettings):
    """Settings of `compress` and `fine_tune`, kept in a TOML file.

    Args:
        The settings of a plan are those of `PlanSettings`. Besides these:

        description: a sentence for readers.
        model: torchvision:NAME, timm:NAME or package.module:callable, for the command line.
        input: shape of the example input, batch first, for the command line.
        max_drop, tries: as for `compress`.
        channels_last: convert a copy of the model, and the inputs, to this memory format; cut networks are often faster in it on CPUs.
        calibration: how calibration images are used; images must then be passed to `run`. None: factorise for the weights alone.
        recover: as for `compress`: true, or a table of `FineTune` settings.
        fine_tune: settings of a fine-tuning after the cut; training batches must then be passed to `run`.
        stages: reach the budget in this many cuts, by equal factors, with a fine-tuning after each. Between two cuts the factors are
            multiplied out (`fold_back`) and the resulting dense network is cut again.
        seed: seed of all random draws.

    Raises:
        ValueError: settings that are unknown, out of range or contradict each other.

    Example:
        >>> small = Recipe.load("resnet18-half-latency").run(model, torch.rand(1, 3, 224, 224))
    """

    description: str = ""
    model: str = ""
    input: Annotated[tuple[int, ...], BeforeValidator(as_tuple)] = (1, 3, 224, 224)
    max_drop: float | None = None
    tries: Count = MAX_DROP_TRIES
    channels_last: bool = False
    calibration: CalibrationSettings | None = None
    recover: Annotated[bool | FineTune, Field(description="true, false or FineTune(...)")] = False
    fine_tune: FineTune | None = None
    stages: Annotated[int, Field(ge=1, description="a whole number of cuts, 1 or more")] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63, description="a whole number of 64 bits")] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_max_drop(self.max_drop)
        if self.stages > 1 and (self.fine_tune is None or self.budget is None or self.max_drop is not None):
            raise ValueError(f"stages={self.stages} needs fine_tune and a budget, and no max_drop: each stage cuts to part of the budget.")

        if self.recover and self.calibration is None:
            raise ValueError("recover needs calibration: the cut network is trained on calibration images.")

    def run(
        self,
        model: nn.Module,
        *example_inputs: Any,
        example_kwargs: Mapping[str, Any] | None = None,
        calibration: Calibration | Iterable[Any] | str | None = None,
        prepare: Callable[[Any], Any] | None = None,
        output: Callable[[Any], Any] | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        train: Iterable[Any] | None = None,
        validate: Callable[[nn.Module], float] | None = None,
        cache: bool | str | Path = True,
        progress: bool | None = None,
    ) -> Compressed:
        """`compress` with these settings and then, if the recipe asks for it, `fine_tune` with the dense network as the teacher.

        Args:
            model, example_inputs, example_kwargs, output, cache, progress: as for `compress`.
            calibration: batches of unlabelled images or "synthetic", if the recipe asks for images; only as many as it says are used. Of a
                `Calibration` only the batches, or the `mean` and `std` of synthetic images, count: other settings are the recipe's.
            evaluate: a function that gives a network's score, if the recipe has a `max_drop`.
            prepare: a function from a batch to the network's inputs, for calibration; and to inputs and labels, for `fine_tune`.
            train, validate: training batches and a score, if the recipe has `fine_tune`; as for `fine_tune`.

        Raises:
            ValueError: images, batches or a score that the recipe asks for are missing, or are passed though it asks for none.

        Example:
            >>> small = Recipe(budget=Budget(macs=0.5)).run(model, torch.rand(1, 3, 224, 224))
        """
        inputs = as_inputs(example_inputs, example_kwargs)
        if calibration is None and self.calibration is not None and self.calibration.synthetic:
            calibration = "synthetic"
        images = self._calibration(calibration, inputs, checked_prepare(prepare))
        if train is not None and inputs.kwargs and prepare is None:
            raise ValueError(
                "recipe: the network takes keyword arguments, so training batches need prepare=, a function from a batch to (Inputs(...), "
                "labels), as in prepare=lambda batch: (Inputs(pixel_values=batch['pixel_values']), batch['labels'])."
            )
        if (self.fine_tune is None) != (train is None):
            expected = "no training batches" if self.fine_tune is None else "training batches (train=)"
            raise ValueError(f"recipe: it asks for {expected}; found {'none' if train is None else 'some'}.")
        if validate is not None and self.fine_tune is None:
            raise ValueError("recipe: it has no fine_tune, so there is nothing to validate. Leave out validate=.")
        if self.channels_last:
            model, inputs = channels_last_copy(model, inputs)
        settings = {name: getattr(self, name) for name in (*plan_keywords(), "max_drop", "tries")}
        if self.recover:
            tuning = RECOVERY if self.recover is True else self.recover
            settings["recover"] = replace(tuning, seed=self.seed + tuning.seed)
        settings |= {"calibration": images, "evaluate": evaluate, "cache": cache, "progress": progress}
        settings |= {"example_kwargs": inputs.kwargs, "output": output}
        histories: list[History] = []
        dense = model
        for stage in range(1, self.stages + 1):
            if self.budget is not None:
                limits = self.budget.limits()
                settings["budget"] = Budget(**{measure: keep ** (stage / self.stages) for measure, keep in limits.items()})
            small = compress(dense, *inputs.args, **settings)
            histories += small.tuned
            if self.fine_tune is not None and train is not None:
                tuning = replace(self.fine_tune, seed=self.seed + self.fine_tune.seed + stage - 1)
                arguments: dict[str, Any] = {"prepare": prepare, "output": output, "inputs": max(1, len(inputs.args)), "progress": progress}
                histories.append(fine_tune(small.model, train, teacher=model, validate=validate, settings=tuning, **arguments))
            if stage < self.stages:
                dense = fold_back(small.model, small.plan)
        if self.fine_tune is None:
            return small
        report = compare(model, small.model, *inputs.args, example_kwargs=inputs.kwargs, plan=small.plan)
        return Compressed(
            small.model, small.plan, replace(report, tries=small.report.tries, recovery=small.report.recovery), tuple(histories)
        )

    def _calibration(
        self, calibration: Calibration | Iterable[Any] | str | None, example: Inputs, prepare: Callable[[Any], Any] | None
    ) -> Calibration | None:
        """The first images of the user's batches, as many as the recipe asks for, as the network takes them."""
        if (self.calibration is None) != (calibration is None):
            expected = "no calibration images" if self.calibration is None else f"{self.calibration.images} calibration images"
            raise ValueError(f"recipe: it asks for {expected}; found calibration={'none' if calibration is None else 'some'}.")
        if self.calibration is None or calibration is None:
            return None
        calibration = named_calibration(calibration)
        batches: Any = calibration.batches if isinstance(calibration, Calibration) else calibration
        if self.calibration.synthetic and not isinstance(batches, Synthetic):
            raise ValueError("recipe: it asks for synthetic images; found some others. Leave out calibration=, or synthetic in the recipe.")
        patches, memory = self.calibration.patches, self.calibration.memory
        if isinstance(batches, Synthetic):
            return Calibration(replace(batches, count=self.calibration.images, seed=self.seed), patches, memory, self.seed)
        first = batches if iter(batches) is batches else _FirstImages(batches, self.calibration.images, example, prepare)
        return Calibration(first, patches, memory, self.seed)

    def to_toml(self) -> str:
        """TOML text that `load` reads; settings with their default value are left out."""
        import tomli_w

        for name in ("rule", "runtime"):
            if callable(value := getattr(self, name)):
                raise ValueError(f"recipe: {name}={value!r} is a function, which a file cannot hold. Name a {name}.")
        names = {field.name for field in fields(Recipe) if getattr(self, field.name) != field.default}
        changed = TypeAdapter(Recipe).dump_python(self, include=names, exclude_none=True)
        for name in ("fine_tune", "recover"):
            settings = getattr(self, name)
            if isinstance(settings, FineTune) and settings.clip is None:  # TOML has no None, and a missing key means the default
                changed[name]["clip"] = math.inf
        return tomli_w.dumps(changed)

    @classmethod
    def from_toml(cls, text: str, what: str = "recipe") -> Recipe:
        """Read TOML; ValueError names the place, the problem and, for an unknown key, the most similar known one."""
        try:
            if any(part.count(".") > LONGEST_KEY for part in text.split("=")):  # tomllib takes hours for a key of 100,000 parts
                raise ValueError(f"a key has more than {LONGEST_KEY:,} parts")
            data = json.dumps(tomllib.loads(text), default=_refuse_date)
        except (ValueError, RecursionError) as error:  # not TOML, a number of thousands of digits, or nested thousands deep
            raise ValueError(f"{what}: not TOML that can be read: {shortened(str(error))}.") from None
        return parse_json(cls, data, what)

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """Read a TOML file, or a recipe that comes with the library, by its name (see `Recipe.known`)."""
        path, name = Path(name_or_path), str(name_or_path)
        if (os.path.isdir(path) or not os.path.exists(path)) and path.suffix != ".toml":
            recipes = cls.known()
            if name not in recipes:
                raise ValueError(f"recipe {quoted(name)}: no such file or recipe.{did_you_mean(name[:QUOTED], recipes)}")
            path = recipes[name]
        try:
            return cls.from_toml(read_file(path).decode(), name)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: not UTF-8 text: {error.reason} at byte {error.start}. Save the file as UTF-8.") from None

    @staticmethod
    def known() -> dict[str, Path]:
        """The names and files of the recipes that come with the library."""
        return {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.toml"))}

    @staticmethod
    def schema() -> dict[str, Any]:
        """The JSON schema of a recipe's file."""
        return json_schema(Recipe)


def _refuse_date(value: object) -> None:
    raise ValueError(f"found the date or time {value}, which no setting takes")


class _FirstImages:
    """The first images of batches, up to a number; it can be iterated again."""

    def __init__(self, batches: Iterable[Any], count: int, example: Inputs, prepare: Callable[[Any], Any] | None) -> None:
        self._batches, self._count, self._structure, self._prepare = batches, count, InputStructure(example), prepare

    def __iter__(self) -> Iterator[Inputs]:
        remaining = self._count
        for number, batch in enumerate(self._batches):
            if remaining <= 0:
                return
            where = f"calibration: batch {number}"
            inputs = self._structure.match(prepared(self._prepare, batch, where), where)
            yield self._structure.select(inputs, slice(0, remaining))
            remaining -= self._structure.count(inputs)

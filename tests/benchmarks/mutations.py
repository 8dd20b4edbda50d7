"""Damage files at random and read them: each is refused with its name, or read with an equal result.

`python tests/benchmarks/mutations.py --json tests/benchmarks/results/mutations.json`
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import platform
import random
import signal
import tempfile
import time
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from dsconv_surgery import Budget, FineTune, Plan, Recipe, apply_plan, compress, fine_tune, load, make_plan, save
from dsconv_surgery.checkpoint import read_plan
from dsconv_surgery.support.cache import Cache
from dsconv_surgery.support.formatting import markdown_table

RESULTS = Path(__file__).parent / "results"
OUTCOMES = ("refused", "equal", "as written", "raw exception", "hang", "silent difference")
BAD = OUTCOMES[3:]
SECONDS = 10  # a longer read is a hang
DEEP, TWIN = "@deep@", "@twin@"
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2.5, 1e308, 10**30, 10**4200, math.nan, math.inf, "", "x" * 3000, "\0", "../up", [], {}, [[]], DEEP,
)  # fmt: skip
TOML_VALUES = (
    "true", "-1", "0", "2.5", "nan", "inf", "1e308", "9" * 30, "9" * 5000, '""', '"' + "x" * 3000 + '"', "[]", "{}", "2020-01-01",
    "[" * 5000 + "]" * 5000, "{a=" * 300 + "1" + "}" * 300,
)  # fmt: skip
RECIPE = """\
description = "a recipe"
model = "torchvision:resnet18"
input = [1, 3, 32, 32]
schemes = ["channel", "spatial"]
rule = "budget"
include = ["*"]
exclude = "conv1"
stages = 1
seed = 3

[budget]
macs = 0.5

[calibration]
images = 64

[fine_tune]
epochs = 2
lr = 0.001
clip = inf
optimizer = "adamw"
"""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()


# ---- mutations


def mutate_bytes(data: bytes, draws: random.Random) -> bytes:
    """Flip a bit; delete, insert, double, blank or exchange bytes; or cut the end off."""
    start = draws.randrange(len(data))
    end = min(len(data), start + draws.choice((1, 2, 8, 64)))
    kind = draws.randrange(8)
    if kind <= 1:
        return data[:start] + bytes([data[start] ^ 1 << draws.randrange(8)]) + data[start + 1 :]
    if kind == 2:
        return data[:start] + data[end:]
    if kind == 3:
        return data[:start] + draws.randbytes(end - start) + data[start:]
    if kind == 4:
        return data[:end] + data[start:]
    if kind == 5:
        return data[:start] + bytes(end - start) + data[end:]
    return data[:start] if kind == 6 else data[end:] + data[:end]


def mutate_json(text: bytes, draws: random.Random) -> bytes:
    """Give a value another type or size, or remove, add, rename or double a key."""
    data = json.loads(text)
    places = list(containers(data))
    container = draws.choice(places)
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    key = draws.choice(keys)
    kind = draws.randrange(8) if isinstance(container, dict) else draws.choice((0, 4))
    if kind <= 3:
        old = container[key]
        number = isinstance(old, int | float) and not isinstance(old, bool)
        container[key] = copy.deepcopy(draws.choice([*VALUES, *([old + 1, -old, old * 2] if number else [draws.choice(places)])]))
    elif kind == 4:
        del container[key]
    elif kind == 5:
        container["y" * draws.choice((1, 3000))] = draws.choice(VALUES)
    elif kind == 6:
        container[key + "s"] = container.pop(key)
    else:
        container[f"{TWIN}{key}"] = draws.choice(VALUES)
    result = json.dumps(data).replace(TWIN, "").replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000)
    return result.encode()


def containers(value: Any) -> Iterator[Any]:
    """Every dict and list in JSON data that is not empty."""
    if isinstance(value, dict | list) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


def mutate_toml(text: bytes, draws: random.Random) -> bytes:
    """Give a key another value, or remove, double or rename a line."""
    lines = text.decode().splitlines()
    index = draws.choice([index for index, line in enumerate(lines) if line])
    key, equals, _ = lines[index].partition(" = ")
    kind = draws.randrange(6)
    if kind <= 2 and equals:
        lines[index] = f"{key} = {draws.choice(TOML_VALUES)}"
    elif kind == 3:
        lines.insert(index, lines[index])
    elif kind == 4 and equals:
        lines[index] = f"{draws.choice((key + 's', 'a.' * 3000 + 'a', 'y' * 3000))} = 1"
    else:
        del lines[index]
    return "\n".join(lines).encode()


# ---- subjects: each has a file and a function that reads it and says whether the result is equal


class Subject:
    """A file, and what reading it may do."""

    errors: tuple[type[Exception], ...] = (ValueError, FileNotFoundError)
    mutations: tuple[Callable[[bytes, random.Random], bytes], ...] = (mutate_bytes,)
    path: Path

    def __init__(self, folder: Path) -> None:
        raise NotImplementedError

    def read(self) -> str:
        """Read the file: "equal", "as written" or "silent difference"."""
        raise NotImplementedError

    def named(self, message: str) -> bool:
        """Whether a message names the file."""
        return self.path.name in message


class SavedPlan(Subject):
    mutations = (mutate_bytes, mutate_json)

    def __init__(self, folder: Path) -> None:
        self.x = torch.rand(1, 3, 8, 8)
        small = compress(network(), self.x, rule="fixed", rank=2, schemes=["channel", "spatial"], cache=False)
        save(small, folder)
        self.folder, self.plan, self.output = folder, small.plan, small.model(self.x)
        self.path = folder / "plan.json"

    def read(self) -> str:
        equal = torch.equal(load(network(), self.folder)(self.x), self.output) and read_plan(self.folder) == self.plan
        return "equal" if equal else "silent difference"

    def named(self, message: str) -> bool:
        return str(self.folder) in message


class SavedWeights(SavedPlan):
    mutations = (mutate_bytes,)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (self.path,) = folder.glob("weights-*")


class EditablePlan(Subject):
    """The text of Plan.to_json, which people edit: what is accepted is what the text says, and fits the network or is refused."""

    mutations = (mutate_bytes, mutate_json)

    def __init__(self, folder: Path) -> None:
        self.path = folder / "edited.json"
        self.plan = make_plan(network(), torch.rand(1, 3, 8, 8), rule="fixed", rank=2, schemes=["channel", "spatial"], cache=False)
        self.path.write_text(self.plan.to_json())

    def read(self) -> str:
        data = self.path.read_bytes()
        plan = Plan.from_json(data)
        if plan == self.plan:
            return "equal"
        str(plan)
        if not agree(json.loads(data), json.loads(plan.to_json()), {}):
            return "silent difference"
        try:
            apply_plan(network(), plan)
        except ValueError:
            return "refused"
        return "as written"

    def named(self, message: str) -> bool:
        return message.startswith("plan: ")


class RecipeFile(Subject):
    """A text that people edit: what is accepted is what the text says."""

    mutations = (mutate_bytes, mutate_toml)

    def __init__(self, folder: Path) -> None:
        self.path = folder / "recipe.toml"
        self.path.write_text(RECIPE)
        self.recipe = Recipe.load(self.path)

    def read(self) -> str:
        recipe = Recipe.load(self.path)
        if recipe == self.recipe:
            return "equal"
        adapter: Any = TypeAdapter(Recipe)
        default = adapter.dump_python(dataclasses.replace(Recipe(), fine_tune=FineTune(), budget=Budget(macs=0.5)))
        default["budget"]["macs"] = None
        return "as written" if agree(tomllib.loads(self.path.read_text()), adapter.dump_python(recipe), default) else "silent difference"


class CacheEntry(Subject):
    """An entry of a cache: a damaged one is not used, and its value is computed again."""

    mutations = (mutate_bytes, mutate_json)

    def __init__(self, folder: Path) -> None:
        self.cache, self.value = Cache(folder), [[0.125, 3e-7, 1 / 3], {"rank": [1, 2], "error": None}]
        assert self._get() == self.value
        (self.path,) = folder.rglob("*.json")

    def _get(self) -> Any:
        return self.cache.get("errors", ["key", 3], lambda: copy.deepcopy(self.value))

    def read(self) -> str:
        return "equal" if self._get() == self.value else "silent difference"


class TrainingCheckpointFile(Subject):
    def __init__(self, folder: Path) -> None:
        self.path, self.model = folder / "run.pt", network()
        self.end, self.history = self._run()

    def _run(self) -> tuple[dict[str, torch.Tensor], Any]:
        model = copy.deepcopy(self.model)
        before = copy.deepcopy(model.state_dict())
        try:
            batches = [torch.ones(2, 3, 8, 8)] * 2
            history = fine_tune(
                model,
                batches,
                teacher=self.model,
                settings=FineTune(epochs=2, optimizer="adamw"),
                checkpoint=self.path,
            )
        except ValueError:
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "a refusal changed the model"
            raise
        return model.state_dict(), history

    def read(self) -> str:
        end, history = self._run()
        equal = all(torch.equal(value, self.end[name]) for name, value in end.items()) and history == self.history
        return "equal" if equal else "silent difference"


def agree(text: Any, value: Any, default: Any) -> bool:
    """Whether the data of a text are the value that was read: each key of it has its value, all others their default."""
    if isinstance(text, dict) and isinstance(value, dict):
        default = default if isinstance(default, dict) else {}
        same = all(agree(text[key], value.get(key), default.get(key)) for key in text)
        return same and all(value[key] in (None, default[key]) for key in value if key not in text and key in default)
    if isinstance(text, list) and isinstance(value, list | tuple):
        return len(text) == len(value) and all(agree(a, b, None) for a, b in zip(text, value, strict=True))
    if isinstance(value, list | tuple):
        return list(value) == [text]
    return text == value or (isinstance(value, float) and float(text) == value) or (text == math.inf and value is None)


SUBJECTS: dict[str, type[Subject]] = {
    "plan.json of a saved network": SavedPlan,
    "weights of a saved network": SavedWeights,
    "plan edited by hand": EditablePlan,
    "recipe": RecipeFile,
    "cache entry": CacheEntry,
    "fine-tuning checkpoint": TrainingCheckpointFile,
}


class Hang(BaseException):
    """Reading takes too long."""


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def outcome(subject: Subject) -> tuple[str, str]:
    """What reading a file does, and the error."""
    try:
        with time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return subject.read(), ""
    except Hang:
        return "hang", ""
    except Exception as error:
        message = str(error)
        clear = type(error) in subject.errors and subject.named(message) and len(message) < 2500
        return ("refused" if clear else "raw exception"), f"{type(error).__name__}: {message[:500]}"


def run(number: int, seed: int) -> dict[str, Any]:
    """Read `number` damaged files of all kinds in turn; the counts, and examples of what must not happen."""
    counts = {kind: Counter[str]() for kind in SUBJECTS}
    bad: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        subjects = {}
        for index, (kind, subject_type) in enumerate(SUBJECTS.items()):
            (folder := Path(name) / str(index)).mkdir()
            subjects[kind] = subject_type(folder)
        for index in range(number):
            kind = list(SUBJECTS)[index % len(SUBJECTS)]
            subject, draws = subjects[kind], random.Random(f"{seed} {index}")
            path, whole = subject.path, subject.path.read_bytes()
            damaged = whole
            while damaged == whole:
                damaged = draws.choice(subject.mutations)(whole, draws)
            path.write_bytes(damaged)
            result, error = outcome(subject)
            counts[kind][result] += 1
            if result in BAD:
                bad.append({"kind": kind, "index": str(index), "outcome": result, "error": error, "file": repr(damaged[:300])})
            path.write_bytes(whole)
    return {"counts": {kind: {result: counts[kind][result] for result in OUTCOMES} for kind in SUBJECTS}, "bad": bad}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start = time.perf_counter()
    result = run(options.number, options.seed)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    settings = {"number": options.number, "seed": options.seed, "seconds": round(time.perf_counter() - start), "versions": versions}
    print(markdown_table(("file", *OUTCOMES), [(kind, *map(str, row.values())) for kind, row in result["counts"].items()]))
    for example in result["bad"][:20]:
        print(json.dumps(example, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps({"settings": settings, "rows": result["counts"], "bad": result["bad"]}, indent=1) + "\n")


if __name__ == "__main__":
    main()

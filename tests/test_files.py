"""Files survive kills, other processes and full disks. What is not ours or is damaged is refused by name, and nothing hangs."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import random
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsconv_surgery import Budget, FineTune, Plan, Recipe, apply_plan, fine_tune, load, make_plan, save
from dsconv_surgery.checkpoint import read_plan
from dsconv_surgery.support.atomic_files import atomic_write, folder_lock, temporary_file
from dsconv_surgery.support.cache import Cache

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from mutations import BAD, run

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
REPETITIONS = [2, pytest.param(20, marks=pytest.mark.slow)]


def net(seed: int = 0, *more: nn.Module) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), *more).eval()


def plan_of(model: nn.Module) -> Plan:
    return make_plan(model, X, rule="fixed", rank=2, schemes="channel", cache=False)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(net())


@pytest.fixture
def folder(plan: Plan, tmp_path: Path) -> Path:
    save(apply_plan(net(), plan), tmp_path / "net", plan)
    return tmp_path / "net"


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise AssertionError("a hang")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(600)
    yield
    signal.alarm(0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(a: nn.Module, b: nn.Module) -> bool:
    states = a.state_dict(), b.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# ---- versions of modules, and buffers that take their shape in use


class Scaled(nn.Module):
    """Version 2 keeps the scale, version 1 its logarithm."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if (metadata.get("version") or 1) < 2:
            state[prefix + "scale"] = state[prefix + "scale"].exp()
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Old(Scaled):
    """Without a version, and converted for one that is not 1."""

    _version = 1

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        assert metadata.get("version") == 1
        nn.Module._load_from_state_dict(self, state, prefix, metadata, *rest)


@pytest.mark.parametrize("kind", [Scaled, Old, lambda: nn.Sequential(Scaled(), Old())])
def test_module_versions_are_saved(kind: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = net(0, kind())
    plan = plan_of(model)
    cut = apply_plan(model, plan)
    save(cut, tmp_path, plan)
    assert torch.equal(load(net(1, kind()), tmp_path)(X), cut(X))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_other_metadata_are_saved(tmp_path: Path) -> None:
    """Spectral norm of the old style keeps its version beside the module's."""

    def model(seed: int) -> nn.Sequential:
        return net(seed, nn.utils.spectral_norm(nn.Conv2d(8, 4, 1)).eval())

    plan = plan_of(model(0))
    cut = apply_plan(model(0), plan)
    save(cut, tmp_path, plan)
    assert json.loads((tmp_path / "plan.json").read_text())["module_metadata"]["3"]["spectral_norm"]
    assert torch.equal(load(model(1), tmp_path)(X), cut(X))


def test_mnasnet(tmp_path: Path) -> None:
    """torchvision's class refuses state_dicts without a version."""
    models = pytest.importorskip("torchvision.models")
    x = torch.rand(1, 3, 32, 32)
    model = models.mnasnet1_0().eval()
    plan = make_plan(model, x, rule="fixed", rank=2, schemes="channel", include="layers.0", cache=False)
    cut = apply_plan(model, plan)
    save(cut, tmp_path, plan)
    assert torch.equal(load(models.mnasnet1_0().eval(), tmp_path)(x), cut(x))


def test_folders_of_older_versions_load(folder: Path) -> None:
    path = folder / "plan.json"
    data = json.loads(path.read_text())
    del data["module_metadata"], data["sha256"]
    path.write_text(json.dumps(data))
    assert load(net(1), folder)(X).shape == (2, 8, 8, 8)


class Grid(nn.Module):
    """Buffers of a user's module that follow the input: one grows, one is not there before the first call."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("grid", torch.zeros(shape))
        self.register_buffer("lazy", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.grid.shape != x.shape[-2:]:
            self.grid = torch.rand(x.shape[-2:])
            self.lazy = torch.rand(x.shape[-1:])
        return x + self.grid + self.lazy


@pytest.mark.parametrize("shape", [(), (0,), (1, 1), (3,)])
def test_buffers_that_take_their_shape_in_use(shape: tuple[int, ...], tmp_path: Path) -> None:
    model = net(0, Grid(shape))
    model(X)
    plan = plan_of(model)
    cut = apply_plan(model, plan)
    save(cut, tmp_path, plan)
    assert torch.equal(load(net(1, Grid(shape)), tmp_path)(X), cut(X))


class MyNorm(nn.BatchNorm2d):
    """Its buffers are those of torch's layer."""


@pytest.mark.parametrize(
    ("saved", "fresh", "name"),
    [
        (nn.BatchNorm2d(8), nn.BatchNorm2d(1), "3.weight"),
        (nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(1, affine=False), "3.running_mean"),
        (MyNorm(8, affine=False), MyNorm(1, affine=False), "3.running_mean"),
        (nn.PReLU(8), nn.PReLU(1), "3.weight"),
    ],
)
def test_other_shapes_are_refused(saved: nn.Module, fresh: nn.Module, name: str, tmp_path: Path) -> None:
    model = net(0, saved)
    plan = plan_of(model)
    save(apply_plan(model, plan), tmp_path, plan)
    with pytest.raises(ValueError, match=rf"{name}: saved with shape \[8\], found \[1\] in the fresh model"):
        load(net(0, fresh), tmp_path)


# ---- whose files


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "my notes", '{"plan": 3}', "[" * 9999, b"\xff\xfe", '{"plan": {}, "weights_file": "a"}', None]
)
def test_a_foreign_plan_is_refused(text: Any, plan: Plan, tmp_path: Path) -> None:
    """Also the text of a plan, which somebody keeps there."""
    text = plan.to_json() if text is None else text
    (tmp_path / "plan.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = (tmp_path / "plan.json").read_bytes()
    with pytest.raises(ValueError, match=r"plan\.json: found a file that save did not write, or a damaged one. Nothing was written"):
        save(apply_plan(net(), plan), tmp_path, plan)
    assert names(tmp_path) == ["plan.json"]
    assert (tmp_path / "plan.json").read_bytes() == before


@pytest.mark.parametrize("name", ["../mine.txt", "weights-original.safetensors", "notes.txt", "weights-0123456789abcdeg.safetensors"])
def test_only_own_weights_are_removed(name: str, folder: Path, plan: Plan) -> None:
    """Whatever file an edited plan.json names."""
    (folder / name).write_text("mine")
    data = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**data, "weights_file": name}))
    save(apply_plan(net(1), plan), folder, plan)
    assert (folder / name).read_text() == "mine"
    assert load(net(), folder)


def test_a_changed_plan_is_refused(folder: Path) -> None:
    """Also where the change is valid by itself. Other spaces and another order are no change."""
    path = folder / "plan.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(data.items()))))
    assert load(net(), folder)
    data["plan"]["cuts"][0]["error"] = 0.5
    path.write_text(json.dumps(data))
    for read in (read_plan, lambda place: load(net(), place)):
        with pytest.raises(ValueError, match=r"plan\.json: the file was changed or damaged: expected SHA-256"):
            read(folder)


# ---- temporary files, permissions, links


def test_temporary_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    """Those of writers that are still at work stay. An abandoned lock of the folder does not block."""
    (tmp_path / ".writing-0123456789abcdef").write_text("half")
    (tmp_path / ".writing-lock").write_text("")
    (tmp_path / ".writing-notes").write_text("of a user")
    with temporary_file(tmp_path) as first, folder_lock(tmp_path):
        assert not (tmp_path / ".writing-0123456789abcdef").exists()
        with atomic_write(tmp_path / "file") as second:
            second.write_text("text")
            assert {first.name, second.name, ".writing-lock", ".writing-notes"} == set(names(tmp_path))
        assert first.exists()
    assert names(tmp_path) == [".writing-notes", "file"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_the_umask_holds(mask: int, plan: Plan, tmp_path: Path) -> None:
    previous = os.umask(mask)
    try:
        save(apply_plan(net(), plan), tmp_path / "net", plan)
        Cache(tmp_path / "cache").get("kind", "key", lambda: 1)
        train(net(), tmp_path / "run.pt")
    finally:
        os.umask(previous)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}
    (tmp_path / "run.pt").chmod(0o600)
    with atomic_write(tmp_path / "run.pt") as temporary:
        temporary.write_text("new")
    assert stat.S_IMODE((tmp_path / "run.pt").stat().st_mode) == 0o600


@pytest.mark.parametrize("there", [True, False])
def test_links_are_written_through(there: bool, folder: Path, plan: Plan, tmp_path: Path) -> None:
    """plan.json, a checkpoint, a recipe and the folder itself."""
    (real := tmp_path / "real").mkdir()
    if there:
        (folder / "plan.json").rename(real / "plan.json")
    else:
        (folder / "plan.json").unlink()
    (folder / "plan.json").symlink_to(real / "plan.json")
    (tmp_path / "link").symlink_to(folder)
    save(apply_plan(net(1), plan), tmp_path / "link", plan)
    assert (folder / "plan.json").is_symlink()
    assert (tmp_path / "link").is_symlink()
    assert names(real) == ["plan.json"]
    assert same(load(net(), folder), apply_plan(net(1), plan))
    (tmp_path / "run.pt").symlink_to(real / "run.pt")
    train(net(), tmp_path / "run.pt")
    assert (tmp_path / "run.pt").is_symlink()
    assert (real / "run.pt").stat().st_size > 1000
    (real / "recipe.toml").write_text("seed = 3")
    (tmp_path / "recipe.toml").symlink_to(real / "recipe.toml")
    assert Recipe.load(tmp_path / "recipe.toml").seed == 3


# ---- fine-tuning checkpoints


def train(model: nn.Module, path: Path | None, stop: int = 0, teacher: nn.Module | None = None, **settings: Any) -> None:
    def watch(step: int, _values: Any) -> None:
        if step == stop:
            raise KeyboardInterrupt

    batches = [X * scale for scale in (1.0, -1.0, 0.5)]
    chosen = FineTune(**{"epochs": 2, "optimizer": "adamw", "lr": 1e-3, "save_every": 2, **settings})
    fine_tune(model, batches, teacher=teacher or net(5), settings=chosen, checkpoint=path, callback=watch)


@pytest.mark.parametrize(("stops", "place"), [([1], "0 of 6, 0"), ([3], "2 of 6, 0"), ([6], "4 of 6, 1"), ([2, 1, 5], "4 of 6, 1")])
def test_resuming_in_the_same_process(stops: list[int], place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same object, partly trained. It ends like an undisturbed run, and one line says where it continues."""
    path, model, undisturbed = tmp_path / "run.pt", net(), net()
    train(undisturbed, None)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train(model, path, stop)
        assert not same(model, net())
    capsys.readouterr()
    train(model, path)
    assert same(model, undisturbed)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fine_tune:")]
    assert lines == [f"fine_tune: {path}: continuing after step {place} epochs done."]
    with pytest.raises(ValueError, match=r"initial weights.*trains in place.*copy\.deepcopy"):  # the run has ended: nothing to resume
        train(model, path)


def test_a_partly_trained_model_that_changed_is_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "run.pt", net()
    with pytest.raises(KeyboardInterrupt):
        train(model, path, 3)
    for other in (copy.deepcopy(model), model):
        with torch.no_grad():
            other.get_submodule("0").bias.add_(1)
        before = copy.deepcopy(other)
        with pytest.raises(ValueError, match=r"differs in: initial weights\. .*pass the network as it was cut"):
            train(other, path)
        assert same(other, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 2e-3}, r"setting lr \(0.001 in the checkpoint, 0.002 now\), optimizer"),
        ({"seed": 1}, r"setting seed \(0 in the checkpoint, 1 now\)\."),
        ({"epochs": 1}, r"setting epochs \(2 in the checkpoint, 1 now\), number of steps \(6 in the checkpoint, 3 now\)"),
        ({"optimizer": "soap"}, "setting optimizer .*, optimizer"),
        ({"teacher": net(6)}, r"differs in: teacher\."),
        ({"model": net(1)}, r"differs in: initial weights\."),
        ({"model": net(0, nn.ReLU())}, r"differs in: structure of the model\."),
    ],
)
def test_a_refusal_names_what_differs(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    train(net(), tmp_path / "run.pt")
    with pytest.raises(ValueError, match=rf"run\.pt: the checkpoint is of another run, which differs in: .*{message}|{message}"):
        train(**{"model": net(), "path": tmp_path / "run.pt", **change})


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "run.pt", net()
    train(net(), path)
    whole, draws = path.read_bytes(), random.Random(0)
    cases = [whole[:size] for size in (0, 10, 40, 60, len(whole) // 2, len(whole) - 1)] + [whole + b"x", b"PK\x03\x04" + whole]
    for place in [*range(0, 60, 7), *(draws.randrange(len(whole)) for _ in range(40))]:
        cases.append(whole[:place] + bytes([whole[place] ^ 1 << draws.randrange(8)]) + whole[place + 1 :])
    for damaged in cases:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"run\.pt: (the checkpoint is damaged|not a checkpoint of fine_tune)"):
            train(model, path)
        assert same(model, net())
        assert path.read_bytes() == damaged


# ---- clear errors


def edited(plan: Plan, **spec: Any) -> str:
    data = json.loads(plan.to_json())
    data["cuts"][0]["spec"].update(spec)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"groups": 0}, "groups 0 is impossible"),
        ({"groups": -1}, "groups -1 is impossible"),
        ({"groups": 2}, "2 groups do not divide 3 -> 8 channels"),
        ({"in_channels": 0}, "in_channels 0 is impossible"),
        ({"out_channels": -8}, "out_channels -8 is impossible"),
        ({"kernel": [0, 3]}, r"kernel \(0, 3\) is impossible"),
        ({"stride": [1, 0]}, r"stride \(1, 0\) is impossible"),
        ({"dilation": [0, 0]}, r"dilation \(0, 0\) is impossible"),
        ({"padding": [-1, 0]}, r"padding \(-1, 0\) is impossible"),
        ({"padding": "same", "stride": [2, 2]}, "padding 'same' is impossible with stride"),
        ({"kind": "linear"}, "a linear layer has a 1x1 kernel"),
        ({"in_channels": 10**30}, "in_channels: Input should be less"),
        ({"in_channels": 10**4200}, "in_channels: "),
        ({"bias": "x" * 9999}, "bias: "),
    ],
)
def test_impossible_geometry(spec: dict[str, Any], message: str, plan: Plan) -> None:
    with pytest.raises(ValueError, match=rf"^plan: at cuts\.0.*{message}") as caught:
        Plan.from_json(edited(plan, **spec))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("second", "message"),
    [("0", "0: cut twice"), ("0.a", r"0\.a: inside 0, which is cut, too"), ("0.a.b", "inside 0"), ("0-a", None), ("00", None)],
)
def test_cuts_that_exclude_each_other(second: str, message: str | None, plan: Plan) -> None:
    data = json.loads(plan.to_json())
    data["cuts"] = [data["cuts"][0], data["cuts"][1], {**data["cuts"][0], "name": second}]
    if message is None:
        assert len(Plan.from_json(json.dumps(data)).cuts) == 3
    else:
        with pytest.raises(ValueError, match=message):
            Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(value: float, plan: Plan) -> None:
    data = json.loads(plan.to_json())
    timing = {
        "before": 1.0,
        "after": 1.0,
        "rounds": 3,
        "conditions": {"threads": 1, "batch": 1, "dtype": "", "device": "", "memory_format": ""},
    }
    assert Plan.from_json(json.dumps({**data, "timing": timing}))
    for changed, place in (
        ({"timing": {**timing, "after": value}}, "timing.after"),
        ({"total": {**data["total"], "latency": value}}, "total.latency"),
        ({"cuts": [{**data["cuts"][0], "error": value}]}, "cuts.0.error"),
        ({"cuts": [{**data["cuts"][0], "damage": value}]}, "cuts.0.damage"),
    ):
        with pytest.raises(ValueError, match=f"plan: at {place}: .*finite"):
            Plan.from_json(json.dumps({**data, **changed}))


def test_quoted_input_is_short(plan: Plan, tmp_path: Path) -> None:
    long, data = "y" * 9999, json.loads(plan.to_json())
    texts = [{**data, long: 1}, {**data, "rule": [long]}, {**data, "format_version": long}]
    texts += [{**data, "cuts": [{**data["cuts"][0], **change}]} for change in ({"name": long, "rank": 99}, {"scheme": long}, {long: 2})]
    for text in texts:
        with pytest.raises(ValueError, match=r"^plan: ") as caught:
            Plan.from_json(json.dumps(text))
        assert len(str(caught.value)) < 900, str(caught.value)
    for text in (f"{long} = 1", f'"{long}" = 1', f'rule = "{long}"', f'schemes = "{long}"', f"a.{long}", "seed = " + "9" * 5000):
        (tmp_path / "r.toml").write_text(text)
        with pytest.raises(ValueError, match=r"r\.toml: ") as caught:
            Recipe.load(tmp_path / "r.toml")
        assert len(str(caught.value)) < 900, str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"description = '\xff'", "not UTF-8 text: invalid start byte at byte 15"),
        ("seed = 1".encode("utf-16"), "not UTF-8 text"),
        (b"rank = " + b"[" * 9999 + b"]" * 9999, "not TOML that can be read"),
        (b"a." * 99999 + b"a = 1", "a key has more than 1,000 parts"),
        (b"rank = " + b"[" * 400 + b"]" * 400, "recursion limit|not TOML"),
        (b"rank = ", "not TOML that can be read: Invalid value"),
        (b"description = 2020-01-01", "found the date or time 2020-01-01"),
        (b"seed = 99999999999999999999", "seed"),
    ],
)
def test_recipes_that_cannot_be_read(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(data)
    with pytest.raises(ValueError, match=rf"r\.toml: .*({message})"):
        Recipe.load(tmp_path / "r.toml")


@pytest.mark.parametrize("text", ["[" * 9999, '{"cuts":' * 9999, "[" * 9999 + "]" * 9999])
def test_json_nested_thousands_deep(text: str, folder: Path) -> None:
    (folder / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=r"plan\.json: at the whole file: "):
        load(net(), folder)
    with pytest.raises(ValueError, match=r"^plan: at the whole file"):
        Plan.from_json(text)


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("put", [_pipe, _device])
def test_pipes_and_devices(put: Callable[[Path], None], folder: Path, plan: Plan, tmp_path: Path) -> None:
    """They are refused at once, and stay. For the cache they cost only a warning."""
    signal.alarm(60)
    put(path := tmp_path / "r.toml")
    with pytest.raises(ValueError, match=r"r\.toml: expected a regular file, found a (pipe|device)"):
        Recipe.load(path)
    put(path := tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"expected a regular file, found a (pipe|device)"):
        train(net(), path)
    (weights,) = folder.glob("weights-*")
    put(weights)
    with pytest.raises(ValueError, match=r"expected a regular file, found a (pipe|device)"):
        load(net(), folder)
    put(folder / "plan.json")
    with pytest.raises(ValueError, match=r"plan\.json: expected a regular file, found a (pipe|device)"):
        load(net(), folder)
    with pytest.raises(ValueError, match=r"plan\.json: found a file that save did not write"):
        save(apply_plan(net(), plan), folder, plan)
    cache = Cache(tmp_path / "cache")
    cache.get("kind", "key", lambda: 1)
    (entry,) = (tmp_path / "cache").rglob("*.json")
    put(entry)
    with pytest.warns(UserWarning, match="damaged cache entry|cannot be written"):
        assert cache.get("kind", "key", lambda: 2) == 2


@pytest.mark.parametrize("name", ["n" * 300, "n" * 9999, "n\0n"])
def test_names_that_no_file_can_have(name: str, plan: Plan, tmp_path: Path) -> None:
    attempts: list[Callable[[], Any]] = [
        lambda: Recipe.load(name),
        lambda: Recipe.load(f"{name}.toml"),
        lambda: load(net(), tmp_path / name),
        lambda: train(net(), tmp_path / name),
        lambda: save(apply_plan(net(), plan), tmp_path / name, plan),
    ]
    for attempt in attempts:
        with pytest.raises((ValueError, OSError), match=r"n{50}|name|null|no such file"):
            attempt()
    for attempt in attempts[2::2]:
        with pytest.raises(ValueError, match=r"cannot be a file or folder: .*\. Choose another name\.$") as caught:
            attempt()
        assert len(str(caught.value)) < 300
    assert names(tmp_path) == []


def _full(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data[:100])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk(folder: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old files survive, temporary files are removed, and the error names the file."""
    train(net(), tmp_path / "run.pt")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", _full)
        with pytest.raises(OSError, match=r"No space left on device, and the file was not replaced: .*weights-") as caught:
            save(apply_plan(net(1), plan), folder, plan)
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match="No space left"):
            save(apply_plan(net(1), plan), tmp_path / "new", plan)
        with pytest.raises(OSError, match=r"No space left on device, and the file was not replaced: .*other\.pt"):
            train(net(), tmp_path / "other.pt")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert same(load(net(), folder), apply_plan(net(), plan))


# ---- mutations


@pytest.mark.parametrize("number", [96, pytest.param(1200, marks=pytest.mark.slow)])
def test_mutated_files(number: int) -> None:
    """Each is refused with its name, or read with an equal result; see benchmarks/mutations.py for 5,000."""
    result = run(number, seed=7)
    assert sum(sum(row.values()) for row in result["counts"].values()) == number
    assert result["bad"] == [], result["bad"][:3]
    assert not any(row[outcome] for row in result["counts"].values() for outcome in BAD)
    assert result["counts"]["fine-tuning checkpoint"]["refused"] == number // 6


# ---- kills and other processes


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A killed child process computes on one thread, and what it leaves must be equal to the last bit."""
    torch.set_num_threads(1)


def start(work: Callable[[], Any]) -> int:
    """Run a function in a child process; its number."""
    process = os.fork()
    if process:
        return process
    try:
        torch.set_num_threads(1)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def killed(work: Callable[[], Any], seconds: float) -> None:
    process = start(work)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def finished(process: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def seconds_of(work: Callable[[], Any]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


@pytest.mark.parametrize("repetitions", REPETITIONS)
def test_kill_during_save(repetitions: int, plan: Plan, tmp_path: Path) -> None:
    """A saved network is one of the two, and the next save removes the temporary files."""
    cuts, draws = [apply_plan(net(seed), plan) for seed in (0, 1)], random.Random(0)
    save(cuts[0], tmp_path, plan)
    once = seconds_of(lambda: save(cuts[0], tmp_path, plan))

    def work() -> None:
        while True:
            for cut in cuts:
                save(cut, tmp_path, plan)

    for index in range(repetitions):
        killed(work, draws.uniform(0.5, 5) * once)
        assert any(same(load(net(2), tmp_path), cut) for cut in cuts)
        save(cuts[index % 2], tmp_path, plan)
        assert same(load(net(2), tmp_path), cuts[index % 2])
        assert not list(tmp_path.glob(".writing-*"))


@pytest.mark.parametrize("repetitions", REPETITIONS)
def test_kill_during_planning(repetitions: int, tmp_path: Path) -> None:
    """The cache holds what was computed, and the plan is the undisturbed one."""
    model, draws = net(), random.Random(1)

    def work(folder: Path) -> Plan:
        return make_plan(model, X, budget=Budget(macs=0.6), schemes="channel", calibration=[X], cache=folder)

    expected = work(tmp_path / "whole")
    seconds = seconds_of(lambda: work(tmp_path / "timed"))
    for index in range(repetitions):
        folder = tmp_path / str(index)
        killed(lambda folder=folder: work(folder), draws.uniform(0.1, 0.9) * seconds)
        assert work(folder) == expected
        assert len(list(folder.rglob("*.json"))) == len(list((tmp_path / "whole").rglob("*.json")))


@pytest.mark.parametrize("repetitions", REPETITIONS)
def test_kill_during_fine_tuning(repetitions: int, tmp_path: Path) -> None:
    undisturbed, draws = net(), random.Random(2)
    train(undisturbed, tmp_path / "whole.pt", save_every=1)
    seconds = seconds_of(lambda: train(net(), tmp_path / "timed.pt", save_every=1))
    for index in range(repetitions):
        path, model = tmp_path / f"{index}.pt", net()
        killed(lambda path=path: train(net(), path, save_every=1), draws.uniform(0.1, 0.9) * seconds)
        train(model, path, save_every=1)
        assert same(model, undisturbed)
    assert not list(tmp_path.glob(".writing-*"))


@pytest.mark.parametrize("repetitions", REPETITIONS)
def test_two_savers_at_once(repetitions: int, plan: Plan, tmp_path: Path) -> None:
    """The folder holds one whole network, and nothing of the other."""
    cuts = [apply_plan(net(seed), plan) for seed in (0, 1)]
    for index in range(repetitions):
        folder = tmp_path / str(index)
        savers = [start(lambda cut=cut, folder=folder: [save(cut, folder, plan) for _ in range(5)]) for cut in cuts]
        assert [finished(process) for process in savers] == [True, True]
        assert any(same(load(net(2), folder), cut) for cut in cuts)
        assert len(names(folder)) == 2


@pytest.mark.parametrize("repetitions", REPETITIONS)
def test_a_reader_beside_a_writer(repetitions: int, plan: Plan, tmp_path: Path) -> None:
    """Every load gives one of the two networks."""
    cuts = [apply_plan(net(seed), plan) for seed in (0, 1)]
    save(cuts[0], tmp_path, plan)

    def work() -> None:
        while True:
            for cut in cuts[::-1]:
                save(cut, tmp_path, plan)

    writer = start(work)
    try:
        loaded = [load(net(2), tmp_path) for _ in range(5 * repetitions)]
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    indices = [[same(model, cut) for cut in cuts].index(True) for model in loaded]
    assert len(indices) == 5 * repetitions


def test_a_reader_that_loses_the_race_reads_again(folder: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process saves after plan.json was read, and removes the weights that it named."""
    from dsconv_surgery import checkpoint

    real, calls = checkpoint._parse, []

    def parse(*arguments: Any) -> Any:
        result = real(*arguments)
        calls.append(result)
        if len(calls) <= 2:
            save(apply_plan(net(len(calls)), plan), folder, plan)
        return result

    monkeypatch.setattr(checkpoint, "_parse", parse)
    assert same(load(net(), folder), apply_plan(net(2), plan))
    assert len(calls) == 3

"""A saved network loads the same. Damaged or missing files and other networks are errors that change nothing."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cifar import CifarResNet
from torch import Tensor, nn

from dsconv_surgery import Budget, apply_plan, compress, fold_back, load, make_plan, save, schemes, surgery
from dsconv_surgery.checkpoint import read_plan
from dsconv_surgery.compression import Compressed


class Net(nn.Module):
    def __init__(self, wide: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, wide, 3, padding=1)
        self.bn = nn.BatchNorm2d(wide)
        self.mid = nn.Conv2d(wide, 12, 3, padding=1, bias=False)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mid(F.relu(self.bn(self.stem(x))))).mean((2, 3)))


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 10, 8)


@pytest.fixture
def small(x: Tensor) -> Compressed:
    model = Net()
    model(x)  # changes the running statistics
    return cut(model.eval(), x)


@pytest.fixture
def folder(small: Compressed, tmp_path: Path) -> Path:
    save(small, tmp_path / "net")
    return tmp_path / "net"


def cut(model: nn.Module, x: Tensor, rank: int = 2) -> Compressed:
    return compress(model, x, rule="fixed", rank=rank, schemes=["channel", "bottleneck"], exclude=())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Weights bit for bit, and the module tree by identity."""
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    return {
        "bytes": {n: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in tensors.items() if not t.is_meta},
        "tensors": {n: (id(t), t.dtype, t.shape, t.stride(), t.requires_grad) for n, t in tensors.items()},
        "tree": [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
    }


def refused(fresh: nn.Module, folder: Path, message: str, kind: type[Exception] = ValueError) -> None:
    """Loading fails with this message, and does not change the fresh model."""
    before = snapshot(fresh)
    with pytest.raises(kind, match=message):
        load(fresh, folder)
    assert snapshot(fresh) == before


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("weights-*.safetensors")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- there and back


def test_outputs_are_equal(small: Compressed, folder: Path, x: Tensor) -> None:
    """Outputs are equal bit for bit. The fresh network, which has other weights, is not changed."""
    fresh = Net().eval()
    before = snapshot(fresh)
    again = load(fresh, folder)
    assert torch.equal(again(x), small.model(x))
    assert type(again) is Net
    assert snapshot(fresh) == before
    assert sorted(path.name for path in folder.iterdir()) == ["plan.json", weights_of(folder).name]
    assert read_plan(folder) == small.plan


def test_a_whole_network_with_every_scheme(tmp_path: Path) -> None:
    model, x = CifarResNet(8).eval(), torch.rand(1, 3, 32, 32)
    small = compress(model, x, budget=Budget(macs=0.5), exclude=())
    save(small, tmp_path)
    again = load(CifarResNet(8).eval(), tmp_path)
    assert torch.equal(again(x), small.model(x))
    assert torch.equal(fold_back(again, small.plan)(x), fold_back(small.model, small.plan)(x))


@pytest.mark.parametrize("scheme", schemes.scheme_names())
def test_every_scheme_comes_back(scheme: str, tmp_path: Path, x: Tensor) -> None:
    small = compress(Net().eval(), x, rule="fixed", rank=(2, 2) if scheme == "tucker" else 2, schemes=scheme, exclude=())
    assert small.plan.cuts
    save(small, tmp_path)
    assert torch.equal(load(Net().eval(), tmp_path)(x), small.model(x))


def test_a_fine_tuned_model_with_its_plan(small: Compressed, tmp_path: Path, x: Tensor) -> None:
    """`save` takes a model with its plan. `load` keeps the training mode of the fresh model."""
    with torch.no_grad():
        small.model.mid.reduce.weight.mul_(2)
    save(small.model, tmp_path, small.plan)
    again = load(Net().train(), tmp_path)
    assert again.training
    assert torch.equal(again.eval()(x), small.model(x))


def test_loading_never_factorises(folder: Path, small: Compressed, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("factorised")

    for module in (schemes, surgery):
        monkeypatch.setattr(module, "factorize", refuse)
    for name in schemes.scheme_names():
        monkeypatch.setattr(type(schemes.get_scheme(name)), "factorize", refuse)
    with pytest.raises(AssertionError, match="factorised"):
        apply_plan(Net(), small.plan)
    assert torch.equal(load(Net().eval(), folder)(x), small.model(x))


def test_nothing_is_unpickled(folder: Path, small: Compressed, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", Refusing)
    monkeypatch.setattr(pickle, "loads", Refusing)
    monkeypatch.setattr(pickle, "Unpickler", Refusing)
    monkeypatch.setattr(torch, "load", Refusing)
    assert torch.equal(load(Net().eval(), folder)(x), small.model(x))


class Sharing(nn.Module):
    """Two convolutions with one weight, an embedding and a head with one weight, a convolution with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.two.weight = self.one.weight
        self.table = nn.Embedding(6, 8)
        self.head = nn.Linear(8, 6, bias=False)
        self.head.weight = self.table.weight
        self.again = self.stem

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(F.relu(self.one(F.relu(self.stem(x)))))
        return self.head(x.mean((2, 3)) + self.table(torch.arange(x.shape[0], device=x.device)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_shared_tensors_stay_shared(layout: torch.memory_format, tmp_path: Path, x: Tensor) -> None:
    model = Sharing().eval().to(memory_format=layout)
    small = cut(model, x)
    assert [c.name for c in small.plan.cuts] == ["stem"]
    save(small, tmp_path)
    again: Any = load(Sharing().eval(), tmp_path)
    assert torch.equal(again(x), small.model(x))
    assert again.one.weight is again.two.weight
    assert again.table.weight is again.head.weight
    assert again.again is again.stem
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in small.model.parameters())
    assert again.one.weight.stride() == small.model.one.weight.stride()
    with torch.no_grad():
        again.one.weight.zero_()
    assert not again.two.weight.any()


def test_channels_last_weights_come_back_so(tmp_path: Path, x: Tensor) -> None:
    """Weights have the saved memory format, not that of the fresh model."""
    model = Net().eval()
    model.mid.to(memory_format=torch.channels_last)
    small = cut(model, x)
    save(small, tmp_path)
    for fresh in (Net().eval(), Net().eval().to(memory_format=torch.channels_last)):
        again: Any = load(fresh, tmp_path)
        assert torch.equal(again(x), small.model(x))
        assert again.mid.reduce.weight.is_contiguous(memory_format=torch.channels_last)
        assert not again.mid.reduce.weight.is_contiguous()
    assert load(Net(), tmp_path).get_parameter("stem.reduce.weight").is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype, tmp_path: Path, x: Tensor) -> None:
    small = cut(Net().eval().to(dtype), x.to(dtype))
    save(small, tmp_path)
    again = load(Net().eval().to(dtype), tmp_path)
    assert torch.equal(again(x.to(dtype)), small.model(x.to(dtype)))
    assert {p.dtype for p in again.parameters()} == {dtype}
    refused(Net(), tmp_path, r": saved as torch.b?float(16|64), found torch.float32 in the fresh model. Convert the fresh model first")


def test_frozen_layers_follow_the_fresh_model(folder: Path) -> None:
    fresh = Net()
    fresh.mid.weight.requires_grad_(False)
    again = load(fresh, folder)
    assert not again.get_parameter("mid.reduce.weight").requires_grad
    assert again.get_parameter("stem.reduce.weight").requires_grad


# ---- damage


def test_a_truncated_weights_file(folder: Path) -> None:
    weights = weights_of(folder)
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(Net(), folder, r"the file is damaged: expected SHA-256 \w+\.\.\., found .*Copy it again, or save again")
    with pytest.raises(ValueError, match="damaged"):
        read_plan(folder)


@pytest.mark.parametrize("index", [0, 9, -1])
def test_one_flipped_bit(folder: Path, index: int) -> None:
    """In the header's length, in the header, in a weight."""
    weights = weights_of(folder)
    data = bytearray(weights.read_bytes())
    data[index] ^= 1
    weights.write_bytes(data)
    refused(Net(), folder, "the file is damaged: expected SHA-256 ")


def test_weights_that_are_no_safetensors(folder: Path) -> None:
    """The digest fits, the contents do not."""
    weights = weights_of(folder)
    weights.write_bytes(b"rubbish" * 10)
    data = json.loads((folder / "plan.json").read_text())
    data["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    del data["sha256"]  # as in folders of older versions
    (folder / "plan.json").write_text(json.dumps(data))
    refused(Net(), folder, "expected a safetensors file, found another")


def test_missing_weights(folder: Path) -> None:
    weights_of(folder).unlink()
    refused(Net(), folder, r"safetensors: not there, but plan\.json names it", FileNotFoundError)


def test_a_missing_plan_and_a_missing_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "plan.json").unlink()
    for place in (folder, tmp_path / "nowhere"):
        refused(Net(), place, r"plan\.json: not there. Expected a folder written by dsconv_surgery.save", FileNotFoundError)


@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_truncated_plan(folder: Path, share: float) -> None:
    path = folder / "plan.json"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(Net(), folder, r"plan\.json: at the whole file: Invalid JSON")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(weights_fil="x"), r"plan\.json: unknown key 'weights_fil' at weights_fil. Did you mean 'weights_file'"),
        (lambda d: d["plan"]["cuts"][0].update(rnak=1), r"unknown key 'rnak' at plan\.cuts\.0\.rnak. Did you mean 'rank'"),
        (lambda d: d.pop("weights_sha256"), r"plan\.json: at weights_sha256: .*required"),
        (lambda d: d.update(weights_file="../../etc/passwd"), "expected a plain file name, found weights_file"),
        (lambda d: d["plan"]["cuts"][0].update(rank=999), "rank 999 is above the full rank"),
        (lambda d: d["plan"].update(format_version=2), r"plan\.json: at plan\.format_version: found version 2, expected 1"),
    ],
)
def test_a_plan_with_a_mistake(folder: Path, edit: Callable[[Any], None], message: str) -> None:
    data = json.loads((folder / "plan.json").read_text())
    edit(data)
    (folder / "plan.json").write_text(json.dumps(data))
    refused(Net(), folder, message)


def test_another_network(folder: Path) -> None:
    refused(nn.Sequential(nn.Conv2d(3, 8, 3)), folder, "the plan was made for another network. stem: .*no such layer")


def test_a_changed_layer(folder: Path) -> None:
    refused(Net(wide=10), folder, "stem: expected 3x3 3 -> 8, padding 1x1, bias, found 3x3 3 -> 10")


def test_a_changed_layer_beside_the_cuts(small: Compressed, tmp_path: Path, x: Tensor) -> None:
    """Layers that are not in the plan must fit, too: no other shape, no missing layer, no extra layer."""
    save(compress(Net().eval(), x, rule="fixed", rank=2, schemes="channel", exclude=()), tmp_path)
    wider, more, fewer = Net(), Net(), Net()
    wider.head = nn.Linear(12, 7)
    more.extra = nn.Linear(2, 2)
    fewer.bn = nn.Identity()
    for fresh, problem in (
        (wider, r"head.weight: saved with shape \[5, 12\], found \[7, 12\] in the fresh model. head.bias"),
        (more, "extra.weight: in the fresh model, but not saved. extra.bias"),
        (fewer, "bn.running_var: saved, but not in the fresh model"),
    ):
        refused(fresh, tmp_path, f"does not fit the fresh model.*{problem}.*Pass a model of the class that was saved")


def test_tied_in_one_place_only(tmp_path: Path, x: Tensor) -> None:
    """The fresh model must tie the same weights as the saved one."""
    tied, untied = Sharing().eval(), Sharing().eval()
    untied.two.weight = nn.Parameter(torch.rand(8, 8, 3, 3))
    plan = make_plan(tied, x, rule="fixed", rank=2, schemes="channel")
    save(apply_plan(tied, plan), tmp_path / "tied", plan)
    refused(untied, tmp_path / "tied", "two.weight: in the fresh model, but not saved")
    save(apply_plan(untied, plan), tmp_path / "untied", plan)
    refused(tied, tmp_path / "untied", "one.weight and two.weight: saved as separate tensors, but one tensor in the fresh model")


def test_a_network_that_is_cut_already(folder: Path) -> None:
    again = load(Net(), folder)
    refused(again, folder, "the plan was made for another network")


def test_a_fresh_model_on_the_meta_device(folder: Path) -> None:
    refused(Net().to("meta"), folder, "expected a fresh model with values, found one on the meta device. Build it on a real device")


# ---- saving goes wrong


def test_what_cannot_be_saved(small: Compressed, tmp_path: Path, x: Tensor) -> None:
    """Without a plan, without cuts or without values, nothing is written."""
    target = tmp_path / "net"
    with pytest.raises(ValueError, match="expected a plan with the model, found none"):
        save(small.model, target)
    with pytest.raises(ValueError, match=r"stem: expected the links reduce, expand .*found Conv2d"):
        save(Net(), target, small.plan)
    empty = apply_plan(Net().to("meta"), small.plan, init="empty")
    with pytest.raises(ValueError, match=r"expected a tensor with values to save, found a tensor on the meta device. Nothing was written"):
        save(empty, target, small.plan)
    assert not target.exists()


def test_a_view_of_another_tensor(tmp_path: Path, x: Tensor) -> None:
    """Buffers that share memory are saved with their values."""

    def viewing() -> Net:
        model = Net().eval()
        model.register_buffer("grid", torch.rand(4, 6))
        model.register_buffer("row", model.get_buffer("grid")[1])
        model.register_buffer("wide", torch.rand(3, 1).expand(3, 4))
        return model

    small = cut(viewing(), x)
    save(small, tmp_path)
    fresh = viewing()
    fresh.register_buffer("wide", fresh.get_buffer("wide").contiguous())
    again = load(fresh, tmp_path)
    for name, value in small.model.named_buffers():
        assert torch.equal(again.get_buffer(name), value)


class WithExtraState(Net):
    def get_extra_state(self) -> Any:
        return {"epoch": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_state_that_is_not_a_tensor(tmp_path: Path, x: Tensor) -> None:
    small = cut(WithExtraState().eval(), x)
    with pytest.raises(ValueError, match=r"_extra_state: expected a tensor with values to save, found dict. Nothing was written"):
        save(small, tmp_path / "net")
    assert not (tmp_path / "net").exists()


def _failing_replace(index: int) -> Callable[..., None]:
    real, calls = os.replace, []

    def replace(*places: Any) -> None:
        calls.append(places)
        if len(calls) == index:
            raise OSError("the disk is gone")
        real(*places)

    return replace


def _failing_write(index: int) -> Callable[..., None]:
    """A `Path.write_bytes` whose call with this number writes a half and is interrupted."""
    real, calls = Path.write_bytes, []

    def write_bytes(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) == index:
            real(path, data[: len(data) // 2])
            raise KeyboardInterrupt
        real(path, data)

    return write_bytes


@pytest.mark.parametrize("what", ["weights in place", "plan in place", "weights written", "plan written"])
@pytest.mark.parametrize("first", [True, False])
def test_a_crash_while_saving(
    what: str, first: bool, small: Compressed, tmp_path: Path, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old network still loads, or there is still none. No temporary file is left."""
    target = tmp_path / "net"
    if not first:
        save(small, target)
    other = cut(Net().eval(), x, rank=1)
    with monkeypatch.context() as patch:
        if "written" in what:
            patch.setattr(Path, "write_bytes", _failing_write(1 if what == "plan written" else 2))
        else:
            patch.setattr(os, "replace", _failing_replace(1 if what == "weights in place" else 2))
        with pytest.raises((OSError, KeyboardInterrupt)):
            save(other, target)
    assert [path for path in target.iterdir() if path.name != "plan.json" and not path.name.startswith("weights-")] == []
    if first:
        refused(Net(), target, "plan.json: not there", FileNotFoundError)
    else:
        assert torch.equal(load(Net().eval(), target)(x), small.model(x))
    save(other, target)
    assert torch.equal(load(Net().eval(), target)(x), other.model(x))
    assert len(list(target.iterdir())) == 2


def test_a_second_network_over_the_first(folder: Path, small: Compressed, x: Tensor) -> None:
    """Only the old weights are removed from the folder, no other files."""
    others = {"notes.txt", "weights-of-mine.safetensors"}
    old = weights_of(folder).name
    for name in others:
        (folder / name).write_text("text")
    other = cut(Net().eval(), x, rank=1)
    save(other, folder)
    new = json.loads((folder / "plan.json").read_text())["weights_file"]
    assert new != old
    assert {path.name for path in folder.iterdir()} == {"plan.json", new, *others}
    assert torch.equal(load(Net().eval(), folder)(x), other.model(x))


def test_saving_the_same_again_changes_nothing(folder: Path, small: Compressed) -> None:
    """The weights file is named by its content, so the folder is the same byte for byte."""
    before = contents(folder)
    save(small, folder)
    assert contents(folder) == before


def test_a_folder_can_be_moved(folder: Path, small: Compressed, tmp_path: Path, x: Tensor) -> None:
    """It holds no path."""
    shutil.move(folder, tmp_path / "elsewhere")
    assert torch.equal(load(Net().eval(), str(tmp_path / "elsewhere"))(x), small.model(x))


def test_a_plan_that_was_edited_after_cutting(small: Compressed, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mid: expected the links .*at rank 1"):
        save(small.model, tmp_path / "net", small.plan.replace("mid", rank=1))
    assert not (tmp_path / "net").exists()


def test_a_plan_from_make_plan_fits_as_well(tmp_path: Path, x: Tensor) -> None:
    model = Net().eval()
    plan = make_plan(model, x, rule="fixed", rank=2, schemes="channel", exclude=())
    small = apply_plan(model, plan)
    save(small, tmp_path, plan)
    assert torch.equal(load(Net().eval(), tmp_path)(x), small(x))

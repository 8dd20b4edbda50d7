"""What the tests share: torchvision made importable beside a CPU build of torch, and networks to cut."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # before torch is imported, and for child processes, too
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT / "examples"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # child processes test this checkout


def _define_torchvision_operators() -> None:
    """torchvision's compiled operators do not load beside a CPU build of torch; importing it needs at least their schemas."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _define_torchvision_operators.library = library  # type: ignore[attr-defined]  # kept alive: its end would undefine them


_define_torchvision_operators()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor fill the user's cache; each begins with an empty one."""
    monkeypatch.setenv("DSCONV_SURGERY_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every kind of device; CUDA is skipped where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device on this machine")
    return torch.device(request.param)


@pytest.fixture
def shared() -> Path:
    """The folder of CIFAR-10 and pretrained networks, where there is one."""
    if not (SHARED / "weights").exists():
        pytest.skip("the shared data (CIFAR-10 and pretrained networks) is not on this machine")
    return SHARED


@pytest.fixture
def nms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Non-maximum suppression in plain Python, where torchvision's compiled operators did not load; RoIAlign has one of its own."""
    extension = pytest.importorskip("torchvision.extension")
    if extension._has_ops():
        yield
        return
    library = torch.library.Library("torchvision", "IMPL")
    library.impl("nms", _plain_nms, "CPU")
    monkeypatch.setattr("torchvision.ops.boxes._assert_has_ops", lambda: None)
    yield
    library._destroy()


def _plain_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    from torchvision.ops import box_iou

    overlap = box_iou(boxes, boxes) > iou_threshold
    kept: list[int] = []
    for at in scores.argsort(descending=True, stable=True).tolist():
        if not overlap[at, kept].any():
            kept.append(at)
    return torch.tensor(kept, dtype=torch.int64)

"""What the tests share: torchvision made importable beside a CPU build of torch, and networks to cut."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT / "examples"))


def _define_torchvision_operators() -> None:
    """torchvision's compiled operators do not load beside a CPU build of torch; importing it needs at least their schemas."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")  # noqa: TOR901
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _define_torchvision_operators.library = library  # type: ignore[attr-defined]  # kept alive: its end would undefine them


_define_torchvision_operators()


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shared() -> Path:
    """The folder of CIFAR-10 and pretrained networks, where there is one."""
    if not (SHARED / "weights").exists():
        pytest.skip("the shared data (CIFAR-10 and pretrained networks) is not on this machine")
    return SHARED

"""BatchNorms that normalise by the images of all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dsconv_surgery.support import distributed
from dsconv_surgery.support.copies import model_device


@contextmanager
def synchronized_batchnorm(model: nn.Module) -> Iterator[None]:
    """With several processes, turn BatchNorms in training mode into nn.SyncBatchNorm inside the block, and back at its end.

    Only the class of a module changes, so the network keeps its module objects with their hooks and statistics. ValueError names a
    BatchNorm for which this is impossible.
    """
    modules = model.named_modules() if distributed.process_and_world_size()[1] > 1 else ()
    norms: dict[str, Any] = {name: m for name, m in modules if isinstance(m, _BatchNorm) and m.training}
    classes = {name: type(norm) for name, norm in norms.items()}
    device = model_device(model)
    for name, plain in classes.items():
        if device.type != "cuda" or plain not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise ValueError(
                f"fine_tune: {name} ({plain.__name__} on {device}) normalises by each batch. Several processes can do this together only "
                'on CUDA, and with a plain BatchNorm. Set FineTune(batchnorm="frozen") to use running statistics, or run one process.'
            )
    try:
        for norm in norms.values():
            norm.__class__, norm.process_group = nn.SyncBatchNorm, None
        yield
    finally:
        for name, norm in norms.items():
            norm.__class__ = classes[name]
            del norm.process_group

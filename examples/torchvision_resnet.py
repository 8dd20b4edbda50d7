"""Compress a torchvision classifier to half of its MACs, compare, save and load it.

python examples/torchvision_resnet.py --name resnet18 --weights DEFAULT --out resnet18-half

--weights DEFAULT downloads pretrained weights. With `none` they are random: costs and times are right, outputs have no meaning. A path
names a state_dict in the format of safetensors or torch, with any number of classes.
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from dsconv_surgery import Budget, compare, compress, load, save


def import_torchvision() -> Any:
    """The module torchvision.models. If the compiled operators do not load beside a CPU build of torch, their schemas are defined first."""
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import_torchvision.library = library = torch.library.Library("torchvision", "DEF")  # type: ignore[attr-defined]
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.import_module("torchvision.models")


def build(models: Any, name: str, weights: str) -> nn.Module:
    """A torchvision model with the weights that --weights names."""
    if weights in ("DEFAULT", "none"):
        return models.get_model(name, weights=None if weights == "none" else "DEFAULT").eval()
    path = Path(weights)
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    classifier = [key for key, module in models.get_model(name, weights=None).named_modules() if isinstance(module, nn.Linear)][-1]
    model = models.get_model(name, weights=None, num_classes=len(state[f"{classifier}.weight"]))
    model.load_state_dict(state)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="resnet18", help="a torchvision classifier")
    parser.add_argument("--weights", default="DEFAULT", help="DEFAULT, none or a path")
    parser.add_argument("--size", type=int, default=224, help="side of the input images")
    parser.add_argument("--macs", type=float, default=0.5, help="fraction of the MACs to keep")
    parser.add_argument("--schemes", nargs="*", default=["spatial", "channel", "tucker", "bottleneck"])
    parser.add_argument("--out", type=Path, required=True, help="folder for the cut network")
    options = parser.parse_args()

    models = import_torchvision()
    model = build(models, options.name, options.weights)
    x = torch.rand(1, 3, options.size, options.size)
    small = compress(model, x, budget=Budget(macs=options.macs), schemes=options.schemes, exclude=("conv1", "fc"))
    print(compare(model, small.model, x, plan=small.plan, latency=True))
    save(small, options.out)

    loaded = load(model, options.out)
    with torch.inference_mode():
        print(f"saved to {options.out}, reloaded, same outputs: {torch.equal(loaded(x), small.model(x))}")


if __name__ == "__main__":
    main()

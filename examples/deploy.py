"""Plan for onnxruntime, cut, save, load, fold BatchNorm, and deploy by ONNX, torch.export and torch.compile.

python examples/deploy.py [--out FOLDER] [--latency FRACTION]

Everything it needs is in examples/assets, and the extra `onnx`. It downloads nothing and takes about a minute on two CPU cores.
"""

import argparse
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from cifar import CifarResNet, demo_images, demo_resnet20
from torch import Tensor, nn

from dsconv_surgery import Budget, compare, compress, fold_batchnorm, load, save

TOLERANCE = 1e-4  # of the largest output


def check(name: str, expected: Tensor, output: Tensor) -> None:
    difference = float((output - expected).abs().max() / expected.abs().max())
    print(f"{name}: largest difference of outputs {difference:.1e}")
    if not difference <= TOLERANCE:
        raise SystemExit(f"{name} gives other outputs than eager mode")


def as_onnx(model: nn.Module, x: Tensor, file: Path) -> Callable[[Tensor], Tensor]:
    """Write a network as ONNX for any batch size; a function that runs it in onnxruntime."""
    batch = torch.export.Dim("batch")
    example = torch.cat([x, x])  # torch.export takes a batch of one for a constant
    torch.onnx.export(model, (example,), file, dynamo=True, verbose=False, dynamic_shapes=({0: batch},), external_data=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def as_exported(model: nn.Module, x: Tensor, file: Path) -> Callable[[Tensor], Tensor]:
    """Write a network with torch.export; the network that is read from the file, which needs neither this library nor the class."""
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(model, (torch.cat([x, x]),), dynamic_shapes=({0: batch},)), file)
    return torch.export.load(file).module()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to write to; a temporary one if not given")
    parser.add_argument("--latency", type=float, default=0.8, help="fraction of the time in onnxruntime to keep")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # of torch's exporter about itself
    model, (images, _) = demo_resnet20(), demo_images("test")
    x = images[:1]

    # Plan for the time in onnxruntime. The options and the networks are timed there.
    small = compress(model, x, budget=Budget(latency=arguments.latency), runtime="onnxruntime", schemes=["spatial", "channel"])
    print(str(compare(model, small.model, x, plan=small.plan, latency=True, data=images.split(250))).partition("whole network")[2])

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        save(small, folder / "network")
        loaded = load(CifarResNet(20).eval(), folder / "network")
        deployed = fold_batchnorm(loaded, x)
        expected = deployed(images)
        check("BatchNorm folded", loaded(images), expected)
        check("onnxruntime, any batch size", expected, as_onnx(deployed, x, folder / "small.onnx")(images))
        check("torch.export, any batch size", expected, as_exported(deployed, x, folder / "small.pt2")(images))
    if shutil.which("g++") or shutil.which("clang++"):
        check("torch.compile", expected[:1], torch.compile(deployed)(x))
    else:
        print("torch.compile: left out, as it needs a C++ compiler on CPUs. Install g++ or clang++.")


if __name__ == "__main__":
    main()

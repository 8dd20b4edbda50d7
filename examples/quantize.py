"""Cut a ResNet-20 and quantize it to int8: accuracy and time in onnxruntime, and compiled by torch.

python examples/quantize.py                               the network and images in examples/assets
python examples/quantize.py --data FOLDER [--json FILE]   all test images of CIFAR-10, and weights/resnet20_cifar10.safetensors

The network is cut to 40 % of its parameters by CP: from the weights alone, calibrated, and fine-tuned. BatchNorms are folded. Weights
are quantized per output channel, activations by their range on 256 training images: by onnxruntime (`pip install "dsconv_surgery[onnx]"`)
and, where it is installed (`pip install torchao`), by the pt2e of torchao for x86 CPUs. torch.compile, which needs a C++ compiler, then
makes torch's networks fast. All times are for one thread.
"""

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from cifar import Batches, cifar10, demo_images, demo_resnet20, load_resnet, to_input
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torch._inductor import config as inductor

from dsconv_surgery import Budget, FineTune, compress, fine_tune, fold_batchnorm

try:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
except ImportError as error:
    print(f"torchao is left out: {error}. Install it with pip install torchao.")
    x86 = None

BUDGET, SCHEME, BATCH, RANGES, ROUNDS = Budget(params=0.4), "cp", 64, 256, 15
ANY_BATCH = {0: torch.export.Dim("batch", min=1, max=4096)}
COLUMNS = ("float32", "int8", "torchao_int8", "float32_ms", "int8_ms", "compiled_ms", "torchao_int8_ms")
Call = Callable[[Tensor], Tensor]


class Reader(CalibrationDataReader):
    """Gives batches of images to onnxruntime."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"x": batch.numpy()}


def in_onnxruntime(folded: nn.Module, images: Tensor) -> tuple[Call, Call]:
    """A network in float32 and in int8, in onnxruntime."""
    with tempfile.TemporaryDirectory() as folder:
        dense, prepared, quantized = (Path(folder) / f"{name}.onnx" for name in ("float32", "prepared", "int8"))
        torch.onnx.export(folded, (images[:2],), dense, input_names=["x"], dynamic_shapes=(ANY_BATCH,), dynamo=True, verbose=False)
        quant_pre_process(str(dense), str(prepared))
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(prepared, quantized, Reader(images.split(BATCH)), quant_format=QuantFormat.QDQ, per_channel=True, **types)
        return session(dense), session(quantized)


def session(file: Path) -> Call:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    network = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(network.run(None, {"x": batch.numpy()})[0])


def in_torch(folded: nn.Module, images: Tensor) -> tuple[Call, Call]:
    """A network in float32, and quantized by torchao in int8, both compiled."""
    exported = torch.export.export(folded, (images[:2],), dynamic_shapes=(ANY_BATCH,))
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported.module(), quantizer)
    for batch in images.split(BATCH):
        prepared(batch)
    inductor.freezing = True  # weights are packed once
    return torch.compile(exported.module(), dynamic=True), torch.compile(convert_pt2e(prepared), dynamic=True)


def accuracy(network: Call, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent."""
    outputs = [network(batch) for batch in images.split(500)]
    return round(100 * float((torch.cat(outputs).argmax(1) == labels).double().mean()), 2)


def milliseconds(networks: Iterable[Call], batch: Tensor) -> list[float]:
    """The least time of each network for a batch, measured in turn."""
    samples: list[list[float]] = [[] for _ in networks]
    for _ in range(ROUNDS):
        for network, times in zip(networks, samples, strict=True):
            start = time.perf_counter()
            network(batch)
            times.append(1e3 * (time.perf_counter() - start))
    return [round(min(times), 2) for times in samples]


def cut_networks(dense: nn.Module, images: Tensor, options: argparse.Namespace) -> dict[str, nn.Module]:
    """The dense network, and three cut ones; two without fine-tuning."""
    batches, x = images[: options.calibration].split(64), images[:1]
    free = compress(dense, x, budget=BUDGET, schemes=SCHEME).model
    calibrated = compress(dense, x, budget=BUDGET, schemes=SCHEME, calibration=batches).model
    models = {"dense": dense, "cut, weights alone": free, "cut, calibrated": calibrated}
    if options.epochs:
        models["cut, fine-tuned"] = tuned = copy.deepcopy(calibrated)
        settings = FineTune(epochs=options.epochs, lr=options.lr, mix=0.0)  # mixed images need more epochs
        fine_tune(tuned, Batches(images[: options.train_images]), teacher=dense, settings=settings)
    return models


@torch.no_grad()
def quantized(models: dict[str, nn.Module], images: Tensor, test: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
    """The accuracy and the time of each network in each runtime and precision."""
    torch.set_num_threads(1)
    calls: dict[tuple[str, str], Call] = {}
    for name, model in models.items():
        folded = fold_batchnorm(model, images[:1])
        calls[name, "float32"], calls[name, "int8"] = in_onnxruntime(folded, images[:RANGES])
        if x86:
            calls[name, "compiled"], calls[name, "torchao_int8"] = in_torch(folded, images[:RANGES])
    rows: dict[str, dict[str, float]] = {name: {} for name in models}
    for (name, kind), call in calls.items():
        if kind != "compiled":  # which computes the same as float32
            rows[name][kind] = accuracy(call, test, labels)
    for (name, kind), time_of_call in zip(calls, milliseconds(calls.values(), test[:BATCH]), strict=True):
        rows[name][f"{kind}_ms"] = time_of_call
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with cifar10/ and weights/")
    parser.add_argument("--calibration", type=int, default=1024, help="number of calibration images")
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning; 0 for none")
    parser.add_argument("--train-images", type=int, default=10_000, help="largest number of images to fine-tune on")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of fine-tuning")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.data:
        dense = load_resnet(options.data / "weights" / "resnet20_cifar10.safetensors")
        (train, _), (pixels, numbers) = (cifar10(options.data / "cifar10", split) for split in ("train", "test"))
        images, test, labels = to_input(train), to_input(pixels), torch.from_numpy(numbers)
    else:
        dense, (images, _), (test, labels) = demo_resnet20(), demo_images("train"), demo_images("test")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "To copy construct from a tensor", UserWarning)  # of torch.compile about itself
        rows = quantized(cut_networks(dense, images, options), images, test, labels)
    columns = [name for name in COLUMNS if name in rows["dense"]]
    print(f"{len(test):,} test images in percent; milliseconds for {BATCH} images on one thread")
    print(f"{'network':18}", *(f"{name:>15}" for name in columns))
    for name, row in rows.items():
        print(f"{name:18}", *(f"{row[column]:15.2f}" for column in columns))
    if options.json:
        settings = {"test_images": len(test), "epochs": options.epochs, "train_images": options.train_images, "lr": options.lr}
        table = [{"network": name, **row} for name, row in rows.items()]
        options.json.write_text(json.dumps({**settings, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()

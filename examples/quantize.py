"""Cut a ResNet-20 and quantize it to int8: accuracy and time in onnxruntime.

python examples/quantize.py                               the network and images in examples/assets
python examples/quantize.py --data FOLDER [--json FILE]   all test images of CIFAR-10, and weights/resnet20_cifar10.safetensors

The network is cut to 40 % of its parameters by CP: from the weights alone, calibrated, and fine-tuned. Each network is exported with
BatchNorms folded and quantized by onnxruntime: weights per output channel, activations by their range on 256 training images.
It needs `pip install "dsconv_surgery[onnx]"`.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from cifar import Batches, cifar10, demo_images, demo_resnet20, load_resnet, to_input
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from dsconv_surgery import Budget, FineTune, compress, fine_tune, fold_batchnorm

BUDGET, SCHEME, BATCH, ROUNDS = Budget(params=0.4), "cp", 64, 15


class Reader(CalibrationDataReader):
    """Gives batches of images to onnxruntime."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"x": batch.numpy()}


def export(model: nn.Module, images: Tensor, folder: Path) -> tuple[Path, Path]:
    """ONNX files of a network, in float32 and in int8."""
    dense, prepared, quantized = (folder / f"{name}.onnx" for name in ("float32", "prepared", "int8"))
    batch = {0: torch.export.Dim("batch", min=1, max=4096)}
    folded = fold_batchnorm(model, images[:1])
    torch.onnx.export(folded, (images[:2],), dense, input_names=["x"], dynamic_shapes=(batch,), dynamo=True, verbose=False)
    quant_pre_process(str(dense), str(prepared))
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(prepared, quantized, Reader(images.split(BATCH)), quant_format=QuantFormat.QDQ, per_channel=True, **types)
    return dense, quantized


def session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def accuracy(file: Path, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent."""
    network = session(file)
    outputs = [torch.from_numpy(network.run(None, {"x": batch.numpy()})[0]) for batch in images.split(500)]
    return round(100 * float((torch.cat(outputs).argmax(1) == labels).double().mean()), 2)


def milliseconds(files: list[Path], batch: Tensor) -> list[float]:
    """The least time of each network for a batch, on one thread, measured in turn."""
    networks, times = [session(file) for file in files], [[] for _ in files]
    for _ in range(ROUNDS):
        for network, samples in zip(networks, times, strict=True):
            start = time.perf_counter()
            network.run(None, {"x": batch.numpy()})
            samples.append(1e3 * (time.perf_counter() - start))
    return [round(min(samples), 2) for samples in times]


def networks(dense: nn.Module, images: Tensor, calibration: int, epochs: int) -> dict[str, nn.Module]:
    """The dense network, and three cut ones; two without fine-tuning."""
    batches, x = images[:calibration].split(64), images[:1]
    free = compress(dense, x, budget=BUDGET, schemes=SCHEME).model
    calibrated = compress(dense, x, budget=BUDGET, schemes=SCHEME, calibration=batches).model
    models = {"dense": dense, "cut, weights alone": free, "cut, calibrated": calibrated}
    if epochs:
        models["cut, fine-tuned"] = tuned = copy.deepcopy(calibrated)
        fine_tune(tuned, Batches(images), teacher=dense, settings=FineTune(epochs=epochs))
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with cifar10/ and weights/")
    parser.add_argument("--calibration", type=int, default=1024, help="number of calibration images")
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning; 0 for none")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.data:
        dense = load_resnet(options.data / "weights" / "resnet20_cifar10.safetensors")
        (train, _), (pixels, numbers) = (cifar10(options.data / "cifar10", split) for split in ("train", "test"))
        images, test, labels = to_input(train), to_input(pixels), torch.from_numpy(numbers)
    else:
        dense, (images, _), (test, labels) = demo_resnet20(), demo_images("train"), demo_images("test")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files: list[Path] = []
        models = networks(dense, images, options.calibration, options.epochs)
        for index, model in enumerate(models.values()):
            place = Path(folder) / str(index)
            place.mkdir()
            files += export(model, images[:256], place)
        times = milliseconds(files, test[:BATCH])
        print(f"{'network':20} {'float32 %':>10} {'int8 %':>8} {'float32 ms':>11} {'int8 ms':>8}   ({BATCH} images, one thread)")
        for index, name in enumerate(models):
            single, quantized = (accuracy(file, test, labels) for file in files[2 * index : 2 * index + 2])
            single_ms, int8_ms = times[2 * index : 2 * index + 2]
            print(f"{name:20} {single:10.2f} {quantized:8.2f} {single_ms:11.2f} {int8_ms:8.2f}")
            rows.append({"network": name, "float32": single, "int8": quantized, "float32_ms": single_ms, "int8_ms": int8_ms})
    if options.json:
        options.json.write_text(json.dumps({"test_images": len(test), "epochs": options.epochs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

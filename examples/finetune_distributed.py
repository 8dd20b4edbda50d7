"""Calibrate and fine-tune in several processes: each works on its share of every batch.

torchrun --nproc-per-node 2 examples/finetune_distributed.py

On one machine or more, with CUDA where there is some (one device for each process); run as plain Python it is one process, with the
same batches and, to rounding, the same losses. All it needs is in examples/assets.
"""

import argparse
import os

import torch
import torch.distributed as dist
from cifar import Batches, accuracy, demo_images, demo_resnet20

from dsconv_surgery import Budget, FineTune, compress, fine_tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="to train on")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched():  # a process group makes calibration sum its moments over all processes
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    model = demo_resnet20().to(device)
    images, labels = demo_images("train")  # the same in every process: shares are taken of batches
    test, test_labels = (t.to(device) for t in demo_images("test"))
    small = compress(
        model,
        test[:1],
        budget=Budget(params=0.2),
        schemes="channel",
        rule="uniform",
        exclude=("conv1", "linear"),
        calibration=images[:512].split(128),
    )
    before = accuracy(small.model, test, test_labels)
    batches = Batches(images[: options.images], labels[: options.images])
    history = fine_tune(small.model, batches, teacher=model, settings=FineTune(epochs=options.epochs, lr=3e-4))
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("losses:", *(f"{epoch.loss:.6f}" for epoch in history.epochs))
        print(f"accuracy on 1,000 test images: {before:.1f} % -> {accuracy(small.model, test, test_labels):.1f} %")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Calibrate and fine-tune in several processes, each of which takes its part of every batch.

torchrun --nproc-per-node 2 examples/finetune_distributed.py

It runs on one or several machines, with one CUDA device for each process if there are any. Started with python, it runs in one process
with the same batches and, to rounding, the same losses. The network and the images are in examples/assets.
"""

import argparse
import os

import torch
import torch.distributed as dist
from cifar import Batches, accuracy, demo_images, demo_resnet20

from dsconv_surgery import Budget, FineTune, compress, fine_tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="number of training images")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched():  # calibration uses all processes of an initialised group
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    model = demo_resnet20().to(device)
    images, labels = demo_images("train")  # the same images in every process
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

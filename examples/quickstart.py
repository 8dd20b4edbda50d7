"""Compress the shipped ResNet-20 by 60 % of its parameters, look at what it cost, keep it, and bring it back.

python examples/quickstart.py

Everything it needs is in examples/assets; no training, no downloads, well under a minute on two CPU cores.
"""

import tempfile

import torch
from cifar import CifarResNet, accuracy, demo_images, demo_resnet20

from dsconv_surgery import Budget, compress, load, save


def main() -> None:
    model = demo_resnet20()
    images, labels = demo_images("test")

    small = compress(model, images[:1], budget=Budget(params=0.4), schemes=["cp", "depthwise"], exclude=("conv1", "linear"), progress=True)

    print(small.report)
    print(f"accuracy on 1,000 test images: {accuracy(model, images, labels):.1f} % -> {accuracy(small.model, images, labels):.1f} %")

    with tempfile.TemporaryDirectory() as folder:
        save(small, folder)
        again = load(CifarResNet(20).eval(), folder)
    with torch.inference_mode():
        same = torch.equal(again(images[:100]), small.model(images[:100]))
    print(f"saved, reloaded, same outputs: {same}")
    if not same:
        raise SystemExit("the reloaded network gives other outputs")


if __name__ == "__main__":
    main()

"""Compress the shipped ResNet-20 by 73 % of its parameters, with and without images, look at what it cost, keep it, bring it back.

python examples/quickstart.py

Everything it needs is in examples/assets; no training, no labels, no downloads, two to three minutes on two CPU cores.
"""

import tempfile

import torch
from cifar import CifarResNet, accuracy, demo_images, demo_resnet20

from dsconv_surgery import Budget, compare, compress, load, save


def main() -> None:
    model = demo_resnet20()
    images, labels = demo_images("test")

    unlabelled, _ = demo_images("train")
    settings = {"budget": Budget(params=0.27), "schemes": "cp", "exclude": ("conv1", "linear")}
    batches = unlabelled[:512].split(128)

    from_weights = compress(model, images[:1], **settings, rule="uniform")
    small = compress(model, images[:1], **settings, rule="uniform", calibration=batches, progress=True)
    budgeted = compress(model, images[:1], **settings, calibration=batches, progress=True)

    print(compare(model, small.model, images[:1], plan=small.plan, data=images.split(250)))
    models = (model, from_weights.model, small.model, budgeted.model)
    dense, without, calibrated, sensitive = (accuracy(m, images, labels) for m in models)
    print(f"accuracy on 1,000 test images: {dense:.1f} % -> {without:.1f} % from the weights alone")
    print(f"accuracy on 1,000 test images: {dense:.1f} % -> {calibrated:.1f} % calibrated on 512 unlabelled images")
    print(f"accuracy on 1,000 test images: {dense:.1f} % -> {sensitive:.1f} % and with the ranks where they matter (the default rule)")

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

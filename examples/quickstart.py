"""Compress the shipped ResNet-20, with and without images, look at what it cost, fine-tune it, keep it, bring it back.

python examples/quickstart.py

Everything it needs is in examples/assets; no downloads, under three minutes on two CPU cores.
"""

import tempfile

import torch
from cifar import Batches, CifarResNet, accuracy, demo_images, demo_resnet20

from dsconv_surgery import Budget, FineTune, compare, compress, fine_tune, load, save


def main() -> None:
    model = demo_resnet20()
    images, labels = demo_images("test")

    unlabelled, their_labels = demo_images("train")
    settings = {"schemes": "cp", "exclude": ("conv1", "linear")}
    batches = unlabelled[:512].split(128)

    from_weights = compress(model, images[:1], budget=Budget(params=0.27), **settings, rule="uniform")
    calibrated = compress(model, images[:1], budget=Budget(params=0.27), **settings, calibration=batches, progress=True)
    print(compare(model, calibrated.model, images[:1], plan=calibrated.plan, data=images.split(250)))
    dense, without, within = (accuracy(m, images, labels) for m in (model, from_weights.model, calibrated.model))
    print(f"accuracy on 1,000 test images: {dense:.1f} % -> {without:.1f} % from the weights alone")
    print(f"accuracy on 1,000 test images: {dense:.1f} % -> {within:.1f} % calibrated on 512 unlabelled images")

    small = compress(model, images[:1], budget=Budget(params=0.12), **settings, calibration=batches, progress=True)
    print("\n".join(str(small.report).splitlines()[-2:]))
    cut = accuracy(small.model, images, labels)
    tuning = FineTune(epochs=4, lr=5e-4, channels_last=True)
    history = fine_tune(small.model, Batches(unlabelled, their_labels), teacher=model, settings=tuning, progress=True)
    tuned = accuracy(small.model, images, labels)
    print(history)
    print(f"accuracy on 1,000 test images: {dense:.1f} % -> {cut:.1f} % cut deeper")
    print(f"accuracy on 1,000 test images: {dense:.1f} % -> {tuned:.1f} % and fine-tuned for {tuning.epochs} epochs on 5,000 images")

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

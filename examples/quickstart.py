"""Compress a ResNet-20 with and without images, compare, fine-tune, save and load it.

python examples/quickstart.py

Everything it needs is in examples/assets. It downloads nothing and takes about three minutes on two CPU cores.
"""

import tempfile

import torch
from cifar import Batches, CifarResNet, accuracy, demo_images, demo_resnet20

from dsconv_surgery import Budget, FineTune, compare, compress, fine_tune, load, save


def main() -> None:
    model = demo_resnet20()
    test_images, test_labels = demo_images("test")
    train_images, train_labels = demo_images("train")
    x = test_images[:1]  # an example input
    calibration = train_images[:512].split(128)  # batches without labels
    settings = {"schemes": "cp", "exclude": ("conv1", "linear")}

    from_weights = compress(model, x, budget=Budget(params=0.27), **settings, rule="uniform")
    calibrated = compress(model, x, budget=Budget(params=0.27), **settings, calibration=calibration)
    print(compare(model, calibrated.model, x, plan=calibrated.plan, data=test_images.split(250)))
    dense, data_free, with_images = (accuracy(m, test_images, test_labels) for m in (model, from_weights.model, calibrated.model))
    print(f"accuracy on 1,000 test images: {dense:.1f} % -> {data_free:.1f} % from the weights alone")
    print(f"accuracy on 1,000 test images: {dense:.1f} % -> {with_images:.1f} % calibrated on 512 unlabelled images")

    small = compress(model, x, budget=Budget(params=0.12), **settings, calibration=calibration)
    print("\n".join(line for line in str(small.report).splitlines() if line.startswith("MACs")))
    cut = accuracy(small.model, test_images, test_labels)
    fine_tuning = FineTune(epochs=4, lr=5e-4, channels_last=True)
    history = fine_tune(small.model, Batches(train_images, train_labels), teacher=model, settings=fine_tuning)
    tuned = accuracy(small.model, test_images, test_labels)
    print(history)
    print(f"accuracy on 1,000 test images: {dense:.1f} % -> {cut:.1f} % cut deeper")
    print(f"accuracy on 1,000 test images: {dense:.1f} % -> {tuned:.1f} % and fine-tuned for {fine_tuning.epochs} epochs on 5,000 images")

    with tempfile.TemporaryDirectory() as folder:
        save(small, folder)
        loaded = load(CifarResNet(20).eval(), folder)
    with torch.inference_mode():
        same = torch.equal(loaded(test_images[:100]), small.model(test_images[:100]))
    print(f"saved, reloaded, same outputs: {same}")
    if not same:
        raise SystemExit("the reloaded network gives other outputs")


if __name__ == "__main__":
    main()

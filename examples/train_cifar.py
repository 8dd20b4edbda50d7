"""Train a ResNet for CIFAR-10 from scratch, as the one in examples/assets was trained.

python examples/train_cifar.py --data FOLDER --out resnet20.safetensors

FOLDER holds CIFAR-10 as sheets (see cifar.py); if it does not, torchvision downloads CIFAR-10 there. --hold-out leaves out training
images on which settings can be chosen later. The test images are used once, after the last epoch. Training takes less than an hour
on two CPU cores with bfloat16 matrix units and --compile, and minutes on a GPU.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar import CifarResNet, accuracy, augment, cifar10, to_input
from safetensors.torch import save_file
from tqdm import tqdm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write; a log is written beside it")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--hold-out", type=int, default=0, help="number of training images to leave out, at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the network with torch.compile: twice as fast on a CPU")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    images, labels = (part[: len(part) - options.hold_out] for part in cifar10(options.data, "train"))
    x, y = to_input(images).to(options.device), torch.from_numpy(labels).to(options.device)
    model = CifarResNet(options.depth).to(options.device, memory_format=torch.channels_last)
    forward = torch.compile(model) if options.compile else model
    kernels = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]  # biases and BatchNorm weights
    optimizer = torch.optim.SGD(
        [{"params": kernels, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.lr,
        momentum=0.9,
        nesterov=True,
    )
    steps = len(x) // options.batch  # of an epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=options.epochs * steps, pct_start=0.1, cycle_momentum=False
    )
    log: dict[str, object] = {"settings": {k: str(v) for k, v in vars(options).items() if k not in ("data", "out")}}
    epochs: list[dict[str, float]] = []
    log.update(torch=torch.__version__, parameters=sum(p.numel() for p in model.parameters()), epochs=epochs)

    start = time.perf_counter()
    for epoch in range(options.epochs):
        order = torch.randperm(len(x), device=options.device)
        loss_sum, hits = 0.0, 0
        for indices in tqdm(order[: steps * options.batch].split(options.batch), desc=f"epoch {epoch + 1}", leave=False):
            batch = augment(x[indices]).contiguous(memory_format=torch.channels_last)
            with torch.autocast(x.device.type, torch.bfloat16):
                logits = forward(batch)
            loss = F.cross_entropy(logits.float(), y[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += float(loss.detach()) * len(indices)
            hits += int((logits.argmax(1) == y[indices]).sum())
        images_used = steps * options.batch
        epochs.append(
            {
                "epoch": epoch + 1,
                "train_loss": round(loss_sum / images_used, 4),
                "train_accuracy": round(100 * hits / images_used, 2),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
        print(epochs[-1], flush=True)

    model.to(memory_format=torch.contiguous_format)
    half = {k: v.cpu().half() if v.is_floating_point() else v.cpu() for k, v in model.state_dict().items()}
    save_file(half, options.out)
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in half.items()})
    test_images, test_labels = cifar10(options.data, "test")
    test_x, test_y = to_input(test_images).to(options.device), torch.from_numpy(test_labels).to(options.device)
    log["test_accuracy_of_stored_half_precision_weights"] = accuracy(model, test_x, test_y)
    print(f"test accuracy {log['test_accuracy_of_stored_half_precision_weights']:.2f} %")
    options.out.with_suffix(".json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()

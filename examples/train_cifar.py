"""Train a CIFAR ResNet from scratch: the network that this repository ships came from this script.

python examples/train_cifar.py --data FOLDER --out resnet20.safetensors

FOLDER holds CIFAR-10 as sheets (see cifar.py), else torchvision downloads it there. All 50,000 training images are used (but
those that --hold-out leaves for choosing settings of fine-tuning by: a network knows by heart those that it was trained on),
nothing is chosen on the test images, which are looked at once, after the last epoch. Under an hour on two CPU cores
with bfloat16 matrix units and --compile, minutes on a GPU.
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
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--hold-out", type=int, default=0, help="leave the last so many training images out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: twice as fast on a CPU")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    images, labels = (part[: len(part) - options.hold_out] for part in cifar10(options.data, "train"))
    x, y = to_input(images).to(options.device), torch.from_numpy(labels).to(options.device)
    model = CifarResNet(options.depth).to(options.device, memory_format=torch.channels_last)
    step = torch.compile(model) if options.compile else model
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=options.lr,
        momentum=0.9,
        nesterov=True,
    )
    per_epoch = len(x) // options.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=options.epochs * per_epoch, pct_start=0.1, cycle_momentum=False
    )
    log: dict[str, object] = {"settings": {k: str(v) for k, v in vars(options).items() if k not in ("data", "out")}}
    epochs: list[dict[str, float]] = []
    log.update(torch=torch.__version__, parameters=sum(p.numel() for p in model.parameters()), epochs=epochs)

    start = time.perf_counter()
    for epoch in range(options.epochs):
        order = torch.randperm(len(x), device=options.device)
        total, hits = 0.0, 0
        for chosen in tqdm(order[: per_epoch * options.batch].split(options.batch), desc=f"epoch {epoch + 1}", leave=False):
            batch = augment(x[chosen]).contiguous(memory_format=torch.channels_last)
            with torch.autocast(x.device.type, torch.bfloat16):
                scores = step(batch)
            loss = F.cross_entropy(scores.float(), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(chosen)
            hits += int((scores.argmax(1) == y[chosen]).sum())
        seen = per_epoch * options.batch
        epochs.append(
            {
                "epoch": epoch + 1,
                "train_loss": round(total / seen, 4),
                "train_accuracy": round(100 * hits / seen, 2),
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

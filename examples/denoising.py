"""Cut a network that removes noise from grey images: DnCNN (Zhang et al. 2017). Reports PSNR and MACs of the dense and the cut network.

python examples/denoising.py                                       train a small one on the images in examples/assets, then cut it
python examples/denoising.py --weights dncnn.safetensors --data FOLDER     cut a trained one

FOLDER/calibration has images to calibrate on, FOLDER/set12 (--test names another) images to measure the PSNR on. The images must be
clean: the noise, with a standard deviation of 25 of 255, is added here. The weights are a state_dict of `DnCNN` below, of any depth and
width; they are not part of this repository. Dense prediction needs no setting: the network's output is an image, and so is compared as
it is.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cifar import ASSETS, read_sheet
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from dsconv_surgery import Budget, compare, compress

NOISE = 25 / 255  # standard deviation, for values in [0, 1]


class DnCNN(nn.Module):
    """Predicts the noise and subtracts it. BatchNorms are folded into the convolutions."""

    def __init__(self, depth: int = 17, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.body(x)


def load_dncnn(path: Path) -> DnCNN:
    """A network of the depth and width of the weights."""
    state = load_file(path)
    kernels = [tensor for key, tensor in state.items() if key.endswith("weight")]
    model = DnCNN(len(kernels), max(len(kernel) for kernel in kernels))
    model.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    return model.eval()


def read_grey(folder: Path) -> list[Tensor]:
    """The pictures of a folder, in the order of their names, as (1, 1, height, width) with values in [0, 1]."""
    files = sorted(folder.glob("*.png"))
    if not files:
        raise SystemExit(f"{folder}: found no PNG files. Pass --data FOLDER with the folders calibration and set12 (or --test NAME).")
    arrays = [np.array(Image.open(file).convert("L"), dtype=np.float32) / 255 for file in files]
    return [torch.from_numpy(array)[None, None] for array in arrays]


def small_images(split: str) -> Tensor:
    """The images in examples/assets in grey: (n, 1, 32, 32)."""
    return torch.from_numpy(read_sheet(ASSETS / f"{split}.webp").mean(3, dtype=np.float32) / 255)[:, None]


def crops(images: list[Tensor], count: int, size: int, generator: torch.Generator) -> Tensor:
    """Squares from random places, as many of each image."""
    squares = []
    for index in range(count):
        image = images[index % len(images)]
        top, left = (int(torch.randint(side - size + 1, (), generator=generator)) for side in image.shape[2:])
        squares.append(image[:, :, top : top + size, left : left + size])
    return torch.cat(squares)


def add_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    return images + NOISE * torch.randn(images.shape, generator=generator)


def train(model: DnCNN, images: Tensor, steps: int, generator: torch.Generator) -> None:
    """Adam on the squared error, with new noise in each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        batch = images[torch.randint(len(images), (64,), generator=generator)]
        loss = F.mse_loss(model(add_noise(batch, generator)), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def psnr(model: nn.Module, images: list[Tensor]) -> float:
    """The mean over images of the peak signal-to-noise ratio in dB, always with the same noise."""
    generator = torch.Generator().manual_seed(0)
    errors = [float((model(add_noise(image, generator)).clamp(0, 1) - image).square().mean()) for image in images]
    return -10 * sum(map(math.log10, errors)) / len(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="safetensors file with the weights of a DnCNN")
    parser.add_argument("--data", type=Path, help="folder with the folders calibration and set12")
    parser.add_argument("--test", default="set12", help="name of the folder to measure the PSNR on")
    parser.add_argument("--macs", type=float, default=0.5, help="fraction of the MACs to keep")
    parser.add_argument("--schemes", nargs="*", default=["spatial", "channel", "tucker"], help="schemes to choose from")
    parser.add_argument("--crops", type=int, default=64, help="squares of images to calibrate on")
    parser.add_argument("--steps", type=int, default=400, help="steps of training, without --weights")
    options = parser.parse_args()
    if (options.weights is None) != (options.data is None):
        raise SystemExit("--weights and --data go together: a trained network, and images. Pass both or none.")

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if options.data:
        model, test = load_dncnn(options.weights), read_grey(options.data / options.test)
        squares = crops(read_grey(options.data / "calibration"), options.crops, 64, generator)
    else:
        model, images, test = DnCNN(depth=6, width=32), small_images("train"), list(small_images("test").split(1))
        train(model, images, options.steps, generator)
        model, squares = model.eval(), images[: 4 * options.crops]
    noisy = add_noise(squares, generator)

    small = compress(model, noisy[:1], budget=Budget(macs=options.macs), schemes=options.schemes, calibration=noisy.split(32))
    print(compare(model, small.model, noisy[:1], plan=small.plan, latency=True))
    values = [psnr(network, test) for network in (nn.Identity(), model, small.model)]
    print("PSNR on {} images: noisy {:.2f} dB, dense {:.2f} dB, cut {:.2f} dB".format(len(test), *values))


if __name__ == "__main__":
    main()

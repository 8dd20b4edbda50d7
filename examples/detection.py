r"""Cut backbone and head of an SSD, a detector of torchvision. Before that, show that a cut at full rank gives the same boxes.

A trained SSD, calibrated on the photos of a folder:
python examples/detection.py --weights DEFAULT --images FOLDER --out ssd-cut

A quick run, with random weights and images in examples/assets:
python examples/detection.py --name ssdlite320_mobilenet_v3_large --size 96 --count 4 --macs 0.8 --schemes bottleneck \
    --include detector.head detector.backbone.extra

The number of boxes varies, so two networks cannot be compared by their boxes. `WithScores` also gives the outputs of the head, whose
shapes are fixed, and `output=` selects them. With random weights costs and times are right, but boxes have no meaning.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from cifar import ASSETS, read_sheet
from torch import Tensor, nn
from torchvision_resnet import import_torchvision

from dsconv_surgery import Budget, Plan, apply_plan, compare, compress, find_convs, image_folder, make_plan, save
from dsconv_surgery.schemes import get_scheme

TOLERANCE = 0.01  # pixels, in float64: factors of wide layers are exact to about seven digits
BEST = 100  # boxes of an image that are compared: the last ones depend on how nearly equal scores are sorted


class WithScores(nn.Module):
    """An SSD in evaluation mode: gives scores and offsets of all anchors, and the boxes."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: list[Tensor]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        batch, _ = self.detector.transform(images)
        features = list(self.detector.backbone(batch.tensors).values())
        head = self.detector.head(features)
        anchors = self.detector.anchor_generator(batch, features)
        boxes = self.detector.postprocess_detections(head, anchors, batch.image_sizes)
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        return head, self.detector.transform.postprocess(boxes, batch.image_sizes, sizes)


def scores_and_offsets(result: Any) -> list[Tensor]:
    """The outputs of the head, for `output=`."""
    return [result[0]["cls_logits"], result[0]["bbox_regression"]]


def build(name: str, trained: bool) -> Any:
    """An SSD of torchvision in evaluation mode."""
    models = import_torchvision()
    weights = {"weights": "DEFAULT"} if trained else {"weights": None, "weights_backbone": None}
    detector = models.get_model(name, **weights)
    if not isinstance(detector, models.detection.ssd.SSD):
        raise SystemExit(f"{name}: found {type(detector).__name__}, expected an SSD. Choose ssd300_vgg16 or ssdlite320_mobilenet_v3_large.")
    if not trained:
        detector.topk_candidates = 5  # of each class; all scores are similar, so that there would be thousands of boxes to sort out
    return detector.eval()


def demo_pictures(count: int, size: int) -> Tensor:
    """Pictures of several images in examples/assets each."""
    tiles = -(-size // 32)  # in a row of a picture
    images = torch.from_numpy(read_sheet(ASSETS / "train.webp")).permute(0, 3, 1, 2) / 255
    count = min(count, len(images) // tiles**2)
    pictures = images[: count * tiles**2].view(count, tiles, tiles, 3, 32, 32).permute(0, 3, 1, 4, 2, 5)
    return pictures.reshape(count, 3, 32 * tiles, 32 * tiles)[:, :, :size, :size]


def set_statistics(detector: Any, pictures: Tensor) -> None:
    """Give BatchNorms of random weights the statistics of some pictures: the boxes then depend on the picture."""
    norms = [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over all batches, here of one
        norm.reset_running_stats()
    with torch.no_grad():
        features = detector.backbone.train()(detector.transform(list(pictures))[0].tensors)
        detector.head.train()(list(features.values()))
    detector.eval()


def at_full_rank(plan: Plan) -> Plan:
    for cut in plan.cuts:
        plan = plan.replace(cut.name, rank=get_scheme(cut.scheme).full_rank(cut.spec.one_group()))
    return plan


@torch.inference_mode()
def largest_difference(dense: nn.Module, cut: nn.Module, images: list[Tensor]) -> float:
    """From the best boxes of the dense network to the nearest ones of the same class in the cut network, in pixels."""
    differences = []
    for expected, result in zip(dense(images)[1], cut(images)[1], strict=True):
        distances = (expected["boxes"][:BEST, None] - result["boxes"]).abs().amax(2)
        distances[expected["labels"][:BEST, None] != result["labels"]] = float("inf")
        differences.append(float(distances.amin(1).max()))
    return max(differences)


def check_full_rank(model: nn.Module, plan: Plan, images: list[Tensor]) -> None:
    """Stop if a cut at full rank changes the boxes."""
    exact = copy.deepcopy(model).double()  # in float32, rounding errors would change which boxes overlap too much
    difference = largest_difference(exact, apply_plan(exact, at_full_rank(plan)), [image.double() for image in images])
    print(f"{len(plan.cuts)} layers cut at full rank: largest difference of boxes {difference:.1e} pixels")
    if not difference <= TOLERANCE:
        raise SystemExit("the boxes differ")


def options_of_the_command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="ssd300_vgg16", help="an SSD of torchvision")
    parser.add_argument("--weights", choices=("DEFAULT", "none"), default="none", help="DEFAULT (downloaded) or none (random)")
    parser.add_argument("--images", type=Path, help="folder of photos to calibrate on; images in examples/assets if not given")
    parser.add_argument("--size", type=int, help="side that images are resized to; that of the detector if not given")
    parser.add_argument("--count", type=int, default=16, help="number of these images")
    parser.add_argument("--macs", type=float, default=0.6, help="fraction of the MACs to keep")
    parser.add_argument("--schemes", nargs="*", default=["spatial", "channel", "tucker", "bottleneck"])
    parser.add_argument("--include", nargs="*", default=["*"], help="patterns of layers to cut, such as detector.head; all if not given")
    parser.add_argument("--out", type=Path, help="folder for the cut network")
    return parser.parse_args()


def main() -> None:
    options = options_of_the_command()
    trained = options.weights == "DEFAULT"
    torch.manual_seed(0)
    detector = build(options.name, trained)
    size = options.size or detector.transform.fixed_size[0]
    detector.transform.fixed_size = (size, size)
    if options.images:
        pictures = torch.cat(image_folder(options.images, size=size, mean=0.0, std=1.0, count=options.count))
    else:
        pictures = demo_pictures(options.count, size)
    if not trained:
        set_statistics(detector, pictures)
    model, images = WithScores(detector), list(pictures)
    example, batches = images[:1], [list(batch) for batch in pictures.split(8)]
    print(find_convs(model, example))

    settings = {"budget": Budget(macs=options.macs), "schemes": options.schemes, "include": options.include}
    check_full_rank(model, make_plan(model, example, rule="uniform", **settings), images[:2])

    small = compress(model, example, calibration=batches, output=scores_and_offsets, **settings)
    print(compare(model, small.model, example, plan=small.plan, latency=True, data=batches, output=scores_and_offsets))
    if options.out:
        save(small, options.out)
    with torch.inference_mode():
        boxes = small.model.detector(example)[0]["boxes"]  # the cut detector, without the scores
    print(f"the cut detector finds {len(boxes)} boxes in the first image")


if __name__ == "__main__":
    main()

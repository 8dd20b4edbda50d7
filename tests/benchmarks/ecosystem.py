"""Cut networks of Hugging Face transformers, ultralytics, Lightning and peft: find, cut, calibrate, compare, fine-tune, save, load, use.

python tests/benchmarks/ecosystem.py                  # runs all and writes results/ecosystem.json
python tests/benchmarks/ecosystem.py --only YOLO      # prints, writes nothing

All weights are random, and nothing is downloaded. A step works or is refused with a reason; anything else fails, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsconv_surgery import Budget, FineTune, Inputs, apply_plan, compare, compress, find_convs, fine_tune, load, make_plan, save
from dsconv_surgery.network.discovery import Skip

WORK = tempfile.TemporaryDirectory(prefix="ecosystem-")  # removed at the end
RESULT = Path(__file__).resolve().with_name("results") / "ecosystem.json"
SETTINGS: dict[str, Any] = {"budget": Budget(macs=0.6), "schemes": ["channel", "bottleneck"]}  # in closed form, so quick
CLASSES = 5


def import_torchvision() -> None:
    """Import torchvision; where its compiled operators do not load, with their schemas and a plain non-maximum suppression."""
    with suppress(RuntimeError):
        import torchvision

        return
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        overlap, chosen = torchvision.ops.box_iou(boxes, boxes) > threshold, []
        for index in scores.argsort(descending=True, stable=True).tolist():
            if not overlap[index, chosen].any():
                chosen.append(index)
        return torch.tensor(chosen, dtype=torch.int64)

    library.impl("nms", nms, "CPU")
    torchvision.ops.boxes._assert_has_ops = lambda: None
    import_torchvision.library = library  # type: ignore[attr-defined]  # its end would undefine the operators


Step = Callable[[], str]


@dataclass
class Case:
    """A network of a library, its inputs and batches, and what only this library does."""

    packages: tuple[str, ...]
    network: str
    build: Callable[[], nn.Module]
    example: Inputs
    batches: Any
    loss: Callable[..., Tensor]
    prepare: Callable[[Any], Any] | None = None  # for calibration
    prepare_training: Callable[[Any], Any] | None = None
    output: Callable[[Any], Any] | None = None
    # Further steps; each gets the dense network and the result of compress.
    steps: Mapping[str, Callable[[nn.Module, Any], str]] = field(default_factory=dict)
    # What is expected to be refused: a function, and words of the reason.
    refusals: Mapping[str, tuple[Callable[[nn.Module, Any], Any], str]] = field(default_factory=dict)


def outputs(case: Case, model: nn.Module) -> list[Tensor]:
    """The tensors of a network's output for the first batch."""
    from dsconv_surgery.support.inputs import InputStructure
    from dsconv_surgery.support.outputs import output_tensors

    batch = next(iter(case.batches))
    batch = batch if case.prepare is None else case.prepare(batch)
    inputs = InputStructure(case.example).match(batch, "batch")
    with torch.no_grad():
        return output_tensors(model.eval()(*inputs.args, **inputs.kwargs))


def equal(case: Case, model: nn.Module, other: nn.Module) -> str:
    pairs = list(zip(outputs(case, model), outputs(case, other), strict=True))
    assert pairs, "no outputs"
    assert all(torch.equal(a, b) for a, b in pairs), "the outputs differ"
    return "equal outputs"


def run(case: Case) -> dict[str, dict[str, str]]:
    """The result of each step."""
    model, args, kwargs = case.build(), case.example.args, case.example.kwargs
    given: dict[str, Any] = {"example_kwargs": kwargs or None}
    data: dict[str, Any] = {"prepare": case.prepare, "output": case.output}
    cut: dict[str, Any] = {}
    results: dict[str, dict[str, str]] = {}

    def find() -> str:
        layers = find_convs(model, *args, **given)
        skips = Counter(layer.reason for layer in layers if isinstance(layer, Skip))
        assert len(layers) > sum(skips.values()), f"no site: {skips}"
        return "; ".join([f"{len(layers) - sum(skips.values())} sites", *(f"{count} x {reason}" for reason, count in skips.items())])

    def compress_free() -> str:
        return f"MACs {-100 * compress(model, *args, **given, **SETTINGS).report.macs_saved:+.1f} %"

    def compress_calibrated() -> str:
        cut["small"] = compress(model, *args, **given, **data, **SETTINGS, calibration=case.batches)
        return f"MACs {-100 * cut['small'].report.macs_saved:+.1f} %"

    def compare_with_data() -> str:
        report = compare(model, cut["small"].model, *args, **given, **data, plan=cut["small"].plan, data=case.batches)
        assert report.fidelity is not None
        return f"squared relative error {report.fidelity.error:.2g} on {report.fidelity.images} images"

    def tune() -> str:
        before = {name: value.clone() for name, value in cut["small"].model.state_dict().items()}
        keywords: dict[str, Any] = {"prepare": case.prepare_training, "output": case.output, "loss": case.loss}
        history = fine_tune(cut["small"].model, case.batches, teacher=model, settings=FineTune(epochs=2), **keywords)
        changed = sum(not torch.equal(value, before[name]) for name, value in cut["small"].model.state_dict().items())
        assert changed, "nothing was trained"
        return f"loss {history.epochs[0].loss:.4f} -> {history.epochs[-1].loss:.4f}, {changed} of {len(before)} tensors changed"

    def save_and_load() -> str:
        with tempfile.TemporaryDirectory() as folder:
            save(cut["small"], folder)
            return equal(case, cut["small"].model, load(case.build(), folder))

    def attempt(name: str, step: Step, words: str | None = None) -> None:
        start = time.perf_counter()
        try:
            result, detail = "works" if words is None else "fails", step()
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
            result = "refused" if words and words in detail else "fails"
        results[name] = {"result": result, "detail": str(detail)[:700], "seconds": f"{time.perf_counter() - start:.1f}"}
        print(f"  {result:8}{name}: {str(detail)[:400]}", flush=True)

    steps = {
        "find": find, "cut": compress_free, "calibrate": compress_calibrated, "compare": compare_with_data,
        "fine-tune": tune, "save and load": save_and_load,
    }  # fmt: skip
    for name, step in steps.items():
        attempt(name, step)
    for name, further in case.steps.items():
        attempt(name, lambda further=further: further(model, cut["small"]))
    for name, (function, words) in case.refusals.items():
        attempt(name, lambda function=function: str(function(model, cut["small"])), words)
    return results


# --- Hugging Face -----------------------------------------------------------------------------------------------------------------
def images_and_labels(size: int, count: int = 32) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, size, size, generator=draws), torch.randint(0, CLASSES, (count,), generator=draws)


def dict_batches(size: int = 48) -> list[dict[str, Tensor]]:
    x, y = images_and_labels(size)
    return [{"pixel_values": x[i : i + 8], "labels": y[i : i + 8]} for i in range(0, len(x), 8)]


def keywords(batch: Any) -> tuple[Inputs, Tensor]:
    return Inputs(pixel_values=batch["pixel_values"]), batch["labels"]


def logits_loss(result: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(result.logits, labels)


def hugging_face_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
    return ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic", num_labels=CLASSES)).eval()


def hugging_face() -> Case:
    batches = dict_batches()
    one = {"pixel_values": batches[0]["pixel_values"][:1]}

    def calibrate_by_prepare(model: nn.Module, small: Any) -> str:
        again = compress(model, example_kwargs=one, calibration=batches, prepare=keywords, **SETTINGS)
        assert again.plan == small.plan, "another plan"
        return "the same plan"

    def labels_in_the_network(model: nn.Module, small: Any) -> str:
        """The network computes the loss itself, from a keyword argument."""
        tuned = apply_plan(model, small.plan, example_kwargs=one, calibration=batches)
        settings: dict[str, Any] = {"loss": lambda result, _: result.loss, "output": lambda result: result.logits}
        settings["prepare"] = lambda batch: (Inputs(**batch), batch["labels"])
        history = fine_tune(tuned, batches, teacher=model, settings=FineTune(epochs=1), **settings)
        return f"loss {history.epochs[-1].loss:.4f}"

    return Case(
        ("transformers",), "ResNetForImageClassification, 48 px, batches of pixel_values and labels", hugging_face_resnet, Inputs(**one),
        batches, logits_loss, prepare_training=keywords,
        steps={"calibrate through prepare=": calibrate_by_prepare, "fine-tune with the network's own loss": labels_in_the_network},
        refusals={
            "dict batches in fine_tune without prepare=": (lambda m, s: fine_tune(s.model, batches, teacher=m), "Pass prepare="),
            "the default loss": (lambda m, s: fine_tune(s.model, batches, teacher=m, prepare=keywords), "Pass loss="),
        },
    )  # fmt: skip


# --- ultralytics ------------------------------------------------------------------------------------------------------------------
def yolo_network(config: Any = "yolov8n.yaml") -> nn.Module:
    """A detector whose BatchNorm has the statistics of a batch, so that its outputs depend on its images."""
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model = DetectionModel(config, ch=3, nc=CLASSES, verbose=False)
    model.args = get_cfg()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # take the statistics of the next batch
    with torch.no_grad():
        model.train()(images_and_labels(64, 8)[0])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def raw_boxes_and_scores(result: Any) -> list[Tensor]:
    """What the head gives in both modes; in evaluation mode, decoded boxes come before it."""
    head = result[1] if isinstance(result, tuple) else result
    return [head["boxes"], head["scores"]]


def plain_convolutions() -> dict[str, Any]:
    """A detector of nn.Conv2d layers; ultralytics writes `i`, `f` and `type` on each."""
    backbone = [[-1, 1, "Conv", [16, 3, 2]], *([-1, 1, "nn.Conv2d", [16, 16, 3, 2, 1]] for _ in range(3))]
    return {"nc": CLASSES, "backbone": backbone, "head": [[[1, 2, 3], 1, "Detect", ["nc"]]]}


def fold_batchnorm(model: Any) -> None:
    """What `fuse()` of ultralytics does, for convolutions that were cut: fold each BatchNorm into the last link."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for module in model.modules():
        conv = getattr(module, "conv", None)
        if isinstance(conv, nn.Sequential) and hasattr(module, "bn"):
            conv[-1] = fuse_conv_bn_eval(conv[-1], module.bn)
            del module.bn
            module.forward = module.forward_fuse


def ultralytics() -> Case:
    import numpy as np
    import ultralytics as library

    x, _ = images_and_labels(64, 16)
    boxes = torch.rand(16, 4, generator=torch.Generator().manual_seed(2)) * 0.4 + 0.3
    batches = [
        {"img": x[i : i + 8], "cls": torch.zeros(8, 1), "bboxes": boxes[i : i + 8], "batch_idx": torch.arange(8.0)} for i in range(0, 16, 8)
    ]
    picture = (x[0].movedim(0, -1) * 255).numpy().astype(np.uint8)

    def loss(result: Any, batch: dict[str, Tensor]) -> Tensor:
        return criterion(result, batch)[0].sum() / len(batch["img"])

    def predict(network: nn.Module) -> int:
        """The number of chains in the network with which YOLO predicts, which it may copy and fuse before."""
        yolo = library.YOLO("yolov8n.yaml", verbose=False)
        yolo.model = network.eval()
        yolo.predict(picture, imgsz=64, conf=0.01, verbose=False)
        used = yolo.predictor.model.backend.model
        return sum(isinstance(m, nn.Sequential) and "expand" in dict(m.named_children()) for m in used.modules())

    def fused(model: nn.Module, _small: Any) -> str:
        dense = yolo_network().fuse(verbose=False)
        small = compress(dense, x[:1], **SETTINGS)
        count = predict(small.model)
        assert count == len(small.plan.cuts), count
        return f"{count} chains used"

    def folded(_model: nn.Module, small: Any) -> str:
        with tempfile.TemporaryDirectory() as folder:
            save(small, folder)
            network: Any = load(yolo_network(), folder).eval()
        expected = network(x)[0]
        fold_batchnorm(network)
        network.fuse(verbose=False)
        difference = float((network(x)[0] - expected).abs().max() / expected.abs().max())
        assert difference < 1e-4, difference
        return f"relative difference {difference:.1g}, {predict(network)} chains used"

    def attributes(_model: nn.Module, _small: Any) -> str:
        dense = yolo_network(plain_convolutions())
        small = compress(dense, x[:1], **{**SETTINGS, "budget": Budget(macs=0.965)}, include=["model.1", "model.2", "model.3"])
        names = [cut.name for cut in small.plan.cuts]
        assert all(
            getattr(small.model.get_submodule(n), a) == getattr(dense.get_submodule(n), a) for n in names for a in ("i", "f", "type")
        )
        assert names, "nothing was cut"
        return f"{', '.join(names)} are cut and have i, f and type"

    criterion = yolo_network().init_criterion()  # type: ignore[operator]
    mixed: dict[str, Any] = {"prepare": lambda b: (b["img"], b), "loss": loss}
    return Case(
        ("ultralytics",), "DetectionModel yolov8n, 64 px, batches of img, cls, bboxes and batch_idx", yolo_network, Inputs(x[:1]), batches,
        loss, lambda b: b["img"], lambda b: (b["img"], b), raw_boxes_and_scores,
        steps={
            "predict, fused before the cut": fused, "predict, BatchNorm folded after the cut": folded, "layers with attributes": attributes,
        },
        refusals={
            "the YOLO object": (lambda m, s: find_convs(library.YOLO("yolov8n.yaml", verbose=False), x[:1]), "yolo.model"),
            "a teacher without output=": (lambda m, s: fine_tune(s.model, batches, teacher=m, **mixed), "Pass output="),
            "fuse() of ultralytics after the cut": (lambda m, s: s.model.fuse(), "'Sequential' object has no attribute 'weight'"),
        },
    )  # fmt: skip


# --- Lightning --------------------------------------------------------------------------------------------------------------------
def lightning() -> Case:
    import lightning as library

    class Classifier(library.LightningModule):
        def __init__(self, width: int = 16, lr: float = 0.01) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.example_input_array = torch.rand(2, 3, 32, 32)
            blocks = [(3, width), (width, 2 * width), (2 * width, 2 * width)]
            self.body = nn.Sequential()
            for a, b in blocks:
                self.body.extend([nn.Conv2d(a, b, 3, padding=1, stride=1 + (a > 3)), nn.BatchNorm2d(b), nn.ReLU()])
            self.head = nn.Linear(2 * width, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            features = self.body(x).mean((2, 3))
            if self._trainer is not None and self.trainer.training:
                self.log("mean feature", features.mean())
            return self.head(features)

        def training_step(self, batch: Any, _index: int) -> Tensor:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

    x, y = images_and_labels(32)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8)

    def trainer(**settings: Any) -> Any:
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        return library.Trainer(max_steps=2, accelerator="cpu", **quiet, **settings)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Classifier().eval()

    def build_trained() -> nn.Module:
        """The module as a user has it after training: it refers to its trainer."""
        model = build()
        trainer().fit(model.train(), loader)
        assert model._trainer is not None
        return model.eval()

    def fit(_model: nn.Module, small: Any) -> str:
        before, run = [p.clone() for p in small.model.parameters()], trainer()
        run.fit(small.model.train(), loader)
        changed = sum(not torch.equal(p, q) for p, q in zip(before, small.model.parameters(), strict=True))
        assert changed == len(before), changed
        return f"{run.global_step} steps, loss {float(run.callback_metrics['loss']):.4f}, all {changed} parameters changed"

    def inside(_model: nn.Module, _small: Any) -> str:
        cuts: list[int] = []

        class Cut(library.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
                cuts.append(len(compress(module, x[:1], **SETTINGS).plan.cuts))

        model = build().train()
        trainer(callbacks=[Cut()]).fit(model, loader)
        assert len(cuts) == 2
        assert min(cuts) > 0
        return f"{cuts[-1]} cuts, and training continues"

    def lightning_checkpoint(_model: nn.Module, small: Any) -> Any:
        run = trainer()
        run.fit(small.model.train(), loader)
        run.save_checkpoint(Path(WORK.name, "net.ckpt"))
        return Classifier.load_from_checkpoint(Path(WORK.name, "net.ckpt"), weights_only=False)

    def fabric(_model: nn.Module, _small: Any) -> Any:
        return find_convs(library.Fabric(accelerator="cpu").setup(build()), x[:1])

    return Case(
        ("lightning",), "LightningModule after Trainer.fit, 32 px, a DataLoader of images and labels", build_trained, Inputs(x[:1]), loader,
        F.cross_entropy, steps={"Trainer.fit of the cut module": fit, "cut in a callback while training": inside},
        refusals={
            "load_from_checkpoint of the cut module": (lightning_checkpoint, "Missing key(s) in state_dict"),
            "a module of Fabric.setup": (fabric, "Pass `model.module`"),
        },
    )  # fmt: skip


# --- peft -------------------------------------------------------------------------------------------------------------------------
def adapted(model: nn.Module, targets: list[str], **settings: Any) -> nn.Module:
    """A network with LoRA adapters that are not zero."""
    from peft import LoraConfig, get_peft_model

    network = get_peft_model(model, LoraConfig(r=4, target_modules=targets, **settings))
    torch.manual_seed(1)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return network.eval()


def peft() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    batches = dict_batches(32)
    one = {"pixel_values": batches[0]["pixel_values"][:1]}
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "image_size": 32,
        "patch_size": 8,
    }

    def build() -> nn.Module:
        torch.manual_seed(0)
        network = ViTForImageClassification(ViTConfig(**sizes, num_labels=CLASSES))
        return adapted(network, ["q_proj", "v_proj"], modules_to_save=["classifier"])

    def only_adapters_train(_model: nn.Module, small: Any) -> str:
        trained = [name for name, parameter in small.model.named_parameters() if parameter.requires_grad]
        assert all("lora_" in name or "modules_to_save" in name for name in trained)
        return f"{len(trained)} of {len(list(small.model.parameters()))} parameters require a gradient"

    def merge_after_the_cut(_model: nn.Module, small: Any) -> str:
        with torch.no_grad():
            expected = small.model.eval()(**one).logits
            result = small.model.merge_and_unload()(**one).logits
        assert torch.allclose(expected, result, atol=1e-5)
        return "equal outputs"

    def merge_then_cut_then_adapt(_model: nn.Module, _small: Any) -> str:
        """Adapters on convolutions: merge, cut, add adapters to the chains, train these, merge, save, load."""
        merged = adapted(hugging_face_resnet(), ["convolution"], modules_to_save=["classifier"]).merge_and_unload()  # type: ignore[operator]
        small = compress(merged, example_kwargs=one, calibration=batches, **SETTINGS)
        network: Any = adapted(small.model, [f"{cut.name}.{link}" for cut in small.plan.cuts for link in cut.chain])
        frozen = [(p, p.clone()) for p in network.parameters() if not p.requires_grad]
        fine_tune(network, batches, teacher=merged, prepare=keywords, loss=logits_loss, settings=FineTune(epochs=1))
        assert frozen
        assert all(torch.equal(p, before) for p, before in frozen)
        result = network.merge_and_unload().eval()
        save(result, Path(WORK.name, "merged"), small.plan)
        loaded = load(hugging_face_resnet(), Path(WORK.name, "merged"))
        assert torch.equal(result(**one).logits, loaded(**one).logits)
        return f"{len(small.plan.cuts)} cuts, frozen weights did not change, equal outputs after loading"

    def only_adapted_layers(_model: nn.Module, _small: Any) -> Any:
        return make_plan(adapted(hugging_face_resnet(), ["convolution"]), example_kwargs=one, **{**SETTINGS, "include": ["*convolution*"]})

    return Case(
        ("peft", "transformers"), "ViTForImageClassification with LoRA on q_proj and v_proj, 32 px", build, Inputs(**one), batches,
        logits_loss, prepare_training=keywords,
        steps={
            "frozen weights stay frozen": only_adapters_train, "merge_and_unload after the cut": merge_after_the_cut,
            "merge, cut, adapt the chains": merge_then_cut_then_adapt,
        },
        refusals={"layers inside adapters": (only_adapted_layers, "merge_and_unload()")},
    )  # fmt: skip


CASES = {"Hugging Face ResNet": hugging_face, "YOLO": ultralytics, "LightningModule": lightning, "peft": peft}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, help="one of the libraries; nothing is written")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    offline = {"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    os.environ.update(offline, YOLO_CONFIG_DIR=WORK.name, DSCONV_SURGERY_CACHE=WORK.name)
    import_torchvision()
    rows: list[dict[str, Any]] = []
    for name, make in CASES.items():
        if options.only in (None, name):
            start, case = time.perf_counter(), make()
            versions = {package: version(package) for package in case.packages}
            print(f"{name} ({case.network}), {versions}", flush=True)
            steps = run(case)
            rows.append(
                {
                    "name": name,
                    "network": case.network,
                    "versions": versions,
                    "steps": steps,
                    "seconds": round(time.perf_counter() - start, 1),
                }
            )
    for row in rows:
        groups = {kind: [n for n, s in row["steps"].items() if s["result"] == kind] for kind in ("works", "refused", "fails")}
        versions = ", ".join(f"{package} {number}" for package, number in row["versions"].items())
        print(f"| {row['name']} | {versions} | " + " | ".join(", ".join(group) or "-" for group in groups.values()) + " |")
    if not options.only:
        settings = {package: version(package) for package in ("torch", "torchvision")} | {"threads": torch.get_num_threads()}
        RESULT.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    sys.exit(any(step["result"] == "fails" for row in rows for step in row["steps"].values()))


if __name__ == "__main__":
    main()

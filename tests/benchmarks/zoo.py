"""Find, plan, cut, run, train, save and load every torchvision model and one or two timm models of each family, with random weights.

python tests/benchmarks/zoo.py [NAME ...]     # runs what results/zoo.json does not hold yet
python tests/benchmarks/zoo.py --table        # prints the summary of results/zoo.json

Each model runs in a process of its own, with a limit on its time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
RESULT = Path(__file__).resolve().with_name("results") / "zoo.json"
TIME_LIMIT = 900  # seconds for one model
SCHEMES = ("channel", "bottleneck")  # one for each kind of layer, in closed form
RANK = 2

BOXES = ("fasterrcnn", "fcos", "keypointrcnn", "maskrcnn", "retinanet", "ssd")
VIDEO = ("mc3", "r2plus1d", "r3d", "s3d", "swin3d", "mvit")
FIXED_SIZE = {"maxvit_t": 224, "vit_b_16": 224, "vit_b_32": 224, "vit_h_14": 224, "vit_l_16": 224, "vit_l_32": 224, "inception_v3": 128}


# --- one model -------------------------------------------------------------------------------------------------------------------
def build_torchvision(name: str) -> tuple[Callable[[], Any], tuple[Any, ...]]:
    """A function that builds a model, and its inputs."""
    import torch
    from torchvision import models

    settings: dict[str, Any] = {"weights": None}
    if name.startswith((*BOXES, "deeplabv3", "fcn", "lraspp")):
        settings["weights_backbone"] = None
    if name in ("googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3"):
        settings |= {"init_weights": False, "aux_logits": False if "quantized" in name else True}
    if name.startswith("quantized_"):
        settings["quantize"] = False
    if name.startswith("ssdlite"):
        inputs: tuple[Any, ...] = ([torch.rand(3, 320, 320)],)
    elif name.startswith(BOXES):
        inputs = ([torch.rand(3, 96, 128)],)
        settings |= {} if name.startswith("ssd") else {"min_size": 96, "max_size": 128}
    elif name.startswith(VIDEO):
        size = 224 if name.startswith("mvit") else 64
        inputs = (torch.rand(1, 3, 16 if name.startswith(("mvit", "s3d")) else 8, size, size),)
    elif name.startswith("raft"):
        inputs = (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    else:
        size = FIXED_SIZE.get(name, 64)
        inputs = (torch.rand(2 if size == 64 else 1, 3, size, size),)
    return lambda: models.get_model(name, **settings), inputs


def build_timm(name: str) -> tuple[Callable[[], Any], tuple[Any, ...]]:
    import timm
    import torch

    config = timm.get_pretrained_cfg(name)
    channels, height, width = config.input_size
    smallest = config.min_input_size[1] if config.min_input_size else 0

    def build() -> Any:
        return timm.create_model(name, pretrained=False)

    for size in sorted({max(96, smallest), 128, 160, height}):  # the smallest size that the model takes
        inputs = (torch.rand(1, channels, *((height, width) if size == height else (size, size))),)
        try:
            with torch.no_grad():
                build().eval()(*inputs)
        except Exception:
            if size == height:
                raise
            continue
        return build, inputs
    raise ValueError(name)


def tensors_of(output: Any) -> list[Any]:
    import torch

    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def outputs_of(model: Any, inputs: tuple[Any, ...]) -> list[Any]:
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        return tensors_of(model(*inputs))


def equal(outputs: list[Any], others: list[Any]) -> bool:
    import torch

    return len(outputs) == len(others) > 0 and all(torch.equal(a, b) for a, b in zip(outputs, others, strict=True))


def loss_of(model: Any, inputs: tuple[Any, ...], boxes: bool) -> Any:
    """A scalar that depends on every output; detectors in training mode give losses."""
    import torch

    if boxes:
        target: dict[str, Any] = {"boxes": torch.tensor([[5.0, 5.0, 60.0, 60.0]]), "labels": torch.tensor([1])}
        target |= {"masks": torch.ones(1, *inputs[0][0].shape[1:], dtype=torch.uint8), "keypoints": torch.full((1, 17, 3), 20.0)}
        output = model.train()(*inputs, [target])
    else:
        output = model(*inputs)
    return sum(tensor.float().square().mean() for tensor in tensors_of(output) if tensor.requires_grad)


def serve(name: str) -> dict[str, Any]:
    """Every step with one model; raises where one fails."""
    import conftest  # noqa: F401  # makes torchvision importable beside a CPU build of torch
    import torch
    from torch import nn

    from dsconv_surgery import apply_plan, load, make_plan, save
    from dsconv_surgery.network.discovery import ConvSite, survey_model

    library, _, short = name.partition(":")
    boxes = short.startswith(BOXES)
    if boxes:
        plain_nms()
    torch.manual_seed(0)
    build, inputs = (build_torchvision if library == "torchvision" else build_timm)(short)
    model = build().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    survey = survey_model(model, *inputs)
    layers = {key for key, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)}
    sites = [layer for layer in survey.layers if isinstance(layer, ConvSite)]
    costs = [survey.costs[site.name] for site in sites]
    all_macs = survey.total.macs + survey.remainder_macs
    row: dict[str, Any] = {
        "params": survey.total.params,
        "macs": all_macs,
        "inputs": [list(tensor.shape) for tensor in tensors_of(inputs)],
        "sites": len(sites),
        "skips": dict(Counter(layer.reason for layer in survey.layers if not isinstance(layer, ConvSite)).most_common()),
        "unexplained": sorted(layers - {n for layer in survey.layers for n in (layer.name, *getattr(layer, "aliases", ()))}),
        "macs_can_be_cut": round(sum(cost.macs for cost in costs) / max(all_macs, 1), 4),
        "params_can_be_cut": round(sum(cost.params for cost in costs) / max(survey.total.params, 1), 4),
    }
    if not sites:
        return row | {"served": False, "reason": "no site"}
    plan = make_plan(model, *inputs, schemes=SCHEMES, rule="fixed", rank=RANK, cache=False)
    cut = apply_plan(model, plan)
    row |= {"cuts": len(plan.cuts), "params_cut": plan.total_after.params}
    check(sum(p.numel() for p in cut.parameters()) == plan.total_after.params, "the plan's parameters are not those of the network")
    with tempfile.TemporaryDirectory() as folder:
        save(cut, folder, plan)
        torch.manual_seed(1)
        loaded = load(build().eval(), folder)
    outputs = outputs_of(cut, inputs)
    check(equal(outputs_of(loaded, inputs), outputs), "outputs differ after save and load")
    check([t.shape for t in outputs_of(model, inputs)] == [t.shape for t in outputs] or boxes, "the outputs have other shapes")
    del loaded
    loss_of(cut, inputs, boxes).backward()
    reached = {key for key, p in cut.named_parameters() if p.grad is not None}
    chains = [f"{planned.name}.{link}.weight" for planned in plan.cuts for link in planned.chain]
    row["chains_without_gradient"] = [key for key in chains if key not in reached]
    if row["chains_without_gradient"]:  # allowed where the dense network has none there either
        loss_of(model, inputs, boxes).backward()
        dense = {key for key, p in model.named_parameters() if p.grad is not None}
        lost = [key for key in row["chains_without_gradient"] if f"{key.rpartition('.')[0].rpartition('.')[0]}.weight" in dense]
        check(not lost, f"no gradient: {lost[:3]}")
    same = all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if not boxes)
    check(same, "the dense model changed")
    return row | {"served": True}


def check(holds: bool, problem: str) -> None:
    if not holds:
        raise AssertionError(problem)


def plain_nms() -> None:
    """Non-maximum suppression in plain Python, where torchvision's compiled operators did not load."""
    import conftest
    import torch
    import torchvision

    if not torchvision.extension._has_ops():
        plain_nms.library = library = torch.library.Library("torchvision", "IMPL")  # type: ignore[attr-defined]  # kept alive
        library.impl("nms", conftest._plain_nms, "CPU")
        torchvision.ops.boxes._assert_has_ops = lambda: None


# --- all models ------------------------------------------------------------------------------------------------------------------
def all_names() -> list[str]:
    import conftest  # noqa: F401
    from torchvision import models

    return [f"torchvision:{name}" for name in models.list_models()] + [f"timm:{name}" for name in TIMM]


def run_child(name: str) -> dict[str, Any]:
    """The row of a model, from a process of its own."""
    start = time.time()
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file, tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "DSCONV_SURGERY_CACHE": cache}
        try:
            command = [sys.executable, "-W", "ignore", __file__, "--child", file.name, name]
            process = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, env=environment, check=False)
            text = file.read()
            if text:
                row = json.loads(text)
            else:
                row = {"served": False, "reason": f"the process ended with {process.returncode}: {process.stderr.strip()[-200:]}"}
        except subprocess.TimeoutExpired:
            row = {"served": False, "reason": f"no result within {TIME_LIMIT} s"}
    return {"model": name, **row, "seconds": round(time.time() - start, 1)}


def child(name: str, path: Path) -> None:
    try:
        row = serve(name)
    except Exception as error:
        row = {"served": False, "reason": f"{type(error).__name__}: {error}"[:600]}
    path.write_text(json.dumps(row))


def run_all(names: Iterable[str], path: Path, again: bool) -> None:
    rows = {row["model"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    for name in names:
        if name in rows and not (again and not rows[name]["served"]):
            continue
        rows[name] = row = run_child(name)
        print(f"{name}: {'served' if row['served'] else row['reason'][:200]} ({row['seconds']} s)", flush=True)
        path.write_text(json.dumps({"schemes": SCHEMES, "rank": RANK, "rows": list(rows.values())}, indent=1) + "\n")


def table(path: Path) -> str:
    """The summary in Markdown."""
    rows = json.loads(path.read_text())["rows"]
    lines = ["| library | models | served | sites | unexplained | MACs that can be cut, median | parameters |", "|---|---|---|---|---|---|---|"]
    for library in ("torchvision", "timm"):
        group = [row for row in rows if row["model"].startswith(library)]
        if not group:
            continue
        served, measured = [row for row in group if row["served"]], [row for row in group if "sites" in row]
        medians = [sorted(row[key] for row in measured)[len(measured) // 2] for key in ("macs_can_be_cut", "params_can_be_cut")]
        sites, unexplained = sum(row["sites"] for row in measured), sum(len(row["unexplained"]) for row in measured)
        shares = " | ".join(f"{100 * median:.1f} %" for median in medians)
        lines.append(f"| {library} | {len(group)} | {len(served)} | {sites:,} | {unexplained} | {shares} |")
    lines += ["", "| not served | reason |", "|---|---|"]
    lines += [f"| {row['model']} | {row['reason']} |" for row in rows if not row["served"]]
    reasons: Counter[str] = Counter()
    for row in rows:
        reasons.update(row.get("skips", {}))
    lines += ["", "| layers | why they stay dense |", "|---|---|"]
    lines += [f"| {count:,} | {reason} |" for reason, count in reasons.most_common(25)]
    lines += ["", "| least MACs that can be cut | share | main reasons |", "|---|---|---|"]
    lowest = sorted((row for row in rows if "sites" in row), key=lambda row: row["macs_can_be_cut"])[:15]
    for row in lowest:
        lines.append(f"| {row['model']} | {100 * row['macs_can_be_cut']:.1f} % | {' '.join(list(row['skips'])[:2])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="torchvision:NAME or timm:NAME; all if not given")
    parser.add_argument("--table", action="store_true", help="print the summary")
    parser.add_argument("--again", action="store_true", help="run models again that were not served")
    parser.add_argument("--shuffle", action="store_true", help="in random order, for a first impression")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.names[0], arguments.child)
    elif arguments.table:
        print(table(arguments.json))
    else:
        names = arguments.names or all_names()
        if arguments.shuffle:
            random.Random(0).shuffle(names)
        run_all(names, arguments.json, arguments.again)


TIMM: tuple[str, ...] = ()

if __name__ == "__main__":
    main()

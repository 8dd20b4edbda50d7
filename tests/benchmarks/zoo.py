"""Find, plan, cut, run, train, save and load every torchvision model and one or two timm models of each family, with random weights.

python tests/benchmarks/zoo.py [NAME ...]     # runs what results/zoo.json does not hold yet
python tests/benchmarks/zoo.py --table        # prints the summary of results/zoo.json

Each model runs in a process of its own, with a limit on its time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
RESULT = Path(__file__).resolve().with_name("results") / "zoo.json"
TIME_LIMIT = 1800  # seconds for one model
# The smallest model of each family of timm 1.0, or two of large families, with at most 45 million parameters (dm_nfnet_f0: 71 million).
TIMM = [
    "bat_resnext26ts", "botnet26t_256", "caformer_s18", "cait_xxs24_224", "coat_tiny", "coatnet_pico_rw_224", "coatnext_nano_rw_224",
    "convformer_s18", "convit_tiny", "convmixer_768_32", "convnext_atto_rms", "convnextv2_atto", "cpubone_nano", "crossvit_tiny_240",
    "cs3darknet_focus_s", "csatv2", "cspdarknet53", "cspnext_s", "cspresnet50", "cspresnext50", "darknet17", "darknetaa53",
    "davit_tiny", "deit_tiny_patch16_224", "densenet121", "densenetblur121d", "dla34", "dm_nfnet_f0", "dpn68", "eca_botnext26ts_256",
    "eca_nfnet_l0", "eca_resnext26ts", "eca_vovnet39b", "ecaresnet26t", "ecaresnetlight", "ecaresnext26t_32x4d", "edgenext_x_small",
    "efficientformer_l1", "efficientformerv2_s0", "efficientnet_b0", "efficientnet_b0_g8_gn", "efficientnetv2_rw_t",
    "efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "ese_vovnet19b_slim_dw", "eva02_tiny_patch14_224", "fasternet_t0",
    "fastvit_s12", "fbnetc_100", "fbnetv3_b", "flexivit_small", "focalnet_tiny_srf", "gc_efficientnetv2_rw_t", "gcresnet33ts",
    "gcresnext26ts", "gcvit_xxtiny", "gernet_s", "ghostnet_050", "ghostnetv3_050", "gmixer_12_224", "gmlp_ti16_224",
    "halo2botnet50ts_256", "halonet_h1", "haloregnetz_b", "hardcorenas_b", "hgnet_tiny", "hgnetv2_b0", "hiera_tiny_224",
    "hieradet_small", "hrnet_w18_small", "iformer_t", "inception_next_atto", "inception_v3", "inception_v4", "lambda_resnet26t",
    "lamhalobotnet50ts_256", "lcnet_035", "lcnetv2_small", "legacy_seresnext26_32x4d", "legacy_xception", "levit_384_s8",
    "lowformer_b0", "mambaout_femto", "maxvit_pico_rw_256", "maxvit_rmlp_nano_rw_256", "maxxvit_rmlp_nano_rw_256",
    "maxxvitv2_nano_rw_256", "mixer_s16_224", "mixnet_s", "mnasnet_small", "mobilenet_edgetpu_100", "mobilenetv2_035",
    "mobilenetv3_small_050", "mobileone_s1", "mobilevit_xxs", "mobilevitv2_050", "mvitv2_tiny", "nest_tiny", "nextvit_small",
    "nf_regnet_b0", "pit_xs_224", "poolformer_s12", "poolformerv2_s12", "pvt_v2_b0", "rdnet_tiny", "regnetv_040", "regnetx_002",
    "regnety_002", "regnetz_005", "regnetz_b16", "repghostnet_050", "repvgg_a0", "repvit_m1", "res2next50", "resmlp_12_224",
    "resnest14d", "resnet14t", "resnet26", "resnet32ts", "resnetaa34d", "resnetblur18", "resnetrs50", "resnetv2_18",
    "resnetv2_50x1_bit", "resnext26ts", "resnext50_32x4d", "rexnet_100", "rexnetr_100", "sebotnet33ts_256", "sedarknet21",
    "sehalonet33ts", "selecsls42", "semnasnet_050", "sequencer2d_s", "seresnet18", "seresnet33ts", "seresnetaa50d", "seresnext26ts",
    "seresnext50_32x4d", "shvit_s1", "skresnet18", "skresnext50_32x4d", "spnasnet_100", "starnet_s1", "swiftformer_xs",
    "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "swinv2_tiny_window16_256", "test_byobnet", "test_coatnet", "test_convnext",
    "test_efficientnet", "test_mambaout", "test_nfnet", "test_resnet", "test_vit", "test_vit_relpos", "tf_efficientnet_b0",
    "tf_efficientnetv2_s", "tf_mixnet_s", "tf_mobilenetv3_small_075", "tiny_vit_5m_224", "tinynet_d", "tnt_s_legacy_patch16_224",
    "tresnet_m", "twins_svt_small", "visformer_tiny", "vit_pe_core_tiny_patch16_384", "vit_srelpos_small_patch16_224",
    "vit_tiny_patch16_224", "vit_tiny_patch16_dinov3_qkvb", "vit_tiny_r_s16_p8_224", "vitamin_small_224", "volo_d1_224", "vovnet39a",
    "xception41p", "xcit_nano_12_p16_384", "xcit_nano_12_p8_224",
]  # fmt: skip
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
        settings |= {"init_weights": False, "aux_logits": "quantized" not in name}
    if name.startswith("quantized_"):
        settings["quantize"] = False
    if name.startswith("ssdlite"):
        inputs: tuple[Any, ...] = ([torch.rand(3, 320, 320)],)
    elif name.startswith(BOXES):
        inputs = ([torch.rand(3, 96, 128)],)
        settings |= {} if name.startswith("ssd") else {"min_size": 96, "max_size": 128}
    elif name.startswith(VIDEO):
        size = 224 if name.startswith(("mvit", "s3d")) else 64
        inputs = (torch.rand(1, 3, 16 if name.startswith(("mvit", "s3d")) else 8, size, size),)
    elif name.startswith("raft"):
        inputs = (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    else:
        size = FIXED_SIZE.get(name.removeprefix("quantized_"), 64)
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
        output = model.train()(inputs[0] * 2, [target] * 2)  # BatchNorm needs two images
    else:
        output = model(*inputs)
    return sum(tensor.float().square().mean() for tensor in tensors_of(output) if tensor.requires_grad)


def digests(model: Any) -> dict[str, str]:
    """A hash of each tensor of a model's state."""
    return {name: hashlib.blake2b(tensor.numpy().tobytes()).hexdigest() for name, tensor in model.state_dict().items()}


def survey_row(model: Any, survey: Any) -> dict[str, Any]:
    """What was found in a model."""
    from torch import nn

    from dsconv_surgery.network.discovery import ConvSite

    layers = {name for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)}
    sites = [layer for layer in survey.layers if isinstance(layer, ConvSite)]
    costs, macs = [survey.costs[site.name] for site in sites], survey.total.macs + survey.outside.macs
    return {
        "params": survey.total.params,
        "macs": macs,
        "sites": len(sites),
        "skips": dict(Counter(layer.reason for layer in survey.layers if not isinstance(layer, ConvSite)).most_common()),
        "unexplained": sorted(layers - {name for layer in survey.layers for name in (layer.name, *getattr(layer, "aliases", ()))}),
        "macs_can_be_cut": round(sum(cost.macs for cost in costs) / max(macs, 1), 4),
        "params_can_be_cut": round(sum(cost.params for cost in costs) / max(survey.total.params, 1), 4),
    }


def serve(name: str, row: dict[str, Any]) -> None:
    """Every step with one model; adds to the row, and raises where a step fails."""
    import conftest  # noqa: F401  # makes torchvision importable beside a CPU build of torch
    import torch

    from dsconv_surgery import apply_plan, load, make_plan, save
    from dsconv_surgery.network.discovery import survey_model

    library, _, short = name.partition(":")
    boxes = short.startswith(BOXES)
    if boxes:
        plain_nms()
    torch.manual_seed(0)
    build, inputs = (build_torchvision if library == "torchvision" else build_timm)(short)
    model = build().eval()
    before = digests(model)

    def recorded_survey(*arguments: Any) -> Any:  # the planner's is recorded, as a second one would double the time
        survey = survey_model(*arguments)
        row.update(survey_row(model, survey))
        return survey

    row["inputs"] = [list(tensor.shape) for tensor in tensors_of(inputs)]
    with mock.patch("dsconv_surgery.planning.planner.survey_model", recorded_survey):
        plan = make_plan(model, *inputs, schemes=SCHEMES, rule="fixed", rank=RANK, cache=False)
    cut = apply_plan(model, plan, *inputs)
    check(len(plan.cuts) > 0, "no layer was cut")
    check(digests(model) == before, "the dense model changed")
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
    row["served"] = True


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
    from torchvision import models

    return [f"torchvision:{name}" for name in models.list_models()] + [f"timm:{name}" for name in TIMM]


def run_child(name: str) -> dict[str, Any]:
    """The row of a model, from a process of its own, so that memory is freed and a crash or a hang is a row, too."""
    start, context = time.time(), multiprocessing.get_context("fork")  # what is imported already is not imported again
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        process = context.Process(target=child, args=(name, Path(file.name)))
        process.start()
        process.join(TIME_LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
            row = {"served": False, "reason": f"no result within {TIME_LIMIT} s"}
        else:
            text = file.read()
            row = json.loads(text) if text else {"served": False, "reason": f"the process ended with exit code {process.exitcode}"}
    return {"model": name, **row, "seconds": round(time.time() - start, 1)}


def child(name: str, path: Path) -> None:
    warnings.simplefilter("ignore")
    row: dict[str, Any] = {"served": False}
    try:
        serve(name, row)
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {error}"[:600]
    row["cpu_seconds"] = round(time.process_time(), 1)
    path.write_text(json.dumps(row))


def import_everything() -> None:
    """Cut a small network, so that all modules are imported before the processes of the models begin."""
    import timm  # noqa: F401
    import torch

    from dsconv_surgery import apply_plan, make_plan

    torch.set_num_threads(1)
    model, x = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Conv2d(8, 8, 1)), torch.rand(1, 4, 8, 8)
    apply_plan(model, make_plan(model, x, schemes=SCHEMES, rule="fixed", rank=1, cache=False), x)


def run_all(names: Iterable[str], path: Path, again: bool) -> None:
    rows = {row["model"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    for name in names:
        if name in rows and not (again and not rows[name]["served"]):
            continue
        rows[name] = row = run_child(name)
        print(f"{name}: {'served' if row['served'] else row['reason'][:200]} ({row['seconds']} s)", flush=True)
        path.write_text(
            json.dumps({"schemes": SCHEMES, "rank": RANK, "rows": sorted(rows.values(), key=lambda row: row["model"])}, indent=1) + "\n"
        )


def table(path: Path) -> str:
    """The summary in Markdown."""
    rows = json.loads(path.read_text())["rows"]
    lines = [
        "| library | models | served | sites | unexplained | MACs that can be cut, median | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
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
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.json))
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
        import conftest  # noqa: F401  # makes torchvision importable beside a CPU build of torch

        names = arguments.names or all_names()
        if arguments.shuffle:
            random.Random(0).shuffle(names)
        import_everything()
        run_all(names, arguments.json, arguments.again)


if __name__ == "__main__":
    main()

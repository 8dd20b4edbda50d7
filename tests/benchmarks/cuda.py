# ruff: noqa: E402
"""Run the device tests on a GPU, and measure plans, cuts, inference and fine-tuning there, in at most six minutes.

python tests/benchmarks/cuda.py                       everything on the first GPU: results/cuda.json
python tests/benchmarks/cuda.py --device cpu --quick  a minute on a CPU, with tiny sizes, to test this script

Each part runs in a process of its own, because an error of CUDA makes a process useless. A part that fails, or runs out of its time, is
written down as such with its rows so far, and the next part follows. Networks of torchvision have random weights: they are measured
for cost and time, not accuracy. Images are random, or calibration images of CIFAR-10 and ImageNet in --data.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

if __name__ != "__main__":  # other scripts of this folder, where torch imports the package of this name
    raise ImportError("tests/benchmarks/cuda.py is a script, not the package cuda.")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]  # without this folder

import conftest  # noqa: F401 - makes torchvision importable beside a CPU build of torch
import numpy as np
import torch
import torch.nn.functional as F
from cifar import cifar10, demo_images, demo_resnet20, to_input
from PIL import Image
from torch import Tensor, nn

from dsconv_surgery import Budget, FineTune, apply_plan, compare, fine_tune, make_plan
from dsconv_surgery.budget import BudgetError

NAMES = ("resnet20", "resnet18", "resnet50")
CLOSED_FORM = ("spatial", "channel", "bottleneck")  # these have no search, so that a plan by the clock takes seconds
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SEARCHED = {"resnet20": ("cp", "spatial", "tucker"), "resnet18": ("cp", "spatial"), "resnet50": ("spatial", "bottleneck")}
LIMIT = 345.0  # seconds for all parts
# Seconds for each part, at most, in running order.
SHARES = {"tests": 65, "macs resnet20": 65, "macs resnet18": 60, "macs resnet50": 75, "step": 40, "latency": 40}
Row = dict[str, Any]


class Part:
    """What a part needs: the options, the device, and a place for its rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device, self.quick = options, torch.device(options.device), options.quick
        self.end = time.monotonic() + options.seconds
        self.rows: list[Row] = []

    def add(self, labels: Row, measure: Callable[[], Row]) -> None:
        """A row of results, written at once; of a measurement that fails the error, and after the part's time the reason."""
        start = time.perf_counter()
        self.options.rows.write_text(json.dumps([*self.rows, {**labels, "ended": "stopped with its part, or crashed"}]))
        try:
            result = measure() if time.monotonic() < self.end else {"skipped": "no time was left"}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:500], "traceback": traceback.format_exc()[-1500:]}
        memory = {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3)} if self.device.type == "cuda" else {}
        self.rows.append({**labels, **result, "seconds": round(time.perf_counter() - start, 2), **memory})
        print(json.dumps(self.rows[-1]), flush=True)
        self.options.rows.write_text(json.dumps(self.rows))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def network(self, name: str) -> tuple[nn.Module, Tensor]:
        """A network in evaluation mode on the device, and calibration images on the CPU."""
        if name == "resnet20":
            return demo_resnet20().to(self.device), self.images("cifar10", 64 if self.quick else 1024, 32)
        import torchvision

        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None).eval()
        return model.to(self.device), self.images("imagenet", 8 if self.quick else 128, 64 if self.quick else 224)

    def images(self, folder: str, count: int, size: int) -> Tensor:
        """Calibration images of a folder in --data, else of the examples, else random ones; smoothed, as images are."""
        if folder == "cifar10":
            return (
                to_input(cifar10(self.options.data / folder, "train")[0][:count]) if self.options.data else demo_images("train")[0][:count]
            )
        if self.options.data:
            files = sorted((self.options.data / folder / "calibration").glob("*/*.jpg"))[:count]
            return to_input(np.stack([np.asarray(Image.open(file).convert("RGB").resize((size, size))) for file in files]))
        coarse = torch.randn(count, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
        return F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)


def milliseconds(part: Part, models: Iterable[nn.Module], x: Tensor) -> list[float]:
    """Median milliseconds of a forward pass of each network, timed in turn: between two CUDA events, or by the clock on a CPU."""
    networks = list(models)

    def timed(model: nn.Module) -> float:
        if part.device.type != "cuda":
            start = time.perf_counter()
            model(x)
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        model(x)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    with torch.inference_mode():
        for model in networks:
            for _ in range(1 if part.quick else 5):
                model(x)
        samples = [[timed(model) for model in networks] for _ in range(3 if part.quick else 25)]
    return [round(median(column), 4) for column in zip(*samples, strict=True)]


def run_tests(part: Part) -> None:
    """The tests with the fixture `device`, on the GPU alone; with --quick the first few on the CPU."""
    chosen = ["-k", "cpu and (moments or plans)"] if part.quick else ["-k", part.device.type]
    command = [sys.executable, "-m", "pytest", "tests/test_devices.py", *chosen, "-p", "no:cacheprovider", "--tb=short", "-rfE"]

    def run() -> Row:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=part.options.seconds - 5)
        lines = (result.stdout + result.stderr).strip().splitlines()
        return {
            "passed": result.returncode == 0,
            "summary": lines[-1] if lines else "",
            "output": [] if result.returncode == 0 else lines[-150:],
        }

    part.add({"command": " ".join(command[1:])}, run)


def run_latency(part: Part) -> None:
    """Plans by the GPU's clock: the network at 0.8 of its time, or the reason why there is none."""
    cases = [
        *product((64,), (torch.float32, torch.float16), FORMATS),
        (1, torch.float32, "contiguous"),
        (1, torch.float16, "channels_last"),
    ]
    for (batch, dtype, layout), name in product(cases[:1] if part.quick else cases, NAMES[:1] if part.quick else NAMES):
        labels = {"network": name, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "memory_format": layout}

        def run(name: str = name, batch: int = batch, dtype: torch.dtype = dtype, layout: str = layout) -> Row:
            model, images = part.network(name)
            model = model.to(dtype=dtype, memory_format=FORMATS[layout])  # type: ignore[call-overload]
            x = images[:1].expand(batch, -1, -1, -1).to(part.device, dtype).contiguous(memory_format=FORMATS[layout])
            start = time.perf_counter()
            try:
                plan = make_plan(model, x, budget=Budget(latency=0.8), schemes=CLOSED_FORM, exclude=(), cache=False)
            except BudgetError as error:  # where launches take longer than the operations, no chain is faster than its layer
                return {"refused": str(error)[:400]}
            planned = time.perf_counter()
            cut = apply_plan(model, plan, x)
            before, after = milliseconds(part, (model, cut), x)
            return {
                "plan_s": round(planned - start, 2),
                "cut_s": round(time.perf_counter() - planned, 2),
                "cuts": len(plan.cuts),
                "timing": asdict(plan.timing) if plan.timing else None,
                "event_ms": [before, after],
                "of_the_time": round(after / before, 3),
                "of_the_macs": round(plan.total_after.macs / plan.total.macs, 3),
            }

        part.add(labels, run)


def run_macs(name: str, part: Part) -> None:
    """Plans and cuts to half the MACs, with and without images; the time of each phase, errors, and the time of both networks."""
    for with_images in (True, False):
        schemes = SEARCHED[name] if with_images else ("cp", *CLOSED_FORM)
        settings: Row = {"budget": Budget(macs=0.5), "schemes": schemes, "cache": False}
        if part.quick:
            settings |= {"budget": Budget(macs=0.9), "schemes": "spatial", "exclude": ("conv1", "layer[12].*")}

        def run(with_images: bool = with_images, settings: Row = settings) -> Row:
            model, images = part.network(name)
            batches = list(images.split(32)) if with_images else None
            x = images[:1].to(part.device)
            start = time.perf_counter()
            plan = make_plan(model, x, calibration=batches, **settings)
            planned = time.perf_counter()
            cut = apply_plan(model, plan, x, calibration=batches)
            finished = time.perf_counter()
            report = compare(model, cut, x, plan=plan, data=[images[:256]])
            assert report.fidelity is not None
            times = {}
            cases = [(1, torch.float32, "contiguous")] if part.quick else list(product((1, 64), (torch.float32, torch.float16), FORMATS))
            for batch, dtype, layout in cases if with_images else cases[:1]:
                sides = [copy.deepcopy(side).to(dtype=dtype, memory_format=FORMATS[layout]) for side in (model, cut)]  # type: ignore[call-overload]
                inputs = x.expand(batch, -1, -1, -1).to(dtype).contiguous(memory_format=FORMATS[layout])
                times[f"batch {batch}, {dtype}, {layout}"] = milliseconds(part, sides, inputs)
            return {
                "plan_s": round(planned - start, 2),
                "cut_s": round(finished - planned, 2),
                "cuts": len(plan.cuts),
                "of_the_macs": round(1 - report.macs_saved, 3),
                "output_error": round(report.fidelity.error, 5),
                "divergence": report.fidelity.divergence,
                "event_ms": times,
            }

        part.add({"network": name, "calibrated": with_images, "schemes": settings["schemes"]}, run)


def run_step(part: Part) -> None:
    """A step of fine_tune with a teacher against a plain loop that does the same: mixed images, distillation, clipping, AdamW."""
    steps = 4 if part.quick else 30
    for name, precision, layout in [("resnet20", "float32", False)] if part.quick else [
        ("resnet20", "float32", False), ("resnet20", "bfloat16", True), ("resnet18", "float32", False), ("resnet18", "bfloat16", True),
        ("resnet50", "bfloat16", True),
    ]:  # fmt: skip

        def run(name: str = name, precision: str = precision, layout: bool = layout) -> Row:
            teacher, images = part.network(name)
            plan = make_plan(teacher, images[:1].to(part.device), schemes="spatial", rule="fixed", rank=8, cache=False)
            small, size = apply_plan(teacher, plan), min(len(images), 128 if name == "resnet20" else 64)
            batches = [images[:size].to(part.device)] * steps
            loops = {"plain": plain_loop, **dict.fromkeys(("adamw", "soap"), tuned_loop)}
            times: dict[str, list[float]] = {kind: [] for kind in loops}
            for _ in range(1 if part.quick else 2):
                for kind, loop in loops.items():
                    times[kind].append(loop(part, copy.deepcopy(small), teacher, batches, precision, layout, kind))
            result = {f"{kind}_ms": round(1e3 * min(samples), 3) for kind, samples in times.items()}
            return {**result, "ratio": round(result["adamw_ms"] / result["plain_ms"], 3)}

        part.add({"network": name, "precision": precision, "channels_last": layout}, run)


def tuned_loop(part: Part, model: nn.Module, teacher: nn.Module, batches: list[Tensor], precision: str, layout: bool, kind: str) -> float:
    """Median seconds of a step of fine_tune, between two calls back."""
    moments: list[float] = []
    settings = FineTune(epochs=1, optimizer=kind, precision=precision, channels_last=layout)  # type: ignore[arg-type]
    fine_tune(model, batches, teacher=teacher, settings=settings, callback=lambda *_: moments.append(time.perf_counter()))
    return median(b - a for a, b in pairwise(moments))


def plain_loop(part: Part, model: nn.Module, teacher: nn.Module, batches: list[Tensor], precision: str, layout: bool, _kind: str) -> float:
    """Median seconds of a step of a loop as a user would write it; the loss is read once a step, as fine_tune does."""
    if layout:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    model.eval()  # running statistics of BatchNorms, as the default of fine_tune
    dtype, moments = getattr(torch, precision), []
    for batch in batches:
        share, order = float(torch.rand(())), torch.randperm(len(batch), device=batch.device)
        x = share * batch + (1 - share) * batch[order]
        x = x.contiguous(memory_format=torch.channels_last) if layout else x
        with torch.autocast(part.device.type, dtype, enabled=dtype != torch.float32):
            output = model(x)
            with torch.no_grad():
                target = teacher(x)
        logs = [(side.float() / 2).log_softmax(1) for side in (output, target)]
        loss = 4 * F.kl_div(*logs, log_target=True, reduction="batchmean")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        float(loss)
        moments.append(time.perf_counter())
    return median(b - a for a, b in pairwise(moments))


PARTS: dict[str, Callable[[Part], None]] = {"tests": run_tests, "latency": run_latency, "step": run_step}
PARTS |= {f"macs {name}": partial(run_macs, name) for name in NAMES}


def machine(device: str) -> Row:
    """What the results hold for."""
    described = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(), "device": device}
    if device.startswith("cuda") and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        described |= {"gpu": properties.name, "gib": round(properties.total_memory / 2**30, 1), "cudnn": torch.backends.cudnn.version()}
        described |= {"cuda": torch.version.cuda, "tf32_convolutions": torch.backends.cudnn.allow_tf32}
    return described


def run_part(name: str, arguments: list[str], rows: Path, seconds: float) -> Row:
    """A part in another process, stopped when its time is over; its rows, and how it ended."""
    start, rows_file = time.perf_counter(), rows.with_name(f"{rows.stem} {name}.part")
    rows_file.unlink(missing_ok=True)
    command = [sys.executable, __file__, *arguments, "--part", name, "--rows", str(rows_file), "--seconds", str(max(seconds - 10, 1))]
    try:
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=seconds)
        ended = "finished" if result.returncode == 0 else f"exit status {result.returncode}: {result.stderr[-2000:]}"
    except subprocess.TimeoutExpired:
        ended = f"stopped after {seconds:.0f} s"
    results = json.loads(rows_file.read_text()) if rows_file.exists() else []
    rows_file.unlink(missing_ok=True)
    return {"ended": ended, "seconds": round(time.perf_counter() - start, 1), "rows": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test this script")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results") / "cuda.json")
    parser.add_argument("--data", type=Path, help="a folder with cifar10/ and imagenet/")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        PARTS[options.part](Part(options))
        return
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here. To test this script on a CPU: --device cpu --quick --json FILE")
    arguments = [
        "--device",
        options.device,
        *(["--quick"] if options.quick else []),
        *(["--data", str(options.data)] if options.data else []),
    ]
    results: Row = {"machine": machine(options.device), "parts": {}}
    start = time.monotonic()
    for name, share in SHARES.items():
        if options.quick and name == "macs resnet50":
            continue
        left = options.limit - (time.monotonic() - start)
        results["parts"][name] = run_part(name, arguments, options.json, min(share, left)) if left > 15 else {"ended": "no time was left"}
        results["seconds"] = round(time.monotonic() - start, 1)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

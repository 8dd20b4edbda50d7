"""Which numbers check_numbers.py leaves out, each with a reason, and which are computed from several records."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

from result_values import RESULTS, row, rows, values_of

MAIN, RECIPES, BENCHMARKS = DOCUMENTS = ("README.md", "recipes/README.md", "tests/benchmarks/README.md")

# Sections of recipes/README.md that show arguments and defaults.
NO_MEASUREMENTS = ("Run a recipe", "Write a recipe")

# Sections, and paragraphs by their first words, that are not checked yet.
NOT_YET_CHECKED: dict[str, tuple[str, ...]] = {
    MAIN: ("**How long it takes, and how to resume.**",),
    RECIPES: (),
    BENCHMARKS: ("planning.py", "planning_profile.py"),
}

# The keys of the table in README.md.
MAIN_KEYS = {"dense", "cut", "tuned", "drop", "dense_ms", "cut_ms"}

# Columns whose numbers are arguments, counts or versions.
ARGUMENT_COLUMNS = {"budgets on latency", "epochs", "images", "kept", "library", "measured on", "network", "penalty", "training"}

# Arguments in texts: budgets, sizes and versions.
ARGUMENTS = re.compile(
    r"[-+]?\d[\d.]* % of (?:the |their |its )?(?:whole )?(?:MACs|parameters|network|time)|-\d+ %|-\d+ to -?\d+ %|batch \d+"
    r"|\d+ iterations|\([\d,]+ images\)|(?:Python|torch|torchao) \d[\d.]*\d"
)

# Numbers that are in no result file: the phrase, with {} for each number, and the reason.
LEFT_OUT: dict[str, dict[str, str]] = {
    MAIN: {},
    RECIPES: {},
    BENCHMARKS: {
        "its cheapest options leave {} %) and for resnet50 at batch 16 ({} %)": "from error messages, as the text says",
        "The noise of an accuracy is about {} (an estimate": "an estimate, as the text says",
        "it refuses {} of the time, and names the least in reach: {} (ResNet-20), {} (resnet18), {} (resnet50)": "from error messages",
        "densenet121 missed its {} %": "the budget of the recipe",
        "ALDS reports a loss of {} points": "from the paper",
        "to take more than {} % of the layer's time, counting depthwise MACs {}- and {}-fold": "constants of the planner",
    },
}


def lost(rule: str) -> list[float]:
    """Points lost by ResNet-56 for the three budgets on MACs."""
    return [row["drop"] for row in rows("budget_rivals", network="ResNet-56", measure="macs", rule=rule)]


def mean_and_lead() -> list[float]:
    """Mean points lost by ResNet-56 for MACs: ours, uniform fractions and equal errors; and our largest distance from the best."""
    ours, uniform, equal = (lost(rule) for rule in ("ours", "uniform fraction", "equal relative error (ALDS)"))
    return [fmean(ours), fmean(uniform), fmean(equal), max(a - min(b, c) for a, b, c in zip(ours, uniform, equal, strict=True))]


def quantized() -> list[float]:
    """Accuracies of the dense network in float32 and of the calibrated cut in int8; points lost, and those that int8 costs the cut."""
    dense, cut = (row("quantize", network=name) for name in ("dense", "cut, calibrated"))
    return [dense["float32"], cut["int8"], dense["float32"] - cut["int8"], cut["float32"] - cut["int8"]]


def lost_in_int8() -> list[float]:
    """Points that int8 costs the three cut networks, least and largest: in onnxruntime, and by torchao."""
    cut = [row for row in rows("quantize") if row["network"] != "dense"]
    losses = [[row["float32"] - row[key] for row in cut] for key in ("int8", "torchao_int8")]
    return [bound for numbers in losses for bound in (min(numbers), max(numbers))]


def lost_by_tuning() -> list[float]:
    """Points that the short fine-tuning costs, in float32 and in int8."""
    before, after = (row("quantize", network=name) for name in ("cut, calibrated", "cut, fine-tuned"))
    return [before[key] - after[key] for key in ("float32", "int8")]


def lost_by_degeneracy() -> list[float]:
    """Points that int8 costs at degeneracies of 7 to 13, least and largest, and at 41 and 252; with these degeneracies."""
    losses = sorted((row["degeneracy"], row["float32"] - row["int8"]) for row in rows("degeneracy") if "degeneracy" in row)
    small = [loss for degeneracy, loss in losses if degeneracy < 20]
    return [min(small), max(small), losses[0][0], losses[len(small) - 1][0], *losses[len(small)][::-1], *losses[-1][::-1]]


def lost_at_low_degeneracy() -> list[float]:
    """Degeneracies below 20, least and largest, and the points that int8 costs there, least and largest."""
    least, largest, *between = lost_by_degeneracy()[:4]
    return [*between, least, largest]


def starts() -> list[float]:
    """Points on the test images by which calibrated factors lead those of the weights alone, and random ones."""
    tests = {row["start"]: row["test"] for row in rows("finetune_starts")}
    return [tests["calibrated factors"] - tests[start] for start in ("data-free factors", "random factors")]


def power_of_ten(numbers: Iterable[float]) -> float:
    """The least power of ten above all numbers."""
    return 10.0 ** math.ceil(math.log10(max(numbers)))


def bound_of_error() -> list[float]:
    """A bound of the differences from the rivals' errors."""
    schemes = json.loads((RESULTS / "factorize.json").read_text())["schemes"].values()
    return [power_of_ten(scheme["worst_error_excess"] for scheme in schemes)]


def bound_of_folding() -> list[float]:
    """A bound of the differences of folded networks in float32: all cut ones, and the dense ones but for the three in the table."""
    dense, cut = ([row[kind]["folded_minus_dense"] for row in rows("fold_batchnorm")] for kind in ("dense", "cut"))
    return [power_of_ten([*cut, *sorted(dense)[:-3]])]


def means_of_layers() -> list[float]:
    """Percent by which calibration lowers the error of a layer on average, with `channel` and with `depthwise`."""
    return [100 - 100 * fmean(row["ratio"] for row in rows("calibrated_layers", scheme=scheme)) for scheme in ("channel", "depthwise")]


def raised_by_calibration() -> list[float]:
    """Accuracies of CP at 40 % of the parameters, without and with images: ResNet-20, then ResNet-56."""
    result = []
    for network in ("ResNet-20", "ResNet-56"):
        result.append(row("data_free", network=network, scheme="cp", common=0.1)["cut"])
        result.append(fmean(row["cut"] for row in rows("calibrated_accuracy", network=network, scheme="cp", setting="params 0.4")))
    return result


def largest_lag() -> list[float]:
    """The most points that our rule loses more than another, for ResNet-20."""
    ours = {(r["measure"], r["keep"]): r["drop"] for r in rows("budget_rivals", network="ResNet-20", rule="ours")}
    return [max(ours[r["measure"], r["keep"]] - r["drop"] for r in rows("budget_rivals", network="ResNet-20"))]


def misprediction() -> list[float]:
    """The largest difference of a measured time from the predicted one, in percent, in the contiguous format."""
    timed = [row for row in rows("budget_torchvision", memory_format="contiguous") if "measured_over_predicted" in row]
    return [max(abs(100 * row["measured_over_predicted"] - 100) for row in timed)]


def slower_with_half_the_macs() -> list[float]:
    """Milliseconds of resnet18 for batches of 16, cut to half of its MACs and dense."""
    result = row("budget_torchvision", recipe="resnet18-half-macs", batch=16)
    return [result["cut_ms"], result["dense_ms"]]


def missed() -> list[float]:
    """The time that densenet121 keeps, in percent."""
    return [100 / row("budget_torchvision", recipe="densenet121-latency-80", memory_format="channels_last")["faster"]]


def by_seed() -> list[float]:
    """Points lost with the settings of the recipe, with seeds 0 and 1."""
    return [row("finetune_accuracy", case="resnet20-alds", seed=seed, changed=None)["drop"] for seed in (0, 1)]


def one_epoch() -> list[float]:
    """Accuracy, loss and divergence after an epoch with the defaults."""
    (result,) = (r for r in rows("finetune_ablation", case="resnet20-alds", change="defaults") if r["epochs"] == 1)
    return [result[key] for key in ("tuned", "held_out_loss", "divergence")]


def folded() -> list[float]:
    """The largest difference of folded from dense networks in float64."""
    return [max(row[kind]["folded_minus_dense_float64"] for row in rows("fold_batchnorm") for kind in ("dense", "cut"))]


def gpu_values(key: str, network: str = "") -> list[float]:
    """All values of a key in cuda.json, or those of a network, sorted."""
    values = [value for value in values_of(RESULTS / "cuda.json") if value.name == key]
    return sorted(value.number for value in values if not network or ("network", network) in value.tags)


def steps_on_gpu() -> list[float]:
    """The least and largest ratio of a step to that of a plain loop: in the latest run, and in the earlier ones."""
    latest, *earlier = (
        [row["ratio"] for row in run["parts"]["step"]["rows"] if "ratio" in row]
        for run in json.loads((RESULTS / "cuda.json").read_text())["runs"]
        if "step" in run["parts"]
    )
    before = [ratio for ratios in earlier for ratio in ratios]
    return [min(latest), max(latest), min(before), max(before)]


def timed_in_onnxruntime(name: str, threads: int) -> tuple[float, float]:
    """How much faster a plan for onnxruntime is there than the dense network, and by what percentage its time is off."""
    row = next(row for row in json.loads((RESULTS / "runtime.json").read_text()) if (row["network"], row["threads"]) == (name, threads))
    times = row["milliseconds in onnxruntime"]
    after, predicted = times["plan for onnxruntime"], row["plan for onnxruntime"]["predicted"]["cut ms"]
    return times["dense"] / after, 100 * abs(after / predicted - 1)


def faster_than_eager_plans() -> list[float]:
    """By what percentage plans for eager mode, of no more error, take longer in onnxruntime than plans for it: least and largest."""
    times = [row["milliseconds in onnxruntime"] for row in json.loads((RESULTS / "runtime.json").read_text())]
    ratios = [each["plan for eager of no more error"] / each["plan for onnxruntime"] for each in times]
    return [100 * min(ratios) - 100, 100 * max(ratios) - 100]


def seconds_to_cut(changed: str) -> Callable[[], list[float]]:
    """CPU seconds to plan and cut with half of a quantity, with all of it and with twice as much."""

    def numbers() -> list[float]:
        measured = json.loads((RESULTS / "scaling.json").read_text())["rows"]
        own = sorted((row["factor"], row["plan"] + row["cut"]) for row in measured if row["changed"] in (changed, None))
        return [seconds for _, seconds in own]

    return numbers


def refused_budget(name: str, busy: bool) -> Callable[[], list[float]]:
    """What a budget on time that is out of reach would keep and, beside a busy process, how much longer runs took."""

    def numbers() -> list[float]:
        measured = json.loads((RESULTS / "time_budget.json").read_text())
        (row,) = [row for row in measured if (row["network"], row["busy"]) == (name, busy)]
        texts = [row["refused"], *row["warnings"]]
        matches = [re.findall(r"still keeps latency=([\d.]+)|Interruptions made runs ([\d.]+) times", text) for text in texts]
        return [float(share or longer) for pairs in matches for share, longer in pairs]

    return numbers


def off_in_onnxruntime(*names: str) -> float:
    return max(timed_in_onnxruntime(name, threads)[1] for name in names for threads in (1, 2))


def record(name: str, *keys: str) -> Callable[[], list[float]]:
    """Numbers of the only record of a result file."""

    def numbers() -> list[float]:
        node: Any = json.loads((RESULTS / f"{name}.json").read_text())
        values = node.get("summary") or node["rows"][0]
        return [values[key] for key in keys]

    return numbers


# Numbers that are computed from several records, and tables of a single one: the phrase, with {} for each number, and the values.
CLAIMS: dict[str, dict[str, Callable[[], list[float]]]] = {
    MAIN: {
        "int8 | 40 % of the parameters | none | {} % in float32 | {} % in int8 | {}, of which int8 {} |": quantized,
        "At {} to {}, int8 loses {} to {} points": lost_at_low_degeneracy,
        "takes {} ms for 16 images on two CPU cores, and {} ms without a cut": slower_with_half_the_macs,
    },
    RECIPES: {},
    BENCHMARKS: {
        "equal to {} |": bound_of_error,
        "(mean {} against {}) and equal errors ({}), most at -70 %, by {} points": mean_and_lead,
        "end {} points above factors of the weights alone, and {} points above random ones": starts,
        "| plain, AdamW | {} ms |": record("finetune_cost", "plain_ms"),
        "| `fine_tune`, AdamW | {} ms | {} |": record("finetune_cost", "fine_tune_ms", "ratio"),
        "| `fine_tune`, SOAP (default) | {} ms | {} |": record("finetune_cost", "with_soap_ms", "ratio_with_soap"),
        "-fold | {} | {} |": record("link_times", "warned", "warned_and_slower"),
        "| the others | {} | {} |": record("link_times", "others", "others_and_slower"),
        "raises CP from {} % to {} % (ResNet-20) and from {} % to {} % (ResNet-56)": raised_by_calibration,
        "by {} % (channel) to {} % (depthwise) on average": means_of_layers,
        "nowhere behind by more than {}.": largest_lag,
        "within {} % of the predicted ones": misprediction,
        "({} % measured)": missed,
        "(recipe: {} with seed 0, {} with seed 1)": by_seed,
        "dense {} % on them": lambda: [rows("finetune_ablation")[0]["dense"]],
        "SOAP costs {} %": lambda: [100 * rows("finetune_cost")[0]["ratio_with_soap"] - 100],
        "resnet18 is {} and {} times as fast": lambda: [timed_in_onnxruntime("resnet18", threads)[0] for threads in (1, 2)],
        "at most {} % off for resnet18 and resnet50": lambda: [off_in_onnxruntime("resnet18", "resnet50")],
        "at most {} % for the small networks": lambda: [off_in_onnxruntime("resnet20", "mobilenet_v2")],
        "of no more error, by {} to {} %": faster_than_eager_plans,
        "| layers | {} | {} | {} |": seconds_to_cut("layers"),
        "| width | {} | {} | {} |": seconds_to_cut("width"),
        "| images | {} | {} | {} |": seconds_to_cut("images"),
        "| pixels along a side | {} | {} | {} |": seconds_to_cut("pixels"),
        "| resnet18 | a busy process | out of reach: {} of the time; a warning: runs took {} times": refused_budget("resnet18", True),
        "| resnet50 | nothing | out of reach: {} of the time": refused_budget("resnet50", False),
        "| resnet50 | a busy process | out of reach: {} of the time; a warning: runs took {} times": refused_budget("resnet50", True),
        "{} of {} runs killed": record("finetune_kills", "identical", "runs"),
        "gives {} % (loss {}, divergence {})": one_epoch,
        "takes {} to {} times as long as a plain loop (ResNet-20 and resnet18, float32 and bfloat16; {} to {} in": steps_on_gpu,
        "took {} % of ResNet-20's cut": lambda: [100 * gpu_values("lbfgs_share_of_cut", "resnet20")[0]],
        "took {} to {} % of the plans": lambda: [100 * gpu_values("seeds_share_of_plan")[i] for i in (0, -1)],
        "the difference is at most {} of the largest output": bound_of_folding,
        "In float64, outputs are equal to {}": folded,
        "have reached {} (": lambda: [max(row["worst_degeneracy"] for row in rows("calibrated_accuracy"))],
        "({} to {} in onnxruntime, {} to {} by torchao)": lost_in_int8,
        "loses {} points in float32 and {} in int8": lost_by_tuning,
        "int8 loses {} to {} points at {} to {}, {} points at {}, and {} points at {}": lost_by_degeneracy,
    },
}

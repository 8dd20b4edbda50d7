"""What is known of the time of chains without measuring it: depthwise links are slow for their MACs on CPUs."""

from __future__ import annotations

from dsconv_surgery.network.geometry import ConvSpec, chain_cost
from dsconv_surgery.plan import Cut, Plan
from dsconv_surgery.support.user_warning import warn_user

# Time of a MAC on CPUs in eager mode, relative to one of other convolutions: of depthwise links with one kernel per channel, and with
# several. Medians of layers with 16 to 512 channels, see link_times.py in tests/benchmarks.
ONE_KERNEL, SEVERAL_KERNELS = 15, 45
NO_GAIN = 0.95  # of the dense network's time: a plan above it saves MACs and hardly any time


def expected_time(plan: Plan) -> float:
    """The network's time with a plan on a CPU, as a fraction of the dense network's: its MACs, depthwise ones counted by their time."""
    saved = sum(_dense_macs(cut) - _chain_macs(cut) for cut in plan.cuts)
    return 1 - saved / max(plan.total.macs, 1)


def warn_if_slow(plan: Plan) -> bool:
    """Warn if the chains of a plan are expected to take as long as the layers, on a CPU in eager mode; whether it did."""
    slow = [cut for cut in plan.cuts if _chain_macs(cut) > NO_GAIN * _dense_macs(cut)]
    is_slow = bool(slow) and expected_time(plan) > NO_GAIN
    if is_slow:
        names = ", ".join(sorted({cut.scheme for cut in slow}))
        warn_user(
            f"the plan's chains are known to be slow on CPUs: a MAC of a depthwise link takes {ONE_KERNEL} to {SEVERAL_KERNELS} times as "
            f"long as one of other convolutions, so {len(slow)} of {len(plan.cuts)} layers may become slower ({names}). Limit the time "
            "with Budget(latency=...), choose from other schemes, or measure it with compare(latency=True).",
        )
    return is_slow


def _dense_macs(cut: Cut) -> int:
    return _weight(cut.spec) * cut.cost_before.macs


def _chain_macs(cut: Cut) -> int:
    """The MACs of a cut's chain, those of depthwise links times how much longer they take."""
    total = 0
    sizes = cut.sizes
    for name, link in cut.chain.items():
        total += _weight(link) * chain_cost({name: link}, sizes).macs
        sizes = tuple(link.out_size(size) for size in sizes)
    return total


def _weight(link: ConvSpec) -> int:
    if not link.groups == link.in_channels > 1:
        return 1
    return ONE_KERNEL if link.out_channels == link.in_channels else SEVERAL_KERNELS

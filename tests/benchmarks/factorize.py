"""Compare our factorisation with public ones in one run, on the convolutions of torchvision's resnet18 that are 3x3 or larger.

python tests/benchmarks/factorize.py --json tests/benchmarks/results/factorize.json [--threads 2] [--weights FILE]

Each scheme keeps half of every layer's MACs, without data. Rivals: for spatial, channel and depthwise a plain float32
`torch.linalg.svd` of the same unfolding; for Tucker tensorly's `partial_tucker`; for CP tensorly's `parafac(init="svd",
n_iter_max=50)` on three modes with the einsum back end and opt_einsum, its fastest (a hundred times slower without). Our CP is timed
until it reaches the rival's error, layer by layer. "ours, whole" is the time of `compress` for the whole network.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import conftest  # noqa: F401  makes torchvision importable beside a CPU build of torch
import opt_einsum  # noqa: F401  torch.einsum, and so tensorly, needs it for good contraction orders
import tensorly
import torch
import torchvision
from safetensors.torch import load_file
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor, nn

from dsconv_surgery import Budget, compress, make_plan, schemes
from dsconv_surgery.network.discovery import ConvSite, find_convs
from dsconv_surgery.network.geometry import Rank, chain_cost
from dsconv_surgery.schemes import als


def svd_rival(scheme: str, w: Tensor, rank: int) -> tuple[Tensor, ...]:
    """A plain truncated SVD in float32."""
    o, i, kh, kw = w.shape
    unfolded = {
        "spatial": lambda: w.permute(1, 2, 0, 3).reshape(i * kh, o * kw),
        "channel": lambda: w.reshape(o, -1),
        "depthwise": lambda: w.transpose(0, 1).reshape(i, o, kh * kw),
    }[scheme]()
    u, s, v = torch.linalg.svd(unfolded, full_matrices=False)
    return u[..., :rank] * s[..., None, :rank], v[..., :rank, :]


def svd_kernel(scheme: str, factors: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
    """The kernel of `svd_rival`'s factors."""
    o, i, kh, kw = shape
    v = factors[0] @ factors[1]
    return {
        "spatial": lambda: v.reshape(i, kh, o, kw).permute(2, 0, 1, 3),
        "channel": lambda: v.reshape(o, i, kh, kw),
        "depthwise": lambda: v.reshape(i, o, kh, kw).transpose(0, 1),
    }[scheme]()


def tensorly_rival(scheme: str, w: Tensor, rank: Rank) -> tuple[Tensor, ...]:
    """tensorly's factors, in float32 with its pytorch back end; its global back ends are restored."""
    with tensorly.backend_context("pytorch"):
        if scheme == "tucker":
            assert isinstance(rank, tuple)
            (core, (out, inner)), _ = partial_tucker(w, rank=[rank[1], rank[0]], modes=[0, 1])
            return core, out, inner
        tensorly.tenalg.set_backend("einsum")
        try:
            weights, factors = parafac(w.flatten(2), rank=rank, init="svd", n_iter_max=50)
        finally:
            tensorly.tenalg.set_backend("core")
        return weights, *factors


def tensorly_kernel(scheme: str, factors: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
    """The kernel of `tensorly_rival`'s factors."""
    return torch.einsum("qpyx,oq,ip->oiyx" if scheme == "tucker" else "r,or,ir,kr->oik", *factors).reshape(shape)


def ours_to_error(site: ConvSite, w: Tensor, rank: int, error: float) -> float:
    """Seconds that our CP takes to reach an error, with the fewest sweeps of a list that suffice."""
    scheme, saved = schemes.get_scheme("cp"), (als.SWEEPS, als.WIDE_SWEEPS)
    try:
        for sweeps in (4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64, 96, 128, 200):
            als.SWEEPS = als.WIDE_SWEEPS = sweeps
            start = time.perf_counter()
            factors = next(schemes.factorize(scheme, site.spec, w, [rank]))
            seconds = time.perf_counter() - start
            if schemes.relative_error(w, schemes.kernel_of(scheme, site.spec, factors)) <= error:
                return seconds
    finally:
        als.SWEEPS, als.WIDE_SWEEPS = saved
    return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", type=Path, help="a state_dict (safetensors) of resnet18; random weights otherwise")
    parser.add_argument("--only", nargs="*", default=["spatial", "channel", "depthwise", "tucker", "cp"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    if options.weights:
        state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(options.weights).items()}
        model.fc = nn.Linear(512, len(state["fc.bias"]))
        model.load_state_dict(state)
    model.eval()
    x = torch.zeros(1, 3, 224, 224)
    sites = {s.name: s for s in find_convs(model, x) if isinstance(s, ConvSite)}
    table: dict[str, dict[str, float]] = {}
    for name in options.only:
        plan = make_plan(model, x, schemes=name, rule="uniform", budget=Budget(macs=0.5))
        start = time.perf_counter()
        compress(model, x, schemes=name, rule="uniform", budget=Budget(macs=0.5))
        whole = time.perf_counter() - start
        ours = rival = worst = 0.0
        for cut in plan.cuts:
            w = model.get_submodule(cut.name).get_parameter("weight").detach()
            scheme = schemes.get_scheme(name)
            start = time.perf_counter()
            is_svd = isinstance(cut.rank, int) and name != "cp"
            rival_factors = svd_rival(name, w, cut.rank) if is_svd else tensorly_rival(name, w, cut.rank)
            rival_time = time.perf_counter() - start
            rival_error = schemes.relative_error(w, (svd_kernel if is_svd else tensorly_kernel)(name, rival_factors, w.shape))
            start = time.perf_counter()
            factors = next(schemes.factorize(scheme, cut.spec, w, [cut.rank]))
            our_time = time.perf_counter() - start
            error = schemes.relative_error(w, schemes.kernel_of(scheme, cut.spec, factors))
            if name == "cp":
                assert isinstance(cut.rank, int)
                our_time = ours_to_error(sites[cut.name], w, cut.rank, rival_error)
            rival, ours, worst = rival + rival_time, ours + our_time, max(worst, error / rival_error - 1)
            times = f"ours {our_time:7.3f} s {error:.6f}   rival {rival_time:7.3f} s {rival_error:.6f}"
            print(f"{name:10} {cut.name:24} rank {cut.rank!s:12} {times}", flush=True)
        macs = sum(chain_cost(cut.chain, cut.sizes).macs for cut in plan.cuts)
        table[name] = {
            "ours_s": ours,
            "rival_s": rival,
            "ratio": rival / ours,
            "ours_whole_s": whole,
            "worst_error_excess": worst,
            "macs_kept": macs / sum(sites[cut.name].cost.macs for cut in plan.cuts),
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{'scheme':10} {'ours':>8} {'rival':>8} {'faster':>7} {'whole':>8} {'error, relative to rival, at worst':>36}")
    for name, row in table.items():
        excess = f"{row['worst_error_excess']:+36.2e}"
        print(f"{name:10} {row['ours_s']:7.2f}s {row['rival_s']:7.2f}s {row['ratio']:6.2f}x {row['ours_whole_s']:7.2f}s {excess}")
    print(f"peak memory {peak:.2f} GiB, {options.threads} threads")
    if options.json:
        settings = {"threads": options.threads, "torch": torch.__version__, "tensorly": tensorly.__version__, "peak_gib": round(peak, 3)}
        options.json.write_text(json.dumps({"settings": settings, "schemes": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()

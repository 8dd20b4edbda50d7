"""Planning and calibration in several processes, one of which has no held-out image."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TWO = """
import torch
import torch.distributed as dist
from torch import nn
from dsconv_surgery import Budget, apply_plan, make_plan

class InPlace(nn.Module):  # cannot be differentiated: an operation in place on a value that a gradient needs
    def __init__(self):
        super().__init__()
        self.body = plain

    def forward(self, x):
        y = self.body(x).sigmoid()
        z = y * y
        y.mul_(2)
        return z + y

torch.manual_seed(0)
plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
images = torch.randn(32, 3, 10, 10)
batches = list(images.split(4))  # the second of two processes gets the held-out image of each batch, the first none
if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
for network in (plain, InPlace()):
    plan = make_plan(network, images[:1], budget=Budget(macs=0.5), schemes="channel", exclude=(), calibration=batches, cache=False)
    cut = apply_plan(network, plan, calibration=batches)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*(c.damage for c in plan.cuts), *(float(p.double().norm()) for p in cut.parameters()))
if dist.is_initialized():
    dist.destroy_process_group()
"""


def test_a_process_without_held_out_images_takes_part(tmp_path: Path) -> None:
    """Networks for regression, one of which has no gradients: the damages and the factors of a single process."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    results = []
    for options in ([], launch):
        run = subprocess.run([sys.executable, *options, str(script)], capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
        results.append([[float(number) for number in line.split()] for line in run.stdout.splitlines()[-2:]])
    assert results[1] == [pytest.approx(row, rel=0.05) for row in results[0]]

"""The command `export`: a saved network as an ONNX file."""

from __future__ import annotations

from pathlib import Path

import dsconv_surgery
from dsconv_surgery.checkpoint import read_plan
from dsconv_surgery.cli.inputs import example_input, named_model
from dsconv_surgery.support.atomic_files import atomic_write
from dsconv_surgery.support.inputs import Inputs
from dsconv_surgery.support.onnx_export import network_to_onnx_for_any_batch


def write_onnx(model: str, folder: Path, file: Path, shape: str | None) -> str:
    """Write a saved network, with BatchNorms folded, for any batch size; a line that says what was written."""
    example = example_input(shape or ",".join(map(str, read_plan(folder).input_shapes[0])))
    cut = dsconv_surgery.load(named_model(model, "none"), folder)
    data = network_to_onnx_for_any_batch(dsconv_surgery.fold_batchnorm(cut, example), Inputs(example))
    with atomic_write(file) as temporary:
        temporary.write_bytes(data)
    sizes = ", ".join(map(str, example.shape[1:]))
    return f"{file}: {len(data) / 1e6:.1f} MB, input (batch, {sizes}), outputs in onnxruntime equal to torch's"

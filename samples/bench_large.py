"""Peak memory of calibrating a large model with external data.

    python samples/bench_large.py [--gb 3] [--bits 8] [--method octav] [--margin 1.5] [--folder DIR]

Makes a chain of MatMuls whose weights all differ, in all --gb gigabytes (10^9 bytes), calibrates it
on 64 made-up samples in a process of its own, and prints the peak of its resident memory, files
mapped into memory included. Exits with 1 if that is more than the model's size and --margin GB.
The folder needs room for the model and for what is written; it is emptied of them afterwards.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

WIDTH = 4096
N_SAMPLES = 64
DATA = "model.data"


def make_model(folder: Path, n_layers: int) -> Path:
    """``x → MatMul → Tanh → …``, each weight WIDTH x WIDTH of seeded Gaussian values."""
    rng = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    with (folder / DATA).open("wb") as file:
        for layer in range(n_layers):
            values = rng.standard_normal((WIDTH, WIDTH), np.float32) / np.float32(WIDTH**0.5)
            weight = TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH])
            weight.data_location = TensorProto.EXTERNAL
            place = {"location": DATA, "offset": file.tell(), "length": values.nbytes}
            for key, value in place.items():
                entry = weight.external_data.add()
                entry.key, entry.value = key, str(value)
            file.write(values.tobytes())
            weights.append(weight)
            nodes.append(
                helper.make_node("MatMul", [name, weight.name], [f"h{layer}"], f"m{layer}")
            )
            nodes.append(helper.make_node("Tanh", [f"h{layer}"], [f"a{layer}"], f"t{layer}"))
            name = f"a{layer}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", WIDTH]) for n in ("x", name)]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path))
    return path


def calibrate(model: Path, bits: int, method: str) -> tuple[int, float]:
    """Peak memory in bytes, and seconds; the calibration itself is a process of its own."""
    data = model.with_name("x.npy")
    values = np.random.default_rng(1).standard_normal((N_SAMPLES, WIDTH))
    np.save(data, values.astype(np.float32))
    script = shutil.which("octav-calibrate", path=str(Path(sys.executable).parent))
    if script is None:
        raise SystemExit("octav-calibrate is not installed beside this Python: pip install .")
    options = ["--bits", str(bits), "--method", method, "--batch-size", "16", "--quiet", "--force"]
    command = [script, str(model), "--data", str(data), *options]
    start = time.perf_counter()
    process = subprocess.Popen(command)  # noqa: S603 - our own script
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"octav-calibrate ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description="Peak memory of calibrating a large model.")
    parser.add_argument("--gb", type=float, default=3.0, help="size of the model's weights")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--method", default="octav")
    parser.add_argument("--margin", type=float, default=1.5, help="GB allowed above that size")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    arguments = parser.parse_args()
    n_layers = max(2, -int(-arguments.gb * 1e9 // (4 * WIDTH**2)))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model = make_model(Path(folder), n_layers)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        peak, seconds = calibrate(model, arguments.bits, arguments.method)
        written = sorted(Path(folder).glob("model-w*"))
        names = ", ".join(f"{file.name} {file.stat().st_size / 1e6:,.1f} MB" for file in written)
    print(f"model      {size / 1e9:.2f} GB, {n_layers} weights that all differ")
    print(f"written    {names}")
    print(f"seconds    {seconds:.0f}")
    print(f"peak       {peak / 1e9:.2f} GB: {(peak - size) / 1e9:+.2f} GB beyond the model's size")
    allowed = peak <= size + arguments.margin * 1e9
    print(f"allowed    {arguments.margin:+.2f} GB: {'kept' if allowed else 'EXCEEDED'}")
    return 0 if allowed else 1


if __name__ == "__main__":
    sys.exit(main())

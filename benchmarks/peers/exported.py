"""Other runtimes for CPUs, on the file that `gdd_fast.export` writes: what a user would run without this library."""

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.operator_case import package
from benchmarks.harness.timing import Call
from gdd_fast.engine.portable import trace, write_onnx
from gdd_fast.models.precond import GDDPrecond


def write_generator(net: GDDPrecond, folder: str) -> Path:
    """The ONNX file of `net` in float32. Raises UnavailableError without the packages that this takes."""
    package("onnxscript")
    path = Path(folder, "generator.onnx")
    write_onnx(trace(net), path, {})
    return path


def onnxruntime(path: Path, z: Tensor, classes: Tensor | None) -> Call:
    """onnxruntime in float32, with as many threads as PyTorch has, told the batch."""
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else it takes a core from the next peer
    options.add_free_dimension_override_by_name("batch", len(z))
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"latents": z.numpy()} | ({} if classes is None else {"classes": classes.numpy()})
    return lambda: torch.from_numpy(session.run(["images"], feed)[0])


def openvino(path: Path, z: Tensor, classes: Tensor | None, precision: str) -> Call:
    """OpenVINO in `precision`, "f32" or "bf16", with as many threads as PyTorch has, compiled for the batch."""
    runtime = package("openvino")
    core = runtime.Core()
    model = core.read_model(path)
    model.reshape({"latents": list(z.shape)} | ({} if classes is None else {"classes": [len(z)]}))
    hints = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(model, "CPU", hints)
    inputs = {"latents": z.numpy()} | ({} if classes is None else {"classes": classes.numpy()})
    return lambda: torch.from_numpy(compiled(inputs, share_outputs=False)[0])

"""The generator as an ONNX graph and an onnxruntime session: what someone would use who only generates.

Exported is the reference path, whose plain operators every exporter knows, at a fixed batch and with constant noise, in
the form that onnxruntime was measured to run fastest: ordinary convolutions instead of grouped ones with a kernel per
sample (1.1 to 1.2 times), and demodulation by a small product.
"""

import io
import warnings
from typing import Any

import torch

from benchmarks import reference


class _Images(torch.nn.Module):
    """z [N, z_dim] to images, on the reference path, as a module that can be exported."""

    def __init__(self, G: torch.nn.Module) -> None:
        super().__init__()
        self.G = G
        self.generator = reference.ReferenceGenerator(G, is_fused=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.generator(z, "const")


def exported(G: torch.nn.Module, batch: int) -> bytes:
    """The graph of a generator for batches of that size.

    Raises:
        ImportError: The extra `onnx` is not installed.
    """
    file = io.BytesIO()
    z = torch.zeros(batch, int(G.z_dim))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            _Images(G), (z,), file, input_names=["z"], output_names=["img"], dynamo=False,
            do_constant_folding=True, opset_version=17,
        )  # fmt: skip
    return file.getvalue()


def session(graph: bytes, threads: int) -> Any:
    """An onnxruntime session on the CPU with all of its optimisations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

"""Generators as ONNX files, and running one. The only file that imports onnx and onnxruntime, which are optional."""

import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dnnlib.util import atomic_file
from stylegan_rooted.portable import Exported, plain_operators

OPSET = 18
PACKAGES = ("onnx", "onnxscript")
REMEDY = "pip install 'stylegan-rooted[onnx]'"


def require() -> None:
    """Raise if the packages for writing are missing.

    Raises:
        ValueError: with the command that installs them.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX files need {' and '.join(missing)}: {REMEDY}")


def can_run() -> bool:
    """Whether onnxruntime is there."""
    return importlib.util.find_spec("onnxruntime") is not None


def save(exported: Exported, path: "str | os.PathLike", about: Mapping[str, Any]) -> None:
    """Write a graph as ONNX, one file, atomically.

    Args:
        exported: the graph; the first axis of its inputs and output is free, truncation_psi has no axes.
        path: file to write.
        about: plain JSON values; go into the file's metadata as `config`.

    Raises:
        ValueError: a package is missing.
    """
    require()
    import onnx

    with plain_operators(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter about its own parts
        made = torch.onnx.export(
            exported.program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(exported.inputs),
            output_names=[exported.output],
            verbose=False,
        )
    assert made is not None
    model = made.model_proto
    symbol = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # "s97" and the like
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == symbol:
                dim.dim_param = "batch"
    onnx.helper.set_model_props(model, {"config": json.dumps(about, allow_nan=False)})
    model.producer_name = "stylegan-rooted"
    with atomic_file(path) as stream:
        stream.write(model.SerializeToString())


def load(path: "str | os.PathLike") -> Callable[..., torch.Tensor]:
    """The function in an ONNX file, computed by onnxruntime on the CPU.

    Raises:
        ValueError: onnxruntime is missing.
    """
    if not can_run():
        raise ValueError(f"running an ONNX file needs onnxruntime: {REMEDY}")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        values = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, values)[0])

    return function


def read_about(path: "str | os.PathLike") -> dict[str, Any]:
    """What `save` wrote as `about`; {} where there is none."""
    import onnx

    model = onnx.load(os.fspath(path), load_external_data=False)
    return next((json.loads(entry.value) for entry in model.metadata_props if entry.key == "config"), {})

"""Every stored number of the operators through every implementation; the table at the run's end has the counts.

The CUDA kernels pass them on the host in test_cuda_sources.py, and on a GPU in test_gpu.py.
"""

import helpers
import pytest
import test_networks
import test_ops_bias_act
import test_ops_conv2d_resample
import test_ops_upfirdn2d

from torch_utils import custom_ops
from torch_utils.ops import bias_act, upfirdn2d

IMPLEMENTATIONS = {"definition": "ref", "torch calls": "torch", "compiled": "native"}
SUITES = {
    "upfirdn2d": (test_ops_upfirdn2d, "IMPLS"),
    "bias_act": (test_ops_bias_act, "IMPLS"),
    "conv2d_resample": (test_ops_conv2d_resample, "FUNCTIONS"),
}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch) -> str:
    """One way to compute, wherever it can be used; without a compiler there are two."""
    monkeypatch.setenv(custom_ops.VARIABLE, IMPLEMENTATIONS[request.param])
    if request.param == "compiled":
        if custom_ops.selected() != "native":
            pytest.skip(custom_ops.problem())
        monkeypatch.setitem(bias_act.NATIVE_MIN_NUMEL, "cpu", 0)
        monkeypatch.setattr(upfirdn2d, "NATIVE_MAX_PLANES", 10**9)
    for module, name in SUITES.values():  # of "the definition" and "whatever is fastest" only the one that is meant
        monkeypatch.setattr(module, name, getattr(module, name)[: 1 if request.param == "definition" else None][-1:])
    return request.param


@pytest.mark.parametrize("suite", SUITES)
def test_operators(suite, implementation, goldens) -> None:
    with helpers.goldens_through(suite, implementation):
        SUITES[suite][0].check_goldens(goldens / f"ops_{suite}.npz")


@pytest.mark.parametrize("suite", SUITES)
def test_operators_small_copy(suite, implementation, data_dir) -> None:
    SUITES[suite][0].check_goldens(data_dir / f"ops_{suite}.npz")


@pytest.mark.parametrize("name", test_networks.NAMES)
def test_networks_and_their_gradients(name, implementation, goldens) -> None:
    pair = test_networks.load_pair(goldens / f"networks_{name}.npz")
    with helpers.goldens_through("networks", implementation):
        test_networks.check_outputs(pair)
        test_networks.check_gradients(pair, True)

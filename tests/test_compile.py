"""torch.compile, torch.export and DistributedDataParallel over the networks: one graph, the same numbers."""

import helpers
import pytest
import torch

from torch_utils import custom_ops
from torch_utils.ops import bias_act, upfirdn2d
from training import networks

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler has its own


@pytest.fixture(params=["torch", "native"])
def ops(request, monkeypatch) -> str:
    """Made of torch calls, and with compiled operators, known to torch before its compiler sees them."""
    monkeypatch.setenv(custom_ops.VARIABLE, request.param)
    if request.param == "native":
        if not custom_ops.available():
            pytest.skip(custom_ops.problem())
        monkeypatch.setitem(bias_act.NATIVE_MIN_NUMEL, "cpu", 0)
        bias_act._native(), upfirdn2d._native()
    return request.param


def small() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    width = {"channel_base": 128, "channel_max": 16}
    G = networks.Generator(8, 0, 8, 8, 3, mapping_kwargs={"num_layers": 1}, synthesis_kwargs=width)
    return G.eval(), networks.Discriminator(0, 8, 3, **width).eval()


def results(function, module, x) -> list[torch.Tensor]:
    """Result, and the gradients of all that was used."""
    y = function(x)
    grads = torch.autograd.grad(y.square().mean(), [x, *module.parameters()], allow_unused=True)
    return [y, *(g for g in grads if g is not None)]


def inputs() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=rng).requires_grad_() for shape in ((4, 8), (4, 3, 8, 8))]


def calls(G, D) -> list:
    z, img = inputs()
    return [(lambda z: G(z, None, noise_mode="const"), G, z), (lambda img: D(img, None), D, img)]


def test_networks_are_one_graph(ops) -> None:
    for function, module, x in calls(*small()):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for ours, theirs in zip(results(compiled, module, x), results(function, module, x), strict=True):
            helpers.assert_close(ours, theirs, 2e-5, type(module).__name__)


def test_noise_is_drawn_inside_the_graph(ops) -> None:
    G, _ = small()
    with torch.no_grad():
        G.synthesis.b8.conv0.noise_strength.fill_(1)
    compiled = torch.compile(lambda z: G(z, None), fullgraph=True, backend="aot_eager")
    z = inputs()[0]
    assert not torch.equal(compiled(z), compiled(z))


def test_networks_export(ops) -> None:
    for function, module, x in calls(*small()):
        options = {"noise_mode": "const"} if isinstance(module, networks.Generator) else {}
        program = torch.export.export(module, (x.detach(), None), options)
        with torch.no_grad():
            helpers.assert_close(
                program.module()(x.detach(), None, **options), function(x), 2e-5, type(module).__name__
            )


def test_networks_in_distributed_data_parallel(ops, tmp_path) -> None:
    """One process: the wrapper's hooks and buckets, the gradients of the networks alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for function, module, x in calls(*small()):
            expected = results(function, module, x)[2:]
            wrapped = torch.nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
            options = {"noise_mode": "const"} if isinstance(module, networks.Generator) else {}
            wrapped(x, None, **options).square().mean().backward()
            actual = [p.grad for p in module.parameters() if p.grad is not None]
            for ours, theirs in zip(actual, expected, strict=True):
                helpers.assert_close(ours, theirs, 1e-6, type(module).__name__)
    finally:
        torch.distributed.destroy_process_group()

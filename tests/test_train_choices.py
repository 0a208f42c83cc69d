"""`--train`: what is frozen stays to the last bit, what learns moves, and adapters merge exactly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stylegan_rooted.cli import main
from training import adapters, network_file, network_pickle, weights_file
from training.config import OptimConfig, parse_train
from training.networks import Discriminator, Generator
from training.trainable import generator_parameters

SIZES = {"c_dim": 0, "img_resolution": 16, "img_channels": 3}
WIDTH = {"channel_base": 128, "channel_max": 16}
OPTIONS = ("--kimg", 0.024, "--batch", 4, "--tick", 1, "--metrics", "none", "--device", "cpu", "--g-reg-interval", 2)


def run(*argv) -> int:
    try:
        main([str(a) for a in argv])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[Path, Path]:
    """(data, network); G and G_ema differ."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "data").mkdir()
    for i in range(8):
        pixels = np.random.RandomState(i).randint(0, 256, [16, 16, 3], dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "data" / f"{i}.png")
    torch.manual_seed(0)
    nets = [
        Generator(z_dim=8, w_dim=8, mapping_kwargs={"num_layers": 2}, synthesis_kwargs=dict(WIDTH), **SIZES)
        for _ in range(2)
    ]
    path = folder / "start.pkl"
    network_pickle.save(path, G=nets[0], D=Discriminator(**WIDTH, **SIZES), G_ema=nets[1])
    return folder / "data", path


def trained(start, tmp_path, choice) -> Path:
    """The folder of a short run."""
    data, path = start
    argv = ("finetune", "--data", data, "--resume", path, "--outdir", tmp_path, "--train", choice, *OPTIONS)
    assert run(*argv) == 0
    return next(p for p in tmp_path.iterdir() if p.is_dir())


def changed(before: torch.nn.Module, after: torch.nn.Module) -> set[str]:
    """Names of parameters that are not equal to the last bit."""
    now = dict(after.named_parameters())
    return {name for name, value in before.named_parameters() if not torch.equal(value, now[name])}


CHOICES = {
    "all": lambda name: True,
    "freeze-mapping": lambda name: name.startswith("synthesis"),
    "freeze-synthesis:16": lambda name: name.startswith(("mapping", "synthesis.b16")),
    "freeze-mapping,freeze-synthesis:8,freezed:2": lambda name: name.startswith(("synthesis.b8", "synthesis.b16")),
    "affines": lambda name: ".affine." in name,
    "lora:2": lambda name: name.endswith(("conv0.weight", "conv1.weight", "torgb.weight")),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_frozen_parts_stay_and_the_others_learn(start, tmp_path, choice):
    folder = trained(start, tmp_path, choice)
    before = network_pickle.load(start[1])
    after = network_pickle.load(folder / "network-snapshot-000000.pkl")
    base = before.G_ema if choice.startswith("lora") else before.G
    assert changed(base, after.G) == {name for name, _ in base.named_parameters() if CHOICES[choice](name)}
    frozen_mapping = choice not in ("all", "freeze-synthesis:16")
    assert torch.equal(base.mapping.w_avg, after.G.mapping.w_avg) == frozen_mapping
    frozen_d = "b16.fromrgb.weight" not in dict(after.D.named_parameters())
    assert frozen_d == ("freezed" in choice)
    state = torch.load(sorted(folder.glob("training-state-*.pt"))[-1], weights_only=True)
    learning = [name for name, _ in base.named_parameters() if CHOICES[choice](name)]
    if choice.startswith("lora"):  # two factors a kernel, and no moments of the kernels themselves
        assert len(state["optimizers"]["G"]["adam"]["state"]) == 2 * len(learning)
    else:
        assert len(state["optimizers"]["G"]["state"]) == len(learning), "no moments of frozen parameters"


def test_adapters_merge_to_the_last_bit(start, tmp_path):
    folder = trained(start, tmp_path, "lora:2")
    snapshot = network_pickle.load(folder / "network-snapshot-000000.pkl")
    file = folder / "adapter-000000.safetensors"
    assert file.stat().st_size < 0.3 * (folder / "network-snapshot-000000.pkl").stat().st_size
    merged = tmp_path / "merged.pkl"
    assert run("surgery", start[1], merged, "--merge", file) == 0
    ours = network_pickle.load(merged).G_ema.state_dict()
    beside = network_file.load(folder / "network-snapshot-000000.safetensors").G_ema.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in beside.items())
    assert all(torch.equal(ours[name], value) for name, value in snapshot.G_ema.state_dict().items())
    assert run("surgery", merged, tmp_path / "twice.pkl", "--merge", file) == 1, "made for another base"
    # G is the base plus the factors themselves: it differs from the average, and by the same rank.
    base = network_pickle.load(start[1]).G_ema.synthesis.b16.conv1.weight.flatten(1)
    assert torch.linalg.matrix_rank(snapshot.G.synthesis.b16.conv1.weight.flatten(1) - base, rtol=1e-4) == 2


def test_adapters_go_on_exactly(start, tmp_path):
    """N steps = M steps, stop, N - M steps."""
    data, path = start
    for name, stops in (("whole", (0.032,)), ("parts", (0.016, 0.032))):
        for kimg in stops:
            argv = ("finetune", "--data", data, "--resume", path, "--outdir", tmp_path / name, "--train", "lora:2")
            assert run(*argv, *OPTIONS, "--kimg", kimg, "--aug", "noaug") == 0
    states = []
    for name in ("whole", "parts"):
        (folder,) = (tmp_path / name).iterdir()
        states.append(torch.load(sorted(folder.glob("training-state-*.pt"))[-1], weights_only=True))
    for key in ("networks", "optimizers"):
        assert_equal(states[0][key], states[1][key])


def assert_equal(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_gradients_of_the_factors_are_the_chain_rule():
    """Against autograd through base + up @ down, in float64, for a loss that is not linear in the kernels."""
    torch.manual_seed(0)
    G = Generator(z_dim=8, w_dim=8, synthesis_kwargs=dict(WIDTH), mapping_kwargs={"num_layers": 2}, **SIZES)
    G.double().requires_grad_(False)
    seen = []

    class Recorder:
        def __init__(self, factors):
            self.factors = factors

        def step(self):
            seen.extend(factor.grad.clone() for factor in self.factors)

    low = adapters.LowRankAdapters(G, G, rank=3, adam=Recorder, seed=0)
    for pair in low._factors.values():
        for factor in pair:
            factor.data = torch.randn_like(factor, dtype=torch.float64)
    expected = []
    for name, layer in adapters.modulated_convolutions(G).items():
        up, down = (factor.clone().requires_grad_(True) for factor in low._factors[name])
        kernel = adapters.kernel(low._base[name], up, down)
        expected += torch.autograd.grad(kernel.sin().sum(), [up, down])
        layer.weight.grad = kernel.detach().cos()
    low.step()
    assert len(seen) == len(expected) == 2 * 8
    for ours, theirs in zip(seen, expected):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


WRONG = {
    "hinge": "unknown",
    "lora": "not complete",
    "lora:0": "at least 1",
    "affines:3": "says too much",
    "freezed:x": "not complete",
    "lora:4,affines": "exclude each other",
    "all,freeze-mapping": "exclude each other",
    "affines,affines": "twice",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_words_are_named(text):
    with pytest.raises(ValueError, match=f"--train {text}.*{WRONG[text]}"):
        OptimConfig(train=text)


def test_choices_that_cannot_be():
    with pytest.raises(ValueError, match="differ"):
        OptimConfig(train="freezed:3", freezed=2)
    G = Generator(z_dim=8, w_dim=8, synthesis_kwargs=dict(WIDTH), **SIZES)
    with pytest.raises(ValueError, match="highest block is 16 pixels.*at most 16"):
        generator_parameters(G, parse_train("freeze-synthesis:32"))
    assert generator_parameters(G, parse_train("freeze-synthesis:16"))


def test_wrong_uses_end_in_one_line(start, tmp_path, capsys):
    data, path = start
    for argv, code in (
        (("--resume", path, "--train", "lora"), 2),
        (("--resume", "none", "--train", "affines"), 1),
        (("--resume", path, "--train", "freeze-mapping,freeze-synthesis:32"), 1),
        (("--resume", path, "--train", "freeze-synthesis:512"), 1),
        (("--resume", path, "--train", "freeze-synthesis:32", "--dry-run"), 1),
    ):
        assert run("finetune", "--data", data, "--outdir", tmp_path / "runs", *argv, *OPTIONS) == code
        err = capsys.readouterr().err
        assert [line for line in err.splitlines() if "--train" in line] and "Traceback" not in err
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())
    broken = tmp_path / "adapter.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="adapter.safetensors"):
        weights_file.read_adapter(broken)
    weights_file.save(tmp_path / "net.safetensors", G_ema=network_pickle.load(path).G_ema)
    with pytest.raises(ValueError, match="no adapter"):
        weights_file.read_adapter(tmp_path / "net.safetensors")

"""Surgery: the new networks say what the old ones said, up to rounding, wherever the rules call it exact."""

import json
import math

import pytest
import torch
from PIL import Image

from stylegan_rooted import surgery
from stylegan_rooted.cli import main
from stylegan_rooted.surgery_rules import (
    Networks,
    channels,
    classes,
    map_depth,
    new_discriminator,
    num_fp16_res,
    resolution,
)
from torch_utils.ops import upfirdn2d
from training import network_pickle
from training.networks import Discriminator, Generator

EXACT = 2e-5  # largest difference of images in [-1, 1], and of logits relative to their spread: float32 rounding
WIDTH = {"channel_base": 256, "channel_max": 32, "conv_clamp": 256}


def networks(
    *, c_dim=0, img_channels=3, architecture="resnet", width=WIDTH, mapping="lrelu", synthesis="skip"
) -> Networks:
    """Small networks with all biases and noise strengths away from zero; images of about [-1, 1]."""
    torch.manual_seed(0)
    sizes = {"c_dim": c_dim, "img_resolution": 16, "img_channels": img_channels}
    mapping_kwargs = {"num_layers": 2, "activation": mapping}
    synthesis_kwargs = {**width, "architecture": synthesis}
    G = Generator(z_dim=8, w_dim=8, mapping_kwargs=mapping_kwargs, synthesis_kwargs=synthesis_kwargs, **sizes)
    D = Discriminator(architecture=architecture, **width, **sizes)
    with torch.no_grad():
        for module in (G, D):
            for name, parameter in module.named_parameters():
                if name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                if name.endswith("noise_strength"):
                    parameter.fill_(0.1)
                if "torgb" in name:
                    parameter.mul_(0.2)
    G, D = G.eval().requires_grad_(False), D.eval().requires_grad_(False)
    return Networks(G, D, G)


EXACT_CHANGES = {
    "double": (3, resolution(32)),
    "grey": (3, channels(1)),
    "colour": (1, channels(3)),
    "with alpha": (3, channels(4)),
    "grey with alpha": (1, channels(4)),
    "without alpha": (4, channels(3)),
    "grey without alpha": (4, channels(1)),
    "more classes": (3, classes(5)),
    "float16": (3, num_fp16_res(2)),
}


@pytest.mark.parametrize("architecture", ["resnet", "skip", "orig"])
@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("name", EXACT_CHANGES)
def test_exact_changes(name, c_dim, architecture):
    img_channels, rule = EXACT_CHANGES[name]
    old = networks(c_dim=c_dim, img_channels=img_channels, architecture=architecture)
    numbers = {key: value.clone() for key, value in old.D.state_dict().items()}
    new, (step,) = surgery.operate(old, [rule])
    assert step.image_error < EXACT
    # A discriminator that looks at every resolution sees a dropped alpha through its filter, which darkens the border.
    if not (architecture == "skip" and "without alpha" in name):
        assert step.logit_error < EXACT
    assert all(torch.equal(numbers[key], value) for key, value in old.D.state_dict().items()), "the old one stays"


@pytest.mark.parametrize("architecture", ["resnet", "skip", "orig"])
def test_a_class_becomes_the_whole_network(architecture):
    old = networks(c_dim=3, architecture=architecture)
    new, (step,) = surgery.operate(old, [classes(0, keep_class=2)])
    assert step.image_error < EXACT and step.logit_error < EXACT
    z = torch.randn([2000, 8], generator=torch.Generator().manual_seed(1))
    mean = new.G_ema.mapping(z, None)[:, 0].mean(dim=0)
    assert (mean - new.G_ema.mapping.w_avg).norm() < 0.1 * mean.norm(), "the average is that of this class"


def test_classes_are_mapped_and_new_ones_differ():
    old = networks(c_dim=3)
    new, (step,) = surgery.operate(old, [classes([2, None, 0, 2])])
    assert step.image_error < EXACT and step.logit_error < EXACT
    z, eye = torch.randn([1, 8]), torch.eye(4)
    made = [new.G_ema(z, eye[i : i + 1], noise_mode="const") for i in range(4)]
    assert torch.equal(made[0], made[3])
    assert all((made[1] - made[i]).abs().max() > 1e-3 for i in (0, 2))


def test_unconditional_networks_learn_classes_after_surgery():
    """The label has no effect at first, but gradients reach it, and differ between the rows of the last layer."""
    new, _ = surgery.operate(networks(), [classes(3)])
    c = torch.eye(3).repeat(4, 1)[:8]
    new.G.requires_grad_(True), new.D.requires_grad_(True)
    img = new.G(torch.randn([8, 8]), c)
    (new.D(img, c) * torch.randn([8, 1])).sum().backward()
    first, last = new.G.mapping.fc0.weight.grad, new.D.mapping.fc7.weight.grad
    assert first[:, 8:].abs().max() > 0
    assert (last - last[0]).abs().max() > 0
    assert new.D.mapping.embed.weight.grad.abs().max() == 0, "behind a layer that starts at zero; later it moves"


def test_doubled_image_is_the_upsampled_one_and_the_new_block_learns():
    old = networks()
    new, _ = surgery.operate(old, [resolution(32)])
    z = torch.randn([4, 8])
    before, after = (net.G_ema(z, None, noise_mode="const") for net in (old, new))
    assert torch.equal(after, upfirdn2d.upsample2d(before, old.G_ema.synthesis.b16.resample_filter))
    new.G.requires_grad_(True)
    new.G(z, None).square().sum().backward()
    assert new.G.synthesis.b32.torgb.weight.grad.abs().max() > 0


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_halved_images_are_fitted_to_the_old_ones(architecture):
    """On latents that were not fitted to: nearer than what is left without the top block, and than any constant."""
    old = networks(synthesis=architecture)
    taps = old.G_ema.synthesis.b16.resample_filter
    kwargs = {**old.G_ema.init_kwargs, "img_resolution": 8}
    dropped = Generator(**kwargs).eval().requires_grad_(False)
    shapes = {key: value.shape for key, value in dropped.state_dict().items()}
    kept = {key: value for key, value in old.G_ema.state_dict().items() if shapes.get(key) == value.shape}
    dropped.load_state_dict(kept, strict=False)
    new, _ = surgery.operate(old, [resolution(8)])
    z = torch.randn([64, 8], generator=torch.Generator().manual_seed(3))
    wanted = upfirdn2d.downsample2d(old.G_ema(z, None, noise_mode="const"), taps)
    errors = [(G(z, None, noise_mode="const") - wanted).square().mean() for G in (new.G_ema, dropped)]
    assert errors[0] < min(0.5 * errors[1], 0.9 * (wanted - wanted.mean(dim=0)).square().mean())


def test_halving_is_measured_and_the_discriminator_stays_of_one_mind():
    old = networks()
    new, (step,) = surgery.operate(old, [resolution(8)])
    assert new.G_ema.img_resolution == new.D.img_resolution == 8
    assert step.image_error > EXACT and step.logit_error > EXACT and math.isfinite(step.logit_error)
    z = torch.randn([64, 8])
    small = new.G_ema(z, None, noise_mode="const")
    large = upfirdn2d.upsample2d(small, old.G_ema.synthesis.b16.resample_filter)
    scores = torch.stack([new.D(small, None)[:, 0], old.D(large, None)[:, 0]])
    fresh, _ = surgery.operate(new, [new_discriminator()])
    chance = torch.stack([fresh.D(small, None)[:, 0], scores[1]])
    assert torch.corrcoef(scores)[0, 1] > max(0.5, torch.corrcoef(chance)[0, 1].abs())


@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_mapping_depth_where_it_is_exact(activation):
    new, (step,) = surgery.operate(networks(mapping=activation), [map_depth(4)])
    assert new.G_ema.mapping.num_layers == 4 and step.image_error < EXACT


def test_everything_at_once():
    old = networks()
    rules = surgery.plan(old, num_channels=1, num_classes=3, side=64, fp16=1)
    new, steps = surgery.operate(old, rules)
    assert [step.what for step in steps] == [
        "RGB to grey", "unconditional to 3 classes", "16 to 32 pixels", "32 to 64 pixels",
        "float16 in the 1 highest resolutions",
    ]  # fmt: skip
    assert max(step.image_error for step in steps) < EXACT
    assert (new.D.img_channels, new.D.img_resolution, new.D.c_dim) == (1, 64, 3)


def test_discriminator_fresh_or_from_another():
    old = networks()
    missing = Networks(old.G, None, old.G_ema)
    (rule,) = surgery.plan(missing)
    new, (step,) = surgery.operate(missing, [rule])
    assert new.D(torch.zeros([4, 3, 16, 16]), None).shape == (4, 1) and step.logit_error is None
    warm, (step,) = surgery.operate(missing, [new_discriminator(start=old.D)])
    assert torch.equal(warm.D.b4.conv.weight, old.D.b4.conv.weight) and "from the given one" in step.rule


REFUSED = {
    "--channels 2": lambda old: surgery.plan(old, num_channels=2),
    "not a power of two": lambda old: surgery.plan(old, side=24),
    "has that resolution": lambda old: surgery.plan(old, side=16),
    "nothing to change": lambda old: surgery.plan(old),
    "exclude each other": lambda old: surgery.plan(old, num_classes=2, class_map=[0, 0]),
    "is for --classes 0": lambda old: surgery.plan(old, keep_class=0, num_classes=3),
    "unconditional already": lambda old: surgery.operate(old, [classes(0, keep_class=0)]),
    "at least 2 classes": lambda old: surgery.plan(old, num_classes=1),
    "names class 3": lambda old: surgery.operate(networks(c_dim=3), [classes([0, 3])]),
    "needs --keep-class, the class that remains: 0 to 2": lambda old: surgery.operate(networks(c_dim=3), [classes(0)]),
    "without changing the images": lambda old: surgery.operate(old, [map_depth(3)]),
    "has 3 resolutions": lambda old: surgery.operate(old, [num_fp16_res(9)]),
    "within 8 and 1024": lambda old: surgery.operate(old, [resolution(8), resolution(4)]),
    "6 or more are needed": lambda old: surgery.operate(
        networks(width={"channel_base": 64, "channel_max": 32}), [resolution(32)]),
    "write the old class": lambda old: surgery.parse_class_map("0,x"),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_refused_in_one_line(words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as refusal:
        REFUSED[words](networks())
    assert str(refusal.value).isprintable()


def save(path, nets):
    network_pickle.save(path, G=nets.G, D=nets.D, G_ema=nets.G_ema)


def run(*argv) -> int:
    try:
        main([str(a) for a in argv])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_command(tmp_path, capsys):
    source, dest, grid = tmp_path / "a.pkl", tmp_path / "b.pkl", tmp_path / "grid.png"
    save(source, networks())
    code = run("surgery", source, dest, "--resolution", 32, "--channels", 4, "--grid", grid, "--json")
    out, err = capsys.readouterr()
    assert code == 0 and "RGB to RGBA" in err
    steps = json.loads(out)
    assert [step["what"] for step in steps] == ["RGB to RGBA", "16 to 32 pixels"] and steps[1]["image_error"] == 0
    loaded = network_pickle.load(dest)
    assert loaded.G_ema.img_channels == 4 and loaded.D.img_resolution == 32
    with Image.open(grid) as image:
        assert image.mode == "RGB" and image.height == 2 * 32


def test_command_wrong_uses_leave_nothing(tmp_path, capsys):
    source = tmp_path / "a.pkl"
    save(source, networks())
    for argv, code in (
        (("--resolution", 24), 2), (("--classes", 0), 2), (("--map-classes", "a"), 2), (("--map-depth", 0), 2), ((), 1),
        (("--new-d", "--d-from", source), 2),
        (("--map-depth", 3), 1), (("--channels", 2), 2), (("--num-fp16-res", 9), 1), (("--resolution", 16), 1),
    ):  # fmt: skip
        assert run("surgery", source, tmp_path / "b.pkl", *argv) == code
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "Traceback" not in err
    assert run("surgery", source, tmp_path / "b.png", "--resolution", 32) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pkl"]


def test_a_network_with_alpha_fine_tunes_on_transparent_images(tmp_path):
    folder, data, source, dest = tmp_path / "in", tmp_path / "data.zip", tmp_path / "a.pkl", tmp_path / "b.pkl"
    folder.mkdir()
    for i in range(4):
        image = Image.new("RGBA", (20, 16), (250, 10 * i, 0, 0))
        image.paste((0, 0, 200, 255), (4, 4, 12, 12))
        image.save(folder / f"{i}.png")
    save(source, networks())
    assert run("dataset", "build", folder, data, "--resolution", 16, "--rgba") == 0
    assert run("surgery", source, dest, "--channels", 4) == 0
    options = ("--kimg", 0.016, "--batch", 8, "--tick", 1, "--metrics", "none", "--aug", "fixed", "--p", 0.5)
    assert run("finetune", "--data", data, "--resume", dest, "--outdir", tmp_path / "runs", *options) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    with Image.open(folder / "reals.png") as image:
        assert image.mode == "RGBA" and image.getextrema()[3] == (0, 255)
    network = folder / "network-snapshot-000000.pkl"
    assert run("generate", "--network", network, "--seeds", "0", "--outdir", tmp_path / "out") == 0
    with Image.open(tmp_path / "out" / "seed0000.png") as image:
        assert image.mode == "RGBA" and image.size == (16, 16)
    assert run("finetune", "--data", data, "--resume", source, "--outdir", tmp_path / "runs", *options) == 1


RESULTS = {  # what the file is like before: channels, classes; what is asked for; what it is like then, with its side
    "double": (3, 0, ("--resolution", 32), (3, 0, 32)),
    "halve": (3, 0, ("--resolution", 8), (3, 0, 8)),
    "grey": (3, 0, ("--channels", 1), (1, 0, 16)),
    "colour": (1, 0, ("--channels", 3), (3, 0, 16)),
    "alpha": (3, 0, ("--channels", 4), (4, 0, 16)),
    "add classes": (3, 0, ("--classes", 3), (3, 3, 16)),
    "map classes": (3, 3, ("--map-classes", "2,new"), (3, 2, 16)),
    "drop classes": (3, 3, ("--classes", 0, "--keep-class", 1), (3, 0, 16)),
    "float16": (3, 0, ("--num-fp16-res", 2), (3, 0, 16)),
    "mapping depth": (3, 0, ("--map-depth", 4), (3, 0, 16)),
    "fresh discriminator": (3, 0, ("--new-d",), (3, 0, 16)),
    "warm discriminator": (3, 0, ("--d-from", "source"), (3, 0, 16)),
}


@pytest.mark.parametrize("name", RESULTS)
def test_finetune_from_every_result(name, tmp_path):
    """Through the command line: surgery, then two steps."""
    img_channels, c_dim, options, (new_channels, num_classes, side) = RESULTS[name]
    source, dest, data = tmp_path / "a.pkl", tmp_path / "b.pkl", tmp_path / "data"
    activation = "relu" if name == "mapping depth" else "lrelu"
    save(source, networks(c_dim=c_dim, img_channels=img_channels, mapping=activation))
    assert run("surgery", source, dest, *(source if option == "source" else option for option in options)) == 0
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[new_channels]
    data.mkdir()
    for i in range(4):
        image = Image.effect_noise((side, side), 90)
        if mode == "RGBA":
            image.putalpha(Image.effect_noise((side, side), 90))
        image.convert(mode).save(data / f"{i}.png")
    labels = [[f"{i}.png", i % num_classes] for i in range(4)] if num_classes else None
    (data / "dataset.json").write_text(json.dumps({"labels": labels}))
    if mode == "RGBA":  # a folder's images are laid on white
        data, folder = tmp_path / "data.zip", data
        assert run("dataset", "build", folder, data, "--resolution", side, "--rgba") == 0
    argv = ("finetune", "--data", data, "--resume", dest, "--outdir", tmp_path / "runs", "--cond", bool(num_classes))
    assert run(*argv, "--kimg", 0.008, "--batch", 4, "--tick", 1, "--metrics", "none", "--grid", "2x2") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    before = network_pickle.load(dest)
    after = network_pickle.load(folder / "network-snapshot-000000.pkl")
    assert (after.G.img_channels, after.G.c_dim, after.G.img_resolution) == (new_channels, num_classes, side)
    for one, two in ((before.G, after.G), (before.D, after.D)):
        numbers = dict(two.named_parameters())
        assert all(torch.isfinite(value).all() for value in numbers.values())
        assert any(not torch.equal(value, numbers[key]) for key, value in one.named_parameters())

"""uint8 <-> float, odd formats, grids, PNG files."""

import os

import numpy as np
import odd_files
import pytest
import torch
from PIL import Image

from torch_utils import images


def test_round_trip_is_exact():
    u8 = torch.arange(256, dtype=torch.uint8)
    x = images.from_uint8(u8)
    assert x.dtype == torch.float32 and x[0] == -1 and x[-1] == 1
    assert torch.equal(images.to_uint8(x), u8)
    assert torch.equal(images.to_uint8(x, rounding="truncate"), u8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_round_is_half_to_even_and_truncate_is_127_5_x_plus_128(dtype):
    x = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0], dtype=dtype)
    assert images.to_uint8(x).tolist() == [0, 0, 128, 255, 255]
    # 0.5, 1.5, 2.5 steps above black: 0, 2, 2 when halves go to even; 1, 2, 3 when a half is added and cut.
    steps = torch.tensor([0.5, 1.5, 2.5])
    assert images.to_uint8(steps, range=(0, 255)).tolist() == [0, 2, 2]
    assert images.to_uint8(steps, range=(0, 255), rounding="truncate").tolist() == [1, 2, 3]


def test_truncate_against_the_formula():
    x = torch.linspace(-1.3, 1.3, 4001)
    assert torch.equal(images.to_uint8(x, rounding="truncate"), (127.5 * x + 128).clamp(0, 255).to(torch.uint8))
    expected = np.rint((x.numpy() + np.float32(1)) * np.float32(127.5)).clip(0, 255).astype(np.uint8)
    assert torch.equal(images.to_uint8(x), torch.from_numpy(expected))


def test_not_finite_values_are_defined():
    x = torch.tensor([float("nan"), float("inf"), float("-inf")])
    for rounding in ("round", "truncate"):
        assert images.to_uint8(x, rounding=rounding).tolist() == [0, 255, 0]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="rounding"):
        images.to_uint8(torch.zeros(1), rounding="floor")
    with pytest.raises(ValueError, match="greater"):
        images.to_uint8(torch.zeros(1), range=(1, -1))
    with pytest.raises(ValueError, match="uint8"):
        images.from_uint8(torch.zeros(1))
    with pytest.raises(ValueError, match="to_uint8"):
        images.to_pil(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"\[2, 4, 4\]"):
        images.to_pil(np.zeros((2, 4, 4), np.uint8))


def test_odd_formats_are_converted(tmp_path):
    expected = odd_files.write_all(tmp_path)
    assert len(expected) > 15
    for name, colour in expected.items():
        with images.open_image(tmp_path / name) as image:
            channels = images.num_channels(image)
            out = images.to_grey_or_rgb(image)
        assert out.mode == {1: "L", 3: "RGB"}[channels], name
        pixel = out.convert("RGB").getpixel((1, 1))
        assert np.abs(np.subtract(pixel, colour)).max() <= 1, (name, pixel, colour)
        assert images.from_pil(out).shape == (channels, odd_files.SIDE, odd_files.SIDE)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    out = images.to_grey_or_rgb(images.open_image(tmp_path / "ramp.png"))
    assert np.array_equal(np.asarray(out).ravel(), np.arange(256))


def test_background_colour_shows_through():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert images.to_grey_or_rgb(clear, background=(1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)
    assert images.to_grey_or_rgb(Image.new("LA", (4, 4), (9, 0)), background=(1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)


def test_corrupt_files_are_refused(tmp_path):
    for name in odd_files.write_corrupt(tmp_path):
        with pytest.raises(ValueError) as err:
            images.to_grey_or_rgb(images.open_image((tmp_path / name).read_bytes()))
        assert "\n" not in str(err.value) and str(err.value), name


def test_extensions():
    extensions = images.readable_extensions()
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".ppm"} <= extensions
    assert not {".pdf", ".eps", ".json", ".mpg"} & extensions


def test_grid_is_row_major(tmp_path):
    imgs = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 3, 2, 4) * 10
    images.save_grid(tmp_path / "grid.png", imgs, grid_size=(3, 2))
    with Image.open(tmp_path / "grid.png") as out:
        assert out.mode == "RGB" and out.size == (12, 4)
        assert np.asarray(out)[::2, ::4, 0].tolist() == [[0, 10, 20], [30, 40, 50]]
    images.save_grid(tmp_path / "grey.png", imgs[:, :1].numpy(), grid_size=(2, 3))
    with Image.open(tmp_path / "grey.png") as out:
        assert out.mode == "L" and out.size == (8, 6)


def test_grid_labels_add_margins_and_leave_pixels_alone():
    imgs = torch.full((6, 1, 40, 40), 100, dtype=torch.uint8)
    plain = images.draw_grid(imgs, (3, 2))
    out = images.draw_grid(imgs, (3, 2), labels=images.GridLabels(rows=["seed 1", "seed 2"], cols=["a", "b", "c"]))
    left, top = out.width - plain.width, out.height - plain.height
    assert left > 0 and top > 0
    assert np.array_equal(np.asarray(out)[top:, left:, 0], np.asarray(plain))
    assert np.asarray(out)[:top].min() < 128 and np.asarray(out)[top:, :left].min() < 128  # something is written there
    with pytest.raises(ValueError, match="2 column labels for 3 columns"):
        images.draw_grid(imgs, (3, 2), labels=(None, ["a", "b"]))


def test_grid_of_wrong_size():
    with pytest.raises(ValueError, match="3 columns and 2 rows"):
        images.draw_grid(torch.zeros(5, 3, 4, 4, dtype=torch.uint8), (3, 2))


def test_png_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "a.png"
    img = np.random.RandomState(0).randint(0, 256, (3, 8, 8), dtype=np.uint8)
    images.save_png(target, img)
    with Image.open(target) as out:
        assert np.array_equal(images.from_pil(out), img)
    before = target.read_bytes()

    def disk_full(self, file, **options):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        images.save_png(target, img * 0)
    assert target.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_opaque_lays_transparent_pixels_on_the_background():
    rgb = torch.tensor([200, 100, 0], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 1, 3)
    alpha = torch.tensor([0, 51, 255], dtype=torch.uint8)[None, None, None]
    mixed = images.opaque(torch.cat([rgb, alpha], dim=1))
    assert mixed[0, :, 0].t().tolist() == [[255, 255, 255], [244, 224, 204], [200, 100, 0]]
    assert images.opaque(rgb) is rgb

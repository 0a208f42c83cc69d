"""Image files in the formats that people really have, each with the value that its pixels must come out as."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 16


def write_all(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Write one file per odd format into `folder`; returns the RGB colour that the top left corner must have."""
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}

    def put(name: str, image: Image.Image, colour: tuple[int, int, int], **options) -> None:
        image.save(folder / name, **options)
        expected[name] = colour

    red = Image.new("RGB", (SIDE, SIDE), (200, 10, 30))
    put("plain.png", red, (200, 10, 30))
    palette = Image.new("P", (SIDE, SIDE), 3)
    palette.putpalette([0, 0, 0, 1, 1, 1, 2, 2, 2, 200, 10, 30] + [9] * 3 * 252)
    put("palette.png", palette, (200, 10, 30))
    put("palette_transparent.png", palette, (255, 255, 255), transparency=3)
    put("rgba_half.png", Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 51)), (204, 204, 204))
    put("rgba_clear.png", Image.new("RGBA", (SIDE, SIDE), (7, 8, 9, 0)), (255, 255, 255))
    put("colour_key.png", red, (255, 255, 255), transparency=(200, 10, 30))
    put("grey_alpha.png", Image.new("LA", (SIDE, SIDE), (0, 102)), (153, 153, 153))
    put("grey.png", Image.new("L", (SIDE, SIDE), 77), (77, 77, 77))
    put("bilevel.png", Image.new("1", (SIDE, SIDE), 1), (255, 255, 255))
    put("cmyk.tif", Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), (255, 0, 0))
    put("cmyk.jpg", Image.new("CMYK", (SIDE, SIDE), (0, 0, 0, 0)), (255, 255, 255), quality=100)
    grey16 = Image.fromarray(np.full((SIDE, SIDE), 200 * 257, np.uint16))
    put("grey16.png", grey16, (200, 200, 200))
    put("grey16.tif", grey16, (200, 200, 200))
    write_rgb16(folder / "rgb16.png", (200, 10, 30))
    expected["rgb16.png"] = (200, 10, 30)
    put("animated.gif", palette, (200, 10, 30), save_all=True, append_images=[palette.transpose(0)])
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the bottom left corner becomes the top left one
    turned = Image.new("RGB", (SIDE, SIDE), (0, 0, 255))
    turned.paste((255, 255, 0), (0, SIDE // 2, SIDE // 2, SIDE))
    put("exif_turned.png", turned, (255, 255, 0), exif=exif)
    put("lossless.webp", red, (200, 10, 30), lossless=True)
    return expected


def write_rgb16(path: Path, colour: tuple[int, int, int]) -> None:
    """A PNG with 16 bits per channel, which Pillow itself can't write."""
    rows = (b"\0" + b"".join(struct.pack(">H", v * 257) for v in colour) * SIDE) * SIDE

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_corrupt(folder: Path) -> list[str]:
    """Files that look like images and are none; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(0).randint(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    data = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    (folder / "bitflip.png").write_bytes(bytes(flipped))
    (folder / "text.jpg").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n")
    Image.fromarray(np.ones((SIDE, SIDE), np.float32)).save(folder / "float.tif")
    return ["bitflip.png", "cut.png", "empty.png", "float.tif", "postscript.png", "text.jpg"]


def write_noise(folder: Path, num: int, *, side: int = SIDE, mode: str = "RGB", seed: int = 0) -> np.ndarray:
    """`num` random PNGs named 000.png … ; returns their pixels [N, C, H, W]."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (num, side, side) if mode == "L" else (num, side, side, 3)
    pixels = np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)
    for i, array in enumerate(pixels):
        Image.fromarray(array).save(folder / f"{i:03d}.png")
    return pixels[:, None] if mode == "L" else pixels.transpose(0, 3, 1, 2)

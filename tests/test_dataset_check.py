"""`dataset check`: a clean set has no findings, and each planted defect is found, by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stylegan_rooted import dataset_check, report_data
from stylegan_rooted.cli import main

SIDE = 64


def picture(seed: int, size=(SIDE, SIDE), grey=False) -> Image.Image:
    """Coloured shapes over fine noise: detailed, left and right alike on average, unlike the others."""
    random = np.random.RandomState(seed)
    image = Image.new("RGB", size)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = random.rand(2) * size
        radius = 4 + random.rand() * min(size) / 3
        colour = tuple(int(v) for v in random.randint(0, 256, 3))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    pixels = np.asarray(image).astype(np.int16) + random.randint(-40, 41, [size[1], size[0], 3])
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image.convert("L").convert("RGB") if grey else image


@pytest.fixture
def clean(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(40):
        picture(i).save(folder / f"{i:02d}.png")
    return folder


def codes(path, **options) -> dict[str, list[str]]:
    return {finding.code: finding.files for finding in dataset_check.check(str(path), **options).findings}


def run(*argv) -> int:
    try:
        main([str(a) for a in argv])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_a_clean_set_has_no_findings(clean, capsys):
    assert codes(clean, resolution=SIDE) == {}
    assert run("dataset", "check", clean, "--resolution", SIDE) == 0
    assert "40 of 40 files can be used; mirror looks safe" in capsys.readouterr().err


def test_planted_defects_are_all_found(clean):
    """Eleven planted files among forty good images."""
    (clean / "a-broken.png").write_bytes((clean / "00.png").read_bytes()[:200])
    (clean / "b-text.txt").write_text("hello")
    picture(1).save(clean / "c-copy.png")
    picture(2).resize((100, 100), 3).save(clean / "d-near.jpg", quality=60)
    picture(101, (20, 20)).save(clean / "e-tiny.png")
    picture(102, (16, 16)).resize((SIDE, SIDE), 3).save(clean / "f-enlarged.png")
    picture(103, grey=True).save(clean / "g-grey.png")
    framed = picture(104)
    ImageDraw.Draw(framed).rectangle((0, 0, SIDE, 7), fill="black")
    ImageDraw.Draw(framed).rectangle((0, SIDE - 8, SIDE, SIDE), fill="black")
    framed.save(clean / "h-letterbox.png")
    picture(105, (SIDE * 3, SIDE)).save(clean / "i-wide.png")
    picture(106).convert("CMYK").save(clean / "j-cmyk.jpg")
    clear = picture(107).convert("RGBA")
    clear.putalpha(100)
    clear.save(clean / "k-clear.png")
    found = codes(clean, resolution=SIDE)
    assert set(found["unreadable"]) == {"b-text.txt", "a-broken.png"}
    assert set(found["duplicate"]) == {"01.png", "c-copy.png"}
    assert set(found["near-duplicate"]) == {"02.png", "d-near.jpg"}
    assert found["too-small"] == ["e-tiny.png"]
    assert found["enlarged"] == ["f-enlarged.png"]
    assert found["grey-among-colour"] == ["g-grey.png"]
    assert found["border"] == ["h-letterbox.png"]
    assert found["not-square"] == ["i-wide.png"]
    assert {"j-cmyk.jpg", "k-clear.png"} <= set(found["mixed-modes"])
    assert found["transparent"] == ["k-clear.png"]
    assert "mixed-sizes" in found
    assert "asymmetric" not in found and "class-balance" not in found


def test_enlarged_pixels_blanks_and_much_smaller_files_are_found(clean):
    """Nearest-neighbour enlargement by whole and broken factors, one colour only, a small file among larger ones."""
    picture(201, (16, 16)).resize((SIDE, SIDE), 0).save(clean / "four.png")
    picture(202, (24, 24)).resize((SIDE, SIDE), 0).save(clean / "broken.png")
    picture(203, (20, 20)).save(clean / "small.png")
    Image.new("RGB", (SIDE, SIDE), (90, 30, 30)).save(clean / "blank.png")
    found = codes(clean)
    assert set(found["enlarged"]) == {"four.png", "broken.png"}
    assert found["blank"] == ["blank.png"] and found["too-small"] == ["small.png"]


def flat(shape: str, colour, background="white") -> Image.Image:
    """An icon as fonts draw it: plain colours, sharp edges, much of the page empty."""
    image = Image.new("RGB", (SIDE, SIDE), background)
    draw = ImageDraw.Draw(image)
    if shape == "flag":
        draw.rectangle((0, 12, SIDE, 51), fill=colour)
        draw.rectangle((0, 26, SIDE, 38), fill="gold")
    else:
        draw.ellipse((8, 6, 55, 57), fill=colour)
        draw.ellipse((18, 20, 26, 32), fill="black")
        draw.ellipse((36, 20, 44, 32), fill="black")
        draw.line((20, 44, 40, 48), fill="black", width=3)
    return image


def test_flat_graphics_are_no_copies_and_have_no_bars(clean):
    """The same face in other skins, flags in other colours: on a white page, and faces on a plain dark one."""
    for i, colour in enumerate(("#f7dece", "#e0bb95", "#bf8f68", "#9b643d", "#594539", "#fcd34d")):
        flat("face", colour).save(clean / f"face-{i}.png")
        flat("flag", colour).save(clean / f"flag-{i}.png")
        flat("face", colour, (20 + 30 * i, 20, 60)).save(clean / f"night-{i}.png")
    assert codes(clean) == {}
    flat("face", "#f7dece").resize((96, 96), 3).save(clean / "copy.jpg")
    assert set(codes(clean)["near-duplicate"]) == {"face-0.png", "copy.jpg"}


def test_labels_file_is_no_image(clean):
    (clean / "dataset.json").write_text(json.dumps({"labels": None}))
    check = dataset_check.check(str(clean))
    assert (check.num_files, check.num_images, check.findings) == (40, 40, [])


def test_a_slight_difference_of_the_sides_is_called_slight():
    """Many images make p small; the share says how large the difference is."""
    random = np.random.RandomState(0)
    small = (0.5 + 0.1 * random.randn(1500, 32, 32)).astype(np.float32)
    small[:, :, :16] += 0.009
    share = 0.009**2 / (0.009**2 + 2 * 0.1**2)  # of the squared differences of the sides
    measured = dataset_check._sign_test((small - small[:, :, ::-1]).reshape(1500, -1), np.random.default_rng(0))[1]
    assert measured == pytest.approx(share, rel=0.1)
    result = dataset_check.asymmetry(small)
    assert result["verdict"] == "mirror changes the images a little" and result["p_pixels"] < 0.003
    assert share / 2 < result["share"] < 0.01
    (finding,) = dataset_check._mirror(result)
    assert "a little" in finding.title and "Do not" not in finding.advice


def test_light_from_one_side_is_noticed(tmp_path):
    """Light from the left in every picture: mirroring would change what the set is."""
    for i in range(60):
        pixels = np.asarray(picture(i)).astype(np.float32)
        light = np.linspace(1.15, 0.85, SIDE)[None, :, None]
        Image.fromarray((pixels * light).clip(0, 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
    check = dataset_check.check(str(tmp_path))
    assert check.mirror["verdict"] == "mirror changes the images" and "asymmetric" in codes(tmp_path)


def test_asymmetry_test_keeps_its_level():
    """Of symmetric sets, few are called asymmetric: random signs of each picture make the two directions alike."""
    alarms = 0
    for seed in range(40):
        random = np.random.RandomState(seed)
        small = random.rand(30, 32, 32).astype(np.float32)
        small[:, :, :16] *= 0.8
        flip = random.rand(30) < 0.5
        small[flip] = small[flip, :, ::-1]
        alarms += dataset_check.asymmetry(small)["verdict"] != "mirror looks safe"
    assert alarms <= 3  # 1 % of 40 expected; more than 3 have a probability below 0.1 %


def test_class_balance_from_folders_and_labels(clean):
    for i in range(40):
        folder = clean / ("many" if i < 38 else "few")
        folder.mkdir(exist_ok=True)
        (clean / f"{i:02d}.png").rename(folder / f"{i:02d}.png")
    check = dataset_check.check(str(clean))
    assert check.classes == [("many", 38), ("few", 2)]
    assert [f.code for f in check.findings] == ["class-balance"]
    names = [f"many/{i:02d}.png" for i in range(38)] + ["few/38.png", "few/39.png"]
    (clean / "dataset.json").write_text(json.dumps({"labels": [[name, i % 2] for i, name in enumerate(names)]}))
    assert dataset_check.check(str(clean)).classes == [("class 0", 20), ("class 1", 20)]
    (clean / "dataset.json").write_text("{")
    assert "labels" in codes(clean)


def test_near_pairs_against_the_definition():
    random = np.random.RandomState(0)
    hashes = [int(v) for v in random.randint(0, 2**62, 300, dtype=np.int64)]
    hashes += [hashes[0] ^ 0b1011, hashes[1] ^ (1 << 60), hashes[2] ^ 0b11111, 0, 1]
    count = [bin(h).count("1") for h in hashes]
    expected = {
        (i, j) for i in range(len(hashes)) for j in range(i + 1, len(hashes))
        if bin(hashes[i] ^ hashes[j]).count("1") <= 4 and 4 <= count[i] and 4 <= count[j]
    }  # fmt: skip
    assert set(dataset_check.near_pairs(hashes)) == expected == {(0, 300), (1, 301)}


def test_command_json_sheet_and_exit_code(clean, tmp_path, capsys):
    picture(1).save(clean / "<b>copy&.png")
    sheet = tmp_path / "sheet.html"
    assert run("dataset", "check", clean, "--json", "--html", sheet) == 3
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert not record["clean"] and record["findings"][0]["code"] == "duplicate" and "warning: 1 images" in err
    page = sheet.read_text()
    assert "&lt;b&gt;copy&amp;.png" in page and "<b>copy" not in page and "http" not in page.replace("http-equiv", "")
    assert run("dataset", "check", tmp_path / "nothing") == 1
    assert run("dataset", "check", clean, "--html", tmp_path / "sheet.pdf") == 2
    built = ("dataset", "build", clean, tmp_path / "d.zip", "--resolution", 32, "--fit", "pad")
    assert run(*built, "--transform", "stretch") == 2
    assert "--fit pad is --transform" in capsys.readouterr().err
    assert run(*built) == 0


def test_sheet_of_a_clean_set(clean):
    assert "No findings" in report_data.render(dataset_check.check(str(clean)))

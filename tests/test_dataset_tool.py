"""Building data sets: pixels, labels, what is left out, and that nothing half-written stays."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import odd_files
import pytest
from PIL import Image

from stylegan_rooted import dataset_tool
from stylegan_rooted.build_options import BuildOptions
from stylegan_rooted.dataset_tool import build
from training.dataset import DatasetError, ImageDataset

LANCZOS, BOX = Image.Resampling.LANCZOS, Image.Resampling.BOX


@pytest.fixture
def source(tmp_path) -> Path:
    odd_files.write_noise(tmp_path / "src", 4, side=24)
    return tmp_path / "src"


@pytest.fixture
def dest(tmp_path) -> Path:
    return tmp_path / "out" / "set.zip"


def meta(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("dataset.json"))


def only_image(path: Path) -> np.ndarray:
    data = ImageDataset(path)
    assert len(data) == 1
    return data[0][0]


def test_layout_and_record(source, dest):
    result = build(source, dest, resolution=16, resize_filter="box")
    with zipfile.ZipFile(dest) as archive:
        infos = archive.infolist()
        assert [i.filename for i in infos] == [f"00000/img0000000{i}.png" for i in range(4)] + ["dataset.json"]
        assert all(i.compress_type == zipfile.ZIP_STORED and i.date_time[0] == 1980 for i in infos)
    record = meta(dest)
    assert record["labels"] is None and record["build"]["resize_filter"] == "box"
    assert record["build"]["transform"] == "center-crop" and record["build"]["resolution"] == 16
    assert (result.num_written, result.num_channels, result.num_enlarged, result.skipped) == (4, 3, 0, [])
    assert ImageDataset(dest).image_shape == (3, 16, 16)


def test_same_bytes_twice_and_from_a_zip(tmp_path, source):
    build(source, tmp_path / "a.zip", resolution=16)
    os.utime(source / "000.png", (10**9, 10**9))
    build(source, tmp_path / "b.zip", resolution=16)
    with zipfile.ZipFile(tmp_path / "src.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in reversed(sorted(os.listdir(source))):
            archive.write(source / name, name)
    build(tmp_path / "src.zip", tmp_path / "c.zip", resolution=16)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes() == (tmp_path / "c.zip").read_bytes()


def test_rebuilding_at_the_same_size_changes_no_pixel(source, dest):
    build(source, dest, resolution=32)
    build(dest, dest.with_name("again.zip"), resolution=32)
    assert ImageDataset(dest).fingerprint() == ImageDataset(dest.with_name("again.zip")).fingerprint()


@pytest.mark.parametrize("name, resample", [("lanczos", LANCZOS), ("box", BOX)])
@pytest.mark.parametrize("width, height", [(40, 23), (23, 40), (41, 24)])
def test_center_crop_takes_the_largest_centred_square(tmp_path, dest, name, resample, width, height):
    (tmp_path / "p").mkdir()
    image = Image.fromarray(np.random.RandomState(1).randint(0, 256, (height, width, 3), dtype=np.uint8))
    image.save(tmp_path / "p" / "a.png")
    build(tmp_path / "p", dest, resolution=8, resize_filter=name)
    edge, left, top = min(width, height), max(width - height, 0) // 2, max(height - width, 0) // 2
    expected = image.crop((left, top, left + edge, top + edge)).resize((8, 8), resample)
    assert np.array_equal(only_image(dest), np.asarray(expected).transpose(2, 0, 1))


def test_pad_keeps_everything_on_the_background(tmp_path, dest):
    (tmp_path / "p").mkdir()
    Image.new("RGB", (32, 16), (250, 0, 0)).save(tmp_path / "p" / "a.png")
    build(tmp_path / "p", dest, resolution=16, transform="pad", background="#102030")
    image = only_image(dest)
    assert image[:, 4:12].reshape(3, -1).T.tolist() == [[250, 0, 0]] * 128
    assert image[:, :4].reshape(3, -1).T.tolist() == [[16, 32, 48]] * 64 == image[:, 12:].reshape(3, -1).T.tolist()


def test_stretch_distorts(tmp_path, dest):
    (tmp_path / "p").mkdir()
    image = Image.new("RGB", (32, 16))
    image.paste((255, 255, 255), (16, 0, 32, 16))
    image.save(tmp_path / "p" / "a.png")
    build(tmp_path / "p", dest, resolution=16, transform="stretch", resize_filter="box")
    assert only_image(dest)[0, 0].tolist() == [0] * 8 + [255] * 8


def test_odd_formats(tmp_path, dest):
    expected = odd_files.write_all(tmp_path / "odd")
    result = build(tmp_path / "odd", dest, resolution=16)
    assert result.skipped == [] and result.num_written == len(expected)
    for (name, colour), (image, _) in zip(sorted(expected.items()), ImageDataset(dest)):
        assert np.abs(image[:, 1, 1].astype(int) - colour).max() <= 1, name


def test_alpha_lies_on_the_background(tmp_path, dest):
    (tmp_path / "p").mkdir()
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "p" / "a.png")
    build(tmp_path / "p", dest, resolution=16)
    assert only_image(dest).min() == 255
    build(tmp_path / "p", dest, resolution=16, background="black", overwrite=True)
    assert only_image(dest).max() == 0


def test_channels(tmp_path, dest):
    odd_files.write_noise(tmp_path / "g", 2, mode="L")
    assert build(tmp_path / "g", dest, resolution=16).num_channels == 1
    assert ImageDataset(dest).num_channels == 1
    assert build(tmp_path / "g", dest, resolution=16, channels="rgb", overwrite=True).num_channels == 3
    assert ImageDataset(dest).num_channels == 3
    odd_files.write_noise(tmp_path / "g" / "colour", 1)
    assert build(tmp_path / "g", dest, resolution=16, overwrite=True).num_channels == 3
    assert build(tmp_path / "g", dest, resolution=16, channels="grey", overwrite=True).num_channels == 1


def test_every_skipped_file_has_a_reason(source, dest):
    corrupt = odd_files.write_corrupt(source / "bad")
    (source / "notes.txt").write_text("x")
    (source / "README").write_text("x")
    (source / "._000.png").write_bytes(b"x")
    (source / "vanished.png").symlink_to(source / "nowhere.png")
    result = build(source, dest, resolution=16)
    names = [name for name, _ in result.skipped]
    assert names == sorted(["._000.png", "README", "notes.txt", "vanished.png", *(f"bad/{name}" for name in corrupt)])
    assert all(reason and "\n" not in reason and str(source) not in reason for _, reason in result.skipped)
    assert result.num_written == 4 == len(ImageDataset(dest)) and meta(dest)["build"]["num_skipped"] == len(names)


def test_max_images_counts_the_usable_ones(source, dest):
    (source / "000.png").write_bytes(b"junk")
    result = build(source, dest, resolution=16, max_images=2)
    assert result.num_written == 2 and [name for name, _ in result.skipped] == ["000.png"]


def test_enlarging_is_counted(source, dest):
    assert build(source, dest, resolution=64).num_enlarged == 4


# --- labels


def test_labels_from_folders(tmp_path, dest):
    for name in ("dog", "cat", "ant"):
        odd_files.write_noise(tmp_path / "src" / name / "more", 2, seed=len(name))
    (tmp_path / "src" / "ant" / "more" / "000.png").write_bytes(b"junk")
    (tmp_path / "src" / "ant" / "more" / "001.png").write_bytes(b"junk")
    result = build(tmp_path / "src", dest, resolution=16, labels="from-folders")
    assert result.classes == ["cat", "dog"] == meta(dest)["build"]["classes"]  # no class without a usable image
    data = ImageDataset(dest, use_labels=True)
    assert data.label_dim == 2 and [data.raw_label(i) for i in range(4)] == [0, 0, 1, 1]


def test_labels_from_folders_wants_folders(source, dest):
    with pytest.raises(DatasetError, match="000.png lies directly in"):
        build(source, dest, resolution=16, labels="from-folders")
    assert not dest.exists()


@pytest.mark.parametrize("values", [[3, 0, 1, 1], [[0.5, 2.0], [1.0, 1.0], [0.0, 0.0], [9.0, -1.0]]])
def test_labels_are_carried_over(source, dest, values):
    (source / "dataset.json").write_text(json.dumps({"labels": [[f"00{i}.png", v] for i, v in enumerate(values)]}))
    (source / "001.png").write_bytes(b"junk")
    build(source, dest, resolution=16)
    kept = [values[0], *values[2:]]
    assert meta(dest)["labels"] == [[f"00000/img0000000{i}.png", v] for i, v in enumerate(kept)]
    assert ImageDataset(dest, use_labels=True).get_label(0).shape == ((4,) if values[0] == 3 else (2,))
    build(source, dest, resolution=16, labels="none", overwrite=True)
    assert meta(dest)["labels"] is None


def test_labels_from_json_wants_labels(source, dest):
    with pytest.raises(DatasetError, match="--labels from-json needs one"):
        build(source, dest, resolution=16, labels="from-json")
    (source / "dataset.json").write_text(json.dumps({"labels": [["000.png", 1]]}))
    with pytest.raises(DatasetError, match="no label for 001.png"):
        build(source, dest, resolution=16)
    assert not dest.exists()


# --- refusals


@pytest.mark.parametrize("options, words", [
    ({"resolution": 48}, "--resolution 48"),
    ({"resolution": 2}, "--resolution 2"),
    ({"resolution": 0}, "--resolution 0"),
    ({"resolution": -4}, "--resolution -4"),
    ({"transform": "zoom"}, "--transform 'zoom'"),
    ({"resize_filter": "cubic"}, "--resize-filter 'cubic'"),
    ({"labels": "guess"}, "--labels 'guess'"),
    ({"channels": "cmyk"}, "--rgb/--grey/--rgba 'cmyk'"),
    ({"background": "#12345"}, "--background '#12345'"),
    ({"max_images": 0}, "--max-images 0"),
])  # fmt: skip
def test_options_check_themselves(options, words):
    with pytest.raises(ValueError) as err:
        BuildOptions(**{"resolution": 64, **options})
    assert words in str(err.value)


def test_dest_is_protected(source, dest, tmp_path):
    with pytest.raises(ValueError, match="does not end in .zip"):
        build(source, tmp_path / "folder", resolution=16)
    (tmp_path / "dir.zip").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        build(source, tmp_path / "dir.zip", resolution=16, overwrite=True)
    build(source, dest, resolution=16)
    before = dest.read_bytes()
    with pytest.raises(ValueError, match="--overwrite"):
        build(source, dest, resolution=32)
    assert dest.read_bytes() == before
    build(source, dest, resolution=32, overwrite=True)
    assert ImageDataset(dest).resolution == 32


def test_nothing_usable(tmp_path, dest):
    odd_files.write_corrupt(tmp_path / "bad")
    with pytest.raises(DatasetError, match="none of the 6 files"):
        build(tmp_path / "bad", dest, resolution=16)
    assert os.listdir(dest.parent) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_stays(source, dest, monkeypatch, error):
    build(source, dest, resolution=16)
    before = dest.read_bytes()
    calls = []
    original = dataset_tool._add

    def breaks(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error
        original(*args)

    monkeypatch.setattr(dataset_tool, "_add", breaks)
    with pytest.raises(type(error)):
        build(source, dest, resolution=32, overwrite=True)
    assert dest.read_bytes() == before and os.listdir(dest.parent) == ["set.zip"]


def test_progress_reaches_the_end(source, dest):
    seen = []
    build(source, dest, resolution=16, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    seen.clear()
    build(source, dest, resolution=16, overwrite=True, max_images=2, progress=lambda *step: seen.append(step))
    assert seen == [(1, 2), (2, 2)]


def test_zip_may_replace_itself(source, dest):
    build(source, dest, resolution=32)
    build(dest, dest, resolution=16, overwrite=True)
    assert ImageDataset(dest).image_shape == (3, 16, 16) and len(ImageDataset(dest)) == 4

"""Data sets: what is read, in which order it is drawn, and what is refused with which words."""

import itertools
import json
import multiprocessing
import os
import pickle
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import odd_files
import pytest
import torch
from PIL import Image

from training import dataset as module
from training.dataset import (
    DatasetError,
    ImageDataset,
    InfiniteSampler,
    check_fits,
    grid_indices,
    iterate_batches,
    select_subset,
)


def zip_folder(folder: Path, dest: Path, names: list[str] | None = None) -> Path:
    with zipfile.ZipFile(dest, "w") as archive:
        for name in names or sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()):
            archive.write(folder / name, name)
    return dest


def write_labels(folder: Path, labels: object) -> None:
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


@pytest.fixture
def folder(tmp_path) -> Path:
    odd_files.write_noise(tmp_path / "faces", 6)
    return tmp_path / "faces"


def refused(*args, **kwargs) -> str:
    with pytest.raises(DatasetError) as err:
        ImageDataset(*args, **kwargs).fingerprint()
    assert "\n" not in str(err.value)
    return str(err.value)


# --- goldens


@pytest.fixture(scope="module", params=["full", "copy"])
def traces(request, data_dir):
    if request.param == "copy":
        return json.loads((data_dir / "dataset_traces.json").read_text())
    return json.loads((request.getfixturevalue("goldens") / "training_traces.json").read_text())


def test_sampler_golden(traces):
    for case in traces["infinite_sampler"]:
        size, rank, replicas = case["dataset_size"], case["rank"], case["num_replicas"]
        sampler = InfiniteSampler(size, rank, replicas, case["shuffle"], case["seed"], case["window_size"])
        assert list(itertools.islice(sampler, 200)) == case["first_200"], case


def test_subset_golden(traces):
    for case in traces["subset_selection"]:
        raw, flips = select_subset(case["dataset_size"], case["max_size"], case["random_seed"], case["xflip"])
        assert raw.tolist() == case["raw_idx"] and flips.astype(int).tolist() == case["flip"]
        assert len(raw) == case["length"]


class Shape:
    """As much of a data set as `grid_indices` looks at."""

    def __init__(self, num: int, side: int, labels: list | None) -> None:
        self.image_shape, self.num, self.labels, self.has_labels = (3, side, side), num, labels, labels is not None

    def __len__(self) -> int:
        return self.num

    def raw_label(self, index: int):
        return self.labels[index]


def test_grid_golden(traces):
    for case in traces["snapshot_grid"]:
        data = Shape(case["dataset_size"], case["resolution"], case["labels"])
        size, indices = grid_indices(data, random_seed=case["random_seed"])
        assert size == (case["grid_w"], case["grid_h"]) and indices == case["indices_row_major"]


@pytest.mark.parametrize("side, size", [(32, (32, 32)), (64, (32, 32)), (128, (32, 32)), (256, (30, 16)),
                                        (512, (15, 8)), (1024, (7, 4)), (4096, (7, 4))])  # fmt: skip
def test_grid_sizes(side, size):
    assert grid_indices(Shape(5, side, None))[0] == size


def test_grid_orders_vectors_by_their_reverse():
    labels = [(1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.0, 1.0)]  # reversed: (0, 1) and (1, 0): the first kind comes first
    size, indices = grid_indices(Shape(4, 64, labels), (2, 2))
    assert size == (2, 2) and sorted(indices[:2]) == [0, 2] and sorted(indices[2:]) == [1, 3]


# --- reading


def test_folder_and_zip_are_the_same(tmp_path, folder):
    pixels = odd_files.write_noise(folder / "sub" / "deep", 3, seed=1)
    reference = ImageDataset(folder)
    assert reference.name == "faces" and len(reference) == 9 and reference.image_shape == (3, 16, 16)
    assert np.array_equal(np.stack([image for image, _ in reference])[6:], pixels)
    names = ["sub/deep/000.png", "000.png", *(f"00{i}.png" for i in range(5, 0, -1))]
    names += ["sub/deep/002.png", "sub/deep/001.png"]
    zipped = ImageDataset(zip_folder(folder, tmp_path / "other.zip", names))
    assert zipped.name == "other" and zipped.fingerprint() == reference.fingerprint()
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(reference, zipped))


def test_name_with_trailing_slash(folder):
    assert ImageDataset(f"{folder}/").name == "faces"


def test_items_are_uint8_and_the_callers_own(folder):
    data = ImageDataset(folder)
    image, label = data[0]
    assert image.dtype == np.uint8 and label.dtype == np.float32 and label.shape == (0,) == data.label_shape
    image[:] = 0
    assert data[0][0].any() and np.array_equal(data[-1][0], data[5][0])
    with pytest.raises(IndexError):
        data[6]


def test_grey_stays_grey_and_mixed_is_rgb(tmp_path):
    odd_files.write_noise(tmp_path / "g", 3, mode="L")
    assert ImageDataset(tmp_path / "g").image_shape == (1, 16, 16)
    odd_files.write_noise(tmp_path / "g" / "z", 1)
    mixed = ImageDataset(tmp_path / "g")
    assert mixed.image_shape == (3, 16, 16)
    assert np.ptp(mixed[0][0], axis=0).max() == 0 and np.ptp(mixed[3][0], axis=0).any()


def test_odd_formats_in_a_folder_used_directly(tmp_path):
    expected = odd_files.write_all(tmp_path / "odd")
    data = ImageDataset(tmp_path / "odd")
    assert data.num_channels == 3 and len(data) == len(expected)
    for (name, colour), (image, _) in zip(sorted(expected.items()), data):
        assert np.abs(image[:, 1, 1].astype(int) - colour).max() <= 1, name
    assert ImageDataset(zip_folder(tmp_path / "odd", tmp_path / "odd.zip")).fingerprint() == data.fingerprint()


def test_other_files_are_ignored(folder):
    (folder / "notes.txt").write_text("hello")
    (folder / "._000.png").write_bytes(b"\0\5\x16\7")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "000.png").write_bytes(b"junk")
    assert len(ImageDataset(folder)) == 6


def test_xflip_and_subset(folder):
    whole, flipped = ImageDataset(folder), ImageDataset(folder, xflip=True)
    assert len(flipped) == 12 and all(np.array_equal(flipped[i + 6][0], whole[i][0][:, :, ::-1]) for i in range(6))
    part = ImageDataset(folder, max_size=2, random_seed=3, xflip=True)
    kept = part.raw_indices[:2].tolist()
    assert len(part) == 4 and part.num_source_images == 6
    assert [part[i][0].tolist() for i in range(2)] == [whole[i][0].tolist() for i in kept]
    assert part.full().fingerprint() == whole.fingerprint() and len(part) == 4
    assert sum(len(batch) for batch in part.source_images(4)) == 6
    assert len(ImageDataset(folder, max_size=99)) == 6


# --- labels


def test_class_ids_are_one_hot_over_the_whole_set(folder):
    write_labels(folder, [[f"00{i}.png", label] for i, label in enumerate([0, 4, 1, 1, 0, 2])])
    data = ImageDataset(folder, use_labels=True, max_size=1)
    assert data.has_labels and data.label_dim == 5 and data.label_shape == (5,)
    assert len(data) == 1 and data.get_label(0).sum() == 1 and data.get_label(0).dtype == np.float32
    whole = ImageDataset(folder, use_labels=True, xflip=True)
    assert [int(whole[i][1].argmax()) for i in range(12)] == [0, 4, 1, 1, 0, 2] * 2
    assert ImageDataset(folder).label_dim == 0


def test_vectors_are_used_unchanged(folder):
    write_labels(folder, [[f"00{i}.png", [i, 0.5, -2]] for i in range(6)])
    data = ImageDataset(folder, use_labels=True)
    assert data.label_dim == 3 and data.get_label(4).tolist() == [4, 0.5, -2]
    write_labels(folder, [[f"00{i}.png", [3]] for i in range(6)])  # one-element vectors are features, not classes
    assert ImageDataset(folder, use_labels=True).get_label(0).tolist() == [3]


@pytest.mark.parametrize("labels, words", [
    ([["000.png", 0]], "no label for 001.png (5 of 6"),
    ([[f"00{i}.png", i - 1] for i in range(6)], "class id -1"),
    ([[f"00{i}.png", 10**12] for i in range(6)], "class id 1000000000000"),
    ([[f"00{i}.png", [0] * (i + 1)] for i in range(6)], "one length"),
    ([[f"00{i}.png", "cat"] for i in range(6)], "class ids"),
    ([[f"00{i}.png", [float("nan")]] for i in range(6)], "class ids"),
    ([[f"00{i}.png", 0.5] for i in range(6)], "class ids"),
    ([["000.png"]], "list of [relative path, label]"),
    ({"000.png": 1}, "list of [relative path, label]"),
    (None, "--labels from-folders"),
])  # fmt: skip
def test_bad_labels(folder, labels, words):
    write_labels(folder, labels)
    assert words in refused(folder, use_labels=True)


def test_missing_labels_say_how_to_make_them(folder):
    message = refused(folder, use_labels=True)
    assert "has no labels" in message and "dataset build" in message and "dataset.json" in message


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\xff", "[" * 100_000])
def test_bad_json(folder, text):
    (folder / "dataset.json").write_text(text, encoding="latin-1")
    assert "dataset.json" in refused(folder)


# --- refusals


def test_no_such_path(tmp_path):
    assert "no such folder or zip" in refused(tmp_path / "nowhere")


def test_path_is_some_other_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    assert "neither a folder nor a .zip" in refused(tmp_path / "a.png")


def test_empty_folder_and_zip(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    assert "no image files" in refused(tmp_path / "empty")
    assert "no image files" in refused(zip_folder(tmp_path / "empty", tmp_path / "empty.zip"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it is empty"),
        (b"PK but no zip", "damaged or not whole"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"7z\xbc\xaf\x27\x1c", "another archive; unpack it"),
        (b"something else", "File is not a zip file"),
    ],
)
def test_not_a_zip(data, said, tmp_path):
    (tmp_path / "a.zip").write_bytes(data)
    message = refused(tmp_path / "a.zip")
    assert "not a readable zip" in message and said in message


def test_not_square(tmp_path):
    (tmp_path / "d").mkdir()
    Image.new("RGB", (40, 70)).save(tmp_path / "d" / "tall.png")
    message = refused(tmp_path / "d")
    assert "tall.png" in message and "40x70" in message and "DEST.zip --resolution 32" in message


def test_mismatching_shapes_name_the_file(folder):
    Image.new("RGB", (20, 20)).save(folder / "003.png")
    message = refused(folder)
    assert "003.png" in message and "20x20" in message and "16x16" in message and "--resolution 16" in message


def test_explicit_resolution_must_match(folder):
    assert ImageDataset(folder, resolution=16).resolution == 16
    assert "16x16 images, wanted 32x32" in refused(folder, resolution=32)


@pytest.mark.parametrize("container", ["folder", "zip"])
def test_corrupt_images_are_named(tmp_path, container):
    names = odd_files.write_corrupt(tmp_path / "bad")
    for name in names:
        odd_files.write_noise(tmp_path / name, 2)
        (tmp_path / "bad" / name).rename(tmp_path / name / f"zz_{name}")
        path = tmp_path / name
        message = refused(zip_folder(path, tmp_path / f"{name}.zip") if container == "zip" else path)
        assert f"zz_{name}" in message and "dataset build" in message


def test_damaged_zip_entry_is_named(tmp_path, folder):
    path = zip_folder(folder, tmp_path / "a.zip")
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT") + 100
    data[at : at + 4] = b"\0\0\0\0"
    path.write_bytes(bytes(data))
    assert "000.png" in refused(path)


def test_encrypted_zip_is_refused(tmp_path, folder):
    path = zip_folder(folder, tmp_path / "a.zip")
    data = bytearray(path.read_bytes())
    for sign, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.find(sign)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(sign, at + 4)
    path.write_bytes(bytes(data))
    assert "encrypted" in refused(path)


def test_huge_file_is_refused_unread(folder, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    assert "000.png" in refused(folder) and "larger than" in refused(folder)


def test_max_size_must_be_positive(folder):
    assert "at least one" in refused(folder, max_size=0)


def test_nothing_is_extracted(tmp_path, folder):
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "000.png", "../../outside.png")
        archive.write(folder / "001.png", "/abs/olute.png")
    before = sorted(tmp_path.rglob("*"))
    assert len(list(ImageDataset(path))) == 2
    assert sorted(tmp_path.rglob("*")) == before and not os.path.exists("/abs/olute.png")


# --- fitting


def fits(**changes) -> str:
    sides = {"resolution": 64, "num_channels": 3, "label_dim": 0, "want_resolution": 64, "want_channels": 3,
             "want_label_dim": 0, "data": "my photos", "network": "net.pkl", **changes}  # fmt: skip
    with pytest.raises(DatasetError) as err:
        check_fits(**sides)
    assert "\n" not in str(err.value) and "my photos has" in str(err.value) and "net.pkl wants" in str(err.value)
    return str(err.value)


def test_fitting_data_passes():
    check_fits(
        resolution=64, num_channels=3, label_dim=5, want_resolution=64, want_channels=3, want_label_dim=5, data="d"
    )


def test_misfits_say_both_sides_and_the_command():
    message = fits(resolution=72)
    assert "72x72" in message and "64x64" in message
    assert "stylegan-rooted dataset build 'my photos' DEST.zip --resolution 64`" in message
    assert "--resolution 64 --rgb`" in fits(num_channels=1)
    assert "--resolution 32 --grey`" in fits(want_channels=1, want_resolution=32)
    message = fits(want_label_dim=3, network="my net.pkl")
    assert "--cond true" in message and "from-folders" in message
    assert "`stylegan-rooted surgery 'my net.pkl' NEW.pkl --classes 0 --keep-class K`" in message
    assert "leave out --cond" in fits(label_dim=3) and "surgery net.pkl NEW.pkl --classes 3`" in fits(label_dim=3)
    assert "surgery net.pkl NEW.pkl --classes 4`" in fits(label_dim=4, want_label_dim=3)
    assert "surgery" not in fits(label_dim=1, want_label_dim=3), "a network has at least two classes"
    assert "labels of 4 numbers" in fits(label_dim=3, want_label_dim=4)


# --- fingerprint


def test_fingerprint_is_about_content(tmp_path, folder):
    reference = ImageDataset(folder)
    assert len(reference.fingerprint()) == 64
    (folder / "000.png").rename(folder / "0000.png")  # same order, other name
    assert ImageDataset(folder).fingerprint() == reference.fingerprint()
    others = [ImageDataset(folder, xflip=True), ImageDataset(folder, max_size=3)]
    write_labels(folder, [[p.name, 1] for p in folder.glob("*.png")])
    others.append(ImageDataset(folder, use_labels=True))
    write_labels(folder, [[p.name, int(p.name == "003.png")] for p in folder.glob("*.png")])
    others.append(ImageDataset(folder, use_labels=True))
    with Image.open(folder / "005.png") as image:
        image = image.copy()
    image.putpixel((3, 3), (0, 0, 0) if image.getpixel((3, 3)) != (0, 0, 0) else (1, 1, 1))
    image.save(folder / "005.png")
    others.append(ImageDataset(folder))
    assert len({d.fingerprint() for d in [reference, *others]}) == 6


# --- drawing


def test_sampler_start_continues_the_stream():
    for rank in range(3):
        stream = list(itertools.islice(InfiniteSampler(17, rank, 3, seed=5), 60))
        assert list(itertools.islice(InfiniteSampler(17, rank, 3, seed=5, start=23), 37)) == stream[23:]


def test_ranks_share_one_stream():
    whole = list(itertools.islice(InfiniteSampler(17, seed=5), 60))
    assert all(list(itertools.islice(InfiniteSampler(17, r, 3, seed=5), 20)) == whole[r::3] for r in range(3))


@pytest.mark.parametrize("args", [(0,), (5, 2, 2), (5, -1, 2), (5, 0, 1, True, 0, 1.5)])
def test_sampler_refuses(args):
    with pytest.raises(ValueError):
        InfiniteSampler(*args)


@pytest.mark.parametrize("cache", [True, False])
def test_batches_do_not_depend_on_threads(tmp_path, folder, cache):
    write_labels(folder, [[f"00{i}.png", i] for i in range(6)])
    path = zip_folder(folder, tmp_path / "a.zip")

    def first(num_workers: int) -> list:
        data = ImageDataset(path, use_labels=True, xflip=True, cache=cache)
        batches = iterate_batches(data, InfiniteSampler(data), 5, num_workers)
        result = [next(batches) for _ in range(10)]
        batches.close()
        return result

    alone, threaded = first(0), first(3)
    assert alone[0][0].shape == (5, 3, 16, 16) and alone[0][0].dtype == torch.uint8
    assert alone[0][1].shape == (5, 6) and alone[0][1].dtype == torch.float32
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(alone, threaded))
    assert not [t for t in threading.enumerate() if t.name.startswith("dataset")]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_finite_samplers_end(folder, num_workers):
    assert [len(x) for x, _ in iterate_batches(ImageDataset(folder), range(6), 4, num_workers)] == [4, 2]


def test_errors_come_out_of_threads(folder):
    data = ImageDataset(folder)
    (folder / "004.png").unlink()
    with pytest.raises(DatasetError, match="004.png"):
        list(iterate_batches(data, range(6), 2, num_workers=2))


def test_cache_reads_every_file_once(folder, monkeypatch):
    for cache, limit, reads in ((True, 1 << 30, 6), (False, 1 << 30, 12), (True, 6 * 768, 12)):
        monkeypatch.setattr(module, "CACHE_LIMIT_BYTES", limit)
        data = ImageDataset(folder, cache=cache)
        count = []
        original = data._source.read
        data._source.read = lambda name, original=original, count=count: count.append(name) or original(name)
        first, second = [x.tolist() for x, _ in data], [x.tolist() for x, _ in data]
        assert first == second and len(count) == reads


def test_mirrored_copies_take_no_memory(folder):
    six = 6 * 768
    for limit, kept in ((six + 1, 6), (six, 0)):
        data = ImageDataset(folder, xflip=True, cache_bytes=limit)
        assert len([x for x, _ in data]) == 12 and len(data._cache) == kept


def checksum(data: ImageDataset) -> str:
    return ImageDataset.fingerprint(data)


def test_threads_and_processes_may_share_a_zip(tmp_path, folder):
    data = ImageDataset(zip_folder(folder, tmp_path / "a.zip"), cache=False)
    expected = [x.tolist() for x, _ in data]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: data[i % 6][0].tolist(), range(240))) == expected * 40
    again = pickle.loads(pickle.dumps(data))
    assert again.fingerprint() == ImageDataset(folder).fingerprint()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(checksum, [data]) == [again.fingerprint()]


def test_zip_handle_is_not_shared_with_a_forked_child(tmp_path, folder, monkeypatch):
    data = ImageDataset(zip_folder(folder, tmp_path / "a.zip"), cache=False)
    handle = data._source._open()
    monkeypatch.setattr(module.os, "getpid", lambda: -1)
    assert data._source._open() is not handle and data[0][0].any()

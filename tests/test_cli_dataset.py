"""The command `dataset` as a user types it: exit codes, one-line errors, the table of what was left out."""

import json
import os
import subprocess
import sys

import odd_files
import pytest

from stylegan_rooted.cli import main
from training.dataset import ImageDataset


@pytest.fixture
def run(capsys):
    """Run the command line; returns (exit code, stdout, stderr)."""

    def call(*argv) -> tuple[int, str, str]:
        try:
            main(["dataset", *map(str, argv)])
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def source(tmp_path):
    odd_files.write_noise(tmp_path / "src", 3, side=24)
    return tmp_path / "src"


def test_build_and_info(run, tmp_path, source):
    dest = tmp_path / "set.zip"
    assert run("build", source, dest, "--resolution", 16) == (0, "", f"Wrote 3 RGB images of 16x16 to {dest}\n")
    code, out, err = run("info", dest)
    record = json.loads(out)
    assert (code, err) == (0, "") and record["num_images"] == 3 and record["build"]["resize_filter"] == "lanczos"
    assert record["fingerprint"] == ImageDataset(dest).fingerprint()


def test_options_arrive(run, tmp_path, source):
    dest = tmp_path / "set.zip"
    options = ["--resolution", 32, "--transform", "pad", "--resize-filter", "box", "--background", "black", "--grey",
               "--labels", "none", "--max-images", 2]  # fmt: skip
    code, _, err = run("build", source, dest, *options)
    assert code == 0 and "Wrote 2 grey images of 32x32" in err and "2 of them were smaller" in err
    assert run("build", source, dest, *options, "--overwrite")[0] == 0
    record = json.loads(run("info", dest)[1])
    assert record["num_channels"] == 1
    assert record["build"] == {
        "resolution": 32, "transform": "pad", "resize_filter": "box", "background": "black", "channels": 1,
        "labels": "none", "max_images": 2, "classes": None, "num_skipped": 0,
    }  # fmt: skip


def test_skipped_files_stand_in_a_table_at_the_end(run, tmp_path, source):
    corrupt = odd_files.write_corrupt(source / "bad")
    (source / "notes.txt").write_text("x")
    code, out, err = run("build", source, tmp_path / "a.zip", "--resolution", 16)
    lines = err.splitlines()
    assert (code, out) == (0, "") and lines[0] == f"Left out {len(corrupt) + 1} files:"
    names = [f"bad/{name}" for name in corrupt] + ["notes.txt"]
    assert [line.split()[0] for line in lines[1:-1]] == names
    starts = {len(line) - len(line[2:].split(None, 1)[1]) for line in lines[1:-1]}
    assert len(starts) == 1 and lines[-1].startswith("Wrote 3 ")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_are_not_waited_for_and_names_stay_on_their_line(run, tmp_path, source):
    os.mkfifo(source / "pipe.png")
    (source / "two\nlines.png").write_bytes(b"x")
    code, _, err = run("build", source, tmp_path / "a.zip", "--resolution", 16)
    table = err.splitlines()
    assert code == 0 and table[0] == "Left out 2 files:" and table[-1].startswith("Wrote 3 ")
    assert table[1:-1] == ["  pipe.png       is not a regular file", "  two?lines.png  not an image that Pillow knows"]


def one_line(result, code: int) -> str:
    assert result[0] == code and result[1] == "", result
    assert result[2].startswith("Error: ") and result[2].count("\n") == 1, result
    return result[2]


@pytest.mark.parametrize("options, words", [
    (["--resolution", 48], "power of two"),
    (["--resolution", "big"], "big"),
    ([], "--resolution"),
    (["--resolution", 16, "--transform", "zoom"], "zoom"),
    (["--resolution", 16, "--resize-filter", "cubic"], "cubic"),
    (["--resolution", 16, "--labels", "guess"], "guess"),
    (["--resolution", 16, "--background", "pinkish"], "pinkish"),
    (["--resolution", 16, "--max-images", 0], "--max-images 0"),
])  # fmt: skip
def test_wrong_options_are_usage_errors(run, tmp_path, source, options, words):
    assert words in one_line(run("build", source, tmp_path / "a.zip", *options), 2)
    assert not (tmp_path / "a.zip").exists()


def test_wrong_dest_extension_is_a_usage_error(run, tmp_path, source):
    assert "must end in .zip" in one_line(run("build", source, tmp_path / "a", "--resolution", 16), 2)


def test_wrong_sources_and_places(run, tmp_path, source):
    dest = tmp_path / "a.zip"
    build = ["--resolution", 16]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.png").write_bytes(b"x")
    (tmp_path / "no.zip").write_bytes(b"x")
    assert "no such folder" in one_line(run("build", tmp_path / "nowhere", dest, *build), 1)
    assert "no image files" in one_line(run("build", tmp_path / "empty", dest, *build), 1)
    assert "neither a folder nor a .zip" in one_line(run("build", tmp_path / "file.png", dest, *build), 1)
    assert "not a readable zip" in one_line(run("build", tmp_path / "no.zip", dest, *build), 1)
    assert "file.png" in one_line(run("build", source, tmp_path / "file.png" / "a.zip", *build), 1)
    assert "a.zip can't be written" in one_line(run("build", source, tmp_path / "file.png" / "a.zip", *build), 1)
    assert "from-json needs one" in one_line(run("build", source, dest, *build, "--labels", "from-json"), 1)
    assert not dest.exists()
    dest.write_bytes(b"mine")
    assert "--overwrite" in one_line(run("build", source, dest, *build), 1)
    assert dest.read_bytes() == b"mine"
    assert "no such folder" in one_line(run("info", tmp_path / "nowhere"), 1)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_no_write_permission(run, tmp_path, source):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "Permission denied" in one_line(run("build", source, tmp_path / "locked" / "a.zip", "--resolution", 16), 1)


def test_permission_errors_are_one_line(run, tmp_path, source, monkeypatch):
    def refuse(tmp, dest):
        raise PermissionError(13, "Permission denied", tmp)

    monkeypatch.setattr("stylegan_rooted.dataset_tool.os.replace", refuse)
    message = one_line(run("build", source, tmp_path / "a.zip", "--resolution", 16), 1)
    assert message == f"Error: {tmp_path / 'a.zip'}: Permission denied\n" and os.listdir(tmp_path) == ["src"]


def test_help_is_quick():
    code = (
        "import sys; from stylegan_rooted.cli import main\n"
        "try: main(['dataset', 'build', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--resize-filter" in done.stdout and "lanczos" in done.stdout

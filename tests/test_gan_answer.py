"""scripts/gan_answer.sh with stand-ins for the programs it calls: what it calls, what it refuses, how it ends."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# Notes its arguments, one a line, and its process number; then does what $DO says of its share.
STAND_IN = """#!/usr/bin/env bash
{ printf '%s\\n' "${0##*/}" "$@"; echo; } >>"$NOTES/calls.$BASHPID"
touch "$NOTES/pid.$$"
case "$DO $*" in
  *"sleep "*) exec sleep 60 ;;
  "fail "*"--only 1/2") exit 7 ;;
  "fail "*"--only 2/2") sleep 0.3; touch "$NOTES/second"; exit 8 ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    """A function that starts a copy of the script in a folder with a space; what still runs at the end is killed."""
    root, notes, programs = tmp_path / "a checkout", tmp_path / "notes", tmp_path / "bin"
    for folder in (root / "scripts", notes, programs):
        folder.mkdir(parents=True)
    script = shutil.copy(ROOT / "scripts" / "gan_answer.sh", root / "scripts")
    for name in ("python", "stylegan-rooted"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    started = []

    def begin(*args, do=""):
        environment = {**os.environ, "BIN": str(programs), "NOTES": str(notes), "DO": do}
        process = subprocess.Popen(
            ["bash", script, *args], cwd=tmp_path, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate()


def calls(tmp_path: Path) -> list[list[str]]:
    files = sorted((tmp_path / "notes").glob("calls.*"), key=lambda file: file.stat().st_mtime_ns)
    return [file.read_text().splitlines()[:-1] for file in files]


def running(tmp_path: Path) -> list[int]:
    """Stand-ins that are alive."""
    found = []
    for file in (tmp_path / "notes").glob("pid.*"):
        try:
            os.kill(int(file.suffix[1:]), 0)
        except ProcessLookupError:
            continue
        found.append(int(file.suffix[1:]))
    return found


def test_help_and_wrong_usage_build_nothing(start, tmp_path):
    process = start("--help")
    out, err = process.communicate(timeout=20)
    usage = "scripts/gan_answer.sh FOLDER [STAGE ...]"
    assert (process.returncode, err) == (0, "") and usage in out and "set -" not in out
    for args, message in [((), usage), (("out", "scratch", "scratchy"), "unknown stage scratchy; the stages are")]:
        process = start(*args)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (2, "") and message in err
    assert not calls(tmp_path) and not (tmp_path / "out").exists()


def test_a_path_with_a_space_stays_one_argument(start, tmp_path):
    process = start("my out", "long")
    assert process.communicate(timeout=20)[1] == "" and process.returncode == 0
    data, *runs = calls(tmp_path)
    assert data[0] == "python" and len(runs) == 3
    network = str(tmp_path / "a checkout" / "stylegan_rooted" / "assets" / "emoji32.pkl")
    for run in runs:
        assert run[:4] == ["stylegan-rooted", "compare", "--outdir", "digits-long"]
        assert run[run.index("--resume") + 1] == network and run[run.index("--seeds") + 1] == "0-4"
    assert sorted(run[-1] for run in runs[:2]) == ["1/2", "2/2"] and "--only" not in runs[2]


def test_a_failing_share_ends_the_script_when_the_other_has_ended(start, tmp_path):
    process = start("out", "scratch", do="fail")
    err = process.communicate(timeout=20)[1]
    assert process.returncode == 7 and "twemoji-scratch failed; out/twemoji-scratch.1.log" in err
    assert (tmp_path / "notes" / "second").exists() and not running(tmp_path)
    assert len(calls(tmp_path)) == 3  # the data, two shares, no result


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("made", [True, False])
def test_a_signal_ends_what_the_script_started(start, tmp_path, number, made):
    """While the shares run, and while the data are made."""
    if made:
        (tmp_path / "out" / "data").mkdir(parents=True)
        (tmp_path / "out" / "data" / "digits-32.zip").touch()
    process = start("out", "scratch", do="sleep")
    deadline = time.monotonic() + 20
    while len(running(tmp_path)) < 1 + made and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(running(tmp_path)) == 1 + made
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number and not running(tmp_path)

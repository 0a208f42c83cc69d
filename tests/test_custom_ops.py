"""The loader of compiled operators: without a compiler, with a broken one, two builders, a killed one, no cache."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from torch_utils import custom_ops
from torch_utils.ops import upfirdn2d

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="compiled operators are made on Linux only")
BUILD = "from torch_utils import custom_ops as c; print(c.build())"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path) -> None:
    """A process that has not tried yet, an empty cache, and nothing said on stderr."""
    monkeypatch.setattr(custom_ops, "_outcome", None)
    monkeypatch.setattr(custom_ops, "verbosity", "none")
    monkeypatch.setenv("STYLEGAN_ROOTED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STYLEGAN_ROOTED_OPS", "native")
    monkeypatch.delenv("CXX", raising=False)


def compiler(path: Path, work: str) -> str:
    """A program that counts its calls, tells a version, and for anything else does `work` with the output in $out."""
    path.write_text(
        f"""#!/bin/sh
[ "$1" = --version ] && {{ echo "pretend 1.0"; exit 0; }}
echo x >> "{path}.calls"
while [ $# -gt 0 ]; do [ "$1" = -o ] && out="$2"; shift; done
{work}
"""
    )
    path.chmod(0o755)
    return str(path)


def calls(path: Path) -> int:
    file = Path(f"{path}.calls")
    return len(file.read_text().split()) if file.exists() else 0


def upsampled() -> torch.Tensor:
    return upfirdn2d.upsample2d(torch.ones(1, 1, 4, 4), upfirdn2d.setup_filter([1, 3, 3, 1]))


def expect_torch_calls(match: str) -> str:
    """The first operator warns once, its results are right, and nobody tries again; returns the message."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        y = upsampled()
        assert torch.equal(upsampled(), y) and custom_ops.selected() == "ref" and not custom_ops.available()
    assert len(seen) == 1, [str(w.message) for w in seen]
    message = str(seen[0].message)
    assert match in message and "torch calls" in message
    torch.testing.assert_close(y[0, 0, 3:5, 3:5], torch.ones(2, 2))
    assert "not available" in custom_ops.describe()
    return message


def test_without_a_compiler(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "install g++" in expect_torch_calls("no C++ compiler")


def test_named_compiler_is_missing(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    expect_torch_calls("no-such-compiler")


def test_a_broken_compiler_is_quoted_and_not_asked_again(monkeypatch, tmp_path) -> None:
    work = "for i in $(seq 40); do echo line $i; done; echo 'fatal: no headers' >&2; exit 3"
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", work))
    message = expect_torch_calls("status 3")
    assert "fatal: no headers" in message and "line 40" in message and "line 20\n" not in message
    assert calls(tmp_path / "cxx") == 1
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_compiler_that_leaves_nothing(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", "exit 0"))
    expect_torch_calls("status 0")


def test_a_library_that_does_not_load_is_made_once_more(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", 'echo rubbish > "$out"'))
    expect_torch_calls("does not load")
    assert calls(tmp_path / "cxx") == 2


def test_warnings_that_are_errors_stop_one_call_only(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserWarning, match="no C\\+\\+ compiler"):
        upsampled()
    upsampled()


def test_cache_that_cannot_be_written(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("STYLEGAN_ROOTED_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", 'echo x > "$out"'))
    assert "STYLEGAN_ROOTED_CACHE" in expect_torch_calls("cannot keep")


def test_read_only_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", 'echo x > "$out"'))
    folder = custom_ops.library_path().parent
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    try:
        if os.access(folder, os.W_OK):  # root writes everywhere: the system call has to say no in its place

            def refuse(path, *args, open_file=Path.open, **kwargs):
                if path.name == "lock":
                    raise OSError(30, "Read-only file system")
                return open_file(path, *args, **kwargs)

            monkeypatch.setattr(Path, "open", refuse)
        expect_torch_calls("cannot keep")
    finally:
        folder.chmod(0o700)


def test_kept_library_needs_no_lock_and_no_compiler_run(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", 'echo x > "$out"'))
    path = custom_ops.build()
    assert path == custom_ops.library_path() and calls(tmp_path / "cxx") == 1
    (path.parent / "lock").unlink()
    assert custom_ops.build() == path and calls(tmp_path / "cxx") == 1
    assert not (path.parent / "lock").exists()
    path.chmod(0o777)  # others may have written to it
    assert custom_ops.build() == path and calls(tmp_path / "cxx") == 2 and not path.stat().st_mode & 0o022


def test_key_knows_source_torch_flags_compiler_and_processor(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", "exit 1"))
    keys = {custom_ops.library_path()}
    other = tmp_path / "source.cpp"
    other.write_text("int other;")
    newer = tmp_path / "newer"
    newer.write_text("#!/bin/sh\necho pretend 2.0\n")
    newer.chmod(0o755)
    for target, name, value in (
        (custom_ops, "SOURCE", other),
        (torch, "__version__", "9.9"),
        (custom_ops, "FLAGS", ("-O0",)),
        (custom_ops, "_processor", lambda: "another"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            keys.add(custom_ops.library_path())
    keys.add(custom_ops.library_path(str(newer)))
    assert len(keys) == 6


def start(**extra: str) -> subprocess.Popen:
    env = {**os.environ, **extra}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", BUILD], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def test_two_builders_at_once_compile_once(tmp_path) -> None:
    cxx = compiler(tmp_path / "cxx", 'sleep 3; echo x > "$out"')
    builders = [start(CXX=cxx) for _ in range(2)]
    said = [b.communicate(timeout=120) for b in builders]
    assert [b.returncode for b in builders] == [0, 0], said
    assert said[0][0] == said[1][0] and calls(tmp_path / "cxx") == 1
    path = Path(said[0][0].strip())
    assert path.read_text() == "x\n" and sorted(p.name for p in path.parent.iterdir()) == ["lock", path.name]


def test_lock_of_a_killed_builder_is_free(monkeypatch, tmp_path) -> None:
    pid, started = tmp_path / "pid", tmp_path / "cxx"
    builder = start(CXX=compiler(started, f'[ -e {pid} ] || {{ echo $$ > {pid}; exec sleep 600; }}; echo x > "$out"'))
    try:
        deadline = time.monotonic() + 60
        while not (pid.exists() and pid.read_text().strip()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert builder.poll() is None and len(list((tmp_path / "cache").rglob("build-*"))) == 1
        builder.kill()
        builder.wait()
        monkeypatch.setenv("CXX", str(started))  # its compiler still runs: that must not matter either
        begin = time.monotonic()
        path = custom_ops.build()
        assert time.monotonic() - begin < 5 and path.read_text() == "x\n"
        assert not list((tmp_path / "cache").rglob("build-*"))
    finally:
        builder.kill()
        builder.communicate()
        if pid.exists():
            os.kill(int(pid.read_text()), signal.SIGKILL)


def test_auto_and_ref_never_compile(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", 'echo x > "$out"'))
    for value in ("auto", "ref", ""):
        monkeypatch.setenv("STYLEGAN_ROOTED_OPS", value)
        upsampled()
        assert custom_ops.selected() == "ref" and custom_ops.describe().startswith(value or "auto")
    assert calls(tmp_path / "cxx") == 0 and not (tmp_path / "cache").exists()


def test_command(monkeypatch, tmp_path) -> None:
    from click.testing import CliRunner

    from stylegan_rooted.cli import ops

    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", 'echo x > "$out"'))

    def run(*args: str) -> str:
        result = CliRunner().invoke(ops.command, args, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    before = json.loads(run("info", "--json"))
    assert before["built"] is False and before["problem"] is None and calls(tmp_path / "cxx") == 0
    assert run("build").strip() == before["library"]
    assert json.loads(run("info", "--json"))["built"] is True and "built" in run("info")
    run("clean")
    assert json.loads(run("info", "--json"))["built"] is False
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in json.loads(run("info", "--json"))["problem"]
    with pytest.raises(ValueError, match="no-such-compiler"):
        run("build")

"""The loader of compiled operators: without a compiler, with a broken one, two builders, a killed one, no cache."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from torch_utils import custom_ops, op_build
from torch_utils.ops import upfirdn2d

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="compiled operators are made on Linux only")
CPU = op_build.PLUGINS["cpu"]
NUM_CALLS = len(CPU.sources) + 1  # one per source, and the linker
BUILD = "from torch_utils import op_build as b; print(b.build(b.PLUGINS['cpu']))"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path) -> None:
    """A process that has not tried yet, an empty cache, and nothing said on stderr."""
    monkeypatch.setattr(custom_ops, "_outcomes", {})
    monkeypatch.setattr(op_build, "verbosity", "none")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
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
    assert 0 < calls(tmp_path / "cxx") <= len(CPU.sources)  # once one has failed, the others need not begin
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("build-*"))


def test_a_compiler_that_leaves_nothing(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", "exit 0"))
    expect_torch_calls("status 0")


def test_a_library_that_does_not_load_is_made_once_more(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", 'echo rubbish > "$out"'))
    expect_torch_calls("does not load")
    assert calls(tmp_path / "cxx") == 2 * NUM_CALLS


def test_warnings_that_are_errors_stop_one_call_only(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserWarning, match="no C\\+\\+ compiler"):
        upsampled()
    upsampled()


def test_auto_says_one_line_where_there_is_no_compiler(monkeypatch, capsys) -> None:
    monkeypatch.setenv("STYLEGAN_ROOTED_OPS", "auto")
    monkeypatch.setattr(op_build, "verbosity", "brief")
    monkeypatch.setenv("PATH", "")
    y = upsampled()  # warnings are errors here
    assert torch.equal(upsampled(), y) and custom_ops.selected() == "ref"
    assert "no C++ compiler" in custom_ops.describe() and custom_ops.describe().startswith("auto: torch calls")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "torch calls do their work" in said[0] and "install g++" in said[0]
    monkeypatch.setattr(custom_ops, "_outcomes", {})
    monkeypatch.setenv("RANK", "1")  # the first of several processes speaks for all
    upsampled()
    assert not capsys.readouterr().err


def test_auto_warns_of_a_broken_compiler(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("STYLEGAN_ROOTED_OPS", "auto")
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", "echo the end >&2; exit 1"))
    assert "the end" in expect_torch_calls("status 1")


def test_a_build_is_one_line_and_its_end_another(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(op_build, "verbosity", "brief")
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", 'echo x > "$out"'))
    op_build.build(CPU)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith("Compiling operators for this processor, once") and " s" in said[1]
    op_build.build(CPU)
    assert not capsys.readouterr().err


def test_cache_that_cannot_be_written_has_a_spare(monkeypatch, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("STYLEGAN_ROOTED_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", 'echo x > "$out"'))
    monkeypatch.setattr(op_build, "verbosity", "brief")
    path = op_build.build(CPU)
    assert path.is_relative_to(tmp_path / f"stylegan-rooted-ops-{os.getuid()}") and path.read_text() == "x\n"
    assert "cannot be written" in capsys.readouterr().err
    assert op_build.find(CPU) == path == op_build.build(CPU) and calls(tmp_path / "cxx") == NUM_CALLS
    op_build.spare_dir().chmod(0o777)  # somebody else may have put it there
    assert op_build.find(CPU) is None
    with pytest.raises(op_build.NoToolsError, match="STYLEGAN_ROOTED_CACHE"):
        op_build.build(CPU)
    assert "STYLEGAN_ROOTED_CACHE" in expect_torch_calls("cannot keep")


def test_read_only_cache(monkeypatch, tmp_path) -> None:
    """Nothing new can be put there, but what is there is used."""
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", 'echo x > "$out"'))
    folder = op_build.library_path(CPU).parent
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    try:
        if os.access(folder, os.W_OK):  # root writes everywhere: the system call has to say no in its place

            def refuse(path, *args, open_file=Path.open, **kwargs):
                if path.name == "lock":
                    raise OSError(30, "Read-only file system")
                return open_file(path, *args, **kwargs)

            monkeypatch.setattr(Path, "open", refuse)
        op_build.spare_dir().write_text("in the way")
        assert "Read-only" in expect_torch_calls("cannot keep") or not os.access(folder, os.W_OK)
    finally:
        folder.chmod(0o700)
    (folder / "cpu.so").write_text("kept")
    (folder / "cpu.so").chmod(0o500)
    assert op_build.build(CPU) == folder / "cpu.so" and calls(tmp_path / "cxx") == 0


def test_kept_library_needs_no_lock_and_no_compiler_run(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", 'echo x > "$out"'))
    path = op_build.build(CPU)
    assert path == op_build.library_path(CPU) and calls(tmp_path / "cxx") == NUM_CALLS
    (path.parent / "lock").unlink()
    assert op_build.build(CPU) == path and calls(tmp_path / "cxx") == NUM_CALLS
    assert not (path.parent / "lock").exists()
    path.chmod(0o777)  # others may have written to it
    assert op_build.build(CPU) == path and not path.stat().st_mode & 0o022
    assert calls(tmp_path / "cxx") == NUM_CALLS + 1  # the objects are kept


def test_kept_library_needs_no_compiler_at_all(monkeypatch, tmp_path) -> None:
    """An image of a machine may have the library, but not what made it."""
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", 'echo x > "$out"'))
    path = op_build.build(CPU)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert op_build.find(CPU) == op_build.build(CPU) == path


def test_a_library_of_somebody_else_is_not_loaded(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", 'echo x > "$out"'))
    path = op_build.build(CPU)
    real = Path.stat

    def owned_by_another(self, **kwargs):
        info = real(self, **kwargs)
        fields = list(info)
        fields[stat.ST_UID] = os.getuid() + 1
        return os.stat_result(fields) if self.suffix == ".so" and "build-" not in str(self) else info

    monkeypatch.setattr(Path, "stat", owned_by_another)
    assert op_build.find(CPU) is None
    with pytest.raises(op_build.BuildError, match="belongs to another user"):
        op_build.build(CPU)
    assert path.exists()


def test_cleaning_goes_through_no_link_in_a_folder_for_all(monkeypatch, tmp_path) -> None:
    """The spare folder's name is known to everybody: where it is a link, nothing behind it is ours to remove."""
    for name in ("objects", "cpu-mine"):
        (tmp_path / "theirs" / name).mkdir(parents=True)
    monkeypatch.setattr(op_build, "spare_dir", lambda: tmp_path / "spare")
    (tmp_path / "spare").symlink_to(tmp_path / "theirs")
    op_build.cache_dir().mkdir(parents=True, exist_ok=True)
    (op_build.cache_dir() / "cpu-stray").touch()
    assert op_build.clean() == 0
    assert sorted(p.name for p in (tmp_path / "theirs").iterdir()) == ["cpu-mine", "objects"]


def test_sources_are_compiled_side_by_side_and_only_what_changed(monkeypatch, tmp_path) -> None:
    wait = f'while [ $(wc -l < "{tmp_path / "cxx"}.calls") -lt 3 ]; do'
    meet = f"n=0; {wait} sleep 0.05; n=$((n+1)); [ $n -lt 200 ] || exit 1; done"
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", f'{meet}; echo x > "$out"'))
    monkeypatch.setattr(op_build, "FOLDER", tmp_path / "ops")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    (tmp_path / "ops").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "ops" / f"{name}.cpp").write_text(f'  #  include "{name}.h"\n#include <vector>\n')
        (tmp_path / "ops" / f"{name}.h").write_text('#include "a.h"\n' if name == "b" else "int x;\n")
    plugin = op_build.Plugin("cpu", ("a.cpp", "b.cpp", "c.cpp"))
    paths = {op_build.build(plugin)}  # fails if one compiler waits for another
    assert calls(tmp_path / "cxx") == 4
    for header, num_objects in (("c.h", 1), ("a.h", 2)):  # a.h is included by a.cpp, and by b.cpp through b.h
        before = calls(tmp_path / "cxx")
        (tmp_path / "ops" / header).write_text("int other;\n")
        paths.add(op_build.build(plugin))
        assert calls(tmp_path / "cxx") - before == num_objects + 1
    assert len(paths) == 3


def test_key_knows_source_torch_flags_compiler_and_processor(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", "exit 1"))
    keys = {op_build.library_path(CPU)}
    shutil.copytree(op_build.FOLDER, tmp_path / "ops")
    with (tmp_path / "ops" / CPU.sources[0]).open("a") as file:
        file.write("int other;")
    newer = tmp_path / "newer"
    newer.write_text("#!/bin/sh\necho pretend 2.0\n")
    newer.chmod(0o755)
    for target, name, value in (
        (op_build, "FOLDER", tmp_path / "ops"),
        (torch, "__version__", "9.9"),
        (op_build, "FLAGS", ("-O0",)),
        (op_build, "_processor", lambda: "another"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            keys.add(op_build.library_path(CPU))
    monkeypatch.setenv("CXX", str(newer))
    keys.add(op_build.library_path(CPU))
    assert len(keys) == 6


def start(**extra: str) -> subprocess.Popen:
    env = {**os.environ, **extra}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", BUILD], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def test_two_builders_at_once_compile_once(tmp_path) -> None:
    cxx = compiler(tmp_path / "cxx", 'sleep 1; echo x > "$out"')
    builders = [start(CXX=cxx) for _ in range(2)]
    said = [b.communicate(timeout=120) for b in builders]
    assert [b.returncode for b in builders] == [0, 0], said
    assert said[0][0] == said[1][0] and calls(tmp_path / "cxx") == NUM_CALLS
    path = Path(said[0][0].strip())
    assert path.read_text() == "x\n" and sorted(p.name for p in path.parent.iterdir()) == [path.name, "lock"]


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
        path = op_build.build(CPU)
        assert time.monotonic() - begin < 5 and path.read_text() == "x\n"
        assert not list((tmp_path / "cache").rglob("build-*"))
    finally:
        builder.kill()
        builder.communicate()
        if pid.exists():
            os.kill(int(pid.read_text()), signal.SIGKILL)


def test_torch_and_ref_never_compile(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", 'echo x > "$out"'))
    for value in ("torch", "ref"):
        monkeypatch.setenv("STYLEGAN_ROOTED_OPS", value)
        upsampled()
        assert custom_ops.selected() == "ref" and custom_ops.describe().startswith(value)
    monkeypatch.setenv("STYLEGAN_ROOTED_OPS", "auto")
    assert custom_ops.selected("mps") == "ref" and "no compiled operators for mps" in custom_ops.describe("mps")
    assert calls(tmp_path / "cxx") == 0 and not (tmp_path / "cache").exists()


def test_nothing_happens_at_import() -> None:
    """Not even with the worst of settings; the first use of an operator explains them."""
    program = "import torch_utils.ops.upfirdn2d as u, torch\nu.upsample2d(torch.ones(1, 1, 2, 2), u.setup_filter([1]))"
    env = {**os.environ, "STYLEGAN_ROOTED_OPS": "nonsense", "CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith("wanted one of auto, native, torch, ref")
    assert "in upsample2d" in done.stderr


def test_threads_resolve_once(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("STYLEGAN_ROOTED_OPS", "auto")
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", 'sleep 0.3; echo rubbish > "$out"'))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: upsampled(), range(8)))
    assert all(torch.equal(r, results[0]) for r in results) and len(seen) == 1
    assert calls(tmp_path / "cxx") == 2 * NUM_CALLS


def test_command(monkeypatch, tmp_path) -> None:
    from click.testing import CliRunner

    from stylegan_rooted.cli import ops

    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", 'echo x > "$out"'))

    def run(*args: str) -> str:
        result = CliRunner().invoke(ops.command, args, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    def info() -> dict:
        return json.loads(run("info", "--json"))["libraries"]["cpu"]

    before = info()
    assert before["built"] is False and before["problem"] is None and calls(tmp_path / "cxx") == 0
    assert run("build").splitlines()[0] == before["path"]
    assert info()["built"] is True and info()["path"] == before["path"] and "built" in run("info")
    run("clean")
    assert info()["built"] is False and not list(tmp_path.rglob("*.o"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in info()["problem"]
    with pytest.raises(ValueError, match="no-such-compiler"):
        run("build")

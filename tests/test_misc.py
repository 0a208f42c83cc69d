"""torch_utils.misc and dnnlib.util: small helpers, copying by name, files and downloads."""

import functools
import hashlib
import http.server
import io
import os
import pickle
import socket
import threading
import warnings

import pytest
import torch

import dnnlib
from dnnlib import util
from torch_utils import misc


def test_easy_dict() -> None:
    d = dnnlib.EasyDict(a=1, b=dnnlib.EasyDict(c=2))
    d.x = 3
    d["y"] = 4
    assert (d.a, d.b.c, d["x"], d.y) == (1, 2, 3, 4)
    del d.a
    assert "a" not in d and not hasattr(d, "a")
    for action in (lambda: d.a, lambda: delattr(d, "a")):
        with pytest.raises(AttributeError, match="a"):
            action()
    copy = pickle.loads(pickle.dumps(d))
    assert copy == d and type(copy) is dnnlib.EasyDict and type(copy.b) is dnnlib.EasyDict


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (9, "9s"), (59.4, "59s"), (59.6, "1m 00s"), (163, "2m 43s"), (3692, "1h 01m 32s"),
        (86399, "23h 59m 59s"), (86400 + 7200 + 180, "1d 02h 03m"), (-5, "-5s"),
    ],
)  # fmt: skip
def test_format_time(seconds, text) -> None:
    assert dnnlib.util.format_time(seconds) == text


def test_is_url() -> None:
    assert util.is_url("https://example.org/a.pkl") and util.is_url("http://localhost:80/x")
    assert util.is_url("file:///tmp/x", allow_file_urls=True) and not util.is_url("file:///tmp/x")
    for text in ("", "a/b.pkl", "/tmp/https://x", "ftp://h/x", "https://", "C:\\net.pkl", None, 3):
        assert not util.is_url(text)


def test_cache_dir(monkeypatch) -> None:
    for variable in ("STYLEGAN_ROOTED_CACHE", "DNNLIB_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert dnnlib.make_cache_dir_path("a", "b") == "/home/someone/.cache/stylegan-rooted/a/b"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert dnnlib.make_cache_dir_path() == "/x/stylegan-rooted"
    monkeypatch.setenv("DNNLIB_CACHE_DIR", "/d")
    assert dnnlib.make_cache_dir_path("a") == "/d/a"
    monkeypatch.setenv("STYLEGAN_ROOTED_CACHE", "/s")
    assert dnnlib.make_cache_dir_path("a") == "/s/a"


CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def test_open_local_files(tmp_path) -> None:
    path = tmp_path / "with space.bin"
    path.write_bytes(CONTENT)
    for name in (path, str(path), path.as_uri()):
        with util.open_url(name, sha256=DIGEST) as file:
            assert file.read() == CONTENT
        assert util.open_url(name, return_filename=True) == str(path)
    with pytest.raises(FileNotFoundError):
        util.open_url(tmp_path / "absent")
    with pytest.raises(ValueError, match="expected 0000"):
        util.open_url(path, sha256="0" * 64)
    with pytest.raises(ValueError, match="64 hexadecimal"):
        util.open_url(path, sha256="abc")
    with pytest.raises(ValueError, match="at least 1"):
        util.open_url(path, num_attempts=0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_regular_file_is_refused_unopened(tmp_path, monkeypatch) -> None:
    """A pipe would be waited for, a device has no end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "good").symlink_to("file")
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name, words in {"pipe": "a named pipe", "link": "a named pipe", "socket": "a socket", ".": "a folder",
                            "/dev/zero": "a device"}.items():  # fmt: skip
            with pytest.raises(OSError, match=words) as caught:
                util.open_url(name)
            assert caught.value.filename == name
    with util.open_url("good") as file:
        assert file.read() == b"x"
    with pytest.raises(OSError, match="a named pipe"):
        util.open_url("pipe", sha256="0" * 64)


def test_pipes_that_the_process_was_started_with_are_read() -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"content")
        os.close(writer)
        if os.path.exists(f"/dev/fd/{reader}"):
            with util.open_url(f"/dev/fd/{reader}") as file:
                assert file.read() == b"content"
    finally:
        os.close(reader)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; /flaky fails once, /short breaks off, /gone is a 404."""

    counts: dict = {}

    def do_GET(self) -> None:
        count = self.counts[self.path] = self.counts.get(self.path, 0) + 1
        if self.path == "/gone" or (self.path == "/flaky" and count == 1):
            self.send_error(404 if self.path == "/gone" else 503)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: 100 if self.path == "/short" else None])

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(util.time, "sleep", lambda _: None)
    Handler.counts = {}
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_downloads(server, tmp_path, capsys) -> None:
    open_url = functools.partial(util.open_url, cache_dir=tmp_path, verbose=False)
    for _ in range(2):  # the second time from the cache
        with open_url(f"{server}/net.pkl?a=../b", sha256=DIGEST) as file:
            assert file.read() == CONTENT
    assert Handler.counts == {"/net.pkl?a=../b": 1}
    (kept,) = tmp_path.iterdir()
    assert kept.name.endswith("_net.pkl")
    assert open_url(f"{server}/net.pkl?a=../b", return_filename=True) == str(kept)

    kept.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="delete it"):
        open_url(f"{server}/net.pkl?a=../b", sha256=DIGEST)

    with util.open_url(f"{server}/flaky", cache_dir=tmp_path) as file:
        assert file.read() == CONTENT
    streams = capsys.readouterr()
    assert streams.out == "" and "attempt 2" in streams.err

    assert isinstance(open_url(f"{server}/memory", cache=False, sha256=DIGEST), io.BytesIO)
    with pytest.raises(ValueError, match="return_filename needs cache"):
        open_url(f"{server}/memory", cache=False, return_filename=True)


def test_failed_downloads_leave_nothing(server, tmp_path) -> None:
    open_url = functools.partial(util.open_url, cache_dir=tmp_path, verbose=False)
    with pytest.raises(OSError, match="cannot download .*/gone.*404"):
        open_url(f"{server}/gone")
    assert Handler.counts["/gone"] == 1  # no use in asking again
    with pytest.raises(OSError, match="cannot download .*/short"):
        open_url(f"{server}/short", num_attempts=2)
    assert Handler.counts["/short"] == 2
    for cache in (True, False):
        with pytest.raises(ValueError, match="SHA-256"):
            open_url(f"{server}/wrong", sha256="0" * 64, cache=cache)
    assert list(tmp_path.iterdir()) == []



def test_assert_shape() -> None:
    x = torch.zeros(2, 3)
    misc.assert_shape(x, [2, 3])
    misc.assert_shape(x, [None, 3])
    for wanted in ([2], [2, 4], [2, 3, 1], [None, None, None]):
        with pytest.raises(AssertionError):
            misc.assert_shape(x, wanted)


def test_constant() -> None:
    a = misc.constant([1, 2.5])
    assert a.dtype == torch.float32 and a.tolist() == [1.0, 2.5] and misc.constant([1, 2.5]) is a
    assert misc.constant([1, 2], dtype=torch.int64) is not misc.constant([1, 2], dtype=torch.int32)
    assert misc.constant(3, shape=[2, 2]).tolist() == [[3.0, 3.0]] * 2
    image = misc.constant(1, shape=[1, 2, 3, 4], memory_format=torch.channels_last)
    assert image.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        born = misc.constant([41.0])
    x = torch.ones(1, requires_grad=True)
    (born * x).sum().backward()
    assert x.grad.item() == 41


def test_profiled_function_and_warnings() -> None:
    @misc.profiled_function
    def double(x, factor=2):
        """Doubles."""
        return x * factor

    with torch.autograd.profiler.profile() as profile:
        assert double(torch.ones(1), factor=3).item() == 3
    assert double.__doc__ == "Doubles." and "double" in {event.name for event in profile.function_events}

    before = list(warnings.filters)
    with misc.suppress_tracer_warnings():
        warnings.warn("traced", torch.jit.TracerWarning, stacklevel=1)
        with pytest.raises(UserWarning):
            warnings.warn("other", UserWarning, stacklevel=1)
    assert list(warnings.filters) == before


def small_module(width=3) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.BatchNorm1d(width))


def test_copying_by_name() -> None:
    src, dst = small_module(), small_module()
    src[1].running_mean.fill_(7)
    dst.requires_grad_(False)
    before = [t.data_ptr() for t in misc.params_and_buffers(dst)]
    misc.copy_params_and_buffers(src, dst, require_all=True)
    for (name, a), (_, b) in zip(misc.named_params_and_buffers(src), misc.named_params_and_buffers(dst)):
        assert torch.equal(a, b), name
    assert [t.data_ptr() for t in misc.params_and_buffers(dst)] == before
    assert not dst[0].weight.requires_grad and src[0].weight.requires_grad
    assert [n for n, _ in misc.named_params_and_buffers(src)][:2] == ["0.weight", "0.bias"]

    misc.copy_params_and_buffers(src[:1], small_module())
    with pytest.raises(ValueError, match="lacks"):
        misc.copy_params_and_buffers(src[:1], small_module(), require_all=True)
    target = small_module(4)
    untouched = target[0].weight.clone()
    with pytest.raises(ValueError, match=r"\(3, 2\) in the source, \(4, 2\)"):
        misc.copy_params_and_buffers(src, target)
    assert torch.equal(target[0].weight, untouched)


def test_module_summary(capsys) -> None:
    stream = io.StringIO()
    out = misc.print_module_summary(small_module().eval(), [torch.zeros(5, 2)], file=stream)
    lines = stream.getvalue().splitlines()
    assert out.shape == (5, 3) and len(lines) == 4
    assert lines[1].split()[:2] == ["0", "9"] and lines[-1].split()[:3] == ["Sequential", "15", "7"]
    misc.print_module_summary(small_module().eval(), [torch.zeros(5, 2)], max_nesting=0)
    assert capsys.readouterr().out == ""


def test_keep_freed_memory(monkeypatch) -> None:
    assert isinstance(misc.keep_freed_memory(), bool)
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(20):  # fresh memory would cost 32 MiB of page faults every time
        torch.ones(2**23)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert not misc.keep_freed_memory() or after.ru_minflt - before.ru_minflt < 10 * 2**25 // 4096

    def refuse(_):
        raise OSError("no library")

    monkeypatch.setattr(misc.ctypes, "CDLL", refuse)
    assert misc.keep_freed_memory() is False

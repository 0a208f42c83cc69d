"""`stylegan_rooted.watch`: the live report answers on this machine only, to fixed paths only, and follows the run."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_runs import make_run, metric_row, stat_rows, tiles, write_lines

from stylegan_rooted import watch
from stylegan_rooted.cli import main
from torch_utils import images

SECRET = "the-secret-beside-the-run"


@contextlib.contextmanager
def serving(run: Path, refresh_sec: float = 0) -> Iterator[watch.Server]:
    """A server of a run's pages; it and its thread end with the block."""
    server = watch.serve(watch.Watched(run, refresh_sec=refresh_sec), 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(server: watch.Server, target: str, *, method: str = "GET", hosts: list[str] | None = None) -> tuple[int, str]:
    """(status, everything that came) of one raw request; nothing in it is cleaned up on the way."""
    hosts = [f"127.0.0.1:{server.server_port}"] if hosts is None else hosts
    lines = [f"{method} {target} HTTP/1.1", *(f"Host: {host}" for host in hosts), "Connection: close", "", ""]
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    text = answer.decode("utf-8", "replace")
    return int(text.split()[1]) if text.startswith("HTTP/") else 0, text


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text(SECRET)
    return make_run(tmp_path / "00000-run", history=("started",))


def test_pages_are_served_with_headers_that_keep_others_out(run: Path) -> None:
    with serving(run) as server:
        assert server.server_address[0] == "127.0.0.1" and server.url.startswith("http://127.0.0.1:")
        for path, kind in watch.TYPES.items():
            code, text = ask(server, path)
            assert code == 200 and f"Content-Type: {kind}" in text, path
            for words in ("frame-ancestors 'none'", "nosniff", "no-store", "Cross-Origin-Resource-Policy: same-origin"):
                assert words in text
        facts = json.loads(ask(server, "/report.json")[1].split("\r\n\r\n", 1)[1])
        assert facts["subjects"][0]["name"] == "00000-run" and len(facts["subjects"][0]["stages"]) == 3
        assert "Is it working?" in ask(server, "/")[1] and "connect-src 'self'" in ask(server, "/")[1]
        code, text = ask(server, "/", method="HEAD")
        assert code == 200 and text.endswith("\r\n\r\n") and ask(server, "/", hosts=[f"LOCALHOST:{server.server_port}"])
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(server, "/", method=method)[0] == 405
        assert ask(server, "/", method="BREW")[0] == 501
        assert ask(server, "/?x=/../secret.txt")[0] == ask(server, "/version?1")[0] == 200
        assert [ask(server, "/", hosts=[name])[0] for name in ("127.0.0.1", "localhost")] == [200, 200]


def test_no_other_path_can_be_read(run: Path) -> None:
    (run / "link.txt").symlink_to(run.parent / "secret.txt")
    up = ["../secret.txt", "%2e%2e/secret.txt", "..%2fsecret.txt", "%252e%252e%252fsecret.txt", "..\\secret.txt"]
    up += ["..%5csecret.txt", "....//secret.txt", "%c0%ae%c0%ae/secret.txt", "link.txt", "\x00/../secret.txt"]
    absolute = str(run.parent / "secret.txt")
    targets = [f"/{name}" for name in up] + [absolute, f"/{absolute}", f"file://{absolute}", f"http://x{absolute}", "*"]
    targets += ["/training_options.json", "/stats.jsonl", "/secret.txt?/", "/report.json/"]
    targets += ["/report.html", "/%72eport.json", "/report.json%00", "/./", "/network-snapshot-000004.pkl"]
    with serving(run) as server:
        for target in targets:
            code, text = ask(server, target)
            assert code in (400, 404), (target, code)
            assert SECRET not in text and "schedule" not in text


def test_other_hosts_are_refused(run: Path) -> None:
    with serving(run) as server:
        port = server.server_port
        for hosts in (
            [],
            ["evil.example"],
            [f"evil.example:{port}"],
            [f"127.0.0.1.evil.example:{port}"],
            [f"127.0.0.1:{port + 1}"],
            [f"127.0.0.1:{port}", f"evil.example:{port}"],
            [f"127.0.0.1:{port}@evil.example"],
            ["127.0.0.1:"],
            [""],
        ):
            code, text = ask(server, "/", hosts=hosts)
            assert code == 403 and "Is it working?" not in text, hosts


def test_links_out_of_the_run_show_nothing(run: Path, tmp_path: Path) -> None:
    images.save_grid(tmp_path / "private.png", tiles(40, seed=99), (8, 5))
    (run / "fakes000003.png").symlink_to(tmp_path / "private.png")
    (run / "environment.json").unlink()
    (tmp_path / "other.json").write_text(json.dumps({"command": [SECRET]}))
    (run / "environment.json").symlink_to(tmp_path / "other.json")
    options = json.loads((run / "training_options.json").read_text())
    options["data"]["path"] = str(tmp_path)  # a run may name any folder as its data: watching reads none
    (run / "training_options.json").write_text(json.dumps(options))
    with serving(run) as server:
        text = ask(server, "/report.json")[1]
        assert SECRET not in text and text.count("leads out of the folder") == 2
        assert "fakes000002" in text and "-stage-fakes000003" not in text


def test_it_follows_the_run_and_survives_its_end(run: Path) -> None:
    with serving(run) as server:
        first = ask(server, "/version")[1].split("\r\n\r\n")[1]
        assert first == ask(server, "/version")[1].split("\r\n\r\n")[1]
        write_lines(run / "stats.jsonl", stat_rows(7))
        assert "4.81 of 4 kimg" in ask(server, "/status")[1]
        assert ask(server, "/version")[1].split("\r\n\r\n")[1] != first
        for file in run.iterdir():
            file.unlink()
        run.rmdir()
        assert ask(server, "/")[0] == 503


def test_pages_are_made_again_only_when_something_changed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    compose = watch.report.compose_from_files
    monkeypatch.setattr(watch.report, "compose_from_files", lambda *a, **k: made.append(1) or compose(*a, **k))
    monkeypatch.setattr(watch.time, "time", lambda: 1e9)
    watched = watch.Watched(run, refresh_sec=0)
    for _ in range(3):
        watched.pages()
    assert len(made) == 1
    (run / "stats.jsonl").write_text("")
    watched.pages()
    assert len(made) == 2


def test_the_line_is_said_when_it_changes(run: Path) -> None:
    said: list[str] = []
    waits = 0

    def stop(seconds: float) -> bool:
        nonlocal waits
        waits += 1
        if waits == 2:
            write_lines(run / "metric-fd.jsonl", [metric_row("fd", 4.0, 3.5)])
        return waits == 4

    watch.follow(watch.Watched(run, refresh_sec=0), said.append, stop=stop)
    assert len(said) == 2 and said[0].count(" | ") == 4
    assert said[0].startswith(
        "00000-run: running, 4.01 of 4 kimg (100%) | 9.5 s/kimg | healthy | best FD 5 ± 0.2 at 4 k"
    )
    assert "best FD 3.5" in said[1] and "\n" not in said[1]


def test_a_terminal_gets_no_control_characters(tmp_path: Path) -> None:
    run = make_run(tmp_path / "00000-\x1b[31m\x07", values=())
    write_lines(run / "metric-x.jsonl", [metric_row("\x1b]0;x\x07", 4.0, 3.5)])
    assert watch.Watched(run).pages().line.isprintable()


def test_command_line(run: Path, capsys: pytest.CaptureFixture) -> None:
    main(["watch", str(run), "--once"])
    out = capsys.readouterr().out
    assert out.startswith("00000-run: ") and out.count("\n") == 1
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for argv, code, words in (
            (["watch", str(run), "--port", port], 1, "--port"),
            (["watch", str(run), "--once", "--terminal"], 2, "--once"),
            (["watch", str(run.parent)], 1, "no run folder"),
            (["watch", str(run / "no")], 1, "no such folder"),
        ):
            with pytest.raises(SystemExit) as stop:
                main(argv)
            err = capsys.readouterr().err
            assert stop.value.code == code and words in err and err.count("\n") == 1, err

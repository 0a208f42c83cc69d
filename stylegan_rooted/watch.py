"""A run's report, live: a server on 127.0.0.1 that makes the page anew as the run goes, and a line for terminals.

Answers to a handful of fixed paths and opens no file by a name that a request holds. The page comes from the run's own
small files (`report.compose_from_files`), which reads nothing outside its folder. Only requests that name this server
as their host are answered: a page from elsewhere cannot read the report through a name of its own (DNS rebinding).
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from stylegan_rooted import report, report_page, report_text
from stylegan_rooted.report_charts import number

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
REFRESH_SEC = 10
IDLE_SEC = 15  # after which a silent connection is closed
TYPES = {"/": "text/html", "/report.json": "application/json", "/report.md": "text/markdown", "/version": "text/plain"}
TYPES |= {"/status": "text/plain"}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Pages:
    """What the server has to give: content by path, and the run's status line."""

    content: dict[str, bytes]
    line: str


class Watched:
    """The pages of one run, made anew at most every `refresh_sec`; shared by the server's threads."""

    def __init__(self, path: Path, *, refresh_sec: float = REFRESH_SEC, flags: dict[str, str] | None = None) -> None:
        self._path, self._refresh_sec, self._flags = path, refresh_sec, flags or {}
        self._lock = threading.Lock()
        self._made_at = -1.0
        self._state: Any = None
        self._pages = self._make()

    def pages(self) -> Pages:
        """The newest pages; made again where files of the run have changed since."""
        with self._lock:
            if time.monotonic() - self._made_at >= self._refresh_sec:
                self._pages = self._make()
            return self._pages

    def _make(self) -> Pages:
        state = _state_of(self._path)
        self._made_at = time.monotonic()
        if state == self._state:
            return self._pages
        made = report.compose_from_files(self._path, flags=self._flags)
        self._state = state
        refresh_sec = max(round(self._refresh_sec), 1)
        line = status_line(made.facts)
        texts = {
            "/": report.page(made, refresh_sec=refresh_sec),
            "/report.json": json.dumps(made.facts, indent=2) + "\n",
            "/report.md": report_text.render(made.facts),
            "/version": report_page.version(made.facts),
            "/status": line + "\n",
        }
        return Pages({path: text.encode("utf-8", "replace") for path, text in texts.items()}, line)


def status_line(facts: dict[str, Any]) -> str:
    """The run in one line: how far, how fast, what state, which figure."""
    subject = facts["subjects"][0]
    run = subject["run"]
    parts = [f"{subject['name']}: {run['status']}, {number(run['kimg'])}"]
    if run["total_kimg"]:
        parts[0] += f" of {number(run['total_kimg'])} kimg ({min(run['kimg'] / run['total_kimg'], 1):.0%})"
    else:
        parts[0] += " kimg"
    if run["sec_per_kimg"]:
        parts.append(f"{number(run['sec_per_kimg'])} s/kimg")
    parts.append(run["state"])
    if run["best"]:
        error = run["best"]["std_error"]
        value = number(run["best"]["value"]) + (f" ± {error:.2g}" if error is not None else "")
        parts.append(f"best {run['best']['metric']} {value} at {number(run['best']['kimg'])} kimg")
    parts.append("stop: " + report_page.first_words(run["answer"]["stop"])[0].lower())
    line = " | ".join(" ".join(part.split()) for part in parts)
    return "".join(c if c.isprintable() else "?" for c in line)  # terminals obey control characters


def serve(watched: Watched, port: int) -> "Server":
    """A server of these pages on 127.0.0.1; `port` 0 takes a free one. Its `serve_forever` answers requests.

    Raises:
        OSError: The port is taken.
    """
    try:
        return Server(watched, port)
    except OSError as error:
        remedy = "choose another with --port, or 0 for any free one"
        raise OSError(error.errno, f"port {port} of {HOST} cannot be used ({error.strerror}); {remedy}") from error


def follow(watched: Watched, say: Say, *, stop: Callable[[float], bool], refresh_sec: float = REFRESH_SEC) -> None:
    """Say the status line whenever it changes, until `stop(seconds)`, which waits, says so."""
    said = None
    while True:
        line = watched.pages().line
        if line != said:
            say(line)
            said = line
        if stop(refresh_sec):
            return


class Server(ThreadingHTTPServer):
    """Threads end with the process: a client that says nothing holds nothing up."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, watched: Watched, port: int) -> None:
        self.watched = watched
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        """Where it can be reached, on this machine only."""
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no event."""


class _Handler(BaseHTTPRequestHandler):
    """Fixed paths only; everything else is 404, other hosts 403, other methods 405."""

    server: Server
    timeout = IDLE_SEC  # HTTP/1.0, a connection per request: none outlives the server

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _refuse(self) -> None:
        self.close_connection = True
        self._send(405, "text/plain", b"GET and HEAD only\n", body=True)

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse

    def _answer(self, *, body: bool) -> None:
        allowed = {f"{name}{port}" for name in NAMES for port in ("", f":{self.server.server_port}")}
        path = self.path.split("?", 1)[0]
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].strip().lower() not in allowed:
            self.close_connection = True
            self._send(403, "text/plain", b"this server answers on 127.0.0.1 only\n", body=body)
        elif path not in TYPES:
            self._send(404, "text/plain", b"nothing here\n", body=body)
        else:
            try:
                content = self.server.watched.pages().content[path]
            except (OSError, ValueError) as error:  # the folder went away
                self._send(503, "text/plain", f"{' '.join(str(error).split())}\n".encode(), body=body)
                return
            self._send(200, TYPES[path], content, body=body)

    def _send(self, code: int, kind: str, content: bytes, *, body: bool) -> None:
        self.send_response(code)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(content)),
            "Content-Security-Policy": f"{report_page.policy(live=True)}; frame-ancestors 'none'",
            "Cache-Control": "no-store",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def version_string(self) -> str:
        return "stylegan-rooted"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are nobody's business."""


def _state_of(path: Path) -> Any:
    """Changes whenever a file of the run does; its age counts too, as a silent run becomes an interrupted one."""
    minutes = int(time.time() // 60)
    try:
        files = [(entry.name, entry.stat().st_mtime_ns, entry.stat().st_size) for entry in sorted(path.iterdir())]
    except OSError:
        files = []
    return minutes, files

"""A web server on this machine that gives a test's answers."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """The server's answer to one request."""

    body: bytes = b""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()  # a Content-Length replaces the true one
    before: Callable[[], object] = lambda: None


class Server(ThreadingHTTPServer):
    """Gives the answers of a path in turn and then the last; `otherwise` for other paths."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, list[Answer]] = {}
        self.otherwise = Answer(status=404)
        self.requests: list[str] = []

    def add(self, path: str, *answers: Answer) -> str:
        """Set the answers of a path, and return its URL."""
        self.answers[path] = list(answers)
        return f"http://127.0.0.1:{self.server_port}{path}"


class QuietHandler(BaseHTTPRequestHandler):
    """Logs nothing."""

    def log_message(self, *_: object) -> None:
        pass


class _Handler(QuietHandler):
    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        left = self.server.answers.get(self.path, [self.server.otherwise])
        answer = left.pop(0) if len(left) > 1 else left[0]
        answer.before()
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(answer.body)), **dict(answer.headers)}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)


@contextmanager
def serve(kind: type = Server) -> Iterator[Any]:
    """Run a server of a kind during the `with` block."""
    with kind() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()

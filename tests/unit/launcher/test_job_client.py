"""Knock at real little HTTP servers that answer as a Ray head would, or would not."""

import http.server
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import AuthenticationError

from launcher import job_client
from launcher.errors import LaunchError
from launcher.job_client import (
    Head,
    connect_to_head,
    explained,
    find_token,
    normalize_address,
    read_log,
)


class _Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        given = self.headers.get("Authorization")
        server.seen.append(given)
        status = 200
        if server.token is not None:
            status = 401 if given is None else 200 if given == f"Bearer {server.token}" else 403
        self.send_response(status)
        self.end_headers()
        self.wfile.write(server.body.encode() if status == 200 else b"Unauthorized")

    def log_message(self, *_):
        pass


@contextmanager
def serving(body: str, token: str | None = None) -> Iterator[SimpleNamespace]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    server.body, server.token, server.seen = body, token, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        yield SimpleNamespace(address=address, seen=server.seen)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


RAY = json.dumps({"version": "4", "ray_version": version("ray"), "ray_commit": "c"})


@pytest.fixture(autouse=True)
def _no_token_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_head_without_a_token_gets_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    with serving(RAY) as server:
        assert connect_to_head(server.address).address == server.address
        assert server.seen[0] is None


def test_ray_address_does_not_overrule_the_one_that_is_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with serving(RAY) as server:
        assert connect_to_head(server.address.removeprefix("http://")).jobs is not None
        assert len(server.seen) >= 2  # ours, and that of Ray's client
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:1"


def test_the_token_is_sent_when_asked_for(tmp_path: Path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret\n")
    with serving(RAY, token="secret") as server:
        connect_to_head(server.address)
        assert server.seen[:2] == [None, "Bearer secret"]
        assert set(server.seen[1:]) == {"Bearer secret"}


@pytest.mark.parametrize("named", [None, "wrong"])
def test_a_missing_and_a_wrong_token_are_told_apart(named, monkeypatch, tmp_path: Path):
    if named is not None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", named)
    with serving(RAY, token="secret") as server, pytest.raises(LaunchError) as caught:
        connect_to_head(server.address)
    said = str(caught.value)
    assert server.address in said
    if named is None:
        assert f"{tmp_path / '.ray' / 'auth_token'} does not exist" in said
    else:
        assert "does not accept the token from RAY_AUTH_TOKEN" in said
        assert "wrong" not in said


@pytest.mark.parametrize("body", ["<html>grafana</html>", "[]", '{"ray_version": 3}', ""])
def test_another_server_is_not_a_dashboard(body: str):
    with serving(body) as server, pytest.raises(LaunchError, match="not a Ray dashboard"):
        connect_to_head(server.address)


def test_another_version_of_ray_is_refused_with_both():
    other = json.dumps({"ray_version": "2.9.0"})
    with serving(other) as server, pytest.raises(LaunchError) as caught:
        connect_to_head(server.address)
    assert "runs Ray 2.9.0" in str(caught.value)
    assert version("ray") in str(caught.value)


def test_nothing_there_is_said_within_seconds():
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(LaunchError, match=f"no Ray head answers at http://{address}"):
            connect_to_head(address)


def test_what_does_not_speak_http_is_not_a_dashboard():
    """Such as port 6379, which speaks gRPC."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"\x00\x00\x18\x04\x00\n\x00\x00\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(LaunchError, match=r"no HTTP.*6379"):
            connect_to_head(f"127.0.0.1:{listener.getsockname()[1]}")
        thread.join()


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("head:8265", "http://head:8265"),
        ("https://ray.example.org/", "https://ray.example.org"),
        ("http://10.0.0.1:8265/cluster/a/", "http://10.0.0.1:8265/cluster/a"),
        ("[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_addresses(given: str, normal: str):
    assert normalize_address(given) == normal


@pytest.mark.parametrize(
    "given", ["", "http://", "ray://head:10001", "head:99999", "a b", "head:port", "http://u@h"]
)
def test_addresses_that_are_none(given: str):
    with pytest.raises(LaunchError, match="HEAD:8265"):
        normalize_address(given)


def test_an_empty_token_file_is_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "token"
    path.write_text(" \n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert find_token() == (None, f"{path} is empty")
    path.write_text("t\n")
    assert find_token() == ("t", str(path))


@pytest.mark.parametrize(
    ("raised", "part"),
    [
        (AuthenticationError("x"), "no longer accepts the token"),
        (ConnectionError("gone"), "broke while stopping: gone"),
        (RuntimeError("Request failed:\n Traceback\nValueError: cause\n."), "ValueError: cause"),
        (RuntimeError(""), "no reason given"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_job_api_raises_is_one_line(raised: Exception, part: str):
    with pytest.raises(LaunchError, match=part), explained(Head("http://h", None), "stopping"):
        raise raised


class _Tailed:
    """A job whose log connection breaks; the log always begins anew, in chunks of its own."""

    def __init__(self, connections: list) -> None:
        self.connections = connections
        self.is_terminal = False

    async def tail_job_logs(self, job_id: str):
        assert job_id == "demo-a1"
        for chunk in self.connections.pop(0):
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk
        self.is_terminal = not self.connections

    def get_job_info(self, job_id: str):
        return SimpleNamespace(status=SimpleNamespace(is_terminal=lambda: self.is_terminal))


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job_client, "_SECONDS_BETWEEN_TAILS", 0.0)


@pytest.mark.usefixtures("_impatient")
def test_a_log_is_shown_once_though_the_connection_breaks():
    broken = RuntimeError("WebSocket connection closed unexpectedly")
    jobs = _Tailed([["a\n", "b\nc", broken], ["a\nb\n", "c\n"], ["a\nb\nc\nd\n"]])
    written: list[str] = []
    read_log(Head("http://h", jobs), "demo-a1", written.append)
    assert "".join(written) == "a\nb\nc\nd\n"


@pytest.mark.usefixtures("_impatient")
def test_a_head_that_is_gone_ends_the_following():
    jobs = _Tailed([["a\n", OSError("refused")], *([OSError("refused")] for _ in range(9))])
    with pytest.raises(LaunchError, match=r"refused.*logs demo-a1 --follow"):
        read_log(Head("http://h", jobs), "demo-a1", lambda _: None)
    assert len(jobs.connections) == 9 - job_client._MAX_TAIL_FAILURES

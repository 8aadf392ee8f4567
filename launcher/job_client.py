"""Talk to the dashboard of a Ray cluster: its job API, in plain words when something is wrong.

``connect_to_head`` knocks first with a deadline of its own, so that a wrong address, a server
that is no Ray, another version of Ray or a missing token is one message within seconds.
"""

from __future__ import annotations

import asyncio
import http.client
import importlib.metadata
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from launcher.errors import LaunchError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"

_KNOCK_TIMEOUT_S = 10.0
_LARGEST_PORT = 65535
_TOKEN_PATH = Path(".ray") / "auth_token"
_UNAUTHORIZED = (401, 403)
_MAX_TAIL_FAILURES = 5
_SECONDS_BETWEEN_TAILS = 1.0
# Ray lets these overrule an address that is given in the call.
_OVERRULING = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
# They say at level INFO what a user need not know.
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


class JobInfo(Protocol):
    """What the job API says of a job."""

    submission_id: str | None
    status: Any
    """A ``str`` enumeration with ``is_terminal()``."""
    message: str | None
    start_time: int | None
    """Milliseconds since 1970."""
    end_time: int | None
    metadata: dict[str, str] | None
    driver_exit_code: int | None


class JobApi(Protocol):
    """The part of ``ray.job_submission.JobSubmissionClient`` that is used here."""

    def submit_job(
        self,
        *,
        entrypoint: str,
        runtime_env: dict[str, Any],
        metadata: dict[str, str],
        submission_id: str,
    ) -> str:
        """Upload the working folder and start the job."""

    def list_jobs(self) -> list[Any]:
        """Return every job the cluster remembers."""

    def get_job_info(self, job_id: str) -> Any:
        """Return one job."""

    def get_job_logs(self, job_id: str) -> str:
        """Return all that a job has written."""

    def tail_job_logs(self, job_id: str) -> Any:
        """Return an asynchronous iterator over what a job writes, from the beginning."""

    def stop_job(self, job_id: str) -> bool:
        """Ask a job to end."""


@dataclass(frozen=True)
class Head:
    """A dashboard that has answered."""

    address: str
    """``http://host:port``."""
    jobs: JobApi


def connect_to_head(address: str | None) -> Head:
    """Connect to the job API of the head at ``address``.

    The token, where the head asks for one, is the value of ``RAY_AUTH_TOKEN``, or else the content
    of the file ``RAY_AUTH_TOKEN_PATH``, or of ``~/.ray/auth_token``, as Ray itself looks for it.
    It is sent only after the head has asked.

    Raises
    ------
    LaunchError
        When nothing answers, when what answers is not a Ray dashboard or runs another version of
        Ray, and when the token is missing or wrong.
    """
    url = normalize_address(address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS)
    status, body = _get(f"{url}/api/version", {}, url)
    headers: dict[str, str] = {}
    if status in _UNAUTHORIZED:
        token, source = find_token()
        if token is None:
            raise LaunchError(
                f"the Ray head at {url} asks for a token, and there is none here: {source}. Copy "
                "~/.ray/auth_token of the head to the same place on this machine, or set "
                "RAY_AUTH_TOKEN"
            )
        headers = {"Authorization": f"Bearer {token}"}
        status, body = _get(f"{url}/api/version", headers, url)
        if status in _UNAUTHORIZED:
            raise LaunchError(
                f"the Ray head at {url} does not accept the token from {source}: it belongs to "
                "another cluster, or the head was started anew. Copy ~/.ray/auth_token of that "
                "head to the same place on this machine, or set RAY_AUTH_TOKEN"
            )
    _refuse_other_ray(_ray_version(status, body, url), url)
    return Head(url, _open_client(url, headers))


def normalize_address(address: str) -> str:
    """Return ``http://host:port`` without a trailing slash; ``http`` is taken if none is given.

    Raises
    ------
    LaunchError
        For an address of another kind, such as ``ray://`` or one without a host.
    """
    scheme, separator, rest = address.strip().rpartition("://")
    if separator and scheme not in ("http", "https"):
        raise LaunchError(
            f"--address {address}: jobs go to the head's dashboard, over http:// or https://, "
            "such as http://HEAD:8265"
        )
    rest = rest.rstrip("/")
    match = re.fullmatch(r"(?:\[[0-9a-fA-F:.]+\]|[^\s/:@?#]+)(?::(\d+))?(?:/[^\s?#]*)?", rest)
    if match is None or int(match.group(1) or 0) > _LARGEST_PORT:
        raise LaunchError(f"--address {address!r} is not an address such as http://HEAD:8265")
    return f"{scheme or 'http'}://{rest}"


def find_token() -> tuple[str | None, str]:
    """Return the token, and where it was found or should have been."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / _TOKEN_PATH)
    try:
        token = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None, f"{path} does not exist"
    except (OSError, UnicodeDecodeError) as error:
        return None, f"{path} cannot be read ({error})"
    return (token, str(path)) if token else (None, f"{path} is empty")


@contextmanager
def explained(head: Head, doing: str) -> Iterator[None]:
    """Turn what the job API raises while the block runs into one plain message."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        raise LaunchError(
            f"the Ray head at {head.address} no longer accepts the token, while {doing}: it was "
            "probably started anew. Copy its ~/.ray/auth_token here and try again"
        ) from None
    except (ConnectionError, requests.RequestException, aiohttp.ClientError) as error:
        raise LaunchError(
            f"the connection to the Ray head at {head.address} broke while {doing}: {error}. See "
            "whether it still runs: statewide list --address " + head.address
        ) from None
    except RuntimeError as error:
        # The server's traceback comes with its own lines; the cause is the last that has words.
        lines = [line for line in str(error).splitlines() if re.search(r"\w", line)]
        raise LaunchError(
            f"{doing} at {head.address} failed: {lines[-1] if lines else 'no reason given'}"
        ) from None


def read_log(head: Head, job_id: str, write: Callable[[str], object]) -> None:
    """Write out what a job writes until it ends; a connection that breaks is opened again.

    Raises
    ------
    LaunchError
        When the connection breaks again and again without bringing anything new.
    """
    log = _Log(head.jobs, job_id, write)
    failures = 0
    while True:
        before = log.num_shown
        try:
            asyncio.run(log.tail())
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            failures = 0 if log.num_shown > before else failures + 1
            if failures == _MAX_TAIL_FAILURES:
                raise LaunchError(
                    f"the log of {job_id} cannot be followed at {head.address}: {error}. The job "
                    f"goes on by itself; look again: statewide logs {job_id} --follow --address "
                    f"{head.address}"
                ) from None
        else:
            with explained(head, f"asking for the state of {job_id}"):
                if head.jobs.get_job_info(job_id).status.is_terminal():
                    return
        time.sleep(_SECONDS_BETWEEN_TAILS)


class _Log:
    """The log of one job; the head always begins anew, so what was shown before is left out."""

    def __init__(self, jobs: JobApi, job_id: str, write: Callable[[str], object]) -> None:
        self._jobs, self._job_id, self._write = jobs, job_id, write
        self.num_shown = 0
        """Characters."""

    async def tail(self) -> None:
        """Write what is new until the head closes the connection."""
        seen = 0
        async for chunk in self._jobs.tail_job_logs(self._job_id):
            new = chunk[max(0, self.num_shown - seen) :]
            seen += len(chunk)
            self.num_shown = max(self.num_shown, seen)
            if new:
                self._write(new)


def _get(url: str, headers: Mapping[str, str], address: str) -> tuple[int, str]:
    request = urllib.request.Request(url, headers=dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=_KNOCK_TIMEOUT_S) as answer:
            return answer.status, answer.read(65536).decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, ""
    except http.client.HTTPException:
        return 0, ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise LaunchError(
            f"no Ray head answers at {address}: {reason}. Check that the head was started with "
            "--dashboard-host=0.0.0.0 and that this machine reaches its port (8265 unless set "
            "otherwise), or tunnel: ssh -L 8265:127.0.0.1:8265 HEAD"
        ) from None


def _ray_version(status: int, body: str, address: str) -> str:
    try:
        version = json.loads(body)["ray_version"]
    except (ValueError, KeyError, TypeError):
        version = None
    if not isinstance(version, str):
        raise LaunchError(
            f"what answers at {address} is not a Ray dashboard "
            f"({f'HTTP status {status}' if status else 'no HTTP'}, no Ray version). Give the "
            "dashboard's address, such as http://HEAD:8265, not the port 6379 of ray start"
        )
    return version


def _refuse_other_ray(theirs: str, address: str) -> None:
    ours = importlib.metadata.version("ray")
    if theirs != ours:
        raise LaunchError(
            f"the head at {address} runs Ray {theirs}, this machine has {ours}; they must be "
            f"equal. Install the head's here (pip install 'ray[default,train]=={theirs}') or "
            "build the cluster from constraints.txt"
        )


def _open_client(url: str, headers: dict[str, str]) -> JobApi:
    from ray.job_submission import JobSubmissionClient

    for module in _TALKATIVE:
        logging.getLogger(module).setLevel(logging.WARNING)
    hidden = {name: os.environ.pop(name) for name in _OVERRULING if name in os.environ}
    try:
        client: JobApi = JobSubmissionClient(url, headers=headers)
    finally:
        os.environ.update(hidden)
    return client

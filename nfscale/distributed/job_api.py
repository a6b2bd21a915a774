"""Ray's Job API: a cluster's jobs, their logs, and who may submit.

Dangers, each guarded here:
- The Job API runs any command for anyone who reaches it. A token is sent where the environment says so; the one in the
  home folder is sent to this machine alone, never to whoever answers at an address with a typing error in it.
- A broken connection looks like a cluster that died. Both are an `UnreachableError`; whoever catches it asks again.
- Ray's client waits for ever, and its errors are tracebacks of the server: here they are a line, after seconds.
"""

import asyncio
import contextlib
import ipaddress
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nfscale.errors import CallerError, NfscaleError

_ANSWER_SECONDS = 10.0  # for a cluster to answer at all
_SILENCE_SECONDS = 60.0  # an encode prints a line every ten seconds; after this much silence the cluster is asked
_POLL_SECONDS = 0.5
_CHATTY = ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging")
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class UnreachableError(NfscaleError):
    """No cluster answers at the address, or none does any more."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job as the cluster knows it."""

    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    exit_code: int | None = None
    """Of the encode; negative if a signal ended it, None if it has not ended or its node is lost."""
    name: str | None = None
    output: str | None = None
    started_at: float | None = None
    """Seconds since the epoch."""
    ended_at: float | None = None
    message: str = ""

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDED


# --- the address


def dashboard_address(address: str | None) -> str:
    """The address of a cluster's dashboard as a URL.

    Raises:
        CallerError: if there is none, or it is not one of a dashboard.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS", "")
    if not address:
        raise CallerError("no cluster: give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS")
    if "://" not in address:
        address = f"http://{address}"
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise CallerError(f"cannot submit to {address!r}; give the address of Ray's dashboard, http://HEAD:8265")
    return address.rstrip("/")


def is_loopback(address: str) -> bool:
    """Whether an address is of this machine alone (or of a tunnel that begins here)."""
    host = urllib.parse.urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may begin with 127. and be anyone's
        return False


def _token(address: str) -> str | None:
    """The token to send, where Ray's own variables, or the rule for this machine, give one."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not named and os.environ.get("RAY_AUTH_MODE") != "token" and not is_loopback(address):
        return None
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip() or None
    except OSError as error:
        if named:
            raise CallerError(f"cannot read RAY_AUTH_TOKEN_PATH={named}: {error.strerror or error}") from error
        return None


def _headers(address: str) -> dict[str, str]:
    """What proves to the cluster that one may submit; nothing where it does not ask.

    Raises:
        CallerError: if it wants a token that is not here, or another one.
        UnreachableError: if nothing answers.
    """
    if _answer(address, {}) not in (401, 403):
        return {}
    token = _token(address)
    if token is None:
        raise CallerError(
            f"the cluster at {address} wants a token; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it"
        )
    headers = {"Authorization": f"Bearer {token}"}
    if _answer(address, headers) in (401, 403):
        raise CallerError(f"the cluster at {address} refuses the token; set RAY_AUTH_TOKEN to its own")
    return headers


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token is for the address that was given, not for where that points to."""

    def redirect_request(self, *_: Any) -> None: ...


_OPENER = urllib.request.build_opener(_NoRedirect)


def _answer(address: str, headers: dict[str, str]) -> int:
    """The status with which the Job API of an address answers."""
    request = urllib.request.Request(f"{address}/api/version", headers=headers)
    try:
        with _OPENER.open(request, timeout=_ANSWER_SECONDS) as response:
            return response.status
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return error.code
        raise UnreachableError(
            f"what answers at {address} is no Ray dashboard (status {error.code}); give http://HEAD:8265"
        ) from error
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise UnreachableError(f"no Ray cluster answers at {address} ({reason}); is its head up?") from error
    except ValueError as error:  # http.client, of something that speaks another protocol
        raise UnreachableError(f"what answers at {address} does not speak HTTP; give http://HEAD:8265") from error


# --- Ray's client


class RayCluster:
    """The Job API of a cluster.

    Raises:
        CallerError: if it wants a token that is not here, or another one.
        UnreachableError: if nothing answers at the address.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        headers = _headers(address)
        try:
            import aiohttp  # noqa: F401 (Ray's client follows logs with it, and says so late)
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise CallerError(f"submitting needs more of Ray ({error}): pip install 'nfscale[cluster]'") from error

        for chatty in _CHATTY:
            logging.getLogger(f"ray.{chatty}").setLevel(logging.WARNING)
        with self._said():
            self._client: Any = JobSubmissionClient(address, headers=headers)

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        """Errors of Ray's client in a line."""
        import aiohttp
        import requests

        try:
            yield
        except (ConnectionError, requests.RequestException, aiohttp.ClientError, TimeoutError) as error:
            raise UnreachableError(f"the cluster at {self.address} no longer answers ({_line(error)})") from error
        except RuntimeError as error:
            text = str(error)
            if "does not exist" in text:
                raise CallerError(
                    f"{_between(text, 'Job', 'does not exist')}; `nfscale jobs` lists those that do"
                ) from None
            if "already exists" in text:
                raise CallerError(_between(text, "Job with submission_id", "already exists")) from None
            raise UnreachableError(f"the cluster at {self.address} could not do this: {_line(error)}") from error

    def jobs(self) -> list[SubmittedJob]:
        """All submitted jobs that the cluster remembers, the latest first."""
        with self._said():
            known = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(known, key=lambda job: -(job.started_at or 0.0))

    def job(self, job_id: str) -> SubmittedJob:
        """One job.

        Raises:
            CallerError: if the cluster has no such job.
        """
        with self._said():
            return _job(self._client.get_job_info(job_id))

    def submit(self, job_id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> None:
        """Send a job.

        Raises:
            CallerError: if the id is taken, or the environment cannot be packed.
        """
        try:
            with self._said():
                self._client.submit_job(
                    entrypoint=entrypoint, submission_id=job_id, runtime_env=runtime_env, metadata=metadata
                )
        except (ValueError, TypeError, OSError) as error:
            raise CallerError(f"cannot pack the job's environment: {_line(error)}") from error

    def stop(self, job_id: str) -> bool:
        """Ask a job to leave in good order; False if it had ended before."""
        self.job(job_id)
        with self._said():
            return self._client.stop_job(job_id)

    def logs(self, job_id: str) -> str:
        """All that a job has printed so far."""
        self.job(job_id)
        with self._said():
            return self._client.get_job_logs(job_id)

    def follow(self, job_id: str, skip: int = 0) -> Iterator[str]:
        """What a job prints, without its first `skip` characters, piece by piece until it has ended.

        Raises:
            UnreachableError: if the cluster is lost on the way, or has forgotten the job.
        """
        while True:
            seen = 0
            for piece in self._tailed(job_id):
                fresh = piece[max(0, skip - seen) :]
                seen += len(piece)
                if fresh:
                    skip += len(fresh)
                    yield fresh
            try:
                if self.job(job_id).has_ended:
                    return
            except CallerError as error:
                raise UnreachableError(f"the cluster at {self.address} has forgotten {job_id}") from error
            time.sleep(_POLL_SECONDS)  # the tail was closed early: it begins anew, without what was shown

    def _tailed(self, job_id: str) -> Iterator[str]:
        loop = asyncio.new_event_loop()
        try:
            pieces = aiter(self._client.tail_job_logs(job_id))
            while True:
                coming = loop.create_task(anext(pieces))  # type: ignore[arg-type]
                with self._said():
                    while not loop.run_until_complete(asyncio.wait({coming}, timeout=_SILENCE_SECONDS))[0]:
                        _answer(self.address, self._client._headers)
                    try:
                        piece = coming.result()
                    except StopAsyncIteration:
                        return
                yield piece
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            with contextlib.suppress(Exception):
                loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()


def _job(details: Any) -> SubmittedJob:
    known = details.metadata or {}
    return SubmittedJob(
        id=details.submission_id,
        status=str(getattr(details.status, "value", details.status)),
        exit_code=details.driver_exit_code,
        name=known.get("nfscale.name"),
        output=known.get("nfscale.output"),
        started_at=details.start_time / 1000 if details.start_time else None,
        ended_at=details.end_time / 1000 if details.end_time else None,
        message=_line(details.message or "").partition(", last available logs")[0],
    )


def _line(error: object) -> str:
    return " ".join(str(error).split())[:500]


def _between(text: str, first: str, last: str) -> str:
    """The sentence of a traceback that runs from one word to another."""
    start = text.rfind(first)
    return text[start : text.find(last, start) + len(last)].strip()

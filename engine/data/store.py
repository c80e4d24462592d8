"""Reading from an object store (S3, Google Cloud, Azure, HTTP), and how patiently. The one module that imports obstore.

A store that is out of order is not a bad sample: whatever may pass (a 5xx, a timeout, a connection that is refused or
cut) is tried again until `patience_s` is over, and then StoreError ends the run, wherever it came from.
"""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

DEFAULT_CACHE_BYTES = 16 << 30

_log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# What obstore calls a store's options in the environment. Where client options are given in code, it reads none of the
# client's own from there, so they are read here.
_PREFIXES = {"s3": "AWS_", "s3a": "AWS_", "gs": "GOOGLE_", "az": "AZURE_", "http": "", "https": ""}
_CLIENT_OPTIONS = (
    "allow_http",
    "allow_invalid_certificates",
    "default_content_type",
    "default_headers",
    "http1_only",
    "http2_keep_alive_interval",
    "http2_keep_alive_timeout",
    "http2_keep_alive_while_idle",
    "http2_only",
    "pool_idle_timeout",
    "pool_max_idle_per_host",
    "proxy_ca_certificate",
    "proxy_excludes",
    "proxy_url",
    "randomize_addresses",
    "root_certificate",
    "user_agent",
)
_TIMEOUTS = ("timeout", "connect_timeout", "read_timeout")
_STATUS = re.compile(r"status code: (\d{3}) ?([^:\n]*)(?:.*?<Code>(\w+)</Code>)?", re.DOTALL)
_PASSING_STATUS = (408, 425, 429)
_UNSENDABLE = "builder error"  # the client itself refuses to make the request
_LONGEST_WAIT_S = 10.0
_WARN_EVERY_S = 30.0


class StoreError(RuntimeError):
    """An object store (or a file system) is out of reach, which says nothing about the samples in it."""


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How an object store is read.

    config: options of the store by their names in obstore ("endpoint", "region", "skip_signature", "allow_http", ...);
    they go before those of the environment (AWS_ENDPOINT_URL, AWS_REGION, AWS_SKIP_SIGNATURE, AWS_ALLOW_HTTP, ...).
    timeout_s: of one attempt. patience_s: how long attempts are repeated. connections: requests at a time.
    join_gap_bytes, join_bytes: samples that lie no further apart are read by one request, of at most so many bytes.
    read_ahead_bytes: how much is read ahead of the batch that is delivered, about.
    """

    config: Mapping[str, Any] = field(default_factory=dict, repr=False)  # it may hold secrets
    timeout_s: float = 20.0
    patience_s: float = 120.0
    connections: int = 64
    join_gap_bytes: int = 128 << 10
    join_bytes: int = 4 << 20
    read_ahead_bytes: int = 128 << 20

    def __post_init__(self) -> None:
        if given := [name for name in _TIMEOUTS if name in self.config]:
            raise ValueError(f"config has {given[0]!r}: give it as timeout_s")
        if self.timeout_s <= 0 or self.patience_s < 0 or self.connections < 1 or self.join_bytes < 1:
            raise ValueError(
                f"timeout_s={self.timeout_s}, patience_s={self.patience_s}, connections={self.connections}, "
                f"join_bytes={self.join_bytes}: expected positive numbers (patience_s may be 0)"
            )


def is_url(place: object) -> bool:
    """Whether a dataset's place is a URL and not a path."""
    return isinstance(place, str) and "://" in place


class ObjectStore:
    """The objects below one URL; usable from any number of threads. Raises ValueError for a URL that is none."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        import obstore.store

        parts = urlsplit(url)
        # A recipe keeps the URL, and messages show it: no secret may be part of it.
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                f"the URL of a dataset on {parts.hostname} has a user name, a query or a fragment: give the place "
                "alone, and credentials by the environment"
            )
        if parts.scheme not in _PREFIXES:
            raise ValueError(f"{url}: unknown kind of store {parts.scheme!r}; known: {', '.join(_PREFIXES)}")
        self.url = url.rstrip("/")
        self.options = options
        client = {"timeout": f"{options.timeout_s}s", "connect_timeout": f"{min(5.0, options.timeout_s)}s"}
        prefix = _PREFIXES[parts.scheme]
        for name in _CLIENT_OPTIONS:
            if prefix and (value := os.environ.get(prefix + name.upper())) is not None:
                client[name] = value
        config = dict(options.config)
        client |= {name: config.pop(name) for name in _CLIENT_OPTIONS if name in config}
        if parts.scheme == "http":
            client["allow_http"] = "true"
        from_url: Any = obstore.store.from_url  # its overloads want to know the kind of store
        try:
            # Its own retries cover an answer's head and not its body, and cannot be interrupted.
            retries = {"max_retries": 0}
            self._store = from_url(self.url, config=config or None, client_options=client, retry_config=retries)
        except obstore.exceptions.BaseError as error:
            raise ValueError(f"{self.url} cannot be opened: {_first_line(error)}") from None
        self._answered = False
        self._warned_at = -_WARN_EVERY_S

    def read(self, name: str, offset: int, length: int, stop: threading.Event | None = None) -> memoryview:
        """Read bytes [offset, offset + length) of an object, fewer where it ends before.

        Raises FileNotFoundError where there is no such object, StoreError where the store does not answer or refuses,
        or `stop` is set meanwhile.
        """
        import obstore

        def get() -> memoryview:
            try:
                return memoryview(obstore.get_range(self._store, name, start=offset, length=length))
            except obstore.exceptions.BaseError as error:
                if _status(error) == 416:  # the object ends before the range begins
                    return memoryview(b"")
                raise

        return self._patiently(get, f"{self.url}/{name} (bytes {offset} to {offset + length - 1})", stop)

    def read_all(self, name: str, stop: threading.Event | None = None) -> bytes:
        """Read a whole small object. Raises like `read`."""
        import obstore

        return self._patiently(lambda: bytes(obstore.get(self._store, name).bytes()), f"{self.url}/{name}", stop)

    def size(self, name: str) -> int:
        """Return an object's size in bytes. Raises like `read`."""
        import obstore

        return int(self._patiently(lambda: obstore.head(self._store, name)["size"], f"{self.url}/{name}"))

    def _patiently(self, get: Callable[[], Answer], what: str, stop: threading.Event | None = None) -> Answer:
        from obstore import exceptions

        stop = stop or threading.Event()
        began = time.monotonic()
        attempt = 0
        while not stop.is_set():
            attempt += 1
            try:
                answer = get()
                self._answered = True
                return answer
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise StoreError(f"{what}: the store has no such bucket; check the URL and the endpoint") from None
                raise FileNotFoundError(f"{what} is not there") from None
            except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
                raise StoreError(
                    f"{what}: the store refuses the credentials ({_reason(error, self.options)}); check those in the "
                    "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...) and what they may read"
                ) from None
            except exceptions.BaseError as error:
                reason = _reason(error, self.options)
                if not _may_pass(error) or (_seeks_credentials(error) and not self._answered):
                    raise StoreError(f"{what} cannot be read: {reason}") from None
            waited = time.monotonic() - began
            wait = min(_LONGEST_WAIT_S, 0.1 * 2 ** min(attempt, 10)) * random.uniform(0.5, 1.0)
            if waited + wait > self.options.patience_s:
                raise StoreError(
                    f"{what} could not be read in {attempt} {'attempts' if attempt > 1 else 'attempt'} and "
                    f"{waited:.1f} s: {reason}. The store is out of reach, the samples may be sound: run the same "
                    "again once it answers"
                )
            self._warn(what, reason)
            stop.wait(wait)
        raise StoreError(f"{what} is not read: the loader is closed")

    def _warn(self, what: str, reason: str) -> None:
        """Say that the store is in trouble, once in a while: many threads notice it at the same time."""
        now = time.monotonic()
        if now - self._warned_at >= _WARN_EVERY_S:
            self._warned_at = now
            _log.warning("%s: %s; trying again for %g s", what, reason, self.options.patience_s)


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def _status(error: Exception) -> int | None:
    match = _STATUS.search(str(error))
    return int(match[1]) if match else None


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    status = _status(error)
    if _UNSENDABLE in str(error):
        return False
    if status is None or _seeks_credentials(error):
        return "redirect without LOCATION" not in str(error)
    return status >= 500 or status in _PASSING_STATUS


def _seeks_credentials(error: Exception) -> bool:
    """Whether it is not the store that failed, but the machine's service for credentials: there were no others."""
    return "/latest/api/token" in str(error) or "/latest/meta-data" in str(error)


def _reason(error: Exception, options: StoreOptions) -> str:
    """Say in a few words what obstore says in a page."""
    text = str(error)
    if _seeks_credentials(error):
        return "no credentials were found; set AWS_ACCESS_KEY_ID and the others, or AWS_SKIP_SIGNATURE=true"
    if match := _STATUS.search(text):
        return f"HTTP {match[1]} {match[2].strip()}" + (f" ({match[3]})" if match[3] else "")
    if _UNSENDABLE in text:
        return "no request can be made to its endpoint; one without TLS (http://) needs AWS_ALLOW_HTTP=true"
    if "redirect without LOCATION" in text:
        return "the bucket lies in another region; set AWS_REGION"
    for sign, words in (
        ("ConnectionRefused", "the connection is refused"),
        ("TimedOut", f"no answer within {options.timeout_s:g} s"),
        ("Timeout", f"no answer within {options.timeout_s:g} s"),
        ("dns error", "the host's name is not known"),
        ("UnexpectedEof", "the connection was cut"),
        ("IncompleteMessage", "the connection was cut"),
        ("ConnectionReset", "the connection was cut"),
    ):
        if sign in text:
            return words
    return _first_line(error)

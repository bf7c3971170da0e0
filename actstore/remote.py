"""Stores on S3: shard bytes through obstore, everything configured by s3fs's options.

No other module knows S3. Messages name the address and what to do; they never repeat what the
server said word for word, because that may hold the access key.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import S3Store

from actstore.credentials import public, refuse_credentials
from actstore.storage import Buffer

PUT_CHUNK = 8 << 20
"""Bytes of one request of a multipart upload."""

PUT_AT_ONCE = 3
"""Requests of one upload under way at once; several objects are uploaded side by side.

With obstore's 12 a server holds so many bodies at once that it spends up to two thirds more CPU
time on a byte (SeaweedFS, two uploads side by side: 17.5 s a gigabyte against 10.5)."""

TIMEOUT = "60s"
"""Longest time of one request."""

RETRIES = 8
"""Further attempts of a request that the server throttles or drops, with growing pauses."""


class S3Storage:
    """Objects below a prefix of a bucket."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self.url = refuse_credentials(url)
        self._options = dict(options or {})
        self._bucket, _, prefix = url.partition("://")[2].partition("/")
        self._prefix = prefix.strip("/")
        if not self._bucket:
            raise ValueError(f"{url} names no bucket; a store on S3 is s3://bucket/folder")
        self._retries = int(self._options.get("retries", RETRIES))
        config: Any = obstore_config(self._options)
        client: Any = _client(self._options)
        self._store = S3Store(
            self._bucket,
            prefix=self._prefix or None,
            config=config,
            client_options=client,
            retry_config={
                "max_retries": self._retries,
                "backoff": {"init_backoff": _seconds(0.1), "max_backoff": _seconds(10)},
                "retry_timeout": _seconds(180),
            },
        )

    def __reduce__(self) -> tuple[type["S3Storage"], tuple[str, dict[str, Any]]]:
        return type(self), (self.url, self._options)

    def __repr__(self) -> str:
        return f"S3Storage({self.url!r})"

    def read(self, path: str, *, limit: int | None = None) -> bytes:
        """See `Storage.read`."""
        with self._translated(path):
            result = obstore.get(self._store, path)
            if limit is not None and result.meta["size"] > limit:
                raise ValueError(f"{self.uri(path)} is larger than the {limit} bytes allowed")
            return bytes(result.bytes())

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """See `Storage.read_range`."""
        with self._translated(path):
            return memoryview(obstore.get_range(self._store, path, start=offset, length=length))  # type: ignore[return-value]

    def size(self, path: str) -> int | None:
        """See `Storage.size`."""
        try:
            with self._translated(path):
                return int(obstore.head(self._store, path)["size"])
        except FileNotFoundError:
            return None

    def create(self, path: str, data: bytes) -> bool:
        """See `Storage.create`: PUT with ``If-None-Match: *``."""
        try:
            with self._translated(path):
                obstore.put(self._store, path, data, mode="create", use_multipart=False)
        except FileExistsError:
            return False
        return True

    def replace(self, path: str, pieces: Iterable[Buffer]) -> None:
        """See `Storage.replace`: one PUT, in parts when it is large; visible when complete."""
        blocks = _blocks(pieces)
        first: list[memoryview] = []
        while sum(map(len, first)) <= PUT_CHUNK and (block := next(blocks, None)) is not None:
            first.append(block)
        with self._translated(path):
            if sum(map(len, first)) <= PUT_CHUNK:  # in parts it would be three requests
                data = first[0] if len(first) == 1 else b"".join(first)
                obstore.put(self._store, path, data, use_multipart=False)
                return
            whole = itertools.chain(first, blocks)
            obstore.put(self._store, path, whole, chunk_size=PUT_CHUNK, max_concurrency=PUT_AT_ONCE)

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        with self._translated(path), contextlib.suppress(exceptions.NotFoundError):
            obstore.delete(self._store, path)

    def list(self, folder: str) -> Iterator[str]:
        """See `Storage.list`."""
        with self._translated(folder):
            found = obstore.list_with_delimiter(self._store, folder)
        for entry in found["objects"]:
            yield entry["path"].rpartition("/")[2]

    def uri(self, path: str) -> str:
        """See `Storage.uri`."""
        return "/".join(part for part in (self.url.rstrip("/"), path) if part)

    def zarr(self) -> Any:
        """See `Storage.zarr`."""
        from zarr.storage import ObjectStore

        return ObjectStore(self._store, read_only=True)

    @contextlib.contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        """Raise Python's own errors, with what to do and without what the server said."""
        endpoint = public(endpoint_of(self._options) or "Amazon S3")
        attempts = self._retries + 1
        try:
            yield
        except exceptions.AlreadyExistsError:
            raise FileExistsError(f"{self.uri(path)} exists already") from None
        except exceptions.PreconditionError:
            raise FileExistsError(f"{self.uri(path)} exists already") from None
        except (exceptions.NotFoundError, FileNotFoundError) as error:
            if "NoSuchBucket" in str(error):
                raise ValueError(
                    f"{self.url}: there is no bucket {self._bucket!r} at {endpoint}; create it or "
                    "check the endpoint (storage option endpoint_url)"
                ) from None
            raise FileNotFoundError(f"{self.uri(path)} does not exist") from None
        except (exceptions.BaseError, OSError) as error:
            raise _classified(str(error), self.uri(path), endpoint, attempts) from None


_EXPIRED = {"ExpiredToken", "TokenRefreshRequired", "RequestExpired"}
_SKEWED = {"RequestTimeTooSkewed"}
_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"}
_THROTTLED = {"SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"}
_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"status(?: code)?:? (\d{3})\b")


def _classified(text: str, uri: str, endpoint: str, attempts: int) -> OSError:
    """Return the error that a message of the client means, by S3's code and HTTP's status.

    Other words count only where the server did not answer: a message holds port numbers, times
    and names, in which any digits and words may stand.
    """
    lower = text.lower()
    codes = set(_CODE.findall(text))
    status = int(found[1]) if (found := _STATUS.search(text)) else 0
    if codes & _EXPIRED or "token has expired" in lower:
        return PermissionError(
            f"{uri}: the credentials have expired; get new ones and run the same command again"
        )
    if codes & _SKEWED:
        return PermissionError(
            f"{uri}: {endpoint} finds that the clock of this machine is wrong; set it"
        )
    if codes & _THROTTLED or status in (429, 503):
        return OSError(
            f"{uri}: {endpoint} throttles requests and {attempts} attempts did not help; run the "
            "same command again later, with fewer workers"
        )
    if codes & _DENIED or status in (401, 403) or (not status and "credential" in lower):
        return PermissionError(
            f"{uri}: {endpoint} denied access; check the credentials (storage options key and "
            "secret, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) and their rights"
        )
    if "redirect" in lower or status in (301, 307) or "AuthorizationHeaderMalformed" in codes:
        return OSError(
            f"{uri}: the bucket is in another region than asked for; name its region with "
            "AWS_REGION or the storage option client_kwargs={'region_name': ...}"
        )
    if "NoSuchBucket" in codes:
        return FileNotFoundError(f"{uri}: there is no such bucket at {endpoint}")
    if not status and "timed out" in lower:
        return TimeoutError(f"{uri}: {endpoint} did not answer within {TIMEOUT}")
    words = ("connect", "dns", "resolve", "error sending request", "refused", "unreachable")
    if not status and any(word in lower for word in words):
        return ConnectionError(
            f"{uri}: no S3 server answers at {endpoint}; check the storage option endpoint_url"
        )
    return OSError(f"{uri}: a request to {endpoint} failed; its server logs say more")


def endpoint_of(options: Mapping[str, Any]) -> str | None:
    """Return the endpoint that s3fs's options or the environment name."""
    client = options.get("client_kwargs") or {}
    found = options.get("endpoint_url") or client.get("endpoint_url")
    named = found or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if named and not re.match(r"https?://[^/]", str(named)):
        raise ValueError(
            f"endpoint_url {public(str(named))!r} is no address of a server: it looks like "
            "http://host:8333 or https://host"
        )
    return str(named) if named else None


def obstore_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return obstore's configuration from s3fs's options.

    Known are ``endpoint_url``, ``key``, ``secret``, ``token``, ``anon``, ``retries`` and
    ``client_kwargs`` with ``endpoint_url`` and ``region_name``; what is absent comes from the
    environment (``AWS_*``).

    Raises
    ------
    ValueError
        For an option that has no meaning here.
    """
    known = {"endpoint_url", "key", "secret", "token", "anon", "client_kwargs", "retries"}
    if unknown := set(options) - known:
        raise ValueError(
            f"storage options {sorted(unknown)} are not known; allowed: {', '.join(sorted(known))}"
        )
    client = options.get("client_kwargs") or {}
    named = {
        "endpoint": endpoint_of(options),
        "access_key_id": options.get("key"),
        "secret_access_key": options.get("secret"),
        "session_token": options.get("token"),
        "skip_signature": True if options.get("anon") else None,
        "unsigned_payload": True if _private(endpoint_of(options)) else None,
        "region": client.get("region_name") or os.environ.get("AWS_REGION") or "us-east-1",
    }
    return {name: value for name, value in named.items() if value is not None}


def _private(endpoint: str | None) -> bool:
    """Whether nobody between here and the server can change what is sent.

    TLS, and an address of this machine, protect the bytes of an upload already; signing them,
    a SHA-256 over all of them, costs three times as much as sending them.
    """
    host = urlsplit(endpoint or "https://")
    return host.scheme == "https" or host.hostname in ("localhost", "127.0.0.1", "::1")


def _client(options: Mapping[str, Any]) -> dict[str, Any]:
    plain = (endpoint_of(options) or "").startswith("http://")
    return {"timeout": TIMEOUT, "connect_timeout": "10s", "allow_http": plain}


def _seconds(value: float) -> Any:
    import datetime

    return datetime.timedelta(seconds=value)


def _blocks(pieces: Iterable[Buffer]) -> Iterator[memoryview]:
    """Cut buffers into the blocks of an upload, without copying."""
    for piece in pieces:
        data = memoryview(piece).cast("B")
        for start in range(0, len(data), PUT_CHUNK):
            yield data[start : start + PUT_CHUNK]

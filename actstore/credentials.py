"""URLs without what must not be written down: passwords, and the keys of signed requests."""

import re
from urllib.parse import urlsplit

_SECRET = re.compile(
    r"(?i)(?:^|[&;_-])(?:signature|sig|token|secret|credential|password|key|accesskeyid)="
)


def public(url: str) -> str:
    """Return a URL without user and password or the query of a signed request, if it has one."""
    if "://" not in url:
        return url
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition("?")[0].rpartition("@")[2]
    if ":" in parts.netloc and "@" not in parts.netloc and "@" in parts.path:
        # A slash inside of a password ends the host for the parser.
        return public(f"{parts.scheme}://{url.rpartition('@')[2]}")
    signed = _SECRET.search(parts.query)
    host = parts.netloc.rpartition("@")[2] if ":" in _user(parts.netloc) else parts.netloc
    if not signed and host == parts.netloc:
        return url
    return f"{parts.scheme}://{host}{parts.path}"


def refuse_credentials(url: str) -> str:
    """Return `url` if it may be written down.

    Raises
    ------
    ValueError
        When it holds a password or the key of a signed request.
    """
    if public(url) != url:
        raise ValueError(
            f"the URL {public(url)} holds credentials, which would get into the store: give them "
            "as storage options or in the environment"
        )
    return url


def _user(netloc: str) -> str:
    return netloc.rpartition("@")[0]

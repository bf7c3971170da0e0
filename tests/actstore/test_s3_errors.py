"""What a user reads when S3 refuses: a server on loopback that answers as a failing one does."""

import http.server
import threading

import numpy as np
import pytest

import actstore
from actstore.remote import PUT_CHUNK
from actstore.storage import open_storage

SECRET = "the-secret-of-nobody"


class Failing(http.server.ThreadingHTTPServer):
    """Answers `left` requests with an error, the rest with an object."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.body = b""
        self.code, self.status, self.left, self.asked = "", 500, 0, 0

    @property
    def options(self):
        url = f"http://127.0.0.1:{self.server_address[1]}"
        return {"endpoint_url": url, "key": "AKIANOBODY", "secret": SECRET}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.server.body = self.rfile.read(length)
        self.server.asked += 1
        body, status = b"object", 200
        if self.server.left > 0:
            self.server.left -= 1
            status = self.server.status
            code = self.server.code
            body = (
                f"<Error><Code>{code}</Code><Message>AKIANOBODY {SECRET}</Message></Error>"
            ).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = answer

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    with Failing() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "code", "error", "message"),
    [
        (400, "ExpiredToken", PermissionError, r"the credentials have expired; get new ones"),
        (403, "AccessDenied", PermissionError, r"denied access; check the credentials"),
        (403, "InvalidAccessKeyId", PermissionError, r"denied access; check the credentials"),
        (403, "SignatureDoesNotMatch", PermissionError, r"denied access"),
        (403, "RequestTimeTooSkewed", PermissionError, r"the clock of this machine is wrong"),
        (404, "NoSuchBucket", ValueError, r"there is no bucket 'b' at http://127.0.0.1:\d+; cr"),
        (301, "PermanentRedirect", OSError, r"the bucket is in another region .*region_name"),
        (500, "InternalError", OSError, r"a request to http://127.0.0.1:\d+ failed"),
    ],
)
@pytest.mark.parametrize("what", [actstore.open, actstore.write_arrays])
def test_every_refusal_has_its_message(server, status, code, error, message, what):
    server.status, server.code, server.left = status, code, 10**6
    options = {**server.options, "retries": 0}
    values = {"a.b": {"patch": np.zeros((4, 1, 2), dtype=np.float16)}}
    given = [] if what is actstore.open else [values]
    with pytest.raises(error, match=message) as caught:
        what("s3://b/store", *given, storage_options=options)
    assert "s3://b/store" in str(caught.value)
    for secret in (SECRET, "AKIANOBODY"):
        assert secret not in str(caught.value)
        assert secret not in repr(caught.value.__cause__)
        assert caught.value.__suppress_context__


def test_a_throttled_request_is_tried_again(server):
    server.status, server.code, server.left = 503, "SlowDown", 2
    assert open_storage("s3://b/a", {**server.options, "retries": 2}).read("x") == b"object"
    assert server.asked == 3


def test_a_server_that_goes_on_throttling(server):
    server.status, server.code, server.left = 503, "SlowDown", 10**6
    message = r"throttles requests and 3 attempts did not help; run the same command again later"
    with pytest.raises(OSError, match=message) as caught:
        open_storage("s3://b/a", {**server.options, "retries": 2}).read("x")
    assert server.asked == 3
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "pieces", [[b"one"], [b"12", memoryview(b"345"), b""], [], [bytes(PUT_CHUNK - 1), b"x"]]
)
def test_a_small_object_is_one_request(server, pieces):
    open_storage("s3://b/a", {**server.options, "retries": 0}).replace("x", iter(pieces))
    assert server.asked == 1
    assert server.body == b"".join(pieces)


def test_a_server_that_hangs_up_is_asked_again(server):
    storage = open_storage("s3://b/a", {**server.options, "retries": 1})
    server.status, server.code, server.left = 500, "InternalError", 1
    assert storage.read("x") == b"object"


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIANOBODY:the-secret-of-nobody@b/store",
        "s3://AKIANOBODY:with/the-secret-of-nobody@b/store",
        "s3://b/store?X-Amz-Signature=the-secret-of-nobody",
        "s3://b/store?AWSAccessKeyId=AKIANOBODY&Signature=the-secret-of-nobody",
        "ftp://me:the-secret-of-nobody@host/store",
    ],
)
def test_the_url_of_a_store_holds_no_credentials(url):
    with pytest.raises(ValueError, match=r"holds credentials|is not supported") as caught:
        actstore.open(url)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value.__context__)


def test_an_endpoint_with_a_password_is_not_repeated():
    options = {"endpoint_url": f"http://me:{SECRET}@127.0.0.1:9", "retries": 0}
    with pytest.raises(OSError, match=r"127.0.0.1:9") as caught:
        actstore.open("s3://b/store", {**options, "key": "k", "secret": "s"})
    assert SECRET not in str(caught.value)


def test_payloads_are_signed_where_somebody_could_change_them():
    from actstore.remote import obstore_config

    unsigned = {"https://s3.example.org", "http://127.0.0.1:9", "http://localhost:9"}
    for url in (*unsigned, "http://minio:9000", "http://10.0.0.7:8333"):
        config = obstore_config({"endpoint_url": url})
        assert config.get("unsigned_payload", False) == (url in unsigned), url

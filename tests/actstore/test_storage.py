"""One conformance class over every storage backend."""

import os
import threading

import pytest

from actstore.storage import LocalStorage, open_storage


class Conformance:
    """What every backend must do; subclasses give the fixture `storage`."""

    def test_round_trip(self, storage):
        storage.replace("a/b/one", [b"12", memoryview(b"345"), b""])
        assert storage.read("a/b/one") == b"12345"
        assert storage.size("a/b/one") == 5
        assert storage.read_range("a/b/one", 1, 3) == b"234"
        assert storage.read_range("a/b/one", 3, 100) == b"45"

    def test_replace_replaces(self, storage):
        storage.replace("x", [b"old, and longer"])
        storage.replace("x", [b"new"])
        assert storage.read("x") == b"new"

    def test_create_is_exclusive(self, storage):
        assert storage.create("parts/0.json", b"first")
        assert not storage.create("parts/0.json", b"second")
        assert storage.read("parts/0.json") == b"first"

    def test_one_of_many_creators_wins(self, storage):
        results = []
        barrier = threading.Barrier(8)

        def race(number):
            barrier.wait()
            results.append((storage.create("race", str(number).encode()), number))

        threads = [threading.Thread(target=race, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [number for won, number in results if won]
        assert len(winners) == 1
        assert storage.read("race") == str(winners[0]).encode()

    def test_absent(self, storage):
        assert storage.size("nothing/here") is None
        with pytest.raises(FileNotFoundError):
            storage.read("nothing/here")
        with pytest.raises(FileNotFoundError):
            storage.read_range("nothing/here", 0, 1)
        storage.delete("nothing/here")
        assert list(storage.list("nothing")) == []

    def test_list_names_objects_of_one_folder(self, storage):
        for path in ("d/one", "d/two", "d/deeper/three", "other"):
            storage.replace(path, [b"x"])
        assert sorted(storage.list("d")) == ["one", "two"]

    def test_delete(self, storage):
        storage.replace("x", [b"1"])
        storage.delete("x")
        assert storage.size("x") is None

    def test_read_is_bounded_on_request(self, storage):
        storage.replace("x", [b"12345"])
        assert storage.read("x", limit=5) == b"12345"
        with pytest.raises(ValueError, match=r"larger than the 4 bytes allowed"):
            storage.read("x", limit=4)

    def test_an_object_larger_than_a_write_call(self, storage):
        block = os.urandom(1 << 20) * 9
        storage.replace("big", [block, b"tail"])
        assert storage.size("big") == len(block) + 4
        assert storage.read_range("big", len(block) - 2, 6) == block[-2:] + b"tail"

    def test_zarr_reads_through_it(self, storage):
        import json

        import numpy as np
        import zarr

        from actstore import layout

        meta = layout.plain_metadata([3], "float64", ["x"])
        storage.replace("v/zarr.json", [json.dumps(meta).encode()])
        storage.replace("v/c.0", [np.arange(3.0).tobytes()])
        array = zarr.open_array(storage.zarr(), path="v", mode="r")
        assert array[:].tolist() == [0, 1, 2]


class TestLocal(Conformance):
    @pytest.fixture
    def storage(self, tmp_path):
        return open_storage(tmp_path / "root")

    def test_nothing_unfinished_is_left(self, storage, tmp_path):
        storage.replace("a", [b"1"])
        storage.create("b", b"1")
        storage.create("b", b"2")
        assert list((tmp_path / "root" / "tmp").iterdir()) == []

    def test_a_failing_write_leaves_the_old_object(self, storage, tmp_path):
        storage.replace("a", [b"old"])

        def pieces():
            yield b"new"
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match=r"No space left"):
            storage.replace("a", pieces())
        assert storage.read("a") == b"old"
        assert list((tmp_path / "root" / "tmp").iterdir()) == []

    def test_file_urls(self, tmp_path):
        assert isinstance(open_storage(f"file://{tmp_path}/a"), LocalStorage)
        assert open_storage(f"file://{tmp_path}/a").uri("x") == f"{tmp_path}/a/x"

    def test_unknown_scheme(self):
        with pytest.raises(ValueError, match=r"scheme 'ftp' is not supported"):
            open_storage("ftp://host/store")


@pytest.mark.parametrize("extra", [0, 1, 4095, 4096, 5000])
def test_direct_writes_give_the_same_bytes(tmp_path, extra, monkeypatch):
    """Aligned memory goes past the page cache, the rest behind it the usual way."""
    import numpy as np

    from actstore import storage as module

    values = module.aligned_zeros((module.DIRECT_BYTES + extra,), np.dtype(np.uint8))
    assert values.ctypes.data % module.DIRECT_ALIGN == 0
    values[:] = np.random.default_rng(0).integers(0, 255, len(values), dtype=np.uint8)
    storage = LocalStorage(tmp_path)
    storage.replace("a", [values, b"index"])
    assert storage.read("a") == values.tobytes() + b"index"
    storage.replace("shifted", [b"x", values[1:], values])
    assert storage.read("shifted") == b"x" + values[1:].tobytes() + values.tobytes()

    real = os.write

    def refuses(descriptor, data):
        import fcntl

        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", refuses)
    storage.replace("plain", [values, b"index"])
    assert storage.read("plain") == values.tobytes() + b"index"

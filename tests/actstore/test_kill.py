"""Real processes, really killed: nothing committed is lost, nothing half-written is seen."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from fake_model import harvest_digits, objects

import actstore
from actstore.harvester import resident_memory
from actstore.verify import verify


@pytest.fixture(scope="module")
def fork():
    """Processes forked from one that has torch imported and no thread started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fake_model", "actstore.execute", "actstore.harvester"])
    return context


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("whole") / "a")
    harvest_digits(folder)
    return objects(folder), objects(folder, "parts"), objects(folder, "stats")


def run_until(fork, out, seconds):
    """Harvest in a process that is killed after some seconds; return whether it was."""
    process = fork.Process(target=harvest_digits, args=(out, 0.01))
    process.start()
    deadline = time.monotonic() + 30
    while not os.path.exists(f"{out}/zarr.json") and time.monotonic() < deadline:
        time.sleep(0.002)
    process.join(seconds)
    killed = process.is_alive()
    if killed:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == (-signal.SIGKILL if killed else 0)
    return killed


def test_killed_at_random_instants_and_resumed(fork, whole, tmp_path):
    out = str(tmp_path / "a")
    generator = np.random.default_rng(0)
    kills = 0
    for _ in range(6):
        killed = run_until(fork, out, generator.uniform(0, 0.35))
        kills += killed
        store = actstore.open(out)
        assert verify(store) == [], "what is committed is whole"
        if not killed:
            break
    assert kills >= 3
    harvest_digits(out)
    store = actstore.open(out)
    assert store.is_complete
    assert verify(store) == []
    assert objects(out) == whole[0]
    assert objects(out, "parts") == whole[1]
    assert objects(out, "stats") == whole[2]


def test_two_harvesters_race_on_the_same_parts(fork, whole, tmp_path):
    out = str(tmp_path / "a")
    processes = [fork.Process(target=harvest_digits, args=(out, 0.003)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert objects(out) == whole[0]
    assert objects(out, "parts") == whole[1]


def ranked(out, rank, world, delay):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    harvest_digits(out, delay)


def test_three_ranks_one_killed(fork, whole, tmp_path):
    out = str(tmp_path / "a")
    processes = [fork.Process(target=ranked, args=(out, rank, 3, 0.02)) for rank in range(3)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 30
    while not os.path.exists(f"{out}/parts/00001.json") and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(processes[1].pid, signal.SIGKILL)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL, 0]
    store = actstore.open(out)
    assert store.missing_parts
    assert all(part % 3 == 1 for part in store.missing_parts)
    again = fork.Process(target=ranked, args=(out, 1, 3, 0.0))
    again.start()
    again.join()
    assert actstore.open(out).is_complete
    assert objects(out) == whole[0]


def measure_peak(out, sender):
    """Send the projected and the measured peak of this process, in bytes."""
    from fake_model import FakeModel

    plans = []

    def keep(event):
        if event.plan is not None:
            plans.append((event.plan.memory, resident_memory()))

    actstore.harvest(
        model=FakeModel(),
        data="digits",
        sites="blocks.*.pattern,blocks.*.resid_post",
        out=out,
        limit=4000,
        batch_size=64,
        on_event=keep,
    )
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    sender.send((*plans[0], peak * 1024))


def test_measured_peak_memory_stays_within_the_projected(fork, tmp_path):
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=measure_peak, args=(str(tmp_path / "a"), sender))
    process.start()
    projected, before, peak = receiver.recv()
    process.join()
    assert peak <= projected
    manifest = actstore.open(tmp_path / "a").manifest
    from actstore.plan import part_bytes

    assert peak - before > 1.5 * part_bytes(manifest), "two parts are held"
    assert projected - before < 400e6, "and the projection is no blank cheque"

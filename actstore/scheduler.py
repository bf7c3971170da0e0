"""Reach a scheduler of dask.distributed, or say why not."""

import asyncio
import concurrent.futures
import importlib
from typing import Any


def connect(scheduler: str, *, wait: float = 30.0) -> Any:
    """Return a client of a scheduler that has at least one worker.

    Parameters
    ----------
    scheduler
        Address, for instance ``tcp://host:8786``.
    wait
        Seconds to wait for the scheduler, and then for a worker.

    Raises
    ------
    ValueError
        When distributed is not installed, nothing answers, or no worker joins in time.
    """
    if ":" not in scheduler:
        raise ValueError(f"scheduler {scheduler!r} is no address; it looks like tcp://host:8786")
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError as error:
        raise ValueError(
            "harvesting on a cluster needs distributed: pip install 'actstore[cluster]'"
        ) from error
    # Not by a client: one that could not connect waits a minute more when it is thrown away, and
    # prints a traceback. In a thread of its own, for the caller may have an event loop running.
    with concurrent.futures.ThreadPoolExecutor(1, "connect") as thread:
        try:
            kind = thread.submit(asyncio.run, _kind_of(scheduler, wait)).result()
        except Exception as error:  # what is no scheduler may answer anything
            reason = "" if isinstance(error, OSError) else f" ({type(error).__name__})"
            raise ValueError(
                f"no dask scheduler answers at {scheduler!r} within {wait:.0f} s{reason}: start "
                "one with `dask scheduler`, workers with `dask worker ADDRESS --nthreads 2`"
            ) from error
    if kind != "Scheduler":
        raise ValueError(
            f"at {scheduler!r} is a dask {kind.lower()} and no scheduler: `dask scheduler` prints "
            "the address to give"
        )
    client: Any = distributed.Client(scheduler, timeout=wait, set_as_default=False)
    try:
        client.wait_for_workers(1, timeout=wait)
    except TimeoutError as error:
        client.close()
        raise ValueError(
            f"the scheduler at {scheduler} has no worker: start some with "
            f"`dask worker {scheduler} --nthreads 2`"
        ) from error
    return client


async def _kind_of(address: str, wait: float) -> str:
    """Return what answers at an address of dask: Scheduler, Worker, Nanny."""
    distributed: Any = importlib.import_module("distributed")
    secured = distributed.Security().get_connection_args("client")
    async with distributed.rpc(address, timeout=wait, connection_args=secured) as remote:
        answer = await asyncio.wait_for(remote.identity(), wait)
    return str(answer["type"])

"""Train dictionaries off a store, any number from one read of it.

Files of a run, in ``out``::

    run.json                     what was asked and what the run decided: configuration,
                                 dictionaries, the store's fingerprint, site factors, GEMM backend
    log.jsonl, tensorboard/      metrics by step and dictionary
    checkpoints/<step>/          everything needed to go on; see `dictlearn.checkpoint`
    <name>/                      each finished dictionary in the native format, in raw units
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from actstore.aligned_loader import AlignedLoader, loader_of
from actstore.loader import TokenLoader
from actstore.selection import Split
from dictlearn import checkpoint, runfile
from dictlearn.dictionary import Dictionary
from dictlearn.distributed import Ranks
from dictlearn.endings import set_thresholds, squared_errors
from dictlearn.formats.native import save
from dictlearn.gemm import Backend, choose_backend
from dictlearn.kernels import StepResult
from dictlearn.learner import Learner
from dictlearn.progress import Trained as Trained
from dictlearn.progress import TrainEvent as TrainEvent
from dictlearn.runlog import RunLog, check_trackers
from dictlearn.scaling import check_sites, describe, factor_row, init_from, site_scales
from dictlearn.scaling import factors as factors_of
from dictlearn.schedule import TrainConfig, check_agree
from dictlearn.sharding import shards_of
from dictlearn.starts import start_from_data
from dictlearn.team import Team, check_workers, threads_each

if TYPE_CHECKING:
    from actstore.aligned import Aligned
    from actstore.batching import Batch
    from actstore.store import Store

log = logging.getLogger(__name__)


def train(
    store: Store | Aligned,
    dictionaries: Dictionary | Sequence[Dictionary],
    config: TrainConfig | Sequence[TrainConfig] | None = None,
    *,
    out: str | Path | None = None,
    names: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    on_event: Callable[[TrainEvent], None] | None = None,
    workers: int = 1,
    log_to: Sequence[str] = (),
) -> list[Trained]:
    """Train every dictionary on the same batches, read once.

    The dictionaries are trained in place and end in raw units. With `out`, the run writes its log,
    checkpoints and dictionaries there, and calling it again with the same arguments goes on where
    it was, bit for bit on CPU; a run that is complete is loaded.

    Parameters
    ----------
    store
        Any store that holds the sites of all dictionaries, or several of the same items joined by
        `actstore.aligned.align`.
    dictionaries
        One or several, over the same sites or different ones.
    config
        One for all, or one each; what concerns the data (batch size, steps, tokens, seed, held-out
        items) must then agree.
    out
        Folder of the run; None keeps nothing.
    names
        Of the dictionaries; by default the sites they read and write.
    device
        Where to train.
    on_event
        Called with progress.
    workers
        Threads that share the dictionaries, each with its share of the cores (`dictlearn.team`);
        for several dictionaries on a CPU, in one process.
    log_to
        ``wandb``, ``trackio``: besides ``log.jsonl`` and ``tensorboard/``; needs `out`.

    Raises
    ------
    KeyError
        A site is not in the store.
    ValueError
        Widths or configurations do not fit, `out` holds another run, or every dictionary failed
        (for instance because its loss became NaN).
    """
    several = [dictionaries] if isinstance(dictionaries, Dictionary) else list(dictionaries)
    if not several:
        raise ValueError("train needs at least one dictionary")
    if config is None or isinstance(config, TrainConfig):
        configs = [config or TrainConfig()] * len(several)
    else:
        configs = list(config)
    check_agree(configs, len(several))
    for dictionary in several:
        check_sites(dictionary, store)
    check_workers(workers, torch.device(device), Ranks.current().world)
    check_trackers(log_to, out)
    run = _Run(
        store,
        several,
        configs,
        runfile.default_names(several) if names is None else list(names),
        Path(out) if out is not None else None,
        torch.device(device),
        on_event or (lambda event: None),
        workers,
        log_to,
    )
    return run()


class _Run:
    """State of one call of `train`."""

    def __init__(
        self,
        store: Store | Aligned,
        dictionaries: list[Dictionary],
        configs: list[TrainConfig],
        names: list[str],
        out: Path | None,
        device: torch.device,
        on_event: Callable[[TrainEvent], None],
        workers: int = 1,
        log_to: Sequence[str] = (),
    ) -> None:
        if len(set(names)) != len(dictionaries) or any("/" in n or not n for n in names):
            raise ValueError(f"expected {len(dictionaries)} different folder names, got {names}")
        self.store, self.out, self.on_event, self.device = store, out, on_event, device
        self.workers, self.log_to = min(workers, len(dictionaries)), log_to
        self.config, self.configs, self.names = configs[0], configs, names
        self.ranks = Ranks.current()
        self.sharded = configs[0].shard_latents and self.ranks.world > 1
        self.feeding = Ranks() if self.sharded else self.ranks
        """Ranks that share the batch."""
        self.dictionaries = dictionaries
        sites = [s for s in store.sites if any(s in d.config.sites for d in dictionaries)]
        c = self.config
        self.items = (
            Split(half="train", holdout=c.holdout, seed=c.split_seed) if c.holdout else None
        )
        tokens = c.tokens or ",".join(store.kinds(sites[0]))
        self.scales = site_scales(store, sites, tokens.split(","), c.normalize)
        self.sites, self.tokens = sites, tokens
        self.loader = self._loader(sites, tokens, "train")
        self.validation = bool(c.validate_every and c.holdout)
        self.metrics: dict[str, dict[str, float]] = {}

    def _loader(
        self, sites: list[str], tokens: str, half: str, ranks: Ranks | None = None
    ) -> TokenLoader | AlignedLoader:
        c, ranks = self.config, ranks or self.feeding
        options: dict[str, Any] = {
            "tokens": tokens,
            "items": Split(half=half, holdout=c.holdout, seed=c.split_seed) if c.holdout else None,
            "seed": c.seed,
            "device": self.device,
            "drop_last": True,
            "streams": c.streams,
            "rank": ranks.rank,
            "world": ranks.world,
        }
        slices = loader_of(self.store, sites, c.batch_size, **options).slices
        row = factor_row(self.scales, slices)
        pair = (torch.zeros_like(row), row)
        return loader_of(self.store, sites, c.batch_size, normalize=pair, **options)

    def __call__(self) -> list[Trained]:
        decided = self._decide()
        self.learners = []
        for i, d in enumerate(self.dictionaries):
            d.to(self.device)
            if self.configs[i].init_bias == "mean":
                init_from(d, self.scales)
            name, shards = self.names[i], None
            if self.sharded:
                shards = shards_of(d.config, name, self.ranks.rank, self.ranks.world)
            self.learners.append(
                Learner(
                    name=name,
                    dictionary=d if shards is None else shards.cut(d),
                    config=self.configs[i],
                    backend=decided["backends"][i],
                    ranks=self.feeding,
                    shards=shards,
                )
            )
        start = self._resume()
        if not start:
            start_from_data(self.learners, self._loader(self.sites, self.tokens, "train", Ranks()))
        if self.out is None or self.ranks.rank:
            self._loop(start, None)
        else:
            with RunLog(self.out, start, self.log_to, self._asked) as runlog:
                self._loop(start, runlog)
        return self._finish()

    # ---- what the run is ---------------------------------------------------------------------
    def _decide(self) -> dict[str, Any]:
        """Compare with, or write, ``run.json``; return it."""
        self._asked = asked = {
            "store": self.store.fingerprint,
            "dictionaries": {
                n: d.config.to_json() for n, d in zip(self.names, self.dictionaries, strict=True)
            },
            "train": [c.to_json() for c in self.configs],
            "initial": [runfile.digest(d) for d in self.dictionaries],
        }
        found = runfile.read(self.out) if self.out else None
        there: dict[str, Any] | None = self.ranks.same(found)
        if self.out is not None and there is not None:
            runfile.check_same(there, asked, self.out)
            return there
        pairs = zip(self.dictionaries, self.configs, strict=True)
        decided: dict[str, Any] = {
            **asked,
            "sites": describe(self.scales),
            "backends": [self._backend(d, c) for d, c in pairs],
            "threads": threads_each(self.workers),
        }
        decided = self.ranks.same(decided)
        if self.out is not None and not self.ranks.rank:
            runfile.write(self.out, decided)
        return decided

    def _backend(self, dictionary: Dictionary, config: TrainConfig) -> Backend:
        if config.gemm != "auto":
            return config.gemm
        c = dictionary.config
        return choose_backend(config.batch_size, c.d_read, c.latents, self.device)

    def _resume(self) -> int:
        """Load the newest checkpoint, if there is one, and return its step."""
        found = checkpoint.latest(self.out) if self.out else None
        self.ranks.agree(found and found.name, f"the newest checkpoint in {self.out}")
        if found is None:
            self._event("start", 0)
            return 0
        state = checkpoint.read(found, self.learners)
        self.loader.load_state_dict(state["loader"])
        self.metrics = state["metrics"]
        step = int(state["step"])
        self._event("resume", step, message=f"resumed at step {step} from {found}")
        return step

    # ---- the loop ----------------------------------------------------------------------------
    def _loop(self, start: int, runlog: RunLog | None) -> None:
        if start >= self.config.steps:
            return
        team = Team(self.learners, self.workers)
        with closing(iter(self.loader)) as batches, closing(team):  # type: ignore[type-var]
            self._steps(batches, team, start, runlog)

    def _steps(
        self, batches: Iterator[Batch], team: Team, start: int, runlog: RunLog | None
    ) -> None:
        waited, since, tokens = 0.0, time.perf_counter(), 0
        for number in range(start, self.config.steps):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            tokens += len(batch) * self.feeding.world
            results = team.step(batch.acts, batch.slices, number)
            for learner in self.learners:
                if learner.failed and learner.name in results:
                    log.error(learner.failed)
                    self._event("failed", number, message=learner.failed)
            done = number + 1
            last = done == self.config.steps
            if done % self.config.log_every == 0 or last:
                self._measure(results, batch.acts)
                now = time.perf_counter()
                elapsed = max(now - since, 1e-9)
                speed, wait = tokens / elapsed, waited / elapsed
                if runlog is not None:
                    for name, metrics in self.metrics.items():
                        runlog.row(done, name, metrics)
                    runlog.row(done, "", {"tokens_per_second": speed, "data_wait": wait})
                self._event("log", done, tokens_per_second=speed, data_wait=wait)
                waited, since, tokens = 0.0, now, 0
            if all(learner.failed for learner in self.learners):
                raise ValueError("; ".join(learner.failed for learner in self.learners))
            if self.validation and done % self.config.validate_every == 0:
                self._validate(done)
            every = self.config.checkpoint_every
            if self.out is not None and (last or (every and done % every == 0)):
                self._checkpoint(self.out, done)

    def _measure(self, results: Mapping[str, StepResult], acts: torch.Tensor) -> None:
        """Turn the results of a step into numbers; the only wait for the device."""
        for learner in self.learners:
            result = results.get(learner.name)
            if result is None:
                continue
            if self.device.type != "cpu":
                learner.check(result, self.config.steps)
            tokens = acts.shape[0] * self.feeding.world
            before = self.metrics.get(learner.name, {})
            self.metrics[learner.name] = {
                **{k: v for k, v in before.items() if k == "val_fvu"},
                **{k: float(v) for k, v in result.losses.items()},
                "fvu": float(result.error) / self._variance(learner.dictionary),
                "l0": learner.active(result) / tokens,
                "dead": learner.dead_share(),
                "lr": learner.lr,
                "grad_norm": float(learner.grad_norm),
            }

    def _variance(self, dictionary: Dictionary) -> float:
        """Mean channel variance of what a dictionary writes, in training units."""
        writes = dictionary.config.writes
        total = sum(
            self.scales[s].variance * self.scales[s].factor ** 2 * w for s, w in writes.items()
        )
        return total / dictionary.config.d_write

    def _validate(self, done: int) -> None:
        """FVU on the first batches of the held-out items; stop those that stopped improving."""
        loader = self._loader(self.sites, self.tokens, "validation")
        sums = squared_errors(self.learners, loader, self.config.validation_batches)
        for learner in self.learners:
            both = torch.tensor(sums[learner.name], dtype=torch.float64, device=self.device)
            total, count = self.ranks.total(both).tolist()
            fvu = total / count / self._variance(learner.dictionary)
            self.metrics.setdefault(learner.name, {})["val_fvu"] = fvu
            if not learner.stopped and learner.note_validation(fvu, done):
                self._event("stopped", done, message=learner.stopped)

    def _checkpoint(self, out: Path, done: int) -> None:
        tensors = [one.state() for one in self.learners] if self.sharded else None
        if not self.ranks.rank:
            state = {"loader": self.loader.state_dict(), "metrics": self.metrics}
            checkpoint.write(out, done, self.learners, state, tensors)
            checkpoint.prune(out, self.config.keep)
        self.ranks.barrier()
        self._event("checkpoint", done)

    def _finish(self) -> list[Trained]:
        trained = []
        for learner in self.learners:
            learner.finish()
        set_thresholds(self.learners, self.loader, self.config.threshold_batches)
        for learner, d in zip(self.learners, self.dictionaries, strict=True):
            learner.fill(d)
            if self.config.normalize == "scale":
                d.rescale_sites(factors_of(self.scales))
            metrics = self.metrics.get(learner.name, {})
            path = None
            if self.out is not None:
                about = {
                    "store": self.store.fingerprint,
                    "model": dict(self.store.manifest.model or {}),
                    "train": learner.config.to_json(),
                    "tokens": list(self.loader.selection.kinds),
                    "metrics": metrics,
                    "failed": learner.failed,
                }
                path = self.out / learner.name
                if not self.ranks.rank:
                    save(d, path, about)
            trained.append(
                Trained(
                    name=learner.name,
                    dictionary=d,
                    metrics=metrics,
                    path=path,
                    failed=learner.failed,
                )
            )
        self._event("finished", self.config.steps)
        return trained

    def _event(self, kind: str, step: int, **more: Any) -> None:
        if self.ranks.rank:
            return
        self.on_event(
            TrainEvent(
                kind=kind, step=step, steps=self.config.steps, metrics=dict(self.metrics), **more
            )
        )

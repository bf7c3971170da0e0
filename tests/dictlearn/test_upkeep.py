"""L0 controller, weight average, resampling, early stop: what each does, and that it resumes."""

from pathlib import Path

import pytest
import torch

from actstore.store import Store
from dictlearn.config import JumpReLU, ReLU, Sparsify, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.evaluation import evaluate
from dictlearn.learner import Learner
from dictlearn.runlog import read_log
from dictlearn.schedule import TrainConfig
from dictlearn.trainer import TrainEvent, train
from dictlearn.upkeep import WeightAverage, resample

SITE = {"blocks.0.resid_post": 16}


@pytest.mark.parametrize("sparsify", [ReLU(l1=1e-4), ReLU(l1=0.03), JumpReLU(l0=1e-4)], ids=str)
def test_the_controller_reaches_its_target(store: Store, sparsify: Sparsify) -> None:
    config = TrainConfig(
        steps=250, batch_size=128, lr=5e-3, target_l0=6.0, l0_gain=0.05, penalty_warmup=0
    )
    (done,) = train(store, Dictionary(SITE, latents=48, sparsify=sparsify), config)
    assert done.metrics["l0"] == pytest.approx(6.0, rel=0.25)


def test_weight_average_is_the_formula() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = WeightAverage({"w": parameter}, 0.9)
    values = [torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    for value in values:
        parameter.data.copy_(value)
        average.update()
    average.apply()
    weights = torch.tensor([0.9 ** (4 - i) for i in range(5)])
    wanted = (torch.stack(values) * weights[:, None]).sum(0) / weights.sum()
    torch.testing.assert_close(parameter.data, wanted)


def test_resampling_revives_dead_latents() -> None:
    d = Dictionary({"a": 16}, latents=48, sparsify=TopK(4))
    with torch.no_grad():
        d.b_enc[:8] = -100.0
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 16, generator=generator)
    dead = (d.encode(x) == 0).all(0)
    assert dead[:8].all()
    config = TrainConfig(steps=10, lr=1e-3)
    learner = Learner(name="a", dictionary=d, config=config)
    learner.train_step(x, x, 0)
    moments = {n: learner.optimizer.state[v] for n, v in learner.views.items()}
    assert resample(d, dead, x, x, moments, generator) == int(dead.sum())
    for name in ("W_enc", "W_dec", "b_enc"):
        assert not moments[name]["exp_avg"][dead].any()
        assert moments[name]["exp_avg"][~dead].any()
    rows = d.W_dec[dead].detach()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    centred = torch.nn.functional.normalize(x - d.b_dec.detach(), dim=1)
    assert ((rows @ centred.T).amax(1) > 0.9999).all()
    norms = d.W_enc.detach().norm(dim=0)
    torch.testing.assert_close(norms[dead], (0.2 * norms[~dead].mean()).expand(len(rows)))


def test_resampling_in_a_run_lowers_the_dead_share(store: Store) -> None:
    def run(every: int) -> float:
        d = Dictionary(SITE, latents=96, sparsify=ReLU(l1=1e-3))
        with torch.no_grad():
            d.b_enc[:48] = -100.0
        config = TrainConfig(
            steps=200, batch_size=128, lr=3e-3, aux_k=0, dead_after=2000, resample_every=every
        )
        train(store, d, config)
        return evaluate(d, store).dead

    assert run(0) >= 0.5
    assert run(40) < 0.4


def test_the_run_ends_with_the_average(store: Store) -> None:
    plain = Dictionary(SITE, latents=48, sparsify=TopK(4))
    averaged = Dictionary(SITE, latents=48, sparsify=TopK(4))
    steady = TrainConfig(steps=100, batch_size=64, lr=5e-3, decay=0.0)
    train(store, plain, steady)
    train(store, averaged, TrainConfig(steps=100, batch_size=64, lr=5e-3, decay=0.0, ema=0.95))
    assert not torch.equal(plain.W_dec, averaged.W_dec)
    close = torch.cosine_similarity(plain.W_dec, averaged.W_dec, dim=1)
    assert close.mean() > 0.95  # it lags behind by about 1 / (1 - ema) steps
    torch.testing.assert_close(averaged.W_dec.norm(dim=1), plain.W_dec.norm(dim=1))


def test_early_stop_on_held_out_items(store: Store, tmp_path: Path) -> None:
    events: list[TrainEvent] = []
    config = TrainConfig(
        steps=400,
        batch_size=64,
        lr=0.02,
        decay=0,
        holdout=0.25,
        validate_every=10,
        validation_batches=2,
        patience=2,
        log_every=10,
    )
    (done,) = train(
        store,
        Dictionary(SITE, latents=400, sparsify=TopK(8)),
        config,
        out=tmp_path,
        on_event=events.append,
    )
    stopped = [e for e in events if e.kind == "stopped"]
    assert len(stopped) == 1
    assert "held-out FVU has not improved since step" in stopped[0].message
    assert stopped[0].step < 400
    assert "val_fvu" in done.metrics
    assert any("val_fvu" in row for row in read_log(tmp_path / "log.jsonl"))


@pytest.mark.parametrize("sparsify", [ReLU(), TopK(3)], ids=str)
def test_all_of_it_resumes_bit_for_bit(store: Store, tmp_path: Path, sparsify: Sparsify) -> None:
    config = TrainConfig(
        steps=60,
        batch_size=64,
        checkpoint_every=20,
        log_every=10,
        lr=5e-3,
        target_l0=5.0,
        ema=0.9,
        resample_every=15,
        dead_after=300,
        holdout=0.2,
        validate_every=10,
        validation_batches=1,
        patience=50,
    )

    def run(out: str, stop: int | None) -> Dictionary:
        def on_event(event: TrainEvent) -> None:
            if stop is not None and event.step >= stop:
                raise KeyboardInterrupt

        d = Dictionary(SITE, latents=48, sparsify=sparsify)
        train(store, d, config, out=tmp_path / out, on_event=on_event)
        return d

    whole = run("whole", None)
    for stop in (30, 50):
        with pytest.raises(KeyboardInterrupt):
            run("cut", stop)
    cut = run("cut", None)
    for name, value in whole.state_dict().items():
        assert torch.equal(cut.state_dict()[name], value), name
    logs = [
        [r for r in read_log(tmp_path / n / "log.jsonl") if r["name"]] for n in ("whole", "cut")
    ]
    assert logs[0] == logs[1]


def test_configurations_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"need held-out items: set holdout"):
        TrainConfig(validate_every=10)
    with pytest.raises(ValueError, match=r"target_l0 must be > 0"):
        TrainConfig(target_l0=0)


def test_jump_relu_starts_at_the_l0_asked_for_unless_told_or_trained() -> None:
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))

    def l0_after(d: Dictionary, target: float | None = 20.0) -> float:
        Learner(name="a", dictionary=d, config=TrainConfig(target_l0=target))
        return float((d.encode(x) != 0).sum(1).double().mean())

    fresh = Dictionary({"a": 64}, latents=512, sparsify=JumpReLU())
    assert l0_after(fresh) == pytest.approx(20.0, rel=0.25)
    assert l0_after(Dictionary({"a": 64}, latents=512, sparsify=JumpReLU()), None) > 200
    told = Dictionary({"a": 64}, latents=512, sparsify=JumpReLU(threshold=0.1))
    assert l0_after(told) > 200
    trained = Dictionary({"a": 64}, latents=512, sparsify=JumpReLU())
    with torch.no_grad():
        trained.sparsify.threshold[3] = 0.2
    before = trained.W_enc.detach().clone()
    assert l0_after(trained) > 200
    assert torch.equal(trained.W_enc, before)


def test_jump_relu_keeps_its_l0_with_the_defaults() -> None:
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(128, 64, generator=generator), dim=1)

    def batch() -> torch.Tensor:
        codes = torch.rand(512, 128, generator=generator)
        x = (codes * (torch.rand(512, 128, generator=generator) < 0.1)) @ atoms
        return x / 0.2

    d = Dictionary({"a": 64}, latents=256, sparsify=JumpReLU())
    learner = Learner(
        name="a", dictionary=d, config=TrainConfig(steps=300, batch_size=512, target_l0=12.0)
    )
    for number in range(300):
        x = batch()
        result = learner.train_step(x, x, number)
    assert float(result.fired_F.sum()) / 512 == pytest.approx(12.0, rel=0.15)

"""The contestants of `benchmarks.quality`: each trainer's own initialisation, losses, constraints.

What a trainer leaves to its user (the learning rate, its schedule, Adam, the starting b_dec where
there is no rule for it) is the same for all.
"""

import os

import torch

from benchmarks.quality import Contestant, K, Make, Setting


def ours(kind: str, l0: float = K) -> Make:
    """Our learner with its default configuration."""

    def make(s: Setting) -> Contestant:
        from dictlearn import config
        from dictlearn.dictionary import Dictionary
        from dictlearn.endings import smallest_kept
        from dictlearn.learner import Learner
        from dictlearn.schedule import TrainConfig

        rule = config.JumpReLU() if kind == "JumpReLU" else getattr(config, kind)(K)
        seed = int(torch.randint(1 << 30, ()))
        d = Dictionary({"a": s.width}, latents=s.latents, sparsify=rule, seed=seed)
        with torch.no_grad():
            d.b_dec.copy_(s.mean)
        target = l0 if kind == "JumpReLU" else None
        train = TrainConfig(steps=s.steps, batch_size=s.batch, lr=s.lr, target_l0=target)
        learner = Learner(name="ours", dictionary=d, config=train, backend="onednn")

        def step(x: torch.Tensor, number: int) -> None:
            learner.train_step(x, x, number)
            if learner.failed:
                raise ValueError(learner.failed)

        def theta() -> torch.Tensor | None:
            return None if kind == "TopK" else d.sparsify.threshold

        def finish(batches: list[torch.Tensor]) -> None:
            if kind == "BatchTopK":
                with torch.no_grad():
                    least = [smallest_kept(learner, x) for x in batches]
                    d.sparsify.threshold.copy_(torch.stack(least).mean())

        return Contestant(
            step=step, pre=d.pre_activations, decode=d.decode, theta=theta, finish=finish
        )

    return make


def sparsify(s: Setting) -> Contestant:
    """EleutherAI's sparsify, with the steps of its trainer."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(s.width, SparseCoderConfig(num_latents=s.latents, k=K))
    sae.b_dec.data = s.mean.clone()
    optimizer = torch.optim.Adam(sae.parameters(), lr=s.lr)

    def step(x: torch.Tensor, number: int) -> None:
        optimizer.param_groups[0]["lr"] = s.lr * s.factor(number)
        sae.set_decoder_norm_to_unit_norm()
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    def pre(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x - sae.b_dec, sae.encoder.weight, sae.encoder.bias)

    return Contestant(step=step, pre=pre, decode=lambda a: a @ sae.W_dec + sae.b_dec)


def dictionary_learning(kind: str, penalty: float = 1.0, *, bandwidth: float = 0.001) -> Make:
    """dictionary_learning's trainers: TopK and BatchTopK start b_dec at the geometric median.

    `penalty` and `bandwidth` are JumpReLU's.
    """

    def make(s: Setting) -> Contestant:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.jumprelu import JumpReluTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer

        common = {
            "steps": s.steps,
            "activation_dim": s.width,
            "dict_size": s.latents,
            "layer": 0,
            "lm_name": "",
            "device": "cpu",
            "lr": s.lr,
            "warmup_steps": 0,
        }
        if kind == "JumpReLU":
            trainer = JumpReluTrainer(
                **common,
                target_l0=float(K),
                sparsity_warmup_steps=round(0.1 * s.steps),
                sparsity_penalty=penalty,
                bandwidth=bandwidth,
            )
            trainer.ae.b_dec.data = s.mean.clone()
        else:
            cls = {"TopK": TopKTrainer, "BatchTopK": BatchTopKTrainer}[kind]
            trainer = cls(**common, k=K, threshold_start_step=0, threshold_beta=0.99)
        trainer.scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, s.factor)
        ae = trainer.ae

        def pre(x: torch.Tensor) -> torch.Tensor:
            if kind == "JumpReLU":
                return ae.encode(x, output_pre_jump=True)[1]
            return ae.encoder(x - ae.b_dec)

        def theta() -> torch.Tensor | None:
            return None if kind == "TopK" else ae.threshold

        return Contestant(
            step=lambda x, number: trainer.update(number, x), pre=pre, decode=ae.decode, theta=theta
        )

    return make


def sae_lens(kind: str, penalty: float | None = None, *, threshold: float = 0.01) -> Make:
    """SAELens's training classes, with the steps of its trainer.

    JumpReLU is trained with its quadratic loss around k, or with its L0 loss (its default) times
    `penalty` where that is given; `threshold` is the initial one.
    """

    def make(s: Setting) -> Contestant:
        import sae_lens as lens
        from sae_lens.saes.sae import TrainStepInput

        options = {"k": K}
        if kind == "JumpReLU":
            options = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(K)}
            if penalty is not None:
                options = {"jumprelu_sparsity_loss_mode": "step"}
            options["jumprelu_init_threshold"] = threshold
        config = getattr(lens, f"{kind}TrainingSAEConfig")(d_in=s.width, d_sae=s.latents, **options)
        sae = getattr(lens, f"{kind}TrainingSAE")(config)
        sae.b_dec.data = s.mean.clone()
        sae.train()
        optimizer = torch.optim.Adam(sae.parameters(), lr=s.lr)
        none = torch.zeros(s.latents, dtype=torch.bool)
        warm = max(1, round(0.1 * s.steps))

        def step(x: torch.Tensor, number: int) -> None:
            optimizer.param_groups[0]["lr"] = s.lr * s.factor(number)
            given = TrainStepInput(
                sae_in=x,
                dead_neuron_mask=none,
                coefficients={"l0": (penalty or 1.0) * min((number + 1) / warm, 1.0)}
                if kind == "JumpReLU"
                else {},
                n_training_steps=number,
                is_logging_step=False,
            )
            sae.training_forward_pass(step_input=given).loss.backward()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        def pre(x: torch.Tensor) -> torch.Tensor:
            return sae.encode_with_hidden_pre(x)[1]

        def theta() -> torch.Tensor | None:
            if kind == "TopK":
                return None
            return sae.threshold if kind == "JumpReLU" else sae.topk_threshold.float()

        return Contestant(step=step, pre=pre, decode=sae.decode, theta=theta)

    return make


CONTESTANTS: dict[tuple[str, str], Make] = {
    ("TopK", "ours"): ours("TopK"),
    ("TopK", "sparsify"): sparsify,
    ("TopK", "dictionary_learning"): dictionary_learning("TopK"),
    ("TopK", "sae-lens"): sae_lens("TopK"),
    ("BatchTopK", "ours"): ours("BatchTopK"),
    ("BatchTopK", "dictionary_learning"): dictionary_learning("BatchTopK"),
    ("BatchTopK", "sae-lens"): sae_lens("BatchTopK"),
    ("JumpReLU", "ours"): ours("JumpReLU"),
    ("JumpReLU", "dictionary_learning"): dictionary_learning("JumpReLU"),
    ("JumpReLU", "sae-lens"): sae_lens("JumpReLU"),
}

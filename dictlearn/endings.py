"""What happens after the last step, and at measurements in between: thresholds, held-out error.

Shapes: B tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import torch

from actstore.aligned_loader import AlignedLoader
from actstore.loader import TokenLoader
from dictlearn.kernels import has_sparse_step
from dictlearn.learner import Learner
from dictlearn.picks import pick
from dictlearn.sparsify import BatchTopKSelection
from dictlearn.team import pair_of


def squared_errors(
    learners: Sequence[Learner], loader: TokenLoader | AlignedLoader, batches: int
) -> dict[str, tuple[float, int]]:
    """Return the summed mean squared error, and the tokens, of the first batches, by learner."""
    sums = {learner.name: (0.0, 0) for learner in learners}
    with closing(iter(loader)) as found:  # type: ignore[type-var]
        for batch, _ in zip(found, range(batches), strict=False):
            for learner in learners:
                total, count = sums[learner.name]
                error = learner.error(*pair_of(learner.dictionary, batch.acts, batch.slices))
                sums[learner.name] = (total + error * len(batch), count + len(batch))
    return sums


@torch.no_grad()
def set_thresholds(
    learners: Sequence[Learner], loader: TokenLoader | AlignedLoader, batches: int
) -> None:
    """Set every BatchTopK threshold to the mean of the smallest activations kept, final weights.

    The paper (arXiv:2412.06410, equation 6) takes the mean over training. A running mean of that
    lags: it still holds thresholds of weights as they were 100 steps ago, which after a short run,
    or one whose weights are averaged, is another L0. So the mean is taken anew over `batches` that
    follow the last one trained on.
    """
    mine = [
        one
        for one in learners
        if isinstance(one.dictionary.sparsify, BatchTopKSelection) and not one.failed
    ]
    if not mine or not batches:
        return
    kept: dict[str, list[torch.Tensor]] = {one.name: [] for one in mine}
    with closing(iter(loader)) as found:  # type: ignore[type-var]
        for batch, _ in zip(found, range(batches), strict=False):
            for one in mine:
                x_Br, _ = pair_of(one.dictionary, batch.acts, batch.slices)
                kept[one.name].append(smallest_kept(one, x_Br))
    for one in mine:
        selection = one.dictionary.sparsify
        if isinstance(selection, BatchTopKSelection):
            selection.threshold.copy_(torch.stack(kept[one.name]).mean())


def smallest_kept(learner: Learner, x_Br: torch.Tensor) -> torch.Tensor:
    """Return the smallest activation that the training rule of BatchTopK keeps, over all ranks."""
    d = learner.dictionary
    if not has_sparse_step(d):
        acts_BF = d.sparsify.training_rule(d.pre_activations(x_Br))
        kept_N = acts_BF[acts_BF > 0]
        return kept_N.min() if kept_N.numel() else acts_BF.new_zeros(())
    center_r = d.center()
    xc_Br = x_Br if center_r is None else x_Br - center_r
    picks = pick(d, xc_Br, learner.backend, gather=learner.gather, shards=learner.shards)
    if picks is None or picks.smallest_kept is None:
        raise ValueError(f"{learner.name!r} is not a BatchTopK dictionary")
    return picks.smallest_kept

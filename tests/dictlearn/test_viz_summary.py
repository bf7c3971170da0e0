"""The summary figure: which latents it shows, what it draws, where a patch lies."""

import numpy as np
import pyarrow as pa
import pytest

from dictlearn.analysis import Sparsity
from dictlearn.report import Report
from dictlearn.viz.summary import latents_to_show, patch_box, summary


def make_sparsity() -> Sparsity:
    fired = np.array([[5, 5, 5, 5], [500, 100, 10, 30]])  # of 1,000 and 5,000 tokens
    largest = np.array([[1.0, 1, 1, 1], [9.0, 2.0, 8.0, 3.0]])
    top = pa.table(
        {
            "latent": [1, 1, 3],
            "rank": [0, 1, 0],
            "position": [7, 2, 5],
            "token": [1, 4, 0],
            "value": [2.0, 1.5, 3.0],
        }
    )
    return Sparsity(
        kinds=("cls", "patch"),
        tokens=np.array([1000, 5000]),
        fired=fired,
        total=fired.astype(float),
        largest=largest,
        position=np.arange(5),
        position_kind=np.array([0, 1, 1, 1, 1]),
        position_l0=np.ones(5),
        top=top,
    )


def make_report(l0: float) -> Report:
    return Report(
        store="0" * 64,
        reads=("embed",),
        writes=("embed",),
        latents=4,
        tokens=6000,
        items="all",
        l0=l0,
        l0_by_kind={"cls": l0 + 1, "patch": l0},
        l0_by_position={},
        fvu=0.1,
        fvu_by_kind={},
        fvu_by_site={},
        cosine=0.9,
        mse=0.1,
        dead=0.0,
        dense=0.0,
        density=(),
    )


def test_latents_shown_are_selective_and_strongest_first() -> None:
    # latent 0 fires on 10 % of the patches, latent 2 on 10 patches only: neither is selective
    assert latents_to_show(make_sparsity(), 6).tolist() == [3, 1]
    assert latents_to_show(make_sparsity(), 1).tolist() == [3]


@pytest.mark.parametrize(
    ("token", "expected"),
    [(0, None), (1, (0, 0, 0.5, 1 / 3)), (4, (0.5, 1 / 3, 0.5, 1 / 3)), (7, None)],
)
def test_a_patch_lies_where_its_number_says(
    token: int, expected: tuple[float, float, float, float] | None
) -> None:
    box = patch_box(1, (3, 2))(token)
    assert box == (None if expected is None else pytest.approx(expected))


def test_the_figure_draws_the_best_items_with_their_token() -> None:
    pictures: list[int] = []

    def image(item: int) -> np.ndarray:
        pictures.append(item)
        return np.full((4, 4), item)

    reports = {"0": make_report(3.0), "1": make_report(4.0)}
    figure = summary(
        reports,
        {"0": make_sparsity(), "1": make_sparsity()},
        layer="1",
        image=image,
        box=patch_box(1, (2, 2)),
        items=2,
    )
    figure.canvas.draw()
    assert pictures == [5, 7, 2]  # latent 3: one item; latent 1: two, in rank order
    upper, lower = figure.subfigs
    lines = upper.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["cls", "patch"]
    assert lines[1].get_ydata().tolist() == [3.0, 4.0]
    outlined = [len(axes.patches) for axes in lower.axes]
    assert outlined == [0, 0, 1, 1]  # token 0 is CLS
    titles = [axes.get_title() for axes in lower.axes]
    assert titles == ["3.0 cls", "", "2.0", "1.5"]

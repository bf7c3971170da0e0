"""Every family's small variants: hooks change nothing, and sites mean what docs/sites.md says.

A new file in ``families/`` is tested here without a change: its ``conformance()`` is scanned.
"""

import functools
import importlib.metadata
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import vitmodels
from vitmodels.model import VisionModel
from vitmodels.names import Site
from vitmodels.registry import families
from vitmodels.taps import HeadOutTap
from vitmodels.weights import seeded

BATCH = 2
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


VARIANTS = [
    pytest.param(family, name, id=f"{family.name}-{name}")
    for family in families()
    if _installed(family.backend)
    for name in family.conformance()
]


@dataclass(frozen=True, kw_only=True)
class Case:
    model: VisionModel
    x: Tensor
    bare: Tensor
    """Output of the module before any hook."""
    acts: dict[str, Tensor]
    """Every site, copied when it was read."""
    later: dict[str, Tensor]
    """The same tensors as returned: they must not have been changed after reading."""
    output: Tensor
    """Output of the pass that read everything."""

    def blocks(self, *parts: str) -> list[str]:
        """Return the prefixes ``blocks.L.`` of the blocks that have all these sites."""
        found = []
        for name in self.acts:
            prefix, _, part = name.rpartition(".")
            if part == parts[0] and all(f"{prefix}.{other}" in self.acts for other in parts):
                found.append(prefix)
        return found


@functools.cache
def _case(family_name: str, variant: str) -> Case:
    family = next(f for f in families() if f.name == family_name)
    with seeded(0):
        module = family.conformance()[variant]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():  # no zero biases, no tiny LayerScale
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise.to(parameter.dtype))
    model = vitmodels.wrap(module, family=family_name, id=f"{family_name}/{variant}")
    shape = (BATCH, *model.spec.input_shape)
    x = torch.randn(shape, generator=generator)
    if model.anatomy.vocabulary:
        x = torch.randint(model.anatomy.vocabulary, shape, generator=generator)
    with torch.no_grad():
        bare = model.anatomy.call(model.module, x)
        copies: dict[str, Tensor] = {}
        output: list[Tensor] = []
        later: dict[str, Tensor] = {}
        with model._reading(list(model.anatomy.taps), _Copying(copies, later)):
            output.append(model.anatomy.call(model.module, x))
    return Case(model=model, x=x, bare=bare, acts=copies, later=later, output=output[0])


class _Copying(dict[str, Tensor]):
    """Keeps a copy of every value beside the value."""

    def __init__(self, copies: dict[str, Tensor], later: dict[str, Tensor]) -> None:
        super().__init__()
        self.copies, self.later = copies, later

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.copies[key] = value.clone()
        self.later[key] = value


@pytest.fixture(params=[pytest.param(p.values, id=p.id) for p in VARIANTS])
def case(request: pytest.FixtureRequest) -> Case:
    family, variant = request.param
    return _case(family.name, variant)


def _hooks(model: VisionModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())


def _edit(value: Tensor) -> Tensor:
    return 0.5 * value + 0.25 * value.roll(1, dims=-1)


def test_reading_changes_nothing(case: Case) -> None:
    assert torch.equal(case.output, case.bare)
    assert torch.isfinite(case.bare).all()
    if "logits" in case.acts:
        assert torch.equal(case.acts["logits"], case.bare)
    before = _hooks(case.model)
    with torch.no_grad():
        one = case.model.run(case.x, list(case.acts)[-3])
        assert torch.equal(case.model(case.x), case.bare)
    assert _hooks(case.model) == before
    for name, value in one.items():
        assert torch.equal(value, case.acts[name])


def test_values_read_are_not_changed_later(case: Case) -> None:
    for name, value in case.acts.items():
        assert torch.equal(value, case.later[name]), name


def test_shapes_and_grids(case: Case) -> None:
    sites = case.model.sites()
    assert list(sites) == list(case.model.anatomy.taps)
    for name, info in sites.items():
        assert (BATCH, *info.shape) == tuple(case.acts[name].shape), name
        assert str(Site.parse(name)) == name
        if info.grid is not None and info.token_axis is not None:
            assert info.grid.n_tokens == info.shape[info.token_axis]
    assert case.model.spec.n_classes == 0 or sites["logits"].shape[-1] == case.model.spec.n_classes


def test_residual_stream(case: Case) -> None:
    a = case.acts
    order = [n.removesuffix(".resid_post") for n in a if n.endswith(".resid_post")]
    assert order, "a family without resid_post"
    for this, following in itertools.pairwise(order):
        same_stack = this.rpartition("blocks.")[0] == following.rpartition("blocks.")[0]
        pre = f"{following}.resid_pre"
        if same_stack and pre in a and a[pre].shape == a[f"{this}.resid_post"].shape:
            assert torch.equal(a[f"{this}.resid_post"], a[pre]), this
    for block in case.blocks("resid_pre", "attn_out", "resid_mid"):
        if a[f"{block}.resid_pre"].shape != a[f"{block}.resid_mid"].shape:
            continue  # the block merges tokens
        mid = a[f"{block}.resid_pre"] + a[f"{block}.attn_out"]
        torch.testing.assert_close(a[f"{block}.resid_mid"], mid, **TOLERANCE)
    for block in case.blocks("resid_mid", "mlp_out", "resid_post"):
        if a[f"{block}.resid_mid"].shape != a[f"{block}.resid_post"].shape:
            continue  # the block widens the stream
        post = a[f"{block}.resid_mid"] + a[f"{block}.mlp_out"]
        torch.testing.assert_close(a[f"{block}.resid_post"], post, **TOLERANCE)


def test_attention(case: Case) -> None:
    a = case.acts
    for block in case.blocks("pattern"):
        pattern = a[f"{block}.pattern"]
        if f"{block}.scores" in a:
            torch.testing.assert_close(a[f"{block}.scores"].softmax(-1), pattern, **TOLERANCE)
            torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]), **TOLERANCE)
        v = a.get(f"{block}.v")
        folded = v is not None and v.shape[1] != pattern.shape[-1]  # keys of a part of the tokens
        if f"{block}.z" in a and v is not None and not folded:
            z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
            torch.testing.assert_close(a[f"{block}.z"], z, rtol=1e-4, atol=1e-5)
    for block in case.blocks("head_out"):
        tap = case.model.anatomy.taps[f"{block}.head_out"]
        if isinstance(tap, HeadOutTap):
            kept: list[Tensor] = []
            handle = tap.module.register_forward_hook(lambda m, i, o, k=kept: k.append(o))
            with torch.no_grad():
                case.model.anatomy.call(case.model.module, case.x)
            handle.remove()
            total = a[f"{block}.head_out"].sum(-2)
            if tap.from_site is not None:
                total = tap.from_site(total)
            if tap.module.bias is not None:
                total = total + tap.module.bias
            torch.testing.assert_close(total.reshape(kept[0].shape), kept[0], **TOLERANCE)


def test_writing_back_and_editing(case: Case) -> None:
    changed = 0
    for name, info in case.model.sites().items():
        if not info.editable:
            with pytest.raises(ValueError, match="read-only"):
                case.model.editing({name: _edit})
            continue
        with torch.no_grad():
            with case.model.editing({name: lambda value: value}):
                same = case.model(case.x)
            with case.model.editing({name: _edit}):
                other = case.model(case.x)
        torch.testing.assert_close(same, case.bare, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.allclose(other, case.bare, rtol=1e-5, atol=1e-6), name
        changed += 1
    assert changed, "no site is editable"
    with torch.no_grad():
        assert torch.equal(case.model(case.x), case.bare)
    assert _hooks(case.model) == 0


def test_edit_is_what_later_reads_see(case: Case) -> None:
    for block in case.blocks("resid_mid", "mlp_out", "resid_post")[-1:]:
        with torch.no_grad(), case.model.editing({f"{block}.resid_mid": _edit}):
            got = case.model.run(case.x, f"{block}.{{resid_pre,resid_mid,mlp_out,resid_post}}")
        expected = _edit(case.acts[f"{block}.resid_mid"])
        torch.testing.assert_close(got[f"{block}.resid_mid"], expected, **TOLERANCE)
        assert torch.equal(got[f"{block}.resid_pre"], case.acts[f"{block}.resid_pre"])
        torch.testing.assert_close(
            got[f"{block}.resid_post"], expected + got[f"{block}.mlp_out"], **TOLERANCE
        )


def test_one_head_is_one_head(case: Case) -> None:
    for block in case.blocks("z", "head_out", "attn_in")[-1:]:
        if not case.model.sites()[f"{block}.z"].editable:
            continue

        def ablate(z: Tensor) -> Tensor:
            z[..., 0, :] = 0
            return z

        with torch.no_grad(), case.model.editing({f"{block}.z": ablate}):
            got = case.model.run(case.x, f"{block}.{{attn_in,z,head_out}}")
        assert torch.equal(got[f"{block}.attn_in"], case.acts[f"{block}.attn_in"])
        assert torch.equal(got[f"{block}.z"][..., 1:, :], case.acts[f"{block}.z"][..., 1:, :])
        assert not got[f"{block}.z"][..., 0, :].any()


def test_editing_the_pattern_recomputes_z(case: Case) -> None:
    for block in case.blocks("pattern", "v", "z")[-1:]:
        if not case.model.sites()[f"{block}.pattern"].editable:
            continue
        with torch.no_grad(), case.model.editing({f"{block}.pattern": torch.zeros_like}):
            got = case.model.run(case.x, f"{block}.{{v,z}}")
        assert torch.equal(got[f"{block}.v"], case.acts[f"{block}.v"])
        assert not got[f"{block}.z"].any()


def test_gradients_reach_every_site(case: Case) -> None:
    sites = [name for name, info in case.model.sites().items() if info.editable]
    got = case.model.run(case.x, sites, grad_of=lambda out: out.square().sum())
    for name in sites:
        grad = got[f"{name}.grad"]
        assert grad.shape == got[name].shape
        assert grad.abs().sum() > 0, name
    assert _hooks(case.model) == 0

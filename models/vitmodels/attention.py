"""The one tap of attention: sees q, k, v as the kernel did, on any module that calls SDPA.

While a module of interest runs, a :class:`torch.overrides.TorchFunctionMode` watches for
``F.scaled_dot_product_attention``, ``F.multi_head_attention_forward`` and softmax. The fused
output goes through untouched; scores and pattern are recomputed on the side::

    scores  = scale * q k^T + bias      bias: mask and relative positions, -inf where masked
    pattern = softmax(scores)           over keys
    z       = pattern v

An edit of q, k or v runs the kernel on the edited tensors; an edit of the scores or of the
pattern computes z by the formula.

Shape legend: B batch, H heads, T tokens, Q queries, S keys, K channels a head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitmodels.taps import Tap, Wire, Wiring

PARTS = ("q", "k", "v", "scores", "pattern", "z")
PARTS_MHA = (*PARTS, "head_out")
"""What a call of ``nn.MultiheadAttention`` has: its output projection is inside the call."""
Convert = Callable[[Tensor], Tensor]


def _swap(value: Tensor) -> Tensor:
    """``[B, H, T, K] <-> [B, T, H, K]``."""
    return value.transpose(-3, -2)


def _keep(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True, kw_only=True)
class AttentionTap(Tap):
    """One of q, k, v, scores, pattern, z of one attention call.

    Values are ``[B, token, head, channel]`` for q, k, v, z and ``[B, head, query, key]`` for
    scores and pattern. A kernel that works on another layout (windows folded into the batch)
    gets its own `to_site` and `from_site`.
    """

    scope: nn.Module
    """Module during whose forward the call happens: the attention module, or the block."""
    part: str
    """One of :data:`PARTS`, or of :data:`PARTS_MHA` where the scope is a MultiheadAttention."""
    call: int = 0
    """Which call inside the scope, counted from 0, where there are several."""
    softmax: bool = False
    """The module has no SDPA call but an explicit softmax (then only scores and pattern)."""
    to_site: Convert | None = None
    """Kernel layout -> value of the site; None for the usual one."""
    from_site: Convert | None = None
    """The inverse of `to_site`."""

    def __post_init__(self) -> None:
        allowed = ("scores", "pattern") if self.softmax else PARTS_MHA
        if self.part not in allowed:
            raise ValueError(f"part must be one of {allowed}, not {self.part!r}")

    def attach(self, wire: Wire, wiring: Wiring) -> None:
        """Add the wire to the scope's watcher."""
        key = ("attention", self.scope)
        watcher = wiring.shared.get(key)
        if watcher is None:
            watcher = wiring.shared[key] = _Watcher()
            wiring.before(self.scope, watcher.enter)
            wiring.after(self.scope, watcher.leave, always=True)
        default = _keep if self.part in ("scores", "pattern") else _swap
        port = _Port(
            wire=wire,
            to_site=self.to_site or default,
            from_site=self.from_site or default,
        )
        calls = watcher.softmax if self.softmax else watcher.fused
        calls.setdefault(self.call, {})[self.part] = port


@dataclass(frozen=True, kw_only=True)
class _Port:
    wire: Wire
    to_site: Convert
    from_site: Convert

    def __call__(self, value: Tensor) -> Tensor:
        new = self.wire(self.to_site(value))
        return self.from_site(new) if self.wire.writes else value


Ports = dict[str, _Port]


@dataclass(kw_only=True)
class _Watcher:
    """Pushes the function mode when its scope is entered, pops it when it is left."""

    fused: dict[int, Ports] = field(default_factory=dict)
    softmax: dict[int, Ports] = field(default_factory=dict)
    _modes: list["_Mode"] = field(default_factory=list)

    def enter(self, _module: nn.Module, _args: Any, _kwargs: Any) -> None:
        mode = _Mode(self)
        mode.__enter__()  # type: ignore[no-untyped-call]
        self._modes.append(mode)

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self._modes:  # empty when a hook before ours raised
            self._modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


_SOFTMAX: frozenset[Any] = frozenset({Tensor.softmax, torch.softmax, F.softmax})


class _Mode(TorchFunctionMode):
    def __init__(self, watcher: _Watcher) -> None:
        super().__init__()
        self.watcher = watcher
        self.n_fused = 0
        self.n_softmax = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention or func is F.multi_head_attention_forward:
            ports = self.watcher.fused.get(self.n_fused)
            self.n_fused += 1
            if ports:
                tapped = _sdpa if func is F.scaled_dot_product_attention else _mha
                return tapped(ports, *args, **kwargs)
        elif func in _SOFTMAX and self.watcher.softmax:
            ports = self.watcher.softmax.get(self.n_softmax)
            self.n_softmax += 1
            if ports:
                return _softmax(ports, func, args, kwargs)
        return func(*args, **kwargs)


def _softmax(ports: Ports, func: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
    scores = ports["scores"](args[0]) if "scores" in ports else args[0]
    pattern: Tensor = func(scores, *args[1:], **kwargs)
    return ports["pattern"](pattern) if "pattern" in ports else pattern


def _sdpa(
    ports: Ports,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` with its inside open."""
    query = ports["q"](query) if "q" in ports else query
    key = ports["k"](key) if "k" in ports else key
    value = ports["v"](value) if "v" in ports else value
    inside = [ports[part] for part in ("scores", "pattern") if part in ports]
    z: Tensor | None = None
    if inside:
        scores = _scores(query, key, attn_mask, is_causal, scale, enable_gqa)
        if "scores" in ports:
            scores = ports["scores"](scores)
        pattern = scores
        if "pattern" in ports or any(port.wire.writes for port in inside):
            wide = torch.float32 if scores.dtype in (torch.float16, torch.bfloat16) else None
            pattern = torch.softmax(scores, dim=-1, dtype=wide).to(scores.dtype)
        if "pattern" in ports:
            pattern = ports["pattern"](pattern)
        if any(port.wire.writes for port in inside):
            if dropout_p:
                pattern = F.dropout(pattern, dropout_p)
            groups = query.shape[-3] // value.shape[-3] if enable_gqa else 1
            z = pattern @ value.repeat_interleave(groups, dim=-3)
    if z is None:
        z = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    return ports["z"](z) if "z" in ports else z


def _scores(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Return ``scale * q k^T + bias`` with shape ``[..., H, Q, S]``."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        n_query, n_key = scores.shape[-2:]
        mask = torch.ones(n_query, n_key, dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf)
    return scores + mask


_MHA_ARGUMENTS = (
    *("query", "key", "value", "embed_dim_to_check", "num_heads"),
    *("in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "add_zero_attn"),
    *("dropout_p", "out_proj_weight", "out_proj_bias"),
)


def _mha(ports: Ports, *args: Any, **kwargs: Any) -> Any:
    """``F.multi_head_attention_forward`` of plain self-attention with its inside open.

    The library's output goes through when nothing is edited; q, k, v and z are recomputed
    from the packed projection on the side.
    """
    bound = dict(zip(_MHA_ARGUMENTS, args, strict=False)) | kwargs
    if bound.get("use_separate_proj_weight") or bound.get("bias_k") is not None:
        raise ValueError(
            "the attention tap reads nn.MultiheadAttention with one packed input projection "
            "only; this module has separate projections or added key/value biases"
        )
    if bound["query"] is not bound["key"] or bound["query"] is not bound["value"]:
        weights = bound["in_proj_weight"].chunk(3)
        biases = (None,) * 3 if bound["in_proj_bias"] is None else bound["in_proj_bias"].chunk(3)
        inputs = (bound["query"], bound["key"], bound["value"])
        projected = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
    else:
        packed = F.linear(bound["query"], bound["in_proj_weight"], bound["in_proj_bias"])
        projected = list(packed.chunk(3, dim=-1))
    heads = bound["num_heads"]
    q, k, v = (  # [T, B, D] -> [B, H, T, K]: the kernel's layout
        x.reshape(*x.shape[:-1], heads, -1).permute(1, 2, 0, 3) for x in projected
    )
    mask = bound.get("attn_mask")
    if mask is not None and mask.dim() == 3:
        mask = mask.reshape(-1, heads, *mask.shape[1:])
    padding = bound.get("key_padding_mask")
    if padding is not None:
        hidden = padding[:, None, None, :]
        if hidden.dtype == torch.bool:
            hidden = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, -math.inf)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf)
        mask = hidden if mask is None else mask + hidden
    elif mask is not None and mask.dtype == torch.bool:
        mask = ~mask  # MultiheadAttention: True is hidden; SDPA: True takes part
    dropout = bound["dropout_p"] if bound.get("training", True) else 0.0
    z = _sdpa(ports, q, k, v, attn_mask=mask, dropout_p=dropout)
    if "head_out" in ports:
        w_DHK = bound["out_proj_weight"].unflatten(1, (heads, -1))
        head_out = ports["head_out"](torch.einsum("bhtk,dhk->bhtd", z, w_DHK))
        if ports["head_out"].wire.writes:
            total_TBD = head_out.sum(dim=1).transpose(0, 1)
            bias = bound["out_proj_bias"]
            return total_TBD if bias is None else total_TBD + bias, None
    if not any(port.wire.writes for port in ports.values()):
        return F.multi_head_attention_forward(*args, **kwargs)
    z_TBD = z.permute(2, 0, 1, 3).flatten(2)
    return F.linear(z_TBD, bound["out_proj_weight"], bound["out_proj_bias"]), None


def attention_taps(
    scope: nn.Module, parts: tuple[str, ...] = PARTS, **options: Any
) -> dict[str, Tap]:
    """Return the attention taps of one scope by part, ``{"q": ..., "pattern": ...}``."""
    return {part: AttentionTap(scope=scope, part=part, **options) for part in parts}

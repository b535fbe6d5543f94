"""Mixture-of-experts routing: the gate, and the way of tokens to expert order and back (report 2.1.2, equations 12 to 16)."""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from dsv3.ops.grad import Function, apply
from dsv3.ops.quant import row_scales
from dsv3.ops.registry import check_dtype, define, native, require_dtype
from dsv3.reference import moe as reference
from dsv3.reference.quant import empty_row_scales


def _allocate_gate(
    logits: Tensor, bias: Tensor | None, num_groups: int, topk_groups: int, topk: int, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    index = logits.new_empty(tokens, topk, dtype=torch.int64)
    return index, logits.new_empty(tokens, topk), logits.new_empty(experts, dtype=torch.int32)


def _allocate_loads(
    logits: Tensor, bias: Tensor | None, cu_seqlens: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = cu_seqlens.shape[0] - 1, logits.shape[1]
    chosen, affinity = logits.new_empty(sums, dtype=torch.int32), logits.new_empty(sums, dtype=torch.float64)
    return *_allocate_gate(logits, bias, *settings), chosen, affinity


def _native_settings(
    num_groups: int, topk_groups: int, topk: int, route_scale: float, score: str, group_score: str, normalize: bool
) -> tuple[int, int, float, bool, bool, bool]:
    return num_groups, topk_groups, route_scale, score == "softmax", group_score == "top2_sum", normalize


def _launch_gate(outputs: Any, logits: Tensor, bias: Tensor | None, *settings: Any) -> None:
    native().moe_gate(*outputs, logits, bias, _native_settings(*settings))


def _launch_loads(outputs: Any, logits: Tensor, bias: Tensor | None, cu_seqlens: Tensor, *settings: Any) -> None:
    *others, affinity = outputs
    bits = affinity.view(torch.int64)  # the native side names no fp64
    native().moe_gate_loads(*others, bits, logits, bias, cu_seqlens, _native_settings(*settings))


def _launch_loads_backward(
    dlogits: Tensor,
    dweights: Tensor,
    daffinity: Tensor,
    logits: Tensor,
    index: Tensor,
    cu_seqlens: Tensor,
    route_scale: float,
    score: str,
    normalize: bool,
) -> None:
    inputs = dweights, daffinity.view(torch.int64), logits, index, cu_seqlens
    native().moe_gate_loads_backward(dlogits, *inputs, route_scale, score == "softmax", normalize)


def _supports_gate(logits: Tensor, num_groups: int, topk: int) -> str | None:
    experts = logits.shape[1]
    if (experts > 32 and experts not in (64, 128, 160, 256)) or topk > 32:
        return f"{experts} experts are more than 32 and not 64, 128, 160 or 256, or topk {topk} is more than 32"
    per_lane = -(-experts // 32)
    lanes, rest = divmod(experts // num_groups, per_lane)
    if num_groups > 1 and (rest or lanes & (lanes - 1)):
        return f"groups of {experts // num_groups} experts are not a power of two of lanes of {per_lane}"
    return check_dtype("logits", logits, torch.float32)


define(
    "moe_gate(Tensor logits, Tensor? bias, int num_groups, int topk_groups, int topk, float route_scale, str score, "
    "str group_score, bool normalize) -> (Tensor, Tensor, Tensor)",
    shapes="logits [T,E], bias [E] fp32 -> topk_idx [T,k] int64, topk_weights [T,k] fp32, counts [E] int32",
    reference=reference.moe_gate,
    allocate=_allocate_gate,
    launch=_launch_gate,
    supports=lambda logits, bias, num_groups, topk_groups, topk, *rest: _supports_gate(logits, num_groups, topk),
)
define(
    "moe_gate_backward(Tensor dweights, Tensor logits, Tensor topk_idx, float route_scale, str score, bool normalize) "
    "-> Tensor",
    shapes="dweights [T,k], logits [T,E] fp32, topk_idx [T,k] int64 -> dlogits [T,E] fp32",
    reference=reference.moe_gate_backward,
    allocate=lambda dweights, logits, *rest: torch.empty_like(logits),
    launch=lambda dlogits, dweights, logits, index, scale, score, normalize: native().moe_gate_backward(
        dlogits, dweights, logits, index, scale, score == "softmax", normalize
    ),
    supports=lambda dweights, logits, index, *rest: _supports_gate(logits, 1, index.shape[1]),
)
define(
    "moe_gate_loads(Tensor logits, Tensor? bias, Tensor cu_seqlens, int num_groups, int topk_groups, int topk, "
    "float route_scale, str score, str group_score, bool normalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    shapes="operands of moe_gate, cu_seqlens [n+1] int32 -> its results, chosen [n,E] int32, affinity [n,E] fp64",
    reference=reference.moe_gate_loads,
    allocate=_allocate_loads,
    launch=_launch_loads,
    supports=lambda logits, bias, cu, num_groups, topk_groups, topk, *rest: _supports_gate(logits, num_groups, topk),
)
define(
    "moe_gate_loads_backward(Tensor dweights, Tensor daffinity, Tensor logits, Tensor topk_idx, Tensor cu_seqlens, "
    "float route_scale, str score, bool normalize) -> Tensor",
    shapes="operands of moe_gate_backward, daffinity [n,E] fp64, cu_seqlens [n+1] int32 -> dlogits [T,E] fp32",
    reference=reference.moe_gate_loads_backward,
    allocate=lambda dweights, daffinity, logits, *rest: torch.empty_like(logits),
    launch=_launch_loads_backward,
    supports=lambda dweights, daffinity, logits, index, *rest: _supports_gate(logits, 1, index.shape[1]),
)


class _Gate(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        index, weights, counts = torch.ops.dsv3.moe_gate(logits, bias, *settings)
        ctx.save_for_backward(logits, index)
        ctx.settings = settings[3:5] + settings[6:]
        ctx.mark_non_differentiable(index, counts)
        return index, weights, counts

    @staticmethod
    def backward(ctx: Any, dindex: None, dweights: Tensor, dcounts: None) -> tuple[Tensor | None, ...]:
        dweights = dweights.contiguous()
        return (torch.ops.dsv3.moe_gate_backward(dweights, *ctx.saved_tensors, *ctx.settings), *[None] * 8)


class _GateLoads(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor | None, cu_seqlens: Tensor, *settings: Any
    ) -> tuple[Tensor, ...]:
        index, weights, counts, chosen, affinity = torch.ops.dsv3.moe_gate_loads(logits, bias, cu_seqlens, *settings)
        ctx.save_for_backward(logits, index, cu_seqlens)
        ctx.settings = settings[3:5] + settings[6:]
        ctx.mark_non_differentiable(index, counts, chosen)
        return index, weights, counts, chosen, affinity

    @staticmethod
    def backward(ctx: Any, dindex: None, dweights: Tensor, dcounts: None, dchosen: None, daffinity: Tensor) -> Any:
        grads = dweights.contiguous(), daffinity.contiguous()
        return (torch.ops.dsv3.moe_gate_loads_backward(*grads, *ctx.saved_tensors, *ctx.settings), *[None] * 9)


def moe_gate(
    logits: Tensor,
    bias: Tensor | None,
    *,
    num_groups: int,
    topk_groups: int,
    topk: int,
    route_scale: float,
    score: str = "sigmoid",
    group_score: str = "top2_sum",
    normalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses the experts of every token; differentiable in the logits, through the weights.

    s = sigmoid or softmax of the logits; s + bias chooses (groups first, those not kept at -inf, then experts, ties to the
    lowest index); s alone weighs: weights = s[idx] (/ their sum if normalize) * route_scale. V3: sigmoid, top2_sum,
    normalised, 2.5; V2: softmax, max, not normalised, 16.0.

    Args:
        logits: fp32 [T, E].
        bias: fp32 [E] or None.
        num_groups: E is split into so many equal groups; 1 means none.
        topk_groups: groups kept.
        topk: experts a token.
        route_scale: factor on the weights.
        score: "sigmoid" or "softmax".
        group_score: "top2_sum" or "max".
        normalize: whether the k weights are divided by their sum.

    Returns:
        topk_idx int64 [T, k] (best first), topk_weights fp32 [T, k], counts int32 [E].

    Raises:
        ValueError: shapes or settings that do not fit.
    """
    if logits.dim() != 2 or (bias is not None and bias.shape != logits.shape[1:]):
        found = f"{tuple(logits.shape)} and {None if bias is None else tuple(bias.shape)}"
        raise ValueError(f"moe_gate: logits must be (T, E) and bias (E,) or None, got {found}")
    check_gate("moe_gate", logits.shape[1], num_groups, topk_groups, topk, score, group_score)
    return apply(_Gate, logits, bias, num_groups, topk_groups, topk, route_scale, score, group_score, normalize)


def moe_gate_loads(
    logits: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    num_groups: int,
    topk_groups: int,
    topk: int,
    route_scale: float,
    score: str = "sigmoid",
    group_score: str = "top2_sum",
    normalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """moe_gate that also sums up what the sequence-wise balance loss is made of (V3 report, equations 17 to 20);
    differentiable in the logits, through the weights and `affinity`.

    With T_q tokens in sequence q, f_i = E / (k T_q) * chosen[q, i] and P_i = affinity[q, i] / T_q.

    Args:
        logits: fp32 [T, E].
        bias: fp32 [E] or None.
        cu_seqlens: int32 [n+1], where each of the n sequences begins and the last ends: from 0, not decreasing. Tokens behind
            the last count in none.
        num_groups, topk_groups, topk, route_scale, score, group_score, normalize: as of `moe_gate`.

    Returns:
        topk_idx, topk_weights and counts of moe_gate; chosen int32 [n, E], the tokens of each sequence whose topk best s,
        without bias and groups, include the expert (ties to the lowest index); affinity fp64 [n, E], the sum of
        s_i / sum_j s_j over its tokens, NaN where one of them is. Every run gives the same bits.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.
        RuntimeError: cu_seqlens without sense; on a GPU the next call of an op says so.
    """
    if logits.dim() != 2 or (bias is not None and bias.shape != logits.shape[1:]):
        found = f"{tuple(logits.shape)} and {None if bias is None else tuple(bias.shape)}"
        raise ValueError(f"moe_gate_loads: logits must be (T, E) and bias (E,) or None, got {found}")
    given = isinstance(cu_seqlens, Tensor)
    if not given or cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or not len(cu_seqlens):
        found = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}".removeprefix("torch.") if given else repr(cu_seqlens)
        raise ValueError(
            f"moe_gate_loads: cu_seqlens must be int32 (n+1,), got {found} for logits of {tuple(logits.shape)}"
        )
    check_gate("moe_gate_loads", logits.shape[1], num_groups, topk_groups, topk, score, group_score)
    settings = num_groups, topk_groups, topk, route_scale, score, group_score, normalize
    return apply(_GateLoads, logits, bias, cu_seqlens.contiguous(), *settings)


def check_gate(
    name: str, experts: int, num_groups: int, topk_groups: int, topk: int, score: str, group_score: str
) -> None:
    """Raises ValueError for settings of a gate that do not fit together."""
    if num_groups < 1 or experts % num_groups or not 1 <= topk_groups <= num_groups:
        raise ValueError(f"{name}: {topk_groups} of {num_groups} groups do not divide {experts} experts")
    if num_groups > 1 and group_score == "top2_sum" and experts < 2 * num_groups:
        raise ValueError(f"{name}: top2_sum needs groups of at least 2 experts, got {experts} in {num_groups} groups")
    if not 1 <= topk <= topk_groups * (experts // num_groups):
        raise ValueError(f"{name}: topk must be in 1..{topk_groups * (experts // num_groups)}, got {topk}")
    if score not in ("sigmoid", "softmax") or group_score not in ("top2_sum", "max"):
        raise ValueError(
            f"{name}: score must be sigmoid or softmax, group_score top2_sum or max, got {score}, {group_score}"
        )


class Permutation(NamedTuple):
    """The stable order of (token, slot) pairs by expert; see reference.moe_permutation."""

    offsets: Tensor  # int32 [E+1]
    source: Tensor  # int64 [T*k]: the pair in a row
    position: Tensor  # int64 [T, k]: the row of a pair


def _allocate_permutation(topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    offsets = topk_idx.new_empty(num_experts + 1, dtype=torch.int32)
    return offsets, topk_idx.new_empty(topk_idx.numel()), topk_idx.new_empty(topk_idx.shape)


def _launch_permutation(outputs: Any, topk_idx: Tensor, num_experts: int) -> None:
    blocks = min(64, max(1, topk_idx.numel() // 1024))
    native().moe_permutation(*outputs, topk_idx.new_empty(blocks, num_experts, dtype=torch.int32), topk_idx)


def _supports_rows(x: Tensor, position: Tensor, rows: int, *dtypes: torch.dtype) -> str | None:
    size = 16 // x.element_size()
    if rows != position.numel():
        return f"{rows} rows are not one for each of {position.numel()} positions"
    if x.shape[1] % size or position.shape[1] > 16:
        return f"hidden {x.shape[1]} is not a multiple of {size}, or topk {position.shape[1]} is more than 16"
    return check_dtype("x", x, *(dtypes or (torch.bfloat16, torch.float32)))


define(
    "moe_permutation(Tensor topk_idx, int num_experts) -> (Tensor, Tensor, Tensor)",
    shapes="topk_idx [T,k] int64 -> offsets [E+1] int32, source [T*k] int64, position [T,k] int64",
    reference=reference.moe_permutation,
    allocate=_allocate_permutation,
    launch=_launch_permutation,
    supports=lambda topk_idx, experts: None if experts <= 1024 else f"{experts} experts are more than 1024",
)
define(
    "moe_permute(Tensor x, Tensor source, Tensor position) -> Tensor",
    shapes="x [T,H] bf16|fp32, source [R], position [T,k] int64 -> rows [R,H], R <= T*k (native R = T*k)",
    reference=reference.moe_permute,
    allocate=lambda x, source, position: x.new_empty(source.shape[0], x.shape[1]),
    launch=lambda rows, x, source, position: native().moe_permute(rows, x, position),
    supports=lambda x, source, position: _supports_rows(x, position, source.shape[0]),
)
define(
    "moe_permute_cast(Tensor data, Tensor sf, Tensor source, Tensor position) -> (Tensor, Tensor)",
    shapes="data [T,H] e4m3, sf [T,ceil(H/128)] fp32 as of per_token_cast, source [R], position [T,k] int64 -> rows [R,H] "
    "and their scales, R <= T*k (native R = T*k)",
    reference=reference.moe_permute_cast,
    allocate=lambda data, sf, source, position: (
        data.new_empty(source.shape[0], data.shape[1]),
        empty_row_scales(sf, source.shape[0], sf.shape[1]),
    ),
    launch=lambda outs, *args: native().moe_permute_cast(*outs, *args),
    supports=lambda data, sf, source, position: _supports_rows(data, position, source.shape[0], torch.float8_e4m3fn),
)
define(
    "moe_unpermute(Tensor y, Tensor position, Tensor? weights) -> Tensor",
    shapes="y [R,H] bf16|fp32, position [T,k] int64 in 0..R-1, weights [T,k] fp32 -> [T,H] (native R = T*k)",
    reference=reference.moe_unpermute,
    allocate=lambda y, position, weights: y.new_empty(position.shape[0], y.shape[1]),
    launch=lambda out, *args: native().moe_unpermute(out, *args),
    supports=lambda y, position, weights: _supports_rows(y, position, y.shape[0]),
)


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(position)
        return torch.ops.dsv3.moe_permute(x, source, position)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None, None]:
        (position,) = ctx.saved_tensors
        return torch.ops.dsv3.moe_unpermute(drows.contiguous(), position, None), None, None


class _Unpermute(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, source: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(source, position, *(() if weights is None else (y, weights)))
        return torch.ops.dsv3.moe_unpermute(y, position, weights)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        source, position, *weighted = ctx.saved_tensors
        drows = torch.ops.dsv3.moe_permute(dout.contiguous(), source, position)
        if not weighted:
            return drows, None, None, None
        y, weights = weighted
        dots = (drows.to(weights.dtype) * y).sum(-1)
        factor = weights.view(-1).index_select(0, source)[:, None]
        return (drows * factor).to(y.dtype), None, None, dots.index_select(0, position.view(-1)).view(position.shape)


@overload
def moe_permute(x: Tensor, topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Permutation]: ...
@overload
def moe_permute(
    x: tuple[Tensor, Tensor], topk_idx: Tensor, num_experts: int
) -> tuple[tuple[Tensor, Tensor], Permutation]: ...
def moe_permute(
    x: Tensor | tuple[Tensor, Tensor], topk_idx: Tensor, num_experts: int
) -> tuple[Tensor | tuple[Tensor, Tensor], Permutation]:
    """Copies every token once for each of its experts, in expert order; differentiable in x (summed over the k copies, fp32).

    Args:
        x: [T, H], made contiguous; or e4m3 [T, H] and its scales as per_token_cast returns them, which has no gradient.
        topk_idx: int64 [T, k], experts in 0..num_experts-1.
        num_experts: E.

    Returns:
        rows [T*k, H] and the Permutation, whose `offsets` int32 [E+1] delimit the experts' rows. Of a cast, rows are one too:
        with the offsets, what grouped_fp8_gemm takes.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: on a CPU, experts that do not exist.
    """
    if not isinstance(x, Tensor) and (len(x) != 2 or not all(isinstance(part, Tensor) for part in x)):
        raise ValueError("moe_permute: x must be a tensor, or e4m3 and its scales")
    data = x if isinstance(x, Tensor) else x[0]
    if data.dim() != 2 or topk_idx.dim() != 2 or topk_idx.shape[0] != data.shape[0]:
        raise ValueError(
            f"moe_permute: x must be (T, H) and topk_idx (T, k), got {tuple(data.shape)} and {tuple(topk_idx.shape)}"
        )
    require_dtype("moe_permute", "topk_idx of int64", torch.int64, topk_idx)
    if num_experts < 0:
        raise ValueError(f"moe_permute: num_experts must not be negative, got {num_experts}")
    sf = None if isinstance(x, Tensor) else row_scales("moe_permute", *x)
    handle = Permutation(*torch.ops.dsv3.moe_permutation(topk_idx, num_experts))
    if sf is not None:
        rows = torch.ops.dsv3.moe_permute_cast(data.detach().contiguous(), sf, handle.source, handle.position)
        return rows, handle
    return apply(_Permute, x.contiguous(), handle.source, handle.position), handle


def moe_unpermute(y: Tensor, handle: Permutation, weights: Tensor | None = None) -> Tensor:
    """Sums every token's k rows, in fp32 and in the order of its slots; differentiable in y and weights.

    Args:
        y: [T*k, H] in expert order, made contiguous.
        handle: of moe_permute.
        weights: fp32 [T, k], made contiguous, or None for the plain sum.

    Returns:
        [T, H] of y's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    if y.dim() != 2 or y.shape[0] != handle.position.numel():
        raise ValueError(f"moe_unpermute: y must be (T*k, H) with {handle.position.numel()} rows, got {tuple(y.shape)}")
    if weights is not None and weights.shape != handle.position.shape:
        found = f"{tuple(weights.shape)} for {tuple(handle.position.shape)} pairs"
        raise ValueError(f"moe_unpermute: weights must be (T, k), got {found}")
    weights = None if weights is None else weights.contiguous()
    return apply(_Unpermute, y.contiguous(), handle.source, handle.position, weights)

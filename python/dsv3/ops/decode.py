"""What a decoding step does with few tokens: fewer kernels, each of which reads its weights once. Nothing differentiates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv3.ops.linear import Quantized
from dsv3.ops.moe import check_gate
from dsv3.ops.registry import check_dtype, define, native, require_dtype
from dsv3.reference import decode as reference

FEW_TOKENS = 64  # kFewTokens (csrc/decode/few_tokens.cuh), kMaxTokens (few_experts.cu)
STEP, ROWS, EXPERTS, CHOICES = 32, 16, 512, 1024  # kStep, kDepthMultiple; kRowTile; kMaxExperts; kMaxPairs
HIDDEN = 8192  # of combine_norm
BLOCK = 128  # kScaleBlock (few_codes.cuh)


def _few(x: Tensor) -> str | None:
    if x.shape[0] > FEW_TOKENS:
        return f"{x.shape[0]} tokens are more than {FEW_TOKENS}"
    return check_dtype("x", x, torch.bfloat16)


def _supports_product(x: Tensor, weight: Tensor, fp8: bool = False) -> str | None:
    rows, depth, step = *weight.shape[-2:], STEP // 2 if fp8 else STEP
    if rows % ROWS or depth % step:
        return f"a weight of {rows} x {depth} is not of multiples of {ROWS} x {step}"
    return _few(x) or check_dtype("weight", weight, _weight_dtype(fp8))


def _weight_dtype(fp8: bool) -> torch.dtype:
    return torch.float8_e4m3fn if fp8 else torch.bfloat16


def _supports_linear(x: Tensor, weights: list[Tensor], scales: list[Tensor], *args: Any) -> str | None:
    if len(weights) > 4:
        return f"{len(weights)} weights are more than 4"
    return next((reason for w in weights if (reason := _supports_product(x, w, bool(scales)))), None)


def _supports_gate(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, gate: Tensor, bias: Tensor | None, *settings: Any
) -> str | None:
    num_groups, _, topk = settings[:3]
    if x.shape[1] % 8 or x.shape[1] > HIDDEN or gate.shape[0] > 256 or topk > 32 or num_groups > 32:
        return f"hidden {x.shape[1]}, {gate.shape[0]} experts in {num_groups} groups, topk {topk}"
    return _few(x) or next((r for w in (norm_weight, gate) if (r := check_dtype("a weight", w, torch.bfloat16))), None)


def _launch_gate(
    outputs: tuple[Tensor, ...],
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate: Tensor,
    bias: Tensor | None,
    num_groups: int,
    topk_groups: int,
    topk: int,
    route_scale: float,
    score: str,
    group_score: str,
    normalize: bool,
    static_weights: bool,
) -> None:
    flags = score == "softmax", group_score == "top2_sum", normalize, static_weights
    settings = eps, num_groups, topk_groups, route_scale, *flags
    native().few_gate(*outputs, x, residual, norm_weight, gate, bias, settings)


def _supports_absorb(q: Tensor, weight: Tensor, cos: Tensor, *args: Any) -> str | None:
    _, nope, latent = weight.shape
    if nope % 16 or nope > 128 or latent % 64 or cos.shape[1] % 4:
        return f"heads of {nope} and {2 * cos.shape[1]} columns for latents of {latent}"
    return _few(q) or check_dtype("weight", weight, torch.bfloat16)


def _supports_experts(
    x: Tensor,
    topk_idx: Tensor | None,
    topk_weights: Tensor | None,
    gate_up: Tensor | None,
    down: Tensor | None,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
    *rest: Any,
) -> str | None:
    for weight in (down, shared_down):
        if weight is not None and (weight.shape[-1] % STEP or weight.shape[-2] % STEP):
            return f"experts of {weight.shape[-2]} x {weight.shape[-1]} are not of multiples of {STEP}"
    if gate_up is not None and (gate_up.shape[0] > EXPERTS or topk_idx.numel() > CHOICES or not topk_idx.shape[1]):
        return f"{gate_up.shape[0]} experts and {topk_idx.numel()} choices are not up to {EXPERTS} and {CHOICES}"
    weights, dtype = (gate_up, down, shared_gate_up, shared_down), _weight_dtype(any(sf is not None for sf in rest[:4]))
    reasons = (check_dtype("a weight", w, dtype) for w in weights if w is not None)
    return _few(x) or next((reason for reason in reasons if reason), None)


def _slots(topk_idx: Tensor | None, shared_down: Tensor | None) -> int:
    return (0 if topk_idx is None else topk_idx.shape[1]) + (0 if shared_down is None else 1)


def _launch_experts(
    y: Tensor,
    x: Tensor,
    topk_idx: Tensor | None,
    topk_weights: Tensor | None,
    gate_up: Tensor | None,
    down: Tensor | None,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
    *rest: Any,
) -> None:
    size = 0 if down is None else topk_idx.numel() * down.shape[-1]
    size += 0 if shared_down is None else x.shape[0] * shared_down.shape[-1]
    act = x.new_empty(size)
    experts = topk_idx, topk_weights, gate_up, down, shared_gate_up, shared_down
    native().few_experts(y, act, x, *experts, *rest)


def _supports_combine(residual: Tensor, y: Tensor, weight: Tensor, eps: float) -> str | None:
    if residual.shape[1] % 8 or residual.shape[1] > HIDDEN:
        return f"hidden {residual.shape[1]} is not a multiple of 8 up to {HIDDEN}"
    return check_dtype("residual", residual, torch.bfloat16) or check_dtype("weight", weight, torch.bfloat16)


def _scales_rule(weights: Sequence[Tensor | None], scales: Sequence[Tensor | None]) -> str | None:
    given, wanted = ([t is not None for t in tensors] for tensors in (scales, weights))
    if not any(given):
        return None
    if given != wanted:
        return f"expected scales of every weight or of none, got {sum(given)} of {sum(wanted)}"
    for w, sf in zip(weights, scales, strict=True):
        if w is not None and (w.dtype != torch.float8_e4m3fn or sf.shape != _scale_shape(w)):
            return f"expected weights of e4m3 with scales of their blocks, got {tuple(w.shape)} with {tuple(sf.shape)}"
    return None


def _scale_shape(weight: Tensor) -> tuple[int, ...]:
    return *weight.shape[:-2], *(-(-size // BLOCK) for size in weight.shape[-2:])


define(
    "few_linear(Tensor x, Tensor[] weights, Tensor[] scales, ScalarType out_dtype, bool static_weights) -> Tensor[]",
    shapes="x [T,K], weights [N_i,K] and no scales, or e4m3 with scales [ceil(N_i/128),ceil(K/128)] -> [T,N_i] of out_dtype; "
    "native: bf16, T <= 64, up to 4, K % 32 (e4m3 16), N_i % 16 == 0",
    reference=reference.few_linear,
    allocate=lambda x, weights, scales, out_dtype, static: [
        x.new_empty(x.shape[0], w.shape[0], dtype=out_dtype) for w in weights
    ],
    launch=lambda outs, x, weights, scales, out_dtype, static: native().few_linear(outs, x, weights, scales, static),
    supports=_supports_linear,
    rule=lambda x, weights, scales, *rest: _scales_rule(weights, scales),
)
define(
    "few_heads(Tensor x, Tensor weight, bool static_weights) -> Tensor",
    shapes="x [T,G,K], weight [G,N,K] -> [T,G,N]; native: bf16, T <= 64, K % 32, N % 16 == 0",
    reference=reference.few_heads,
    allocate=lambda x, weight, static: x.new_empty(*x.shape[:2], weight.shape[1]),
    launch=lambda out, *args: native().few_heads(out, *args),
    supports=lambda x, weight, static: _supports_product(x, weight),
)
define(
    "mla_absorb(Tensor q, Tensor weight, Tensor cos, Tensor sin, Tensor positions, bool static_weights) -> Tensor",
    shapes="q [T,G,Dn+Dr], weight [G,Dn,Dc], cos, sin [P,Dr/2] fp32, positions [T] int64 -> [T,G,Dc+Dr]; native: bf16, "
    "T <= 64, Dn % 16 == 0 up to 128, Dc % 64, Dr % 8 == 0",
    reference=reference.mla_absorb,
    allocate=lambda q, weight, cos, *args: q.new_empty(*q.shape[:2], weight.shape[2] + 2 * cos.shape[1]),
    launch=lambda out, *args: native().mla_absorb(out, *args),
    supports=_supports_absorb,
)
define(
    "few_gate(Tensor x, Tensor residual, Tensor norm_weight, float eps, Tensor gate, Tensor? bias, int num_groups, "
    "int topk_groups, int topk, float route_scale, str score, str group_score, bool normalize, bool static_weights) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    shapes="x, residual [T,H], norm_weight [H], gate [E,H], bias [E] fp32 -> x+residual, u [T,H], topk_idx [T,k] int64, "
    "topk_weights [T,k] fp32; native: bf16, T <= 64, H % 8 == 0 up to 8192, E <= 256",
    reference=reference.few_gate,
    allocate=lambda x, residual, norm, eps, gate, bias, groups, kept, topk, *rest: (
        torch.empty_like(x),
        torch.empty_like(x),
        x.new_empty(x.shape[0], topk, dtype=torch.int64),
        x.new_empty(x.shape[0], topk, dtype=torch.promote_types(x.dtype, torch.float32)),
    ),
    launch=_launch_gate,
    supports=_supports_gate,
)
define(
    "few_experts(Tensor x, Tensor? topk_idx, Tensor? topk_weights, Tensor? gate_up, Tensor? down, Tensor? shared_gate_up, "
    "Tensor? shared_down, Tensor? gate_up_sf, Tensor? down_sf, Tensor? shared_gate_up_sf, Tensor? shared_down_sf, "
    "bool static_weights) -> Tensor",
    shapes="x [T,H], topk_idx [T,k] int64, topk_weights [T,k] fp32, gate_up [E,2I,H], down [E,H,I], shared_gate_up [2J,H], "
    "shared_down [H,J], scales of e4m3 weights -> [T,k+1,H]; native: bf16, T <= 64, T k <= 1024, H, I, J % 32 == 0, E <= 512",
    reference=reference.few_experts,
    allocate=lambda x, topk_idx, weights, gate_up, down, shared_gate_up, shared_down, *rest: x.new_empty(
        x.shape[0], _slots(topk_idx, shared_down), x.shape[1]
    ),
    launch=_launch_experts,
    supports=_supports_experts,
    rule=lambda x, index, factors, *rest: _scales_rule(rest[:4], rest[4:8]),
)
define(
    "combine_norm(Tensor residual, Tensor y, Tensor weight, float eps) -> (Tensor, Tensor)",
    shapes="residual [T,H], y [T,S,H], weight [H] -> residual + sum of y, its RMSNorm [T,H]; native: bf16, H % 8 == 0 up to "
    "8192",
    reference=reference.combine_norm,
    allocate=lambda residual, y, weight, eps: (torch.empty_like(residual), torch.empty_like(residual)),
    launch=lambda outputs, *args: native().combine_norm(*outputs, *args),
    supports=_supports_combine,
)


def few_linear(
    x: Tensor,
    weights: Sequence[Tensor | Quantized],
    *,
    out_dtype: torch.dtype | None = None,
    static_weights: bool = False,
) -> list[Tensor]:
    """Linear layers that read the same few tokens, in one kernel; not differentiable.

    Natively a token's bits do not depend on the other tokens nor on their number. Weights in FP8 are multiplied with the tokens
    as they are, which are not cast: the result is that of the dequantised weights, summed in fp32.

    Args:
        x: [T, K], bf16 or fp32, made contiguous; native on Hopper for bf16 and T up to 64.
        weights: one or several of [N_i, K], all of x's dtype or all Quantized; native for up to 4.
        out_dtype: of the outputs, x's or fp32; None: x's.
        static_weights: no kernel that may still be running writes the weights, so that they may be read before the kernel
            ahead has ended. True where at least one kernel lies between what wrote them and this.

    Returns:
        [T, N_i] for each weight.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    several = isinstance(weights, Sequence)
    shapes = _shapes(weights if several else [weights])
    if x.dim() != 2 or not several or not shapes or any(len(s) != 2 or s[1] != x.shape[1] for s in shapes):
        raise ValueError(
            f"few_linear: expected x (T, K) and a list of weights (N, K), tensors or Quantized, got {tuple(x.shape)} and "
            f"{shapes if several else shapes[0]}"
        )
    if out_dtype not in (None, x.dtype, torch.float32):
        raise ValueError(f"few_linear: out_dtype must be {x.dtype} or torch.float32, got {out_dtype}")
    matrices, scales = _parts("few_linear", x, weights)
    static = static_weights and _are_contiguous(*weights)
    return torch.ops.dsv3.few_linear(x.detach().contiguous(), matrices, scales, out_dtype or x.dtype, static)


def few_heads(x: Tensor, weight: Tensor, *, static_weights: bool = False) -> Tensor:
    """A linear layer a head for few tokens; not differentiable.

    Args:
        x: [T, G, K], made contiguous.
        weight: [G, N, K] of x's dtype, each matrix contiguous, such as a part of every head's rows.
        static_weights: as in `few_linear`.

    Returns:
        [T, G, N].

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if x.dim() != 3 or weight.dim() != 3 or (weight.shape[0], weight.shape[2]) != x.shape[1:]:
        raise ValueError(
            f"few_heads: expected x (T, G, K) and weight (G, N, K), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    _check_dtypes("few_heads", x, weight)
    static = static_weights and _has_matrices(weight)
    return torch.ops.dsv3.few_heads(x.detach().contiguous(), _matrices(weight), static)


def mla_absorb(
    q: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, static_weights: bool = False
) -> Tensor:
    """The queries of mla_decode: [q_nope W_uk | rotated q_rope], for few tokens; not differentiable.

    Args:
        q: [T, G, Dn+Dr], made contiguous; its last Dr columns are rotated as rope_ does, not in place.
        weight: [G, Dn, Dc] of q's dtype, each matrix contiguous: W_uk, the first Dn rows of every head of kv_b.
        cos, sin: fp32 [P, Dr/2].
        positions: int64 [T]; one that the tables do not have gives NaN.
        static_weights: as in `few_linear`, and the same of the tables and positions.

    Returns:
        [T, G, Dc+Dr].

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if (
        q.dim() != 3
        or weight.dim() != 3
        or weight.shape[0] != q.shape[1]
        or cos.dim() != 2
        or cos.shape != sin.shape
        or cos.shape[0] < 1
        or q.shape[2] != weight.shape[1] + 2 * cos.shape[1]
        or positions.shape != q.shape[:1]
    ):
        found = ", ".join(str(tuple(t.shape)) for t in (q, weight, cos, sin, positions))
        wanted = "q (T, G, Dn+Dr), weight (G, Dn, Dc), cos and sin (P, Dr/2), positions (T,)"
        raise ValueError(f"mla_absorb: expected {wanted}, got {found}")
    _check_dtypes("mla_absorb", q, weight)
    static = static_weights and _has_matrices(weight)
    return torch.ops.dsv3.mla_absorb(q.detach().contiguous(), _matrices(weight), cos, sin, positions, static)


def few_gate(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    num_groups: int,
    topk_groups: int,
    topk: int,
    route_scale: float,
    score: str = "sigmoid",
    group_score: str = "top2_sum",
    normalize: bool = True,
    static_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rmsnorm with its residual, the gate's logits in fp32, and moe_gate, in one kernel for few tokens; not differentiable.

    Args:
        x, residual: [T, H].
        norm_weight: [H].
        gate: [E, H] of x's dtype.
        bias: fp32 [E] or None.
        eps: of the norm.
        num_groups, topk_groups, topk, route_scale, score, group_score, normalize: as of `moe_gate`.
        static_weights: as in `few_linear`.

    Returns:
        x + residual and its norm [T, H], topk_idx int64 and topk_weights fp32 [T, k].

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.
    """
    good = x.dim() == gate.dim() == 2 and residual.shape == x.shape and norm_weight.shape == x.shape[1:]
    if not good or gate.shape[1] != x.shape[1] or (bias is not None and bias.shape != gate.shape[:1]):
        found = ", ".join(str(tuple(t.shape)) for t in (x, residual, norm_weight, gate))
        raise ValueError(
            f"few_gate: expected x and residual (T, H), norm_weight (H,), gate (E, H), bias (E,) or None, got {found}"
        )
    _check_dtypes("few_gate", x, residual, gate)
    settings = num_groups, topk_groups, topk, route_scale, score, group_score
    check_gate("few_gate", gate.shape[0], *settings[:3], score, group_score)
    tensors = x.detach().contiguous(), residual.detach().contiguous(), norm_weight.detach()
    static = static_weights and _are_contiguous(gate)
    return torch.ops.dsv3.few_gate(*tensors, eps, gate.detach().contiguous(), bias, *settings, normalize, static)


def few_experts(
    x: Tensor,
    topk_idx: Tensor | None = None,
    topk_weights: Tensor | None = None,
    *,
    gate_up: Tensor | Quantized | None = None,
    down: Tensor | Quantized | None = None,
    shared_gate_up: Tensor | Quantized | None = None,
    shared_down: Tensor | Quantized | None = None,
    static_weights: bool = False,
) -> Tensor:
    """The MLPs of the experts that few tokens have chosen, and of shared ones, with no token moved; not differentiable.

    y[t, j] = swiglu(x[t] gate_up[e]^T) * topk_weights[t, j] down[e]^T with e = topk_idx[t, j]; behind them the shared
    experts', whose weight is 1. A dense MLP is a shared one alone.

    Args:
        x: [T, H]; native on Hopper for bf16, T up to 64.
        topk_idx, topk_weights: int64 and fp32 [T, k]; no expert twice for a token.
        gate_up: [E, 2I, H] of x's dtype, the gate half first; or it and all other weights Quantized, as in `few_linear`.
        down: [E, H, I].
        shared_gate_up: [2J, H].
        shared_down: [H, J].
        static_weights: as in `few_linear`.

    Returns:
        [T, k + 1, H], or k where nothing is shared: to be summed over the slots.

    Raises:
        ValueError: shapes or dtypes that do not fit, or neither routed nor shared experts.
        RuntimeError: on a CPU, an expert that there is not; natively its slot of the result holds anything.
    """
    routed = topk_idx, topk_weights, gate_up, down
    shared = shared_gate_up, shared_down
    given = [sum(t is not None for t in group) for group in (routed, shared)]
    shapes = [None if t is None else s for t, s in zip((*routed, *shared), _shapes((*routed, *shared)), strict=True)]
    good = (
        not any(isinstance(s, str) for s in shapes)
        and given[0] in (0, 4)
        and given[1] in (0, 2)
        and any(given)
        and x.dim() == 2
    )
    if good and given[0]:
        good = (
            topk_idx.dim() == 2
            and len(down.shape) == 3
            and topk_idx.shape[0] == x.shape[0]
            and topk_weights.shape == topk_idx.shape
        )
        good = good and down.shape[1] == x.shape[1] and gate_up.shape == (down.shape[0], 2 * down.shape[2], x.shape[1])
    if good and given[1]:
        good = (
            len(shared_down.shape) == 2
            and shared_gate_up.shape == (2 * shared_down.shape[-1], x.shape[1])
            and shared_down.shape[0] == x.shape[1]
        )
    if not good:
        raise ValueError(
            "few_experts: expected x (T, H) with topk_idx and topk_weights (T, k), gate_up (E, 2I, H) and down (E, H, I), "
            f"or shared_gate_up (2J, H) and shared_down (H, J), or both, got {tuple(x.shape)} with {shapes}"
        )
    weights = gate_up, down, *shared
    used = [weight for weight in weights if weight is not None]
    matrices, scales = (iter(part) for part in _parts("few_experts", x, used))
    if topk_idx is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        require_dtype("few_experts", "topk_idx of int64", torch.int64, topk_idx)
        require_dtype("few_experts", f"topk_weights of {str(wide).removeprefix('torch.')}", wide, topk_weights)
    choice = (None if t is None else t.detach().contiguous() for t in (topk_idx, topk_weights))
    parts = (None if weight is None else next(part, None) for part in (matrices, scales) for weight in weights)
    static = static_weights and _are_contiguous(*used)
    return torch.ops.dsv3.few_experts(x.detach().contiguous(), *choice, *parts, static)


def combine_norm(residual: Tensor, y: Tensor, weight: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The residual with what its slots add, and the RMSNorm of that; not differentiable.

    Args:
        residual: [T, H].
        y: [T, S, H], summed over S with the residual in fp32, in order, rounded once.
        weight: [H].
        eps: of the norm.

    Returns:
        (out, rmsnorm(out, weight)) of residual's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    good = residual.dim() == 2 and y.dim() == 3 and y.shape[1] > 0 and weight.shape == residual.shape[1:]
    if not good or (y.shape[0], y.shape[2]) != residual.shape:
        found = f"{tuple(residual.shape)}, {tuple(y.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"combine_norm: expected residual (T, H), y (T, S, H) and weight (H,), got {found}")
    _check_dtypes("combine_norm", residual, y)
    return torch.ops.dsv3.combine_norm(residual.detach().contiguous(), y.detach().contiguous(), weight.detach(), eps)


def _check_dtypes(name: str, x: Tensor, *others: Tensor) -> None:
    require_dtype(name, "activations and weights of one dtype", x.dtype, x, *others)


def _shapes(weights: Sequence[Any]) -> list[Any]:
    """The shapes of weights; of what is none, its type's name."""
    return [tuple(w.shape) if isinstance(w, (Tensor, Quantized)) else type(w).__name__ for w in weights]


def _parts(name: str, x: Tensor, weights: Sequence[Tensor | Quantized]) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices of weights, and their scales where they are Quantized; ValueError unless all are, or none."""
    quantized = [w for w in weights if isinstance(w, Quantized)]
    if quantized and len(quantized) < len(weights):
        raise ValueError(
            f"{name}: expected weights that are all Quantized or none, got {len(quantized)} of {len(weights)}"
        )
    if not quantized:
        _check_dtypes(name, x, *weights)
    elif x.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"{name}: expected x of bfloat16 or float32 for Quantized weights, got {x.dtype}")
    for w in quantized:
        if not isinstance(w.sf, Tensor):
            raise ValueError(f"{name}: expected Quantized weights with scales, got {type(w.sf).__name__}")
        require_dtype(name, "Quantized weights of float8_e4m3fn", torch.float8_e4m3fn, w.data)
        require_dtype(name, "scales of float32", torch.float32, w.sf)
        wanted = _scale_shape(w.data)
        if w.sf.shape != wanted:
            raise ValueError(
                f"{name}: a weight of {tuple(w.shape)} must have scales of {wanted}, got {tuple(w.sf.shape)}"
            )
    matrices = [w.data if quantized else w.detach() for w in weights]
    return [m.contiguous() for m in matrices], [w.sf.contiguous() for w in quantized]


def _matrices(weight: Tensor) -> Tensor:
    """weight [G, N, K], each of whose matrices is contiguous."""
    weight = weight.detach()
    return weight if _has_matrices(weight) else weight.contiguous()


def _has_matrices(weight: Tensor) -> bool:
    return weight.stride()[1:] == (weight.shape[2], 1)


def _are_contiguous(*weights: Tensor | Quantized) -> bool:
    """Whether kernels read these weights themselves: a copy has just been written, and is not static."""
    parts = [part for w in weights for part in ((w.data, w.sf) if isinstance(w, Quantized) else (w,))]
    return all(part.is_contiguous() for part in parts)

"""Attention over whole sequences, for training and prefill: FlashAttention with one rotated key for all heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dsv3.ops import registry
from dsv3.ops.grad import Function, apply
from dsv3.ops.registry import define
from dsv3.reference import attention as reference

NOPE, ROPE, VALUE = 128, 64, 128  # what the native kernels take


def _allocate_attention(
    q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, *settings: Tensor | int | bool | float
) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(tokens, heads, v.shape[2]), q.new_empty(heads, tokens, dtype=wide)


def supports_attention(
    q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, *settings: Tensor | int | bool | float
) -> str | None:
    widths = k_nope.shape[2], k_rope.shape[1], v.shape[2]
    if widths != (NOPE, ROPE, VALUE):
        return f"heads are of {widths[0]} + {widths[1]} and {widths[2]} columns, not {NOPE} + {ROPE} and {VALUE}"
    if settings[-1] <= 0:
        return f"softmax_scale is {settings[-1]}"
    named = {"q": q, "k_nope": k_nope, "k_rope": k_rope, "v": v}
    objections = (registry.check_dtype(name, x, torch.bfloat16) for name, x in named.items())
    return next((objection for objection in objections if objection), None)


def by_heads(x: Tensor) -> Tensor:
    """x [T, H, D] as TMA reads it: heads of a token beside each other, each at a multiple of 16 bytes."""
    token, head, column = x.stride()
    tokens, heads, width = x.shape
    aligned = column == 1 and x.data_ptr() % 16 == token % 8 == head % 8 == 0
    beside = heads == 1 or (head >= width and (tokens == 1 or token >= (heads - 1) * head + width))
    return x if aligned and beside else x.contiguous()


def _launch_attention(
    outputs: tuple[Tensor, Tensor],
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    softmax_scale: float,
) -> None:
    tensors = q.contiguous(), by_heads(k_nope), k_rope.contiguous(), by_heads(v)
    offsets = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    registry.native().mla_attention(*outputs, *tensors, *offsets, max_seqlen_k, causal, softmax_scale)


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


define(
    "mla_attention(Tensor q, Tensor k_nope, Tensor k_rope, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "int max_seqlen_q, int max_seqlen_k, bool causal, float softmax_scale) -> (Tensor, Tensor)",
    shapes="q [Tq,Hq,Dn+Dr], k_nope [Tk,Hq,Dn], k_rope [Tk,Dr], v [Tk,Hq,Dv], cu_seqlens [n+1] int32 -> out [Tq,Hq,Dv], "
    "lse [Hq,Tq] fp32; native: bf16, Dn 128, Dr 64, Dv 128; reference: any",
    reference=reference.mla_attention,
    allocate=_allocate_attention,
    launch=_launch_attention,
    supports=supports_attention,
)
define(
    "mla_merge(Tensor o1, Tensor lse1, Tensor o2, Tensor lse2) -> (Tensor, Tensor)",
    shapes="o1, o2 [T,H,D], lse1, lse2 [H,T] fp32 -> o, lse; native: bf16, D 128",
    reference=reference.mla_merge,
    allocate=lambda o1, lse1, o2, lse2: (o1.new_empty(o1.shape), lse1.new_empty(lse1.shape)),
    launch=lambda outputs, *args: registry.native().mla_merge(*outputs, *(_aligned(x) for x in args)),
    supports=lambda o1, lse1, o2, lse2: (
        f"heads are of {o1.shape[2]} columns, not {VALUE}"
        if o1.shape[2] != VALUE
        else registry.check_dtype("o1", o1, torch.bfloat16) or registry.check_dtype("lse1", lse1, torch.float32)
    ),
)


class _MlaAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, deterministic: bool, *settings: Any
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.dsv3.mla_attention(q, k_nope, k_rope, v, *settings)
        ctx.save_for_backward(q, k_nope, k_rope, v, out, lse, *settings[:2])
        ctx.settings = *settings[2:], deterministic
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        dq, dkv, dk_rope = torch.ops.dsv3.mla_attention_backward(dout, *ctx.saved_tensors, *ctx.settings)
        dk_nope, dv = dkv.split([dq.shape[2] - dk_rope.shape[1], dout.shape[2]], -1)
        return (dq, dk_nope, dk_rope, dv, *[None] * 7)


class _SplitKv(Function):
    @staticmethod
    def forward(ctx: Any, kv: Tensor, nope: int) -> tuple[Tensor, Tensor]:
        return kv[..., :nope], kv[..., nope:]

    @staticmethod
    def backward(ctx: Any, dk_nope: Tensor, dv: Tensor) -> tuple[Tensor, None]:
        if torch.compiler.is_compiling() or not _beside(dk_nope, dv):
            return torch.cat([dk_nope, dv], -1), None
        tokens, heads, width = len(dv), dv.shape[1], dk_nope.shape[2] + dv.shape[2]
        return dk_nope.as_strided((tokens, heads, width), (heads * width, width, 1)), None


def _beside(a: Tensor, b: Tensor) -> bool:
    """Whether a [T, H, D] and b [T, H, E] are the halves of one contiguous tensor."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    width = a.shape[2] + b.shape[2]
    strides = b.shape[1] * width, width, 1
    return a.stride() == b.stride() == strides and b.storage_offset() - a.storage_offset() == a.shape[2]


def split_kv(kv: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """Views k_nope [T, H, nope] and v [T, H, Dv] of kv [T, H, nope + Dv]; differentiable.

    The gradients that mla_attention gives for both lie in one tensor, which is kv's as it is: nothing is put together.

    Raises:
        ValueError: a kv that is not [T, H, D], or nope outside 1..D-1.
    """
    if kv.dim() != 3 or not 0 < nope < kv.shape[2]:
        raise ValueError(f"split_kv: kv must be (T, H, D) and nope in 1..D-1, got {tuple(kv.shape)} and {nope}")
    return apply(_SplitKv, kv, nope)


def mla_attention(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    softmax_scale: float,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences with one rotated key shared by the heads; out is differentiable in q, k_nope, k_rope, v.

    o_i = softmax_j(softmax_scale * q_i . [k_nope_j ; k_rope_j]) v_j in each sequence and head. The native kernel reads no
    length on the host; the reference does on a CPU, where sequences differ in length, and in the backward of a compiled graph.

    Args:
        q: [Tq, Hq, Dn+Dr], bf16 or fp32.
        k_nope: [Tk, Hq, Dn], may be strided: the native kernel copies it only where a token's heads are not beside each other
            at multiples of 16 bytes.
        k_rope: [Tk, Dr].
        v: [Tk, Hq, Dv], may be strided as k_nope.
        cu_seqlens_q, cu_seqlens_k: int32 [n+1], where each sequence's queries and keys begin.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths. Where Tq = n * max_seqlen_q and Tk = n * max_seqlen_k all are
            equal; a GPU that has no kernel for the sizes takes that for granted.
        causal: bottom-right: the last query of a sequence sees its last key.
        softmax_scale: factor on the scores, before lse.
        deterministic: gradients are sums in a fixed order, slower; so they are under torch.use_deterministic_algorithms.

    Returns:
        out [Tq, Hq, Dv] of q's dtype, and the natural-log lse fp32 [Hq, Tq], not differentiable. A query that sees no key has
        out 0 and lse -inf; rows of no sequence hold anything.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: offsets that do not start at 0, decrease or exceed the rows; on a CPU at once, on a GPU at the next
            native call of any op, since no call waits for the device.
    """
    tensors = q, k_nope, k_rope, v
    shapes = tuple(tuple(x.shape) for x in tensors)
    fits = [len(s) for s in shapes] == [3, 3, 2, 3] and q.shape[2] == k_nope.shape[2] + k_rope.shape[1]
    fits = fits and k_nope.shape[:2] == v.shape[:2] and k_rope.shape[:1] == v.shape[:1] and q.shape[1] == v.shape[1]
    if not fits or q.shape[1] < 1:
        raise ValueError(
            f"mla_attention: expected q (Tq,H,Dn+Dr), k_nope (Tk,H,Dn), k_rope (Tk,Dr), v (Tk,H,Dv), H >= 1, got {shapes}"
        )
    if len({x.dtype for x in tensors}) > 1:
        raise ValueError(f"mla_attention: expected tensors of one dtype, got {[x.dtype for x in tensors]}")
    offsets = cu_seqlens_q, cu_seqlens_k
    if any(x.dim() != 1 or x.dtype != torch.int32 or x.shape != cu_seqlens_q.shape or not len(x) for x in offsets):
        found = " and ".join(f"{x.dtype} {tuple(x.shape)}" for x in offsets)
        raise ValueError(f"mla_attention: expected cu_seqlens_q and cu_seqlens_k of int32 (n+1,), got {found}")
    compiling = torch.compiler.is_compiling() or isinstance(q, FakeTensor)  # nothing can be read on the host
    if compiling and cu_seqlens_k is cu_seqlens_q:
        offsets = cu_seqlens_q, cu_seqlens_k.view(-1)  # in a graph no Function takes a tensor twice
    settings = *offsets, max_seqlen_q, max_seqlen_k, causal, softmax_scale
    reason = supports_attention(*tensors, *settings)
    if q.is_cuda and not compiling:
        if reason:
            registry.note("mla_attention", reason)
        reason = reason or registry.why_no_kernels(q.device)
    if not compiling and (q.is_cpu or reason):  # differentiated as it is: nothing runs again
        return reference.mla_attention(*tensors, *settings)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    return apply(_MlaAttention, *tensors, deterministic, *settings)


def mla_merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over all keys from those over two parts of them; not differentiable.

    Args:
        o1, o2: [T, H, D], the outputs.
        lse1, lse2: fp32 [H, T], the natural-log lse; -inf where a query saw none of the part's keys.

    Returns:
        o [T, H, D] of o1's dtype and lse fp32 [H, T]; 0 and -inf where both are -inf.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    shapes = [tuple(x.shape) for x in (o1, lse1, o2, lse2)]
    if o1.dim() != 3 or o2.shape != o1.shape or not shapes[1] == shapes[3] == (o1.shape[1], o1.shape[0]):
        raise ValueError(f"mla_merge: expected o1, o2 (T,H,D) and lse1, lse2 (H,T), got {shapes}")
    if o1.dtype != o2.dtype or lse1.dtype != lse2.dtype:
        found = [x.dtype for x in (o1, lse1, o2, lse2)]
        raise ValueError(f"mla_merge: expected outputs of one dtype and lse of one dtype, got {found}")
    return torch.ops.dsv3.mla_merge(*(x.detach() for x in (o1, lse1, o2, lse2)))

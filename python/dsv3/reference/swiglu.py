"""SwiGLU, times a routing weight a row, and with its output as FP8: see dsv3.ops.swiglu."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.reference.quant import cast_transpose, first_rows, last_row, per_token_cast_first


def swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """silu(gate) * up * weight a row, for gate_up [T, 2I]; computed in fp32 at least, rounded once."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    out = torch.nn.functional.silu(gate) * up
    if weights is not None:
        out *= weights[:, None]
    return out.to(gate_up.dtype)


def swiglu_backward(dout: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """dgate_up [T, 2I] and dweights [T] (empty without weights): with s = sigmoid(g),
    dg = dout w u s (1 + g (1 - s)), du = dout w silu(g), dw = sum_i dout silu(g) u."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(wide).chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    scaled = dout.to(wide)
    dweights = scaled.new_empty(0)
    if weights is not None:
        dweights = (scaled * silu).mul_(up).sum(-1)
        scaled = scaled * weights[:, None]
    dgate_up = torch.empty_like(gate_up)
    dgate, dup = dgate_up.chunk(2, -1)
    dup.copy_(scaled * silu)
    dgate.copy_((sigmoid + silu).addcmul_(silu, sigmoid, value=-1).mul_(up).mul_(scaled))
    return dgate_up, dweights


def swiglu_cast(
    gate_up: Tensor, weights: Tensor | None, offsets: Tensor | None, pow2_scale: bool, amax_floor: float
) -> tuple[Tensor, Tensor]:
    """swiglu, cast as per_token_cast does; rows past offsets[G] are left as they come."""
    live = slice(last_row(gate_up, offsets))
    out = swiglu(gate_up[live], None if weights is None else weights[live])
    return per_token_cast_first(out, gate_up.shape[0], pow2_scale, amax_floor)


def _of_live_rows(
    dout: Tensor, gate_up: Tensor, weights: Tensor | None, offsets: Tensor | None
) -> tuple[tuple[Tensor, Tensor | None], Tensor, Tensor]:
    """gate_up and weights of the rows up to offsets[G], dgate_up of these, and dweights with a place for every row."""
    live = slice(last_row(gate_up, offsets))
    inputs = gate_up[live], None if weights is None else weights[live]
    dgate_up, dweights = swiglu_backward(dout[live], *inputs)
    return inputs, dgate_up, dweights if weights is None else first_rows(dweights, gate_up.shape[0])


def swiglu_cast_backward(
    dout: Tensor,
    gate_up: Tensor,
    weights: Tensor | None,
    offsets: Tensor | None,
    pow2_scale: bool,
    amax_floor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dgate_up of swiglu_backward, cast as per_token_cast does, and dweights (empty without weights); rows past offsets[G]
    are left as they come."""
    _, dgate_up, dweights = _of_live_rows(dout, gate_up, weights, offsets)
    return *per_token_cast_first(dgate_up, gate_up.shape[0], pow2_scale, amax_floor), dweights


OUT_CAST = False, 1e-4  # how swiglu_backward_both_casts casts the output: pow2_scale, amax_floor


def swiglu_backward_both_casts(
    dout: Tensor,
    gate_up: Tensor,
    weights: Tensor | None,
    offsets: Tensor | None,
    pow2_scale: bool,
    amax_floor: float,
) -> tuple[Tensor, ...]:
    """swiglu_cast_backward, then cast_transpose of what it casts and of swiglu's output."""
    tokens, settings = gate_up.shape[0], (pow2_scale, amax_floor)
    inputs, dgate_up, dweights = _of_live_rows(dout, gate_up, weights, offsets)
    cast = per_token_cast_first(dgate_up, tokens, *settings)
    dgate_up_t = cast_transpose(first_rows(dgate_up, tokens), None, offsets, *settings)
    out_t = cast_transpose(first_rows(swiglu(*inputs), tokens), None, offsets, *OUT_CAST)
    return *cast, dweights, *dgate_up_t, *out_t

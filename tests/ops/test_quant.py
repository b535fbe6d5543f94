from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dsv3 import ops
from dsv3.ops import registry
from dsv3.reference import quant as reference
from dsv3.testing import check_compile, check_graph, check_registration, reference_ops
from tests.ops.casts import GRADIENT_FLOOR, SENTINEL, bits, check_same, draw, filled

SHAPES = [(0, 128), (1, 7168), (127, 1536), (33, 2048), (4001, 144), (300, 576), (130, 16)]


# An independent model in numpy: a table of the 127 values of e4m3 that are not negative, and scales by frexp.
def decode(code):
    exponent, mantissa = code >> 3, code & 7
    return mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


TABLE = np.array([decode(code) for code in range(127)])
MIDPOINTS = (TABLE[1:] + TABLE[:-1]) / 2


def model_encode(x):
    """Codes of fp32 values: the nearest in the table, the even one of two as near, the last beyond it, 0x7f for NaN."""
    size = np.abs(x.astype(np.float64))
    below, above = np.searchsorted(MIDPOINTS, size, "left"), np.searchsorted(MIDPOINTS, size, "right")
    code = np.where(below % 2 == 0, below, above).astype(np.uint8)
    return np.where(np.isnan(x), 0x7F, code | (np.signbit(x) << 7)).astype(np.uint8)


def model_scale(amax, pow2, floor):
    bound = np.maximum(amax, np.float32(floor))
    sf = np.maximum(bound / np.float32(448), np.float32(2.0**-126))
    if pow2:
        mantissa, exponent = np.frexp(sf)
        above = np.ldexp(np.float32(1), np.where(mantissa == 0.5, exponent - 1, exponent))
        sf = np.where(np.isfinite(sf), above, sf)
    return np.where(bound == 0, np.float32(1), sf).astype(np.float32)


def model_cast(x, tile, pow2=False, floor=1e-4):
    """Codes and scales of fp32 x [R, C] in tiles of the given shape."""
    (rows, columns), (tall, wide) = x.shape, tile
    sf = np.empty((-(-rows // tall), -(-columns // wide)), np.float32)
    with np.errstate(all="ignore"):
        for i in range(sf.shape[0]):
            strip = np.abs(x[i * tall : (i + 1) * tall]).max(0)
            amax = [strip[j * wide : (j + 1) * wide].max() for j in range(sf.shape[1])]
            sf[i] = model_scale(np.array(amax, np.float32), pow2, floor)
        spread = sf.repeat(tall, 0)[:rows].repeat(wide, 1)[:, :columns]
        return model_encode(x * (np.float32(1) / spread)), sf


def check(outputs, expected):
    """Bit for bit; scales that are NaN need only be NaN in both."""
    for found, (codes, sf) in zip(zip(outputs[::2], outputs[1::2], strict=True), expected, strict=True):
        assert [t.dtype for t in found] == [torch.float8_e4m3fn, torch.float32]
        np.testing.assert_array_equal(found[0].view(torch.uint8).cpu().numpy(), codes)
        np.testing.assert_array_equal(found[1].cpu().numpy(), sf)


def wide(x):
    return x.float().cpu().numpy()


@pytest.mark.cuda
@pytest.mark.parametrize("bounds", [[0, 1000, -(2**31)], [500, 7], [-(2**31), 2**31 - 1], [2**31 - 1, 2**31 - 1, 0]])
def test_wrong_offsets_stay_inside(bounds):
    """What they give is nobody's business, but nothing outside of x is read or written."""
    x = torch.full((900, 272), 7.0, device="cuda", dtype=torch.bfloat16)
    offsets = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    data, *others = ops.per_token_cast_and_transpose(x[300:600], offsets)
    around = torch.full((900, 272), 85, device="cuda", dtype=torch.uint8)
    within = around.view(data.dtype)[300:600]
    registry.native().per_token_cast_and_transpose(within, *others, x[300:600], offsets, False, 1e-4)
    assert (around[:300] == 85).all()
    assert (around[600:] == 85).all()


@pytest.mark.parametrize("settings", [{}, {"pow2_scale": True}, {"amax_floor": 0.0}, {"amax_floor": GRADIENT_FLOOR}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_per_token_cast(shape, dtype, settings, device):
    x = draw(shape, dtype, device)
    data, sf = ops.per_token_cast(x, **settings)
    expected = model_cast(wide(x), (1, 128), settings.get("pow2_scale", False), settings.get("amax_floor", 1e-4))
    check((data, sf), [expected])
    assert sf.stride() == (1, (shape[0] + 3) // 4 * 4)
    assert data.is_contiguous()


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (576, 7168), (100, 50), (128, 256)])
def test_per_block_cast(shape, dtype, pow2, device):
    w = draw(shape, dtype, device)
    codes, sf = model_cast(wide(w), (128, 128), pow2, 0.0)
    check(ops.per_block_cast(w, pow2_scale=pow2), [(codes, sf)])
    check(ops.per_block_cast(w, pow2_scale=pow2, transpose=True), [(codes, sf), (codes.T, sf.T)])


def test_per_block_cast_of_experts(device):
    w = draw((3, 272, 400), torch.bfloat16, device)
    outputs = ops.per_block_cast(w, transpose=True)
    for g in range(3):
        codes, sf = model_cast(wide(w[g]), (128, 128), floor=0.0)
        check([t[g] for t in outputs], [(codes, sf), (codes.T, sf.T)])


@pytest.mark.parametrize("settings", [{}, {"pow2_scale": True}, {"amax_floor": 0.0}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_cast_transpose(shape, dtype, settings, device):
    x = draw(shape, dtype, device)
    data, sf = ops.cast_transpose(x, **settings)
    padded = np.pad(wide(x), ((0, -shape[0] % 128), (0, 0)))
    codes, scales = model_cast(padded, (128, 1), settings.get("pow2_scale", False), settings.get("amax_floor", 1e-4))
    check((data, sf), [(codes.T, scales.T)])
    assert sf.stride() == (1, (shape[1] + 3) // 4 * 4)


OFFSETS = [
    [0, 300],
    [0, 0, 128, 128, 129, 300],
    [0, 5, 250],  # rows that no group has
    [0, 0],
    [0, *range(0, 300, 7), 300],  # more groups than a warp has lanes
]


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("bounds", OFFSETS)
def test_cast_transpose_groups(bounds, cast, device):
    x = draw((300, 272), torch.bfloat16, device, spread=2.0)
    x[bounds[-1] :] = float("nan")
    source = ops.per_token_cast(x) if cast else x
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    data, sf = ops.cast_transpose(source, offsets)

    values = wide(reference.dequantize(*source)) if cast else wide(x)
    slots = (300 + 127 * (len(bounds) - 1) + 127) // 128 * 128
    codes, scales = np.zeros((slots, 272), np.uint8), np.ones((slots // 128, 272), np.float32)
    at = 0
    for start, end in itertools.pairwise(bounds):
        size = -(-(end - start) // 128) * 128
        group = np.pad(values[start:end], ((0, size - (end - start)), (0, 0)))
        codes[at : at + size], scales[at // 128 : (at + size) // 128] = model_cast(group, (128, 1))
        at += size
    check((data, sf), [(codes.T, scales.T)])


@pytest.mark.parametrize("tokens", [1, 40, 1000])
@pytest.mark.parametrize(("columns", "topk", "experts"), [(272, 3, 5), (2048, 8, 40), (16, 1, 2)])
def test_cast_transpose_of_rows_that_are_not_there(tokens, columns, topk, experts, device):
    """From the tokens, bit for bit what it is from their copies; also where the last group ends before the last row."""
    x = ops.per_token_cast(draw((tokens, columns), torch.bfloat16, device, spread=2.0), pow2_scale=True)
    index = torch.rand(tokens, experts, device=device).topk(topk).indices
    rows, (offsets, source, _) = ops.moe_permute(x, index, experts)
    for end in (offsets, offsets.clamp(max=tokens // 2)):
        settings = {"pow2_scale": True, "amax_floor": GRADIENT_FLOOR}
        found = ops.cast_transpose(x, end, source=source, topk=topk, **settings)
        check_same(found, ops.cast_transpose(rows, end, **settings))


@pytest.mark.parametrize("settings", [{}, {"pow2_scale": True}, {"amax_floor": 0.0}, {"amax_floor": GRADIENT_FLOOR}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (128, 128), (1, 16), (129, 272)])
def test_per_token_cast_and_transpose(shape, dtype, settings, device):
    x = draw(shape, dtype, device)
    found = ops.per_token_cast_and_transpose(x, **settings)
    check_same(found, (*ops.per_token_cast(x, **settings), *ops.cast_transpose(x, **settings)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bounds", OFFSETS)
def test_per_token_cast_and_transpose_groups(bounds, dtype, device):
    x = draw((300, 272), dtype, device)
    end = bounds[-1]
    x[end:] = float("nan")
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    data, sf, *transposed = ops.per_token_cast_and_transpose(x, offsets)
    check_same(transposed, ops.cast_transpose(x, offsets))
    expected = ops.per_token_cast(x)
    assert (data.stride(), sf.stride()) == (expected[0].stride(), expected[1].stride())
    check_same((data[:end], sf[:end]), [t[:end] for t in expected])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_no_group_are_not_written(dtype):
    x = draw((500, 272), dtype, "cuda")
    offsets = torch.tensor([0, 5, 5, 140, 250], dtype=torch.int32, device="cuda")
    expected = ops.per_token_cast_and_transpose(x, offsets)
    found = filled(expected)
    registry.native().per_token_cast_and_transpose(*found, x, offsets, False, 1e-4)
    assert all((t[250:].float() == torch.tensor(SENTINEL).to(t.dtype).float().item()).all() for t in found[:2])
    check_same([t[:250] for t in found[:2]] + found[2:], [t[:250] for t in expected[:2]] + list(expected[2:]))


def test_cast_again_with_powers_of_two_is_exact(device):
    """1x128 to 128x1: the same values, but where a code falls below the smallest normal one (2^-6)."""
    x = torch.randn(512, 384, device=device, dtype=torch.bfloat16)
    cast = ops.per_token_cast(x, pow2_scale=True)
    before = reference.dequantize(*cast)
    data, sf = ops.cast_transpose(cast, pow2_scale=True)
    after = reference.dequantize(data, sf).t()
    normal = before.abs() >= 2.0**-6 * sf.repeat_interleave(128, 1).t()
    assert normal.float().mean() > 0.95
    assert torch.equal(after[normal], before[normal])
    torch.testing.assert_close(after, before, rtol=0, atol=float(sf.max()) * 2.0**-10)
    # With other scales it is rounded twice.
    rounded = ops.per_token_cast(x)
    again = reference.dequantize(*ops.cast_transpose(rounded)).t()
    assert (again[normal] != reference.dequantize(*rounded)[normal]).float().mean() > 0.2


def test_every_code_and_every_tie(device):
    """A tile whose maximum is 448 has scale 1: all codes, all midpoints and their neighbours in fp32, in both signs."""
    points = np.concatenate([TABLE, MIDPOINTS]).astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(500))])
    points = np.concatenate([points, -points])
    points = points[np.abs(points) <= 448]
    rows = -(-len(points) // 127)
    x = np.full((rows, 128), 448, np.float32)
    x[:, :127] = np.pad(points, (0, rows * 127 - len(points))).reshape(rows, 127)
    data, sf = ops.per_token_cast(torch.from_numpy(x).to(device))
    assert (sf == 1).all()
    check((data, sf), [(model_encode(x), np.ones((rows, 1), np.float32))])
    assert len(np.unique(data.view(torch.uint8).cpu().numpy())) == 254


def test_encode_saturates():
    x = torch.tensor([448.0, 463.9, 464.0, 1e30, float("inf"), -float("inf"), float("nan"), -float("nan"), -0.0])
    codes = reference.encode(x, torch.ones(())).view(torch.uint8).tolist()
    assert codes == [0x7E] * 5 + [0xFE, 0x7F, 0x7F, 0x80]


def test_zeros_and_tiny_values(device):
    zeros = torch.zeros(4, 256, device=device)
    for outputs in (
        ops.per_token_cast(zeros, amax_floor=0.0),
        ops.per_block_cast(zeros),
        ops.cast_transpose(zeros, amax_floor=0.0),
    ):
        assert (outputs[0].view(torch.uint8) == 0).all()
        assert (outputs[1] == 1).all()
    assert (ops.per_token_cast(zeros)[1] == torch.tensor(1e-4) / 448).all()
    tiny = torch.full((1, 128), 1e-10, device=device)
    assert (reference.dequantize(*ops.per_token_cast(tiny)) == 0).all()  # why gradients need another floor
    kept = reference.dequantize(*ops.per_token_cast(tiny, amax_floor=GRADIENT_FLOOR))
    torch.testing.assert_close(kept, tiny, rtol=1e-6, atol=0)
    # A subnormal maximum: 1 / sf stays finite, so that zeros stay zeros.
    data, sf = ops.per_token_cast(tiny * 1e-30 * (torch.arange(128, device=device) > 0), amax_floor=0.0)
    assert (sf == 2.0**-126).all()
    assert data.float()[0, 0] == 0
    assert not data.float().isnan().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pow2", [False, True])
def test_nan_and_infinity_stay_in_their_tile(bad, pow2, device):
    x = torch.randn(256, 256, device=device, dtype=torch.bfloat16)
    poisoned = x.clone()
    poisoned[200, 3] = bad
    row, block, column = torch.zeros(3, 256, 256, dtype=torch.bool, device=device)
    row[200, :128], block[128:, :128], column[128:, 3] = True, True, True

    for function, tile in ((ops.per_token_cast, row), (ops.per_block_cast, block), (ops.cast_transpose, column)):
        found = reference.dequantize(*function(poisoned, pow2_scale=pow2))
        clean = reference.dequantize(*function(x, pow2_scale=pow2))
        if function is ops.cast_transpose:
            found, clean = found.t(), clean.t()
        assert torch.equal(found.isnan(), tile)
        assert torch.equal(found[~tile], clean[~tile])
    check(ops.per_token_cast(poisoned, pow2_scale=pow2), [model_cast(wide(poisoned), (1, 128), pow2)])
    check(ops.per_block_cast(poisoned, pow2_scale=pow2), [model_cast(wide(poisoned), (128, 128), pow2, 0.0)])
    codes, sf = model_cast(wide(poisoned), (128, 1), pow2)
    check(ops.cast_transpose(poisoned, pow2_scale=pow2), [(codes.T, sf.T)])
    both = (*ops.per_token_cast(poisoned, pow2_scale=pow2), *ops.cast_transpose(poisoned, pow2_scale=pow2))
    check_same(ops.per_token_cast_and_transpose(poisoned, pow2_scale=pow2), both)


def test_non_contiguous(device):
    x = draw((256, 512), torch.bfloat16, device)
    for function in (ops.per_token_cast, ops.per_block_cast, ops.cast_transpose, ops.per_token_cast_and_transpose):
        for view in (x[:, ::2], x.t(), x[3:131, 16:32]):
            for found, expected in zip(function(view), function(view.clone().contiguous()), strict=True):
                assert torch.equal(found.float(), expected.float())
    data, sf = ops.per_token_cast(x)
    for found, expected in zip(
        ops.cast_transpose((data, sf.contiguous())), ops.cast_transpose((data, sf)), strict=True
    ):
        assert torch.equal(found.float(), expected.float())


def test_dequantize():
    data = torch.randn(130, 272).to(torch.float8_e4m3fn)
    token, block = torch.rand(130, 3), torch.rand(2, 3)
    for i, j in ((0, 0), (127, 127), (128, 128), (129, 271)):
        value = data[i, j].float()
        assert reference.dequantize(data, token)[i, j] == value * token[i, j // 128]
        assert reference.dequantize(data, block)[i, j] == value * block[i // 128, j // 128]


def test_no_gradient(device):
    x = torch.randn(128, 128, device=device, requires_grad=True)
    both = ops.per_token_cast_and_transpose(x)
    for outputs in (ops.per_token_cast(x), ops.per_block_cast(x, transpose=True), ops.cast_transpose(x), both):
        assert not any(t.requires_grad for t in outputs)


def test_registration_compile_graph(device):
    x = draw((144, 272), torch.bfloat16, device)
    offsets = torch.tensor([0, 20, 100], dtype=torch.int32, device=device)
    check_registration("per_token_cast", x, True, 1e-4)
    check_registration("per_block_cast", x[None], False, True)
    check_registration("per_block_cast", x[None], False, False)
    check_registration("cast_transpose", x, None, offsets, False, 1e-4)
    whole = torch.tensor([0, 20, 20, 144], dtype=torch.int32, device=device)
    check_registration("per_token_cast_and_transpose", x, whole, False, 1e-4)
    check_registration("per_token_cast_and_transpose", x, None, True, GRADIENT_FLOOR)
    # Its schema test compares the inputs, which torch can not do in e4m3.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    cast = ops.per_token_cast(x)
    torch.library.opcheck(torch.ops.dsv3.cast_transpose.default, (*cast, offsets, False, 1e-4), test_utils=tests)
    source = torch.tensor([0, 3, 2, 5, 4], device=device)
    gathered = (*cast, torch.tensor([0, 2, 5], dtype=torch.int32, device=device), True, 1e-4, source, 2)
    torch.library.opcheck(torch.ops.dsv3.cast_transpose.default, gathered, test_utils=tests)
    for function in (
        lambda x: bits(ops.per_token_cast(x)),
        lambda x: bits(ops.per_block_cast(x, transpose=True)),
        lambda x: bits(ops.cast_transpose(x, offsets)),
        lambda x: bits(ops.cast_transpose(ops.per_token_cast(x, pow2_scale=True), offsets, pow2_scale=True)),
        lambda x: bits(ops.per_token_cast_and_transpose(x, whole)),
    ):
        check_compile(function, x)
        if device.type == "cuda":
            check_graph(function, x)


@pytest.mark.cuda
def test_graph_follows_the_offsets():
    x = draw((500, 256), torch.bfloat16, "cuda")
    offsets = torch.tensor([0, 100, 200, 300], dtype=torch.int32, device="cuda")
    ops.cast_transpose(x, offsets)
    ops.per_token_cast_and_transpose(x, offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.cast_transpose(x, offsets)
        both = ops.per_token_cast_and_transpose(x, offsets)
    for bounds in ([0, 0, 0, 500], [0, 1, 129, 400], [0, 0, 0, 0]):
        offsets.copy_(torch.tensor(bounds))
        graph.replay()
        expected = ops.cast_transpose(x, offsets)
        check_same(captured, expected)
        check_same(both[2:], expected)
        check_same([t[: bounds[-1]] for t in both[:2]], [t[: bounds[-1]] for t in ops.per_token_cast(x)])


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(4096, 7168), (32768, 2048), (4001, 18432)])
def test_native_is_the_reference_at_v3_shapes(shape):
    x = draw(shape, torch.bfloat16, "cuda", spread=1.0)
    cuts = torch.randint(0, shape[0], (31,)).sort().values.tolist()
    offsets = torch.tensor([0, *cuts, shape[0]], dtype=torch.int32, device="cuda")
    cast = ops.per_token_cast(x, pow2_scale=True)
    for run in (
        lambda: ops.per_token_cast(x),
        lambda: ops.per_token_cast(x, pow2_scale=True, amax_floor=GRADIENT_FLOOR),
        lambda: ops.per_block_cast(x[: shape[0] // 16 * 16], transpose=True),
        lambda: ops.cast_transpose(x),
        lambda: ops.cast_transpose(x, offsets),
        lambda: ops.cast_transpose(cast, offsets, pow2_scale=True),
        lambda: ops.per_token_cast_and_transpose(x, amax_floor=GRADIENT_FLOOR),
        lambda: ops.per_token_cast_and_transpose(x, offsets, pow2_scale=True),
    ):
        found, again = bits(run()), bits(run())
        with reference_ops():
            expected = bits(run())
        for a, b, c in zip(found, again, expected, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(a, b)


@pytest.mark.cuda
def test_more_than_2_to_31_values():
    x = torch.zeros(300032, 7168, device="cuda", dtype=torch.bfloat16)
    x[-128:] = draw((128, 7168), torch.bfloat16, "cuda")
    data, sf = ops.per_token_cast(x)
    expected = ops.per_token_cast(x[-128:])
    assert torch.equal(data[-128:].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(sf[-128:], expected[1])
    data, _, data_t, _ = ops.per_block_cast(x, transpose=True)
    expected = ops.per_block_cast(x[-128:], transpose=True)
    assert torch.equal(data[-128:].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(data_t[:, -128:].view(torch.uint8), expected[2].view(torch.uint8))
    data, sf = ops.cast_transpose(x)
    expected = ops.cast_transpose(x[-128:])
    assert torch.equal(data[:, -128:].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(sf[:, -1:], expected[1])
    data, sf, data_t, sf_t = ops.per_token_cast_and_transpose(x)
    rows = ops.per_token_cast(x[-128:])
    check_same((data[-128:], data_t[:, -128:].contiguous()), (rows[0], expected[0]))
    assert torch.equal(sf[-128:], rows[1])
    assert torch.equal(sf_t[:, -1:], expected[1])


@pytest.mark.parametrize("shape", [(144, 272), (3, 32, 144)])
def test_per_block_cast_into_what_is_there(shape, device):
    w, other = draw(shape, torch.bfloat16, device), draw(shape, torch.bfloat16, device)
    out = ops.per_block_cast(w, transpose=True)
    again = ops.per_block_cast(other, transpose=True, out=out)
    assert all(a is b for a, b in zip(again, out, strict=True))
    check_same(out, ops.per_block_cast(other, transpose=True))
    batched = w.view(-1, *shape[-2:]), False, *(t.view(-1, *t.shape[-2:]) for t in out)
    check_registration("per_block_cast_out", *batched)


def test_bad_arguments():
    x, offsets = torch.randn(4, 144), torch.tensor([0, 4], dtype=torch.int32)
    data, sf = ops.per_token_cast(x)
    with pytest.raises(ValueError, match=r"K a multiple of 16, got \(4, 40\)"):
        ops.per_token_cast(x[:, :40])
    with pytest.raises(ValueError, match="expected bfloat16 or float32, got float16"):
        ops.per_token_cast(x.half())
    with pytest.raises(ValueError, match=r"amax_floor must be at least 0 and finite, got -1"):
        ops.per_token_cast(x, amax_floor=-1)
    with pytest.raises(ValueError, match=r"w must be \(N, K\) or \(G, N, K\), got \(144,\)"):
        ops.per_block_cast(x[0])
    with pytest.raises(ValueError, match="expected bfloat16 or float32, got float64"):
        ops.per_block_cast(x.double())
    with pytest.raises(ValueError, match=r"out must be what it returns with transpose for w \(4, 144\), got float8"):
        ops.per_block_cast(x, transpose=True, out=ops.per_block_cast(x))
    with pytest.raises(ValueError, match=r"K a multiple of 16, got \(4, 143\)"):
        ops.cast_transpose(x[:, 1:], offsets)
    with pytest.raises(ValueError, match=r"offsets must be int32 \(G\+1,\) with G >= 1, got int64 \(2,\)"):
        ops.cast_transpose(x, offsets.long())
    with pytest.raises(ValueError, match=r"got int32 \(1,\)"):
        ops.cast_transpose(x, offsets[:1])
    with pytest.raises(ValueError, match=r"got float8_e4m3fn \(4, 144\) with float32 \(4, 1\)"):
        ops.cast_transpose((data, sf[:, :1]))
    with pytest.raises(
        ValueError, match=r"source must be int64 \(R,\).*got int32 \(3,\) on cpu, topk 1 and x float8_e4m3fn"
    ):
        ops.cast_transpose((data, sf), source=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"x a cast with its scales, got int64 \(3,\) on cpu, topk 2 and x float32"):
        ops.cast_transpose(x, source=torch.zeros(3, dtype=torch.int64), topk=2)
    with pytest.raises(ValueError, match="expected bfloat16 or float32, got float8_e4m3fn"):
        ops.cast_transpose(data)
    name = "per_token_cast_and_transpose: "
    with pytest.raises(ValueError, match=name + r"x must be \(T, K\) with K a multiple of 16, got \(4, 40\)"):
        ops.per_token_cast_and_transpose(x[:, :40])
    with pytest.raises(ValueError, match=name + "expected bfloat16 or float32, got float16"):
        ops.per_token_cast_and_transpose(x.half())
    with pytest.raises(ValueError, match=name + "amax_floor must be at least 0 and finite, got nan"):
        ops.per_token_cast_and_transpose(x, amax_floor=float("nan"))
    with pytest.raises(ValueError, match=name + r"offsets must be int32 \(G\+1,\) with G >= 1, got int32 \(1, 2\)"):
        ops.per_token_cast_and_transpose(x, offsets[None])

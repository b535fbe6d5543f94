"""Attention of packed sequences at the sizes of the model: lengths, views, what must not matter (rows of others, tails), rows
that see nothing, offsets that are wrong, captured graphs; and merging."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv3 import ops
from dsv3.ops import registry
from dsv3.testing import check_compile, check_graph, check_registration, relative_error

BF16 = torch.bfloat16
NOPE, ROPE, VALUE = 128, 64, 128
SCALE = 192**-0.5
NAN, INF = float("nan"), float("inf")


# ---- inputs and what is expected ----
def offsets(lengths, device):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def make(lengths_q, lengths_k, heads, device, *, spare=0, dtype=BF16):
    """q, k_nope, k_rope, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k; the keys' `spare` last rows, which are no
    sequence's, are NaN. k_nope and v are views of one tensor, as the model has them."""
    tq, tk = sum(lengths_q), sum(lengths_k)
    q, kv, k_rope = (
        torch.randn(shape, device=device).to(dtype)
        for shape in ((tq, heads, NOPE + ROPE), (tk + spare, heads, NOPE + VALUE), (tk + spare, ROPE))
    )
    kv[tk:], k_rope[tk:] = NAN, NAN
    k_nope, v = kv.split([NOPE, VALUE], -1)
    cu = offsets(lengths_q, device), offsets(lengths_k, device)
    return q, k_nope, k_rope, v, *cu, max(lengths_q, default=0), max(lengths_k, default=0)


def plain(q, k_nope, k_rope, v, cu_q, cu_k, *_, causal=True, dtype=torch.float64):
    """By the formula, in a dtype; a head at a time."""
    out = torch.zeros(q.shape[0], q.shape[1], VALUE, dtype=dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), -INF, dtype=dtype, device=q.device)
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        hidden = torch.ones(b - a, d - c, dtype=torch.bool, device=q.device).triu(d - c - (b - a) + 1)
        for h in range(q.shape[1]):
            k = torch.cat([k_nope[c:d, h], k_rope[c:d]], -1).to(dtype)
            scores = q[a:b, h].to(dtype) @ k.T * SCALE
            if causal:
                scores = scores.masked_fill(hidden, -INF)
            lse[h, a:b] = scores.logsumexp(-1)
            out[a:b, h] = scores.softmax(-1).nan_to_num() @ v[c:d, h].to(dtype)
    return out, lse


def check(args, causal=True):
    """Error of the output at most twice that of bf16 throughout; lse: fp32 sums of exact products and of exponentials that
    err by 2^-22 (torch's on a CPU: 2^-14)."""
    out, lse = ops.mla_attention(*args, causal=causal, softmax_scale=SCALE)
    exact, exact_lse = plain(*args, causal=causal)
    rounded, _ = plain(*args, causal=causal, dtype=BF16)
    assert relative_error(out, exact) <= 2 * relative_error(rounded, exact) + 1e-4
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5 if lse.is_cuda else 2**-14)
    unseen = exact_lse == -INF
    assert torch.equal(lse == -INF, unseen)
    assert not out.transpose(0, 1)[unseen].any()
    again = ops.mla_attention(*args, causal=causal, softmax_scale=SCALE)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])
    return out, lse


LENGTHS = {
    "one": ([1], [1]),
    "half a tile": ([64], [64]),
    "127": ([127], [127]),
    "128": ([128], [128]),
    "129": ([129], [129]),
    "255 and 257": ([255, 257], [255, 257]),
    "a chunk": ([100], [300]),
    "one query": ([1, 1, 1], [5, 128, 1000]),
    "empty": ([0, 3, 0, 130, 0], [0, 3, 0, 130, 0]),
    "no keys": ([5, 200], [0, 200]),
    "no queries": ([0, 7], [300, 7]),
    "more queries than keys": ([300, 130], [40, 129]),
    "varied": ([17, 400, 1, 63, 128], [90, 512, 1, 700, 385]),
}


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_lengths(lengths, causal, heads, device):
    check(make(*lengths, heads, device, spare=70), causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "tokens"), [(16, 1000), (2, 4001)])
def test_long(tokens, heads, causal, device):
    if device.type == "cpu":
        tokens //= 8
    check(make([tokens], [tokens], heads, device), causal)


@pytest.mark.parametrize("count", [33, 200])
def test_many_sequences(count, device):
    lengths = [(i * 37) % 150 for i in range(count)]
    check(make(lengths, [n + i % 3 * 20 for i, n in enumerate(lengths)], 2, device))


def test_heads_are_taken_some_at_a_time(device):
    """With few heads at a time every second group is walked backwards: the results do not change."""
    args = make([260, 140], [260, 140], 7, device)
    expected = ops.mla_attention(*args, softmax_scale=SCALE)
    for longest in (2**15, 2**16, 2**18):
        got = ops.mla_attention(*args[:-1], longest, softmax_scale=SCALE)
        if device.type == "cuda":
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_large_scores(device):
    """The running maximum moves by much, up and down."""
    q, k_nope, k_rope, v, *rest = make([700], [700], 2, device)
    args = q * 8, k_nope * torch.linspace(8, 0.1, 700, device=device)[:, None, None].to(BF16), k_rope, v, *rest
    check(args)
    check((q * 8, k_nope.flip(0), k_rope, v, *rest))


def test_views(device):
    """Rows at any distance; and layouts that have to be copied."""
    q, k_nope, k_rope, v, *rest = make([200, 57], [200, 57], 3, device)
    expected = ops.mla_attention(q, k_nope, k_rope, v, *rest, softmax_scale=SCALE)
    wide = torch.full((257, 3, 320), NAN, device=device, dtype=BF16)
    wide[..., 8:136], wide[..., 192:] = k_nope, v
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k_nope, v)]
    odd = [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in (k_nope, v)]
    for a, b in ((wide[..., 8:136], wide[..., 192:]), by_head, odd, (k_nope.contiguous(), v.contiguous())):
        got = ops.mla_attention(q, a, k_rope, b, *rest, softmax_scale=SCALE)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    rows = torch.full((257, 3, 200), NAN, device=device, dtype=BF16)
    rows[..., :192] = q
    ropes = torch.full((257, 72), NAN, device=device, dtype=BF16)
    ropes[:, :64] = k_rope
    got = ops.mla_attention(rows[..., :192], k_nope, ropes[:, :64], v, *rest, softmax_scale=SCALE)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 60, 130, 256])
def test_sequences_do_not_see_each_other(length, causal, device):
    """What lies in the tiles of a sequence but is another's may be NaN or infinite."""
    args = make([length, 90], [length, 90], 2, device)
    expected = ops.mla_attention(*args, causal=causal, softmax_scale=SCALE)
    for poison in (NAN, INF):
        q, k_nope, k_rope, v = (x.clone() for x in args[:4])
        for x in (q, k_nope, k_rope, v):
            x[length:] = poison
        out, lse = ops.mla_attention(q, k_nope, k_rope, v, *args[4:], causal=causal, softmax_scale=SCALE)
        assert torch.equal(out[:length], expected[0][:length])
        assert torch.equal(lse[:, :length], expected[1][:, :length])


def test_a_sequence_alone_is_the_sequence_among_others(device):
    args = make([100, 300, 20], [140, 310, 20], 3, device)
    out, lse = ops.mla_attention(*args, softmax_scale=SCALE)
    q, k_nope, k_rope, v = args[0][100:400], *(x[140:450] for x in args[1:4])
    cu = offsets([300], device), offsets([310], device)
    alone = ops.mla_attention(q, k_nope, k_rope, v, *cu, 300, 310, softmax_scale=SCALE)
    assert torch.equal(out[100:400], alone[0])
    assert torch.equal(lse[:, 100:400], alone[1])


@pytest.mark.cuda
def test_rows_of_no_sequence_are_not_written():
    device = torch.device("cuda")
    q, k_nope, k_rope, v, *rest = make([60, 100], [60, 100], 2, device)
    expected = ops.mla_attention(q, k_nope, k_rope, v, *rest, softmax_scale=SCALE)
    q = torch.cat([q, torch.full((200, 2, NOPE + ROPE), NAN, device=device, dtype=BF16)])
    out = torch.full((360, 2, VALUE), 7.0, device=device, dtype=BF16)
    lse = torch.full((2, 360), 7.0, device=device)
    registry.native().mla_attention(out, lse, q, k_nope, k_rope, v, *rest[:2], rest[3], True, SCALE)
    assert torch.equal(out[:160], expected[0])
    assert torch.equal(lse[:, :160], expected[1])
    assert (out[160:] == 7).all()
    assert (lse[:, 160:] == 7).all()


@pytest.mark.cuda
def test_a_million_keys():
    check(make([130], [2**20], 1, torch.device("cuda")))


@pytest.mark.cuda
def test_more_than_2_to_the_31_elements():
    device, queries, few = torch.device("cuda"), 2**17 + 100, 100
    _, k_nope, k_rope, v, _, cu_k, _, keys = make([1], [70], 128, device)
    q = torch.randn(queries, 128, NOPE + ROPE, device=device, dtype=BF16)

    def attend(q):
        lengths = offsets([len(q)], device), cu_k, len(q), keys
        return ops.mla_attention(q, k_nope, k_rope, v, *lengths, causal=False, softmax_scale=SCALE)

    out, lse = attend(q)
    expected = attend(q[-few:])
    assert out.numel() > 2**31
    assert torch.equal(out[-few:], expected[0])
    assert torch.equal(lse[:, -few:], expected[1])


# ---- gradients ----
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [([130, 130], [130, 130]), ([40, 200], [100, 230])])
def test_gradients(lengths, causal, device):
    q, k_nope, k_rope, v, *rest = make(*lengths, 2, device)
    dout = torch.randn(q.shape[0], 2, VALUE, device=device).to(BF16)

    def gradients(f, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k_nope, k_rope, v)]
        return torch.autograd.grad(f(*leaves, *rest)[0], leaves, dout.to(dtype))

    ours = gradients(lambda *a: ops.mla_attention(*a, causal=causal, softmax_scale=SCALE), BF16)
    exact = gradients(lambda *a: plain(*a, causal=causal), torch.float64)
    rounded = gradients(lambda *a: plain(*a, causal=causal, dtype=BF16), BF16)
    for x, y, z in zip(ours, exact, rounded, strict=True):
        assert relative_error(x, y) <= 2 * relative_error(z, y) + 1e-4


@pytest.mark.parametrize("beside", [True, False], ids=["one tensor", "two tensors"])
def test_halves_of_keys_and_values(beside, device):
    """split_kv gives the views that split gives; gradients that lie in one tensor, as mla_attention's do, become kv's without a
    copy, others are put together."""
    kv = torch.randn(5, 3, NOPE + VALUE, device=device, dtype=BF16, requires_grad=True)
    k_nope, v = ops.split_kv(kv, NOPE)
    assert torch.equal(k_nope, kv[..., :NOPE])
    assert torch.equal(v, kv[..., NOPE:])
    assert k_nope.data_ptr() == kv.data_ptr()
    whole = torch.randn_like(kv)
    halves = whole.split([NOPE, VALUE], -1)
    (grad,) = torch.autograd.grad([k_nope, v], kv, halves if beside else [half.clone() for half in halves])
    assert torch.equal(grad, whole)
    assert (grad.data_ptr() == whole.data_ptr()) == beside

    def loss(kv):
        return sum(half.square().sum() for half in ops.split_kv(kv, NOPE))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(*(torch.autograd.grad(f(kv), kv)[0] for f in (loss, compiled)))
    for bad, nope in ((kv[0], NOPE), (kv, 0), (kv, -1), (kv, NOPE + VALUE)):
        with pytest.raises(ValueError, match=r"split_kv: kv must be \(T, H, D\) and nope in 1..D-1, got \("):
            ops.split_kv(bad, nope)


# ---- registration, graphs, errors ----
def test_registration_compile_graph(device):
    args = make([100, 30], [120, 30], 2, device)
    check_registration("mla_attention", *args, True, SCALE)
    out, lse = torch.ops.dsv3.mla_attention(*args, True, SCALE)
    check_registration("mla_merge", out, lse, out, lse)

    def attend(q, k_nope, k_rope, v, cu_q, cu_k):
        return ops.mla_attention(q, k_nope, k_rope, v, cu_q, cu_k, 100, 120, softmax_scale=SCALE)

    check_compile(attend, *args[:6])
    if device.type == "cuda":  # the reference reads the lengths
        check_graph(lambda *x: attend(*x, *args[4:6]), *(x.clone() for x in args[:4]))
        check_graph(ops.mla_merge, out, lse, out.flip(0), lse + 1)
    check_compile(ops.mla_merge, out, lse, out, lse)


@pytest.mark.parametrize("lengths", [[3, 3], [2, 3]], ids=["equal", "unequal"])
def test_self_attention_compiles(lengths, device):
    """One tensor of offsets for queries and keys, forward and gradients; equal lengths have the strides that they should."""
    q, k_nope, k_rope, v, cu, _, longest, _ = make(lengths, lengths, 2, device)
    check_registration("mla_attention", q, k_nope, k_rope, v, cu, cu.clone(), longest, longest, True, SCALE)
    leaves = [x.float().clone().requires_grad_() for x in (q, k_nope, k_rope, v)]

    def loss(*leaves):
        out, _ = ops.mla_attention(*leaves, cu, cu, longest, longest, softmax_scale=SCALE)
        return out.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    pairs = zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (loss, compiled)), strict=True)
    for expected, found in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("cu", "most"), [([0, 2, 5], 3), ([0, 3, 4], 3), ([0, 1, 6], 6), ([0, 1, 6], 5)], ids=str)
def test_offsets_decide_and_not_the_number_of_rows(cu, most, device):
    """Six rows are two sequences of the largest length 3, or sequences of other lengths with rows over."""
    q, k_nope, k_rope, v, *_ = make([6], [6], 2, device)
    if device.type == "cpu":
        q, k_nope, k_rope, v = (x.double() for x in (q, k_nope, k_rope, v))
    cu = torch.tensor(cu, dtype=torch.int32, device=device)
    expected, end = plain(q, k_nope, k_rope, v, cu, cu)[0], int(cu[-1])
    out, _ = ops.mla_attention(q, k_nope, k_rope, v, cu, cu, most, most, softmax_scale=SCALE)
    torch.testing.assert_close(out[:end].double(), expected[:end], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("lengths", [[3, 3], [2, 3]], ids=["equal", "unequal"])
def test_tensors_without_data(lengths):
    with FakeTensorMode() as mode:
        args = make(lengths, lengths, 2, torch.device("cpu"))
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
        out, lse = ops.mla_attention(*fake, softmax_scale=SCALE)
    assert out.shape == (sum(lengths), 2, VALUE)
    assert lse.shape == (2, sum(lengths))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("bad", [[0, 80, 70], [0, 50, 101], [5, 50, 100], [0, -1, 100]])
def test_wrong_offsets(bad, which, device):
    args = list(make([50, 50], [50, 50], 2, device))
    args[4 + which] = torch.tensor(bad, dtype=torch.int32, device=device)
    args[6:] = 60, 60

    def attend():
        out, _ = ops.mla_attention(*args, softmax_scale=SCALE)
        return out.sum().item()  # waits

    if device.type == "cuda":  # says so at the next call
        attend()
    with pytest.raises(RuntimeError, match=r"offsets must start at 0, not decrease and stay within the 100 rows"):
        attend()


def test_bad_arguments(device):
    q, k_nope, k_rope, v, *rest = make([3], [3], 2, device)
    for bad in ((q[:, :1], k_nope, k_rope, v), (q, k_nope[:2], k_rope, v), (q, k_nope, k_rope[:2], v)):
        with pytest.raises(ValueError, match=r"mla_attention: expected q \(Tq,H,Dn\+Dr\)"):
            ops.mla_attention(*bad, *rest, softmax_scale=SCALE)
    with pytest.raises(ValueError, match=r"mla_attention: expected q .*, H >= 1, got \(\(3, 0, 192\)"):
        ops.mla_attention(q[:, :0], k_nope[:, :0], k_rope, v[:, :0], *rest, softmax_scale=SCALE)
    with pytest.raises(ValueError, match="mla_attention: expected tensors of one dtype"):
        ops.mla_attention(q, k_nope, k_rope.float(), v, *rest, softmax_scale=SCALE)
    with pytest.raises(ValueError, match=r"expected cu_seqlens_q and cu_seqlens_k of int32 \(n\+1,\), got torch.int64"):
        ops.mla_attention(q, k_nope, k_rope, v, rest[0].long(), *rest[1:], softmax_scale=SCALE)
    o, lse = torch.zeros(3, 2, 8, device=device), torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match=r"mla_merge: expected o1, o2 \(T,H,D\) and lse1, lse2 \(H,T\)"):
        ops.mla_merge(o, lse.T, o, lse)
    with pytest.raises(ValueError, match="mla_merge: expected outputs of one dtype"):
        ops.mla_merge(o, lse, o.bfloat16(), lse)


# ---- merging ----
@pytest.mark.parametrize(("tokens", "heads"), [(0, 3), (1, 1), (127, 3), (64, 128), (1001, 16)])
def test_merge(tokens, heads, device):
    o1, o2 = (torch.randn(tokens, heads, VALUE, device=device).to(BF16) for _ in range(2))
    lse1, lse2 = (torch.randn(heads, tokens, device=device) * 10 for _ in range(2))
    lse1[torch.rand_like(lse1) < 0.2] = -INF
    lse2[torch.rand_like(lse2) < 0.2] = -INF
    o, lse = ops.mla_merge(o1, lse1, o2, lse2)
    exact_lse = torch.logaddexp(lse1.double(), lse2.double())
    weights = [torch.exp(x.double() - exact_lse).nan_to_num().mT[..., None] for x in (lse1, lse2)]
    exact = weights[0] * o1.double() + weights[1] * o2.double()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
    # A weight errs by the rounding of a difference of up to 60, 2^-19; the rest is the rounding of the result.
    torch.testing.assert_close(o.double(), exact, rtol=2**-8, atol=1e-5)
    again = ops.mla_merge(o1, lse1, o2, lse2)
    assert torch.equal(o, again[0])
    assert torch.equal(lse, again[1])


@pytest.mark.parametrize("cut", [1, 64, 200, 299])
def test_merge_of_two_parts_is_the_whole(cut, device):
    q, k_nope, k_rope, v, *_ = make([40], [300], 3, device)
    cu_q = offsets([40], device)

    def attend(keys):
        parts = (x[keys] for x in (k_nope, k_rope, v))
        count = len(range(300)[keys])
        cu_k = offsets([count], device)
        return ops.mla_attention(q, *parts, cu_q, cu_k, 40, count, causal=False, softmax_scale=SCALE)

    whole, lse = attend(slice(0, 300))
    o, merged = ops.mla_merge(*attend(slice(0, cut)), *attend(slice(cut, 300)))
    torch.testing.assert_close(merged, lse, rtol=1e-5, atol=1e-5)
    assert relative_error(o, whole.double()) < 2**-7

"""The gradients of attention against the formula in fp64, at the kernel's sizes; and what no kernel may read or write."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from dsv3 import ops
from dsv3.ops import mla_attention_backward as backward
from dsv3.reference import attention as reference
from dsv3.testing import check_compile, check_graph, check_registration, relative_error

BF16 = torch.bfloat16
NOPE, ROPE, VALUE = 128, 64, 128
SCALE = (NOPE + ROPE) ** -0.5
NAN = float("nan")
BACKWARD = torch.ops.dsv3.mla_attention_backward


def offsets(lengths, device):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def by_sequence(f, lengths_q, lengths_k):
    """f(rows of queries, rows of keys) for every sequence."""
    bounds = [torch.tensor([0, *n]).cumsum(0).tolist() for n in (lengths_q, lengths_k)]
    return [f(slice(*q), slice(*k)) for q, k in zip(*map(pairwise, bounds), strict=True)]


def attend(q, k_nope, k_rope, v, causal):
    """out [Sq, H, 128] of one sequence by torch's attention, in any dtype; zeros where no key is seen."""
    k = torch.cat([k_nope, k_rope[:, None].expand(-1, k_nope.shape[1], -1)], -1)
    blind = max(0, len(q) - len(k)) if causal else len(q) * (len(k) == 0)
    if blind == len(q):
        return (q.sum() + k.sum() + v.sum()) * q.new_zeros(len(q), *v.shape[1:])
    mask = None
    if causal and len(q) != len(k):
        mask = torch.ones(len(q) - blind, len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q) + blind)
    options = {"attn_mask": mask, "is_causal": causal and mask is None, "scale": SCALE}
    parts = [x.transpose(0, 1)[None] for x in (q[blind:], k, pad(v, (0, q.shape[2] - v.shape[2])))]
    out = scaled_dot_product_attention(*parts, **options)[0].transpose(0, 1)
    return pad(out[..., : v.shape[2]], (0, 0, 0, 0, blind, 0))


def log_sum_exp(q, k_nope, k_rope, causal):
    """lse [H, Sq] of one sequence."""
    scores = (
        torch.einsum("qhd,khd->hqk", q[..., :NOPE], k_nope) + torch.einsum("qhd,kd->hqk", q[..., NOPE:], k_rope)
    ) * SCALE
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(len(k_rope) - len(q) + 1)
        scores.masked_fill_(hidden, -torch.inf)
    return scores.logsumexp(-1)


class Case:
    """Tensors of packed sequences as the model has them: k_nope and v are views of kv_b's output."""

    def __init__(self, lengths_q, lengths_k, heads, device, causal=True, dtype=BF16, spare=0):
        self.lengths, self.causal = (lengths_q, lengths_k), causal
        tokens_q, tokens_k = sum(lengths_q), sum(lengths_k)
        drawn = [
            (tokens_q, heads, NOPE + ROPE),
            (tokens_k, heads, NOPE + VALUE),
            (tokens_k, ROPE),
            (tokens_q, heads, VALUE),
        ]
        self.q, self.kv, self.k_rope, self.dout = (
            torch.cat([torch.randn(shape, device=device), torch.full((spare, *shape[1:]), NAN, device=device)]).to(
                dtype
            )
            for shape in drawn
        )
        self.cu = [offsets(n, device) for n in self.lengths]
        self.longest = [max(n, default=0) for n in self.lengths]
        self.out = torch.full_like(self.dout, NAN)
        self.lse = torch.full((heads, tokens_q + spare), NAN, device=device)
        with torch.no_grad():
            by_sequence(self._attend, *self.lengths)

    def parts(self, queries, keys):
        k_nope, v = self.kv[keys].split([NOPE, VALUE], -1)
        return self.q[queries], k_nope, self.k_rope[keys], v

    def _attend(self, queries, keys):
        parts = [x.float() for x in self.parts(queries, keys)]
        self.out[queries] = attend(*parts, self.causal).to(self.out.dtype)
        self.lse[:, queries] = log_sum_exp(*parts[:3], self.causal)

    def args(self, deterministic=False):
        k_nope, v = self.kv.split([NOPE, VALUE], -1)
        settings = *self.cu, *self.longest, self.causal, SCALE, deterministic
        return (self.dout, self.q, k_nope, self.k_rope, v, self.out, self.lse, *settings)

    def __call__(self, deterministic=False):
        """dq, dkv, dk_rope, without the rows of no sequence."""
        dq, dkv, dk_rope = BACKWARD(*self.args(deterministic))
        assert (dq.shape, dkv.shape, dk_rope.shape) == (self.q.shape, self.kv.shape, self.k_rope.shape)
        tokens_q, tokens_k = map(sum, self.lengths)
        return dq[:tokens_q], dkv[:tokens_k], dk_rope[:tokens_k]

    def plain(self, dtype):
        """The same by autograd in a dtype."""
        sums = [torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (self.q, self.kv, self.k_rope)]

        def differentiate(queries, keys):
            leaves = [x.detach().to(dtype).requires_grad_() for x in self.parts(queries, keys)]
            grads = torch.autograd.grad(attend(*leaves, self.causal), leaves, self.dout[queries].to(dtype))
            sums[0][queries] = grads[0].double()
            sums[1][keys] = torch.cat([grads[1], grads[3]], -1).double()
            sums[2][keys] = grads[2].double()

        by_sequence(differentiate, *self.lengths)
        return [x[:n] for x, n in zip(sums, [sum(n) for n in (self.lengths[0], *[self.lengths[1]] * 2)], strict=True)]


def check(found, case):
    """At most twice the error of torch's bf16 (design: check_op), each gradient and, of the keys, each half."""
    exact, plain = case.plain(torch.float64), case.plain(case.q.dtype)
    halves = [lambda x: x, lambda x: x[..., :NOPE], lambda x: x[..., NOPE:], lambda x: x]
    names = ["dq", "dk_nope", "dv", "dk_rope"]
    for name, half, i in zip(names, halves, (0, 1, 1, 2), strict=True):
        limit = 2 * relative_error(half(plain[i]), half(exact[i])) + 1e-4
        error = relative_error(half(found[i]), half(exact[i]))
        assert error <= limit, f"{name}: error {error:.3e} against a limit of {limit:.3e}"


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ([257], [257]),
        ([127, 0, 1, 64, 130], [127, 0, 1, 64, 130]),
        ([5, 70, 128, 1], [300, 70, 1, 257]),
        ([200, 3, 129, 0], [64, 0, 130, 40]),
    ],
    ids=["one", "packed", "past", "short keys"],
)
def test_gradients(lengths_q, lengths_k, heads, causal, deterministic, device):
    case = Case(lengths_q, lengths_k, heads, device, causal)
    check(case(deterministic), case)


@pytest.mark.cuda
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    ("lengths", "heads"), [([4001], 3), ([1024, 2049, 17, 700], 16), ([640], 128)], ids=["4001", "packed", "heads"]
)
def test_large(lengths, heads, causal):
    device = torch.device("cuda")
    case = Case(lengths, lengths, heads, device, causal)
    check(case(), case)


@pytest.mark.cuda
def test_more_units_than_places():
    """The ring of partial sums goes round several times; one sequence in 60 is long."""
    device = torch.device("cuda")
    lengths = [(7 * i) % 90 for i in range(59)] + [1500]
    case = Case(lengths, lengths, 16, device)
    check(case(), case)
    check(case(True), case)


def test_nothing_leaks_from_rows_of_no_sequence(device):
    """They hold NaN; and those of the next sequence do in the first one's gradients."""
    case = Case([70, 130], [70, 200], 3, device, spare=130)
    found = case(deterministic=True)
    assert all(bool(x.isfinite().all()) for x in found)
    check(found, case)
    tensors = case.q, case.kv, case.k_rope, case.dout, case.out
    for x in tensors:
        x[70:] = NAN
    case.lse[:, 70:] = NAN
    again = case(deterministic=True)
    assert all(torch.equal(x[:70], y[:70]) for x, y in zip(found, again, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize(("spare", "heads"), [(100, 2), (24, 16), (3000, 128)])
def test_rows_of_no_sequence(spare, heads):
    """Of queries they are not written, of keys they get zeros; and the others their gradients."""
    device = torch.device("cuda")
    case = Case([70], [90], heads, device, spare=spare)
    outputs = [torch.full_like(x, 7.0) for x in (case.q, case.kv, case.k_rope)]
    backward._launch(tuple(outputs), *case.args())
    for x, n, value in zip(outputs, (70, 90, 90), (7.0, 0.0, 0.0), strict=True):
        assert bool((x[n:] == value).all())
    check(case(), case)


@pytest.mark.parametrize("causal", [True, False])
def test_no_keys(causal, device):
    """Queries without keys get zeros, keys without queries too."""
    case = Case([3, 0, 65], [0, 40, 0], 2, device, causal)
    assert not any(bool(x.any()) for x in case())
    if causal:
        case = Case([100], [30], 2, device)
        dq, *_ = case()
        assert not bool(dq[:70].any())
        assert bool(dq[71:].any(-1).all())  # row 70 sees one key, whose weight is 1 whatever it is


@pytest.mark.parametrize("shape", [([], []), ([0], [0]), ([0], [5]), ([1], [1])])
def test_tiny(shape, device):
    case = Case(*shape, 2, device)
    check(case(), case)


@pytest.mark.parametrize("causal", [True, False])
def test_deterministic(causal, device):
    lengths = [700, 0, 33, 1300] if device.type == "cuda" else [70, 0, 33]
    case = Case(lengths, lengths, 16 if device.type == "cuda" else 2, device, causal)
    first = case(deterministic=True)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, case(deterministic=True), strict=True))


def test_strided_views(device):
    """k_nope and v of any strides, q and dout that are not contiguous."""
    case = Case([130], [130], 3, device)
    exact = case(deterministic=True)
    dout, q, k_nope, k_rope, v, out, lse, *rest = case.args(deterministic=True)
    wide = torch.stack([q, q], -1)[..., 0]
    for other in (k_nope.contiguous(), k_nope.transpose(0, 1).contiguous().transpose(0, 1), k_nope.clone()[:, :, :]):
        found = BACKWARD(dout.mT.contiguous().mT, wide, other, k_rope.clone(), v.contiguous(), out, lse, *rest)
        assert all(torch.equal(x, y) for x, y in zip(found, exact, strict=True))


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
def test_the_public_op_differentiates_by_it(deterministic, device):
    """Gradients of k_nope and v arrive at kv_b's output; those of torch's deterministic mode are the deterministic ones."""
    case = Case([70, 130], [90, 130], 3, device)
    q, kv, k_rope = (x.detach().requires_grad_() for x in (case.q, case.kv, case.k_rope))

    def gradients(**options):
        k_nope, v = kv.split([NOPE, VALUE], -1)
        out, _ = ops.mla_attention(q, k_nope, k_rope, v, *case.cu, *case.longest, softmax_scale=SCALE, **options)
        return torch.autograd.grad(out, (q, kv, k_rope), case.dout)

    found = gradients(deterministic=deterministic)
    check(found, case)
    if deterministic:
        try:
            torch.use_deterministic_algorithms(True)
            again = gradients()
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.parametrize("scale", [4.0, 30.0])
def test_peaked(scale, device):
    """Scores so large that a query has one key: no overflow, no NaN."""
    case = Case([200], [200], 2, device)
    case.q *= scale
    by_sequence(case._attend, *case.lengths)
    check(case(), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference(dtype, device):
    """Other dtypes and widths run on the reference; against autograd."""
    case = Case([5, 0, 9], [7, 2, 9], 2, device, dtype=dtype)
    exact = case.plain(torch.float64)
    found = reference.mla_attention_backward(*case.args())
    for x, y in zip(found, exact, strict=True):
        assert relative_error(x, y) < 1e-5


@pytest.mark.cuda
@pytest.mark.parametrize("wrong", [[0, 40, 30, 100], [0, 40, 60, 101], [3, 40, 60, 100]])
def test_wrong_offsets_are_reported(wrong):
    device = torch.device("cuda")
    case = Case([40, 20, 40], [40, 20, 40], 2, device)
    case.cu[1] = torch.tensor(wrong, dtype=torch.int32, device=device)
    assert all(bool(x.isnan().all()) for x in case())
    with pytest.raises(RuntimeError, match="offsets"):
        case()


def test_registration(device):
    check_registration("mla_attention_backward", *Case([33, 7], [40, 7], 2, device).args())


def test_compiles(device):
    case = Case([33, 7], [40, 7], 2, device)
    tensors, settings = case.args(True)[:7], case.args(True)[7:]
    check_compile(lambda *tensors: BACKWARD(*tensors, *settings), *tensors)


@pytest.mark.cuda
def test_graph():
    device = torch.device("cuda")
    case = Case([300, 65], [300, 65], 4, device)
    tensors, settings = case.args(True)[:7], case.args(True)[7:]
    check_graph(lambda *tensors: BACKWARD(*tensors, *settings), *tensors)

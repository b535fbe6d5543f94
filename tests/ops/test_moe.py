from __future__ import annotations

import pytest
import torch

from dsv3 import ops
from dsv3.comm import ExpertBuffer
from dsv3.reference import moe as reference
from dsv3.testing import check_compile, check_graph, check_op, check_registration, relative_error

V3 = {"num_groups": 4, "topk_groups": 2, "topk": 3, "route_scale": 2.5}
V2 = {
    **V3, "route_scale": 16.0, "score": "softmax", "group_score": "max", "normalize": False,
}  # fmt: skip
ONE_GROUP = {**V3, "num_groups": 1, "topk_groups": 1}
SETTINGS = {"v3": V3, "v2": V2, "one group": ONE_GROUP, "not normalised": {**V3, "normalize": False}}


def brute_force(logits, bias, *, num_groups, topk_groups, topk, route_scale, score, group_score, normalize):
    """The paper's rule for one token, with Python's sort: the largest first, equal ones from the lowest index on."""
    s = (logits.sigmoid() if score == "sigmoid" else logits.softmax(0)).tolist()
    choice = [a + b for a, b in zip(s, bias.tolist(), strict=True)]
    size = len(s) // num_groups

    def group_value(g):
        best = sorted(choice[g * size : (g + 1) * size], reverse=True)
        return best[0] if group_score == "max" else sum(best[:2])

    groups = sorted(range(num_groups), key=lambda g: -group_value(g))[:topk_groups]
    allowed = [e for e in range(len(s)) if e // size in groups]
    index = sorted(allowed, key=lambda e: -choice[e])[:topk]
    total = sum(s[e] for e in index) if normalize else 1.0
    return index, [s[e] / total * route_scale for e in index]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("tokens", [0, 1, 127])
@pytest.mark.parametrize("biased", [False, True])
def test_gate_against_brute_force(name, tokens, biased, device):
    logits = torch.randn(tokens, 16, device=device)
    bias = torch.rand(16, device=device) - 0.5 if biased else None
    settings = {"score": "sigmoid", "group_score": "top2_sum", "normalize": True, **SETTINGS[name]}
    index, weights, counts = ops.moe_gate(logits, bias, **settings)
    assert (index.dtype, weights.dtype, counts.dtype) == (torch.int64, torch.float32, torch.int32)
    assert index.shape == weights.shape == (tokens, 3)
    assert torch.equal(counts.long(), torch.bincount(index.flatten(), minlength=16))
    zero = torch.zeros(16, dtype=torch.float64)
    for t in range(tokens):
        row = logits[t].double().cpu()
        expected, expected_weights = brute_force(row, zero if bias is None else bias.double().cpu(), **settings)
        assert index[t].tolist() == expected
        torch.testing.assert_close(
            weights[t].cpu().double(), torch.tensor(expected_weights).double(), rtol=1e-5, atol=0
        )


def test_ties_go_to_the_lowest_index(device):
    index, weights, _ = ops.moe_gate(torch.zeros(5, 256, device=device), None, **{**V3, "num_groups": 8, "topk": 8})
    assert torch.equal(index, torch.arange(8, device=device).expand(5, 8))
    assert torch.equal(weights, torch.full_like(weights, 2.5 / 8))
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0]], device=device)
    assert ops.moe_gate(logits, None, **{**V3, "topk": 4})[0].tolist() == [[1, 2, 3, 0]]


def test_groups_not_kept_are_at_minus_infinity(device):
    """With negative biased scores a mask of 0 would let the experts of dropped groups win."""
    logits = torch.randn(200, 16, device=device)
    bias = torch.full((16,), -3.0, device=device)
    index, weights, _ = ops.moe_gate(logits, bias, **V3)
    unbiased, unbiased_weights, _ = ops.moe_gate(logits, None, **V3)
    assert torch.equal(index, unbiased)
    torch.testing.assert_close(weights, unbiased_weights)
    groups = index // 4
    assert all(len(set(row)) <= 2 for row in groups.tolist())


def test_bias_chooses_but_does_not_weigh(device):
    logits = torch.zeros(1, 8, device=device)
    bias = torch.tensor([0, 0, 0, 0, 0, 0, 0.5, 0.4], device=device)
    index, weights, _ = ops.moe_gate(logits, bias, num_groups=2, topk_groups=1, topk=2, route_scale=1.0)
    assert index.tolist() == [[6, 7]]
    assert weights.tolist() == [[0.5, 0.5]]


def rounded_logits(experts, groups, score, group_score, device):
    """6000 rows of logits, nearly all of them halves, so that there are equals; a bias for a sigmoid, and settings."""
    logits = torch.randn(6000, experts, device=device) * 3
    bias = torch.rand(experts, device=device) - 0.5 if score == "sigmoid" else None
    logits[1000 if score == "sigmoid" else 0 :].mul_(2).round_().div_(2)
    return logits, bias, (groups, max(1, groups // 2), min(8, experts // 4), 1.0, score, group_score, False)


@pytest.mark.parametrize("experts", [16, 32, 64, 128, 160, 256])
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize(("score", "group_score"), [("sigmoid", "top2_sum"), ("softmax", "max")])
def test_gate_is_the_reference_bit_for_bit(experts, groups, score, group_score, device):
    """Choices and counts, among equals too, and affinities from 0 to 1, of so many tokens that a warp has several, and of what
    one cluster takes. The sum of a softmax has another order, so there the logits are far apart or equal and only the choice is
    compared."""
    logits, bias, args = rounded_logits(experts, groups, score, group_score, device)
    logits[-200:-100] *= 40
    if score == "sigmoid":
        logits[-100:, ::3] = -torch.inf
    for tokens in (6000, 0, 1, 17, 33, 100, 128, 129):
        rows = logits[len(logits) - tokens :]
        index, weights, counts = torch.ops.dsv3.moe_gate(rows, bias, *args)
        expected, expected_weights, expected_counts = reference.moe_gate(rows, bias, *args)
        assert torch.equal(index, expected)
        assert torch.equal(counts, expected_counts)
        if score == "sigmoid":
            assert torch.equal(weights, expected_weights)


@pytest.mark.parametrize("name", SETTINGS)
def test_gate_gradient(name, device):
    logits, bias = torch.randn(33, 16, device=device), torch.rand(16, device=device) - 0.5
    settings = SETTINGS[name]
    index = ops.moe_gate(logits, bias, **settings)[0]

    def plain(x):
        s = x.softmax(-1) if settings.get("score") == "softmax" else x.sigmoid()
        w = s.gather(1, index)
        return (w / w.sum(-1, keepdim=True) if settings.get("normalize", True) else w) * settings["route_scale"]

    check_op(lambda x: ops.moe_gate(x, bias, **settings)[1], plain, logits)


# ---- the gate with the loads of every sequence ----
LENGTHS = {
    "one": [133],
    "equal": [32] * 4,
    "ragged": [50, 3, 17, 63],
    "one token": [16, 1, 16, 1],
    "empty ones": [0, 40, 0, 0, 7, 0],
    "many in a block": [1, 2, 1, 3, 2, 4, 0, 1, 5, 1, 1],
    "no tokens": [0],
}  # fmt: skip


def starts(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def plain_loads(logits, lengths, topk, score):
    """chosen and affinity by equations 18 to 20 in loops: the experts in order of s, largest first, ties as they come."""
    chosen, affinity = [], []
    for rows in logits.double().cpu().split(lengths):
        s = (rows.sigmoid() if score == "sigmoid" else rows.softmax(-1)).tolist()
        best = [sorted(range(len(row)), key=lambda e, row=row: -row[e])[:topk] for row in s]
        experts = range(logits.shape[1])
        chosen.append([sum(e in choice for choice in best) for e in experts])
        affinity.append([sum(row[e] / sum(row) for row in s) for e in experts])
    return chosen, torch.tensor(affinity, dtype=torch.float64)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("biased", [False, True])
def test_loads_against_the_equations(name, lengths, biased, device):
    logits = torch.randn(sum(lengths), 16, device=device)
    bias = torch.rand(16, device=device) - 0.5 if biased else None
    *routed, chosen, affinity = ops.moe_gate_loads(logits, bias, starts(lengths, device), **SETTINGS[name])
    assert (chosen.dtype, affinity.dtype) == (torch.int32, torch.float64)
    expected, expected_affinity = plain_loads(logits, lengths, 3, SETTINGS[name].get("score", "sigmoid"))
    assert chosen.tolist() == expected
    torch.testing.assert_close(affinity.cpu(), expected_affinity, rtol=2e-6, atol=1e-9)
    for x, y in zip(routed, ops.moe_gate(logits, bias, **SETTINGS[name]), strict=True):
        assert torch.equal(x, y)
    if SETTINGS[name] is ONE_GROUP and not biased:
        assert torch.equal(chosen.sum(0), routed[2]), "then the choice is the unbiased one"


def cut(tokens, pieces):
    """Lengths of so many sequences by chance, some of them 0."""
    at = torch.randint(tokens + 1, (pieces - 1,)).sort().values.tolist()
    return [b - a for a, b in zip([0, *at], [*at, tokens], strict=True)]


@pytest.mark.cuda
@pytest.mark.parametrize("experts", [16, 32, 64, 128, 160, 256])
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize(("score", "group_score"), [("sigmoid", "top2_sum"), ("softmax", "max")])
def test_loads_are_the_reference(experts, groups, score, group_score):
    """Choices bit for bit, among equals too, of so many tokens that a warp has several and of what one cluster takes, in long
    sequences and in many short ones; another run gives the same bits. Of softmax logits as in the test of the gate."""
    device = torch.device("cuda")
    logits, bias, args = rounded_logits(experts, groups, score, group_score, device)
    logits[-200:-100] *= 20
    for tokens, pieces in ((6000, 1), (6000, 8), (6000, 700), (4096, 4), (0, 2), (1, 1), (17, 3), (128, 2), (129, 40)):
        rows, cu_seqlens = logits[len(logits) - tokens :], starts(cut(tokens, pieces), device)
        found = torch.ops.dsv3.moe_gate_loads(rows, bias, cu_seqlens, *args)
        expected = reference.moe_gate_loads(rows, bias, cu_seqlens, *args)
        for i in (0, 2, 3):  # topk_idx, counts, chosen
            assert torch.equal(found[i], expected[i])
        assert relative_error(found[4], expected[4]) < 1e-6
        torch.testing.assert_close(found[4], expected[4], rtol=2e-6, atol=1e-8)
        again = torch.ops.dsv3.moe_gate_loads(rows, bias, cu_seqlens, *args)
        assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
        if score == "sigmoid":
            assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("lengths", [[33], [10, 0, 1, 22]])
@pytest.mark.parametrize("name", SETTINGS)
def test_loads_gradient(name, lengths, device):
    logits, bias = torch.randn(33, 16, device=device), torch.rand(16, device=device) - 0.5
    settings, cu_seqlens = SETTINGS[name], starts(lengths, device)
    index = ops.moe_gate(logits, bias, **settings)[0]

    def plain(x):
        s = x.softmax(-1) if settings.get("score") == "softmax" else x.sigmoid()
        w = s.gather(1, index)
        w = (w / w.sum(-1, keepdim=True) if settings.get("normalize", True) else w) * settings["route_scale"]
        p = s / s.sum(-1, keepdim=True)
        return w, torch.stack([part.sum(0) for part in p.split(lengths)])

    check_op(lambda x: ops.moe_gate_loads(x, bias, cu_seqlens, **settings)[1::3], plain, logits)
    for part in (0, 1):  # a gradient of the weights alone, and of the affinities alone
        check_op(
            lambda x, part=part: ops.moe_gate_loads(x, bias, cu_seqlens, **settings)[1::3][part],
            lambda x, part=part: plain(x)[part],
            logits,
        )


@pytest.mark.parametrize("experts", [32, 64, 128, 160, 256])
def test_loads_gradient_of_many_experts(experts, device):
    logits, bias = torch.randn(300, experts, device=device), torch.rand(experts, device=device)
    cu_seqlens = starts([150, 0, 149, 1], device)
    args = (8, 4, 6, 2.5, "sigmoid", "top2_sum" if experts > 32 else "max", True)
    index, weights, _, _, affinity = torch.ops.dsv3.moe_gate_loads(logits, bias, cu_seqlens, *args)
    grads = torch.randn_like(weights), torch.randn_like(affinity)
    others = index, cu_seqlens, 2.5, "sigmoid", True
    found = torch.ops.dsv3.moe_gate_loads_backward(*grads, logits, *others)
    plain, exact = (reference.moe_gate_loads_backward(*grads, x, *others) for x in (logits, logits.double()))
    assert relative_error(found, exact) < 2 * relative_error(plain, exact) + 2e-6


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_loads_of_logits_that_are_not_finite(bad, score, device):
    """What is not a number makes its sequence's affinities none, and no other's; a sigmoid of infinity is a number."""
    logits, cu_seqlens = torch.randn(200, 64, device=device), starts([90, 60, 50], device)
    settings = {"num_groups": 1, "topk_groups": 1, "topk": 4, "route_scale": 1.0, "score": score}
    before = ops.moe_gate_loads(logits, None, cu_seqlens, **settings)
    logits[100, 7] = bad
    chosen, affinity = ops.moe_gate_loads(logits, None, cu_seqlens, **settings)[3:]
    broken = bad != bad or (score, bad) == ("softmax", torch.inf)
    assert affinity.isnan().all(-1).tolist() == affinity.isnan().any(-1).tolist() == [False, broken, False]
    for q in (0, 2):
        assert torch.equal(chosen[q], before[3][q])
        assert torch.equal(affinity[q], before[4][q])
    assert chosen.sum(-1).tolist() == [360, 240, 200]


def test_tokens_behind_the_last_sequence_count_in_none(device):
    logits = torch.randn(50, 16, device=device, requires_grad=True)
    found = ops.moe_gate_loads(logits, None, starts([20, 13], device), **V3)
    expected = ops.moe_gate_loads(logits[:33], None, starts([20, 13], device), **V3)
    assert torch.equal(found[3], expected[3])
    torch.testing.assert_close(found[4], expected[4], rtol=1e-6, atol=0)
    assert found[2].sum() == 150
    found[4].sum().backward(retain_graph=True)
    assert not logits.grad[33:].any()
    (found[4] * torch.arange(16, device=device)).sum().backward()
    assert logits.grad[:33].any(-1).all()


@pytest.mark.cuda
def test_loads_in_a_graph():
    device = torch.device("cuda")
    logits, bias = torch.randn(300, 64, device=device), torch.rand(64, device=device)
    cu_seqlens, args = starts([100, 7, 193], device), (4, 2, 6, 2.5, "sigmoid", "top2_sum", True)
    index = torch.ops.dsv3.moe_gate_loads(logits, bias, cu_seqlens, *args)[0]
    grads = torch.randn(300, 6, device=device), torch.randn(3, 64, device=device, dtype=torch.float64)

    def backward(logits, *grads):
        return torch.ops.dsv3.moe_gate_loads_backward(*grads, logits, index, cu_seqlens, 2.5, "sigmoid", True)

    check_graph(lambda x, b: torch.ops.dsv3.moe_gate_loads(x, b, cu_seqlens, *args), logits, bias)
    check_graph(backward, logits, *grads)


@pytest.mark.parametrize("tokens", [100, 300])
@pytest.mark.parametrize("ends", [[3, 99], [0, 80, 40, 99], [0, -3, 99], [0, 40, 301]])
def test_loads_of_sequences_without_sense(ends, tokens, device):
    """A CPU says so at once, a GPU at the next call, the affinities of such a sequence being NaN."""
    logits, bias = torch.randn(tokens, 64, device=device), torch.rand(64, device=device)
    cu_seqlens, args = torch.tensor(ends, dtype=torch.int32, device=device), (4, 2, 6, 2.5, "sigmoid", "top2_sum", True)

    def call():
        return torch.ops.dsv3.moe_gate_loads(logits, bias, cu_seqlens, *args)

    if device.type == "cuda":
        affinity = call()[4].cpu()
        wrong = [
            i for i in range(len(ends) - 1) if ends[i + 1] < ends[i] or ends[i + 1] > tokens or (i == 0 and ends[0])
        ]
        assert affinity.isnan().all(1).nonzero().flatten().tolist() == wrong
    with pytest.raises(RuntimeError, match=r"must (begin|start) at 0, not decrease"):
        call()
    if device.type == "cuda":  # that call was not made
        strided = torch.tensor([0, 0, 80, 0, tokens, 0], dtype=torch.int32, device=device)[::2]
        chosen = ops.moe_gate_loads(logits, bias, strided, **{**V3, "topk": 6})[3]
        assert chosen.sum() == 6 * tokens


# ---- permutation ----
@pytest.mark.parametrize("tokens", [0, 1, 127])
@pytest.mark.parametrize("topk", [1, 3])
def test_permutation_is_stable_and_goes_back(tokens, topk, device):
    experts = 7
    index = torch.rand(tokens, experts, device=device).argsort(-1)[:, :topk].contiguous()
    x = torch.randn(tokens, 32, device=device)
    rows, handle = ops.moe_permute(x, index, experts)
    pairs = sorted((int(e), p) for p, e in enumerate(index.flatten()))
    assert handle.source.tolist() == [p for _, p in pairs]
    assert handle.offsets.dtype == torch.int32
    assert handle.offsets.tolist() == [sum(e < n for e, _ in pairs) for n in range(experts + 1)]
    assert torch.equal(rows, x[handle.source // topk])
    assert torch.equal(handle.source[handle.position.flatten()], torch.arange(tokens * topk, device=device))
    expected = x.clone()
    for _ in range(topk - 1):
        expected += x
    assert torch.equal(ops.moe_unpermute(rows, handle), expected)


@pytest.mark.parametrize("experts", [1, 8, 256, 1024])
def test_permutation_of_many_pairs(experts, device):
    """Enough of them for several blocks; one expert may have all."""
    index = torch.randint(experts, (5000, 4), device=device)
    found = torch.ops.dsv3.moe_permutation(index, experts)
    assert all(torch.equal(a, b) for a, b in zip(found, reference.moe_permutation(index, experts), strict=True))


@pytest.mark.parametrize("tokens", [0, 1, 127, 2000])
@pytest.mark.parametrize("hidden", [16, 272, 2048])
def test_permute_of_a_cast(tokens, hidden, device):
    """Codes and scales go where the row goes, and what comes out is what the rows' own cast would be."""
    x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    index = torch.rand(tokens, 8, device=device).argsort(-1)[:, :3].contiguous()
    (data, sf), handle = ops.moe_permute(ops.per_token_cast(x), index, 8)
    rows, _ = ops.moe_permute(x, index, 8)
    expected, expected_sf = ops.per_token_cast(rows)
    assert torch.equal(data.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(sf, expected_sf)
    assert sf.stride() == expected_sf.stride()
    assert handle.offsets[-1] == 3 * tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_permutation_gradients(dtype, device):
    index = torch.rand(50, 8, device=device).argsort(-1)[:, :3].contiguous()
    x = torch.randn(50, 16, device=device).to(dtype)
    handle = ops.moe_permute(x, index, 8)[1]
    order, position = handle.source // 3, handle.position
    check_op(lambda x: ops.moe_permute(x, index, 8)[0], lambda x: x[order], x)
    rows = torch.randn(150, 16, device=device).to(dtype)
    check_op(lambda y: ops.moe_unpermute(y, handle), lambda y: y[position].sum(1), rows)
    weights = torch.rand(50, 3, device=device)

    def plain(y, w):
        return (y[position].to(w.dtype) * w[..., None]).sum(1).to(y.dtype)

    check_op(lambda y, w: ops.moe_unpermute(y, handle, w), plain, rows, weights)
    check_op(
        lambda y, w: ops.moe_unpermute(y, handle, w.t()), lambda y, w: plain(y, w.t()), rows, weights.t().contiguous()
    )


def test_sum_is_in_fp32(device):
    """256 + 1 + 1 is 256 when summed in bf16."""
    y = torch.tensor([[256.0], [1.0], [1.0]], device=device, dtype=torch.bfloat16)
    handle = ops.moe_permute(y[:1], torch.tensor([[0, 1, 2]], device=device), 3)[1]
    assert ops.moe_unpermute(y, handle).item() == 258


def test_local_buffer(device):
    buffer = ExpertBuffer(num_experts=6, transport="local")
    x = torch.randn(20, 8, device=device, requires_grad=True)
    index = torch.rand(20, 6, device=device).argsort(-1)[:, :2].contiguous()
    weights = torch.rand(20, 2, device=device, requires_grad=True)
    handle = buffer.dispatch(x, index, weights)
    assert handle.num_recv == 40
    assert torch.equal(handle.topk_weights, weights.flatten()[handle.source])
    out = buffer.combine(handle.x * handle.topk_weights[:, None], handle)
    torch.testing.assert_close(out, x * weights.sum(1, keepdim=True))
    out.sum().backward()
    torch.testing.assert_close(x.grad, weights.sum(1, keepdim=True).expand_as(x))
    torch.testing.assert_close(weights.grad, x.sum(1, keepdim=True).expand_as(weights))
    with pytest.raises(
        ValueError, match="transport must be one of auto, local, collective, ipc, nvshmem, got 'pigeon'"
    ):
        ExpertBuffer(num_experts=6, transport="pigeon")


# ---- registration, compilation, errors ----
def test_registration_and_compile(device):
    logits, bias = torch.randn(9, 16, device=device), torch.rand(16, device=device)
    args = (4, 2, 3, 2.5, "sigmoid", "top2_sum", True)
    check_registration("moe_gate", logits, bias, *args)
    check_registration("moe_gate", logits, None, *args)
    index, weights, _ = torch.ops.dsv3.moe_gate(logits, bias, *args)
    check_registration("moe_gate_backward", weights, logits, index, 2.5, "sigmoid", True)
    cu_seqlens = starts([4, 0, 5], device)
    check_registration("moe_gate_loads", logits, bias, cu_seqlens, *args)
    daffinity = torch.randn(3, 16, device=device, dtype=torch.float64)
    operands = weights, daffinity, logits, index, cu_seqlens
    check_registration("moe_gate_loads_backward", *operands, 2.5, "sigmoid", True)
    check_registration("moe_permutation", index, 16)
    _, source, position = torch.ops.dsv3.moe_permutation(index, 16)
    x = torch.randn(9, 32, device=device)
    check_registration("moe_permute", x, source, position)
    check_registration("moe_permute_cast", *ops.per_token_cast(x), source, position)
    rows = torch.ops.dsv3.moe_permute(x, source, position)
    check_registration("moe_unpermute", rows, position, None)
    check_registration("moe_unpermute", rows, position, weights)

    def route(logits, bias, x):
        index, weights, _ = ops.moe_gate(logits, bias, **V3)
        rows, handle = ops.moe_permute(x, index, 16)
        return ops.moe_unpermute(rows, handle, weights)

    check_compile(route, logits, bias, x)
    check_compile(lambda x, b: ops.moe_gate_loads(x, b, cu_seqlens, **V3), logits.requires_grad_(), bias)


def test_bad_arguments():
    logits = torch.zeros(2, 16)
    with pytest.raises(ValueError, match=r"got \(2, 16\) and \(8,\)"):
        ops.moe_gate(logits, torch.zeros(8), **V3)
    with pytest.raises(ValueError, match="2 of 3 groups do not divide 16 experts"):
        ops.moe_gate(logits, None, **{**V3, "num_groups": 3})
    with pytest.raises(ValueError, match=r"topk must be in 1\.\.8, got 9"):
        ops.moe_gate(logits, None, **{**V3, "topk": 9})
    with pytest.raises(ValueError, match="got tanh, top2_sum"):
        ops.moe_gate(logits, None, **V3, score="tanh")
    with pytest.raises(ValueError, match=r"4 of 0 groups do not divide 16 experts"):
        ops.moe_gate(logits, None, **{**V3, "num_groups": 0, "topk_groups": 4})
    with pytest.raises(ValueError, match=r"top2_sum needs groups of at least 2 experts, got 16 in 16 groups"):
        ops.moe_gate(logits, None, **{**V3, "num_groups": 16, "topk_groups": 16})
    cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"moe_gate_loads: logits must be .*, got \(2, 16\) and \(8,\)"):
        ops.moe_gate_loads(logits, torch.zeros(8), cu_seqlens, **V3)
    for wrong, found in ((cu_seqlens.long(), r"int64 \(2,\)"), (cu_seqlens[:0], r"int32 \(0,\)")):
        with pytest.raises(
            ValueError, match=rf"cu_seqlens must be int32 \(n\+1,\), got {found} for logits of \(2, 16\)"
        ):
            ops.moe_gate_loads(logits, None, wrong, **V3)
    with pytest.raises(ValueError, match="moe_gate_loads: 2 of 3 groups do not divide 16 experts"):
        ops.moe_gate_loads(logits, None, cu_seqlens, **{**V3, "num_groups": 3})
    with pytest.raises(ValueError, match=r"got \(2, 16\) and \(3, 1\)"):
        ops.moe_permute(logits, torch.zeros(3, 1, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"got float32 \(2, 16\) with float32 \(2, 1\)"):
        ops.moe_permute((logits, logits[:, :1]), torch.zeros(2, 1, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"got float8_e4m3fn \(2, 16\) with float32 \(1, 2\)"):
        ops.moe_permute((ops.per_token_cast(logits)[0], logits[:1, :2]), torch.zeros(2, 1, dtype=torch.int64), 2)
    for bad in (-1, 2):
        with pytest.raises(RuntimeError, match=rf"experts must lie in 0\.\.1, got {bad}"):
            ops.moe_permute(logits, torch.tensor([[0], [bad]]), 2)
    for dtype in (torch.int32, torch.float32):
        with pytest.raises(ValueError, match="moe_permute: expected topk_idx of int64"):
            ops.moe_permute(logits, torch.zeros(2, 1, dtype=dtype), 2)
    with pytest.raises(ValueError, match="num_experts must not be negative, got -1"):
        ops.moe_permute(logits[:0], torch.zeros(0, 1, dtype=torch.int64), -1)
    rows, handle = ops.moe_permute(logits, torch.tensor([[0, 1], [1, 0]]), 2)
    for shape in ((2, 1), (1, 2), (2,)):
        with pytest.raises(ValueError, match=r"moe_unpermute: weights must be \(T, k\), got .* for \(2, 2\) pairs"):
            ops.moe_unpermute(rows, handle, torch.ones(shape))

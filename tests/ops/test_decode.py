"""The ops of a decoding step with few tokens, at the sizes of the models; each token's bits are its own. few_attention has a
file beside this one."""

from __future__ import annotations

import pytest
import torch

from dsv3 import ops
from dsv3.reference import decode as reference
from dsv3.testing import check_compile, check_graph, check_op, check_registration
from tests.ops.few import BF16, draw, paged

TOKENS = [0, 1, 3, 8, 9, 16, 31, 33, 64, 65]
POSITIONS = 300
UNSCALED = (None,) * 4  # weights in bf16


def tables(device):
    angles = torch.outer(torch.arange(POSITIONS).float(), 10000.0 ** (-torch.arange(32) / 32))
    return angles.cos().to(device), angles.sin().to(device)


def choices(tokens, experts, topk, device):
    """topk_idx without repetitions in a row, and weights; a third of the experts is never chosen."""
    scores = torch.rand(tokens, experts, device=device)
    scores[:, ::3] = 0
    return scores.topk(topk, dim=1).indices, torch.rand(tokens, topk, device=device) + 0.1


def check_alone(f, *per_token):
    """Token by token gives the bits of all at once."""
    whole = f(*per_token)
    whole = whole if isinstance(whole, (tuple, list)) else [whole]
    for t in range(0, len(per_token[0]), 5):
        one = f(*(x[t : t + 1] for x in per_token))
        for a, b in zip(whole, one if isinstance(one, (tuple, list)) else [one], strict=True):
            assert torch.equal(a[t : t + 1], b)


# ---- few_linear ----
@pytest.mark.parametrize("depth", [32, 768, 1024, 2816, 7168])
@pytest.mark.parametrize("tokens", TOKENS)
def test_few_linear(tokens, depth, device):
    x, weights = draw(tokens, depth, device=device), [draw(n, depth, device=device) for n in (16, 208)]
    check_op(
        lambda x, *weights: tuple(ops.few_linear(x, weights)),
        lambda x, *weights: tuple(reference.few_linear(x, weights, [], x.dtype, False)),
        *(x, *weights),
        gradients=False,
    )


@pytest.mark.parametrize("depth", [96, 1024])
@pytest.mark.parametrize("rows", [(8192,), (64, 8224, 32), (8208,)])
def test_few_linear_of_many_rows(rows, depth, device):
    """One matrix, as the head, in tiles of 64 rows; several as they are; a token's bits are its own."""
    x, weights = draw(40, depth, device=device), [draw(n, depth, device=device) for n in rows]
    check_op(
        lambda x, *weights: tuple(ops.few_linear(x, weights)),
        lambda x, *weights: tuple(reference.few_linear(x, weights, [], x.dtype, False)),
        *(x, *weights),
        gradients=False,
    )
    if device.type == "cuda":
        check_alone(lambda x: ops.few_linear(x, weights), x)


def test_few_linear_in_fp32_and_with_static_weights(device):
    x, weight = draw(7, 1024, device=device), draw(64, 1024, device=device)
    (wide,) = ops.few_linear(x, [weight], out_dtype=torch.float32)
    torch.testing.assert_close(wide.double(), x.double() @ weight.double().t(), rtol=1e-4, atol=1e-3)
    (again,) = ops.few_linear(x, [weight], out_dtype=torch.float32, static_weights=True)
    assert torch.equal(wide, again)
    many = draw(7200, 1024, device=device)
    (wide,) = ops.few_linear(x, [many], out_dtype=torch.float32)
    torch.testing.assert_close(wide.double(), x.double() @ many.double().t(), rtol=1e-4, atol=1e-3)
    (again,) = ops.few_linear(x, [many], out_dtype=torch.float32, static_weights=True)
    assert torch.equal(wide, again)


def transposed(w):
    """The same values, not contiguous."""
    return w.mT.contiguous().mT


STATIC_CALLS = {
    "few_linear": lambda x, w, copied: ops.few_linear(x, [copied(w[0])], static_weights=True),
    "few_heads": lambda x, w, copied: ops.few_heads(x[:, None].expand(-1, 4, -1), copied(w), static_weights=True),
    "mla_absorb": lambda x, w, copied: ops.mla_absorb(
        torch.cat([draw(2, 4, 64, device="cpu"), x[:, None, :8].expand(-1, 4, -1)], -1),
        copied(w), *torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64), static_weights=True,
    ),
    "few_gate": lambda x, w, copied: ops.few_gate(
        x, x, x[0], copied(w[0]), None, eps=1e-6, num_groups=1, topk_groups=1, topk=2, route_scale=1.0, static_weights=True
    ),
    "few_experts": lambda x, w, copied: ops.few_experts(
        x, shared_gate_up=w[0], shared_down=copied(draw(128, 32, device="cpu")), static_weights=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATIC_CALLS)
def test_copies_are_not_static(monkeypatch, name):
    """What is made contiguous has just been written by the kernel ahead."""
    seen = []
    monkeypatch.setattr(torch.ops.dsv3, name, lambda *args: seen.append(args[-1]) or [args[0]])
    for copied in (torch.clone, transposed):
        STATIC_CALLS[name](draw(2, 128, device="cpu"), draw(4, 64, 128, device="cpu"), copied)
    assert seen == [True, False]


@pytest.mark.cuda
def test_a_token_is_the_same_alone():
    device = torch.device("cuda")
    x, weight = draw(64, 2048, device=device), draw(96, 2048, device=device)
    check_alone(lambda x: ops.few_linear(x, [weight]), x)
    (several,) = ops.few_linear(x, [many := draw(7200, 2048, device=device)])
    for part in (slice(3, 4), slice(9, 21), slice(17, 50)):  # 8, 16 and 32 tokens at a time
        assert torch.equal(ops.few_linear(x[part], [many])[0], several[part])
    heads, matrix = draw(64, 4, 512, device=device), draw(4, 128, 512, device=device)
    check_alone(lambda x: ops.few_heads(x, matrix), heads)
    q, w_uk, positions = draw(64, 4, 192, device=device), draw(4, 128, 512, device=device), torch.arange(64).to(device)
    check_alone(lambda q, at: ops.mla_absorb(q, w_uk, *tables(device), at), q, positions)
    weights = expert_weights(24, 256, 96, 64, device)
    inputs = draw(64, 256, device=device), *choices(64, 24, 8, device)
    check_alone(lambda *x: ops.few_experts(*x, **weights), *inputs)
    whole = ops.few_experts(*inputs, **weights)
    for part in (slice(9, 21), slice(17, 50)):
        assert torch.equal(ops.few_experts(*(x[part] for x in inputs), **weights), whole[part])
    q, w_uk = draw(64, 20, 192, device=device), draw(20, 128, 512, device=device)  # more heads, more tokens a block
    check_alone(lambda q, at: ops.mla_absorb(q, w_uk, *tables(device), at), q, positions)


# ---- heads ----
@pytest.mark.parametrize("tokens", TOKENS)
def test_few_heads(tokens, device):
    """W_uv as it lies in kv_b: the last 128 of every head's 256 rows."""
    x, kv_b = draw(tokens, 3, 512, device=device), draw(3, 256, 512, device=device)
    check_op(
        lambda x, w: ops.few_heads(x, w[:, 128:]),
        lambda x, w: reference.few_heads(x, w[:, 128:], False),
        x,
        kv_b,
        gradients=False,
    )


@pytest.mark.parametrize(("heads", "nope"), [(3, 16), (3, 128), (20, 128)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_mla_absorb(tokens, heads, nope, device):
    q, kv_b = draw(tokens, heads, nope + 64, device=device), draw(heads, 256, 512, device=device)
    positions = torch.randint(POSITIONS, (tokens,), device=device)
    check_op(
        lambda q, w, c, s, at: ops.mla_absorb(q, w[:, :nope], c.float(), s.float(), at),
        lambda q, w, c, s, at: reference.mla_absorb(q, w[:, :nope], c, s, at, False),
        *(q, kv_b, *tables(device), positions),
        gradients=False,
    )
    if tokens:
        positions[0] = POSITIONS
        out = ops.mla_absorb(q, kv_b[:, :nope], *tables(device), positions)
        assert out[0, :, 512:].isnan().all()
        assert not out[1:].isnan().any()
        assert not out[0, :, :512].isnan().any()


# ---- a round ----
@pytest.mark.parametrize("first", [0, -2])
@pytest.mark.parametrize("steps", [1, 3])
def test_decode_positions(first, steps, device):
    lengths = torch.tensor([0, 1, 63, 64, 130, 190, 191], device=device)
    active = torch.tensor([1, 1, 1, 1, 1, 1, 0], device=device)
    table = torch.randperm(21, device=device).int().view(7, 3)
    settings = {"first": first, "steps": steps, "page": 64, "last_position": 190}
    found = ops.decode_positions(lengths, active, table, **settings)
    expected = reference.decode_positions(lengths, active, table, *settings.values())
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
    begin = lengths[4].item() + first
    assert found[0].view(7, steps)[4].tolist() == list(range(begin, begin + steps))
    assert found[1].view(7, steps)[4].tolist() == [
        int(table[4, p // 64]) * 64 + p % 64 for p in range(begin, begin + steps)
    ]
    assert found[1].view(7, steps)[6].tolist() == [-1] * steps
    assert found[2].tolist() == [*(n + first + steps for n in (0, 1, 63, 64, 130, 190)), 0]


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("vocab", [64, 32000])
def test_greedy_round(vocab, dtype, device):
    """Rows whose drafts are all right, none, and right again behind a wrong one; equal logits; an idle row."""
    logits = torch.randn(5, 3, vocab, device=device).to(dtype)
    logits[3] = 1.0
    best = logits.argmax(-1)
    drafts = best[:, :2].clone()
    drafts[1] = (drafts[1] + 1) % vocab
    drafts[2, 0] = (drafts[2, 0] + 1) % vocab
    state = torch.zeros(6, 5, dtype=torch.int64, device=device)  # wider than what is used
    tokens, result = torch.zeros(5, 4, dtype=torch.int64, device=device), state[:5, :4]
    tokens[:, 1:3] = drafts
    lengths, active = torch.arange(5, device=device), torch.tensor([1, 1, 1, 1, 0], device=device)
    ops.greedy_round(result, tokens[:, :3], lengths, logits, active)
    accepted = [2, 0, 0, 2, 2]
    assert result[:, 3].tolist() == accepted
    assert torch.equal(result[:, :3], best)
    assert result[3, :3].tolist() == [0, 0, 0]
    assert tokens[:, 0].tolist() == [best[r, a].item() for r, a in enumerate(accepted)]
    assert torch.equal(tokens[:, 1:3], drafts)
    assert lengths.tolist() == [3, 2, 3, 6, 4]
    assert not state[:, 4].any()


@pytest.mark.parametrize("vocab", [8, 8200, 129280])
def test_the_best_token_is_the_first_of_equals(vocab, device):
    """Also of NaN, which is better than all, of zeros of both signs, and where every word is impossible."""
    logits = torch.randn(6, 1, vocab, device=device).to(BF16)
    logits[0] = -torch.inf
    logits[1, 0, 3::4] = torch.nan
    logits[2] = -1.0
    logits[2, 0, 2], logits[2, 0, 5] = -0.0, 0.0
    logits[3, 0, -1] = torch.inf
    logits[4] = -torch.inf
    logits[4, 0, -2] = -3e38
    state = torch.zeros(6, 4, dtype=torch.int64, device=device)
    ops.greedy_round(state[:, :2], state[:, 2:3], state[:, 3].clone(), logits, torch.ones_like(state[:, 0]))
    assert state[:, 0].tolist() == [0, 3, 2, vocab - 1, vocab - 2, int(logits[5, 0].float().argmax())]


# ---- the gate ----
def gate_settings(experts, **changes):
    groups = 8 if experts % 8 == 0 else 1
    settings = {"num_groups": groups, "topk_groups": max(groups // 2, 1), "topk": 6, "route_scale": 2.5, "eps": 1e-5}
    return {**settings, **changes}


@pytest.mark.parametrize("variant", [{}, {"score": "softmax", "group_score": "max", "normalize": False}])
@pytest.mark.parametrize("sizes", [(12, 64), (64, 1024), (160, 2048), (256, 7168)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_few_gate(tokens, sizes, variant, device):
    """Sum and norm are rmsnorm's; choice and weights are those of moe_gate for the logits in fp64, unless two experts are so
    close that fp32 cannot tell them apart."""
    experts, hidden = sizes
    x, residual, factor = (draw(*s, device=device) for s in ((tokens, hidden), (tokens, hidden), (hidden,)))
    gate = draw(experts, hidden, device=device, scale=hidden**-0.5)
    bias, settings = torch.rand(experts, device=device), gate_settings(experts, **variant)
    summed, u, index, weights = ops.few_gate(x, residual, factor, gate, bias, **settings)
    expected, plain = ops.rmsnorm(x, factor, eps=settings.pop("eps"), residual=residual)
    assert torch.equal(summed, plain)
    torch.testing.assert_close(u, expected, rtol=2.0**-7, atol=0)  # another order of squares: the next bf16 at most
    exact_index, exact_weights, _ = ops.moe_gate((u.double() @ gate.double().t()).float(), bias, **settings)
    same = (index == exact_index).all(1)
    assert same.sum() >= 0.95 * tokens
    torch.testing.assert_close(weights[same], exact_weights[same], rtol=1e-4, atol=1e-6)


def test_few_gate_takes_the_lowest_of_equals(device):
    x = torch.ones(3, 64, device=device, dtype=BF16)
    found = ops.few_gate(x, x, x[0], torch.zeros(64, 64, device=device, dtype=BF16), None, **gate_settings(64))
    assert found[2].tolist() == [list(range(6))] * 3
    torch.testing.assert_close(found[3], torch.full((3, 6), 2.5 / 6, device=device))


# ---- experts ----
def expert_weights(experts, hidden, inner, shared, device):
    named = {"gate_up": (experts, 2 * inner, hidden), "down": (experts, hidden, inner)} if experts else {}
    if shared:
        named |= {"shared_gate_up": (2 * shared, hidden), "shared_down": (hidden, shared)}
    return {name: draw(*shape, device=device, scale=shape[-1] ** -0.5) for name, shape in named.items()}


@pytest.mark.parametrize("sizes", [(24, 256, 96, 64), (64, 1024, 512, 512), (300, 64, 32, 0), (0, 1024, 0, 2816)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_few_experts(tokens, sizes, device):
    experts, hidden = sizes[:2]
    weights = expert_weights(*sizes, device)
    x = draw(tokens, hidden, device=device)
    index, factors = choices(tokens, experts, 8, device) if experts else (None, None)
    names = list(weights)

    def ours(x, *rest):
        given = dict(zip(names, rest, strict=False))
        return ops.few_experts(x, index, rest[len(names)].float() if experts else None, **given)

    def plain(x, *rest):
        given = dict(zip(names, rest, strict=False))
        order = [given.get(name) for name in ("gate_up", "down", "shared_gate_up", "shared_down")]
        return reference.few_experts(x, index, rest[len(names)] if experts else None, *order, *UNSCALED, False)

    check_op(ours, plain, x, *weights.values(), *([factors] if experts else []), gradients=False)


def test_all_tokens_for_the_same_experts(device):
    """Every expert that is chosen has all 64 tokens; experts without any are not looked at."""
    weights = expert_weights(16, 128, 64, 0, device)
    for name in weights:
        weights[name][8:] = torch.nan
    index = torch.arange(8, device=device).repeat(64, 1)
    x, factors = draw(64, 128, device=device), torch.rand(64, 8, device=device)
    found = ops.few_experts(x, index, factors, **weights)
    first = {name: w[:8] for name, w in weights.items()}
    expected = reference.few_experts(
        x.double(), index, factors.double(), *(w.double() for w in first.values()), None, None, *UNSCALED, False
    )
    torch.testing.assert_close(found.double(), expected, rtol=3e-2, atol=3e-2)


# ---- combine_norm ----
@pytest.mark.parametrize("shape", [(0, 9, 1024), (1, 9, 1024), (33, 1, 1024), (5, 8, 7168), (64, 9, 8)])
def test_combine_norm(shape, device):
    tokens, slots, hidden = shape
    args = draw(tokens, hidden, device=device), draw(tokens, slots, hidden, device=device), draw(hidden, device=device)
    check_op(
        lambda *args: ops.combine_norm(*args, eps=1e-5),
        lambda *args: reference.combine_norm(*args, 1e-5),
        *args,
        gradients=False,
    )


# ---- once an op ----
def _calls(device):
    def ids(*shape):
        return torch.randint(4, shape, device=device)

    x, weight, factor = draw(5, 64, device=device), draw(32, 64, device=device), draw(64, device=device)
    index, factors = choices(5, 12, 4, device)
    experts = expert_weights(12, 64, 32, 64, device)
    return {
        "few_linear": (x, [weight, weight], [], BF16, False),
        "few_gate": (x, x, factor, 1e-6, weight, None, 4, 2, 6, 2.5, "sigmoid", "top2_sum", True, False),
        "few_heads": (draw(5, 2, 64, device=device), draw(2, 32, 64, device=device), False),
        "mla_absorb": (
            *(draw(5, 2, 80, device=device), draw(2, 16, 64, device=device), *tables(device)),
            *(torch.arange(5, device=device), False),
        ),
        "few_attention": (*paged([70, 3], 2, 1, 4, device), 0.07, 512, False),
        "decode_positions": (ids(5), ids(5), ids(5, 4).int(), 0, 2, 64, 99),
        "greedy_round": (ids(5, 3), ids(5, 2), ids(5), draw(5, 2, 64, device=device), ids(5)),
        "few_experts": (x, index, factors, *experts.values(), *UNSCALED, False),
        "combine_norm": (x, draw(5, 3, 64, device=device), factor, 1e-6),
    }


NAMES = [
    "few_linear",
    "few_gate",
    "few_heads",
    "mla_absorb",
    "few_attention",
    "few_experts",
    "combine_norm",
    "decode_positions",
]


@pytest.mark.parametrize("name", [*NAMES, "greedy_round"])
def test_registration_compile_and_graph(name, device):
    args = _calls(device)[name]
    check_registration(name, *args)
    op = getattr(torch.ops.dsv3, name)
    if name == "greedy_round":  # which changes its arguments: its graph is that of a whole round
        return
    check_compile(lambda x: op(x, *args[1:]), args[0])
    if device.type == "cuda":
        check_graph(lambda x: op(x, *args[1:]), args[0])


BAD = [
    (lambda x, w: ops.few_linear(x, []), "few_linear: expected x"),
    (lambda x, w: ops.few_linear(x, [w[:, :32]]), "few_linear: expected x"),
    (lambda x, w: ops.few_linear(x, w), r"few_linear: expected x \(T, K\) and a list of weights"),
    (lambda x, w: ops.few_linear(x, [w], out_dtype=torch.int32), "few_linear: out_dtype must be torch.bfloat16 or"),
    (
        lambda x, w: ops.greedy_round(x[:, :1], x[:, :0], x[:, 0], x[:, :0, None], x[:, 0]),
        "greedy_round: expected result",
    ),
    (lambda x, w: ops.few_experts(x, x, x, gate_up=w[None], down=w[0]), "few_experts: expected x"),
    (lambda x, w: ops.few_gate(x, x, w[0], w[:, :8], None, **gate_settings(32)), "few_gate: expected x"),
    (lambda x, w: ops.few_gate(x, x, w[0], w, None, **gate_settings(32, num_groups=3)), "few_gate: 4 of 3 groups"),
    (lambda x, w: ops.few_heads(x, w), "few_heads: expected x"),
    (lambda x, w: ops.mla_absorb(x, w, w, w, w), "mla_absorb: expected q"),
    (lambda x, w: ops.few_attention(x, w, x, x, softmax_scale=1.0), "few_attention: expected q"),
    (
        lambda x, w: ops.decode_positions(x, x, w, first=0, steps=1, page=64, last_position=9),
        "decode_positions: expected",
    ),
    (lambda x, w: ops.greedy_round(x, x, x, x[None], x), "greedy_round: expected"),
    (lambda x, w: ops.few_experts(x), "few_experts: expected x"),
    (lambda x, w: ops.few_experts(x, shared_gate_up=w), "few_experts: expected x"),
    (lambda x, w: ops.few_experts(x, shared_gate_up=w, shared_down=w), "few_experts: expected x"),
    (lambda x, w: ops.combine_norm(x, w[None], w[0]), "combine_norm: expected residual"),
    (lambda x, w: ops.combine_norm(x, x[:, None, :][:, :0], w[0]), "combine_norm: expected residual"),
    (lambda x, w: ops.few_linear(x, [w.float()]), "few_linear: expected activations and weights of one dtype"),
    (
        lambda x, w: ops.combine_norm(x, x[:, None].float(), w[0]),
        "combine_norm: expected activations and weights of one",
    ),
    (
        lambda x, w: ops.decode_positions(x[:, 0], x[:, 0], x[:, :0], first=0, steps=1, page=64, last_position=9),
        "decode_positions: expected lengths",
    ),
    (
        lambda x, w: ops.decode_positions(x[:, 0], x[:, 0], x, first=0, steps=1, page=64, last_position=9),
        "decode_positions: expected tensors of int64",
    ),
    (
        lambda x, w: ops.decode_positions(
            x[:, 0].long(), x[:, 0].long(), x.long(), first=0, steps=1, page=64, last_position=9
        ),
        "decode_positions: expected a block_table of int32",
    ),
    (
        lambda x, w: ops.decode_positions(
            x[:, 0].long(), x[:, 0].long(), x.int(), first=0, steps=1, page=0, last_position=9
        ),
        "decode_positions: expected page and steps of at least 1, got 0 and 1",
    ),
    (
        lambda x, w: ops.greedy_round(x[:, :4], x[:, :3], x[:, 0], x[:, :3, None], x[:, 0]),
        "greedy_round: expected tensors",
    ),
    (
        lambda x, w: ops.greedy_round(x[:, :4], x[:, :3], x[:, 0], x[:2, :3, None], x[:, 0]),
        "greedy_round: expected result",
    ),
]


@pytest.mark.parametrize("heads", [1, 3])
def test_absorbing_leaves_the_queries_as_they_are(heads, device):
    q, weight = draw(5, heads, 40, device=device), draw(heads, 24, 32, device=device)
    cos, sin = torch.rand(9, 8, device=device), torch.rand(9, 8, device=device)
    positions, before = torch.arange(5, device=device), q.clone()
    ops.mla_absorb(q, weight, cos, sin, positions)
    assert torch.equal(q, before)


def test_experts_that_do_not_exist():
    x, weights = draw(2, 16, device="cpu"), torch.ones(2, 1)
    gate_up, down = draw(3, 32, 16, device="cpu"), draw(3, 16, 16, device="cpu")
    for bad in (-1, 3):
        with pytest.raises(RuntimeError, match=rf"experts must lie in 0\.\.2, got {bad}"):
            ops.few_experts(x, torch.tensor([[0], [bad]]), weights, gate_up=gate_up, down=down)


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments(call, message, device):
    with pytest.raises(ValueError, match=message):
        call(draw(5, 64, device=device), draw(32, 64, device=device))

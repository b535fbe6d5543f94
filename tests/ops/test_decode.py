"""The ops of a decoding step with few tokens, at the sizes of the models; each token's bits are its own."""

from __future__ import annotations

import pytest
import torch

from dsv3 import ops
from dsv3.reference import decode as reference
from dsv3.testing import check_compile, check_graph, check_op, check_registration

BF16 = torch.bfloat16
TOKENS = [0, 1, 3, 8, 9, 16, 31, 33, 64, 65]
POSITIONS = 300


def draw(*shape, device, scale=1.0):
    return (torch.randn(shape, device=device) * scale).to(BF16)


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
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("depth", [32, 768, 1024, 2816, 7168])
@pytest.mark.parametrize("tokens", TOKENS)
def test_few_linear(tokens, depth, norm, device):
    x, weights = draw(tokens, depth, device=device), [draw(n, depth, device=device) for n in (16, 208)]
    factor = draw(depth, device=device) if norm else None

    def f(op, x, first, second, factor=None):
        return tuple(op(x, [first, second], factor))

    check_op(
        lambda *args: f(lambda x, w, n: ops.few_linear(x, w, norm_weight=n, eps=1e-5), *args),
        lambda *args: f(lambda x, w, n: reference.few_linear(x, w, n, 1e-5, x.dtype, False), *args),
        x,
        *weights,
        *([factor] if norm else []),
        gradients=False,
    )


def test_few_linear_in_fp32_and_with_static_weights(device):
    x, weight = draw(7, 1024, device=device), draw(64, 1024, device=device)
    (wide,) = ops.few_linear(x, [weight], out_dtype=torch.float32)
    torch.testing.assert_close(wide.double(), x.double() @ weight.double().t(), rtol=1e-4, atol=1e-3)
    (again,) = ops.few_linear(x, [weight], out_dtype=torch.float32, static_weights=True)
    assert torch.equal(wide, again)


@pytest.mark.cuda
def test_a_token_is_the_same_alone():
    device = torch.device("cuda")
    x, weight, factor = draw(64, 2048, device=device), draw(96, 2048, device=device), draw(2048, device=device)
    check_alone(lambda x: ops.few_linear(x, [weight], norm_weight=factor), x)
    heads, matrix = draw(64, 4, 512, device=device), draw(4, 128, 512, device=device)
    check_alone(lambda x: ops.few_heads(x, matrix), heads)
    q, w_uk, positions = draw(64, 4, 192, device=device), draw(4, 128, 512, device=device), torch.arange(64).to(device)
    check_alone(lambda q, at: ops.mla_absorb(q, w_uk, *tables(device), at), q, positions)
    weights = expert_weights(24, 256, 96, 64, device)
    check_alone(lambda *x: ops.few_experts(*x, **weights), draw(64, 256, device=device), *choices(64, 24, 8, device))


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


@pytest.mark.parametrize("nope", [16, 128])
@pytest.mark.parametrize("tokens", TOKENS)
def test_mla_absorb(tokens, nope, device):
    q, kv_b = draw(tokens, 3, nope + 64, device=device), draw(3, 256, 512, device=device)
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
        return reference.few_experts(x, index, rest[len(names)] if experts else None, *order, False)

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
        x.double(), index, factors.double(), *(w.double() for w in first.values()), None, None, False
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
    x, weight, factor = draw(5, 64, device=device), draw(32, 64, device=device), draw(64, device=device)
    index, factors = choices(5, 12, 4, device)
    experts = expert_weights(12, 64, 32, 64, device)
    return {
        "few_linear": (x, [weight, weight], factor, 1e-6, BF16, False),
        "few_heads": (draw(5, 2, 64, device=device), draw(2, 32, 64, device=device), False),
        "mla_absorb": (
            *(draw(5, 2, 80, device=device), draw(2, 16, 64, device=device), *tables(device)),
            *(torch.arange(5, device=device), False),
        ),
        "few_experts": (x, index, factors, *experts.values(), False),
        "combine_norm": (x, draw(5, 3, 64, device=device), factor, 1e-6),
    }


@pytest.mark.parametrize("name", ["few_linear", "few_heads", "mla_absorb", "few_experts", "combine_norm"])
def test_registration_compile_and_graph(name, device):
    args = _calls(device)[name]
    check_registration(name, *args)
    op = getattr(torch.ops.dsv3, name)
    check_compile(lambda x: op(x, *args[1:]), args[0])
    if device.type == "cuda":
        check_graph(lambda x: op(x, *args[1:]), args[0])


BAD = [
    (lambda x, w: ops.few_linear(x, []), "few_linear: expected x"),
    (lambda x, w: ops.few_linear(x, [w[:, :32]]), "few_linear: expected x"),
    (
        lambda x, w: ops.few_linear(x, [w], norm_weight=w[0, :8]),
        r"few_linear: expected norm_weight \(64,\), got \(8,\)",
    ),
    (lambda x, w: ops.few_heads(x, w), "few_heads: expected x"),
    (lambda x, w: ops.mla_absorb(x, w, w, w, w), "mla_absorb: expected q"),
    (lambda x, w: ops.few_experts(x), "few_experts: expected x"),
    (lambda x, w: ops.few_experts(x, shared_gate_up=w), "few_experts: expected x"),
    (lambda x, w: ops.few_experts(x, shared_gate_up=w, shared_down=w), "few_experts: expected x"),
    (lambda x, w: ops.combine_norm(x, w[None], w[0]), "combine_norm: expected residual"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments(call, message, device):
    with pytest.raises(ValueError, match=message):
        call(draw(5, 64, device=device), draw(32, 64, device=device))

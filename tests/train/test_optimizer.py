"""ParamBuffers, the AdamW reference and the optimizer, against torch.optim.AdamW and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dsv3.reference import optim
from dsv3.train.balance import ExpertBias
from dsv3.train.buffers import ParamBuffers
from dsv3.train.ema import Ema
from dsv3.train.optimizer import AdamW


class Toy(nn.Module):
    """Dense, expert and 1-D parameters of odd sizes."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7, bias=True, dtype=dtype)
        self.moe = nn.Module()
        self.moe.gate = nn.Linear(7, 4, bias=False, dtype=dtype)
        self.moe.gate.bias = None
        self.moe.experts = nn.Module()
        self.moe.experts.down = nn.Parameter(torch.randn(4, 7, 3).to(dtype))
        self.last = nn.Linear(3, 1, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        mixed = torch.einsum("te,tn,enk->tk", self.moe.gate(h).softmax(-1), h, self.moe.experts.down)
        return self.last(mixed)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()))
    return (model(x).float() - 1).square().mean()


def torch_adamw(model: nn.Module, **kwargs: float) -> torch.optim.AdamW:
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [{"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, *rest], betas=(0.9, 0.95), eps=1e-8, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_become_views_without_changing(dtype: torch.dtype) -> None:
    model = Toy(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = ParamBuffers(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.dtype == dtype
        assert p.main_grad.shape == p.shape
        assert p.main_grad.dtype == torch.float32
    assert [slot.name for slot in buffers.expert.slots] == ["moe.experts.down"]
    # norms and biases lie behind all that decays, each kind in one segment
    assert [s.decay for s in buffers.dense.segments] == [True, False]
    assert sum(s.master.numel() for s in buffers.segments()) == sum(g.master.numel() for g in buffers.groups)
    for segment in buffers.segments():
        assert (segment.weight is None) == (dtype == torch.float32)
        segment.master.fill_(0.5)
    buffers.sync_weights()
    assert all(bool((p == 0.5).all()) for p in model.parameters())


def test_gradients_go_to_main_grad_and_accumulate() -> None:
    model, plain = Toy(), Toy()
    plain.load_state_dict(model.state_dict())
    ParamBuffers(model)
    for seed in (1, 2):
        loss_of(model, seed).backward()
        loss_of(plain, seed).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.grad is None
        torch.testing.assert_close(ours.main_grad, theirs.grad)


def test_gradient_norm_is_exact_for_many_values() -> None:
    """3 million values, a few of them large: a plain fp32 sum is off by 1e-3 here."""
    model = nn.ModuleList([nn.Linear(1000, 3000, bias=False), nn.Linear(7, 5)])
    buffers = ParamBuffers(model)
    for group in buffers.groups:
        group.main_grad.normal_(std=1e-3)
        group.main_grad[:1000] = 1.0
    exact = torch.cat([group.main_grad for group in buffers.groups]).double().norm()
    torch.testing.assert_close(buffers.grad_norm().double(), exact, rtol=1e-6, atol=0)


def test_meta_parameter_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="weight is on the meta device"):
        ParamBuffers(model)


def test_reference_equals_torch_but_for_rounded_moments() -> None:
    """One step from zero moments is exact: they are rounded only for storage, so step 1 has no rounding to see.

    Later steps read moments that were rounded to 8 significant bits, an error of 2^-9 each: m/sqrt(v) is off by at most
    2^-9 (m) + 2^-10 (v under the root) a rounding, and as an average decays as fast as it collects, so does its error:
    a stored average carries at most sum_k beta^k = 10 (m), 20 (v) such roundings if all had one sign, about
    sqrt(1 / (1 - beta^2)) = 2.3 and 3.2 with random ones. Hence the 1.5% of the distance walked below.
    """
    torch.manual_seed(1)
    n, lr = 70_000, 1e-2  # more than a chunk
    start = torch.randn(n)
    param = nn.Parameter(start.clone())
    oracle = torch.optim.AdamW([param], lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    master = start.clone()
    moments = [torch.zeros(n, dtype=torch.bfloat16) for _ in range(2)]
    for step in range(30):
        grad = torch.randn(n) + 0.5
        param.grad = grad.clone()
        oracle.step()
        scalars = [torch.tensor(lr), torch.tensor(0.25), torch.tensor(False), torch.tensor(float(step))]
        optim.adamw([master], [4 * grad], [moments[0]], [moments[1]], [], *scalars, [0.1], 0.9, 0.95, 1e-8)
        if step == 0:
            torch.testing.assert_close(master, param.detach(), rtol=1e-6, atol=1e-7)
    walked = (param.detach() - start).norm()
    assert (master - param.detach()).norm() < 0.015 * walked
    state = oracle.state[param]
    assert (moments[0].float() - state["exp_avg"]).norm() < 0.01 * state["exp_avg"].norm()
    assert (moments[1].float() - state["exp_avg_sq"]).norm() < 0.01 * state["exp_avg_sq"].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_follows_torch_with_clipping_and_decay(dtype: torch.dtype) -> None:
    model, plain = Toy(dtype), Toy()
    plain.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    optimizer, oracle = AdamW(ParamBuffers(model), clip=0.5), torch_adamw(plain, lr=3e-3)
    for step in range(20):
        loss = loss_of(model, step)
        loss.backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            theirs.grad = ours.main_grad.clone()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        oracle.step()
        result = optimizer.step(3e-3, loss)
        torch.testing.assert_close(result.grad_norm, norm)
        assert all(bool((p.main_grad == 0).all()) for p in model.parameters())
    assert float(optimizer.step_count) == 20
    for slot, group in optimizer.buffers.slots():
        master, theirs = slot.view(group.master), dict(plain.named_parameters())[slot.name]
        assert (master - theirs).norm() < 2e-3 * theirs.norm()
        assert torch.equal(slot.param, master.to(dtype))


@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_non_finite_step_changes_nothing(bad: str) -> None:
    model = Toy(torch.bfloat16)
    buffers = ParamBuffers(model)
    optimizer, ema = AdamW(buffers), Ema(buffers, 0.9)
    bias = ExpertBias(model)
    bias.bias = torch.zeros(1, 4)

    def step(broken: bool) -> Tensor:
        loss = loss_of(model, 3)
        loss.backward()
        if broken and bad == "gradient":
            model.moe.experts.down.main_grad[2, 1, 1] = float("inf")
        result = optimizer.step(1e-2, loss * float("nan") if broken and bad == "loss" else loss)
        bias.update(torch.tensor([[9, 1, 0, 2]]), 0.1, result.skip)
        ema.snapshot(result.skip)
        return result.skip

    def state() -> list[Tensor]:
        flat = [t for s in buffers.segments() for t in (s.master, s.exp_avg, s.exp_avg_sq, s.weight)]
        return [t.clone() for t in (*flat, optimizer.step_count, bias.bias, *ema.averages)]

    assert not step(broken=False)
    before = state()
    assert step(broken=True)
    assert step(broken=True)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert (int(optimizer.skipped), int(optimizer.skipped_in_row)) == (2, 2)
    assert not step(broken=False)
    assert not any(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert (int(optimizer.skipped), int(optimizer.skipped_in_row)) == (2, 0)


def test_bias_moves_towards_the_mean_load() -> None:
    model = nn.ModuleList()
    for _ in range(2):
        block = nn.Module()
        block.moe = nn.Module()
        block.moe.gate = nn.Module()
        block.moe.gate.register_buffer("bias", torch.zeros(4))
        model.append(block)
    bias = ExpertBias(model)
    load = torch.tensor([[4, 4, 4, 4], [9, 4, 3, 0]], dtype=torch.int32)
    bias.update(load, 0.5, torch.tensor(False))
    assert model[0].moe.gate.bias.tolist() == [0, 0, 0, 0]
    assert model[1].moe.gate.bias.tolist() == [-0.5, 0, 0.5, 0.5]
    assert "1.moe.gate.bias" in model.state_dict()


def test_ema_is_the_average_of_the_master_weights() -> None:
    model = Toy()
    buffers = ParamBuffers(model)
    ema = Ema(buffers, 0.75)
    name, value = "first.weight", model.first.weight
    expected = value.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            value.add_(1.0)
        expected = 0.75 * expected + 0.25 * value.detach()
        ema.snapshot(torch.tensor(False))
        torch.testing.assert_close(ema.views()[name], expected)

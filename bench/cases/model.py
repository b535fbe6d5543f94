"""Whole training steps: `mini` in bf16 with fp32 master weights, beside transformers and our own references; `mini` and `2b`
with FP8 linear layers, beside bf16; the linear work of one expert layer of V3; and generation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Timing
from bench.expert_layer import expert_layer
from bench.generation import generation
from bench.timing import release
from dsv3.config import Config
from dsv3.model import DeepSeekV3
from dsv3.testing import reference_ops
from dsv3.train.balance import ExpertBias
from dsv3.train.buffers import ParamBuffers
from dsv3.train.config import TrainConfig
from dsv3.train.gradients import Gradients, why_no_graphs
from dsv3.train.optimizer import AdamW

# The published recipe, from its first step: the defaults of `dsv3 train`, in the published run.
RECIPE = TrainConfig(max_tokens=14_800_000_000_000)
SPAN = 5  # steps, the most that are timed at a time
LOSS_TOLERANCE = 5e-3  # of every step's loss
WINDOW = 20  # steps: the means over so many show whether runs part or single steps scatter


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model, a batch of `rows` sequences of `length` tokens, and the number of batches, of which a timed span takes at most
    SPAN and a run that compares losses all."""

    preset: str
    rows: int
    length: int
    steps: int

    def config(self, mtp: bool) -> Config:
        base = Config.preset(self.preset)
        return dataclasses.replace(base, num_nextn_predict_layers=base.num_nextn_predict_layers if mtp else 0)

    def dtype(self, device: torch.device) -> torch.dtype:
        return torch.bfloat16 if device.type == "cuda" else torch.float32


class Training:
    """Our training step, as dsv3.train.Trainer takes it: losses and backward of the recipe's micro-batches, clip, update,
    expert biases; no host sync. Settings and schedules are those of `recipe` from its first step, weights those of `seed`."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        *,
        precision: str = "bf16",
        recipe: TrainConfig = RECIPE,
        seed: int = 0,
    ) -> None:
        self.recipe = recipe
        self.model = DeepSeekV3(config, device=device, dtype=dtype, precision=precision).init_weights(seed=seed)
        self.buffers = ParamBuffers(self.model)
        graphs = why_no_graphs(device, dtype) is None
        self.gradients = Gradients(self.model, balance_alpha=recipe.balance_alpha, cuda_graphs=graphs)
        settings = {"eps": recipe.eps, "weight_decay": recipe.weight_decay, "clip": recipe.clip}
        self.optimizer = AdamW(self.buffers, betas=(recipe.beta1, recipe.beta2), **settings)
        self.bias = ExpertBias(self.model)
        self.steps = self.tokens = 0

    def step(self, tokens: Tensor) -> Tensor:
        """One step on int64 [rows, length + 1]; returns the cross-entropy, nats a token, fp64 []."""
        recipe = self.recipe
        progress = recipe.progress(step=self.steps, tokens=self.tokens, seconds=0.0)
        lr = recipe.learning_rate.at(progress=progress, step=self.steps, tokens=self.tokens)
        mtp_weight = recipe.mtp_schedule.at(progress)
        losses, load = self.gradients.add(tokens, recipe.micro_batch, size=len(tokens), mtp_weight=mtp_weight)
        result = self.optimizer.step(lr, losses[0])
        self.model.refresh_fp8()
        self.bias.update(load, recipe.gamma_schedule.at(progress), result.skip)
        self.steps += 1
        self.tokens += tokens.numel() - len(tokens)
        return losses[1]


def transformers_step(config: Config, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The same model in transformers: parameters in `dtype`, torch's fused AdamW, the attention it chooses itself."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(DeepseekV3Config(**config.to_dict()), dtype=dtype)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), RECIPE.lr, (RECIPE.beta1, RECIPE.beta2), weight_decay=RECIPE.weight_decay, fused=True
    )

    def step(tokens: Tensor) -> Tensor:
        inputs = tokens[:, :-1].contiguous()
        loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _clock(device: torch.device) -> float:
    """Seconds, after everything issued has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def step_us(step: Callable[[Tensor], Tensor], batches: list[Tensor], device: torch.device) -> float:
    """Microseconds a step: the median of three spans over all batches, after one to warm up, waiting only at their ends."""
    spans = []
    for _ in range(4):
        start = _clock(device)
        for tokens in batches:
            step(tokens)
        spans.append((_clock(device) - start) / len(batches) * 1e6)
    return statistics.median(spans[1:])


def random_batches(setup: Setup, config: Config, quick: bool, device: torch.device) -> list[Tensor]:
    """A span of uniformly random tokens: work does not depend on what they say."""
    shape, count = (setup.rows, setup.length + 1), 1 if quick else min(setup.steps, SPAN)
    return [torch.randint(config.vocab_size, shape, device=device) for _ in range(count)]


def text_batches(setup: Setup, device: torch.device) -> list[Tensor]:
    """Real text for a run that learns: bytes of the standard library's source as tokens."""
    size = setup.rows * (setup.length + 1)
    text = bytearray()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += file.read_bytes()
    tokens = torch.frombuffer(text, dtype=torch.uint8).long()
    count = min(setup.steps, len(tokens) // size)
    order = torch.arange(setup.steps) % count
    return [tokens[i * size : (i + 1) * size].view(setup.rows, -1).to(device) for i in order.tolist()]


def measure_step(setup: Setup, mtp: bool, device: torch.device, quick: bool) -> Timing:
    """Our step with or without MTP, beside transformers' (which has no MTP in training)."""
    config, dtype = setup.config(mtp), setup.dtype(device)
    batches = random_batches(setup, config, quick, device)
    ours = step_us(Training(config, device, dtype).step, batches, device)
    theirs = step_us(transformers_step(config, device, dtype), batches, device)
    return Timing(ours, {"transformers": theirs})


def measure_fp8(setup: Setup, device: torch.device, quick: bool) -> Timing:
    """Our step without MTP in FP8, beside bf16, both in the same micro-batches, the largest that both have memory for.

    Facts: `micro_batch`, sequences; tokens a second; and, on a GPU, the most memory that each has held, GB.
    """
    micro = setup.rows
    while micro > 1:
        with contextlib.suppress(torch.OutOfMemoryError):
            return _fp8_beside_bf16(setup, micro, device, quick)
        micro //= 2
    return _fp8_beside_bf16(setup, micro, device, quick)


def _fp8_beside_bf16(setup: Setup, micro: int, device: torch.device, quick: bool) -> Timing:
    config, recipe = setup.config(False), dataclasses.replace(RECIPE, batch=setup.rows, micro_batch=micro)
    batches = random_batches(setup, config, quick, device)
    times, facts = {}, {"micro_batch": micro}
    for precision in ("bf16", "fp8"):
        release()  # the model before this one
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        training = Training(config, device, setup.dtype(device), precision=precision, recipe=recipe)
        times[precision] = step_us(training.step, batches, device)
        del training
        facts[f"tokens_per_s_{precision}"] = round(setup.rows * setup.length / times[precision] * 1e6)
        if device.type == "cuda":
            facts[f"peak_gb_{precision}"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    return Timing(times["fp8"], {"dsv3 bf16": times["bf16"]}, facts)


def measure_agreement(setup: Setup, device: torch.device, quick: bool) -> Timing:
    """The same run, from the same weights on the same text, on the native ops and on the references.

    Every step's loss must agree. The clock starts after the first two steps, which are slow: kernels load, a graph is captured.
    """
    losses, times = [], []
    batches = text_batches(dataclasses.replace(setup, steps=3) if quick else setup, device)
    for context in (contextlib.nullcontext(), reference_ops()):
        with context:
            training = Training(setup.config(False), device, setup.dtype(device))
            run = [training.step(tokens) for tokens in batches[:2]]
            start = _clock(device)
            run += [training.step(tokens) for tokens in batches[2:]]
            times.append((_clock(device) - start) / (len(batches) - 2) * 1e6)
            losses.append(torch.stack(run).double())
    facts = differences(*losses)
    worst = facts["max_loss_difference"]
    errors = [] if worst <= LOSS_TOLERANCE else [f"losses differ by {worst:.2%} from those of the references"]
    return Timing(times[0], {"dsv3 references": times[1]}, facts, errors)


def window_means(losses: Tensor, window: int) -> Tensor:
    """Means over each `window` steps, the last dimension; what is left over at the end is left out."""
    return losses[..., : losses.shape[-1] // window * window].unflatten(-1, (-1, window)).mean(-1)


def differences(native: Tensor, plain: Tensor) -> dict[str, float]:
    """How far two runs' losses [steps] are apart, relative to the second: step by step, and as means over WINDOW steps."""
    window = min(WINDOW, len(plain))
    means = [window_means(losses, window) for losses in (native, plain)]
    return {
        "last_loss": round(float(native[-1]), 4),
        "max_loss_difference": _largest(native, plain),
        "max_window_difference": _largest(*means),
    }


def _largest(ours: Tensor, theirs: Tensor) -> float:
    return round(float(((ours - theirs).abs() / theirs).max()), 6)


def step_flops(setup: Setup, config: Config) -> float:
    """6 a token and active weight of a matrix product; causal attention: 2 (forward) + 5 (backward) half products."""
    tokens, layers = setup.rows * setup.length, config.num_blocks
    active = config.num_params(active=True) - config.vocab_size * config.hidden_size
    block = (active - config.vocab_size * config.hidden_size) / config.num_hidden_layers
    mtp = config.num_nextn_predict_layers * (block + 2 * config.hidden_size**2 + config.vocab_size * config.hidden_size)
    width = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 6.0 * tokens * (active + mtp) + 3.5 * layers * tokens * setup.length * width


def step_bytes(config: Config) -> float:
    """What the update must move, activations aside: gradient, master weight and moments read, all but the first written,
    bf16 weights written and read twice. MTP's own parameters are not counted."""
    return 26.0 * config.num_params()


def cases(tiny: bool) -> list[Case]:
    """`mini` at 8 x 2048 tokens a step, its losses over 200 steps; `2b` at 8 x 4096; an expert layer of V3."""
    mini = Setup("tiny", 2, 32, 3) if tiny else Setup("mini", 8, 2048, 200)
    large = Setup("tiny", 4, 32, 3) if tiny else Setup("2b", 8, 4096, 3)

    def case(
        op: str, measure: Callable[..., Timing], setup: Setup, mtp: bool, *, fp8: bool = False, **more: Any
    ) -> Case:
        config = setup.config(mtp)
        return Case(
            op=op,
            case={"model": setup.preset, "rows": setup.rows, "length": setup.length, "mtp": mtp, **more},
            flops=step_flops(setup, config),
            bytes=step_bytes(config),
            fp8=fp8,
            measure=functools.partial(measure, setup),
        )

    def step(setup: Setup, *rest: Any, mtp: bool) -> Timing:
        return measure_step(setup, mtp, *rest)

    return [
        *(case("train_step", functools.partial(step, mtp=mtp), mini, mtp) for mtp in (False, True)),
        *(case("train_step", measure_fp8, setup, False, fp8=True, precision="fp8") for setup in (mini, large)),
        case("train_losses", measure_agreement, mini, False, steps=mini.steps, warmup_steps=RECIPE.warmup_steps),
        expert_layer(tiny),
        *generation(tiny),
    ]

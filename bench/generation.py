"""`dsv3.generate` as a whole, greedy, beside transformers in the same process: prompts of 512 random tokens, then 256 new
tokens for each, in bf16, with weights as they are initialised.

A row's time is that of the whole call, prompts included, over the new tokens of a sequence. `step_us` is a decoding round
alone, as its floor is: the weights that a step touches (of the routed experts those that are expected to be chosen if every
token chooses at random) and the cached rows, read once. A round of `speculative` drafts with MTP and verifies; random weights
accept next to nothing, so its rows show the cost of a round and not what drafts gain.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Timing
from bench.timing import release
from dsv3.config import Config
from dsv3.inference import Engine, SamplingParams
from dsv3.model import DeepSeekV3


@dataclasses.dataclass(frozen=True)
class Setup:
    """A preset, sequences, tokens of each prompt, and new tokens for each; with `fp8` weights and products in FP8."""

    preset: str
    batch: int
    prompt: int
    new: int
    fp8: bool = False

    @property
    def config(self) -> Config:
        return Config.preset(self.preset)


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median; a call ends when its tokens are on the host."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _ours(setup: Setup, prompts: Tensor, speculative: bool, repeats: int) -> tuple[float, dict[str, float]]:
    """Seconds of a call, and what the engine says of its rounds and drafts."""
    on_gpu = prompts.is_cuda
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = DeepSeekV3(setup.config, device=prompts.device, dtype=dtype).init_weights(seed=0)
    if setup.fp8:
        model.quantize_().set_precision("fp8")
    context = setup.prompt + setup.new
    engine = Engine(model, speculative=speculative, max_batch=setup.batch, max_context=context)
    params = SamplingParams(max_tokens=setup.new, temperature=0, ignore_eos=True)
    lists = prompts.tolist()
    engine.generate(lists, params)  # captures the graphs
    before = dataclasses.replace(engine.stats)
    seconds = _seconds(lambda: engine.generate(lists, params), repeats)
    stats = engine.stats
    steps, decoding = stats.steps - before.steps, stats.decode_seconds - before.decode_seconds
    facts = {"step_us": round(decoding / steps * 1e6, 1), "tokens_per_s": round(setup.batch * setup.new / seconds)}
    if speculative:
        facts["acceptance"] = round(stats.acceptance_rate, 3)
    return seconds, facts


def _transformers(setup: Setup, prompts: Tensor, repeats: int) -> float:
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    dtype = torch.bfloat16 if prompts.is_cuda else torch.float32
    with torch.device(prompts.device):
        model = AutoModelForCausalLM.from_config(DeepseekV3Config(**setup.config.to_dict()), dtype=dtype).eval()
    options = {"do_sample": False, "attention_mask": torch.ones_like(prompts), "pad_token_id": 0, "eos_token_id": None}

    def call(new: int) -> None:
        model.generate(prompts, max_new_tokens=new, min_new_tokens=new, **options).cpu()

    call(2)
    return _seconds(lambda: call(setup.new), repeats)


def _measure(setup: Setup, speculative: bool, device: torch.device, quick: bool) -> Timing:
    generator = torch.Generator().manual_seed(0)
    shape = setup.batch, setup.prompt
    prompts = torch.randint(setup.config.vocab_size, shape, generator=generator).to(device)
    repeats = 1 if quick else 3
    seconds, facts = _ours(setup, prompts, speculative, repeats)
    release()
    if speculative:
        other = {"dsv3 without drafts": _ours(setup, prompts, False, repeats)[0]}
    elif setup.fp8:
        other = {"dsv3 in bf16": _ours(dataclasses.replace(setup, fp8=False), prompts, False, repeats)[0]}
    else:
        other = {"transformers": _transformers(setup, prompts, 1)}
    release()
    return Timing(seconds / setup.new * 1e6, {name: s / setup.new * 1e6 for name, s in other.items()}, facts)


def step_weights(config: Config, tokens: int) -> float:
    """Weights that a step of so many tokens reads: each of its matrices once, of the routed experts those that are expected
    to be chosen at least once by tokens that choose evenly; of the embedding nothing that counts."""
    experts, topk = config.n_routed_experts, config.num_experts_per_tok
    layers = sum(config.is_moe(n) for n in range(config.num_hidden_layers))
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    chosen = experts * (1 - (1 - topk / experts) ** tokens) if experts else 0
    others = config.num_params() - config.vocab_size * config.hidden_size - layers * experts * expert
    return others + layers * chosen * expert


def _fp8_weights(config: Config, touched: float) -> float:
    """Those of the weights that a step touches which quantize_ makes FP8: not the head, nor the gates, nor kv_b, which decoding
    keeps in bf16 too."""
    layers = config.num_hidden_layers
    gates = sum(config.is_moe(n) for n in range(layers)) * config.n_routed_experts * config.hidden_size
    kv_b = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank
    return touched - config.vocab_size * config.hidden_size - gates - layers * kv_b


def _case(setup: Setup, speculative: bool) -> Case:
    config = setup.config
    cached = setup.batch * (setup.prompt + setup.new / 2) * config.num_hidden_layers * config.latent_dim
    shape = {"model": setup.preset, "batch": setup.batch, "prompt": setup.prompt, "new": setup.new}
    shape |= {"speculative": speculative} | ({"weights": "fp8"} if setup.fp8 else {})
    halved = _fp8_weights(config, step_weights(config, setup.batch)) if setup.fp8 else 0.0
    return Case(
        op="generate",
        case=shape,
        flops=2.0 * setup.batch * (config.num_params(active=True) - config.vocab_size * config.hidden_size),
        bytes=2 * (step_weights(config, setup.batch) + cached) - halved,
        measure=functools.partial(_measure, setup, speculative),
    )


def generation(tiny: bool) -> list[Case]:
    """One sequence and 32 of them, without and with drafts, and with weights in FP8."""
    setups = [Setup("tiny", b, 8, 4) if tiny else Setup("mini", b, 512, 256) for b in (1, 32)]
    if tiny:
        setups[1] = dataclasses.replace(setups[1], batch=3)
    fp8 = [_case(dataclasses.replace(setup, fp8=True), False) for setup in setups]
    return [*(_case(setup, speculative) for setup in setups for speculative in (False, True)), *fp8]

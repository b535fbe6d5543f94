"""The whole model: tokens -> embedding -> blocks -> norm -> head -> loss, and the MTP modules beside the head."""

from __future__ import annotations

import logging
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsv3 import ops
from dsv3.config import Config
from dsv3.model import few
from dsv3.model.attention import MLA, AttentionContext
from dsv3.model.block import Block, BlockStats
from dsv3.model.layers import Linear, RMSNorm
from dsv3.model.moe import Experts, balance_loss
from dsv3.model.mtp import MTP
from dsv3.reference.groups import group_of

log = logging.getLogger("dsv3")

IGNORED = -100
RECOMPUTE = frozenset({"norm", "mla_up"})
PRECISIONS = ("bf16", "fp8")


@dataclass(frozen=True)
class Batch:
    """B rows of text. Position i of the S inputs predicts token i + 1."""

    tokens: Tensor  # int64 [B, S+1]
    targets_mask: Tensor | None = None  # bool [B, S]: False drops the prediction of token i + 1 from every loss
    cu_seqlens: Tensor | None = None  # int [n+1] over the B*S flattened inputs: samples that must not see each other,
    # none longer than S; positions behind the last end are in none, for the balance loss too. None: every row is a sequence.


@dataclass(frozen=True)
class Loss:
    """Tensors on the device; nothing has been synchronised."""

    total: Tensor  # fp32 []: ce + mtp_weight * mtp + balance_alpha * (balance of every MoE layer); call backward on it
    ce: Tensor  # fp32 []: mean nats a token
    mtp: Tensor  # fp32 []: mean over the depths of mean nats a token; 0 without MTP
    balance: Tensor  # fp32 []: with its factor alpha
    num_tokens: Tensor  # int64 []: targets counted in ce
    expert_load: Tensor  # int32 [MoE layers with MTP's last, E]


def is_expert_param(name: str) -> bool:
    """Whether a parameter is split by expert (routed experts' weights), and so reduced over other ranks than the rest."""
    return ".experts." in name


def check_precision(precision: str) -> None:
    """Raises ValueError for one that there is not."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


class DeepSeekV3(nn.Module):
    """DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437). Activations are packed [T, H]; see AttentionContext.

    A new model's weights are whatever memory holds: `init_weights` draws them, `from_pretrained` reads them.

    Args:
        config: the architecture.
        device: where parameters are made; "meta" makes none.
        dtype: of the parameters; config.dtype if None. The gate's bias is always fp32.
        recompute: see set_recompute.
        precision: see set_precision.
    """

    def __init__(
        self,
        config: Config,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recompute: frozenset[str] = frozenset(),
        precision: str = "bf16",
    ) -> None:
        super().__init__()
        at: dict[str, Any] = {"device": device, "dtype": dtype or getattr(torch, config.dtype)}
        self.config = config
        self.generation_config: dict[str, Any] | None = (
            None  # of the folder that a loader read, for generation and saving
        )
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, **at)
        self.layers = nn.ModuleList(Block(config, n, **at) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **at)
        self.head = Linear(config.hidden_size, config.vocab_size, **at)
        self.mtp = nn.ModuleList(MTP(config, k, self.embed, **at) for k in range(config.num_nextn_predict_layers))
        self.set_recompute(recompute)
        self.set_precision(precision)

    def set_recompute(self, what: frozenset[str]) -> None:
        """What backward computes again instead of keeping: "norm" (RMSNorm outputs), "mla_up" (queries, keys, values)."""
        if not what <= RECOMPUTE:
            raise ValueError(f"recompute must be a subset of {sorted(RECOMPUTE)}, got {sorted(what)}")
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.recompute = "norm" in what
            elif isinstance(module, MLA):
                module.recompute = "mla_up" in what

    def set_precision(self, precision: str, *, parameters: bool = True) -> None:
        """How the linear layers of attention, dense MLPs, shared and routed experts multiply, in training and out of it.

        "bf16": in the dtype of their weights, and weights that were loaded in FP8 (ops.Quantized) dequantised. "fp8": forward
        and both gradients in block-scaled FP8, with copies of the weights that stay good until they change; call refresh_fp8
        then; Quantized weights as they are, without gradients. Where decoding steps have at most ops.FEW_TOKENS tokens
        (dsv3.Engine, max_batch), activations are not cast: what is in FP8 then, and in either precision what is Quantized, is
        multiplied with them as they are. Embedding, head, gates, norms, attention itself and MTP's eh_proj are the same in
        both, and so are parameters, activations and the state dict. Without `parameters` only layers with Quantized weights
        are in FP8.
        """
        check_precision(precision)
        fp8, layers = precision == "fp8", self._layers_of_blocks(Linear, Experts)
        for layer in layers:
            layer.fp8 = fp8 and (parameters or any(isinstance(value, ops.Quantized) for value in vars(layer).values()))
        for norm in self._layers_of_blocks(RMSNorm):
            norm.cast = fp8
        unfit = sum(layer.fp8 and not layer.in_fp8 for layer in layers)
        if unfit:
            why = "their sizes are no multiples of 16, or one of a pair is FP8 already"
            log.warning("%d of %d linear layers and experts do not multiply in FP8: %s", unfit, len(layers), why)

    def _layers_of_blocks(self, *kinds: type[nn.Module]) -> list[Any]:
        modules = [module for block in self.modules() if isinstance(block, Block) for module in block.modules()]
        return [module for module in modules if isinstance(module, kinds)]

    @torch.no_grad()
    def quantize_(self) -> DeepSeekV3:
        """Puts FP8 (ops.Quantized, blocks of 128 x 128) in the place of the weights that set_precision is about, where they can
        be multiplied so, for inference in half the memory; they are parameters no more. With precision "fp8" the forward does
        not change a bit, since the same codes stood for the weights before; decoding does, whose absorbed form takes kv_b as
        it is, and then dequantised. Returns the model."""
        for layer in self._layers_of_blocks(Linear, Experts):
            for name, param in list(layer.named_parameters(recurse=False)):
                if layer.fp8_copies.takes(param):
                    made = ops.Quantized(*ops.per_block_cast(param.detach()))
                    delattr(layer, name)
                    setattr(layer, name, made)
            layer.fp8_copies = ops.Fp8Weights()
        return self

    def refresh_fp8(self) -> None:
        """Casts the weights again, after they have changed, in place: every optimizer step, and also in bf16 where FP8 comes
        back later. What torch itself has changed is noticed without it (see ops.Fp8Weights). Nothing before FP8's first use."""
        for module in self.modules():
            if isinstance(module, Linear | Experts):
                module.fp8_copies.refresh()

    @staticmethod
    def from_pretrained(path: str | Path, **options: Any) -> DeepSeekV3:
        """See dsv3.weights.load_pretrained."""
        from dsv3.weights import load_pretrained

        return load_pretrained(path, **options)

    def save_pretrained(self, path: str | Path, **options: Any) -> None:
        """See dsv3.weights.save_pretrained."""
        from dsv3.weights import save_pretrained

        save_pretrained(self, path, **options)

    @torch.no_grad()
    def init_weights(self, seed: int = 0, *, first_expert: int = 0) -> DeepSeekV3:
        """Normal weights of std config.initializer_range, unit norms, zero gate biases.

        Every matrix, and every expert, has a generator of its own, seeded with its name: values do not depend on what else
        this process holds. first_expert: the number of the first expert held here, where others are held elsewhere.
        """
        for name, param in self.named_parameters():
            if param.dim() == 1:
                param.fill_(1.0)
                continue
            parts, first = (param.unbind(0), first_expert) if param.dim() == 3 else ([param], 0)
            for index, part in enumerate(parts, start=first):
                generator = torch.Generator(part.device).manual_seed(zlib.crc32(f"{seed}/{name}/{index}".encode()))
                part.normal_(0.0, self.config.initializer_range, generator=generator)
        for name, buffer in self.named_buffers():
            if name.endswith("gate.bias"):
                buffer.zero_()
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, S] -> logits [B, S, V] of the next token. ValueError for others; on a CPU also for tokens outside
        the vocabulary."""
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
            raise ValueError(f"tokens must be int64 (B, S), got {tokens.dtype} {tuple(tokens.shape)}")
        if tokens.is_cpu and not torch.compiler.is_compiling():
            least, most = map(int, tokens.aminmax())
            if least < 0 or most >= self.config.vocab_size:
                raise ValueError(f"tokens must lie in 0..{self.config.vocab_size - 1}, got {least}..{most}")
        batch, length = tokens.shape
        self._check_length(length)
        h, _ = self.hidden(tokens.flatten(), AttentionContext.batch(batch, length, tokens.device))
        return self.logits(h).view(batch, length, -1)

    def hidden(
        self,
        tokens: Tensor,
        ctx: AttentionContext,
        cache: list[Tensor] | None = None,
        wgrad: ops.WgradQueue | None = None,
    ) -> tuple[Tensor, list[BlockStats]]:
        """tokens int64 [T] -> (h [T, H] after the final norm, the statistics of the MoE blocks in order, none of which a
        decoding step of few tokens may give).

        `cache`: one [pages, page, 1, kv_lora_rank + rope] a layer, or the FP8 form of mla_append_kv, main layers then MTP's;
        written through ctx.slot_mapping.
        """
        x, stats = self.embed(tokens), []
        blocks = None if cache is None else few.prepare(self.layers, ctx, len(x))
        if blocks is not None:
            return few.run(blocks, self.norm, x, ctx, cache[: len(self.layers)]), stats
        for index, layer in enumerate(self.layers):
            x, block_stats = layer(x, ctx, None if cache is None else cache[index], wgrad)
            if block_stats is not None:
                stats.append(block_stats)
        return self.norm(x), stats

    def logits(self, h: Tensor) -> Tensor:
        """h [T, H] after a norm (the final one, or an MTP depth's) -> [T, V]."""
        if len(h) <= ops.FEW_TOKENS and not torch.is_grad_enabled():
            return few.linear(self.head, h)
        return self.head(h)

    def loss(
        self, batch: Batch, *, mtp_weight: float = 0.3, balance_alpha: float = 1e-4, wgrad: ops.WgradQueue | None = None
    ) -> Loss:
        """Cross-entropy, MTP and balance losses of a batch (V3 report, equations 17 to 25), without a host sync.

        With mtp_weight 0 the MTP modules do not run: their loss and their rows of expert_load are 0.
        """
        rows, length = batch.tokens.shape[0], batch.tokens.shape[1] - 1
        ctx, segment = self._context(batch, rows, length)
        ctx = replace(ctx, balanced=bool(balance_alpha))
        tokens = batch.tokens[:, :-1].reshape(-1)
        h, stats = self.hidden(tokens, ctx, wgrad=wgrad)
        ce, num_tokens = self._cross_entropy(h, _targets(batch, segment, 0))
        depths = []
        for k, mtp in enumerate(self.mtp if mtp_weight else (), start=1):
            h, block_stats = mtp(h, _shift(batch.tokens, k, 0), ctx, wgrad=wgrad)
            depths.append(self._cross_entropy(h, _targets(batch, segment, k))[0])
            if block_stats is not None:
                stats.append(block_stats)
        zero = torch.zeros_like(ce)
        mtp_loss = torch.stack(depths).mean() if depths else zero
        balance = self._balance(stats, ctx).to(ce.dtype) * balance_alpha if stats and balance_alpha else zero
        total = ce + mtp_weight * mtp_loss + balance
        experts = self.config.n_routed_experts
        idle = 0 if mtp_weight or not experts else len(self.mtp)
        load = tokens.new_zeros(idle, experts, dtype=torch.int32)
        if stats:
            load = torch.cat([torch.stack([s.counts for s in stats]), load])
        return Loss(total, ce.detach(), mtp_loss.detach(), balance.detach(), num_tokens, load)

    def _check_length(self, length: int) -> None:
        longest = self.config.max_position_embeddings
        if length > longest:
            raise ValueError(f"expected sequences of at most max_position_embeddings {longest} tokens, got {length}")

    def _context(self, batch: Batch, rows: int, length: int) -> tuple[AttentionContext, Tensor | None]:
        self._check_length(length)
        if batch.cu_seqlens is None:
            return AttentionContext.batch(rows, length, batch.tokens.device), None
        segment = group_of(batch.cu_seqlens, rows * length)
        return AttentionContext.segments(batch.cu_seqlens, rows * length, length), segment

    def _cross_entropy(self, h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(mean nats, number of targets); 0 without any target."""
        count = (targets != IGNORED).sum()
        return ops.linear_cross_entropy(h, self.head.weight, targets) / count.clamp(min=1), count

    def _balance(self, stats: list[BlockStats], ctx: AttentionContext) -> Tensor:
        chosen, affinity = (torch.stack([getattr(s, name) for s in stats]) for name in ("chosen", "affinity"))
        return balance_loss(chosen, affinity, ctx.cu_seqlens_q, topk=self.config.num_experts_per_tok)


def _shift(tokens: Tensor, k: int, fill: int) -> Tensor:
    """int64 [B*S]: token i + k of the row at input i of tokens [B, S+1], `fill` where there is none."""
    length = tokens.shape[1] - 1
    if k <= 1:
        return tokens[:, k : k + length].reshape(-1)
    return nn.functional.pad(tokens[:, k:], (0, k - 1), value=fill)[:, :length].reshape(-1)


def _targets(batch: Batch, segment: Tensor | None, depth: int) -> Tensor:
    """int64 [B*S]: what depth 0 (the main head) or an MTP depth predicts at each input, IGNORED where nothing.

    Depth k predicts token i + 1 + k from input i, as the main head does from input i + k: where that is masked, or belongs
    to another sample, depth k has no target either.
    """
    rows, length = batch.tokens.shape[0], batch.tokens.shape[1] - 1
    targets = batch.tokens[:, 1:]
    if batch.targets_mask is not None:
        targets = targets.masked_fill(~batch.targets_mask, IGNORED)
    if segment is not None:
        ids = segment.view(rows, length)
        ends = torch.zeros_like(ids, dtype=torch.bool)
        ends[:, :-1] = ids[:, 1:] != ids[:, :-1]
        targets = targets.masked_fill(ends, IGNORED)
    if depth := min(depth, length):
        targets = nn.functional.pad(targets[:, depth:], (0, depth), value=IGNORED)
        if segment is not None:
            later = nn.functional.pad(ids[:, depth:], (0, depth), value=-1)
            targets = targets.masked_fill(later != ids, IGNORED)
    return targets.reshape(-1)

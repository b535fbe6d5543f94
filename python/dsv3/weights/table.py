"""The one table between our tensors and those of a Hugging Face checkpoint (the names of the official DeepSeek-V3 one).

A row says how one tensor of ours is made of tensors of the files; `plan` turns the rows that a rank holds into
rectangles to read. Ours fuse (gate and up projection, all experts of a layer), files never do. FP8 files have
`<key>_scale_inv` fp32 [ceil(N/128), ceil(K/128)] beside the keys of quantizable rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dsv3.config import Config

SCALE_SUFFIX = "_scale_inv"
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
GATE_BIAS = "mlp.gate.e_score_correction_bias"


@dataclass(frozen=True)
class Local:
    """The part of a model that one rank holds: half-open global ranges, None for everything.

    Layers count on through the MTP modules (depth k is layer num_hidden_layers + k). The embedding goes with layer 0,
    norm and head with the last main layer; MTP needs embedding and head too.
    """

    layers: range | None = None
    experts: range | None = None
    heads: range | None = None


@dataclass(frozen=True)
class Row:
    """`name` is ours; its rows are the rows of `keys` one after the other, each of `shape` in the files.

    `split` says what a rank may hold a part of: "experts" (`keys` then have a `{}` for the expert, and ours a first
    dimension for it), "head_rows" or "head_cols" (equally many for each head).
    """

    name: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    split: str | None = None
    quantizable: bool = False

    def moved(self, name_prefix: str, key_prefix: str) -> Row:
        return replace(self, name=name_prefix + self.name, keys=tuple(key_prefix + key for key in self.keys))


@dataclass(frozen=True)
class Piece:
    """The rectangle `rows` x `cols` (None for a vector) of the file tensor `key`, which is `shape` as a whole; it
    belongs at index `at` of our tensor."""

    key: str
    shape: tuple[int, ...]
    rows: range
    cols: range | None
    at: tuple[int | slice, ...]


@dataclass(frozen=True)
class Source:
    """What one (local) tensor of ours is made of, and its local shape."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    quantizable: bool


def _linear(name: str, *keys: str, shape: tuple[int, int], split: str | None = None) -> Row:
    return Row(name, tuple(f"{key}.weight" for key in keys), shape, split, quantizable=True)


def _swiglu_rows(name: str, key: str, hidden: int, intermediate: int, split: str | None = None) -> Iterator[Row]:
    suffix = "" if split == "experts" else ".weight"
    yield _linear(
        f"{name}.gate_up{suffix}", f"{key}.gate_proj", f"{key}.up_proj", shape=(intermediate, hidden), split=split
    )
    yield _linear(f"{name}.down{suffix}", f"{key}.down_proj", shape=(hidden, intermediate), split=split)


def _attention_rows(config: Config) -> Iterator[Row]:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    q_rows = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    kv_rows = heads * (config.qk_nope_head_dim + config.v_head_dim)
    if config.q_lora_rank:
        yield _linear("q_a.weight", "q_a_proj", shape=(config.q_lora_rank, hidden))
        yield Row("q_a_norm.weight", ("q_a_layernorm.weight",), (config.q_lora_rank,))
        yield _linear("q_b.weight", "q_b_proj", shape=(q_rows, config.q_lora_rank), split="head_rows")
    else:
        yield _linear("q.weight", "q_proj", shape=(q_rows, hidden), split="head_rows")
    yield _linear("kv_a.weight", "kv_a_proj_with_mqa", shape=(latent + config.qk_rope_head_dim, hidden))
    yield Row("kv_a_norm.weight", ("kv_a_layernorm.weight",), (latent,))
    yield _linear("kv_b.weight", "kv_b_proj", shape=(kv_rows, latent), split="head_rows")
    yield _linear("o.weight", "o_proj", shape=(hidden, heads * config.v_head_dim), split="head_cols")


def _block_rows(config: Config, layer: int) -> Iterator[Row]:
    """Rows of decoder layer `layer`, relative to its prefixes."""
    hidden = config.hidden_size
    yield Row("attn_norm.weight", ("input_layernorm.weight",), (hidden,))
    for row in _attention_rows(config):
        yield row.moved("attention.", "self_attn.")
    yield Row("mlp_norm.weight", ("post_attention_layernorm.weight",), (hidden,))
    if not config.is_moe(layer):
        yield from _swiglu_rows("mlp", "mlp", hidden, config.intermediate_size)
        return
    yield Row("moe.gate.weight", ("mlp.gate.weight",), (config.n_routed_experts, hidden))
    if config.has_gate_bias:
        yield Row("moe.gate.bias", (GATE_BIAS,), (config.n_routed_experts,))
    yield from _swiglu_rows("moe.experts", "mlp.experts.{}", hidden, config.moe_intermediate_size, split="experts")
    if config.n_shared_experts:
        yield from _swiglu_rows(
            "moe.shared", "mlp.shared_experts", hidden, config.n_shared_experts * config.moe_intermediate_size
        )


def _mtp_rows(config: Config, depth: int) -> Iterator[Row]:
    """Rows of MTP module `depth` relative to its prefixes; its copies of embedding and head are `mtp_copies`."""
    hidden = config.hidden_size
    yield Row("enorm.weight", ("enorm.weight",), (hidden,))
    yield Row("hnorm.weight", ("hnorm.weight",), (hidden,))
    yield Row("eh_proj.weight", ("eh_proj.weight",), (hidden, 2 * hidden))
    for row in _block_rows(config, config.num_hidden_layers + depth):
        yield row.moved("layer.", "")
    yield Row("norm.weight", ("shared_head.norm.weight",), (hidden,))


def _rows(config: Config, local: Local) -> Iterator[Row]:
    """Rows of everything that `local` holds a part of, in the order of the model."""
    count = config.num_hidden_layers
    held = set(range(count + config.num_nextn_predict_layers) if local.layers is None else local.layers)
    mtp = sorted(layer for layer in held if layer >= count)
    vocab = (config.vocab_size, config.hidden_size)
    if 0 in held or mtp:
        yield Row("embed.weight", (EMBED,), vocab)
    for layer in sorted(held - set(mtp)):
        for row in _block_rows(config, layer):
            yield row.moved(f"layers.{layer}.", f"model.layers.{layer}.")
    if count - 1 in held:
        yield Row("norm.weight", (NORM,), vocab[1:])
    if count - 1 in held or mtp:
        yield Row("head.weight", (HEAD,), vocab)
    for layer in mtp:
        for row in _mtp_rows(config, layer - count):
            yield row.moved(f"mtp.{layer - count}.", f"model.layers.{layer}.")


def _pieces(
    row: Row, *, rows: range, cols: range | None, expert: int | None = None, at: int | None = None
) -> Iterator[Piece]:
    prefix = () if at is None else (at,)
    for number, key in enumerate(row.keys):
        start = number * len(rows)
        yield Piece(
            key if expert is None else key.format(expert),
            row.shape,
            rows,
            cols,
            (*prefix, slice(start, start + len(rows))),
        )


def _source(row: Row, config: Config, local: Local) -> Source:
    rows, cols = range(row.shape[0]), range(row.shape[1]) if len(row.shape) == 2 else None
    if row.split == "experts":
        held = local.experts if local.experts is not None else range(config.n_routed_experts)
        found = [
            piece
            for at, expert in enumerate(held)
            for piece in _pieces(row, rows=rows, cols=cols, expert=expert, at=at)
        ]
        return Source((len(held), len(row.keys) * row.shape[0], row.shape[1]), tuple(found), row.quantizable)
    if row.split is not None and local.heads is not None:
        whole = rows if row.split == "head_rows" else cols
        size = len(whole) // config.num_attention_heads
        part = range(local.heads.start * size, local.heads.stop * size)
        rows, cols = (part, cols) if row.split == "head_rows" else (rows, part)
    shape = (len(row.keys) * len(rows),) + (() if cols is None else (len(cols),))
    return Source(shape, tuple(_pieces(row, rows=rows, cols=cols)), row.quantizable)


def plan(config: Config, local: Local = Local()) -> dict[str, Source]:
    """Our tensor names -> what to read for the part of each that `local` holds, in the order of the model.

    Raises ValueError for ranges outside the model.
    """
    layers = config.num_blocks
    limits = {"layers": layers, "experts": config.n_routed_experts, "heads": config.num_attention_heads}
    for what, limit in limits.items():
        held = getattr(local, what)
        if held is not None and not (held.step == 1 and 0 <= held.start <= held.stop <= limit):
            raise ValueError(f"local {what} must be a range within 0..{limit}, got {held}")
    return {row.name: _source(row, config, local) for row in _rows(config, local)}


def mtp_copies(config: Config) -> dict[str, str]:
    """Keys under which files repeat embedding and head for each MTP module -> the main keys, which are read instead."""
    prefixes = [f"model.layers.{config.num_hidden_layers + depth}." for depth in range(config.num_nextn_predict_layers)]
    return {
        prefix + copy: main
        for prefix in prefixes
        for copy, main in (("embed_tokens.weight", EMBED), ("shared_head.head.weight", HEAD))
    }

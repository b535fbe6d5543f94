"""Checkpoints in the Hugging Face layout: names, slices, dtypes, FP8, MTP; transformers as the outside oracle."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from dsv3 import Config, DeepSeekV3
from dsv3.ops.linear import Quantized
from dsv3.weights import Local, load_pretrained, plan, save_pretrained
from dsv3.weights.reader import Reader
from tests.checkpoints import FP8, assert_same, edit, file_tensors, random_model, small_config, state, write_fp8

configs = st.builds(
    small_config,
    num_hidden_layers=st.integers(1, 3),
    first_k_dense_replace=st.integers(0, 3),
    q_lora_rank=st.sampled_from([0, 24]),
    n_routed_experts=st.sampled_from([0, 4, 8]),
    n_group=st.sampled_from([1, 2]),
    topk_group=st.just(1),
    n_shared_experts=st.integers(0, 2),
    topk_method=st.sampled_from(["noaux_tc", "greedy"]),
    num_nextn_predict_layers=st.integers(0, 2),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(config=configs)
@quick
def test_the_table_covers_the_model(config: Config) -> None:
    sources = plan(config)
    expected = {name: tuple(tensor.shape) for name, tensor in DeepSeekV3(config, device="meta").state_dict().items()}
    assert {name: source.shape for name, source in sources.items()} == expected


@given(config=configs, seed=st.integers(0, 1000), max_shard_bytes=st.sampled_from([5_000_000_000, 20_000, 1]))
@quick
def test_round_trip_is_bit_exact(tmp_path: Path, config: Config, seed: int, max_shard_bytes: int) -> None:
    model = random_model(config, seed=seed)
    model.save_pretrained(tmp_path / "a", max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "a/model.safetensors").exists() == (max_shard_bytes == 5_000_000_000)
    loaded = DeepSeekV3.from_pretrained(tmp_path / "a")
    assert_same(state(loaded), state(model))
    assert loaded.config == model.config
    assert all(p.requires_grad for p in loaded.parameters())
    assert all(module.embed is loaded.embed for module in loaded.mtp)


def test_the_names_are_the_official_ones() -> None:
    pieces = {piece.key: piece for source in plan(Config.preset("671b")).values() for piece in source.pieces}
    shapes = {
        "model.embed_tokens.weight": (129280, 7168),
        "lm_head.weight": (129280, 7168),
        "model.norm.weight": (7168,),
        "model.layers.0.mlp.gate_proj.weight": (18432, 7168),
        "model.layers.2.mlp.down_proj.weight": (7168, 18432),
        "model.layers.3.mlp.gate.weight": (256, 7168),
        "model.layers.3.mlp.gate.e_score_correction_bias": (256,),
        "model.layers.60.mlp.experts.255.up_proj.weight": (2048, 7168),
        "model.layers.60.mlp.shared_experts.down_proj.weight": (7168, 2048),
        "model.layers.5.input_layernorm.weight": (7168,),
        "model.layers.5.post_attention_layernorm.weight": (7168,),
        "model.layers.5.self_attn.q_a_proj.weight": (1536, 7168),
        "model.layers.5.self_attn.q_a_layernorm.weight": (1536,),
        "model.layers.5.self_attn.q_b_proj.weight": (24576, 1536),
        "model.layers.5.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        "model.layers.5.self_attn.kv_a_layernorm.weight": (512,),
        "model.layers.5.self_attn.kv_b_proj.weight": (32768, 512),
        "model.layers.5.self_attn.o_proj.weight": (7168, 16384),
        "model.layers.61.enorm.weight": (7168,),
        "model.layers.61.hnorm.weight": (7168,),
        "model.layers.61.eh_proj.weight": (7168, 14336),
        "model.layers.61.shared_head.norm.weight": (7168,),
        "model.layers.61.mlp.experts.0.gate_proj.weight": (2048, 7168),
    }
    assert {key: pieces[key].shape for key in shapes} == shapes
    assert "model.layers.5.self_attn.q_proj.weight" in {
        piece.key for source in plan(Config.preset("16b")).values() for piece in source.pieces
    }


def test_parameters_that_are_views_of_one_buffer_are_saved(tmp_path: Path) -> None:
    model, same = random_model(small_config()), random_model(small_config())
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    model.save_pretrained(tmp_path / "a")
    same.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


# ---- local parts ----
class Counting(Reader):
    """A reader that remembers what it was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.keys: set[str] = set()
        self.bytes = 0

    def read(self, key: str, rows: range, cols: range | None) -> torch.Tensor:
        part = super().read(key, rows, cols)
        self.keys.add(key)
        self.bytes += part.nbytes
        return part


LOCALS = [
    Local(),
    Local(layers=range(1, 3)),
    Local(layers=range(2, 4), experts=range(4, 8)),
    Local(experts=range(2, 4), heads=range(1, 3)),
    Local(layers=range(0, 1), heads=range(3, 4)),
    Local(experts=range(5, 5)),
]


def local_part(config: Config, name: str, tensor: torch.Tensor, local: Local) -> torch.Tensor:
    """The part of a whole tensor of ours that a rank holds, sliced the obvious way."""
    heads, experts = local.heads, local.experts
    if experts is not None and ".experts." in name:
        return tensor[experts.start : experts.stop]
    if heads is not None and name.endswith(("q_b.weight", "q.weight", "kv_b.weight")):
        return tensor.unflatten(0, (config.num_attention_heads, -1))[heads.start : heads.stop].flatten(0, 1)
    if heads is not None and name.endswith("attention.o.weight"):
        return tensor.unflatten(1, (config.num_attention_heads, -1))[:, heads.start : heads.stop].flatten(1)
    return tensor


@pytest.mark.parametrize("q_lora_rank", [0, 24])
@pytest.mark.parametrize("local", LOCALS)
def test_a_rank_reads_only_its_part(tmp_path: Path, local: Local, q_lora_rank: int) -> None:
    model = random_model(small_config(q_lora_rank=q_lora_rank))
    model.save_pretrained(tmp_path / "a", max_shard_bytes=10_000)
    whole, reader = state(model), Counting(tmp_path / "a")
    sources = plan(model.config, local)
    for name, source in sources.items():
        found = reader.load(source, dtype=torch.float32, device="cpu")
        assert_same({name: found}, {name: local_part(model.config, name, whole[name], local)})
    # Not a byte more than the part has, and only files with something of it.
    expected = sum(local_part(model.config, name, whole[name], local).nbytes for name in sources)
    assert reader.bytes == expected
    assert reader._open.keys() == {reader.files[key] for key in reader.keys}


def test_layers_bring_their_ends() -> None:
    config = small_config()
    outer = {
        Local(layers=range(0, 2)): {"embed.weight"},
        Local(layers=range(1, 2)): set(),
        Local(layers=range(2, 3)): {"norm.weight", "head.weight"},
        Local(layers=range(3, 4)): {"embed.weight", "head.weight"},
        Local(): {"embed.weight", "norm.weight", "head.weight"},
    }
    for local, expected in outer.items():
        assert {name for name in plan(config, local) if name.count(".") == 1} == expected
    assert {n.split(".")[1] for n in plan(config, Local(layers=range(1, 2))) if n.startswith("layers")} == {"1"}


@pytest.mark.parametrize("local", [Local(layers=range(5)), Local(experts=range(9)), Local(heads=range(0, 4, 2))])
def test_ranges_outside_the_model_are_refused(local: Local) -> None:
    with pytest.raises(ValueError, match=r"local (layers|experts|heads) must be a range within 0\.\.\d, got range"):
        plan(small_config(), local)


def test_a_local_part_of_an_fp8_tensor_uses_the_scales_of_its_blocks(tmp_path: Path) -> None:
    write_fp8(tmp_path / "a")
    whole = load_pretrained(tmp_path / "a", dtype=torch.float32)
    reader = Counting(tmp_path / "a")
    for name, source in plan(whole.config, Local(heads=range(1, 3), experts=range(1, 3))).items():
        found = reader.load(source, dtype=torch.float32, device="cpu")
        expected = local_part(whole.config, name, state(whole)[name], Local(heads=range(1, 3), experts=range(1, 3)))
        assert_same({name: found}, {name: expected})


# ---- FP8 ----
def literal_dequantisation(tensors: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    weight, scales = tensors[key].float(), tensors[key + "_scale_inv"]
    wide = scales.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
    return weight * wide


def test_fp8_is_dequantised_by_blocks(tmp_path: Path) -> None:
    tensors = write_fp8(tmp_path / "a")
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 2)
    for dtype, expected_dtype in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        model = load_pretrained(tmp_path / "a", dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {expected_dtype}
        assert model.config.quantization_config is None
        model.save_pretrained(tmp_path / "b")
        written = file_tensors(tmp_path / "b")
        quantised = {key for key in tensors if key + "_scale_inv" in tensors}
        assert len(quantised) == 3 * 5 + 3 + 2 * (4 + 1) * 3
        expected = {key: literal_dequantisation(tensors, key).to(expected_dtype) for key in quantised}
        assert_same({key: written[key] for key in quantised}, expected)
        assert not any(key.endswith("_scale_inv") for key in written)


def test_dequantisation_agrees_with_transformers(tmp_path: Path) -> None:
    # Its dequantiser takes whole blocks only, so not kv_a, nor kv_b here.
    tensors = write_fp8(tmp_path / "a")
    found = state(load_pretrained(tmp_path / "a", dtype=torch.float32))["layers.0.mlp.gate_up.weight"]
    for projection, rows in (("gate", found[:256]), ("up", found[256:])):
        key = f"model.layers.0.mlp.{projection}_proj.weight"
        expected = Fp8Dequantize(None)._dequantize_one(tensors[key], tensors[key + "_scale_inv"], torch.float32)
        assert_same({key: rows}, {key: expected})


def test_fp8_stays_as_it_is_and_is_saved_as_it_was(tmp_path: Path) -> None:
    tensors = write_fp8(tmp_path / "a")
    model = load_pretrained(tmp_path / "a", dtype="fp8")
    kv_a = model.layers[1].attention.kv_a.weight
    experts = model.layers[1].moe.experts.gate_up
    assert isinstance(kv_a, Quantized)
    assert kv_a.sf.shape == (5, 2)
    assert isinstance(experts, Quantized)
    assert experts.data.shape == (4, 256, 256)
    assert experts.sf.shape == (4, 2, 2)
    assert model.embed.weight.dtype == model.mtp[0].eh_proj.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "b")
    assert_same(file_tensors(tmp_path / "b"), tensors)
    assert (tmp_path / "b/model.safetensors").read_bytes() == (tmp_path / "a/model.safetensors").read_bytes()
    written = json.loads((tmp_path / "b/config.json").read_text())
    assert written["quantization_config"] == model.config.quantization_config
    assert written["quantization_config"]["weight_block_size"] == [128, 128]
    assert written["quantization_config"]["scale_fmt"] == "ue8m0"
    assert written["torch_dtype"] == "bfloat16"
    assert_same(state(load_pretrained(tmp_path / "b", dtype="fp8")), state(model))


def test_an_fp8_model_computes_what_its_dequantised_twin_does(tmp_path: Path) -> None:
    write_fp8(tmp_path / "a")
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        model = load_pretrained(tmp_path / "a", dtype="fp8")
        expected = load_pretrained(tmp_path / "a")(tokens)
        in_fp8 = load_pretrained(tmp_path / "a", dtype="fp8", precision="fp8")
        assert torch.equal(model(tokens), expected)
        assert not torch.equal(in_fp8(tokens), expected)
        model.set_precision("fp8")
        assert torch.equal(model(tokens), in_fp8(tokens))
    with pytest.raises(ValueError, match="precision must be one of bf16, fp8, got 'fp4'"):
        load_pretrained(tmp_path / "a", precision="fp4")


def test_a_quantised_model_is_saved_dequantised_on_demand(tmp_path: Path) -> None:
    write_fp8(tmp_path / "a")
    load_pretrained(tmp_path / "a", dtype="fp8").save_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    load_pretrained(tmp_path / "a").save_pretrained(tmp_path / "c")
    assert_same(file_tensors(tmp_path / "b"), file_tensors(tmp_path / "c"))
    assert (tmp_path / "b/config.json").read_text() == (tmp_path / "c/config.json").read_text()


def test_saving_as_fp8_quantises_what_the_official_checkpoint_does(tmp_path: Path) -> None:
    model = random_model(FP8, dtype=torch.float32)
    model.save_pretrained(tmp_path / "a", dtype="fp8")
    tensors = file_tensors(tmp_path / "a")
    original = dict(write_fp8(tmp_path / "b"))
    assert {key: (t.shape, t.dtype) for key, t in tensors.items()} == {
        key: (t.shape, t.dtype) for key, t in original.items()
    }
    loaded = load_pretrained(tmp_path / "a", dtype=torch.float32)
    for name, expected in state(model).items():
        # e4m3 has 3 bits of mantissa: half a unit in the last place is 1/16.
        error = (state(loaded)[name] - expected).abs()
        assert (error <= expected.abs() / 16 + 1e-3).all(), name
    assert isinstance(load_pretrained(tmp_path / "a", dtype="fp8").layers[0].mlp.gate_up.weight, Quantized)


# ---- dtypes ----
def test_weights_are_converted_while_they_stream(tmp_path: Path) -> None:
    model = random_model(small_config())
    model.save_pretrained(tmp_path / "a")
    loaded = load_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    expected = {n: t if n.endswith("gate.bias") else t.bfloat16() for n, t in state(model).items()}
    assert_same(state(loaded), expected)
    assert loaded.config.dtype == "bfloat16"
    save_pretrained(model, tmp_path / "b", dtype=torch.bfloat16)
    assert_same(state(load_pretrained(tmp_path / "b")), expected)
    assert json.loads((tmp_path / "b/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_dtype_is_the_files_even_if_the_config_says_another(tmp_path: Path) -> None:
    random_model(small_config()).save_pretrained(tmp_path / "a")
    path = tmp_path / "a/config.json"
    path.write_text(path.read_text().replace('"torch_dtype": "float32"', '"torch_dtype": "bfloat16"'))
    loaded = load_pretrained(tmp_path / "a")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded.config.dtype == "float32"


# ---- MTP and unexpected tensors ----
def test_mtp_is_written_in_the_official_layout_and_read_with_the_main_embedding(tmp_path: Path) -> None:
    model = random_model(small_config(num_nextn_predict_layers=2))
    model.save_pretrained(tmp_path / "a")
    tensors = file_tensors(tmp_path / "a")
    for layer in (3, 4):
        prefix = f"model.layers.{layer}."
        own = {key.removeprefix(prefix) for key in tensors if key.startswith(prefix)}
        block = {key.removeprefix("model.layers.2.") for key in tensors if key.startswith("model.layers.2.")}
        names = ("enorm", "hnorm", "eh_proj", "embed_tokens", "shared_head.norm", "shared_head.head")
        assert own - block == {f"{name}.weight" for name in names}
        assert own > block
        assert torch.equal(tensors[prefix + "embed_tokens.weight"], model.embed.weight)
        assert torch.equal(tensors[prefix + "shared_head.head.weight"], model.head.weight)
        edit(
            tmp_path / "a",
            {prefix + "embed_tokens.weight": torch.zeros(96, 32), f"{prefix}shared_head.head.weight": None},
        )
    assert_same(state(load_pretrained(tmp_path / "a")), state(model))


def test_mtp_absent_is_said_once_and_leaves_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(small_config(num_nextn_predict_layers=0))
    model.save_pretrained(tmp_path / "a")
    path = tmp_path / "a/config.json"
    path.write_text(path.read_text().replace('"num_nextn_predict_layers": 0', '"num_nextn_predict_layers": 1'))
    with caplog.at_level(logging.INFO):
        loaded = load_pretrained(tmp_path / "a")
    (record,) = caplog.records
    assert "without MTP" in record.getMessage()
    assert record.levelno >= logging.WARNING, "what Python prints where nobody has set up logging"
    assert "\n" not in record.getMessage()
    assert len(loaded.mtp) == loaded.config.num_nextn_predict_layers == 0
    assert_same(state(loaded), state(model))


def test_mtp_can_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    random_model(small_config()).save_pretrained(tmp_path / "a")
    loaded = load_pretrained(tmp_path / "a", mtp=False)
    assert len(loaded.mtp) == loaded.config.num_nextn_predict_layers == 0
    assert caplog.records == []


def test_unexpected_tensors_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(small_config())
    model.save_pretrained(tmp_path / "a")
    edit(tmp_path / "a", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert_same(state(load_pretrained(tmp_path / "a")), state(model))
    assert caplog.records == []
    edit(tmp_path / "a", {f"model.layers.0.extra.{n}": torch.ones(2) for n in range(5)})
    assert_same(state(load_pretrained(tmp_path / "a")), state(model))
    (record,) = caplog.records
    assert "ignored 5 tensors" in record.getMessage()
    assert "model.layers.0.extra.0" in record.getMessage()


# ---- transformers ----


# ---- what else is in the folder ----
def test_other_files_survive_a_second_save_and_old_shards_do_not(tmp_path: Path) -> None:
    model = random_model(small_config())
    model.save_pretrained(tmp_path / "a", max_shard_bytes=20_000)
    (tmp_path / "a/README.md").write_text("mine")
    (tmp_path / "a/tokenizer.json").write_text("{}")
    other = random_model(dataclasses.replace(model.config, num_hidden_layers=2), seed=1)
    other.save_pretrained(tmp_path / "a")
    kept = {"README.md", "tokenizer.json", "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == kept
    assert (tmp_path / "a/README.md").read_text() == "mine"
    assert_same(state(load_pretrained(tmp_path / "a")), state(other))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_shards_keep_to_their_size(tmp_path: Path) -> None:
    model = random_model(small_config())
    model.save_pretrained(tmp_path / "a", max_shard_bytes=30_000)
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    sizes = []
    for path in sorted((tmp_path / "a").glob("model-*.safetensors")):
        header = int.from_bytes(path.read_bytes()[:8], "little")
        sizes.append(path.stat().st_size - 8 - header)
    assert len(sizes) > 3
    assert max(sizes) <= 30_000
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"].keys() == file_tensors(tmp_path / "a").keys()


def test_quantised_weights_move_with_the_model(tmp_path: Path) -> None:
    """From device to device; a cast of the model leaves them as they are."""
    write_fp8(tmp_path / "a")
    model = load_pretrained(tmp_path / "a", dtype="fp8")
    module = model.layers[0].attention.o
    before = module.weight
    model.float()
    assert module.weight.data.dtype == torch.float8_e4m3fn
    assert torch.equal(module.weight.sf, before.sf)
    model.to("meta")
    held = [value for m in model.modules() for value in vars(m).values() if isinstance(value, Quantized)]
    assert held
    assert {(q.data.device.type, q.sf.device.type) for q in held} == {("meta", "meta")}


def test_scales_without_fp8_are_an_error(tmp_path: Path) -> None:
    """Values that were converted without their scales are wrong by a factor each."""
    tensors = write_fp8(tmp_path / "a")
    key = next(key for key, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn)
    edit(tmp_path / "a", {key: tensors[key].bfloat16()})
    with pytest.raises(ValueError, match=rf"expected {key} of dtype F8_E4M3, since it has block scales, found BF16"):
        load_pretrained(tmp_path / "a")


def test_a_device_without_weights_is_refused(tmp_path: Path) -> None:
    random_model(small_config()).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="expected a device that holds weights, got meta"):
        load_pretrained(tmp_path / "a", device="meta")


def test_weights_can_be_read_by_whoever_may_read_the_rest(tmp_path: Path) -> None:
    random_model(small_config()).save_pretrained(tmp_path / "a")
    assert len({path.stat().st_mode for path in (tmp_path / "a").iterdir()}) == 1

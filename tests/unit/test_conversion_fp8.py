"""FP8 exports: every number against float64, the folder against stock transformers, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from checkpoints import VOCAB, assert_same_bits, load_hf_model, make_hf, nothing_beside, read_tensors
from full_size import FullSizeSource
from safetensors.torch import load_file, save_file

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts, megatron_to_hf, verify_checkpoint
from megatron_zeda.conversion.formats import view_as
from megatron_zeda.conversion.fp8 import fp8_view, quantize
from megatron_zeda.conversion.hf_folder import HfFolder
from megatron_zeda.conversion.logits import compare_logits
from megatron_zeda.conversion.megatron_io import MegatronFolder
from megatron_zeda.errors import InputError, ZedaError

pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")

BLOCK = 128
IDS = torch.arange(2 * 16).reshape(2, 16) * 7 % VOCAB
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 64, "num_experts": 3},
    # 144 rows lead down to the keys: they stay as they are, with those to the queries; so does a dense block of 48.
    "glm4_moe_lite": {"q_lora_rank": 128, "kv_lora_rank": 128, "qk_rope_head_dim": 16, "qk_nope_head_dim": 48}
    | {"v_head_dim": 32, "n_routed_experts": 3, "num_attention_heads": 8, "num_key_value_heads": 8},
    "glm4_moe": {"head_dim": 64, "n_routed_experts": 3},
}
ATTENTION = {
    "qwen3_moe": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "glm4_moe_lite": {"q_b_proj", "kv_b_proj", "o_proj"},
    "glm4_moe": {"q_proj", "k_proj", "v_proj", "o_proj"},
}


@pytest.fixture(scope="module", params=list(SHAPES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory, family: str) -> Path:
    return _megatron(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def plain(megatron: Path) -> Path:
    megatron_to_hf(megatron, megatron.parent / "plain")
    return megatron.parent / "plain"


@pytest.fixture(scope="module")
def fp8(megatron: Path) -> Path:
    megatron_to_hf(megatron, megatron.parent / "fp8", quantize="fp8")
    return megatron.parent / "fp8"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _megatron(tmp_path_factory.mktemp("qwen"), "qwen3_moe")


def _megatron(folder: Path, family: str, **options: Any) -> Path:
    """Two zero experts beside three real ones; matrices of one, two and four blocks."""
    shape = {"hidden_size": 256, "moe_intermediate_size": BLOCK, "num_attention_heads": 4} | SHAPES[family]
    drafts = family != "qwen3_moe"
    make_hf(folder / "static", family=family, dtype=torch.bfloat16, mtp=drafts, **shape | options)
    inject_zero_experts(folder / "static", folder / "dynamic", num_zero_experts=2)
    hf_to_megatron(folder / "dynamic", folder / "megatron")
    return folder / "megatron"


def _float64(weight: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    return np.kron(scale.double().numpy(), np.ones((BLOCK, BLOCK))) * weight.double().numpy()


def _nearest(values: np.ndarray) -> np.ndarray:
    """The E4M3 number next to each value, in float64 from the definition of the format."""
    magnitude = np.abs(values)
    exponent = np.floor(np.log2(np.maximum(magnitude, 2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return np.sign(values) * np.minimum(np.round(magnitude / step) * step, 448.0)


def test_every_weight_is_rounded_as_float64_says(plain: Path, fp8: Path, family: str) -> None:
    before, after = read_tensors(plain), read_tensors(fp8)
    matrices = [name.removesuffix("_scale_inv") for name in after if name.endswith("_scale_inv")]
    assert after.keys() - before.keys() == {f"{name}_scale_inv" for name in matrices}
    assert_same_bits(*({name: side[name] for name in before if name not in matrices} for side in (after, before)))
    projections = {name.split(".")[-2] for name in matrices if ".self_attn." in name}
    assert projections == ATTENTION[family]
    experts = {name for name in before if ".experts." in name or ".shared_experts." in name}
    assert experts == {name for name in matrices if ".mlp." in name}
    for name in matrices:
        values, scale = before[name].double(), after[f"{name}_scale_inv"]
        assert (after[name].dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
        rows, columns = (size // BLOCK for size in values.shape)
        largest = values.abs().reshape(rows, BLOCK, columns, BLOCK).amax((1, 3))
        assert torch.allclose(scale.double(), largest / 448, rtol=1e-7, atol=0), name
        exact = values.numpy() / np.kron(scale.double().numpy(), np.ones((BLOCK, BLOCK)))
        away = np.abs(after[name].double().numpy() - exact)
        # Of ties, which are common among bfloat16 numbers, float32's division may fall on the other side.
        assert (away <= np.abs(_nearest(exact) - exact) + 1e-6 * np.abs(exact)).all(), name
        error = np.abs(_float64(after[name], scale) - values.numpy())
        assert (error <= np.abs(values.numpy()) / 16 * (1 + 1e-6) + 2.0**-10 * float(scale.max())).all(), name


def test_the_configuration_names_what_stays(plain: Path, fp8: Path, family: str) -> None:
    one, two = (json.loads((folder / "config.json").read_text()) for folder in (plain, fp8))
    settings = two.pop("quantization_config")
    assert one == two  # zero experts, dial, code and types are announced as without quantisation
    kept = settings.pop("modules_to_not_convert")
    assert settings == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "fmt": "e4m3",
    }
    after = read_tensors(fp8)
    linear = {name.removesuffix(".weight") for name in after if after[name].dim() == 2 and name.endswith(".weight")}
    assert set(kept) == {name for name in linear if after[f"{name}.weight"].dtype != torch.float8_e4m3fn}
    assert {"lm_head", "model.embed_tokens", "model.layers.1.mlp.gate"} <= set(kept)
    if family == "glm4_moe_lite":
        assert {"model.layers.0.self_attn.q_a_proj", "model.layers.2.eh_proj", "model.layers.0.mlp.up_proj"} <= set(
            kept
        )


def test_transformers_reads_the_folder(plain: Path, fp8: Path, tmp_path: Path) -> None:
    """On a CPU it multiplies weights and scales: the model of the products, rounded to bfloat16, bit by bit."""
    pytest.importorskip("accelerate", reason="transformers reads FP8 checkpoints with accelerate only")
    tensors = read_tensors(fp8)
    values = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale_inv")}
    for name in [name for name in values if f"{name}_scale_inv" in tensors]:
        products = torch.tensor(_float64(values[name], tensors[f"{name}_scale_inv"]))
        values[name] = products.float().bfloat16()
    oracle = tmp_path / "oracle"
    oracle.mkdir()
    for path in [path for path in plain.iterdir() if path.suffix in (".py", ".json")]:
        (oracle / path.name).write_bytes(path.read_bytes())
    save_file(values, oracle / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        found, wanted, unquantised = (load_hf_model(folder)(IDS).logits for folder in (fp8, oracle, plain))
    assert found.equal(wanted)
    assert not found.equal(unquantised)


def test_logits_of_both_are_compared_and_nothing_is_converted_from_it(
    megatron: Path, fp8: Path, tmp_path: Path
) -> None:
    found = compare_logits(megatron, fp8)
    assert 0 < found.mean_kl < 1.0
    with HfFolder(fp8) as folder:
        assert folder.fp8
        name = "model.layers.1.self_attn.o_proj.weight"
        piece = next(piece for row in folder.rows for piece in row.pieces if piece.name == name)
        tensors = read_tensors(fp8)
        wanted = _float64(tensors[name], tensors[f"{name}_scale_inv"])
        assert folder.read(piece).numpy() == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(InputError, match="whose weights are rounded to FP8"):
        hf_to_megatron(fp8, tmp_path / "out")
    assert nothing_beside(tmp_path / "out")
    assert "compare with --logits" in verify_checkpoint(megatron, fp8)[0]


def test_a_static_model_is_quantised_too_and_not_injected_into(tmp_path: Path) -> None:
    static = make_hf(tmp_path / "s", dtype=torch.bfloat16, hidden_size=128, moe_intermediate_size=128, head_dim=64)
    hf_to_megatron(static, tmp_path / "m")
    summary = megatron_to_hf(tmp_path / "m", tmp_path / "fp8", quantize="fp8")
    assert summary["quantization"] == "fp8"
    saved = sum(t.numel() for n, t in read_tensors(static).items() if "_proj" in n)  # a byte of two of every weight
    scales = sum(t.nbytes for n, t in read_tensors(tmp_path / "fp8").items() if n.endswith("_scale_inv"))
    assert summary["extra_bytes"] == scales - saved
    with pytest.raises(InputError, match="an unquantised checkpoint"):
        inject_zero_experts(tmp_path / "fp8", tmp_path / "out", num_zero_experts=2)


def test_scales_are_right_whatever_file_they_fall_into(qwen: Path, tmp_path: Path) -> None:
    """A scale may begin a file, and an interrupted run may go on there: its matrix is then not read before it."""
    megatron_to_hf(qwen, tmp_path / "one", quantize="fp8")
    sharded = _sharded(qwen, tmp_path)
    files = list(sharded.glob("model-*.safetensors"))
    assert any(next(iter(load_file(path))).endswith("_scale_inv") for path in files)
    assert_same_bits(read_tensors(tmp_path / "one"), read_tensors(sharded))
    source = MegatronFolder(qwen)
    view = fp8_view(view_as(source), source)
    scales = [row.pieces[0] for row in view.rows if row.key.endswith("_scale_inv")]
    tensors = read_tensors(tmp_path / "one")
    for piece in scales[::-1]:
        assert view.read(piece).equal(tensors[piece.name])


def _sharded(megatron: Path, folder: Path) -> Path:
    """An export with a file for nearly every tensor."""
    manifest = megatron / "zeda_manifest.json"
    before = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(before), "sharded": True}))
    try:
        megatron_to_hf(megatron, folder / "sharded", quantize="fp8", shard_bytes=2**14)
    finally:
        manifest.write_text(before)
    return folder / "sharded"


def test_blocks_of_zeros_and_of_the_smallest_numbers() -> None:
    weight = torch.zeros(256, 256)
    weight[:128, 128:] = 1e-40
    weight[128:, 128:] = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    quantized, scales = quantize(weight, "here")
    assert scales.isfinite().all() and (scales > 0).all()
    assert not quantized[:, :128].float().any()
    assert np.abs(_float64(quantized, scales) - weight.double().numpy())[:128].max() < 1e-40
    assert quantized[128:, 128:].float().abs().max() == 448


def test_a_rounding_that_is_not_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelopt.torch.quantization.qtensor import FP8QTensor

    right = FP8QTensor.quantize

    def wrong(values: torch.Tensor, scales: torch.Tensor, **options: Any) -> Any:
        return right(values * 1.1, scales, **options)

    monkeypatch.setattr(FP8QTensor, "quantize", wrong)
    with pytest.raises(ZedaError, match="not the weights rounded to FP8"):
        quantize(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)), "here")


@pytest.mark.parametrize("format", ["dense-zeros", "vllm-mone"])
def test_other_forms_are_refused(qwen: Path, tmp_path: Path, format: str) -> None:
    with pytest.raises(InputError, match=f"{format} is not quantised"):
        megatron_to_hf(qwen, tmp_path / "out", format=format, quantize="fp8")
    assert nothing_beside(tmp_path / "out")


def test_what_cannot_be_quantised_is_refused(tmp_path: Path, qwen: Path) -> None:
    narrow = _megatron(tmp_path / "narrow", "qwen3_moe", moe_intermediate_size=96)
    with pytest.raises(InputError, match=r"experts\.0\.\w+_proj\.weight is no whole number of blocks"):
        megatron_to_hf(narrow, tmp_path / "out", quantize="fp8")
    with pytest.raises(InputError, match="unknown quantisation"):
        megatron_to_hf(qwen, tmp_path / "out", quantize="int4")
    assert nothing_beside(tmp_path / "out")


def test_identity_experts_are_refused() -> None:
    """transformers replaces the experts of an FP8 folder by its own, which would compute what copies return."""
    fields = {"zce_nums": [4], "zce_types": ["copy"], "use_zce_mask": False, "zeda_expert_type": "copy"}
    view: Any = SimpleNamespace(format="zeda", config=fields)
    with pytest.raises(InputError, match="method copy would be another model"):
        fp8_view(view, cast(Any, None))


def test_without_modelopt_one_line_says_what_to_install(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "modelopt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(InputError, match=r"megatron-zeda\[quant\]"):
        megatron_to_hf(qwen, tmp_path / "out", quantize="fp8")
    assert nothing_beside(tmp_path / "out")


def test_the_tool_says_what_is_saved_and_the_card_what_it_is(qwen: Path, tmp_path: Path) -> None:
    tool = Path(__file__).parents[2] / "checkpoint_tools" / "megatron_to_hf.py"
    arguments = ["--megatron", str(qwen), "--hf", str(tmp_path / "out"), "--quantize", "fp8"]
    out = subprocess.run([sys.executable, str(tool), *arguments], capture_output=True, text=True, check=True).stdout
    assert "experts and attention in FP8, " in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| precision | experts and attention in FP8 (E4M3)" in card
    assert "wants the package accelerate" in card


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "GLM-4.7-Flash", "Qwen3-235B-A22B", "GLM-4.5-Air"])
def test_published_shapes_and_the_sizes_in_the_documentation(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "export_formats.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith(f"| of {name}")]
    source: Any = FullSizeSource(name.lower())
    plain = view_as(source)
    view = fp8_view(plain, source)
    assert [int(cell.strip().replace(",", "")) for cell in line.split("|")[2:4]] == [plain.num_bytes, view.num_bytes]
    kept = {module.split(".")[-1] for module in view.config["quantization_config"]["modules_to_not_convert"]}
    expected = {
        "GLM-4.7-Flash": {"q_a_proj", "kv_a_proj_with_mqa", "eh_proj", "head"},
        "GLM-4.5-Air": {"gate_proj", "up_proj", "down_proj", "eh_proj", "head"},
    }
    assert kept == {"embed_tokens", "lm_head", "gate"} | expected.get(name, set())

"""Export forms hold the same model: checked with stock transformers, whatever the form."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    VOCAB,
    assert_same_bits,
    edit_config,
    load_hf_model,
    make_dense_zeros,
    make_hf,
    read_tensors,
)
from export_views import load_as_vllm, save_view
from full_size import FullSizeSource
from safetensors.torch import save_file

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts, megatron_to_hf, verify_checkpoint
from megatron_zeda.conversion.formats import ZEDA_OVERRIDES_FILE, as_zeda, expert_order, view_as
from megatron_zeda.conversion.hf_folder import HfFolder
from megatron_zeda.errors import InputError
from megatron_zeda.models import load_hf_config
from megatron_zeda.models.registry import family_for
from megatron_zeda.rollout.hf_folder import load_model

IDS = torch.arange(4 * 16).reshape(4, 16) * 7 % VOCAB


FAMILIES = ("qwen3_moe", "glm4_moe_lite", "glm4_moe")
KEYS = {"qwen3_moe": "num_experts", "glm4_moe_lite": "n_routed_experts", "glm4_moe": "n_routed_experts"}
STOCK = {
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
# Of the GLM families, layer 0 is dense and layer 2 drafts.
MOE_LAYERS = {"qwen3_moe": ["0", "1"], "glm4_moe_lite": ["1", "2"], "glm4_moe": ["1", "2"]}


def _make(folder: Path, family: str, **options: Any) -> Path:
    """3 zero experts beside 6 real ones, so that no count equals another; some of the slots are skipped."""
    options |= {KEYS[family]: 6, "num_experts_per_tok": 3}
    drafts, fused = family != "qwen3_moe", options.get("fused", False)
    static = make_hf(folder / "static", family=family, mtp=drafts and not fused, **options)
    if drafts and fused:
        _add_stacked_mtp(static)
    inject_zero_experts(static, folder / "dynamic", num_zero_experts=3)
    return folder / "dynamic"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory, family: str) -> Path:
    return _make(tmp_path_factory.mktemp("formats"), family)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory, family: str) -> Path:
    return _make(tmp_path_factory.mktemp("fused"), family, fused=True)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(tmp_path_factory.mktemp("qwen"), "qwen3_moe")


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(tmp_path_factory.mktemp("glm"), "glm4_moe_lite")


def _add_stacked_mtp(folder: Path) -> None:
    """The drafting layer in the layout of the rest: its experts stacked in two tensors."""
    config, generator = load_hf_config(folder), torch.Generator().manual_seed(3)
    tensors = read_tensors(folder)
    for row in family_for(config).carried_rows(config, "fused"):
        tensors[row.key] = torch.randn(row.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_hf_model(folder)(IDS).logits


def _export(source: Path, target: Path, format: str, **options: Any) -> Path:
    with HfFolder(source) as folder:
        return save_view(view_as(folder, format, **options), target)


def test_zeda_is_the_checkpoint_itself(dynamic: Path, tmp_path: Path) -> None:
    written = _export(dynamic, tmp_path / "out", "zeda")
    assert_same_bits(read_tensors(written), read_tensors(dynamic))
    assert json.loads((written / "config.json").read_text()) == json.loads((dynamic / "config.json").read_text())


def test_dense_zeros_are_zero_experts_behind_the_real_ones(dynamic: Path, family: str, tmp_path: Path) -> None:
    written = _export(dynamic, tmp_path / "out", "dense-zeros")
    oracle = read_tensors(make_dense_zeros(dynamic, tmp_path / "oracle"))
    tensors = read_tensors(written)
    drafting = {name: tensor for name, tensor in tensors.items() if name not in oracle}
    assert all(name.startswith("model.layers.2.") for name in drafting)
    assert_same_bits({name: tensors[name] for name in oracle}, oracle)
    config = json.loads((written / "config.json").read_text())
    assert (config[KEYS[family]], config["architectures"]) == (9, [STOCK[family]])
    assert not [key for key in config if "zce" in key or "zero" in key or key == "auto_map"]


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("interleave", [False, True])
def test_dense_zeros_compute_the_same(
    dynamic: Path, fused: Path, tmp_path: Path, layout: str, interleave: bool
) -> None:
    source = dynamic if layout == "per_expert" else fused
    written = _export(source, tmp_path / "out", "dense-zeros", interleave=interleave)
    stock = _logits(written)
    assert (stock - _logits(source)).abs().max() < 1e-5
    static = (stock - _logits(source.parent / "static")).abs().max()
    assert static > 1e-2  # zero experts do take slots here: the test is not about nothing


def test_interleaved_experts_move_with_their_router_rows(
    dynamic: Path, fused: Path, family: str, tmp_path: Path
) -> None:
    order = expert_order(6, 3, interleave=True)
    assert order == [0, 6, 1, 2, 7, 3, 4, 8, 5]
    before, after = (
        read_tensors(dynamic),
        read_tensors(_export(dynamic, tmp_path / "o", "dense-zeros", interleave=True)),
    )
    stacked = read_tensors(_export(fused, tmp_path / "f", "dense-zeros", interleave=True))
    for layer in MOE_LAYERS[family]:
        mlp = f"model.layers.{layer}.mlp."
        for gate in [name for name in before if name.startswith(f"{mlp}gate.")]:
            assert after[gate].equal(before[gate][order])
        for position, expert in enumerate(order):
            moved = after[f"{mlp}experts.{position}.up_proj.weight"]
            original = before.get(f"{mlp}experts.{expert}.up_proj.weight", torch.zeros_like(moved))
            assert moved.equal(original)
    unmoved = read_tensors(fused)
    for name in [name for name in stacked if ".experts." in name or ".gate." in name]:
        padding = (0, 0) * (unmoved[name].dim() - 1)
        padded = torch.nn.functional.pad(unmoved[name], (*padding, 0, 9 - len(unmoved[name])))
        assert stacked[name].equal(padded[order]), name


def test_the_drafting_layer_is_whole_and_never_selects_a_zero_expert(glm: Path, tmp_path: Path) -> None:
    for format in ("dense-zeros", "vllm-mone"):
        tensors = read_tensors(_export(glm, tmp_path / format, format))
        mlp = "model.layers.2.mlp."
        assert tensors[f"{mlp}gate.weight"].shape == (9, 32)
        assert tensors[f"{mlp}gate.e_score_correction_bias"][6:].tolist() == [-1e4] * 3
        experts = {name.split(".")[5] for name in tensors if name.startswith(f"{mlp}experts.")}
        assert experts == {str(expert) for expert in range(9)}


@pytest.mark.parametrize(("real", "zero"), [(128, 64), (64, 32), (6, 3), (5, 7), (2, 1), (128, 1), (3, 128)])
def test_interleaving_loads_expert_parallel_ranks_alike(real: int, zero: int) -> None:
    order, total = expert_order(real, zero, interleave=True), real + zero
    assert sorted(order) == list(range(total))
    assert [expert for expert in order if expert < real] == list(range(real))
    for size in [size for size in range(1, total + 1) if total % size == 0]:
        counts = [sum(e >= real for e in order[start : start + size]) for start in range(0, total, size)]
        share = size * zero / total
        assert all(abs(count - share) < 2 for count in counts)
        if share.is_integer() and real % zero == 0:
            assert set(counts) == {share}
    assert expert_order(real, zero, interleave=False) == list(range(total))


def test_vllm_mone_computes_the_same_where_constants_replace_experts(dynamic: Path, tmp_path: Path) -> None:
    written = _export(dynamic, tmp_path / "out", "vllm-mone")
    with torch.no_grad():
        assert (load_as_vllm(written)(IDS).logits - _logits(dynamic)).abs().max() < 1e-5


def test_vllm_mone_is_what_vllm_documents(dynamic: Path, family: str, tmp_path: Path) -> None:
    written = _export(dynamic, tmp_path / "out", "vllm-mone")
    config = json.loads((written / "config.json").read_text())
    layers = MOE_LAYERS[family]
    assert config["approximate_experts"] == {layer: [6, 7, 8] for layer in layers}
    assert (config[KEYS[family]], config["architectures"]) == (9, [STOCK[family]])
    assert (config["model_type"], "auto_map" in config, "zce_nums" in config) == (family, False, False)
    before, after = read_tensors(dynamic), read_tensors(written)
    extra = {name: tensor for name, tensor in after.items() if name not in before}
    assert_same_bits({name: after[name] for name in before}, before)
    assert sorted(extra) == [f"model.layers.{i}.mlp.experts.{e}.approx_value" for i in layers for e in (6, 7, 8)]
    assert all(tensor.shape == (32,) and not tensor.count_nonzero() for tensor in extra.values())
    overrides = json.loads((written / ZEDA_OVERRIDES_FILE).read_text())
    restored = {key: value for key, value in {**config, **overrides}.items() if value is not None}
    zeda = json.loads((dynamic / "config.json").read_text())
    assert restored == {key: value for key, value in zeda.items() if value is not None}


def test_vllm_mone_reads_back_as_the_zeda_checkpoint(dynamic: Path, tmp_path: Path) -> None:
    config = load_hf_config(_export(dynamic, tmp_path / "out", "vllm-mone"))
    zeda, constants = as_zeda(family_for(config), config)
    assert dict(zeda) == json.loads((dynamic / "config.json").read_text())
    assert len(constants) == 6
    unchanged, none = as_zeda(family_for(zeda), zeda)
    assert (unchanged, none) == (zeda, [])


@pytest.mark.parametrize(
    "value",
    [
        {"0": [6, 7, 8]},  # a layer is missing
        {"0": [6, 7, 8], "1": [7, 8]},
        {"0": [0, 1, 2], "1": [0, 1, 2]},
        {"0": [6, 7, 8], "1": [6, 7, 8], "2": [6, 7, 8]},  # no such layer
        {"0": 6, "1": 6},
        {"0": [], "1": []},
        {},
        [[6, 7, 8], [6, 7, 8]],
    ],
)
def test_other_substitutions_are_refused(qwen: Path, tmp_path: Path, value: Any) -> None:
    config = load_hf_config(_export(qwen, tmp_path / "out", "vllm-mone"))
    config["approximate_experts"] = value
    with pytest.raises(InputError, match="approximate_experts"):
        as_zeda(family_for(config), config)


@pytest.mark.parametrize("format", ["dense-zeros", "vllm-mone"])
@pytest.mark.parametrize("dial", [1.5, -2.0, -math.inf])
def test_a_dial_that_the_form_cannot_carry_is_refused(qwen: Path, tmp_path: Path, format: str, dial: float) -> None:
    turned = edit_config(qwen, tmp_path / "turned", zeda_zero_logit_bias=dial)
    with HfFolder(turned) as source, pytest.raises(InputError, match=f"`zeda_zero_logit_bias`.*{format}"):
        view_as(source, format)
    with HfFolder(turned) as source:
        assert view_as(source, "zeda").config["zeda_zero_logit_bias"] == dial


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dial", [0.2, -0.3, -math.inf])
def test_a_selection_bias_carries_the_dial(glm: Path, tmp_path: Path, dial: float, interleave: bool) -> None:
    turned = edit_config(glm, tmp_path / "turned", zeda_zero_logit_bias=dial)
    wanted = _logits(turned)
    assert (wanted - _logits(glm)).abs().max() > 1e-2
    dense = _export(turned, tmp_path / "dense", "dense-zeros", interleave=interleave)
    assert (_logits(dense) - wanted).abs().max() < 1e-5
    mone = _export(turned, tmp_path / "mone", "vllm-mone")
    with torch.no_grad():
        assert (load_as_vllm(mone)(IDS).logits - wanted).abs().max() < 1e-5
    before, after = (read_tensors(folder)["model.layers.1.mlp.gate.e_score_correction_bias"] for folder in (glm, mone))
    assert after[:6].equal(before[:6])
    assert after[6:].tolist() == (before[6:] + dial).clamp(min=-1e4).tolist()  # finite: others refuse infinities
    drafting = "model.layers.2.mlp.gate.e_score_correction_bias"
    assert read_tensors(mone)[drafting].equal(read_tensors(glm)[drafting])
    overrides = json.loads((mone / ZEDA_OVERRIDES_FILE).read_text())
    assert overrides["zeda_zero_logit_bias"] == 0.0  # not a second time


def test_wrong_requests_are_refused(dynamic: Path) -> None:
    with HfFolder(dynamic.parent / "static") as static, HfFolder(dynamic) as source:
        assert view_as(static, "zeda").rows == static.rows
        for format in ("dense-zeros", "vllm-mone"):
            with pytest.raises(InputError, match="static"):
                view_as(static, format)
        with pytest.raises(InputError, match="unknown export format"):
            view_as(source, "gguf")
        for format in ("zeda", "vllm-mone"):
            with pytest.raises(InputError, match="interleaved"):
                view_as(source, format, interleave=True)


def test_sizes(dynamic: Path, tmp_path: Path) -> None:
    for format in ("zeda", "dense-zeros", "vllm-mone"):
        with HfFolder(dynamic) as source:
            view = view_as(source, format)
            written = read_tensors(save_view(view, tmp_path / format))
        assert view.num_bytes == sum(tensor.nbytes for tensor in written.values())


# ---- the whole way: Megatron checkpoint -> export -------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["per_expert", "fused"])
def megatron(request: pytest.FixtureRequest, dynamic: Path, fused: Path) -> tuple[Path, Path]:
    """A Megatron checkpoint, and the Hugging Face folder that it was imported from."""
    source = fused if request.param else dynamic
    if not (source.parent / "megatron").exists():
        hf_to_megatron(source, source.parent / "megatron")
    return source.parent / "megatron", source


@pytest.mark.parametrize("format", ["zeda", "dense-zeros", "vllm-mone"])
def test_exports_compute_what_the_checkpoint_does(
    megatron: tuple[Path, Path], family: str, tmp_path: Path, format: str
) -> None:
    checkpoint, source = megatron
    if format == "vllm-mone" and family != "qwen3_moe" and "fused" in str(source):
        with pytest.raises(InputError, match=r"model\.layers\.2\..* stacked"):  # its drafting layer's experts
            megatron_to_hf(checkpoint, tmp_path / "out", format=format)
        return
    summary = megatron_to_hf(checkpoint, tmp_path / "out", format=format)
    written = read_tensors(tmp_path / "out")
    zeda = sum(tensor.nbytes for tensor in read_tensors(source).values())
    assert summary["export_format"] == format
    assert summary["extra_bytes"] == sum(tensor.nbytes for tensor in written.values()) - zeda
    assert (summary["extra_bytes"] == 0) == (format == "zeda")
    with torch.no_grad():
        model = load_as_vllm(tmp_path / "out") if format == "vllm-mone" else load_hf_model(tmp_path / "out")
        assert (model(IDS).logits - _logits(source)).abs().max() < 1e-5
    assert list((tmp_path / "out").glob("modeling_*")) == [] or format == "zeda"


@pytest.mark.parametrize(
    ("said", "rms", "transformers", "vllm"),
    [(..., 1e-5, True, False), (1e-6, 1e-5, False, True), (1e-3, 1e-5, True, True), (1e-6, 1e-6, False, False)],
)
def test_stock_forms_say_where_an_epsilon_differs(
    tmp_path: Path,
    said: Any,
    rms: float,
    transformers: bool,
    vllm: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """GLM-4.7-Flash as published has no key: then ``rms_norm_eps``, and stock transformers has another constant."""
    hf = make_hf(tmp_path / "hf", family="glm4_moe_lite", rms_norm_eps=rms)
    static = edit_config(hf, tmp_path / "static", zeda_latent_norm_eps=said)
    tensors = read_tensors(static)
    for name in tensors:
        if "q_a_proj" in name or "kv_a_proj" in name:
            tensors[name] *= 2e-3  # small latents, where an epsilon shows
    save_file(tensors, static / "model.safetensors", metadata={"format": "pt"})
    inject_zero_experts(static, tmp_path / "dynamic", num_zero_experts=3)
    hf_to_megatron(tmp_path / "dynamic", tmp_path / "megatron")
    wanted = _logits(tmp_path / "dynamic")
    notes = ("stock transformers takes 1e-06", f"vLLM and SGLang take `rms_norm_eps`, {rms:g},")
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "checkpoint_tools")
    tool = importlib.import_module("megatron_to_hf")
    expected = {"zeda": (False, False), "dense-zeros": (transformers, vllm), "vllm-mone": (False, vllm)}
    for format, those in expected.items():
        out = tmp_path / format
        assert tool.main(["--megatron", str(tmp_path / "megatron"), "--hf", str(out), "--format", format]) == 0
        printed, card = capsys.readouterr().out, (out / "README.md").read_text()
        for text, differs in zip(notes, those, strict=True):
            assert (text in printed, text in card) == (differs, differs), (format, text)
    stock = load_hf_model(tmp_path / "dense-zeros")
    with torch.no_grad():
        assert ((stock(IDS).logits - wanted).abs().max() > 1e-2) == transformers
        load_as_megatron_does = load_model(tmp_path / "dense-zeros", device=torch.device("cpu"))
        assert (load_as_megatron_does(IDS).logits - wanted).abs().max() < 1e-5
        for layer in stock.model.layers:  # what vLLM takes
            layer.self_attn.q_a_layernorm.variance_epsilon = layer.self_attn.kv_a_layernorm.variance_epsilon = rms
        assert ((stock(IDS).logits - wanted).abs().max() > 1e-2) == vllm


def test_a_vllm_mone_folder_is_imported_and_verified_as_what_it_holds(dynamic: Path, tmp_path: Path) -> None:
    hf_to_megatron(dynamic, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "mone", format="vllm-mone")
    assert verify_checkpoint(tmp_path / "mone", dynamic) == []
    assert verify_checkpoint(tmp_path / "megatron", tmp_path / "mone") == []
    hf_to_megatron(tmp_path / "mone", tmp_path / "again")
    megatron_to_hf(tmp_path / "again", tmp_path / "zeda")
    assert_same_bits(read_tensors(tmp_path / "zeda"), read_tensors(dynamic))
    assert load_hf_config(tmp_path / "zeda") == load_hf_config(dynamic)


def test_constants_that_are_not_zero_are_refused(qwen: Path, tmp_path: Path) -> None:
    written = _export(qwen, tmp_path / "mone", "vllm-mone")
    tensors = read_tensors(written)
    name = "model.layers.1.mlp.experts.7.approx_value"
    for value, message in ((torch.ones(32), "is not zero"), (torch.zeros(31), "wrong shape"), (None, "missing")):
        changed = {key: tensor for key, tensor in tensors.items() if key != name or value is not None}
        save_file(changed | ({} if value is None else {name: value}), written / "model.safetensors")
        with pytest.raises(InputError, match=f"{message}|{name}") as caught:
            HfFolder(written)
        assert name in str(caught.value)
        assert message in str(caught.value)


def test_what_lies_beside_the_weights(qwen: Path, tmp_path: Path) -> None:
    """Tokenizer, template, generation settings and licence travel; code, cards, pickles and other weights do not."""
    source = shutil.copytree(qwen, tmp_path / "source")
    kept = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": '{"temperature": 0.6}',
        "special_tokens_map.json": "{}",
        "LICENSE": "Apache",
    }
    stale = {
        "README.md": "the old card",
        "modeling_other.py": "code",
        "configuration_other.py": "code",
        "pytorch_model.bin": "pickle",
        "tokenizer.pkl": "pickle",
        "quantize_config.json": "{}",
        "model.safetensors.bak": "",
        ".gitattributes": "",
        "figures.png": "",
    }
    for name, text in {**kept, **stale}.items():
        (source / name).write_text(text)
    hf_to_megatron(source, tmp_path / "megatron")
    weights = {"config.json", "model.safetensors", "zeda_manifest.json", "README.md"}
    code = {"modeling_zeda_base.py", "modeling_zeda_qwen3_moe.py"}
    for format, more in (("zeda", code), ("dense-zeros", set()), ("vllm-mone", {ZEDA_OVERRIDES_FILE})):
        out = tmp_path / format
        megatron_to_hf(tmp_path / "megatron", out, format=format)
        assert {path.name for path in out.iterdir()} == weights | more | kept.keys()
        assert all((out / name).read_text() == text for name, text in kept.items())
        assert (out / "README.md").read_text() != "the old card"


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe_lite"])
def test_which_forms_are_a_way_back(tmp_path: Path, family: str) -> None:
    """Nothing but the manifest tells the written-out zero experts of dense-zeros from real ones."""
    dynamic = _make(tmp_path, family)
    hf_to_megatron(dynamic, tmp_path / "megatron")
    numbers = {"zeda": (6, 3), "dense-zeros": (9, 0), "vllm-mone": (6, 3)}
    for format, expected in numbers.items():
        out = tmp_path / format
        megatron_to_hf(tmp_path / "megatron", out, format=format)
        manifest = json.loads((out / "zeda_manifest.json").read_text())
        assert (manifest["num_experts"], manifest["num_zero_experts"]) == expected
        exported = manifest["exported"]
        assert (exported["export_format"], exported["num_experts"], exported["num_zero_experts"]) == (format, 6, 3)
        reason = "dense-zeros form" if format == "dense-zeros" else "injected already"
        with pytest.raises(InputError, match=reason):
            inject_zero_experts(out, tmp_path / "again")
        if format == "dense-zeros":
            for plan_only in (True, False):
                with pytest.raises(InputError, match="dense-zeros form"):
                    hf_to_megatron(out, tmp_path / "again", plan_only=plan_only)
            assert "no way back" in verify_checkpoint(out, dynamic)[0]
        else:
            hf_to_megatron(out, tmp_path / f"{format}-megatron")
            assert verify_checkpoint(tmp_path / f"{format}-megatron", tmp_path / "megatron") == []
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "GLM-4.7-Flash", "Qwen3-235B-A22B", "GLM-4.5-Air"])
def test_the_costs_in_the_documentation(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "export_formats.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {name} ")]
    source = FullSizeSource(name.lower())
    zeda = view_as(source).num_bytes
    costs = [view_as(source, format).num_bytes - zeda for format in ("dense-zeros", "vllm-mone")]
    assert [int(cell.strip().replace(",", "")) for cell in line.split("|")[2:4]] == costs

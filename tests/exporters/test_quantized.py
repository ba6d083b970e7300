"""Quantised checkpoints: every form of every family is its source, rounded and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from paretron import versions
from paretron.artifacts.companions import TOKENIZER_FILES
from paretron.artifacts.manifest import Provenance, verify
from paretron.artifacts.models import load_model, load_tokenizer
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.writer import TensorWriter
from paretron.data.store import TokenStore
from paretron.data.texts import Texts
from paretron.data.tokens import build_token_store
from paretron.errors import Code, ParetronError
from paretron.evaluate.perplexity import summed_loss
from paretron.recipe import Export
from paretron_exporters import quantized_forms, twin
from paretron_exporters.hf import EXPORTER
from paretron_exporters.quantized_codes import decode, encode_rows, row_scales
from paretron_exporters.quantized_forms import FORMS, TRIED
from pico import MOE_FAMILIES, PICO_FAMILIES

PicoMaker = Callable[..., Path]
RunExport = Callable[..., Any]

SEQ_LEN = 24
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
# Where the table of the source has another shape than one of the layers alone would.
LAYERS = {"qwen3_moe": 2, "gemma2": 2, "gemma3_text": 2, "smollm3": 2}
CALIBRATED = tuple(name for name, form in FORMS.items() if form.calibrated)
# Each family once through the library, each form more than once, and what is special to AWQ: norms
# that add one to their weight, have a bias, or stand elsewhere.
PAIRS = [
    ("llama", "fp8"), ("mistral", "nvfp4"), ("qwen2", "int8_sq"), ("qwen3", "fp8_kv"),
    ("nemotron", "int4_awq"), ("gemma2", "int4_awq"), ("gemma3_text", "int8_sq"),
    ("phi3", "fp8_kv"), ("olmo2", "int4_awq"), ("granite", "fp8"), ("starcoder2", "nvfp4"),
    ("smollm3", "int4_awq"), ("mixtral", "int8_sq"), ("qwen3_moe", "nvfp4"),
    ("starcoder2", "int4_awq"),
]  # fmt: skip


def wide(family: str) -> dict[str, Any]:
    """Sizes that every form takes."""
    experts = {"moe_intermediate_size": 128} if family == "qwen3_moe" else {}
    return {**WIDE, "num_hidden_layers": LAYERS.get(family, 1), **experts}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    """Two texts in the tokens of every pico model."""
    from pico import pico_tokenizer

    folder = tmp_path_factory.mktemp("texts")
    pico_tokenizer().save_pretrained(folder / "tokenizer")
    for name, start in (("calibration", 0), ("validation", 100)):
        texts = [f"the cat sat on mat {start + i}, and the dog ran after it" for i in range(20)]
        tokenizer = load_tokenizer(folder / "tokenizer")
        build_token_store(texts, tokenizer, folder / name, eos_token_id=1)
    return Texts(folder / "calibration", SEQ_LEN, 4, folder / "validation", SEQ_LEN, seed=0)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read by safetensors' own reader."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def test_the_table_holds_every_family_there_is() -> None:
    assert set(TRIED) == {*PICO_FAMILIES, *MOE_FAMILIES}
    assert {family for family, _ in PAIRS} == set(TRIED)
    assert {form for _, form in PAIRS} == set(CALIBRATED)


@pytest.mark.parametrize("family", TRIED)
def test_every_family_is_written_in_integers(
    family: str, pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    source, out = pico(family, **wide(family)), tmp_path / "out"
    report = run_export(EXPORTER, source, out, quantize="int8")
    assert [c.level for c in report.checks] == ["L0", "L1", "L2", "L3", "L4"]
    assert report.checks[2].measured["kl"] < 1e-2
    before, after = stored(source), stored(out)
    matrices = [n for n in before if n + "_scale" in after]
    assert len(matrices) * 2 + len(before) - len(matrices) == len(after)
    for name, tensor in before.items():
        if name in matrices:
            assert after[name].dtype == torch.int8
            assert after[name + "_scale"].shape == (len(tensor), 1)
            decoded = after[name].float() * after[name + "_scale"]
            assert float((decoded - tensor).norm() / tensor.norm()) < 0.01
        else:
            assert torch.equal(after[name], tensor)
            router = name.endswith("gate.weight")
            assert tensor.dim() == 1 or "embed" in name or "lm_head" in name or router
    verify(out)


@pytest.mark.parametrize(("family", "form"), PAIRS)
def test_the_library_is_proven_on_every_family(
    family: str, form: str, pico: PicoMaker, run_export: RunExport, stores: Texts, tmp_path: Path
) -> None:
    source, out = pico(family, dtype="bfloat16", **wide(family)), tmp_path / "out"
    report = run_export(EXPORTER, source, out, quantize=form, texts=stores)
    measured = report.checks[1].measured
    assert measured["worst_error"] <= FORMS[form].largest_error
    assert measured["beyond_rounding"] <= 1
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "modelopt"
    assert (out / "hf_quant_config.json").is_file()
    assert not (out / ".modelopt").exists()
    perplexity = json.loads((out / "quantization.json").read_text())["perplexity"]
    assert perplexity["weights"] == pytest.approx(perplexity["before"], rel=0.2)
    card = (out / "README.md").read_text()
    assert ("from tensorrt_llm" in card) == ("own tests: TensorRT-LLM" in card)
    routers = [n for n in stored(source) if n.endswith("gate.weight")]
    assert all(n.removesuffix(".weight") in said["ignore"] for n in routers)


def test_what_vllm_must_be_told_of_float32_is_on_the_card(
    pico: PicoMaker, run_export: RunExport, stores: Texts, tmp_path: Path
) -> None:
    for dtype, told in (("float32", True), ("bfloat16", False)):
        source, out = (
            pico("llama", name=dtype, dtype=dtype, **wide("llama")),
            tmp_path / f"{dtype}-fp8",
        )
        run_export(EXPORTER, source, out, quantize="fp8", texts=stores)
        assert ("refuses float32" in (out / "README.md").read_text()) == told


def test_what_engines_and_readers_need_is_written(
    pico: PicoMaker, run_export: RunExport, stores: Texts, tmp_path: Path
) -> None:
    source, out = pico("qwen3_moe", **wide("qwen3_moe"), dtype="bfloat16"), tmp_path / "out"
    (source / "chat_template.jinja").write_text("{{ messages }}\n\n  ")
    run_export(EXPORTER, source, out, quantize="fp8_dynamic", texts=stores)
    config = json.loads((out / "config.json").read_text())
    assert (config["head_dim"], config["dtype"], config["torch_dtype"]) == (
        32,
        "bfloat16",
        "bfloat16",
    )
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    said = config["quantization_config"]
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", "float-quantized")
    assert said["ignore"] == ["lm_head", "model.layers.0.mlp.gate"]
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "generation_config.json").is_file()
    measured = json.loads((out / "quantization.json").read_text())
    sizes = measured["bytes"]
    assert sizes["before"] == sum(t.nbytes for t in stored(source).values())
    assert sizes["after"] == sum(t.nbytes for t in stored(out).values()) < sizes["before"]
    errors = measured["matrices"]["relative_error"]
    worst = measured["matrices"]["worst"]
    assert len(errors) == sum(n.endswith("weight_scale") for n in stored(out))
    assert worst["relative_error"] == max(errors.values()) == errors[worst["tensor"]]
    card = (out / "README.md").read_text()
    for figure in ("perplexity before", "perplexity with rounded weights and activations"):
        assert figure in card
    assert "from vllm" in card


def test_perplexity_is_that_of_the_decoded_model(
    pico: PicoMaker, run_export: RunExport, stores: Texts, tmp_path: Path
) -> None:
    source, out = pico(**wide("llama")), tmp_path / "out"
    run_export(EXPORTER, source, out, quantize="int8", texts=stores)
    said = json.loads((out / "quantization.json").read_text())["perplexity"]
    model, after = load_model(source), stored(out)
    store = TokenStore.open(stores.validation)
    windows = store.windows(SEQ_LEN)
    ids = torch.stack([store.window(i, SEQ_LEN) for i in range(windows)])
    assert said["tokens"] == windows * (SEQ_LEN - 1)

    def measured() -> float:
        return float(torch.tensor(summed_loss(model, ids) / said["tokens"]).double().exp())

    assert said["before"] == pytest.approx(measured(), rel=1e-5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name + "_scale" in after:
                parameter.copy_(after[name].float() * after[name + "_scale"])
    assert said["weights"] == pytest.approx(measured(), rel=1e-5)
    assert said["weights_and_inputs"] != said["weights"]


@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_decoding_gives_back_what_fits_the_codes(codes: Any) -> None:
    """Numbers that are codes already come back as they were, whatever the row's scale."""
    whole = torch.tensor([[1.0, -2.0, 64.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    whole[0, 0] = 127.0 if codes == "int8" else 448.0
    weight = whole * torch.tensor([[0.37], [1.0]])
    scales = row_scales(weight, codes)
    found = decode({"weight": encode_rows(weight, scales, codes), "weight_scale": scales}, codes)
    assert torch.allclose(found, weight, rtol=1e-6)


def _scaled(value: torch.Tensor) -> torch.Tensor:
    return (value.float() * 1.01).to(value.dtype)


def _one_row(value: torch.Tensor) -> torch.Tensor:
    other = value.clone()
    other[1] = (value[1].float() + 0.01 * value[1].float().abs().max()).to(value.dtype)
    return other


def _one_code(value: torch.Tensor) -> torch.Tensor:
    """The next code in place of one, as bits."""
    other = value.clone()
    other.view(torch.uint8).view(-1)[5] += 1
    return other


WRONG = [
    ("int8", "mlp.up_proj.weight_scale", _scaled), ("int8", "mlp.up_proj.weight", _one_code),
    ("int8", "input_layernorm.weight", _scaled),
    ("int8", "self_attn.q_proj.weight_scale", _one_row),
    ("fp8_dynamic", "mlp.down_proj.weight_scale", _scaled),
    ("fp8", "self_attn.v_proj.weight_scale", _scaled),
    ("fp8", "mlp.down_proj.weight", _one_code),
    ("nvfp4", "mlp.down_proj.weight_scale_2", _scaled),
    ("nvfp4", "mlp.down_proj.weight_scale", _one_code),
    ("int4_awq", "mlp.down_proj.weight_scale", _scaled),
    ("int4_awq", "self_attn.o_proj.pre_quant_scale", _scaled),
    ("int8_sq", "self_attn.k_proj.weight_scale", _scaled),
]  # fmt: skip


@pytest.mark.parametrize(("form", "tensor", "wrong"), WRONG)
def test_an_error_of_a_hundredth_in_one_tensor_is_caught(
    form: str, tensor: str, wrong: Callable[[torch.Tensor], torch.Tensor], pico: PicoMaker,
    run_export: RunExport, stores: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    name = f"model.layers.0.{tensor}"
    write = TensorWriter.write

    def injected(self: TensorWriter, written: str, value: torch.Tensor) -> None:
        final = not str(self._folder).endswith(".modelopt")
        write(self, written, wrong(value) if final and written == name else value)

    source = pico(dtype="bfloat16", **wide("llama"))
    monkeypatch.setattr(TensorWriter, "write", injected)
    with pytest.raises(ParetronError) as caught:
        run_export(EXPORTER, source, tmp_path / "out", quantize=form, texts=stores)
    problem = caught.value.problems[0]
    assert (problem.code, caught.value.exit_code) == (Code.GATE_PARITY, 5)
    assert problem.where.rpartition(".")[0] == name.rpartition(".")[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("by", [0.0, 1.01, float("nan")])
def test_a_scale_of_activations_is_the_calibrated_one(
    by: float, pico: PicoMaker, run_export: RunExport, stores: Texts, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    name, write = "model.layers.0.mlp.up_proj.input_scale", TensorWriter.write

    def injected(self: TensorWriter, written: str, value: torch.Tensor) -> None:
        write(self, written, value * by if written == name else value)

    monkeypatch.setattr(TensorWriter, "write", injected)
    with pytest.raises(ParetronError) as caught:
        run_export(EXPORTER, pico(**wide("llama")), tmp_path / "out", quantize="fp8", texts=stores)
    assert caught.value.problems[0].where == name


@pytest.mark.parametrize(
    ("bound", "level", "where"),
    [({"largest_error": 0.005}, "L1", "model.layers.0."), ({"kl": 1e-9}, "L2", "prompt ")],
)
def test_a_form_that_does_harm_is_not_published(
    bound: dict[str, Any], level: str, where: str, pico: PicoMaker, run_export: RunExport,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(FORMS, "int8", replace(FORMS["int8"], **bound))
    with pytest.raises(ParetronError) as caught:
        run_export(EXPORTER, pico(**wide("llama")), tmp_path / "out", quantize="int8")
    problem = caught.value.problems[0]
    assert (caught.value.exit_code, problem.cause[:2]) == (5, level)
    assert problem.where.startswith(where)
    assert not (tmp_path / "out").exists()


def test_shards_and_tied_embeddings(pico: PicoMaker, tmp_path: Path) -> None:
    source, out = pico("qwen3", tie_word_embeddings=True, num_hidden_layers=2), tmp_path / "out"
    asked = {"to": "hf", "quantize": "int8", "shard_bytes": 60_000}
    EXPORTER.export(
        source,
        export=Export.model_validate(asked),
        out=out,
        provenance=Provenance("export"),
        on_event=lambda kind, fields: None,
    )
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert "lm_head.weight" not in stored(out)


def test_a_model_too_large_to_run_is_proven_by_its_twin(
    pico: PicoMaker, run_export: RunExport, stores: Texts, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(twin, "fits", lambda checkpoint: False)
    source, out = pico("mixtral", **wide("mixtral") | {"num_hidden_layers": 3}), tmp_path / "out"
    report = run_export(EXPORTER, source, out, quantize="int8", texts=stores)
    assert "layers 1, 3" in report.checks[2].about
    assert 0 < report.checks[2].measured["kl"] < 1e-2
    assert json.loads((out / "quantization.json").read_text())["perplexity"] is None
    said = "perplexity was not measured: it is too large to be run here."
    assert said in (out / "README.md").read_text()


def test_the_library_says_nothing_of_its_own(
    pico: PicoMaker, run_export: RunExport, stores: Texts, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = pico(**wide("llama"))
    capfd.readouterr()
    run_export(EXPORTER, source, tmp_path / "out", quantize="int8_sq", texts=stores)
    assert tuple(capfd.readouterr()) == ("", "")


def told(config: dict[str, Any], form: str) -> list[tuple[str, str, str, int]]:
    """What planning says: where, cause, fix and exit code."""
    export = Export.model_validate({"to": "hf", "quantize": form})
    found = EXPORTER.problems(config, export=export)
    return [(p.where, p.cause, p.fix, p.code.exit) for p in found]


def test_sizes_that_kernels_refuse_are_told_at_plan_time(pico: PicoMaker) -> None:
    config = Checkpoint.open(pico()).config | {"hidden_size": 72, "intermediate_size": 100}
    query, gate = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    for form in ("int8", "fp8", "nvfp4"):
        assert told(config, form) == [
            (
                query,
                f"{form} takes hidden in multiples of 16, and it is 72",
                "nearest: 64 or 80",
                6,
            ),
            (gate, f"{form} takes ffn in multiples of 16, and it is 100", "nearest: 96 or 112", 6),
        ]
    assert told(config, "int4_awq")[0] == (
        query, "int4_awq takes hidden in multiples of 128, and it is 72", "nearest: 128", 6,
    )  # fmt: skip
    assert told(config | {"hidden_size": 64, "intermediate_size": 96}, "nvfp4") == []


def test_what_no_form_takes_is_told_at_plan_time(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pico(**wide("llama"))
    config = Checkpoint.open(source).config
    ((_, cause, fix, code),) = told(config, "q8_0")
    assert (cause, code) == ("quantize: q8_0", 6)
    assert all(form in fix for form in FORMS)
    experts = Checkpoint.open(pico("mixtral", name="experts", **wide("mixtral"))).config
    ((_, cause, fix, code),) = told(experts, "int4_awq")
    assert (code, "nvfp4" in fix) == (6, True)
    assert "mixtral" in cause
    with pytest.raises(ParetronError) as caught:
        run_export(EXPORTER, source, tmp_path / "out", quantize="fp8")
    assert caught.value.problems[0].code is Code.USAGE
    assert "--recipe" in caught.value.problems[0].fix
    monkeypatch.setattr(quantized_forms, "TRIED", ("llama",))
    ((_, cause, _, code),) = told(experts, "int8")
    assert (cause, code) == ("mixtral was not yet quantised", 6)


def test_without_the_library_its_forms_say_how_to_get_it(
    pico: PicoMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Checkpoint.open(pico(**wide("llama"))).config
    monkeypatch.setattr(versions, "installed", lambda distribution: None)
    found = told(config, "fp8")
    assert [(cause, code) for _, cause, _, code in found] == [
        ("nvidia-modelopt is not installed", 6), ("requests is not installed", 6),
    ]  # fmt: skip
    assert found[0][2] == 'pip install "paretron[quantize]"'
    assert told(config, "int8") == []

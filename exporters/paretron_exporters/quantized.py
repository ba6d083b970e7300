"""Quantised Hugging Face checkpoints: written by us or by nvidia-modelopt, proven, published."""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretron.artifacts.config import DTYPE_NAMES, servable_config
from paretron.artifacts.jsonfile import dump, read_object
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.serving import card_engines, transformers_note, unrun_note, vllm_limit
from paretron.artifacts.staging import staged
from paretron.artifacts.writer import DEFAULT_SHARD_BYTES, TensorWriter
from paretron.data.texts import Texts
from paretron.errors import Code, ParetronError, Problem
from paretron.evaluate.parity import Bounds, ParityReport, check_names, compare, require
from paretron.families import family_of, kv_bytes_per_token, sizes
from paretron.recipe import Export
from paretron_exporters.compressed import quantization_config, write_compressed
from paretron_exporters.exporter import OnEvent
from paretron_exporters.figures import about_model, figures
from paretron_exporters.quantized_forms import FORMS, Form, Layout, stored_layout

if TYPE_CHECKING:
    import torch

    from paretron_exporters.quantized_gates import MatrixError, Written
    from paretron_exporters.quantized_model import Computed

QUANTIZATION = "quantization.json"
_RAW = ".modelopt"  # what the library writes, before it is streamed to where it belongs
_HF_QUANT = "hf_quant_config.json"


def export_quantised(
    checkpoint: Checkpoint,
    *,
    export: Export,
    out: Path,
    provenance: Provenance,
    texts: Texts | None,
    overwrite: bool,
    on_event: OnEvent,
) -> ParityReport:
    """Quantise a checkpoint and publish it once its gates have passed.

    Errors: USAGE (a form that is calibrated, and no text), UNSUPPORTED (the library cannot),
    GATE_RELOAD, GATE_PARITY with the worst tensor.
    """
    from paretron.artifacts.card import write_card
    from paretron.artifacts.companions import write_companions

    form = FORMS[str(export.quantize)]
    if form.calibrated and texts is None:
        raise _no_text(form)
    dtypes = {name: entry.dtype for name, entry in checkpoint.entries.items()}
    layout = stored_layout(form, checkpoint.family, checkpoint.config, dtypes=dtypes)
    main = DTYPE_NAMES[dtypes["model.embed_tokens.weight"]]
    config = servable_config(checkpoint.config, dtype=main)
    digests: dict[str, str] = {}
    given: dict[str, torch.Tensor] = {}
    with staged(out, provenance=provenance, overwrite=overwrite, digests=digests) as folder:
        size = export.shard_bytes or DEFAULT_SHARD_BYTES
        with TensorWriter(folder, layout, max_shard_bytes=size, digests=digests) as writer:
            if form.calibrated and texts is not None:
                said = _calibrated(
                    checkpoint, folder / _RAW, form=form, texts=texts, writer=writer,
                    layout=layout, given=given, on_event=on_event,
                )  # fmt: skip
            else:
                write_compressed(checkpoint, writer, form=form, layout=layout, on_event=on_event)
                said = quantization_config(checkpoint, form)
        write_companions(
            folder, config=config | {"quantization_config": said}, source=checkpoint.path
        )
        on_event("note", {"message": "comparing the quantised checkpoint with its source"})
        report, measured = prove(
            checkpoint, folder, form=form, layout=layout, given=given, texts=texts,
            on_event=on_event,
        )  # fmt: skip
        dump(folder / "parity.json", report.as_json())
        dump(folder / QUANTIZATION, measured)
        notes = list(_notes(config, form))
        if measured["perplexity"] is None:
            why = "no text was given" if texts is None else "it is too large to be run here"
            notes.append(f"Its perplexity was not measured: {why}.")
        engines = _engines(config, form)
        for text in notes:
            on_event("note", {"message": text})
        write_card(
            folder,
            title=f"{about_model(config)}, {form.name}",
            about=" ".join((f"{form.about}.", *notes, unrun_note(engines, config))).strip(),
            provenance=provenance,
            numbers=_numbers(config, report, measured, form=form, dtype=main),
            engines=engines,
        )
    return report


def prove(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    form: Form,
    layout: Layout,
    given: Mapping[str, torch.Tensor],
    texts: Texts | None,
    on_event: OnEvent,
) -> tuple[ParityReport, dict[str, Any]]:
    """L0 to L4 of what was written, and the content of quantization.json."""
    from paretron_exporters.quantized_gates import Written, check_layout, check_matrices
    from paretron_exporters.quantized_model import compute
    from paretron_exporters.twin import fits, twin_of

    what = (f"source {checkpoint.dtype}", f"{form.name} checkpoint")
    written = Written.open(folder, source=checkpoint, form=form, given=given)
    names = check_layout(layout, written.entries)
    require(ParityReport(*what, (names,)))
    weights, errors = check_matrices(written)
    require(ParityReport(*what, (names, weights)))
    twin = None if fits(checkpoint) else twin_of(checkpoint)
    reference = compute(checkpoint, twin=twin, texts=texts, on_event=on_event)
    candidate = compute(checkpoint, twin=twin, texts=texts, written=written, on_event=on_event)
    levels = compare(reference.observation, candidate.observation, bounds=Bounds(kl=form.kl))
    run = "" if twin is None else f", {twin.about}"
    report = ParityReport(
        f"{what[0]} in {reference.observation.engine}",
        f"{what[1]}, decoded, in {candidate.observation.engine}",
        (names, weights, *(replace(level, about=level.about + run) for level in levels)),
    )
    require(report)
    return report, _measured(written, errors, reference, candidate, texts=texts)


def _calibrated(
    checkpoint: Checkpoint,
    raw: Path,
    *,
    form: Form,
    texts: Texts,
    writer: TensorWriter,
    layout: Layout,
    given: dict[str, torch.Tensor],
    on_event: OnEvent,
) -> dict[str, Any]:
    """Calibrate, and stream what the library wrote to `raw` into files of our making.

    Scales of activations and of the cache are entered in `given`. Returns the config's section.
    """
    from paretron.artifacts.tensors import torch_dtype
    from paretron.data.store import TokenStore, sample_windows
    from paretron_exporters.modelopt import quantise
    from paretron_exporters.quantized_gates import Written

    store = TokenStore.open(texts.calibration)
    ids = sample_windows(store, texts.samples, texts.calibration_seq_len, texts.seed)
    quantise(checkpoint.path, raw, form=form, ids=ids, on_event=on_event)
    gc.collect()  # its modules refer to one another, and the gates load the model once more
    made = Written.open(raw, source=checkpoint, form=form)
    shapes = {name: shape for name, (_, shape) in layout.items()}
    names = check_names(shapes, {name: entry.shape for name, entry in made.entries.items()})
    require(ParityReport(f"table of {checkpoint.family.model_type}", "nvidia-modelopt", (names,)))
    for done, name in enumerate(layout, start=1):
        tensor = made.read(name)
        if layout[name][0] in DTYPE_NAMES:  # what is not quantised: the library has it wider
            tensor = tensor.to(torch_dtype(layout[name][0]))
        if not tensor.dim():
            given[name] = tensor.clone()
        writer.write(name, tensor)
        on_event("progress", {"done": done, "total": len(layout), "unit": "tensors"})
    shutil.copyfile(raw / _HF_QUANT, raw.parent / _HF_QUANT)
    said = read_object(raw / "config.json", code=Code.GATE_RELOAD)["quantization_config"]
    shutil.rmtree(raw)
    return dict(said)


def _measured(
    written: Written,
    errors: Mapping[str, MatrixError],
    reference: Computed,
    candidate: Computed,
    *,
    texts: Texts | None,
) -> dict[str, Any]:
    """The content of quantization.json; perplexity is null where there was no text."""
    from paretron_exporters.quantized_gates import summary

    form = written.form
    perplexity = None
    if reference.loss is not None and candidate.loss is not None:
        perplexity = {
            "tokens": reference.tokens,
            "before": _perplexity(reference.loss),
            "weights": _perplexity(candidate.loss),
            "weights_and_inputs": _perplexity(candidate.rounded_loss),
        }
    calibration = None
    if texts is not None and form.calibrated:
        calibration = {
            "samples": texts.samples, "seq_len": texts.calibration_seq_len, "seed": texts.seed
        }  # fmt: skip
    return {
        "schema": 1,
        "form": form.name,
        "bytes": {"before": written.source.nbytes, "after": written.nbytes},
        "calibration": calibration,
        "perplexity": perplexity,
        "matrices": summary(errors),
    }


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else float(f"{math.exp(min(loss, 700.0)):.6g}")


def _numbers(
    config: Mapping[str, Any],
    report: ParityReport,
    measured: Mapping[str, Any],
    *,
    form: Form,
    dtype: str,
) -> dict[str, str]:
    """The figures of the card: those of every export, and what quantisation changed."""
    numbers = figures(config, report, dtype=dtype) | {"weights": form.name}
    if form.kv_cache:
        cache = kv_bytes_per_token(family_of(config), config, bytes_per_value=1)
        numbers["key-value cache"] = f"{cache:,} bytes a token"
    size, matrices = measured["bytes"], measured["matrices"]
    worst = matrices["worst"]
    numbers |= {
        "bytes of weights before": f"{size['before']:,}",
        "bytes of weights after": f"{size['after']:,} ({size['after'] / size['before']:.1%})",
        "largest relative error of a matrix": f"{worst['relative_error']} ({worst['tensor']})",
        "mean relative error of a matrix": str(matrices["mean_relative_error"]),
    }
    if (perplexity := measured["perplexity"]) is not None:
        numbers["perplexity before"] = (
            f"{perplexity['before']} over {perplexity['tokens']:,} tokens"
        )
        numbers["perplexity with rounded weights"] = str(perplexity["weights"])
        if perplexity["weights_and_inputs"] is not None:
            numbers["perplexity with rounded weights and activations"] = str(
                perplexity["weights_and_inputs"]
            )
    return numbers


def _engines(config: Mapping[str, Any], form: Form) -> tuple[str, ...]:
    """Whose snippets the card shows: the engines that read this format and load the model."""
    read = {"vLLM": form.vllm, "TensorRT-LLM": form.calibrated}
    return tuple(engine for engine in card_engines(config) if read.get(engine))


def _notes(config: Mapping[str, Any], form: Form) -> Iterator[str]:
    """What must be known to serve it."""
    if limit := vllm_limit(config):
        yield limit
    elif not form.vllm:
        yield f"vLLM (0.32) reads no {form.name}: the format is TensorRT-LLM's, untried there."
    elif form.name != "int8":
        yield "vLLM (0.32) has kernels for this form on GPUs alone, where it was not tried."
    elif "experts" in _axes(config):
        yield "vLLM (0.32) runs its experts on GPUs and on CPUs with AMX, and was tried on neither."
    if form.vllm and form.calibrated and config["dtype"] == "float32":
        yield 'vLLM (0.32) refuses float32 beside this form: give it dtype="bfloat16".'
    if note := transformers_note(config):
        yield note
    if "experts" in _axes(config):
        yield "Activations of experts are not among those rounded for its perplexity."


def _axes(config: Mapping[str, Any]) -> Mapping[str, int]:
    return sizes(family_of(config), config)


def _no_text(form: Form) -> ParetronError:
    return ParetronError(
        Problem(
            Code.USAGE,
            f"{form.name} is calibrated on a text, and there is none",
            where="--quantize",
            fix="add --recipe RECIPE, whose data section names one",
        )
    )

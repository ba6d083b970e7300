"""The Hugging Face checkpoint that vLLM, SGLang, TensorRT-LLM and transformers all load.

Weights go tensor by tensor from reader to writer, with a cast when asked for, so no model is in
memory while writing; the gates then reload what was written as a user would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from paretron.artifacts.config import DTYPE_NAMES, relabel, servable_config
from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.serving import card_engines, transformers_note, unrun_note, vllm_limit
from paretron.artifacts.staging import staged
from paretron.artifacts.tokenizer import check_tokenizer
from paretron.artifacts.writer import DEFAULT_SHARD_BYTES
from paretron.data.texts import Texts
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.evaluate.parity import (
    BOUNDS,
    EQUAL,
    Bounds,
    Observation,
    ParityReport,
    check_names,
    compare,
    require,
    seeded_prompts,
)
from paretron.recipe import Export
from paretron_exporters.exporter import OnEvent, not_taken
from paretron_exporters.figures import about_model, figures
from paretron_exporters.hf_weights import ReadBack, write_weights, written_dtypes
from paretron_exporters.quantized import export_quantised
from paretron_exporters.quantized_forms import calibration_needs, form_problems

TAKES = frozenset({"dtype", "quantize", "shard_bytes"})
_ABOUT = "A checkpoint for transformers and engines that load its format."


class HfExporter:
    """An ordinary Hugging Face repository, by the rules that every engine's loader keeps."""

    name = "hf"

    def problems(self, config: Mapping[str, Any], *, export: Export) -> list[Problem]:
        """Shapes that no class in transformers takes under any name."""
        try:
            relabel(config)
        except ParetronError as error:
            return [*error.problems, *not_taken(export, takes=TAKES)]
        problems = not_taken(export, takes=TAKES)
        if export.quantize is not None:
            problems += form_problems(config, quantize=export.quantize)
        return problems

    def needs(self, export: Export, *, params: int, embedding_params: int) -> tuple[int, int]:
        """Nothing where weights stream; see `calibration_needs` for where they do not."""
        if export.quantize is None:
            return 0, 0
        return calibration_needs(export.quantize, params=params, embedding_params=embedding_params)

    def export(
        self,
        source: Path,
        *,
        export: Export,
        out: Path,
        provenance: Provenance,
        texts: Texts | None = None,
        overwrite: bool = False,
        on_event: OnEvent,
    ) -> ParityReport:
        """Write the checkpoint, reload it, and publish it when it is the same model.

        Without a cast logits are equal bit for bit; with one they stay within the dtype's bounds.
        Errors: GATE_RELOAD, GATE_PARITY, GATE_NONFINITE (a value that the dtype cannot hold).
        """
        from paretron.artifacts.card import write_card
        from paretron.artifacts.companions import write_companions

        checkpoint = Checkpoint.open(source)
        check_tokenizer(source, vocab=checkpoint.config["vocab_size"])
        raise_all(self.problems(checkpoint.config, export=export))
        if export.quantize is not None:
            return export_quantised(
                checkpoint, export=export, out=out, provenance=provenance, texts=texts,
                overwrite=overwrite, on_event=on_event,
            )  # fmt: skip
        dtypes = written_dtypes(checkpoint, export.dtype)
        main = DTYPE_NAMES[dtypes["model.embed_tokens.weight"]]
        unchanged = all(dtypes[n] == e.dtype for n, e in checkpoint.entries.items())
        digests: dict[str, str] = {}
        with staged(out, provenance=provenance, overwrite=overwrite, digests=digests) as folder:
            weights = write_weights(
                checkpoint,
                folder,
                dtypes=dtypes,
                shard_bytes=export.shard_bytes or DEFAULT_SHARD_BYTES,
                digests=digests,
                on_event=on_event,
            )
            config = servable_config(checkpoint.config, dtype=main)
            write_companions(folder, config=config, source=source)
            on_event("note", {"message": "comparing the export with its source"})
            report = prove(
                checkpoint, folder, weights=weights, bounds=EQUAL if unchanged else BOUNDS[main]
            )
            dump(folder / "parity.json", report.as_json())
            said = [text for text in (vllm_limit(config), transformers_note(config)) if text]
            for text in said:
                on_event("note", {"message": text})
            engines = card_engines(config)
            write_card(
                folder,
                title=about_model(config),
                about=" ".join((_ABOUT, *said, unrun_note(engines, config))).strip(),
                provenance=provenance,
                numbers=figures(config, report, dtype=main),
                engines=engines,
            )
        return report


EXPORTER = HfExporter()


def prove(
    checkpoint: Checkpoint, folder: Path, *, weights: ReadBack, bounds: Bounds
) -> ParityReport:
    """Levels L0 to L4 of what was written against its source; raises at the first that fails.

    A model too large to be run as a whole is run as its twin, and the report says so.
    """
    written = reopen(folder)
    what = (f"source {checkpoint.dtype}", f"export {written.dtype}")
    names = check_names(
        {n: e.shape for n, e in checkpoint.entries.items()},
        {n: e.shape for n, e in written.entries.items()},
    )
    require(ParityReport(*what, (names,)))
    equal = weights.check(written)
    require(ParityReport(*what, (equal,)))
    reference, candidate, run = observe_both(checkpoint, written)
    computed = compare(reference, candidate, bounds=bounds)
    report = ParityReport(
        f"{what[0]} in {reference.engine}",
        f"{what[1]} in {candidate.engine}",
        (names, equal, *(replace(c, about=c.about + run) for c in computed)),
    )
    require(report)
    return report


def observe_both(
    checkpoint: Checkpoint, written: Checkpoint
) -> tuple[Observation, Observation, str]:
    """What transformers computes of source and export, one after the other, and what was run."""
    from paretron_exporters.transformers_engine import observe_transformers
    from paretron_exporters.twin import TWIN_PROMPTS, fits, twin_config, twin_model, twin_of

    if fits(checkpoint):
        prompts = seeded_prompts(written.config)
        reference = observe_transformers(checkpoint.path, prompts)
        return reference, observe_transformers(written.path, prompts), ""
    twin = twin_of(checkpoint)
    prompts = seeded_prompts(twin_config(written.family, written.config, twin))[-TWIN_PROMPTS:]
    reference = observe_transformers(twin_model(checkpoint, twin), prompts)
    candidate = observe_transformers(twin_model(written, twin), prompts)
    return reference, candidate, f", {twin.about}"


def reopen(folder: Path) -> Checkpoint:
    """Open what was just written; what a reader would refuse is a failed gate here."""
    try:
        return Checkpoint.open(folder)
    except ParetronError as error:
        raise ParetronError(
            *(Problem(Code.GATE_RELOAD, p.cause, where=p.where) for p in error.problems)
        ) from error

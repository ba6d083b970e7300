"""The Hugging Face checkpoint that vLLM, SGLang, TensorRT-LLM and transformers all load.

Weights go tensor by tensor from reader to writer, with a cast when asked for, so no model is in
memory while writing; the gates then reload what was written as a user would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretron.artifacts.config import DTYPE_NAMES, relabel, servable_config
from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.serving import transformers_note, vllm_limit
from paretron.artifacts.staging import staged
from paretron.artifacts.tokenizer import check_tokenizer
from paretron.artifacts.writer import TensorWriter
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.evaluate.parity import (
    BOUNDS,
    EQUAL,
    Bounds,
    ParityReport,
    check_names,
    check_weights,
    compare,
    require,
    seeded_prompts,
)
from paretron.families import expected_tensors
from paretron.recipe import Export
from paretron_exporters.exporter import OnEvent, not_quantised
from paretron_exporters.figures import about_model, figures

if TYPE_CHECKING:
    import torch

_ABOUT = "A checkpoint for transformers and engines that load its format."


class HfExporter:
    """An ordinary Hugging Face repository, by the rules that every engine's loader keeps."""

    name = "hf"

    def problems(self, config: Mapping[str, Any], *, export: Export) -> list[Problem]:
        """Shapes that no class in transformers takes under any name."""
        try:
            relabel(config)
        except ParetronError as error:
            return [*error.problems, *not_quantised(export)]
        return not_quantised(export)

    def export(
        self,
        source: Path,
        *,
        export: Export,
        out: Path,
        provenance: Provenance,
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
        dtypes = written_dtypes(checkpoint, export.dtype)
        main = DTYPE_NAMES[dtypes["model.embed_tokens.weight"]]
        unchanged = all(dtypes[n] == e.dtype for n, e in checkpoint.entries.items())
        with staged(out, provenance=provenance, overwrite=overwrite) as folder:
            write_weights(checkpoint, folder, dtypes=dtypes, on_event=on_event)
            config = servable_config(checkpoint.config, dtype=main)
            write_companions(folder, config=config, source=source)
            on_event("note", {"message": "comparing the export with its source"})
            report = prove(
                checkpoint, folder, dtypes=dtypes, bounds=EQUAL if unchanged else BOUNDS[main]
            )
            dump(folder / "parity.json", report.as_json())
            limit = vllm_limit(config)
            said = [text for text in (limit, transformers_note(config)) if text]
            for text in said:
                on_event("note", {"message": text})
            write_card(
                folder,
                title=about_model(config),
                about=" ".join((_ABOUT, *said)),
                provenance=provenance,
                numbers=figures(config, report, dtype=main),
                engines=("transformers",) if limit else ("transformers", "vLLM"),
            )
        return report


EXPORTER = HfExporter()


def written_dtypes(checkpoint: Checkpoint, dtype: str | None) -> dict[str, str]:
    """The safetensors dtype that each tensor gets: its own, or the one asked for.

    UNSUPPORTED for a checkpoint in another dtype than float32, bfloat16 and float16.
    """
    if dtype is not None:
        wanted = next(k for k, v in DTYPE_NAMES.items() if v == dtype)
        return dict.fromkeys(checkpoint.entries, wanted)
    for name, entry in checkpoint.entries.items():
        if entry.dtype not in DTYPE_NAMES:
            raise ParetronError(
                Problem(
                    Code.UNSUPPORTED,
                    f"dtype {entry.dtype}; supported: {', '.join(DTYPE_NAMES)}",
                    where=f"{entry.file}: {name}",
                    fix="state the export's dtype: float32, bfloat16 or float16",
                )
            )
    return {n: e.dtype for n, e in checkpoint.entries.items()}


def write_weights(
    checkpoint: Checkpoint, folder: Path, *, dtypes: Mapping[str, str], on_event: OnEvent
) -> None:
    """Stream every tensor of the table, in its order, into safetensors shards."""
    names = expected_tensors(checkpoint.family, checkpoint.config)
    layout = {n: (dtypes[n], shape) for n, shape in names.items()}
    with TensorWriter(folder, layout) as writer:
        for done, name in enumerate(names, start=1):
            writer.write(name, cast(checkpoint, name, dtypes[name]))
            on_event("progress", {"done": done, "total": len(names), "unit": "tensors"})


def cast(checkpoint: Checkpoint, name: str, dtype: str) -> torch.Tensor:
    """One tensor of a checkpoint in a safetensors dtype; GATE_NONFINITE when it overflows."""
    import torch

    tensor = checkpoint.read(name)
    if checkpoint.entries[name].dtype == dtype:
        return tensor
    out = tensor.to(getattr(torch, DTYPE_NAMES[dtype]))
    if not torch.isfinite(out).all():
        raise ParetronError(
            Problem(
                Code.GATE_NONFINITE,
                f"{float(tensor.abs().max()):.3g} is too large for {DTYPE_NAMES[dtype]}",
                where=f"{checkpoint.entries[name].file}: {name}",
                fix="export as bfloat16 or float32",
            )
        )
    return out


def prove(
    checkpoint: Checkpoint, folder: Path, *, dtypes: Mapping[str, str], bounds: Bounds
) -> ParityReport:
    """Levels L0 to L4 of what was written against its source; raises at the first that fails."""
    from paretron_exporters.transformers_engine import observe_transformers

    written = reopen(folder)
    what = (f"source {checkpoint.dtype}", f"export {written.dtype}")
    names = check_names(
        {n: e.shape for n, e in checkpoint.entries.items()},
        {n: e.shape for n, e in written.entries.items()},
    )
    require(ParityReport(*what, (names,)))
    weights = check_weights(_pairs(checkpoint, written, dtypes), bound=0.0)
    require(ParityReport(*what, (weights,)))
    prompts = seeded_prompts(written.config)
    reference = observe_transformers(checkpoint.path, prompts)
    candidate = observe_transformers(folder, prompts)
    report = ParityReport(
        f"{what[0]} in {reference.engine}",
        f"{what[1]} in {candidate.engine}",
        (names, weights, *compare(reference, candidate, bounds=bounds)),
    )
    require(report)
    return report


def reopen(folder: Path) -> Checkpoint:
    """Open what was just written; what a reader would refuse is a failed gate here."""
    try:
        return Checkpoint.open(folder)
    except ParetronError as error:
        raise ParetronError(
            *(Problem(Code.GATE_RELOAD, p.cause, where=p.where) for p in error.problems)
        ) from error


def _pairs(
    checkpoint: Checkpoint, written: Checkpoint, dtypes: Mapping[str, str]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for name in written.entries:
        yield name, cast(checkpoint, name, dtypes[name]), written.read(name)

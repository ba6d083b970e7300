"""GGUF for llama.cpp and what builds on it, through the gguf package, streamed tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.serving import unrun_note
from paretron.artifacts.staging import staged
from paretron.artifacts.tokenizer import check_tokenizer
from paretron.data.texts import Texts
from paretron.errors import Problem, raise_all
from paretron.evaluate.parity import ParityReport
from paretron.recipe import Export
from paretron.versions import missing_or_old
from paretron_exporters.exporter import OnEvent, not_taken
from paretron_exporters.figures import about_model, figures
from paretron_exporters.gguf_limits import unsupported

TAKES = frozenset({"dtype", "quantize"})
FLOORS = {"gguf": "0.19"}
INSTALL = 'pip install "paretron[gguf]"'
FILE = "model.gguf"
_ENGINE = "llama.cpp"


class GgufExporter:
    """One file with weights, settings and tokenizer."""

    name = "gguf"

    def problems(self, config: Mapping[str, Any], *, export: Export) -> list[Problem]:
        """What llama.cpp does not compute as the model does, and rows that Q8_0 cannot block."""
        problems = unsupported(config, quantize=export.quantize)
        problems += not_taken(export, takes=TAKES)
        return [*problems, *missing_or_old(FLOORS, install=INSTALL)]

    def needs(self, export: Export, *, params: int, embedding_params: int) -> tuple[int, int]:
        """The model in float32, in memory and on disk, to be run as it was read back."""
        return 4 * params, 4 * params

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
        """Write the file, read it back, and publish it when it is the same model.

        Errors: INPUT_TOKENIZER (not a byte-level BPE), GATE_PARITY.
        """
        checkpoint = Checkpoint.open(source)
        check_tokenizer(source, vocab=checkpoint.config["vocab_size"])
        raise_all(self.problems(checkpoint.config, export=export))

        from paretron.artifacts.card import write_card
        from paretron_exporters.gguf_file import write_gguf, written_as
        from paretron_exporters.gguf_gates import prove

        kind = written_as(checkpoint, export)
        with staged(out, provenance=provenance, overwrite=overwrite) as folder:
            for note in write_gguf(checkpoint, folder / FILE, kind=kind, on_event=on_event):
                on_event("note", {"message": note})
            on_event("note", {"message": "comparing the file with its source"})
            report = prove(checkpoint, folder / FILE, kind=kind)
            dump(folder / "parity.json", report.as_json())
            dtype = {"F32": "float32", "F16": "float16"}.get(kind, "bfloat16")
            numbers = figures(checkpoint.config, report, dtype=dtype) | {"weights": kind}
            write_card(
                folder,
                title=about_model(checkpoint.config),
                about=_about(kind),
                provenance=provenance,
                numbers=numbers,
                engines=(_ENGINE,),
                library="gguf",
            )
        return report


EXPORTER = GgufExporter()


def _about(kind: str) -> str:
    """What the file is, and how to make one with fewer bits of it."""
    text = f"A GGUF file ({kind}) for llama.cpp and what builds on it. {unrun_note((_ENGINE,))}"
    if kind == "Q8_0":
        return text
    return (
        f"{text} k-quants are made of it with llama.cpp's own tool: "
        f"llama-quantize {FILE} model-Q4_K_M.gguf Q4_K_M"
    )

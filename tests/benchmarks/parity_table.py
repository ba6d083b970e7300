"""Every export of every family against its source, measured, as a page: docs/parity.md.

python tests/benchmarks/parity_table.py --out docs/parity.md --results /data/parity.jsonl

Tiny models of random weights, whose sizes every form takes, go through the installed exporters as
a run would ask for them; a form that a family is refused is listed with the reason. What is in
the file of results already is not made again. Exits 1 when something failed or left its bound.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.models import load_tokenizer
from paretron.data.texts import Texts
from paretron.data.tokens import build_token_store
from paretron.errors import ParetronError
from paretron.plugins import EXPORTERS, find_plugin
from paretron.recipe import Export
from pico import MOE_FAMILIES, PICO_FAMILIES, make_pico, pico_tokenizer

# Every form that an exporter writes, by exporter, and the bound that is promised for it.
FORMS: Mapping[str, Mapping[str, tuple[dict[str, Any], str]]] = {
    "hf": {
        "float32": ({}, "equal"),
        "bfloat16": ({"dtype": "bfloat16"}, "16 bits"),
        "float16": ({"dtype": "float16"}, "16 bits"),
        "int8": ({"quantize": "int8"}, "int8"),
        "int8_sq": ({"quantize": "int8_sq"}, "int8"),
        "fp8_dynamic": ({"quantize": "fp8_dynamic"}, "reported"),
        "fp8": ({"quantize": "fp8"}, "reported"),
        "fp8_kv": ({"quantize": "fp8_kv"}, "reported"),
        "nvfp4": ({"quantize": "nvfp4"}, "reported"),
        "int4_awq": ({"quantize": "int4_awq"}, "reported"),
    },
    "gguf": {
        "float32": ({"dtype": "float32"}, "equal"),
        "bfloat16": ({"dtype": "bfloat16"}, "16 bits"),
        "float16": ({"dtype": "float16"}, "16 bits"),
        "q8_0": ({"quantize": "q8_0"}, "int8"),
    },
    "onnx": {
        "float32": ({}, "float32"),
        "int8": ({"quantize": "int8"}, "int8"),
        "int4": ({"quantize": "int4"}, "reported"),
        "float16, cuda": ({"device": "cuda", "dtype": "float16"}, "16 bits"),
        "bfloat16, cuda": ({"device": "cuda", "dtype": "bfloat16"}, "16 bits"),
        "portable": ({"backend": "portable"}, "float32"),
    },
    "trtllm": {
        "float32": ({}, "equal"),
        "bfloat16": ({"dtype": "bfloat16"}, "16 bits"),
        "fp8": ({"quantize": "fp8"}, "reported"),
    },
    "trtllm_engine": {
        "bfloat16": ({"dtype": "bfloat16"}, "16 bits"),
        "bfloat16, TP 2": ({"dtype": "bfloat16", "tensor_parallel": 2}, "16 bits"),
        "bfloat16, PP 2": ({"dtype": "bfloat16", "pipeline_parallel": 2}, "16 bits"),
        "fp8": ({"quantize": "fp8"}, "reported"),
    },
    "triton": {
        "vLLM": ({"backend": "vllm"}, "equal"),
        "TensorRT-LLM": ({"backend": "trtllm"}, "equal"),
        "ONNX": ({"backend": "onnx"}, "float32"),
    },
}
# (quantity, largest), of L2; a spread of the logits above 1 scales differences.
BOUNDS: Mapping[str, tuple[tuple[str, float], ...]] = {
    "equal": (("max_abs", 0.0),),
    "float32": (("max_abs", 1e-4),),
    "16 bits": (("mean_abs", 5e-2), ("kl", 1e-2)),
    "int8": (("kl", 1e-2),),
    "reported": (),
}
SIZES: Mapping[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
MORE: Mapping[str, dict[str, Any]] = {"qwen3_moe": {"moe_intermediate_size": 128}}
PACKAGES = (
    "torch", "transformers", "onnxruntime", "onnxruntime-genai", "onnx", "gguf", "nvidia-modelopt",
)  # fmt: skip
SEQ_LEN = 32


@dataclass(frozen=True)
class Result:
    """One form of one family: why it is refused, what failed, or what was measured by level."""

    exporter: str
    form: str
    family: str
    refused: str = ""
    failed: str = ""
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is of."""
        return self.exporter, self.form, self.family

    @property
    def outside(self) -> str:
        """The bound that it does not keep, or nothing."""
        logits = self.measured.get("L2")
        if logits is None:
            return ""
        scale = max(1.0, logits["spread"])
        for name, most in BOUNDS[FORMS[self.exporter][self.form][1]]:
            allowed = most if name == "kl" else most * scale
            if logits[name] > allowed:
                return f"{name} {logits[name]:.3g} is above {allowed:.3g}"
        return ""

    @property
    def cell(self) -> str:
        """Its place in a table."""
        if self.refused:
            return "–"
        if self.failed or self.outside:
            return f"**{'failed' if self.failed else self.outside}**"
        logits, greedy = self.measured.get("L2"), self.measured.get("L4")
        if logits is None:
            return f"weights {self.measured['L1']['max_abs']:.2g}"
        same = f", {greedy['equal']:.0f}/{greedy['prompts']:.0f}" if greedy else ""
        return f"{logits['max_abs']:.2g}, {logits['kl']:.2g}{same}"


def main() -> None:
    """Measure what is not in the results yet, and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--results", type=Path, help="kept, and gone on from")
    parser.add_argument("--exporters", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--families", nargs="+", default=[*PICO_FAMILIES, *MOE_FAMILIES])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    done = {r.key: r for r in _kept(asked.results)}
    with tempfile.TemporaryDirectory(prefix="parity-") as name:
        work = Path(name)
        texts = _texts(work / "texts")
        for family in asked.families:
            source = make_pico(work / family, family, **{**SIZES, **MORE.get(family, {})})
            for exporter in asked.exporters:
                for form in FORMS[exporter]:
                    if (exporter, form, family) not in done:
                        result = measure(exporter, form, family, source=source, texts=texts)
                        done[result.key] = result
                        _keep(asked.results, result)
            shutil.rmtree(source)
    asked.out.write_text(page(list(done.values())), "utf-8")
    wrong = [r for r in done.values() if r.failed or r.outside]
    for result in wrong:
        print(*result.key, result.failed or result.outside, file=sys.stderr)
    raise SystemExit(bool(wrong))


def measure(exporter: str, form: str, family: str, *, source: Path, texts: Texts) -> Result:
    """One export, made and thrown away."""
    start, what = time.perf_counter(), (exporter, form, family)
    found = find_plugin(EXPORTERS, exporter, where="--exporters")
    export = Export.model_validate({"to": exporter, **FORMS[exporter][form][0]})
    config = json.loads((source / "config.json").read_text("utf-8"))
    if problems := found.problems(config, export=export):
        return Result(*what, refused=problems[0].cause)
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        try:
            report = found.export(
                source,
                export=export,
                out=Path(folder) / "out",
                provenance=Provenance(kind="export", parents={}, stamp="TEST"),
                texts=texts,
                on_event=lambda kind, fields: None,
            )
        except ParetronError as error:
            cause = f"{error.problems[0].where}: {error.problems[0].cause}"
            return Result(*what, failed=cause, seconds=time.perf_counter() - start)
    measured: dict[str, Mapping[str, float]] = {}
    for check in report.checks:  # the first of a level is the model's own
        measured.setdefault(check.level, dict(check.measured))
    seconds = round(time.perf_counter() - start, 2)
    print(f"{seconds:6.1f} s  {exporter} {form} {family}", file=sys.stderr, flush=True)
    return Result(*what, measured=measured, seconds=seconds)


def page(results: list[Result]) -> str:
    """The results as Markdown."""
    versions = ", ".join(f"{p} {v}" for p in PACKAGES if (v := _version(p)))
    lines = [
        "# Every export against its source",
        "",
        "Made by `python tests/benchmarks/parity_table.py --out docs/parity.md` on "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, on a CPU, with Python "
        f"{platform.python_version()}, {versions}. Models are tiny (2 layers, hidden size 128, "
        "random weights of seed 0, float32), so the figures show that an export is the same "
        "computation, not what a form costs a trained model.",
        "",
        "A cell holds the largest difference of a logit, KL(source || export) in nats, and how "
        "many of four prompts have the same 20 greedy tokens. A dash is a form that the exporter "
        "refuses for the family, and says so before a weight is read; the reasons follow each "
        "table. Bounds, by what a form promises: float32 1e-4 for the largest difference (0 "
        "where weights are only copied), 16 bits 5e-2 for the mean difference and 1e-2 for KL, "
        "int8 1e-2 for KL; forms of fewer bits and FP8 are reported. Where no engine here runs a "
        "form, the cell says `weights` and the largest difference of those that are stored as "
        "floating-point numbers.",
    ]
    for exporter, forms in FORMS.items():
        lines += _table(exporter, list(forms), [r for r in results if r.exporter == exporter])
    return "\n".join(lines) + "\n"


def _table(exporter: str, forms: list[str], results: list[Result]) -> Iterator[str]:
    by_key = {r.key: r for r in results}
    families = list(dict.fromkeys(r.family for r in results))
    yield from ("", f"## {exporter}", "", f"| family | {' | '.join(forms)} |")
    yield "|---" * (len(forms) + 1) + "|"
    for family in families:
        found = [by_key.get((exporter, form, family)) for form in forms]
        yield f"| {family} | {' | '.join(r.cell if r else 'not run' for r in found)} |"
    refused: dict[str, list[str]] = {}
    for result in results:
        if result.refused:
            refused.setdefault(result.refused, []).append(f"{result.family} as {result.form}")
    failed = [r for r in results if r.failed]
    if refused or failed:
        yield ""
    for result in failed:
        yield f"- {result.family} as {result.form}, stopped by its gate: {result.failed}"
    for reason, whom in refused.items():
        text = reason.replace("_", "\\_").replace("*", "\\*").replace("|", "\\|")
        yield f"- {'; '.join(whom)}: {text}".replace("<", "&lt;")


def _texts(folder: Path) -> Texts:
    """Two texts in the tokens of every pico model."""
    pico_tokenizer().save_pretrained(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    for name, start in (("calibration", 0), ("validation", 100)):
        said = [f"the cat sat on mat {start + i}, and the dog ran after it" for i in range(20)]
        build_token_store(said, tokenizer, folder / name, eos_token_id=1)
    return Texts(folder / "calibration", SEQ_LEN, 4, folder / "validation", SEQ_LEN, seed=0)


def _kept(file: Path | None) -> Iterator[Result]:
    if file is not None and file.is_file():
        yield from (Result(**json.loads(line)) for line in file.read_text("utf-8").splitlines())


def _keep(file: Path | None, result: Result) -> None:
    if file is not None:
        with file.open("a", encoding="utf-8") as kept:
            kept.write(json.dumps(asdict(result)) + "\n")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()

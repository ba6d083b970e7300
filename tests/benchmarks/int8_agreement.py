"""How often vLLM's INT8 of a model says what the model itself says, as JSON: a model and texts.

PARETRON_VLLM_PYTHON=PYTHON python tests/benchmarks/int8_agreement.py --model MODEL --texts FILE...

FILEs are text or JSON lines. The model is exported with `quantize: int8` and served by vLLM (both
weights and activations in integers) on windows drawn by a seed; agreement is the share of
positions whose likeliest next token is the one that the source gives in transformers in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from paretron.artifacts.manifest import Provenance
from paretron.artifacts.models import load_model, load_tokenizer
from paretron.data.sources import read_documents
from paretron.data.store import TokenStore, sample_windows
from paretron.data.tokens import build_token_store
from paretron.recipe import Export, TextSource
from paretron_exporters.hf import EXPORTER

WORKER = Path(__file__).parents[1] / "exporters" / "vllm_quantized_worker.py"
SEQ_LEN = 127  # one token less than the worker's context, for the one it generates


def main() -> None:
    """Print one JSON object: agreement on each text, and the sizes before and after."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=40, help="of each text")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="paretron-") as name:
        folder = Path(name)
        exported = folder / "int8"
        report = EXPORTER.export(
            asked.model,
            export=Export(to="hf", quantize="int8"),
            out=exported,
            provenance=Provenance("export"),
            on_event=lambda kind, fields: None,
        )
        windows = {t.name: windows_of(t, asked, folder / t.stem) for t in asked.texts}
        ids = torch.cat(list(windows.values()))
        served = served_by_vllm(exported, ids, folder)
        own = likeliest(asked.model, ids)
        agreement = (served == own).float().mean(1).split([len(w) for w in windows.values()])
        quantization = json.loads((exported / "quantization.json").read_text())
        found: dict[str, Any] = {
            "model": asked.model.name,
            "bytes": quantization["bytes"],
            "kl_of_rounded_weights": report.checks[2].measured["kl"],
            "mean_relative_error": quantization["matrices"]["mean_relative_error"],
            "positions": own.numel(),
            "agreement": float((served == own).float().mean()),
            "texts": {
                text: {
                    "positions": share.numel() * (SEQ_LEN - 1),
                    "agreement": float(share.mean()),
                    "spread_over_windows": statistics.stdev(share.tolist()),
                }
                for text, share in zip(windows, agreement, strict=True)
            },
            "seed": asked.seed,
        }
    json.dump(found, sys.stdout, indent=2)


def windows_of(text: Path, asked: argparse.Namespace, folder: Path) -> torch.Tensor:
    """Windows of a text, drawn by seed: int64 [windows, SEQ_LEN]."""
    documents = read_documents(TextSource(path=str(text)))
    tokenizer = load_tokenizer(asked.model)
    build_token_store(documents, tokenizer, folder, eos_token_id=int(tokenizer.eos_token_id))
    return sample_windows(TokenStore.open(folder), asked.windows, SEQ_LEN, asked.seed)


def likeliest(model: Path, ids: torch.Tensor) -> torch.Tensor:
    """The likeliest next token at each position but the last, by transformers in float32."""
    network = load_model(model)
    with torch.inference_mode():
        return torch.cat([network(window[None]).logits[:, :-1].argmax(-1) for window in ids])


def served_by_vllm(model: Path, ids: torch.Tensor, folder: Path) -> torch.Tensor:
    """The same by vLLM, from the logarithms of probabilities that it gives for a prompt."""
    answer = folder / "answer.json"
    request = {
        "models": [str(model)], "experts": [], "prompts": ids.tolist(), "steps": 1,
        "answer": str(answer),
    }  # fmt: skip
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    subprocess.run(
        [os.environ["PARETRON_VLLM_PYTHON"], "-I", str(WORKER), json.dumps(request)],
        env=environment, cwd=folder, check=True, stdout=sys.stderr,
    )  # fmt: skip
    return torch.tensor(json.loads(answer.read_text())[str(model)]["top"])


if __name__ == "__main__":
    main()

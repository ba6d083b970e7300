"""Exporting without ceremony."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from paretron.artifacts.staging import Provenance
from paretron.evaluate.parity import ParityReport
from paretron.recipe import Export

RunExport = Callable[..., ParityReport]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other crawl when other tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_export() -> RunExport:
    """`run_export(exporter, source, out, dtype=...)`, with a provenance that says test."""

    def run(
        exporter: Any,
        source: Path,
        out: Path,
        *,
        dtype: str | None = None,
        quantize: str | None = None,
        shard_bytes: int | None = None,
        backend: str | None = None,
        device: str | None = None,
        **more: Any,
    ) -> ParityReport:
        asked = {
            "to": exporter.name, "dtype": dtype, "quantize": quantize, "shard_bytes": shard_bytes,
            "backend": backend, "device": device,
        }  # fmt: skip
        report = exporter.export(
            source,
            export=Export.model_validate(asked),
            out=out,
            provenance=Provenance(kind="export", parents={"model": "0" * 64}, stamp="TEST"),
            on_event=lambda kind, fields: None,
            **more,
        )
        assert isinstance(report, ParityReport)
        return report

    return run

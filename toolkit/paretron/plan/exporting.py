"""What exports take: memory and disk, of which every exporter is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paretron.plan.cost import ModelFacts
from paretron.plan.estimate import Estimate
from paretron.plan.stages import Stage
from paretron.recipe import Export


def export_estimates(
    stages: Sequence[Stage],
    exporters: Sequence[tuple[Any, Export]],
    teacher: ModelFacts,
    students: Mapping[str, ModelFacts],
) -> dict[str, Estimate]:
    """The estimate of every export; what it makes is counted as large as what it is made from.

    Models that cannot be had, and exports that nobody makes, cost nothing.
    """
    known = {export.label: (exporter, export) for exporter, export in exporters}
    out: dict[str, Estimate] = {}
    for stage in stages:
        if stage.kind != "export":
            continue
        model = students.get(stage.student) if stage.student else teacher
        found = known.get(stage.name.partition(".export-")[2])
        if model is None or found is None:
            continue
        exporter, export = found
        embedding = model.params - model.non_embedding_params
        memory, beside = exporter.needs(export, params=model.params, embedding_params=embedding)
        out[stage.name] = Estimate(0, 0.0, memory, model.weight_bytes + beside)
    return out

"""One training as data: what the stage was asked for, and its form for worker processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretron.artifacts.manifest import (
    MANIFEST,
    Provenance,
    identity,
    read_manifest,
    sha256_file,
    versions,
)
from paretron.recipe import Correct, Distill, Pretrain, Training

OnEvent = Callable[[str, Mapping[str, object]], None]  # (kind, fields)

_SETTINGS: dict[str, type[Training]] = {
    kind.__name__: kind for kind in (Training, Pretrain, Correct, Distill)
}
# They divide the work and do not change what is learned from, nor its order: a training may go on
# with a smaller micro-batch after it ran out of memory, or on other machines with another batch.
_FREE = frozenset(
    {
        "processes", "micro_batch", "global_batch", "checkpoint_every", "activation_checkpointing",
        "stall_timeout_s", "teacher", "tensor_parallel", "compile",
    }
)  # fmt: skip
_VERSIONS = ("paretron", "torch", "transformers")


@dataclass(frozen=True)
class Job:
    """The arguments of `paretron.distill.stage.train`, which explains them."""

    student: Path
    train_tokens: Path
    teacher: Path | None
    settings: Training
    seq_len: int
    validation_tokens: Path | None
    validation_seq_len: int
    seed: int
    out: Path
    state: Path
    provenance: Provenance
    overwrite: bool
    apart: bool = False
    correct: Correct | None = None

    @property
    def untrained(self) -> bool:
        """Whether a model may know no more than one of random weights.

        In pretraining, in a rehearsal (stamped), and where a pruned model is retrained on labels.
        """
        pretrained = isinstance(self.settings, Pretrain)
        return pretrained or labels_alone(self.settings) or self.provenance.stamp is not None

    def to_json(self) -> str:
        """All fields as JSON text; paths are made absolute."""
        sections = ("settings", "correct")
        names = (f.name for f in dataclasses.fields(self) if f.name not in sections)
        fields: dict[str, Any] = {name: getattr(self, name) for name in names}
        fields = {k: str(v.absolute()) if isinstance(v, Path) else v for k, v in fields.items()}
        return json.dumps(
            fields
            | {
                "provenance": dataclasses.asdict(self.provenance),
                "settings_kind": type(self.settings).__name__,
                "settings": self.settings.model_dump(mode="json"),
                "correct": self.correct and self.correct.model_dump(mode="json"),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = json.loads(text)
        provenance = fields.pop("provenance")
        kind = _SETTINGS[fields.pop("settings_kind")]
        paths = {
            name: None if fields[name] is None else Path(fields[name])
            for name in ("student", "train_tokens", "teacher", "validation_tokens", "out", "state")
        }
        return cls(
            **fields
            | paths
            | {
                "settings": kind.model_validate(fields["settings"]),
                "correct": fields["correct"] and Correct.model_validate(fields["correct"]),
                "provenance": Provenance(
                    **provenance | {"unverified": tuple(provenance["unverified"])}
                ),
            }
        )

    def result_settings(self) -> dict[str, Any]:
        """All that the result depends on, as plain JSON: a checkpoint belongs to equal ones only.

        Inputs stand for themselves by their hashes; those that the caller knows already
        (provenance.parents) are not computed again.
        """
        known = self.provenance.parents
        inputs = {
            "student": known.get("student") or identity(self.student),
            "teacher": self.teacher and (known.get("teacher") or identity(self.teacher)),
            "train_tokens": store_identity(self.train_tokens),
            "validation_tokens": self.validation_tokens and store_identity(self.validation_tokens),
        }
        training = _bound(self.settings.model_dump(mode="json"))
        lengths: dict[str, Any] = {}  # without phases the history says what was read
        if phases := training.get("phases"):
            lengths = {"seq_len": self.seq_len}
            training["phases"] = [_bound(phase) for phase in phases]
        if self.correct is not None:  # what it shares with the student's is said there
            own = self.correct.model_dump(mode="json", exclude=set(Correct.OF_DISTILL))
            training["correct"] = own
        found = versions()
        return {
            "training": training,
            **lengths,
            "apart": self.apart,
            "validation_seq_len": self.validation_seq_len,
            "seed": self.seed,
            "inputs": inputs,
            "versions": {name: found.get(name) for name in _VERSIONS},
        }


def labels_alone(settings: Training) -> bool:
    """Whether a student is retrained conventionally: on the text, its teacher is not asked."""
    return isinstance(settings, Distill) and settings.loss.logits == "none"


def _bound(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in _FREE}


def store_identity(folder: Path) -> str:
    """The hash of a token store's files: from the manifest of its artifact, or by reading them.

    A store stands in its artifact's folder or one below it.
    """
    for artifact, prefix in ((folder, ""), (folder.parent, f"{folder.name}/")):
        if (artifact / MANIFEST).is_file():
            listed = read_manifest(artifact)["files"].items()
            files = {n.removeprefix(prefix): f["sha256"] for n, f in listed if n.startswith(prefix)}
            break
    else:
        files = {p.name: sha256_file(p) for p in sorted(folder.iterdir()) if p.is_file()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

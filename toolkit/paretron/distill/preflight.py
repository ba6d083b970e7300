"""What must hold before the first step: findings that cost seconds now and days later."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from paretron.artifacts.config import read_config
from paretron.data.tokenizer import tokenizer_sha256
from paretron.distill.batches import Batch
from paretron.distill.fused import DeferredLogits, fused_cross_entropy, fused_divergence
from paretron.distill.losses import IGNORE, forward_kl
from paretron.distill.objective import Objective, Teacher
from paretron.distill.parallel import whole
from paretron.errors import Code, ParetronError, Problem, raise_all

# KL of a model to itself, in nats: twice the same computation, so only rounding is left.
_SELF_KL_LIMIT = 1e-3
# Relative difference between the fused loss and its plain formula, both in fp32.
_FUSED_LIMIT = 1e-3
_PLAIN_POSITIONS = 64


def check_same_tokenizer(student: Path, teacher: Path) -> None:
    """INPUT_TOKENIZER unless both folders have the same tokenizer.json and vocabulary size.

    Reads no weights. Without it a student would imitate distributions over other tokens.
    """
    hashes = {"student": tokenizer_sha256(student), "teacher": tokenizer_sha256(teacher)}
    sizes = {
        "student": read_config(student)["vocab_size"],
        "teacher": read_config(teacher)["vocab_size"],
    }
    if len(set(hashes.values())) == 1 and len(set(sizes.values())) == 1:
        return
    found = ", ".join(
        f"{who}: vocabulary {sizes[who]}, tokenizer.json sha256 {hashes[who]}" for who in hashes
    )
    raise ParetronError(
        Problem(
            Code.INPUT_TOKENIZER,
            f"student and teacher do not share a tokenizer: {found}",
            where=str(student),
            fix="distil from the model that the student was pruned from",
        )
    )


def check_before_training(
    objective: Objective, teacher: Teacher | None, batch: Batch, *, untrained: bool
) -> None:
    """GATE_PREFLIGHT with every finding, or nothing; no weight and no gradient is left changed.

    `batch` is the first micro-batch, the same on every process. With `untrained`, models of
    random weights are let through, as pretraining and the twin of `paretron check` need it.
    """
    findings: list[Problem] = []
    with torch.no_grad():
        if teacher is not None:
            first, second = teacher.predict(batch.input_ids), teacher.predict(batch.input_ids)
            findings += _self_kl(first.logits, second.logits, batch)
            findings += _fused_as_plain(first.logits)
        if not untrained:
            findings += _sanity(objective, teacher, batch)
    findings += _gradients(objective, batch)
    raise_all(findings)


def _self_kl(first: DeferredLogits, second: DeferredLogits, batch: Batch) -> list[Problem]:
    """A teacher that disagrees with itself has dropout on, or overflows."""
    kl = fused_divergence(first, second, batch.labels, normaliser=batch.valid)
    if abs(float(kl)) < _SELF_KL_LIMIT:  # false for NaN
        return []
    return [
        _finding(
            f"the teacher's distance to itself is {float(kl):.3g} nats a token, not 0",
            "teacher",
            "check the teacher's weights; float32 if its activations overflow",
        )
    ]


def _fused_as_plain(teacher: DeferredLogits) -> list[Problem]:
    """The fused loss must equal its formula on this device, with these libraries."""
    flat = teacher.flat().wide()
    some = replace(flat, hidden=flat.hidden[:_PLAIN_POSITIONS])
    other = replace(some, hidden=0.9 * some.hidden)
    labels = torch.zeros(len(some.hidden), dtype=torch.int64, device=some.hidden.device)
    fused = float(fused_divergence(other, some, labels))
    plain = float(forward_kl(other.logits(), some.logits()))
    if abs(fused - plain) <= _FUSED_LIMIT * max(1.0, abs(plain)):
        return []
    return [
        _finding(
            f"the fused loss gives {fused:.6g} where its formula gives {plain:.6g}",
            f"device {some.hidden.device.type}, torch {torch.__version__}",
            "report this with the versions that `paretron doctor` prints",
        )
    ]


def _sanity(objective: Objective, teacher: Teacher | None, batch: Batch) -> list[Problem]:
    """A trained model beats the uniform guess, and predicts what comes next, not what is."""
    who = "teacher" if teacher is not None else "model"
    vocab_size = objective.student.config.vocab_size

    def loss(labels: Tensor) -> float:
        count = float((labels != IGNORE).sum())
        if teacher is None:
            return float(objective(batch.input_ids, labels, None, count)[0])
        return float(
            fused_cross_entropy(teacher.predict(batch.input_ids).logits, labels, normaliser=count)
        )

    following = loss(batch.labels)
    current = loss(batch.input_ids)
    findings = []
    if not following < math.log(vocab_size):
        findings.append(
            _finding(
                f"the {who}'s loss on the training text is {following:.3f} nats a token, no better "
                f"than guessing among {vocab_size} tokens ({math.log(vocab_size):.3f})",
                who,
                "use a trained checkpoint, and text in a language that it knows",
            )
        )
    if not following < current:
        findings.append(
            _finding(
                f"the {who} does not predict the next token ({following:.3f} nats) better than "
                f"the current one ({current:.3f}): the labels are not shifted as it was trained",
                who,
                "use a causal language model",
            )
        )
    return findings


def _gradients(objective: Objective, batch: Batch) -> list[Problem]:
    """One backward pass of the language-model loss must reach every trainable tensor."""
    objective(batch.input_ids, batch.labels, None, float(batch.valid))[0].backward()
    norms = {
        name: None if p.grad is None else float(whole(p.grad.norm()))
        for name, p in objective.student.named_parameters()
    }
    objective.zero_grad(set_to_none=True)
    unreached = [name for name, norm in norms.items() if not norm]
    broken = [name for name, norm in norms.items() if norm is not None and not math.isfinite(norm)]
    return [
        *(_finding("no gradient reaches it", name, "report this model") for name in unreached[:5]),
        *(
            _finding("its gradient is not finite", name, "train in float32, or mend the weights")
            for name in broken[:5]
        ),
    ]


def _finding(cause: str, where: str, fix: str) -> Problem:
    return Problem(Code.GATE_PREFLIGHT, cause, where=where, fix=fix)

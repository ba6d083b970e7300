"""What must hold before the first step: findings that cost seconds now and days later."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paretron.artifacts.config import read_config
from paretron.data.tokenizer import tokenizer_sha256
from paretron.distill.adapters import starts_still
from paretron.distill.batches import Batch
from paretron.distill.correction import CorrectedTeacher
from paretron.distill.fused import DeferredLogits, fused_cross_entropy, fused_divergence
from paretron.distill.losses import IGNORE, forward_kl
from paretron.distill.objective import Objective, Teaches
from paretron.distill.parallel import whole
from paretron.distill.top import TopTokens
from paretron.errors import Code, ParetronError, Problem, raise_all

# KL of a model to itself, in nats: twice the same computation, so only rounding is left.
_SELF_KL_LIMIT = 1e-3
# Relative difference between the fused loss and its plain formula, both in fp32.
_FUSED_LIMIT = 1e-3
_PLAIN_POSITIONS = 64
_PADDING_LIMIT = 0.01  # of all probability: what weight decay leaves is far less
# By how much the probabilities of a captured position may miss 1: rounding in fp32.
_MASS_LIMIT = 1e-3
# Of the gradient's norm: rounding in bf16, or a token that another expert gets by a hair.
_ACCUMULATION_LIMIT = 0.05
_PARTS = 4


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
    objective: Objective,
    teacher: Teaches | None,
    batch: Batch,
    *,
    untrained: bool,
    tokens: int | None = None,
) -> None:
    """GATE_PREFLIGHT with every finding, or nothing; no weight and no gradient is left changed.

    `batch` is the first micro-batch, the same on every process. With `untrained`, models of
    random weights are let through, as pretraining and the twin of `paretron check` need it.
    A teacher that learns along is one that gradients must reach, too.
    The first `tokens` rows of the vocabulary have a token (None: unknown), the others pad it.
    """
    vocab_size = objective.student.config.vocab_size
    findings: list[Problem] = []
    with torch.no_grad():
        if teacher is not None:
            findings += _of_teacher(teacher, batch, vocab_size=vocab_size, untrained=untrained)
            if tokens is not None and not untrained:
                findings += _padding(teacher, batch, tokens=tokens, vocab_size=vocab_size)
        elif not untrained:

            def loss(labels: Tensor) -> float:
                count = float((labels != IGNORE).sum())
                return float(objective(replace(batch, labels=labels), None, count)[0])

            findings += _sanity("model", loss, batch, vocab_size=vocab_size)
    valid = float(batch.valid)
    own = objective(batch, None, valid)[0]
    findings += _gradients(objective.student, own) or _accumulation(objective, batch)
    if isinstance(teacher, CorrectedTeacher):
        findings += _gradients(teacher.model, teacher(batch, valid)[0])
    raise_all(findings)


def check_teacher(teacher: Teaches, batch: Batch, *, vocab_size: int, untrained: bool) -> None:
    """GATE_PREFLIGHT with every finding about a teacher alone, or nothing."""
    raise_all(_of_teacher(teacher, batch, vocab_size=vocab_size, untrained=untrained))


def _of_teacher(
    teacher: Teaches, batch: Batch, *, vocab_size: int, untrained: bool
) -> list[Problem]:
    logits, again = teacher.predict(batch).logits, teacher.predict(batch).logits
    if isinstance(logits, DeferredLogits) and isinstance(again, DeferredLogits):
        findings = _self_kl(logits, again, batch) + _fused_as_plain(logits)
    else:
        findings = _whole(logits) if isinstance(logits, TopTokens) else []
    if untrained:
        return findings
    return findings + _sanity(
        "teacher", lambda labels: _label_loss(logits, labels), batch, vocab_size=vocab_size
    )


def _label_loss(logits: DeferredLogits | TopTokens, labels: Tensor) -> float:
    """The mean over positions that count."""
    valid = labels != IGNORE
    if isinstance(logits, TopTokens):
        kept = logits.flat().at(valid.flatten().nonzero().squeeze(1))
        return float(kept.label_losses(labels[valid]).mean())
    return float(fused_cross_entropy(logits, labels, normaliser=float(valid.sum())))


def _padding(teacher: Teaches, batch: Batch, *, tokens: int, vocab_size: int) -> list[Problem]:
    """Rows without a token get next to no probability from a teacher that was trained."""
    if tokens >= vocab_size:
        return []
    logits = teacher.predict(batch).logits
    if isinstance(logits, TopTokens):
        padding = logits.ids >= tokens
        mass = logits.log_probabilities.exp().masked_fill(~padding, 0.0).sum(-1).mean()
    else:
        flat = logits.flat().wide()
        some = replace(flat, hidden=flat.hidden[:_PLAIN_POSITIONS], tokens=None)
        mass = some.logits().softmax(-1)[:, tokens:].sum(-1).mean()
    if float(mass) < _PADDING_LIMIT:
        return []
    return [
        _finding(
            f"the teacher gives {float(mass):.1%} of its probability to the {vocab_size - tokens} "
            f"rows of its vocabulary beyond the {tokens} that have a token",
            "teacher",
            "use the tokenizer that the teacher was trained with",
        )
    ]


def _whole(top: TopTokens) -> list[Problem]:
    """What was captured of a position is one distribution over the vocabulary."""
    mass = top.log_probabilities.exp().sum(-1) + top.log_rest.exp().squeeze(-1)
    ordered = bool((top.ids[..., 1:] > top.ids[..., :-1]).all())
    inside = int(top.ids.min()) >= 0 and int(top.ids.max()) < top.num_tokens
    if ordered and inside and bool(((mass - 1).abs() < _MASS_LIMIT).all()):
        return []
    return [
        _finding(
            "what was captured of the teacher is no distribution over the vocabulary",
            "teacher",
            "capture again",
        )
    ]


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
    with torch.autocast(some.hidden.device.type, enabled=False):  # in the precision made above
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


def _sanity(
    who: str, loss: Callable[[Tensor], float], batch: Batch, *, vocab_size: int
) -> list[Problem]:
    """A trained model beats the uniform guess, and predicts what comes next, not what is."""
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


def _gradients(model: PreTrainedModel, loss: Tensor) -> list[Problem]:
    """One backward pass of the language-model loss must reach every trainable tensor."""
    loss.backward()
    norms = {
        name: None if p.grad is None else float(whole(p.grad.norm()))
        for name, p in model.named_parameters()
        if p.requires_grad and not starts_still(name)
    }
    model.zero_grad(set_to_none=True)
    unreached = [name for name, norm in norms.items() if not norm]
    broken = [name for name, norm in norms.items() if norm is not None and not math.isfinite(norm)]
    return [
        *(_finding("no gradient reaches it", name, "report this model") for name in unreached[:5]),
        *(
            _finding("its gradient is not finite", name, "train in float32, or mend the weights")
            for name in broken[:5]
        ),
    ]


# What is compiled for the shape of the training's batches is not compiled for another one.
@torch.compiler.set_stance("force_eager")
def _accumulation(objective: Objective, batch: Batch) -> list[Problem]:
    """Four quarters of a batch, one after the other, must give the gradient of all at once.

    The quarters' gradients are subtracted from that of the whole, so no memory is needed for both.
    """
    seq_len = batch.input_ids.shape[1] // _PARTS
    if seq_len < 2:
        return []
    whole_parts = seq_len * _PARTS
    short = Batch(
        batch.input_ids[:, :whole_parts].reshape(-1, seq_len),
        batch.labels[:, :whole_parts].reshape(-1, seq_len),
        tuple(number for number in batch.window_ids for _ in range(_PARTS)),
    )
    valid = float(max(short.valid, 1))
    objective(short, None, valid)[0].backward()
    at_once = _gradient_norm(objective)
    for part in short.split(len(short.window_ids) // _PARTS):
        (-objective(part, None, valid)[0]).backward()
    left = _gradient_norm(objective)
    objective.zero_grad(set_to_none=True)
    if left <= _ACCUMULATION_LIMIT * at_once:
        return []
    return [
        _finding(
            f"the gradients of {_PARTS} micro-batches differ from those of the whole batch by "
            f"{left / at_once:.1%}",
            "student",
            "use micro_batch = global_batch, and report this model: its windows are not "
            "independent of each other",
        )
    ]


def _gradient_norm(objective: Objective) -> float:
    """Of all gradients together; a collective call where they are sharded."""
    found = (p.grad for p in objective.student.parameters())
    return math.hypot(*(float(whole(grad.norm())) for grad in found if grad is not None))


def _finding(cause: str, where: str, fix: str) -> Problem:
    return Problem(Code.GATE_PREFLIGHT, cause, where=where, fix=fix)

"""Ridge refit of a layer's experts, one after another, each to what those before it left missing.

What a token lacks behind the experts is a sum over those that it is routed to, so no expert has a
target of its own: the first takes over what its neurons tell of the whole, the next of what is
left. Each sweep step lowers the joint error (block coordinate descent). The students' own router
decides which tokens count, and by how much; it is not fitted beyond reading its norm through the
fitted map, so the tokens of experts that were removed are made up for by those that take them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.functional import linear

from paretron.compensate.moments import Moments
from paretron.importance.experts import Experts

_TOKENS_AT_ONCE = 1024


class ExpertTokens:
    """The tokens of one layer's experts: what was read, by which experts, and what is missing.

    The two large ones, [N, K] fp32, lie in files of `folder` that are mapped: an expert reads and
    changes only the rows of its own tokens.
    """

    def __init__(self, folder: Path, tokens: int, width: int) -> None:
        self._read = _mapped(folder / "read.bin", tokens, width)
        self._missing = _mapped(folder / "missing.bin", tokens, width)
        self._choices: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []
        self._filled = 0

    def add(
        self,
        read_nK: torch.Tensor,
        choices_nk: torch.Tensor,
        weights_nk: torch.Tensor,
        missing_nK: torch.Tensor,
    ) -> None:
        """Count n tokens: what experts read, which, their routing weights, what should be added."""
        rows = slice(self._filled, self._filled + len(read_nK))
        self._read[rows] = read_nK.cpu()
        self._missing[rows] = missing_nK.cpu()
        self._choices.append(choices_nk.cpu())
        self._weights.append(weights_nk.cpu())
        self._filled = rows.stop

    @torch.no_grad()
    def fits(self, experts: Experts, *, ridge: float) -> Iterator[tuple[int, torch.Tensor]]:
        """Of each expert that any token is routed to: its number, what to add to its matrix.

        An expert with fewer tokens than its even share is drawn the closer to the matrix it has:
        its ridge grows in proportion, as if the tokens that it lacks had told nothing.
        """
        choices, weights = torch.cat(self._choices), torch.cat(self._weights)
        even = choices.numel() / len(experts.down_proj)
        for e in range(len(experts.down_proj)):
            tokens, places = torch.where(choices == e)
            if not len(tokens):
                continue
            parts = list(zip(tokens.split(_TOKENS_AT_ONCE), places.split(_TOKENS_AT_ONCE),
                             strict=True))  # fmt: skip
            outputs, inputs = experts.down_proj[e].shape
            moments = Moments.zeros(inputs, outputs, device=experts.down_proj.device)
            for some, where in parts:
                a = self._neurons(experts, e, some, weights[some, where])
                moments.add(a, self._missing[some].to(a.device))
            added = moments.solve(ridge=ridge * max(1.0, even / len(tokens))).float()
            for some, where in parts:
                a = self._neurons(experts, e, some, weights[some, where])
                self._missing[some] -= linear(a, added).cpu()
            yield e, added

    def _neurons(
        self, experts: Experts, e: int, tokens: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """What an expert's down projection reads of some tokens, times their routing weight."""
        matrix = experts.gate_up_proj[e]
        gate, up = linear(self._read[tokens].to(matrix), matrix).chunk(2, dim=-1)
        return experts.act_fn(gate) * up * weights.to(matrix)[:, None]


def _mapped(path: Path, rows: int, columns: int) -> torch.Tensor:
    flat = torch.from_file(str(path), shared=True, size=rows * columns, dtype=torch.float32)
    return flat.view(rows, columns)

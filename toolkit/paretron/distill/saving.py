"""Checkpoints written while the training goes on: copied at once, written by a thread."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace

from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from paretron.distill.history import History
from paretron.distill.state import StateFolder

# Plain copies in host memory, whose place the next copy takes again.
_COPIES = StagingOptions(
    use_pinned_memory=False,
    use_shared_memory=False,
    use_async_staging=False,
    use_non_blocking_copy=False,
)


class Saves:
    """The checkpoints that one training begins; at most one is being written.

    The thread talks to the other processes over connections of its own, and dies with the process:
    what it leaves half written is hidden and removed by the next one.
    """

    def __init__(self, state: StateFolder, *, step: int) -> None:
        """`step` is that of the newest checkpoint there is; 0 for none."""
        self._begun = step
        self._state = replace(state, world=state.world.apart())
        self._stager = DefaultStager(_COPIES)
        self._writing: Future[None] | None = None

    def begin(self, step: int, tensors: Mapping[str, Tensor], history: History) -> None:
        """Copy the state after `step` steps, and publish it while the caller goes on.

        Nothing happens where that is the newest checkpoint already. Errors: as `finish`.
        """
        self.finish()
        if self._begun == step:
            return
        copies = self._stager.stage(dict(tensors))
        curves = History(list(history.train), list(history.validation))
        self._writing, self._begun = Future(), step
        threading.Thread(
            target=self._write, args=(self._writing, step, copies, curves), daemon=True
        ).start()

    def newly_published(self) -> int | None:
        """The step of a checkpoint that was published since this was asked last.

        Errors: DISK and whatever else kept the one begun last from being written.
        """
        if self._writing is None or not self._writing.done():
            return None
        self._writing.result()
        self._writing = None
        return self._begun

    def finish(self) -> None:
        """Wait until nothing is being written. Errors: as `newly_published`."""
        if self._writing is not None:
            self._writing.result()

    def abandon(self) -> None:
        """Wait likewise, after an error that matters more than any of the writing."""
        if self._writing is not None:
            self._writing.exception()

    def _write(
        self, writing: Future[None], step: int, tensors: dict[str, Tensor], history: History
    ) -> None:
        try:
            self._state.save(step, tensors, history)
        except BaseException as error:
            writing.set_exception(error)
        else:
            writing.set_result(None)

"""A training in several processes on this machine: its events and errors are ours."""

from __future__ import annotations

from paretron.distill.job import Job, OnEvent
from paretron.distill.stall import stalled
from paretron.errors import Code, ParetronError, Problem
from paretron.workers import launch as workers


def launch(job: Job, *, on_event: OnEvent) -> None:
    """Run the job in `settings.processes` processes and wait; their error is raised here.

    A request to stop is passed on to the leading worker, which saves first. Errors: those of the
    workers, DEVICE when one of them died or they wait for each other.
    """
    try:
        workers.launch(
            "paretron.distill.worker",
            job.to_json(),
            processes=job.settings.processes,
            died=Problem(
                Code.DEVICE,
                "a training process died",
                where=str(job.state),
                fix="the same command continues from the last checkpoint; fewer processes or a "
                "smaller micro_batch if memory ran out",
            ),
            hands_on_stop=True,
            on_event=on_event,
        )
    except (RuntimeError, ParetronError) as error:
        # Whose end is noticed first, that of a process that gave up or of one that was killed for
        # not answering, is chance; a file of stacks tells the cause.
        told = isinstance(error, ParetronError) and error.problems[0].code is not Code.DEVICE
        stacks = [] if told else stalled(job.state)
        if not stacks:
            raise
        raise ParetronError(
            Problem(
                Code.DEVICE,
                f"the training did not move for {job.settings.stall_timeout_s} seconds; where each "
                f"process was stands in {', '.join(p.name for p in stacks)}",
                where=str(job.state),
                fix="the same command continues from the last checkpoint; a longer "
                "stall_timeout_s if it was only slow",
            )
        ) from error

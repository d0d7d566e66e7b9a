"""The settings of downstream tasks."""

from typing import Annotated

from pydantic import Field

from bilect.config.base import Settings

__all__ = ["TasksConfig"]


class TasksConfig(Settings):
    """On which tasks the models of a run are evaluated, and on how much of each."""

    names: tuple[str, ...] = Field(
        (),
        description="lm-eval names, as arc_easy (data from the Hub), or task files (.yaml) over local data, see "
        "examples/tasks (needs bilect[eval]); none: no tasks",
    )
    limit: Annotated[int, Field(gt=0)] | None = Field(None, description="first examples of each task; None for all")

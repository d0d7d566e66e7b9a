"""What an engine is: it applies a function to items, somewhere, and gives the results in the order of the items.

*What* is done never depends on *where*: items are files, or blocks of files, that are cut the same for every engine and
any number of workers. A function writes its result as a file, whole or not at all, and returns a few figures. So every
engine leaves the same files, and a run that one engine has begun another goes on with.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

__all__ = ["ATTEMPTS", "Engine", "Here"]

ATTEMPTS = 3  # at an item whose worker dies

Item = TypeVar("Item")
Result = TypeVar("Result")


class Engine(ABC):
    """Where work runs. A context manager: workers start with the first work, and end with it."""

    @abstractmethod
    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """``function`` of every item, in the order of the items; a few items are at work or waiting at a time.

        A worker is sent the function once per call, so it may hold what all items need, and keep what it has opened.

        Args:
            function: can be pickled; applied to the same item again it does the same, since a worker may die.
            items: can be pickled; taken as they are needed.

        Raises:
            Exception: what the function raises, of the first item in order; the later ones are dropped.
            BilectError: workers keep dying at an item.
        """

    @abstractmethod
    def close(self) -> None:
        """End the workers, whatever they are at."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Here(Engine):
    """This process, with all of its threads."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See ``Engine``."""
        return map(function, items)

    def close(self) -> None:
        """Nothing was started."""

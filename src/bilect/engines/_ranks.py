"""Ranks as workers. Nobody names this engine: where ``torchrun`` has started several processes, they share the work.

An item is done by one rank, which one follows from its place; results come in the order of the items. The ranks meet
after every few items, so items should be of one size. A rank that dies ends all of them, as ``torchrun`` has it.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from bilect.engines._calls import portable
from bilect.engines.contract import Engine, Item, Result
from bilect.runtime import distributed

__all__ = ["Led", "Together"]

AT_ONCE = 4  # items of a rank between two meetings


class Together(Engine):
    """For work that all ranks are in: each calls ``map`` with the same items, and each is given every result."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See ``Engine``; the function need not be pickled."""
        for some in _parts(items):
            yield from distributed.spread(function, some)

    def close(self) -> None:
        """Nothing was started."""


class Led(Engine):
    """For work of the main rank alone: it calls ``map``, the others ``serve`` until it has called ``release``."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See ``Engine``."""
        given: Callable[[Item], Result] | None = function
        for some in _parts(items):
            distributed.from_main((given, some))
            given = None  # they have it
            for done, value in distributed.spread(partial(_outcome, function), some):
                if not done:
                    raise value
                yield value

    def serve(self) -> None:
        """Do what the main rank hands out, until it releases this one."""
        function: Callable[[Any], Any] | None = None
        while (message := distributed.from_main(None)) is not None:
            given, some = message
            function = given or function
            assert function is not None
            distributed.spread(partial(_outcome, function), some)

    def release(self) -> None:
        """Let the others go on."""
        distributed.from_main(None)

    def close(self) -> None:
        """Nothing was started."""


def _outcome(function: Callable[[Item], Result], item: Item) -> tuple[bool, Any]:
    try:
        return True, function(item)
    except Exception as error:
        return False, portable(error)


def _parts(items: Iterable[Item]) -> Iterator[list[Item]]:
    rest = iter(items)
    while some := list(islice(rest, AT_ONCE * distributed.world_size())):
        yield some

"""The one exception that users see as a single clear line (exit code 2)."""

__all__ = ["BilectError"]


class BilectError(Exception):
    """Something the user can put right: bad input, a bad setting, a missing extra.

    The message is one line that says what is wrong, where, and what to do.
    """

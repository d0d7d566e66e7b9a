"""The bilevel algorithms on top of ``bilect.functional``."""

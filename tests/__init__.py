"""Tests; a package, so that no package of this name in the environment takes its place."""

"""The stages of a run: each reads files of the run directory and writes files; nothing else passes between them.

Every stage is a function of the run, a scratch folder for its results and, where it repeats, the round; it returns
figures for the manifest. ``bilect.pipeline`` puts them in order.
"""

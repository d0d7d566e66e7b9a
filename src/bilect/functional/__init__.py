"""The mathematics of bilevel data selection: tensors in, tensors out.

Nothing here knows models, files, ranks or configuration. Axes in names: B documents of a batch,
M documents of the global batch (all ranks), T positions, N predicted tokens (flattened), D width, V vocabulary.
Parameters, gradients and directions are trees: ``dict[str, Tensor]`` with equal keys and shapes.
"""

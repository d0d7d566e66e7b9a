"""Floating-point operations (FLOPs) of a model's passes, counted from its matrices.

    forward per token = 2 * (matrix parameters, head included) + 2 * layers * width * context    (causal attention)

A backward pass costs twice a forward pass; a multiply-add counts as two (Kaplan et al. 2020, section 2.1,
with the mean causal attention span of half the context).
"""

from transformers import PreTrainedModel

__all__ = ["forward_flops"]


def forward_flops(model: PreTrainedModel, tokens: float, context: float) -> float:
    """FLOPs of a forward pass.

    Args:
        model: any transformer; a head tied to the embedding counts once, an embedding look-up costs nothing.
        tokens: number of tokens in all.
        context: tokens per sequence.
    """
    trunk: PreTrainedModel = getattr(model, "trunk", model)
    config = trunk.config.get_text_config()
    table = trunk.get_input_embeddings().weight
    head = model.get_output_embeddings()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2 and p is not table)
    if head is not None and head.weight is table:
        matrices += table.numel()
    return tokens * (2.0 * matrices + 2.0 * config.num_hidden_layers * config.hidden_size * context)

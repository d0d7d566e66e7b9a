"""Directional derivatives of document losses by one backward pass: ghost dot products.

    d_i = < grad l_i, z > = sum over modules of < dl_i/dy_i , J_theta y(x_i) z >

Each module that owns parameters contributes the product of its output's gradient with the tangent of its output under
z, its input held fixed. For a linear layer that is ``sum_t <g_it, Z x_it>``. No gradient of a parameter is ever formed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from bilect.data.batch import Batch
from bilect.errors import BilectError
from bilect.functional.directional import directional_jvp
from bilect.functional.losses import document_mean, token_losses, weighted_token_loss
from bilect.functional.trees import Tree
from bilect.models.causal_lm import CausalLM

__all__ = ["directional_ghost"]


class _Contraction:
    """Forward hooks that add every module's contribution to ``d_B`` while gradients flow back."""

    def __init__(self, z: Tree, names: dict[int, str], n_documents: int, like: Tensor) -> None:
        self.z, self.names, self.n_documents = z, names, n_documents
        self.d_B = torch.zeros(n_documents, dtype=like.dtype, device=like.device)
        self.starts: list[Tensor] = []
        self._inside = False

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        if self._inside:
            return None
        if isinstance(output, Tensor) and output.shape[0] == 1:  # the same for all documents: absolute positions
            output = output.expand(self.n_documents, *output.shape[1:])
        if not isinstance(output, Tensor) or output.shape[0] != self.n_documents:
            kind = type(module).__name__
            raise BilectError(f"ghost products need outputs with one row per document; {kind} gives others; use jvp")
        if not output.requires_grad:  # the first modules: no gradient is needed further down
            output = output.detach().requires_grad_()
            self.starts.append(output)
        own = {k: p.detach() for k, p in module.named_parameters(recurse=False)}
        tangents = {k: self.z[self.names[id(p)]] for k, p in module.named_parameters(recurse=False)}
        inputs = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)

        def contract(gradient: Tensor) -> None:
            self._inside = True
            try:
                tangent = jvp(lambda p: functional_call(module, p, inputs, kwargs), (own,), (tangents,))[1]
                self.d_B += (gradient * tangent.detach()).flatten(1).sum(dim=1)
            finally:
                self._inside = False

        output.register_hook(contract)
        return output


def directional_ghost(model: CausalLM, batch: Batch, z: Tree) -> Tensor:
    """``d_B`` at the model's own parameters: one forward pass and one backward pass over activations only.

    Args:
        model: the proxy.
        batch: documents; their losses are means over their predicted tokens.
        z: direction, keyed like ``model.params()``.

    Raises:
        BilectError: a module's output does not keep the documents apart in its first axis.
    """
    params = model.params()
    names = {id(p): name for name, p in params.items()}
    contraction = _Contraction(z, names, batch.n_documents, next(iter(z.values())))
    owners = [m for m in model.trunk.modules() if next(m.parameters(recurse=False), None) is not None]
    required = {name: p.requires_grad for name, p in params.items()}
    handles = [m.register_forward_hook(contraction.hook, with_kwargs=True) for m in owners]
    try:
        for p in params.values():
            p.requires_grad_(False)
        with torch.enable_grad():
            hidden_ND = batch.predicting(model.hidden(batch.input_ids_BT))
            loss, _ = weighted_token_loss(hidden_ND, model.head(), batch.labels_N, batch.token_mean_weight_N())
            torch.autograd.grad(loss, contraction.starts)
    finally:
        for handle in handles:
            handle.remove()
        for name, p in params.items():
            p.requires_grad_(required[name])

    fixed = hidden_ND.detach()
    own = {k: params[k].detach() for k in model.head_names}

    def losses(p: Tree) -> Tensor:
        ce_N = token_losses(fixed, model.head(p), batch.labels_N).ce_N
        return document_mean(ce_N, batch.document_N, batch.n_documents)

    return contraction.d_B + directional_jvp(losses, own, {k: z[k] for k in own})

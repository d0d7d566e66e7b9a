"""A causal LM seen as trunk and head, so that logits need never exist for a whole batch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from bilect.errors import BilectError
from bilect.functional.losses import Head
from bilect.functional.trees import Tree
from bilect.models.output_head import check_output, scale_and_cap

__all__ = ["CausalLM", "instead", "share_vocabulary"]

Result = TypeVar("Result")


class CausalLM:
    """``logits = head(trunk(input_ids))`` for any Hugging Face causal LM, with its own or with given parameters.

    Batches are padded on the right, so a causal trunk needs no attention mask: real positions never see padding.
    The split is checked once against the model's own logits.

    Attributes:
        model: the wrapped model, in evaluation mode (no dropout).
        vocabulary: ids that the head's logits are of: all its rows, or fewer; see ``share_vocabulary``.

    Raises:
        BilectError: the model has no trunk or head of the usual form.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        head = model.get_output_embeddings()
        trunk = getattr(model, model.base_model_prefix, None)
        if head is None or trunk is None or not hasattr(head, "weight"):
            raise BilectError(f"{type(model).__name__} is not a causal LM with a trunk and an output embedding")
        self.trunk: nn.Module = trunk
        self._prefix = model.base_model_prefix + "."
        names = {id(p): n for n, p in model.named_parameters()}
        self._weight_name = names[id(head.weight)]
        bias = getattr(head, "bias", None)
        self._bias_name = None if bias is None else names[id(bias)]
        self._form = scale_and_cap(model.config)
        self.vocabulary = int(head.weight.shape[0])
        check_output(model, trunk, head, self.vocabulary, form=self._form, product=self._product)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.model.device

    def params(self) -> Tree:
        """The parameters themselves, by name; tied tensors once."""
        return dict(self.model.named_parameters())

    def hidden(self, input_ids_BT: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """Last hidden states (B, T, D)."""
        inputs = {"input_ids": input_ids_BT, "use_cache": False}
        if params is None:
            return self.trunk(**inputs).last_hidden_state
        own = {k.removeprefix(self._prefix): v for k, v in params.items() if k.startswith(self._prefix)}
        return functional_call(self.trunk, own, (), inputs).last_hidden_state

    def call(self, input_ids_BT: Tensor, work: Callable[[Tensor, Head], Result]) -> Result:
        """``work`` of last hidden states and head, inside the model's own forward call: it may be sharded (FSDP2)."""

        def forward(input_ids: Tensor) -> Result:
            return work(self.hidden(input_ids), self.head())

        with instead(self.model, forward):
            result: Result = self.model(input_ids_BT)
            return result

    def head(self, params: Mapping[str, Tensor] | None = None) -> Head:
        """The output head, of the first ``vocabulary`` ids."""
        tree = self.params() if params is None else params
        weight_VD, bias_V = tree[self._weight_name], None if self._bias_name is None else tree[self._bias_name]
        if self.vocabulary < weight_VD.shape[0]:
            weight_VD, bias_V = weight_VD[: self.vocabulary], None if bias_V is None else bias_V[: self.vocabulary]
        return Head(weight_VD, bias_V, *self._form)

    @property
    def head_names(self) -> list[str]:
        """Names of the head's parameters."""
        return [self._weight_name] + ([] if self._bias_name is None else [self._bias_name])

    def _product(self, hidden_BTD: Tensor) -> Tensor:
        head = self.head()
        return nn.functional.linear(hidden_BTD, head.weight_VD, head.bias_V)


@contextmanager
def instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another ``forward`` for this instance; one that was set on it before comes back."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def share_vocabulary(a: CausalLM, b: CausalLM) -> None:
    """Cut the logits of both to the ids that both have.

    Models of one tokenizer have embeddings padded to different sizes (Qwen2.5's 0.5B and 7B). No token has the ids that
    are cut off, and a divergence needs distributions over the same ids.
    """
    a.vocabulary = b.vocabulary = min(a.vocabulary, b.vocabulary)

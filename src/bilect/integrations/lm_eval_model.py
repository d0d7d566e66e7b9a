"""A model of ours as lm-eval sees it. Imported late: needs ``bilect[eval]``."""

from typing import Any

from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bilect.data.tokens import start_token
from bilect.errors import BilectError
from bilect.models.flops import forward_flops

__all__ = ["LMEvalModel"]


class LMEvalModel(HFLM):
    """Log-likelihoods and generated text for one task of lm-eval, on one device.

    Every text starts with the start token, as every document does in training. What is longer than the context loses
    tokens from its left, as lm-eval has it.

    Args:
        model: a causal LM, already on its device.
        tokenizer: of the model; every text it encodes afterwards starts with the start token.
        context: greatest input, tokens; None: what the model's config says.
        batch_tokens: padded tokens per batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None = None,
        batch_tokens: int = 8192,
    ) -> None:
        start_id = start_token(tokenizer)
        start = str(tokenizer.convert_ids_to_tokens(start_id))
        # most tokenizers, ours among them, add no such token by themselves, whatever they are asked
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, start_id)]
        )
        super().__init__(
            model, tokenizer=tokenizer, max_length=context, add_bos_token=True, prefix_token_id=start_id, batch_size=1
        )
        self.batch_tokens, self.flops, self.tokens = batch_tokens, 0.0, 0
        self._fit_batch(self.max_length)

    def _fit_batch(self, longest: int) -> None:
        self.batch_size_per_gpu = max(1, self.batch_tokens // min(longest, self.max_length))

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        self.tokens += inps.numel()
        self.flops += forward_flops(self.model, inps.numel(), inps.shape[1])
        return super()._model_call(inps, attn_mask, labels)

    def _loglikelihood_tokens(self, requests: list[Any], **settings: Any) -> list[tuple[float, bool]]:
        """As lm-eval; but an answer longer than the context is scored in pieces of half that length, not refused."""
        pieces, of_request = [], []
        for number, (texts, given, answer) in enumerate(requests):
            if not answer:
                raise BilectError(f"tasks: the answer {texts[1]!r} has no tokens; correct the data")
            step = len(answer) if len(answer) <= self.max_length else max(1, self.max_length // 2)
            for first in range(0, len(answer), step):
                pieces.append((texts, given + answer[:first], answer[first : first + step]))
                of_request.append(number)
        self._fit_batch(max(len(given) + len(piece) for _, given, piece in pieces))
        found = [(0.0, True)] * len(requests)
        for number, (log_likelihood, greedy) in zip(
            of_request, super()._loglikelihood_tokens(pieces, **settings), strict=True
        ):
            found[number] = found[number][0] + log_likelihood, found[number][1] and greedy
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: here lm-eval sets the start token itself, and would count a second one as text."""
        self.add_bos_token = False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = True

"""When the reference starts again from the model, and on which batches it takes its steps."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bilect.bilevel.online.choice import token_mean
from bilect.bilevel.online.feeds import Feed, check_batch
from bilect.bilevel.online.reference import Reference, copy_of
from bilect.bilevel.online.token_loss import TokenBatch, TokenForward
from bilect.bilevel.online.wrappers import unwrap
from bilect.errors import BilectError
from bilect.models.checks import disagreement, own_tokenizer
from bilect.models.loading import load_causal_lm

__all__ = ["FIRST_BATCHES", "Given", "Synchroniser", "fixed_reference", "make_reference"]

FIRST_BATCHES = 32  # training batches seen before the first synchronisation, where no lower_loader gives others

Given = nn.Module | Callable[[], nn.Module] | str | Path | None


def make_reference(given: Given, model: nn.Module, forward: TokenForward, options: dict[str, Any]) -> Reference:
    """A model for w or m to live in.

    Args:
        given: a model, a function that makes one, a name, directory or GGUF file to load; None: a copy of the model.
        model: the model in training, wrapped or not.
        forward: its token losses.
        options: of ``Reference``.
    """
    if isinstance(given, (str, Path)):
        made: nn.Module = load_causal_lm(str(given)).to(next(forward.base.parameters()).device)
    elif isinstance(given, nn.Module):
        made = given
    else:
        made = copy_of(model) if given is None else given()
    return Reference(made, **options)


def fixed_reference(given: Given, model: nn.Module, forward: TokenForward, options: dict[str, Any]) -> Reference:
    """A given w that stays as it is; see ``make_reference``. Its embeddings may be padded to another size than u's.

    Raises:
        BilectError: its ids mean something else than the model's, or nothing tells that they mean the same.
    """
    reference = make_reference(given, model, forward, options)
    own, its = (own_tokenizer(f.base.config.name_or_path or "") for f in (forward, reference.forward))
    sizes = (f"reference: its vocabulary has {reference.forward.vocabulary} entries, the model's {forward.vocabulary}; "
             "token losses can be compared only under one tokenizer")  # fmt: skip
    if own is not None and its is not None:
        if (how := disagreement(its, own)) is not None:
            raise BilectError(f"{sizes}: {how}")
    elif reference.forward.vocabulary != forward.vocabulary:
        raise BilectError(f"{sizes}: save it beside both models, to show that only the padding differs")
    reference.freeze()
    return reference


def _check_alike(reference: nn.Module, model: nn.Module) -> None:
    """A given model for w to live in must have the parameters of u, whose values it takes over.

    Raises:
        BilectError: one of them is missing or of another shape.
    """
    there = {k: tuple(p.shape) for k, p in reference.named_parameters()}
    for k, p in model.named_parameters():
        if p.requires_grad and there.get(k) != tuple(p.shape):
            raise BilectError(f"reference: it takes over the model's weights, and its {k} has shape {there.get(k)} "
                              f"where the model's has {tuple(p.shape)}; build it like the model")  # fmt: skip


class Synchroniser:
    """Owns w and, where matched, m; keeps the latest training batches with their selections for them to learn from.

    The lower batches of a synchronisation are the (at most K) latest training batches, each with the mask it was
    trained with. That mask *is* the selection of the outgoing reference, so it costs no forward pass. Before the first
    synchronisation every mask is all ones.

    Args:
        forward: token losses of the model in training.
        upper: upper data; its first batch is drawn and looked at here.
        lower: training data for the first synchronisation, or None: then it waits for ``FIRST_BATCHES`` batches.
        given: where w lives, see ``make_reference``.
        matched: train the matched twin as well.
        steps: K.
        penalty: lambda; at 0 no lower batches are needed.
        first: step of the first synchronisation.
        interval: from the step of a synchronisation to the number of steps until the next; None for no next one.
        seed: of the order of the data.
        options: of ``Reference``.
    """

    def __init__(
        self,
        forward: TokenForward,
        upper: Iterable[Mapping[str, Any]] | Feed,
        lower: Iterable[Mapping[str, Any]] | None,
        *,
        given: Given,
        matched: bool,
        steps: int,
        penalty: float,
        first: int,
        interval: Callable[[int], int | None],
        seed: int,
        options: dict[str, Any],
    ) -> None:
        self.forward, self.given, self.matched, self.options = forward, given, matched, options
        self.upper = upper if isinstance(upper, Feed) else Feed(upper, seed, "upper_loader")
        self.lower = None if lower is None else Feed(lower, seed + 1, "lower_loader")
        self.steps, self.penalty, self.interval = steps, penalty, interval
        self.next: int | None = first
        self.made: int | None = None  # reference steps of the synchronisation in progress; None: there is none
        self.count = 0
        self.recent: deque[tuple[TokenBatch, Tensor]] = deque(maxlen=steps)
        self.reference: Reference | None = None
        self.twin: Reference | None = None
        if isinstance(given, nn.Module):
            _check_alike(unwrap(given), forward.base)
        for feed in filter(None, (self.upper, self.lower if penalty else None)):
            check_batch(feed, forward.base)

    @property
    def _device(self) -> torch.device:
        return torch.device(next(self.forward.base.parameters()).device)

    def due(self, step: int) -> bool:
        """Whether a synchronisation begins, or goes on, before this training step."""
        if self.made is not None:
            return True
        if self.next is None or step < self.next:
            return False
        enough = self.count > 0 or self.lower is not None or self.penalty == 0
        return enough or len(self.recent) >= min(FIRST_BATCHES, self.steps)

    def run(self, model: nn.Module, step: int, on_step: Callable[[], None]) -> None:
        """Synchronise: K steps, or those that are left of an interrupted synchronisation.

        Args:
            model: the model in training, wrapped or not.
            step: training steps made.
            on_step: called after each reference step.
        """
        if self.made is None:
            self._prepare(model)
            for follower in self.followers:
                follower.follow(self.forward.base)
            self.made = 0
        assert self.reference is not None
        while self.made < self.steps:
            upper = self._draw(self.upper)
            lower = self._lower_term(self.made)
            self.reference.step([(upper, token_mean(torch.ones_like(upper.labels_N))), *lower])
            if self.twin is not None:
                self.twin.step(lower)
            self.made += 1
            on_step()
        for follower in self.followers:
            follower.freeze()
        self.made = None
        self.recent.clear()  # what follows is selected by the new reference
        self.count += 1
        interval = self.interval(step)
        self.next = None if interval is None else step + max(interval, 1)

    def saw(self, tokens: TokenBatch, mask_N: Tensor) -> None:
        """Remember a training batch and what was selected of it."""
        if self.next is not None and self.penalty > 0:
            self.recent.append((tokens.map(torch.clone), mask_N))  # cloned: loops reuse their buffers

    @property
    def followers(self) -> list[Reference]:
        """w, and m where there is one."""
        return [r for r in (self.reference, self.twin) if r is not None]

    def _prepare(self, model: nn.Module) -> None:
        if self.reference is None:
            self.reference = make_reference(self.given, model, self.forward, self.options)
        if self.matched and self.twin is None:  # a given module is taken by w
            given = None if isinstance(self.given, nn.Module) else self.given
            self.twin = make_reference(given, model, self.forward, self.options)
        for follower in self.followers:
            _check_alike(follower.forward.base, self.forward.base)

    def _draw(self, feed: Feed) -> TokenBatch:
        return TokenBatch.of(feed()).map(lambda x: x.to(self._device))

    def _lower_term(self, k: int) -> list[tuple[TokenBatch, Tensor]]:
        """``lambda * L_tr(alpha, .)`` on the k-th lower batch, alpha from the outgoing reference."""
        if self.penalty == 0:
            return []
        if self.count == 0 and self.lower is not None:
            tokens = self._draw(self.lower)
            mask_N = torch.ones_like(tokens.labels_N)
        else:
            tokens, mask_N = self.recent[k % len(self.recent)]
        return [(tokens, token_mean(mask_N) * self.penalty)]

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly, of this rank."""
        return {
            "count": self.count,
            "next": self.next,
            "made": self.made,
            "recent": [(tokens.state_dict(), mask_N) for tokens, mask_N in self.recent],
            "upper": self.upper.state_dict(),
            "lower": None if self.lower is None else self.lower.state_dict(),
            "followers": [r.state_dict() for r in self.followers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken, in the middle of a synchronisation too."""
        self.count, self.next, self.made = state["count"], state["next"], state["made"]
        to = self._device
        self.recent.clear()
        self.recent.extend((TokenBatch.from_state(t).map(lambda x: x.to(to)), m.to(to)) for t, m in state["recent"])
        self.upper.load_state_dict(state["upper"])
        if self.lower is not None and state["lower"] is not None:
            self.lower.load_state_dict(state["lower"])
        if state["followers"]:
            self._prepare(self.forward.base)
        for follower, own in zip(self.followers, state["followers"], strict=True):
            follower.load_state_dict(own)

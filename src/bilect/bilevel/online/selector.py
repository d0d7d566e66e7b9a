"""BLADE: choose the tokens of a training batch while training on it, in anybody's loop.

    selector = OnlineTokenSelector(model, upper_loader, keep_ratio=0.6)
    loss = selector.loss(model, batch)      # instead of model(**batch).loss
    loss.backward(); optimizer.step(); selector.step()

Per step (BLADE, arXiv 2606.18650, section 3): the excess loss of every learned token, ``Delta_n = l_n(u) - l_n(w)``
with u the model in training and w the reference; the mask, ones at the k = ceil(keep_ratio n) largest Delta over the
batch of all ranks (``functional.frank_wolfe``); the loss, the mean of l_n(u) over the mask. Every ``sync_every`` steps
w starts again from u (``bilevel.reference``). A fixed, given w is RHO-1 (arXiv 2404.07965).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bilect.bilevel.online.choice import Granularity, Scope, choose, spread, token_mean
from bilect.bilevel.online.diagnostics import Watcher
from bilect.bilevel.online.reference import Reference
from bilect.bilevel.online.synchroniser import Given, Synchroniser, fixed_reference
from bilect.bilevel.online.token_loss import TokenBatch, TokenForward, evaluating
from bilect.bilevel.online.wrappers import unwrap
from bilect.errors import BilectError
from bilect.functional.frank_wolfe import alpha_gradient, kept_count
from bilect.runtime import distributed

__all__ = ["OnlineTokenSelector"]


class OnlineTokenSelector:
    """Keeps the part of every training batch that serves the upper data.

    Losses are scaled so that gradients **averaged** over the ranks, as DDP and FSDP2 do, equal those of a single
    process with the whole batch. With gradient accumulation every micro-batch is a batch of its own: divide its loss as
    usual, or pass ``num_items`` to ``loss``. Without dropout Delta compares like with like; with it, u is seen with
    dropout (its forward pass is the one that trains) and w without.

    Args:
        model: any Hugging Face causal LM; DDP, FSDP2, ZeRO-1 and 2, torch.compile and PEFT around it are fine. Never
            modified.
        upper_loader: batches of the target set (this rank's part), read over and over; see ``Feed``. The first is drawn
            here, to see that the model can take it. Not needed where
            no reference is trained: keep_ratio 1, selection "random", or a fixed reference.
        keep_ratio: fraction of the learned tokens (or sequences) that is kept, in (0, 1], or a function of the step.
            The constant 1.0 gives ``model(**batch).loss``, bit for bit, and nothing else.
        sync_every: T, steps between synchronisations, or a function that gives the distance to the next one from the
            step; None: one synchronisation, or none with a given reference.
        reference_steps: K, steps of the reference at each synchronisation.
        penalty: lambda. 0 trains the reference on upper data alone.
        granularity: "token", or "sequence": the excess loss of a sequence is the mean of its learned tokens.
        scope: "global": the largest Delta over the batches of all ranks; "local": over each rank's own.
        baseline: "model": Delta = l(u) - l(w); "matched": Delta = l(m) - l(w) with the matched twin m, which takes the
            K steps of w without upper data (ours): free of what w learned from more training as such, but as old as w.
        selection: "excess", or "random": the control, uniform tokens and no reference.
        warmup_steps: steps with the full loss before the first synchronisation.
        reference: with sync_every None, the fixed w: a model, or a name or directory to load. Otherwise a model like
            ``model``, or a function that makes one, for w to live in: needed where the model cannot be copied (FSDP2);
            its weights are overwritten.
        lower_loader: training batches (this rank's part) for the K steps of the first synchronisation. Without it the
            first synchronisation waits for 32 training batches. Later ones need none: they use the most recent training
            batches, at most K, with the selections made on them, which are those of the outgoing reference.
        reference_learning_rate: of the reference's AdamW; the model's own, or less.
        reference_grad_clip: greatest gradient norm of the reference.
        reference_dtype: of the frozen reference, such as torch.bfloat16; None: the model's. It is trained in float32.
        offload: keep the reference's weights in the CPU's memory between uses.
        diagnose_every: steps between entries of ``diagnostics``; None for none.
        oracle: a strong model whose loss on the selected tokens the diagnostics report.
        seed: of the order of upper and lower data and of random selections.
        on_reference_step: called with the selector after each of the K steps, for progress or checkpoints.

    Attributes:
        steps: training steps made.

    Raises:
        BilectError: the model has an unknown form, the vocabularies differ, or data is missing.
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        upper_loader: Iterable[Mapping[str, Any]] | None = None,
        *,
        keep_ratio: float | Callable[[int], float] = 0.6,
        sync_every: int | Callable[[int], int] | None = 1000,
        reference_steps: int = 300,
        penalty: float = 1.0,
        granularity: Granularity = "token",
        scope: Scope = "global",
        baseline: Literal["model", "matched"] = "model",
        selection: Literal["excess", "random"] = "excess",
        warmup_steps: int = 0,
        reference: Given = None,
        lower_loader: Iterable[Mapping[str, Any]] | None = None,
        reference_learning_rate: float = 5e-5,
        reference_grad_clip: float = 1.0,
        reference_dtype: torch.dtype | None = None,
        offload: bool = False,
        diagnose_every: int | None = None,
        oracle: nn.Module | None = None,
        seed: int = 0,
        on_reference_step: Callable[["OnlineTokenSelector"], None] | None = None,
    ) -> None:
        _check_settings(
            keep_ratio=keep_ratio, sync_every=sync_every, reference_steps=reference_steps, penalty=penalty,
            granularity=granularity, scope=scope, baseline=baseline, selection=selection, warmup_steps=warmup_steps,
            reference_learning_rate=reference_learning_rate, diagnose_every=diagnose_every,
        )  # fmt: skip
        self.keep_ratio = keep_ratio
        self.granularity, self.scope, self.baseline, self.selection = granularity, scope, baseline, selection
        self.on_reference_step = on_reference_step
        self.steps = 0
        self._batches = 0  # of the step in progress
        self._last: tuple[TokenBatch, Tensor | None, Tensor] | None = None
        self._synchroniser: Synchroniser | None = None
        self._fixed: Reference | None = None
        self._watcher: Watcher | None = None
        self._full = keep_ratio == 1.0
        if self._full:
            return

        self._forward = TokenForward(model)
        self._generator = torch.Generator().manual_seed(seed + 7919 * distributed.rank())
        if diagnose_every is not None:
            self._watcher = Watcher(self._forward, diagnose_every, oracle)
        options: dict[str, Any] = {
            "learning_rate": reference_learning_rate, "grad_clip": reference_grad_clip, "dtype": reference_dtype,
            "offload": offload,
        }  # fmt: skip
        if selection == "random":
            return
        if sync_every is None and reference is not None:
            if baseline == "matched":
                raise ValueError("baseline='matched' needs synchronisations: set sync_every")
            self._fixed = fixed_reference(reference, model, self._forward, options)
            return
        if upper_loader is None:
            raise BilectError("upper_loader: the reference is trained on upper data; give it, or a fixed reference")
        self._synchroniser = Synchroniser(
            self._forward,
            upper_loader,
            lower_loader,
            given=reference,
            matched=baseline == "matched",
            steps=reference_steps,
            penalty=penalty,
            first=warmup_steps,
            interval=sync_every if callable(sync_every) else lambda step: sync_every,
            seed=seed,
            options=options,
        )

    def loss(self, model: nn.Module, batch: Mapping[str, Any], num_items: Tensor | float | None = None) -> Tensor:
        """The training loss: the mean over the selected tokens, a scalar to call ``backward`` on.

        A synchronisation that is due happens first. A batch without learned tokens gives 0.

        Args:
            model: the model given to the constructor, or a wrapper of it.
            batch: ``input_ids``, ``labels`` (-100: not learned), ``attention_mask`` and whatever else the model takes;
                an optional ``source``, one label per sequence, is for the diagnostics.
            num_items: learned tokens of the whole step, over micro-batches and ranks: the loss is then multiplied by
                this batch's share of them, so that micro-batches add up instead of being averaged.

        Raises:
            BilectError: another model, or a batch without labels.
        """
        if self._full:
            loss: Tensor = model(**{k: v for k, v in batch.items() if k != "source"}).loss
            return loss
        if (base := unwrap(model)) is not self._forward.base:
            raise BilectError(f"the selector was made for another model than this {type(base).__name__}; make one "
                              "for this")  # fmt: skip
        tokens = TokenBatch.of(batch)
        if self._synchroniser is not None and self._batches == 0 and self._synchroniser.due(self.steps):
            self._synchronise(self._synchroniser, model)
        keep_ratio = self._keep_ratio()
        delta = self._delta(tokens) if keep_ratio < 1 else None

        def weights(delta_N: Tensor | None) -> Tensor:
            mask_N = torch.ones_like(tokens.labels_N, dtype=torch.bool)
            if delta_N is not None:
                mask_N = choose(delta_N, tokens, keep_ratio, self.granularity, self.scope)
            self._last = (tokens, delta_N, mask_N)
            return token_mean(mask_N, self.scope) * self._share(tokens, num_items)

        weight = (lambda loss_N: weights(delta(loss_N))) if callable(delta) else weights(delta)
        result = self._forward.loss(model, tokens, weight)
        assert self._last is not None
        _, delta_N, mask_N = self._last
        if self._synchroniser is not None:
            self._synchroniser.saw(tokens, mask_N)
        if self._watcher is not None and self._batches == 0:
            self._watcher.look(self, tokens, delta_N, mask_N)
        self._batches += 1
        return result

    def step(self) -> None:
        """Count one training step; call it after ``optimizer.step()``."""
        self.steps += 1
        self._batches = 0

    @property
    def last_mask_BT(self) -> Tensor | None:
        """The last batch's selection, True at the selected tokens themselves (where their labels stand)."""
        return None if self._last is None else self._last[0].grid(self._last[2], False)

    @property
    def last_delta_BT(self) -> Tensor | None:
        """The last batch's excess losses at the same places, NaN where nothing is learned; None if none were needed."""
        return None if self._last is None or self._last[1] is None else self._last[0].grid(self._last[1], float("nan"))

    @property
    def synchronisations(self) -> int:
        """How often w started from u."""
        return 0 if self._synchroniser is None else self._synchroniser.count

    @property
    def sharded(self) -> bool:
        """Whether the model's weights are spread over the ranks (FSDP2)."""
        return not self._full and any(map(distributed.is_sharded, self._forward.base.parameters()))

    @property
    def reference(self) -> Reference | None:
        """w, once there is one; its model is ``reference.model``."""
        return self._fixed if self._synchroniser is None else self._synchroniser.reference

    @property
    def diagnostics(self) -> list[dict[str, Any]]:
        """What was seen every ``diagnose_every`` steps: plain dicts, see ``bilevel.diagnostics``."""
        return [] if self._watcher is None else self._watcher.seen

    def select(self, tokens: TokenBatch) -> Tensor:
        """Mask (N,) of a batch under the present models, in evaluation mode and without a training step."""
        delta = self._delta(tokens)
        if callable(delta):
            with evaluating(self._forward.base):
                delta = delta(self._forward.losses(self._forward.base, tokens))
        if delta is None:
            return torch.ones_like(tokens.labels_N, dtype=torch.bool)
        return choose(delta, tokens, self._keep_ratio(), self.granularity, self.scope)

    def _keep_ratio(self) -> float:
        return self.keep_ratio(self.steps) if callable(self.keep_ratio) else self.keep_ratio

    def _delta(self, tokens: TokenBatch) -> Tensor | Callable[[Tensor], Tensor] | None:
        """Delta (N,); a function that gives it from the losses of u, where it needs those; None before the first w."""
        each = spread if self.granularity == "sequence" else lambda delta_N, tokens: delta_N
        if self.selection == "random":
            return each(torch.rand(tokens.n, generator=self._generator).to(tokens.labels_N.device), tokens)
        if self.reference is None:
            return None
        reference_loss_N = self.reference.losses(tokens)
        if self._synchroniser is not None and self._synchroniser.twin is not None:
            return each(-alpha_gradient(self._synchroniser.twin.losses(tokens), reference_loss_N), tokens)
        return lambda loss_N: each(-alpha_gradient(loss_N, reference_loss_N), tokens)

    def _share(self, tokens: TokenBatch, num_items: Tensor | float | None) -> Tensor | float:
        if num_items is None:
            return 1.0
        n = tokens.n * distributed.world_size() if self.scope == "local" else distributed.sum_scalar(tokens.n)
        return n / num_items

    def _synchronise(self, synchroniser: Synchroniser, model: nn.Module) -> None:
        if self._watcher is not None and synchroniser.made is None:
            self._watcher.synchronised()
        synchroniser.run(model, self.steps, lambda: self.on_reference_step and self.on_reference_step(self))

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly, in plain types and tensors; of this rank where there are several."""
        state: dict[str, Any] = {"steps": self.steps}
        if not self._full:
            state["generator"] = self._generator.get_state()
        if self._watcher is not None:
            state["watcher"] = self._watcher.state_dict()
        if self._synchroniser is not None:
            state["synchroniser"] = self._synchroniser.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was called; in the middle of a synchronisation too, at the next ``loss``.

        Raises:
            BilectError: the state is of a selector with other settings.
        """
        expected = {"steps", *(["generator"] if not self._full else []), *(["watcher"] if self._watcher else []),
                    *(["synchroniser"] if self._synchroniser else [])}  # fmt: skip
        if state.keys() != expected:
            raise BilectError(f"the state of a selector with other settings: it has {', '.join(sorted(state))}; "
                              f"this one needs {', '.join(sorted(expected))}")  # fmt: skip
        self.steps, self._batches = state["steps"], 0
        if not self._full:
            self._generator.set_state(state["generator"].cpu())
        if self._watcher is not None:
            self._watcher.load_state_dict(state["watcher"])
        if self._synchroniser is not None:
            self._synchroniser.load_state_dict(state["synchroniser"])


def _check_settings(
    *, keep_ratio: Any, sync_every: Any, diagnose_every: int | None, granularity: str, scope: str, baseline: str,
    selection: str, **numbers: float,
) -> None:  # fmt: skip
    """Raise ValueError for a setting out of its range."""
    if not callable(keep_ratio):
        kept_count(0, keep_ratio)  # its range
    least = {"reference_steps": 1, "sync_every": 1, "diagnose_every": 1}
    numbers |= {} if sync_every is None or callable(sync_every) else {"sync_every": sync_every}
    numbers |= {} if diagnose_every is None else {"diagnose_every": diagnose_every}
    for name, value in numbers.items():
        if value < (low := least.get(name, 0)):
            raise ValueError(f"{name} must be at least {low}, got {value}")
    for name, choice, known in (
        ("granularity", granularity, get_args(Granularity)),
        ("scope", scope, get_args(Scope)),
        ("baseline", baseline, ("model", "matched")),
        ("selection", selection, ("excess", "random")),
    ):
        if choice not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {choice!r}")

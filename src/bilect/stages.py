"""The stages of a run: each reads files of the run directory and writes files, nothing else passes between them.

Every stage takes the run directory, a scratch folder for its results and the config, and returns figures for the
manifest. ``pipeline.py`` puts them in order.
"""

import json
import math
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.stats import spearmanr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bilect.bilevel.cost import fit_flops
from bilect.bilevel.offline import BilevelFit
from bilect.config import Config, TrainConfig
from bilect.data.documents import file_identity, input_files, read_documents
from bilect.data.loading import cycle_batches
from bilect.data.tokens import TokenStore, write_tokens
from bilect.errors import BilectError
from bilect.evaluation import document_losses, evaluate
from bilect.models.flops import forward_flops
from bilect.models.loading import load_causal_lm, load_tokenizer, train_tokenizer
from bilect.models.presets import PRESETS
from bilect.models.score_model import ScoreModel
from bilect.progress import Progress
from bilect.run_dir import derive_seed, write_json
from bilect.runtime import distributed
from bilect.runtime.device import pick_device
from bilect.scoring import write_scores
from bilect.selection import select_top
from bilect.training import train

__all__ = ["Stages"]

Figures = dict[str, Any]
PROBE_DOCUMENTS = 256
SHOWN_DOCUMENTS, SHOWN_CHARACTERS = 6, 1500


@dataclass(frozen=True)
class Stages:
    """The stages of one run.

    Attributes:
        root: the run directory.
        config: of the run.
        progress: what the reader sees.
    """

    root: Path
    config: Config
    progress: Progress

    # -- text to tokens

    def input_hashes(self) -> dict[str, dict[str, str]]:
        """Identity of every input file, by role: its content's hash where it is local, its size elsewhere."""
        data = self.config.data
        roles = {"lower_data": data.lower_data, "upper_data": data.upper_data, "heldout_data": data.heldout_data}
        return {role: {f: file_identity(f) for s in part for f in input_files(s)} for role, part in roles.items()}

    def tokenise_pool(self, scratch: Path) -> Figures:
        """Tokenizer and token file of the pool."""
        if not distributed.is_main():
            return {}
        data = self.config.data
        with self.progress.task("tokenise the pool") as task:
            tokenizer = self._make_tokenizer()
            tokenizer.save_pretrained(scratch / "tokenizer")
            file = scratch / "tokens" / "pool.arrow"
            file.parent.mkdir()
            rows = write_tokens(
                read_documents(data.lower_data),
                tokenizer,
                file,
                context=data.context,
                chunk=data.long_documents == "chunk",
                on_rows=task.advance,
            )
        batches, size = self.config.rounds + 1, self.config.fit.lower_batch_size
        if rows < batches * size:
            raise BilectError(f"data: the pool has {rows} documents, fewer than {batches} batches of {size}; add documents "
                              "or lower fit.lower_batch_size")  # fmt: skip
        return {"tokens": int(TokenStore(file).length_R.sum()), "documents": rows, "flops": 0.0}

    def tokenise_targets(self, scratch: Path) -> Figures:
        """Token files of the upper data and of each held-out set, which must not share a document."""
        if not distributed.is_main():
            return {}
        data, tokenizer, folder = self.config.data, self.tokenizer(), scratch / "tokens"
        (folder / "heldout").mkdir(parents=True)
        with self.progress.task("tokenise the target sets") as task:
            upper = list(read_documents(data.upper_data))
            write_tokens(upper, tokenizer, folder / "upper.arrow", context=data.context, on_rows=task.advance)
            upper_texts = {d.text for d in upper}
            for source in data.heldout_data:
                documents = list(read_documents((source,)))
                shared = [d.doc_id for d in documents if d.text in upper_texts]
                if shared:
                    raise BilectError(f"data: held-out document {shared[0]} is in upper_data too ({len(shared)} in all)")
                name = source.source or Path(source.path).name.split(".")[0]
                file = folder / "heldout" / f"{name}.arrow"
                write_tokens(documents, tokenizer, file, context=data.context, on_rows=task.advance)
        return {"tokens": int(TokenStore(folder / "upper.arrow").length_R.sum()), "flops": 0.0}

    def _make_tokenizer(self) -> PreTrainedTokenizerBase:
        data, models = self.config.data, self.config.models
        if data.tokenizer is not None:
            return load_tokenizer(data.tokenizer)
        for spec in (models.target, models.proxy):
            if isinstance(spec, str) and spec not in PRESETS:
                return load_tokenizer(spec)
        texts = (d.text for d in islice(read_documents(data.lower_data), 100_000))
        return train_tokenizer(texts, data.vocab_size)

    # -- what the other stages read

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer."""
        return load_tokenizer(str(self.root / "tokenizer"))

    @property
    def pad_id(self) -> int:
        """Padding token; never learned, never read."""
        return int(self.tokenizer().eos_token_id)

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return pick_device(self.config.device)

    def pool(self) -> TokenStore:
        """The pool's tokens."""
        return TokenStore(self.root / "tokens" / "pool.arrow")

    def shard(self, number: int, n_rows: int) -> np.ndarray:
        """Rows of one of the disjoint random shards: 0 for the warm-up, 1..R for the rounds."""
        order = np.random.default_rng(derive_seed(self.config.seed, "shards")).permutation(n_rows)
        first = round(n_rows * self.config.warmup.share)
        shards = [order[:first], *np.array_split(order[first:], self.config.rounds)]
        return np.sort(shards[number])

    def load(self, folder: str) -> PreTrainedModel:
        """A model saved by an earlier stage."""
        return load_causal_lm(str((self.root / folder).resolve())).to(self.device)

    def _save(self, model: PreTrainedModel, folder: Path) -> None:
        if distributed.is_main():
            model.save_pretrained(folder)
            self.tokenizer().save_pretrained(folder)

    # -- round 0

    def warm_up(self, scratch: Path, role: str) -> Figures:
        """Train proxy or target on the warm-up shard."""
        spec = self.config.models.proxy if role == "proxy" else self.config.models.target
        settings = self.config.warmup.proxy if role == "proxy" else self.config.warmup.target
        vocabulary = -(-len(self.tokenizer()) // 64) * 64
        seed = derive_seed(self.config.seed, "initial", role)
        model = load_causal_lm(spec, vocab_size=vocabulary, seed=seed, context=self.config.data.context)
        if model.get_input_embeddings().weight.shape[0] < len(self.tokenizer()):
            raise BilectError(f"models.{role}: its vocabulary of {model.get_input_embeddings().weight.shape[0]} is smaller "
                              f"than the tokenizer's {len(self.tokenizer())}")  # fmt: skip
        pool = self.pool()
        out = scratch / "warmup" / role
        return self._train(
            model.to(self.device), pool, self.shard(0, len(pool)), out, settings,
            f"warm up the {role}", ("warm-up", role), decayed=role == "target",
        )  # fmt: skip

    # -- a round

    def fit(self, scratch: Path, number: int) -> Figures:
        """Fit the score model on a sample of the shard (BLISS, section 1)."""
        config = self.config
        pool, upper = self.pool(), TokenStore(self.root / "tokens" / "upper.arrow")
        rows = self.shard(number, len(pool))
        seed = derive_seed(config.seed, "fit", number)
        size = max(math.ceil(config.fit.sample_fraction * len(rows)), config.fit.lower_batch_size)
        sample = np.random.default_rng(seed).permutation(rows)[:size]
        first = number == 1
        proxy = self.load("warmup/proxy" if first or config.reset_proxy else f"round-{number - 1}/proxy")
        target = self.load(self.target_folder("bliss", number - 1)) if config.fit.kl_coef else None
        if target is not None and target.config.get_text_config().vocab_size != proxy.config.get_text_config().vocab_size:
            raise BilectError("models: proxy and target have vocabularies of different sizes; the divergence needs equal "
                              "ones (or set fit.kl_coef=0)")  # fmt: skip
        if first or not config.carry_score_model:
            generator = torch.Generator().manual_seed(derive_seed(config.seed, "score head", number))
            score_model = ScoreModel.from_causal_lm(proxy, generator, config.models.score_head)
        else:
            score_model = ScoreModel.from_pretrained(self.root / f"round-{number - 1}" / "score_model").to(self.device)
        lower_size, upper_size = config.fit.lower_batch_size, min(config.fit.upper_batch_size, len(upper))
        fit = BilevelFit(
            proxy,
            score_model,
            target,
            cycle_batches(pool, sample, lower_size, self.pad_id, derive_seed(seed, "lower"), self.device),
            cycle_batches(upper, np.arange(len(upper)), upper_size, self.pad_id, derive_seed(seed, "upper"), self.device),
            config.fit,
        )
        out = scratch / f"round-{number}"
        out.mkdir(parents=True, exist_ok=True)
        with self.progress.task(f"round {number}: fit", config.fit.steps) as task, (
            out / ("metrics.jsonl" if distributed.is_main() else f".metrics-{distributed.rank()}")
        ).open("w", encoding="utf-8") as log:
            for _ in range(config.fit.steps):
                figures = fit.step()
                log.write(json.dumps(_finite(figures)) + "\n")
                if not math.isfinite(figures["lower_loss"]) or not math.isfinite(figures["score_mean"]):
                    raise BilectError(f"fit: the loss is not a number at step {figures['step']} of round {number}; "
                                      "lower fit.proxy_learning_rate")  # fmt: skip
                task.advance(1, proxy_loss=figures["lower_loss"], score_spread=figures["score_std"])
        self._save(proxy, out / "proxy")
        if distributed.is_main():
            score_model.save_pretrained(out / "score_model")
        lower_length, upper_length = float(pool.length_R[sample].mean()), float(upper.length_R.mean())
        flops = fit_flops(config.fit, proxy, score_model, target, lower_length=lower_length, upper_length=upper_length)
        return {"tokens": int(config.fit.steps * lower_size * lower_length), "flops": flops}

    def score(self, scratch: Path, number: int) -> Figures:
        """Score the whole shard."""
        pool = self.pool()
        rows = self.shard(number, len(pool))
        score_model = ScoreModel.from_pretrained(self.root / f"round-{number}" / "score_model").to(self.device)
        if distributed.is_main():
            with self.progress.task(f"round {number}: score", len(rows)) as task:
                write_scores(
                    score_model,
                    pool,
                    rows,
                    scratch / f"round-{number}" / "scores",
                    self.pad_id,
                    batch_tokens=self.config.score_batch_tokens,
                    bf16=self.config.fit.bf16,
                    on_documents=task.advance,
                )
        tokens = int(pool.length_R[rows].sum())
        return {"tokens": tokens, "flops": forward_flops(score_model, tokens, tokens / len(rows))}

    def select(self, scratch: Path, number: int) -> Figures:
        """Keep the top; account for it by source; show the extremes."""
        if not distributed.is_main():
            return {}
        out, scores = scratch / f"round-{number}", self.root / f"round-{number}" / "scores"
        kept_file = out / "selected" / "kept.parquet"
        chosen = select_top(
            scores,
            kept_file,
            keep_ratio=self.config.selection.keep_ratio,
            budget_tokens=self.config.selection.budget_tokens,
        )
        pool = self.pool()
        row_of = {d: i for i, d in enumerate(pool.doc_ids)}
        kept = pq.read_table(kept_file)
        texts = pool.texts([row_of[d] for d in chosen.doc_ids])
        pq.write_table(kept.append_column("text", pa.array(texts)), kept_file)
        table = pq.read_table(scores).sort_by([("score", "descending"), ("doc_id", "ascending")])
        ends = {"best": table.slice(0, SHOWN_DOCUMENTS), "worst": table.slice(max(len(table) - SHOWN_DOCUMENTS, 0))}
        shown = {
            name: [{**r, "text": pool.texts([row_of[r["doc_id"]]])[0][:SHOWN_CHARACTERS]} for r in part.to_pylist()]
            for name, part in ends.items()
        }
        shown["worst"].reverse()
        write_json(out / "extremes.json", shown)
        return {
            "tokens": chosen.tokens,
            "documents": len(chosen.doc_ids),
            "threshold": chosen.threshold,
            "kept_share_by_source": chosen.kept_share,
            "pool_share_by_source": chosen.pool_share,
            "kept_fraction_by_source": chosen.kept_fraction,
            "flops": 0.0,
        }

    def train_arm(self, scratch: Path, number: int, arm: str) -> Figures:
        """Train an arm's target on its documents of the shard, and a decayed copy for evaluation."""
        pool = self.pool()
        rows = self._rows_of(arm, number, pool)
        model = self.load(self.target_folder(arm, number - 1))
        return self._train(
            model, pool, rows, scratch / self.target_folder(arm, number), self.config.training,
            f"round {number}: train on {arm}", ("train", number), decayed=True,
            start_from=self.root / self.target_folder(arm, number - 1),
        )  # fmt: skip

    def _rows_of(self, arm: str, number: int, pool: TokenStore) -> np.ndarray:
        shard = self.shard(number, len(pool))
        if arm == "full":
            return shard
        kept = pq.read_table(self.root / f"round-{number}" / "selected" / "kept.parquet", columns=["doc_id", "n_tokens"])
        if arm == "bliss":
            ids = set(kept.column("doc_id").to_pylist())
            return np.array([i for i in shard if pool.doc_ids[i] in ids])
        budget = sum(kept.column("n_tokens").to_pylist())
        order = np.random.default_rng(derive_seed(self.config.seed, "random", number)).permutation(shard)
        before = np.cumsum(pool.length_R[order]) - pool.length_R[order]
        return order[before < budget]

    @staticmethod
    def target_folder(arm: str, number: int) -> str:
        """Where an arm's target lies after a round; round 0 is the warm-up."""
        if number == 0:
            return "warmup/target"
        return f"round-{number}/target" if arm == "bliss" else f"controls/{arm}/round-{number}/target"

    def _train(
        self,
        model: PreTrainedModel,
        pool: TokenStore,
        rows: np.ndarray,
        out: Path,
        settings: TrainConfig,
        name: str,
        labels: tuple[str | int, ...],
        *,
        decayed: bool,
        start_from: Path | None = None,
    ) -> Figures:
        context, seed = self.config.data.context, derive_seed(self.config.seed, *labels)
        decay_steps = settings.decay_steps if decayed else 0
        out.mkdir(parents=True, exist_ok=True)
        with self.progress.task(name, settings.steps + decay_steps) as task:
            common: dict[str, Any] = {"context": context, "task": task, "device": self.device}
            figures = train(model, pool, rows, out, settings, seed=seed, start_from=start_from, **common)
            self._save(model, out)
            if decay_steps:
                distributed.barrier()
                more = train(
                    model, pool, rows, out, settings, seed=seed + 1, start_from=out, decay=True, **common
                )
                figures = {**figures, "tokens": figures["tokens"] + more["tokens"], "flops": figures["flops"] + more["flops"]}
                self._save(model, out.with_name(f"{out.name}-decayed"))
        return figures

    def evaluate(self, scratch: Path, folder: str) -> Figures:
        """Figures of the decayed copy of a target (or of itself, without a decay branch) on every held-out set."""
        if not distributed.is_main():
            return {}
        decayed = f"{folder}-decayed"
        model = self.load(decayed if (self.root / decayed).is_dir() else folder)
        stores = {p.stem: TokenStore(p) for p in sorted((self.root / "tokens" / "heldout").glob("*.arrow"))}
        results, flops, tokens = {}, 0.0, 0
        with self.progress.task(f"evaluate {folder}", len(stores)) as task:
            for name, store in stores.items():
                results[name] = evaluate(model, store, self.pad_id, self.config.score_batch_tokens).as_dict()
                n_tokens = int(store.length_R.sum())
                flops, tokens = flops + forward_flops(model, n_tokens, n_tokens / len(store)), tokens + n_tokens
                task.advance(1, heldout_loss=results[name]["loss"])
        write_json((scratch / folder).with_name("eval.json"), results)
        return {"flops": flops, "tokens": tokens}

    def fidelity(self, scratch: Path, number: int) -> Figures:
        """Does the proxy stand in for the target? Rank correlations over a probe of the shard's documents."""
        if not distributed.is_main():
            return {}
        pool = self.pool()
        seed = derive_seed(self.config.seed, "probe", number)
        probe = np.sort(np.random.default_rng(seed).permutation(self.shard(number, len(pool)))[:PROBE_DOCUMENTS])
        start = "warmup/proxy" if number == 1 or self.config.reset_proxy else f"round-{number - 1}/proxy"
        folders = {
            "proxy_before": start,
            "proxy_after": f"round-{number}/proxy",
            "target_before": self.target_folder("bliss", number - 1),
            "target_after": f"round-{number}/target",
        }
        losses, flops = {}, 0.0
        tokens = int(pool.length_R[probe].sum())
        with self.progress.task(f"round {number}: proxy fidelity", len(folders)) as task:
            for name, folder in folders.items():
                model = self.load(folder)
                losses[name] = document_losses(model, pool, probe, self.pad_id, self.config.score_batch_tokens)
                flops += forward_flops(model, tokens, tokens / len(probe))
                task.advance(1)
        result = {
            "round": number,
            "documents": len(probe),
            "loss_rank_correlation": _spearman(losses["proxy_after"], losses["target_before"]),
            "change_rank_correlation": _spearman(
                losses["proxy_after"] - losses["proxy_before"], losses["target_after"] - losses["target_before"]
            ),
        }
        write_json(scratch / f"round-{number}" / "fidelity.json", result)
        return {**result, "flops": flops, "tokens": 4 * tokens}

    def publish(self, scratch: Path) -> Figures:
        """The final models where users look for them."""
        if distributed.is_main():
            last = f"round-{self.config.rounds}"
            decayed = self.root / last / "target-decayed"
            sources = {
                "proxy": self.root / last / "proxy",
                "score_model": self.root / last / "score_model",
                "target": decayed if decayed.is_dir() else self.root / last / "target",
            }
            for name, folder in sources.items():
                (scratch / name).mkdir()
                for file in chain(folder.glob("*.json"), folder.glob("*.safetensors"), folder.glob("*.jinja")):
                    (scratch / name / file.name).write_bytes(file.read_bytes())
        return {"flops": 0.0}


def _finite(figures: Figures) -> Figures:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    value = float(spearmanr(a, b).statistic)
    return value if math.isfinite(value) else None

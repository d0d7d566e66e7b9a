"""BLADE in TRL's SFTTrainer: real runs of a small model."""

import json

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from bilect.config.online import BladeConfig
from bilect.errors import BilectError
from bilect.models.loading import train_tokenizer

pytest.importorskip("trl")
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from bilect.integrations.trl import BladeSFTTrainer

ON = [f"sum of {i} and {i + 1} is {2 * i + 1}" for i in range(40)]
OFF = [f"the wind {w} over the sea" for w in ("blew", "sang", "went", "was") * 10]
TOKENIZER = train_tokenizer([*ON, *OFF] * 3, 300)


def model():
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=64, bos_token_id=0, eos_token_id=0, hidden_dropout=0.0, attention_dropout=0.0,
        )
    )  # fmt: skip


def config(tmp_path, **more):
    return SFTConfig(
        str(tmp_path), per_device_train_batch_size=8, max_steps=12, learning_rate=3e-3, max_length=32, report_to=[],
        logging_steps=1, use_cpu=True, seed=0, gradient_checkpointing=False, bf16=False, **more,
    )  # fmt: skip


def pairs(texts):
    return [{"prompt": text.rpartition(" ")[0], "completion": " " + text.rpartition(" ")[2]} for text in texts]


def trained(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_it_selects_tokens_of_text_that_sft_trainer_prepared(tmp_path):
    blade = BladeConfig(keep_ratio=0.5, sync_every=4, reference_steps=3, upper_batch_size=8)
    trainer = BladeSFTTrainer(
        model(), config(tmp_path), train_dataset=Dataset.from_list([{"text": t} for t in [*ON, *OFF]]),
        processing_class=TOKENIZER, blade=blade, upper_dataset=Dataset.from_list([{"text": t} for t in ON]),
    )  # fmt: skip
    losses = trained(trainer)
    assert len(losses) == 12 and losses[-1] < losses[0]
    selector = trainer.selector
    assert (selector.steps, selector.synchronisations) == (12, 3)
    delta_BT = selector.last_delta_BT
    learned, mask = ~delta_BT.isnan(), selector.last_mask_BT
    assert int(mask.sum()) == -(-int(learned.sum()) // 2)  # half, rounded up
    assert delta_BT[mask].min() >= delta_BT[learned & ~mask].max()
    assert (tmp_path / "checkpoint-12" / "selector-0.pt").is_file()


def test_prompts_are_not_learned_and_all_tokens_kept_is_sft_trainer_itself(tmp_path):
    data = Dataset.from_list(pairs([*ON, *OFF]))
    given = {"train_dataset": data, "processing_class": TOKENIZER}
    plain = trained(SFTTrainer(model(), config(tmp_path / "a"), **given))
    ours = BladeSFTTrainer(model(), config(tmp_path / "b"), blade=BladeConfig(method="full"), **given)
    assert trained(ours) == plain
    blade = BladeConfig(keep_ratio=0.5, sync_every=4, reference_steps=3, upper_batch_size=8)
    chosen = BladeSFTTrainer(
        model(), config(tmp_path / "c"), blade=blade, upper_dataset=Dataset.from_list(pairs(ON)), **given
    )
    trained(chosen)
    of_row = (~chosen.selector.last_delta_BT.isnan()).sum(1)
    completions = [len(TOKENIZER(p["completion"]).input_ids) + 1 for p in pairs([*ON, *OFF])]  # and the end
    assert of_row.min() > 0 and of_row.max() <= max(completions)
    history = json.loads((tmp_path / "c" / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    assert all("loss" in entry for entry in history[:12])


def test_upper_data_are_needed(tmp_path):
    with pytest.raises(BilectError, match="give upper_dataset"):
        BladeSFTTrainer(model(), config(tmp_path), train_dataset=Dataset.from_list([{"text": t} for t in ON]),
                        processing_class=TOKENIZER, blade=BladeConfig(keep_ratio=0.5))  # fmt: skip

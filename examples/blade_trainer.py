"""Online token selection in a script that uses the transformers ``Trainer``: one class exchanged, two arguments added.

python examples/blade_trainer.py --steps 40 --out runs/blade
"""

import argparse

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from bilect.integrations.trainer import BladeConfig, BladeTrainer


def sequences(n: int, low: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, low + 32, (n, 16), generator=generator).repeat_interleave(2, dim=1)
    return [{"input_ids": row, "labels": row} for row in ids]


def main(steps: int, out: str) -> BladeTrainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=out, max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        learning_rate=3e-3, logging_steps=10, save_steps=max(steps // 2, 1), report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = BladeTrainer(  # instead of Trainer
        LlamaForCausalLM(config),
        arguments,
        train_dataset=[*sequences(400, 0, 1), *sequences(400, 64, 2)],
        upper_dataset=sequences(64, 0, 3),
        blade=BladeConfig(keep_ratio=0.6, sync_every=10, reference_steps=8, reference_learning_rate=3e-3),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", default="runs/blade")
    args = parser.parse_args()
    main(args.steps, args.out)

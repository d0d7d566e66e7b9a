"""Continued pretraining with LoRA and online token selection: the reference is a second adapter on the same base.

pip install 'bilect[lora]'
python examples/blade_lora.py --steps 30
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from bilect import OnlineTokenSelector


def sequences(n: int, low: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, low + 32, (n, 16), generator=generator).repeat_interleave(2, dim=1)
    return [{"input_ids": row, "labels": row} for row in ids]


def main(steps: int) -> OnlineTokenSelector:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    base = LlamaForCausalLM(config)  # in earnest: LlamaForCausalLM.from_pretrained(...)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    pool = DataLoader([*sequences(400, 0, 1), *sequences(400, 64, 2)], batch_size=8, shuffle=True)
    upper_loader = DataLoader(sequences(64, 0, 3), batch_size=8, shuffle=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)

    selector = OnlineTokenSelector(model, upper_loader, sync_every=10, reference_steps=8, reference_learning_rate=1e-2)
    for _, batch in zip(range(steps), pool, strict=False):
        selector.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        selector.step()
    assert selector.reference is not None
    own = sum(p.numel() for p in selector.reference.own.values())
    print(f"the reference has {own} weights of its own, the model {sum(p.numel() for p in base.parameters())}")
    return selector


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    main(parser.parse_args().steps)

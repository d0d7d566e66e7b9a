"""Online token selection in a plain PyTorch loop: three lines differ from ordinary training, marked (1), (2), (3).

    python examples/blade_plain_loop.py --steps 60

Random weights and random text stand in for a model and for data, so that it runs anywhere.
"""

import argparse

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from bilect import OnlineTokenSelector


def sequences(n: int, low: int, seed: int) -> list[dict[str, Tensor]]:
    """``n`` sequences of 32 tokens, each token twice in a row, from ``low`` on: something that can be learned."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, low + 32, (n, 16), generator=generator).repeat_interleave(2, dim=1)
    return [{"input_ids": row, "labels": row} for row in ids]


def main(steps: int) -> OnlineTokenSelector:
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=128,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    pool = DataLoader([*sequences(400, 0, 1), *sequences(400, 64, 2)], batch_size=8, shuffle=True)  # half off target
    upper_loader = DataLoader(sequences(64, 0, 3), batch_size=8, shuffle=True)  # what good means
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    selector = OnlineTokenSelector(  # (1)
        model, upper_loader, keep_ratio=0.6, sync_every=20, reference_steps=10, warmup_steps=10,
        reference_learning_rate=3e-3, diagnose_every=10,
    )  # fmt: skip
    done = 0
    while done < steps:
        for batch in pool:
            loss = selector.loss(model, batch)  # (2) instead of model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            selector.step()  # (3)
            done += 1
            if done == steps:
                break
    for entry in selector.diagnostics:
        print(f"step {entry['step']}: Delta > 0 at {entry['share_positive']:.0%} of the tokens, "
              f"||u - w|| = {entry['distance_reference']:.2f}")  # fmt: skip
    return selector


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)

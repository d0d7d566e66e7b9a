"""Online token selection over two processes: the best tokens of the batches of all ranks.

torchrun --nproc-per-node 2 examples/blade_torchrun.py --steps 40             # DDP
torchrun --nproc-per-node 2 examples/blade_torchrun.py --steps 40 --fsdp      # model and reference sharded
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

from bilect import OnlineTokenSelector


def sequences(n: int, low: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, low + 32, (n, 16), generator=generator).repeat_interleave(2, dim=1)
    return [{"input_ids": row, "labels": row} for row in ids]


def build(fsdp: bool) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if torch.cuda.is_available():
        model.cuda()
    if not fsdp:
        return model
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def loader(data: list[dict[str, Tensor]]) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(data, batch_size=4, sampler=DistributedSampler(data))  # type: ignore[arg-type]


def main(steps: int, fsdp: bool = False) -> float:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    model = build(fsdp)
    outer = model if fsdp else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    selector = OnlineTokenSelector(
        outer, loader(sequences(64, 0, 3)), sync_every=10, reference_steps=8, reference_learning_rate=3e-3,
        reference=(lambda: build(True)) if fsdp else None,  # a sharded model cannot be copied: build another
    )  # fmt: skip
    device = next(model.parameters()).device
    for _, batch in zip(range(steps), loader([*sequences(400, 0, 1), *sequences(400, 64, 2)]), strict=False):
        loss = selector.loss(outer, {k: v.to(device) for k, v in batch.items()})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        selector.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        print(f"loss of the last step: {total.item() / dist.get_world_size():.6f}")
    dist.destroy_process_group()
    return float(total)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--fsdp", action="store_true")
    args = parser.parse_args()
    main(args.steps, args.fsdp)

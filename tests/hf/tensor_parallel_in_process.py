"""One process of `test_tensor_parallel`: loads tiny models in parts and whole, and saves what they compute."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import lte
from lte.nn.shards import is_sharded, whole
from lte.train.processes import training_device
from tests.processes import connect
from tests.tiny_models import VOCAB

if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2].split(",")
    torch.set_num_threads(1)
    connect()
    tokens = torch.arange(48, device=training_device()).reshape(2, 24) % VOCAB
    found = {}
    for name in names:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder / name, tp_plan="auto").eval()
        except ValueError as error:
            found[name] = {"error": str(error)}
            continue
        ffn = next(iter(lte.sparse_ffns(model).values()))
        found[name] = {"down": is_sharded(ffn.part(ffn.layout.down).weight), "router": is_sharded(ffn.router.weight)}
        with torch.no_grad():
            found[name]["logits"] = whole(model(tokens).logits).cpu()
            found[name]["answer"] = model.generate(tokens[:1, :4], max_new_tokens=8, do_sample=False).cpu()
        if name == "llama":
            try:
                lte.accelerate_(model)
            except ValueError as error:
                found[name]["refused"] = str(error)
    torch.save(found, folder / f"found{dist.get_world_size()}_{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()

"""LTE beside methods that need no training: what each skips on a text, and what it reads for a token."""

import sys
from pydoc_data.topics import topics

from transformers import AutoModelForCausalLM, AutoTokenizer

import lte
from lte.eval.cost import measured_cost
from lte.train.router_init import fit_routers_

NAME = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
TEXTS = [text[:2000] for text in topics.values()]
CONFIGS = [
    lte.TealConfig(target_sparsity=0.4),
    lte.CatsConfig(target_sparsity=0.4),
    lte.LteConfig(target_sparsity=0.4),
]

tokenizer = AutoTokenizer.from_pretrained(NAME)
calibration = [tokenizer(text, return_tensors="pt") for text in TEXTS[:20]]
for config in CONFIGS:
    model = AutoModelForCausalLM.from_pretrained(NAME)
    lte.sparsify_(model, config, calibration=calibration)
    if lte.sparse_ffns(model):
        fit_routers_(model, calibration)  # in place of a training
    lte.calibrate_(model, TEXTS[:20], tokenizer=tokenizer)
    measured = lte.measure_sparsity(model, TEXTS[20:30], tokenizer=tokenizer)
    cost = measured_cost(model, measured)
    print(f"{config.name}: {measured.sparsity:.1%} of neurons skipped, {cost.bytes_per_token / 1e6:.1f} MB per token")

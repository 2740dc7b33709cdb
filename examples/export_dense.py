"""Turns an LTE model into the stock dense model of its family, without routers, for tools that know no LTE."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lte

NAME = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
OUTPUT = sys.argv[2] if len(sys.argv) > 2 else "runs/dense"

tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForCausalLM.from_pretrained(NAME)
if not lte.sparse_ffns(model):
    lte.sparsify_(model)
for ffn in lte.sparse_ffns(model).values():
    ffn.set_mode("dense")
ids = tokenizer("The for statement", return_tensors="pt")["input_ids"]
with torch.no_grad():
    expected = model(ids).logits

lte.densify_(model).save_pretrained(OUTPUT)
tokenizer.save_pretrained(OUTPUT)
exported = AutoModelForCausalLM.from_pretrained(OUTPUT)
with torch.no_grad():
    torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-4, atol=1e-4)
print(f"{OUTPUT} holds a {type(exported).__name__}, which computes what the LTE model does with all experts on.")

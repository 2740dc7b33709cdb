"""A later fine-tuning with a stock trainer moves the sparsity; calibration puts the target back."""

import sys
from pydoc_data.topics import topics

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import lte
from lte.train.router_init import fit_routers_

NAME = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
OUTPUT = sys.argv[2] if len(sys.argv) > 2 else "runs/calibrate"
TEXTS = list(topics.values())

tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForCausalLM.from_pretrained(NAME)
if not lte.sparse_ffns(model):
    lte.sparsify_(model, lte.LteConfig(target_sparsity=0.3))
    fit_routers_(model, [tokenizer(text[:2000], return_tensors="pt") for text in TEXTS[60:80]])


def sparsity() -> str:
    return f"{lte.measure_sparsity(model, TEXTS[:20], tokenizer=tokenizer).sparsity:.2%}"


lte.calibrate_(model, TEXTS[20:60], tokenizer=tokenizer)
print("calibrated:", sparsity())

ids = [tokenizer(text)["input_ids"][:128] for text in TEXTS]
data = datasets.Dataset.from_dict({"input_ids": [row for row in ids if len(row) == 128]})
data = data.map(lambda row: {"labels": row["input_ids"]})
args = TrainingArguments(OUTPUT, max_steps=20, per_device_train_batch_size=4, learning_rate=3e-4, report_to="none")
Trainer(model, args, default_data_collator, data).train()  # says what drifts
print("after a fine-tuning that trains no router:", sparsity())

lte.calibrate_(model, TEXTS[20:60], tokenizer=tokenizer)
print("calibrated again:", sparsity())

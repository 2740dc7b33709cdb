"""Makes a model sparse, trains it with `LteTrainer`, evaluates it in hard mode, saves it and loads it again."""

import sys
from pydoc_data.topics import topics

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

import lte

NAME = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
OUTPUT = sys.argv[2] if len(sys.argv) > 2 else "runs/train"
LENGTH = 256


def rows(tokenizer) -> datasets.Dataset:
    """All texts, one after the other, in rows of `LENGTH` tokens that are their own labels."""
    ids = tokenizer(f" {tokenizer.eos_token} ".join(topics.values()))["input_ids"]
    cut = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]
    return datasets.Dataset.from_dict({"input_ids": cut, "labels": cut})


tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForCausalLM.from_pretrained(NAME)
parts = rows(tokenizer).train_test_split(0.1, seed=0)

lte.sparsify_(model, lte.LteConfig(target_sparsity=0.4))
args = lte.LteTrainingArguments(
    output_dir=OUTPUT,
    max_steps=20,
    per_device_train_batch_size=4,
    router_fit_tokens=4096,
    calibration_tokens=8192,
    eval_strategy="steps",
    eval_steps=10,
    report_to="none",
)
trainer = lte.LteTrainer(model, args, default_data_collator, parts["train"], parts["test"])
trainer.train()

model.save_pretrained(f"{OUTPUT}/model")
tokenizer.save_pretrained(f"{OUTPUT}/model")
print(trainer.evaluate())
loaded = AutoModelForCausalLM.from_pretrained(f"{OUTPUT}/model")
measured = lte.measure_sparsity(loaded, parts["test"])
print(f"The saved folder skips {measured.sparsity:.1%} of its FFN neurons.")

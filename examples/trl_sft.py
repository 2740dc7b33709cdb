"""LTE with TRL: the mixin before `SFTTrainer`, its settings before `SFTConfig`."""

import sys
from dataclasses import dataclass
from pydoc_data.topics import topics

import datasets
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer

import lte

NAME = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
OUTPUT = sys.argv[2] if len(sys.argv) > 2 else "runs/trl"


class LteSFTTrainer(lte.RoutingMixin, trl.SFTTrainer):
    """Trains routers beside the model."""


@dataclass
class LteSFTConfig(lte.RoutingArguments, trl.SFTConfig):
    """The settings of both."""


tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForCausalLM.from_pretrained(NAME)
lte.sparsify_(model, lte.LteConfig(target_sparsity=0.4))
args = LteSFTConfig(
    output_dir=OUTPUT,
    max_steps=20,
    per_device_train_batch_size=4,
    max_length=256,
    bf16=torch.cuda.is_available(),
    router_fit_tokens=4096,
    calibration_tokens=8192,
    report_to="none",
)
data = datasets.Dataset.from_dict({"text": list(topics.values())}).train_test_split(0.1, seed=0)
trainer = LteSFTTrainer(model, args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer)
trainer.train()
print(trainer.evaluate())

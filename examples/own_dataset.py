"""Own data: a stream of questions and answers, labels on the answers alone, a collator, and a dense teacher."""

import copy
import sys
from collections.abc import Iterator
from pydoc_data.topics import topics

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import lte

NAME = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
OUTPUT = sys.argv[2] if len(sys.argv) > 2 else "runs/own_dataset"

tokenizer = AutoTokenizer.from_pretrained(NAME)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def rows() -> Iterator[dict[str, list[int]]]:
    """Rows whose prompts have labels of -100: they are not trained on, and their routing has no price."""
    for name, text in topics.items():
        prompt = tokenizer(f"Explain {name}:")["input_ids"]
        answer = tokenizer(text, truncation=True, max_length=200)["input_ids"]
        yield {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


teacher = AutoModelForCausalLM.from_pretrained(NAME)
model = lte.sparsify_(copy.deepcopy(teacher), lte.LteConfig(target_sparsity=0.4))
trainer = lte.LteTrainer(
    model,
    lte.LteTrainingArguments(
        output_dir=OUTPUT,
        max_steps=20,  # a stream has no length of its own
        per_device_train_batch_size=4,
        router_fit_tokens=4096,
        calibration_tokens=8192,
        report_to="none",
    ),
    train_dataset=datasets.IterableDataset.from_generator(rows),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    teacher=teacher,
)
trainer.train()
print(trainer.state.log_history[-2])

"""LoRA beside routers that train as a whole; the adapter holds both, and merging gives an ordinary LTE model."""

import sys
from pydoc_data.topics import topics

import datasets
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import lte

NAME = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
OUTPUT = sys.argv[2] if len(sys.argv) > 2 else "runs/lora"

tokenizer = AutoTokenizer.from_pretrained(NAME)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = lte.sparsify_(AutoModelForCausalLM.from_pretrained(NAME), lte.LteConfig(target_sparsity=0.4))
model.save_pretrained(f"{OUTPUT}/base")

texts = datasets.Dataset.from_dict({"text": list(topics.values())})
data = texts.map(lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns="text")
trainer = lte.LteTrainer(
    model,
    lte.LteTrainingArguments(
        output_dir=OUTPUT,
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        router_fit_tokens=4096,
        calibration_tokens=8192,
        report_to="none",
    ),
    train_dataset=data,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(f"{OUTPUT}/adapter")

loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{OUTPUT}/base"), f"{OUTPUT}/adapter")
merged = loaded.merge_and_unload()
merged.save_pretrained(f"{OUTPUT}/merged")
measured = lte.measure_sparsity(merged, list(topics.values())[:20], tokenizer=tokenizer)
print(f"The merged model skips {measured.sparsity:.1%} of its FFN neurons.")

"""A Trainer of Transformers that keeps the frozen layers out of the graph, with one more line.

    pip install accelerate
    python examples/trainer_with_drop_in.py MODEL DATA OUTPUT

MODEL is a Transformers folder, DATA a file of questions and answers. OUTPUT becomes a Transformers folder.
"""

import argparse

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

import talik

parser = argparse.ArgumentParser(description="Train the top layers of a model with a Trainer.")
parser.add_argument("model")
parser.add_argument("data")
parser.add_argument("output")
parser.add_argument("--top-layers", type=int, default=2)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--learning-rate", type=float, default=2e-5)
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.model)
data = talik.read_data(arguments.data, tokenizer, max_length=1024)

model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
talik.freeze(model, f"top.{arguments.top_layers},norm")
talik.drop_in(model)  # the one line: the Trainer calls model(**batch).loss, and this is now Talik's loss

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=arguments.output,
        save_strategy="no",  # no checkpoints
        per_device_train_batch_size=8,
        num_train_epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        logging_strategy="epoch",
        report_to="none",
        use_cpu=True,  # leave it out on a machine with a GPU
    ),
    # The labels are the data's: -100 on everything but the answers. The collator pads them with -100.
    train_dataset=[{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in data.examples],
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()  # model and tokenizer

"""A training loop with five common mistakes, what talik.explain says about it, and the same loop mended.

    python examples/explain_a_broken_loop.py MODEL DATA

MODEL is a Transformers folder, DATA a file of JSON lines with "input" and "output". Nothing is trained.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import talik


class Rows(Dataset):
    """Questions and answers, tokenised the way many scripts do it."""

    def __init__(self, path, tokenizer):
        self.rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        self.tokenizer = tokenizer

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        turns = [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        # Mistake 1: return_tensors="pt" gives (1, sequence), and the DataLoader makes (batch, 1, sequence).
        options = {"padding": "max_length", "max_length": 128, "truncation": True}
        tokens = self.tokenizer(text, return_tensors="pt", **options)
        # Mistake 2: the labels are a copy of the input, so the question is trained, too.
        labels = tokens["input_ids"].clone()
        # Mistake 3: padding is masked by its id. Where pad == eos, no end of turn is ever trained.
        labels[labels == self.tokenizer.pad_token_id] = -100
        return {**tokens, "labels": labels}


parser = argparse.ArgumentParser(description="Explain a broken training loop.")
parser.add_argument("model")
parser.add_argument("data")
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.model)
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).train()
for layer in model.base_model.layers[:-2]:
    layer.requires_grad_(False)  # Mistake 4: the embeddings below still require a gradient.
# Mistake 5 (gradient_checkpointing_enable is its old name): it puts the frozen layers back into the graph.
model.activation_checkpointing_enable()
batch = next(iter(DataLoader(Rows(arguments.data, tokenizer), batch_size=4)))
print(f"== the loop as it is ==\n{talik.explain(model, batch, tokenizer)}\n")

# The same rows and the same layers, without the mistakes.
talik.freeze(model, "top.2,norm")
data = talik.read_data(arguments.data, tokenizer, max_length=128)
batch = talik.collate(data.examples[:4], pad_id=tokenizer.pad_token_id or 0)
print(f"== the loop mended ==\n{talik.explain(model, batch, tokenizer)}")

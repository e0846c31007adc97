"""The usual training loop, without its usual mistakes.

    python examples/usual_loop.py MODEL DATA OUTPUT

MODEL is a Transformers folder, DATA a file of questions and answers. OUTPUT becomes a Transformers folder.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import talik

parser = argparse.ArgumentParser(description="Train the top layers of a model in a plain loop.")
parser.add_argument("model")
parser.add_argument("data")
parser.add_argument("output")
parser.add_argument("--top-layers", type=int, default=2)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--learning-rate", type=float, default=2e-5)
arguments = parser.parse_args()

# Question and answer are tokenised as one sequence by the model's chat template. Only the answers and their
# end-of-turn tokens are trained. Look at the labels before you train: "+" marks the trained lines.
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
data = talik.read_data(arguments.data, tokenizer, max_length=1024)
print(talik.preview(data, tokenizer, 1)[0])

# freeze() freezes everything else, embeddings included. Otherwise the graph would run through every layer.
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
trained = talik.freeze(model, f"top.{arguments.top_layers},norm")
optimizer = torch.optim.AdamW(trained.values(), lr=arguments.learning_rate)

# From here on, model(**batch).loss runs the frozen layers without a graph and never holds all logits at once.
talik.drop_in(model)
model.train()

torch.manual_seed(0)
for epoch in range(arguments.epochs):
    total, count = 0.0, 0
    for indices in torch.randperm(len(data.examples)).split(arguments.batch_size):
        # collate() pads by position. The pad token may be the end-of-turn token; its label is kept.
        batch = talik.collate(
            [data.examples[i] for i in indices.tolist()], pad_id=tokenizer.pad_token_id or 0
        )
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens = int((batch["labels"][:, 1:] != -100).sum())  # the loss is the mean over these
        total, count = total + loss.item() * tokens, count + tokens
    print(f"epoch {epoch + 1}: loss {total / count:.4f}")

model.save_pretrained(arguments.output)
tokenizer.save_pretrained(arguments.output)

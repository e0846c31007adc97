"""What the Transformers in front of PYTHONPATH reads from model folders; test_old_readers.py runs it.

{folder: file} on stdin; each folder's logits in fp32 go into its file, the rest as JSON to stdout. It imports
nothing of Talik, which needs Transformers 5.
"""

import json
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, __version__

TEXT = "What is 1 plus 1?<|im_end|>"
IDS = 100  # tokens, more than yarn, longrope and llama3 were trained for here


def ids_for(vocabulary: int) -> torch.Tensor:
    return (torch.arange(IDS)[None] * 7) % vocabulary


def read(folder: str, file: str) -> dict[str, object]:
    vocabulary = AutoConfig.from_pretrained(folder).get_text_config(decoder=True).vocab_size
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    with torch.no_grad():
        torch.save(model(input_ids=ids_for(vocabulary), use_cache=False).logits, file)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        "tokenizer": type(tokenizer).__name__,
        "ids": tokenizer(TEXT).input_ids,
        "chat": tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False),
        "eos": model.generation_config.eos_token_id,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {folder: read(folder, file) for folder, file in json.load(sys.stdin).items()}
    json.dump({"transformers": __version__, "found": found}, sys.stdout)

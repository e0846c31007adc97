"""Prepares many rows: rows a second, memory, the size on the disk, finding it again, going on after a kill.

    python3 dev.py bench data [--rows 2000000] [--folder FOLDER]

Rows of about 1.5 KB are made from a seed and removed afterwards. Hugging Face `datasets.map` tokenises a part
of the same rows with the same tokenizer and as many processes, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from common import record

from talik.data.dataset import read_all
from talik.data.prepare import cores
from talik.model.tokenizer_files import load_tokenizer
from talik.recipe import check

COMPARED = 100_000  # rows that `datasets.map` tokenises
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_rows(path: Path, count: int) -> None:
    """Rows of messages with words of two to eleven letters."""
    dice = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    words = ["".join(dice.choices(letters, range(26, 0, -1), k=dice.randint(2, 11))) for _ in range(20_000)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            turns = [
                {"role": role, "content": " ".join(dice.choices(words, k=length))}
                for role, length in (("user", 70), ("assistant", 120))
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def make_tokenizer(folder: Path, rows: Path) -> None:
    """A byte-level BPE tokenizer of 32,768 tokens, trained on the first rows."""
    from itertools import islice

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=32_768, special_tokens=special, show_progress=False)
    with rows.open(encoding="utf-8") as file:
        made.train_from_iterator(islice(file, 5000), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)


class Memory:
    """The anonymous memory of this process and its children, sampled: the peak over the start."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self.start = self.peak = _held()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(0.2):
            self.peak = max(self.peak, _held())


def _held() -> int:
    me = psutil.Process()
    return sum(_anonymous(process) for process in [me, *me.children(recursive=True)])


def _anonymous(process: psutil.Process) -> int:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        return int(status.partition("RssAnon:")[2].split(maxsplit=1)[0]) * 1024
    except (OSError, IndexError):
        return 0


def prepare(rows: Path, model: Path) -> int:
    """Prepares the rows; returns how many examples there are."""
    recipe = check({"model": str(model), "data": str(rows)})
    load = partial(load_tokenizer, model)
    return len(read_all(recipe, recipe.data, load(), "reading", load=load).examples)


def killed(rows: Path, model: Path) -> None:
    """Starts preparing in another process and kills it after two parts."""
    process = subprocess.Popen([sys.executable, __file__, "--prepare", str(rows), str(model)])
    home = Path(os.environ["TALIK_HOME"]) / "data"
    while process.poll() is None and len(list(home.glob("*/part-*"))) < 2:
        time.sleep(0.05)
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        psutil.wait_procs(children, timeout=30)
    process.wait()


def mapped(rows: Path, model: Path, count: int) -> float:
    """Rows a second of `datasets.map`: template and tokenizer, batched, on all cores."""
    import datasets

    tokenizer = load_tokenizer(model)

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    part = rows.with_name("part.jsonl")
    with rows.open("rb") as source, part.open("wb") as target:
        for _, line in zip(range(count), source, strict=False):
            target.write(line)
    data = datasets.load_dataset(
        "json", data_files=str(part), split="train", cache_dir=str(rows.parent / "hf")
    )
    started = time.perf_counter()
    data.map(encode, batched=True, num_proc=cores(), remove_columns=["messages"])
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--folder")
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.prepare:
        prepare(*map(Path, given.prepare))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        os.environ["TALIK_HOME"] = str(folder / "home")
        rows, model = folder / "rows.jsonl", folder / "model"
        make_rows(rows, given.rows)
        make_tokenizer(model, rows)
        result = measure(rows, model, given.rows)
    record("data", result)


def measure(rows: Path, model: Path, count: int) -> dict[str, Any]:
    size = rows.stat().st_size
    killed(rows, model)
    tables = list((Path(os.environ["TALIK_HOME"]) / "data").glob("*/part-*/about.json"))
    left = count - sum(json.loads(table.read_text(encoding="utf-8"))["rows"] for table in tables)
    with Memory() as memory:
        started = time.perf_counter()
        examples = prepare(rows, model)
        seconds = time.perf_counter() - started
    started = time.perf_counter()
    again = prepare(rows, model)
    found = time.perf_counter() - started
    assert examples == again == count, (examples, again)
    whole = sum(path.stat().st_size for path in (Path(os.environ["TALIK_HOME"]) / "data").rglob("*.*"))
    own = left / seconds
    theirs = mapped(rows, model, min(COMPARED, count))
    return {
        "rows": count,
        "bytes": size,
        "cores": cores(),
        "rows kept after a kill": count - left,
        "seconds after the kill": round(seconds, 1),
        "rows a second": round(own),
        "rows a second of datasets.map": round(theirs),
        "ratio": round(own / theirs, 2),
        "peak memory over the start, MiB": round((memory.peak - memory.start) / 2**20),
        "seconds to find it again": round(found, 2),
        "bytes kept": whole,
    }


if __name__ == "__main__":
    main()

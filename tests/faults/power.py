"""What a power loss leaves of a folder, at every point of something that writes into it.

The bytes of a file are safe once it is flushed, the names in a folder once the folder is. What is not safe may be there
or not: the names as they were at any moment since the flush, the bytes or none of them. That is less than most file
systems promise.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
from crashes import exit_code, watched

ROOT = 1
"""The number of the folder that is followed."""

Tree = dict[str, "bytes | None"]
"""The bytes of files and None for folders, by relative path."""


@attrs.frozen
class Moment:
    """A folder and all in it; files and folders go by numbers that are never used twice."""

    folders: dict[int, dict[str, int]]
    """The names in each folder."""
    files: dict[int, bytes]
    flushed: dict[int, int]
    """The index of the moment at which a file or folder was last flushed."""


def recorded(root: Path, action: Callable[[], object]) -> list[Moment]:
    """`root` at every point of `action`, which a forked process does; all that was there before is safe."""
    with tempfile.TemporaryFile() as answer:

        def record() -> None:
            recorder = _Recorder(root)
            watched(action, lambda _: recorder.look(), recorder.note_flush)
            recorder.look()
            with os.fdopen(os.dup(answer.fileno()), "wb") as file:
                pickle.dump(recorder.moments, file)

        assert exit_code(record) == 0
        answer.seek(0)
        return pickle.load(answer)


def after_power_loss(moments: list[Moment], first: int = 0) -> Iterator[Tree]:
    """Every tree that a power loss can leave, from moment `first` on."""
    seen = set()
    for now in range(first, len(moments)):
        for names_of in range(now + 1):
            for lost in _losses(moments, now):
                tree = _tree(moments, now, names_of, lost)
                if (key := frozenset(tree.items())) not in seen:
                    seen.add(key)
                    yield tree


def build(root: Path, tree: Tree) -> None:
    """Make `tree` as `root`, which is not there."""
    root.mkdir(parents=True)
    for path, content in sorted(tree.items()):
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)


class _Recorder:
    """Follows a folder from point to point."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.moments: list[Moment] = []
        self.numbers: dict[int, int] = {}
        """The number of each inode that is there."""
        self.given = 0
        self.flushed: dict[int, int] = {}
        self.look()
        self.flushed = dict.fromkeys(self.numbers.values(), 0)
        self.moments[0].flushed.update(self.flushed)

    def look(self) -> None:
        """Add the folder as it is now."""
        here: dict[int, int] = {}

        def number(inode: int) -> int:
            if inode not in self.numbers:
                self.given += 1
            here[inode] = self.numbers.setdefault(inode, self.given)
            return here[inode]

        folders: dict[int, dict[str, int]] = {}
        files: dict[int, bytes] = {}
        waiting = [(number(self.root.stat().st_ino), self.root)]
        while waiting:
            folder, path = waiting.pop()
            folders[folder] = {entry.name: number(entry.inode()) for entry in os.scandir(path)}
            for name, child in folders[folder].items():
                if (path / name).is_dir():
                    waiting.append((child, path / name))
                else:
                    files[child] = (path / name).read_bytes()
        self.numbers = here  # an inode that is gone may come back as another file
        self.moments.append(Moment(folders, files, dict(self.flushed)))

    def note_flush(self, descriptor: int) -> None:
        """Remember that what `descriptor` stands for is safe as it is now, which is as the last moment has it."""
        number = self.numbers.get(os.fstat(descriptor).st_ino)
        if number is not None:
            self.flushed[number] = len(self.moments) - 1


def _losses(moments: list[Moment], now: int) -> list[set[int]]:
    """Files that lose what was not flushed: none of them, all, each alone."""
    files, flushed = moments[now].files, moments[now].flushed
    unsafe = {
        file for file, content in files.items() if file not in flushed or moments[flushed[file]].files[file] != content
    }
    return [set(), unsafe, *({file} for file in unsafe)]


def _tree(moments: list[Moment], now: int, names_of: int, lost: set[int]) -> Tree:
    """The folder with the names of an earlier moment where they are not safe, and without the bytes that are lost."""
    flushed = moments[now].flushed
    tree: Tree = {}

    def content(file: int) -> bytes:
        if file in lost:
            return moments[flushed[file]].files[file] if file in flushed else b""
        return next(moment.files[file] for moment in reversed(moments[: now + 1]) if file in moment.files)

    def walk(folder: int, prefix: str) -> None:
        for name, child in moments[max(names_of, flushed.get(folder, 0))].folders.get(folder, {}).items():
            if any(child in moment.folders for moment in moments[: now + 1]):
                tree[prefix + name] = None
                walk(child, f"{prefix}{name}/")
            else:
                tree[prefix + name] = content(child)

    walk(ROOT, "")
    return tree

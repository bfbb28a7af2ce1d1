"""Run commands of the kit on a system that lacks what Windows lacks: ``python tests/like_windows.py COMMANDS.json``.

There is no ``fcntl``, ``resource``, ``fork`` or thread affinity; locks are those of ``msvcrt``; a folder cannot be
opened, links cannot be made, and a file that is open or mapped cannot be removed or replaced. Each command is a list of
words; all run in this process, one after the other, and the first that fails ends it.
"""

import errno
import fcntl
import json
import os
import shutil
import sys
import types
from pathlib import Path

import mindspore  # noqa: F401  libraries are imported as they are; only the kit meets the other system
import psutil  # noqa: F401

ABSENT_MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
#: Names of ``os`` that Windows does not have.
ABSENT_NAMES = ("fork", "geteuid", "getuid", "sched_getaffinity", "sched_setaffinity", "O_NOFOLLOW", "O_DIRECTORY")
REMOVING = ("unlink", "remove", "rename", "replace", "rmdir")


def locking(handle: int, mode: int, count: int) -> None:
    """Lock a handle as ``msvcrt.locking`` does: PermissionError if another one has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PermissionError(errno.EACCES, "Permission denied") from error


def open_files() -> set[str]:
    """Return the files that this process has open or mapped."""
    handles = set()
    for handle in os.listdir("/proc/self/fd"):
        try:
            handles.add(os.readlink(f"/proc/self/fd/{handle}"))
        except OSError:  # that of the list itself
            continue
    lines = Path("/proc/self/maps").read_text().splitlines()
    return handles | {line.split(maxsplit=5)[-1] for line in lines}


def refusing(function):
    """Return a function of ``os`` that refuses to remove or replace a file that is open."""

    def checked(path, *rest, **options):
        for name in (path, *rest[:1]):
            if os.path.realpath(name) in open_files():
                raise PermissionError(errno.EACCES, "The process cannot access the file", str(name))
        return function(path, *rest, **options)

    return checked


def become_like_windows() -> None:
    """Take from this process what Windows lacks."""
    opened = os.open

    def open_file(path, *rest, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *rest, **options)

    def no_link(source, target, *rest, **options):
        raise OSError(errno.EPERM, "A required privilege is not held by the client", str(target))

    os.open, os.symlink, shutil._use_fd_functions = open_file, no_link, False
    for name in REMOVING:
        setattr(os, name, refusing(getattr(os, name)))
    for name in filter(os.__dict__.__contains__, ABSENT_NAMES):
        delattr(os, name)
    sys.modules.update(dict.fromkeys(ABSENT_MODULES))
    sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)


def main() -> None:
    """Run the commands."""
    commands = json.loads(Path(sys.argv[1]).read_text())
    become_like_windows()
    from pixart_nb.cli import app

    for words in commands:
        print("$", *words, flush=True)
        if code := app(words, standalone_mode=False):
            sys.exit(code)


if __name__ == "__main__":
    main()

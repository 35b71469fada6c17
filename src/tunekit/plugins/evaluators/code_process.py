"""The process that runs one generated program: started by `sandbox.py`, which kills it where it takes too long.

It gives up, for itself and all that it starts, what a program that answers a question has no need of: time, memory,
other processes, the network, files outside of its directory. What the system enforces (resource limits; on Linux,
where they are allowed, namespaces and Landlock) comes first; Python's audit hook stands before it. A hook is no wall:
code that was written to break out of Python may get past it. It imports the standard library alone.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

FILE_BYTES = 16 * 1024**2
"""The longest file it may write."""
NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000
"""CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWPID, CLONE_NEWIPC: no network, and no process outside to be seen or killed."""
DIE_WITH_PARENT, NO_NEW_PRIVILEGES = 1, 38
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""Landlock's system calls, which have these numbers on every architecture."""
CHANGES = 0b1_1111_1111_0010
"""Landlock's rights to write, remove and make files: all of its first version but execute (0), read (2), list (3)."""
IN_DIRECTORY = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.utime")
"""Audit events that change files: allowed in the program's directory."""
NEVER = (
    "ctypes.", "os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.spawn", "os.startfile", "os.system",
    "os.chmod", "os.chown", "os.setxattr", "os.removexattr", "pty.", "signal.pthread_kill", "socket.",
    "subprocess.", "sys.remote_exec",
)  # fmt: skip
"""Beginnings of the audit events that end the program."""


def main() -> None:
    """Read a program from the standard input, run it, and write into the file `answer` what became of it."""
    directory, answer, seconds, memory = sys.argv[1], *map(int, sys.argv[2:])
    told = json.loads(sys.stdin.buffer.read())
    sys.dont_write_bytecode = True
    _part_from_the_system()
    for what, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # some systems know not all of them
            resource.setrlimit(what, (limit, limit))
    _keep_files(directory)
    # The last of a program's rights to go: what is above could not be done any more.
    sys.addaudithook(_hook(os.path.realpath(directory), answer))
    _say(answer, told["word"], _fault(told["program"]))
    os._exit(0)


def _part_from_the_system() -> None:
    """Go on as a child that is alone in its namespaces: whatever it starts ends with it. Best effort."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)
        if libc.unshare(NAMESPACES):
            return
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            os._exit(0)
        libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)


def _keep_files(directory: str) -> None:
    """Let the system refuse every change of files outside of the directory, where it has Landlock. Best effort."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        rights = (ctypes.c_uint64 * 1)(CHANGES)
        ruleset = libc.syscall(CREATE_RULESET, rights, ctypes.sizeof(rights), 0)
        if ruleset < 0:
            return
        place = os.open(directory, os.O_RDONLY)
        # struct landlock_path_beneath_attr, packed: the rights (64 bits), the directory's descriptor (32 bits).
        rule = CHANGES.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
        libc.syscall(ADD_RULE, ruleset, 1, rule, 0)
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        libc.syscall(RESTRICT_SELF, ruleset, 0)
        os.close(place)
        os.close(ruleset)


def _hook(directory: str, answer: int) -> Any:
    inside = directory + os.sep
    # By names of its own: the program may put others into the modules.
    decode, realpath, leave, say = os.fsdecode, os.path.realpath, os._exit, _say

    def is_inside(path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return True
        found = realpath(decode(path))
        return found.startswith(inside) or found == "/dev/null"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            changes = isinstance(arguments[2], int) and arguments[2] & ~(os.O_CLOEXEC | os.O_DIRECTORY) != os.O_RDONLY
            allowed = not changes or is_inside(arguments[0])
        elif event.startswith(IN_DIRECTORY):
            allowed = all(is_inside(argument) for argument in arguments if isinstance(argument, str | bytes))
        else:
            allowed = not event.startswith(NEVER)
        if not allowed:
            say(answer, "", f"forbidden: {event}")
            leave(1)

    return hook


def _fault(program: str) -> str:
    """What went wrong in the program; empty if it came to its end."""
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # whatever a program raises, SystemExit too, it has not come to its end
        return type(error).__name__
    return ""


def _say(answer: int, word: str, fault: str) -> None:
    os.write(answer, json.dumps({"word": word, "fault": fault}).encode())


if __name__ == "__main__":
    main()

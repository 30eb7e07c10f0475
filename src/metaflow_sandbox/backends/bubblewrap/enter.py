"""Gives up root before bubblewrap starts: `enter.py FD`, as real root.

For sandboxes made from an image. Bubblewrap as root would run the image's own
Python with root's rights until it drops them; so another user runs bubblewrap. That
user can't reach directories of root's: they are bound to a place where it can, in a
mount namespace that ends with the sandbox.

FD has a JSON object: `userns`, a user namespace to join first, or null; `binds` from
each source to its name below `place`; the `uid` to become, how many `processes` it may
have, and the `argv` to run.
Standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18


def call(name: str, *arguments: bytes | int | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def main(argv: list[str]) -> None:
    with open(int(argv[0]), "rb") as file:
        config = json.load(file)
    if config["userns"] is not None:
        call("setns", config["userns"], CLONE_NEWUSER)
        os.close(config["userns"])  # else the image's programs had it, too
    call("unshare", CLONE_NEWNS)
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    # Opened first, since what lies below the place itself is hidden from here on.
    sources = [os.open(source, os.O_PATH) for source in config["binds"]]
    call("mount", b"tmpfs", config["place"].encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=755")
    for fd, name in zip(sources, config["binds"].values()):
        source, target = f"/proc/self/fd/{fd}", f"{config['place']}/{name}"
        if os.path.isdir(source):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        call("mount", source.encode(), target.encode(), None, MS_BIND | MS_REC, None)
    os.setgroups([])
    os.setresgid(config["uid"], config["uid"], config["uid"])
    os.setresuid(config["uid"], config["uid"], config["uid"])
    limit = (config["processes"], config["processes"])
    resource.setrlimit(resource.RLIMIT_NPROC, limit)  # of this user, who is nobody else
    os.chdir("/")
    os.execv(config["argv"][0], config["argv"])


main(sys.argv[1:])

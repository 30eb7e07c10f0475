"""The system call filter, assembled here so that no library is needed to load it.

It is a deny-list: it takes away what a step has no use for and what has led out of
containers before, and doesn't keep out calls that future kernels add. Namespaces
and the missing capabilities come first; this comes on top.
"""

from __future__ import annotations

import platform
import struct

_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_EPERM, _ENOSYS, _EAFNOSUPPORT = 0x50000 | 1, 0x50000 | 38, 0x50000 | 97

# Offsets in struct seccomp_data; arguments are 64-bit, the low half comes first.
_NUMBER, _ARCHITECTURE, _ARGUMENT_0, _ARGUMENT_1 = 0, 4, 16, 24

_NEW_NAMESPACES = 0x7E020080  # every CLONE_NEW* flag
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_FAMILIES = (1, 2, 10, 16)  # unix, inet, inet6, netlink: a network namespace doesn't hold vsock

# Numbers from 424 on are the same on every architecture.
_COMMON = {
    "io_uring_setup": 425,  # its operations pass by every rule below
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
    "quotactl_fd": 443,
    "open_tree_attr": 467,
}
_X86_64 = {
    "ptrace": 101, "syslog": 103, "uselib": 134, "personality": 135, "ustat": 136,
    "vhangup": 153, "modify_ldt": 154, "pivot_root": 155, "_sysctl": 156, "adjtimex": 159,
    "chroot": 161, "acct": 163, "settimeofday": 164, "mount": 165, "umount2": 166,
    "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170, "setdomainname": 171,
    "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176, "quotactl": 179,
    "nfsservctl": 180, "lookup_dcookie": 212, "clock_settime": 227, "mbind": 237,
    "set_mempolicy": 238, "get_mempolicy": 239, "kexec_load": 246, "add_key": 248,
    "request_key": 249, "keyctl": 250, "migrate_pages": 256, "unshare": 272,
    "move_pages": 279, "perf_event_open": 298, "fanotify_init": 300,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308,
    "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313,
    "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323,
}  # fmt: skip
_AARCH64 = {
    "lookup_dcookie": 18, "umount2": 39, "mount": 40, "pivot_root": 41, "nfsservctl": 42,
    "chroot": 51, "vhangup": 58, "quotactl": 60, "acct": 89, "personality": 92, "unshare": 97,
    "kexec_load": 104, "init_module": 105, "delete_module": 106, "clock_settime": 112,
    "syslog": 116, "ptrace": 117, "reboot": 142, "sethostname": 161, "setdomainname": 162,
    "settimeofday": 170, "adjtimex": 171, "add_key": 217, "request_key": 218, "keyctl": 219,
    "swapon": 224, "swapoff": 225, "mbind": 235, "get_mempolicy": 236, "set_mempolicy": 237,
    "migrate_pages": 238, "move_pages": 239, "perf_event_open": 241, "fanotify_init": 262,
    "name_to_handle_at": 264, "open_by_handle_at": 265, "clock_adjtime": 266, "setns": 268,
    "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "finit_module": 273,
    "bpf": 280, "userfaultfd": 282, "kexec_file_load": 294,
}  # fmt: skip

#: {machine: (AUDIT_ARCH, denied calls, numbers of clone, ioctl, socket and socketpair)}
_ARCHITECTURES = {
    "x86_64": (0xC000003E, _X86_64, 56, 16, 41, 53),
    "aarch64": (0xC00000B7, _AARCH64, 220, 29, 198, 199),
}
SUPPORTED = tuple(_ARCHITECTURES)
_CLONE3 = 435
_X32 = 0x40000000


def program(machine: str | None = None) -> bytes:
    """The filter as an array of `struct sock_filter`, for bubblewrap's `--seccomp` or prctl.

    Raises:
        KeyError: there is no table for this machine's architecture.
    """
    machine = machine or platform.machine()
    architecture, denied, clone, ioctl, socket, socketpair = _ARCHITECTURES[machine]
    code: list[bytes] = []

    def emit(operation: int, value: int, yes: int = 0, no: int = 0) -> None:
        code.append(struct.pack("=HBBI", operation, yes, no, value))

    emit(_LOAD, _ARCHITECTURE)
    emit(_JUMP_EQ, architecture, yes=1)
    emit(_RETURN, _KILL)
    emit(_LOAD, _NUMBER)
    if machine == "x86_64":  # the x32 calls are the same ones under other numbers
        emit(_JUMP_GE, _X32, no=1)
        emit(_RETURN, _KILL)
    for number in sorted({**denied, **_COMMON}.values()):
        emit(_JUMP_EQ, number, no=1)
        emit(_RETURN, _EPERM)
    # clone3's flags are in memory, out of a filter's reach; C libraries fall back to clone.
    emit(_JUMP_EQ, _CLONE3, no=1)
    emit(_RETURN, _ENOSYS)
    emit(_JUMP_EQ, clone, no=4)
    emit(_LOAD, _ARGUMENT_0)
    emit(_JUMP_SET, _NEW_NAMESPACES, no=1)
    emit(_RETURN, _EPERM)
    emit(_RETURN, _ALLOW)
    # The kernel looks at the low 32 bits of the request alone, and so must this.
    emit(_JUMP_EQ, ioctl, no=6)
    emit(_LOAD, _ARGUMENT_1)
    for request in (_TIOCSTI, _TIOCLINUX):
        emit(_JUMP_EQ, request, no=1)
        emit(_RETURN, _EPERM)
    emit(_RETURN, _ALLOW)
    for call in (socket, socketpair):
        emit(_JUMP_EQ, call, no=2 * len(_FAMILIES) + 2)
        emit(_LOAD, _ARGUMENT_0)
        for family in _FAMILIES:
            emit(_JUMP_EQ, family, no=1)
            emit(_RETURN, _ALLOW)
        emit(_RETURN, _EAFNOSUPPORT)
    emit(_RETURN, _ALLOW)
    return b"".join(code)

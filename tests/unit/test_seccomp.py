"""The system call filter, run by an interpreter of its bytecode, does what it is there for."""

import errno
import struct

import pytest

from metaflow_sandbox.backends.seccomp import SUPPORTED, program

ALLOW, KILL = "allow", "kill"
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
I386, ARM = 0x40000003, 0x40000028


def interpret(filter_, arch, number, *arguments):
    """What the kernel makes of a call: "allow", "kill", or the error it gives."""
    arguments = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("=IIQ6Q", number & 0xFFFFFFFF, arch, 0, *arguments)
    code = list(struct.iter_unpack("=HBBI", filter_))
    accumulator, at = 0, 0
    while True:
        operation, yes, no, value = code[at]
        at += 1
        if operation == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            assert value % 4 == 0
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif operation == 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
            at += yes if accumulator == value else no
        elif operation == 0x35:  # … | BPF_JGE
            at += yes if accumulator >= value else no
        elif operation == 0x45:  # … | BPF_JSET
            at += yes if accumulator & value else no
        elif operation == 0x06:  # BPF_RET | BPF_K
            if value == 0x7FFF0000:
                return ALLOW
            if value == 0x80000000:
                return KILL
            assert value >> 16 == 5, "an error"
            return errno.errorcode[value & 0xFFFF]
        else:
            pytest.fail(f"the kernel knows no operation {operation:#x}")


# From the kernel's headers: {name: (x86_64, aarch64)}.
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "mmap": (9, 222), "brk": (12, 214),
    "openat": (257, 56), "execve": (59, 221), "exit_group": (231, 94), "wait4": (61, 260),
    "futex": (202, 98), "getrandom": (318, 278), "kill": (62, 129), "pidfd_open": (434, 434),
    "prctl": (157, 167), "seccomp": (317, 277), "prlimit64": (302, 261), "rseq": (334, 293),
    "connect": (42, 203), "open": (2, None), "fork": (57, None),
    "vfork": (58, None), "statx": (332, 291), "close_range": (436, 436), "epoll_wait": (232, None),
    "ppoll": (271, 73), "landlock_create_ruleset": (444, 444), "memfd_create": (319, 279),
}  # fmt: skip
DENIED = {
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "ptrace": (101, 117), "bpf": (321, 280),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "syslog": (103, 116), "acct": (163, 89), "quotactl": (179, 60),
    "personality": (135, 92), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "sethostname": (170, 161),
    "setdomainname": (171, 162), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262), "mbind": (237, 235), "move_pages": (279, 239),
    "migrate_pages": (256, 238), "lookup_dcookie": (212, 18), "vhangup": (153, 58),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "pidfd_getfd": (438, 438), "mount_setattr": (442, 442), "quotactl_fd": (443, 443),
    "modify_ldt": (154, None), "iopl": (172, None), "ioperm": (173, None), "uselib": (134, None),
    "ustat": (136, None), "_sysctl": (156, None),
}  # fmt: skip
CLONE, CLONE3, IOCTL = (56, 220), (435, 435), (16, 29)
SOCKETS = pytest.mark.parametrize("socket", [(41, 198), (53, 199)], ids=["socket", "socketpair"])
HIGH = 0xDEADBEEF << 32


@pytest.fixture(params=sorted(ARCHITECTURES))
def call(request):
    """Makes a call on one architecture; None if it has no such call."""
    machine = request.param
    filter_, arch = program(machine), ARCHITECTURES[machine]

    def call(numbers, *arguments):
        number = numbers if isinstance(numbers, int) else numbers[machine == "aarch64"]
        return None if number is None else interpret(filter_, arch, number, *arguments)

    return call


def test_every_supported_machine_is_tested_here():
    assert set(SUPPORTED) == set(ARCHITECTURES)


def test_a_machine_without_a_table_gets_no_filter():
    with pytest.raises(KeyError):
        program("riscv64")


@pytest.mark.parametrize("machine", SUPPORTED)
def test_the_kernel_can_load_the_filter(machine):
    code = list(struct.iter_unpack("=HBBI", program(machine)))
    assert 0 < len(code) <= 4096
    assert code[-1][0] == 0x06, "the last one returns"
    for at, (operation, yes, no, value) in enumerate(code):
        if operation & 0x07 == 0x05:
            assert at + 1 + max(yes, no) < len(code), "no jump leads out"
        if operation == 0x20:
            assert value < 64, "no load reads past the end of struct seccomp_data"


@pytest.mark.parametrize("name", ALLOWED)
def test_what_programs_need_is_allowed(call, name):
    assert call(ALLOWED[name]) in (ALLOW, None)


@pytest.mark.parametrize("name", DENIED)
def test_what_steps_have_no_use_for_is_denied(call, name):
    assert call(DENIED[name]) in ("EPERM", None)
    assert call(DENIED[name], *[2**64 - 1] * 6) in ("EPERM", None), "whatever the arguments are"


NAMESPACES = {
    "CLONE_NEWTIME": 0x80,
    "CLONE_NEWNS": 0x00020000,
    "CLONE_NEWCGROUP": 0x02000000,
    "CLONE_NEWUTS": 0x04000000,
    "CLONE_NEWIPC": 0x08000000,
    "CLONE_NEWUSER": 0x10000000,
    "CLONE_NEWPID": 0x20000000,
    "CLONE_NEWNET": 0x40000000,
}
SIGCHLD = 17
FORK = 0x01200000 | SIGCHLD  # CLONE_CHILD_CLEARTID | CLONE_CHILD_SETTID, as libc's fork
THREAD = 0x003D0F00  # as pthread_create
VFORK = 0x4100 | SIGCHLD


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("others", [0, SIGCHLD, FORK, THREAD, HIGH], ids=hex)
def test_no_namespace_can_be_made(call, namespace, others):
    assert call(CLONE, NAMESPACES[namespace] | others) == "EPERM"


@pytest.mark.parametrize("flags", [0, SIGCHLD, FORK, THREAD, VFORK], ids=hex)
def test_processes_and_threads_can_be_made(call, flags):
    assert call(CLONE, flags, 2**64 - 1, 2**64 - 1) == ALLOW


def test_clone3_is_said_to_be_missing_so_that_libraries_use_clone(call):
    assert call(CLONE3) == call(CLONE3, 2**64 - 1, 88) == "ENOSYS"


TERMINAL = {"TIOCSTI": 0x5412, "TIOCLINUX": 0x541C}


@pytest.mark.parametrize("request_", TERMINAL)
@pytest.mark.parametrize("high", [0, 1 << 32, HIGH, 0xFFFFFFFF << 32], ids=hex)
@pytest.mark.parametrize("descriptor", [0, 2**64 - 1])
def test_nothing_can_be_typed_into_the_users_terminal(call, request_, high, descriptor):
    assert call(IOCTL, descriptor, TERMINAL[request_] | high) == "EPERM"


@pytest.mark.parametrize("request_", [0x5401, 0x5413, 0x541B, 0x5411, 0x5413 | HIGH, 0], ids=hex)
def test_other_ioctls_are_allowed(call, request_):
    assert call(IOCTL, 0x5412, request_, 0x5412) == ALLOW


FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16}


@SOCKETS
@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_sockets_can_be_made(call, socket, family):
    assert call(socket, FAMILIES[family], 1, 0) == ALLOW


@SOCKETS
def test_no_other_family_of_sockets_can_be_made(call, socket):
    for family in {*range(64), 2**31, 2**32 - 1} - set(FAMILIES.values()):
        for high in (0, HIGH):
            assert call(socket, family | high, 1, 0) == "EAFNOSUPPORT", family


@SOCKETS
def test_a_socket_to_the_hypervisor_is_refused(call, socket):
    assert call(socket, 40, 1, 0) == "EAFNOSUPPORT"


@pytest.mark.parametrize("machine", SUPPORTED)
@pytest.mark.parametrize("foreign", [0, I386, ARM, 0xC000003E, 0xC00000B7, 0x4000003E], ids=hex)
def test_calls_of_another_architecture_end_the_process(machine, foreign):
    if foreign == ARCHITECTURES[machine]:
        foreign ^= 1
    for number in range(512):
        assert interpret(program(machine), foreign, number) == KILL


def test_calls_of_x32_end_the_process():
    for number in [*range(600), 0x3FFFFFFF, 0x7FFFFFFF, 0xBFFFFFFF]:
        x32 = (number | 0x40000000) & 0xFFFFFFFF
        assert interpret(program("x86_64"), ARCHITECTURES["x86_64"], x32) == KILL
    assert interpret(program("x86_64"), ARCHITECTURES["x86_64"], -1) == KILL


def test_every_call_number_has_an_answer(call):
    answers = {call(number) for number in range(1024)}
    assert answers == {ALLOW, "EPERM", "ENOSYS", "EAFNOSUPPORT"}

"""Runs one program that a model wrote, in a process that has shut itself in first. Started by `sandbox`; stdlib alone.

Before the program begins, the process gives up, for good and for all that it could start:
  - new processes, sockets, other programs, signals to others, tracing, mounting, shared memory: a seccomp filter answers EPERM
  - files: the filter lets it open, make, rename and remove none for writing; where the kernel has Landlock, it reads the
    interpreter's library and its own empty folder alone
  - memory, time, number of open files: resource limits; it ends when its parent does
A hook of the interpreter says in words what was tried; it is the filter that holds.

Source: seccomp(2), landlock(7), setrlimit(2)
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2
ALLOW, DENY = 0x7FFF0000, 0x00050000
CLONE_THREAD = 0x00010000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
LANDLOCK = (444, 445, 446)
"""create_ruleset, add_rule, restrict_self: the same numbers on every machine."""

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Machine -> what seccomp calls it."""
_X86 = dict(
    clone=56, fork=57, vfork=58, execve=59, execveat=322, socket=41, socketpair=53, connect=42, bind=49, kill=62, tkill=200,
    tgkill=234, ptrace=101, mount=165, umount2=166, unshare=272, setns=308, process_vm_readv=310, process_vm_writev=311,
    pidfd_open=434, pidfd_send_signal=424, bpf=321, perf_event_open=298, io_uring_setup=425, keyctl=250, add_key=248,
    init_module=175, finit_module=313, reboot=169, chroot=161, setsid=112, setpgid=109, prlimit64=302, userfaultfd=323,
    name_to_handle_at=303, open_by_handle_at=304, shmget=29, semget=64, msgget=68, mq_open=240, memfd_create=319,
)  # fmt: skip
_X86_FILES = dict(
    open=2, creat=85, openat=257, openat2=437, truncate=76, rename=82, mkdir=83, rmdir=84, link=86, unlink=87, symlink=88,
    chmod=90, chown=92, lchown=94, mknod=133, mkdirat=258, mknodat=259, fchownat=260, unlinkat=263, renameat=264, linkat=265,
    symlinkat=266, fchmodat=268, renameat2=316,
)  # fmt: skip
_ARM = dict(
    clone=220, execve=221, execveat=281, socket=198, socketpair=199, connect=203, bind=200, kill=129, tkill=130, tgkill=131,
    ptrace=117, mount=40, umount2=39, unshare=97, setns=268, process_vm_readv=270, process_vm_writev=271, pidfd_open=434,
    pidfd_send_signal=424, bpf=280, perf_event_open=241, io_uring_setup=425, keyctl=219, add_key=217, init_module=105,
    finit_module=273, reboot=142, chroot=51, setsid=157, setpgid=154, prlimit64=261, userfaultfd=282, name_to_handle_at=264,
    open_by_handle_at=265, shmget=194, semget=190, msgget=186, mq_open=180, memfd_create=279,
)  # fmt: skip
_ARM_FILES = dict(
    openat=56, openat2=437, truncate=45, mkdirat=34, mknodat=33, fchownat=54, unlinkat=35, renameat=38, linkat=37, symlinkat=36,
    fchmodat=53, renameat2=276,
)  # fmt: skip
CALLS = {"x86_64": (_X86, _X86_FILES), "aarch64": (_ARM, _ARM_FILES)}
"""Machine -> numbers of the system calls that are refused, and of those that change files."""
CLONE3 = 435
"""On every machine; its flags cannot be seen by a filter, so that it is answered as one the kernel does not have."""


PROGRAM = "<program>"
"""What the program's file is called in its tracebacks."""


def find_machine() -> str | None:
    """Find the machine's name where programs can be shut in here; None where they cannot."""
    machine = platform.machine()
    return machine if sys.platform == "linux" and machine in MACHINES and struct.calcsize("P") == 8 else None


def build_filter(machine: str) -> bytes:
    """Build the seccomp program."""

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    load, equal, any_bit, answer = 0x20, 0x15, 0x45, 0x06
    refuse, absent = step(answer, DENY | errno.EPERM), step(answer, DENY | errno.ENOSYS)
    refused, changing = CALLS[machine]
    program = [
        step(load, 4), step(equal, MACHINES[machine], 1, 0), step(answer, 0x80000000),  # another machine's calls: killed
        step(load, 0), step(0x35, 0x40000000, 0, 1), refuse,  # x32's calls
        step(equal, CLONE3, 0, 1), absent,
    ]  # fmt: skip
    for name, number in refused.items():
        if name == "clone":  # a thread, which lives and dies with the process, may begin
            program += [
                step(equal, number, 0, 4),
                step(load, 16),
                step(any_bit, CLONE_THREAD, 1, 0),
                refuse,
                step(load, 0),
            ]
        else:
            program += [step(equal, number, 0, 1), refuse]
    for name, number in changing.items():
        flags = {"open": 24, "openat": 32}.get(name)
        if flags is None:
            program += [step(equal, number, 0, 1), refuse]
        else:
            program += [
                step(equal, number, 0, 4),
                step(load, flags),
                step(any_bit, WRITING, 0, 1),
                refuse,
                step(load, 0),
            ]
    return b"".join([*program, step(answer, ALLOW)])


def install_filter(machine: str) -> None:
    """Errors: OSError where the kernel refuses it"""
    program = build_filter(machine)
    buffer = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_void_p)]

    wanted = Program(len(program) // 8, ctypes.addressof(buffer))
    if LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(wanted), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def restrict_reading(folder: str) -> bool:
    """Landlock: read the interpreter's files and `folder`, touch nothing else. False where there is no Landlock."""
    version = LIBC.syscall(LANDLOCK[0], None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    everything = (1 << 13) - 1 if version < 2 else (1 << 14) - 1 if version < 3 else (1 << 15) - 1
    reading = (1 << 2) | (1 << 3)  # files, and lists of folders
    handled = ctypes.c_uint64(everything)
    rules = LIBC.syscall(LANDLOCK[0], ctypes.byref(handled), ctypes.c_size_t(8), ctypes.c_uint32(0))
    if rules < 0:
        return False

    class Below(ctypes.Structure):
        _pack_ = 1
        _layout_ = "ms"
        _fields_ = [("access", ctypes.c_uint64), ("parent", ctypes.c_int32)]

    readable = [
        sys.prefix,
        sys.base_prefix,
        "/usr/lib",
        "/lib",
        "/lib64",
        "/usr/share/zoneinfo",
        "/dev/null",
        "/dev/urandom",
    ]
    for place in filter(os.path.exists, [*readable, folder]):
        opened = os.open(place, os.O_PATH | os.O_CLOEXEC)
        below = Below(reading if os.path.isdir(place) else 1 << 2, opened)
        failed = LIBC.syscall(LANDLOCK[1], rules, 1, ctypes.byref(below), ctypes.c_uint32(0))
        os.close(opened)
        if failed:
            return False
    shut = LIBC.syscall(LANDLOCK[2], rules, ctypes.c_uint32(0)) == 0
    os.close(rules)
    return shut


def shut_in(machine: str, folder: str, seconds: int, megabytes: int) -> None:
    """Give up what a program may not do. Errors: OSError where the kernel does not hold it"""
    for name, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, megabytes << 20),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))
    if LIBC.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0) or LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    restrict_reading(folder)
    install_filter(machine)


def tell_tries(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook: what cannot be done here is said in words."""
    kind = event.partition(".")[0]
    if event in ("os.fork", "os.forkpty", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.kill"):
        raise PermissionError(f"it may start no process ({event})")
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
        raise PermissionError(f"it may write no file ({arguments[0]!r})")
    if kind == "socket":
        raise PermissionError(f"it may open no socket ({event})")


def main() -> int:
    """Read what to run from standard input; write {"token"} where it passed, else {"note"}, as one line when it is done."""
    asked = json.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    import traceback  # before the door closes, with what it reads

    token = asked.pop("token")
    machine = find_machine()
    try:
        if machine is None:
            raise OSError(errno.ENOSYS, "no seccomp")
        shut_in(machine, os.getcwd(), asked["seconds"], asked["megabytes"])
    except (OSError, ValueError) as error:
        os.write(report, json.dumps({"broken": f"{error}", "by": token}).encode() + b"\n")
        return 1
    sys.addaudithook(tell_tries)
    note = ""
    try:
        exec(compile(asked["program"], PROGRAM, "exec"), {"__name__": "__main__"})
    except SystemExit:
        note = "it ended itself before its tests did"
    except BaseException as error:  # whatever a program raises is its own
        try:
            frames = reversed(traceback.extract_tb(error.__traceback__))
            place = next((frame.lineno for frame in frames if frame.filename == PROGRAM), None)
            note = f"{type(error).__name__}: {str(error)[:200]}" + (f" (line {place})" if place else "")
        except BaseException:
            note = "it failed, and so did telling how"
    os.write(report, json.dumps({"note": note[:300]} if note else {"token": token}).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())

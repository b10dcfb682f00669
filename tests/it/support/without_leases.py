"""Runs a program as on a file system that has no leases: fcntl(F_SETLEASE) answers EINVAL, as it does on NFS or 9p.

    python3 without_leases.py PROGRAM [ARGUMENT...]
"""

import ctypes
import errno
import os
import platform
import struct
import sys

FCNTL = {"x86_64": 72, "aarch64": 25}[platform.machine()]
F_SETLEASE = 1024

# linux/seccomp.h, linux/prctl.h
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
NUMBER, SECOND_ARGUMENT = 0, 24

# linux/bpf_common.h
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06


def instruction(code: int, value: int, skip_if_true: int = 0, skip_if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, skip_if_true, skip_if_false, value)


program = b"".join(
    [
        instruction(LOAD, NUMBER),
        instruction(JUMP_IF_EQUAL, FCNTL, 0, 3),
        instruction(LOAD, SECOND_ARGUMENT),
        instruction(JUMP_IF_EQUAL, F_SETLEASE, 0, 1),
        instruction(RETURN, ERRNO | errno.EINVAL),
        instruction(RETURN, ALLOW),
    ]
)
instructions = ctypes.create_string_buffer(program)
# struct sock_fprog: the pointer is aligned.
filters = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions)))
libc = ctypes.CDLL(None, use_errno=True)
for call in [(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filters, 0, 0)]:
    if libc.prctl(*call) != 0:
        sys.exit(f"error: prctl {call[0]}: {os.strerror(ctypes.get_errno())}")
os.execv(sys.argv[1], sys.argv[1:])

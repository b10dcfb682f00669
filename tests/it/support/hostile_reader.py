"""A root process of a container that tries to change what it may only read.

usage: hostile_reader.py TREE|- FILE OPERATION

TREE is where it sees the public tree, FILE is a file of a model in it. With `-` it has the file as descriptor 0 instead.
It speaks over descriptor 1: a line with what the kernel said; then, for each line it gets, it goes on with what it holds
(a map, a lock) and answers with a line again.
"""

import ctypes
import fcntl
import mmap
import os
import shutil
import socket
import stat
import struct
import sys

EVIL = b"EVIL"
AT = 8192
libc = ctypes.CDLL(None, use_errno=True)
tree, file, name = sys.argv[1:4]
has_tree = tree != "-"
path = os.path.join(tree, file) if has_tree else "/proc/self/fd/0"
snapshot = os.path.dirname(os.path.dirname(path)) if has_tree else "/proc/self/fd/0"
# Where the attacker puts things: in the tree, so that links and renames stay on one mount.
loot = os.path.join(tree, "loot") if has_tree else "/tmp"
own = f"/tmp/hostile-{os.getpid()}"


def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def syscall(number, *arguments):
    return checked(libc.syscall(number, *arguments))


def reader():
    return os.open(path, os.O_RDONLY) if has_tree else 0


def writer(flags=os.O_RDWR):
    return os.open(path, flags)


def evil_file(directory=None, size=300_000):
    """A file of the attacker's own; in the tree if `directory` says so."""
    directory = directory or own
    os.makedirs(directory, exist_ok=True)
    at = os.path.join(directory, "evil")
    with open(at, "wb") as f:
        f.write(EVIL * (size // 4))
    return at


def write():
    os.write(writer(os.O_WRONLY), EVIL)


def pwrite():
    os.pwrite(writer(), EVIL, AT)


def pwritev():
    os.pwritev(writer(), [EVIL], AT)


def append():
    os.write(writer(os.O_WRONLY | os.O_APPEND), EVIL)


def write_direct():
    page = mmap.mmap(-1, 4096)
    page.write(EVIL * 1024)
    os.pwritev(writer(os.O_RDWR | os.O_DIRECT), [page], 0)


def write_and_set_times_back():
    before = os.stat(path)
    os.pwrite(writer(), EVIL, AT)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def write_and_write_back():
    f = writer()
    before = os.pread(f, 4, AT)
    os.pwrite(f, EVIL, AT)
    os.pwrite(f, before, AT)
    yield
    os.pwrite(f, EVIL, AT)


def write_to_given_descriptor():
    os.write(reader(), EVIL)


def truncate():
    os.truncate(path, 10)


def ftruncate_given_descriptor():
    os.ftruncate(reader(), 10)


def truncate_and_extend():
    size = os.stat(path).st_size
    os.truncate(path, 0)
    os.truncate(path, size)


def open_truncating():
    writer(os.O_WRONLY | os.O_TRUNC)


def open_reading_and_truncating():
    writer(os.O_RDONLY | os.O_TRUNC)


def fallocate_longer():
    checked(libc.fallocate(writer(), 0, ctypes.c_long(0), ctypes.c_long(1 << 20)))


def punch_hole():
    checked(libc.fallocate(writer(), 3, ctypes.c_long(0), ctypes.c_long(4096)))


def zero_range():
    checked(libc.fallocate(writer(), 16, ctypes.c_long(0), ctypes.c_long(4096)))


def collapse_range():
    checked(libc.fallocate(writer(), 8, ctypes.c_long(0), ctypes.c_long(4096)))


def copy_file_range_into():
    os.copy_file_range(os.open(evil_file(), os.O_RDONLY), writer(), 4096)


def clone_into():
    fcntl.ioctl(writer(), 0x40049409, os.open(evil_file(loot if has_tree else None), os.O_RDONLY))


def dedupe_into():
    source = os.open(evil_file(loot if has_tree else None), os.O_RDONLY)
    request = struct.pack("=QQHHIqQQiI", 0, 4096, 1, 0, 0, reader(), 0, 0, 0, 0)
    answer = fcntl.ioctl(source, 0xC0189436, request)
    status = struct.unpack("=QQHHIqQQiI", answer)[8]
    if status < 0:
        raise OSError(-status, os.strerror(-status))
    return "the bytes differ" if status else "shared"


def move_extents_into():
    evil = os.open(evil_file(loot if has_tree else None), os.O_RDWR)
    os.fsync(evil)
    f = writer()
    try:
        fcntl.ioctl(evil, 0xC028660F, struct.pack("=IIQQQQ", 0, f, 0, 0, 4, 0))
    finally:
        # The bytes in memory are still the right ones.
        os.posix_fadvise(f, 0, 0, os.POSIX_FADV_DONTNEED)


def sendfile_into():
    os.sendfile(writer(), os.open(evil_file(), os.O_RDONLY), 0, 4096)


def splice_into():
    out, into = os.pipe()
    os.write(into, EVIL)
    if hasattr(os, "splice"):
        os.splice(out, writer(), 4)
    else:
        checked(libc.splice(out, None, writer(), None, 4, 0))


def chmod():
    os.chmod(path, 0o777)


def fchmod_given_descriptor():
    os.fchmod(reader(), 0o777)


def chmod_set_uid():
    os.chmod(path, 0o4777)


def chown():
    os.chown(path, 1000, 1000)


def fchown_given_descriptor():
    os.fchown(reader(), 1000, 1000)


def utimensat():
    os.utime(path, (0, 0))


def futimens_given_descriptor():
    os.utime(reader(), (0, 0))


def setxattr():
    os.setxattr(path, "user.evil", EVIL)


def setxattr_given_descriptor():
    os.setxattr(reader(), "user.evil", EVIL)


def set_acl():
    # Version 2: user::rw-, user 1000:rw-, group::r--, mask::rw-, other::r--
    entries = [(1, 6, -1), (2, 6, 1000), (4, 4, -1), (16, 6, -1), (32, 4, -1)]
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    os.setxattr(path, "system.posix_acl_access", value)


def set_file_capability():
    os.setxattr(path, "security.capability", struct.pack("<IIIII", 0x02000001, 1, 0, 0, 0))


def removexattr():
    os.removexattr(path, "user.evil")


def set_flags(flag):
    f = reader()
    flags = struct.unpack("i", fcntl.ioctl(f, 0x80086601, struct.pack("i", 0)))[0]
    fcntl.ioctl(f, 0x40086602, struct.pack("i", flags | flag))


def set_flag_nodump():
    set_flags(0x40)


def set_flag_immutable():
    set_flags(0x10)


def unlink():
    os.unlink(path)


def rename_away():
    os.makedirs(loot, exist_ok=True)
    os.rename(path, os.path.join(loot, "stolen"))


def rename_over():
    os.rename(evil_file(loot), path)


def rename_exchange():
    at = evil_file(loot)
    syscall(316, -100, at.encode(), -100, path.encode(), 2)
    os.pwrite(os.open(at, os.O_RDWR), EVIL, AT)


def link_out_and_write():
    os.makedirs(loot, exist_ok=True)
    at = os.path.join(loot, "link")
    os.link(path, at)
    yield
    os.pwrite(os.open(at, os.O_RDWR), EVIL, AT)


def link_in():
    os.link(evil_file(loot), os.path.join(snapshot, "evil.py"))


def link_proc_descriptor():
    os.makedirs(loot, exist_ok=True)
    f = reader()
    at = os.path.join(loot, "link")
    checked(libc.linkat(-100, f"/proc/self/fd/{f}".encode(), -100, at.encode(), 0x400))
    os.pwrite(os.open(at, os.O_RDWR), EVIL, AT)


def link_empty_path():
    os.makedirs(loot, exist_ok=True)
    at = os.path.join(loot, "link")
    checked(libc.linkat(reader(), b"", -100, at.encode(), 0x1000))
    os.pwrite(os.open(at, os.O_RDWR), EVIL, AT)


def symlink_over():
    os.unlink(path)
    os.symlink("/etc/passwd", path)


def create_in_snapshot():
    with open(os.path.join(snapshot, "modeling_evil.py"), "wb") as f:
        f.write(EVIL)


def create_unreadable_name():
    os.close(os.open(os.path.join(snapshot.encode(), b"\xff"), os.O_CREAT | os.O_WRONLY))


def temporary_file_into_snapshot():
    f = os.open(snapshot, os.O_TMPFILE | os.O_RDWR)
    os.write(f, EVIL)
    at = os.path.join(snapshot, "evil.py")
    checked(libc.linkat(-100, f"/proc/self/fd/{f}".encode(), -100, at.encode(), 0x400))


def mkdir_in_snapshot():
    os.mkdir(os.path.join(snapshot, "__pycache__"))


def replace_directory():
    at = os.path.dirname(path) if has_tree else path + "/d"
    os.makedirs(loot, exist_ok=True)
    os.rename(at, os.path.join(loot, "d"))
    os.mkdir(at)
    shutil.copyfile(evil_file(), os.path.join(at, os.path.basename(path)))


def replace_snapshot():
    os.makedirs(loot, exist_ok=True)
    os.rename(snapshot, os.path.join(loot, "snapshot"))
    os.mkdir(snapshot)


def link_over_directory_above():
    above = os.path.join(tree, file.split("/")[0])
    os.makedirs(loot, exist_ok=True)
    os.rename(above, os.path.join(loot, "above"))
    os.symlink("loot/above", above)


def lock_everybody_out():
    os.chmod(os.path.join(tree, file.split("/")[0]) if has_tree else path, 0)


def rmdir():
    os.rmdir(os.path.dirname(path) if has_tree else path)


def mknod_in_snapshot():
    os.mknod(os.path.join(snapshot, "fifo"), stat.S_IFIFO | 0o666)
    os.mknod(os.path.join(snapshot, "null"), stat.S_IFCHR | 0o666, os.makedev(1, 3))


def socket_in_snapshot():
    s = socket.socket(socket.AF_UNIX)
    os.chdir(snapshot)
    s.bind("s")


def flock_and_hold():
    f = reader()
    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield


def lock_description_and_hold():
    f = reader()
    # F_OFD_SETLK with F_RDLCK over all of the file
    fcntl.fcntl(f, 37, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0))
    yield


def read_lease_and_hold():
    f = reader()
    fcntl.fcntl(f, 10, 23)
    fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    yield


def write_lease_and_give_way():
    f = reader()
    fcntl.fcntl(f, 10, 23)
    fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def map_given_descriptor_writable():
    mmap.mmap(reader(), 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)[0] = 69


def map_and_mprotect():
    size = 4096
    libc.mmap.restype = ctypes.c_void_p
    at = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, reader(), ctypes.c_long(0))
    checked(libc.mprotect(ctypes.c_void_p(at), size, mmap.PROT_READ | mmap.PROT_WRITE))
    ctypes.memmove(at, EVIL, 4)


def map_and_store_later():
    f = writer()
    m = mmap.mmap(f, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(f)
    m[AT : AT + 4] = m[AT : AT + 4]
    yield
    m[AT : AT + 4] = EVIL


def map_private_and_store():
    m = mmap.mmap(reader(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    m[:4] = EVIL


def reopen_and_write():
    os.pwrite(os.open(f"/proc/self/fd/{reader()}", os.O_RDWR), EVIL, AT)


def reopen_and_truncate():
    os.ftruncate(os.open(f"/proc/self/fd/{reader()}", os.O_RDWR), 10)


def reopen_by_path_descriptor():
    f = os.open(path, os.O_PATH)
    os.pwrite(os.open(f"/proc/self/fd/{f}", os.O_RDWR), EVIL, AT)


def set_append_mode():
    f = reader()
    fcntl.fcntl(f, fcntl.F_SETFL, os.O_APPEND | os.O_RDWR)
    os.write(f, EVIL)


def open_by_handle():
    handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128))
    mount = ctypes.c_int()
    f = reader()
    checked(libc.name_to_handle_at(f, b"", handle, ctypes.byref(mount), 0x1000))
    os.pwrite(checked(libc.open_by_handle_at(f, handle, os.O_RDWR)), EVIL, AT)


def seal():
    fcntl.fcntl(reader(), 1033, 8)


MS_REMOUNT, MS_BIND = 32, 4096


def remount_writable():
    at = tree if has_tree else path
    checked(libc.mount(None, at.encode(), None, MS_REMOUNT | MS_BIND, None))
    pwrite()


def remount_writable_as_root_of_a_user_namespace():
    uid = os.getuid()
    checked(libc.unshare(0x10000000 | 0x00020000))
    with open("/proc/self/uid_map", "w") as f:
        f.write(f"0 {uid} 1")
    remount_writable()


def mount_over():
    checked(libc.mount(own.encode() if os.path.isdir(own) else b"/tmp", snapshot.encode(), None, MS_BIND, None))


def unmount():
    checked(libc.umount2((tree if has_tree else path).encode(), 2))


def clear_read_only_of_the_mount():
    syscall(442, reader(), b"", 0x1000, struct.pack("QQQQ", 0, 1, 0, 0), 32)
    pwrite()


def clone_the_mount():
    t = syscall(428, reader(), b"", 0x1000 | 1)
    syscall(442, t, b"", 0x1000, struct.pack("QQQQ", 0, 1, 0, 0), 32)
    os.pwrite(os.open(f"/proc/self/fd/{t}", os.O_RDWR), EVIL, AT)


def pivot_root():
    syscall(155, (tree if has_tree else path).encode(), (tree if has_tree else path).encode())


def chroot_and_write():
    os.chroot(tree if has_tree else "/")
    os.pwrite(os.open("/" + file if has_tree else "/proc/self/fd/0", os.O_RDWR), EVIL, AT)


def loop_device():
    control = os.open("/dev/loop-control", os.O_RDWR)
    device = os.open(f"/dev/loop{fcntl.ioctl(control, 0x4C82)}", os.O_RDWR)
    f = os.open(path, os.O_RDWR)
    fcntl.ioctl(device, 0x4C00, f)
    try:
        os.pwrite(device, EVIL * 128, 0)
        os.fsync(device)
    finally:
        fcntl.ioctl(device, 0x4C01, 0)


def through_proc_root():
    os.pwrite(os.open("/proc/1/root" + path if has_tree else "/proc/1/fd/0", os.O_RDWR), EVIL, AT)


def freeze_the_file_system():
    fcntl.ioctl(reader(), 0xC0045877, 0)


OPERATIONS = {f.__name__: f for f in list(globals().values()) if callable(f) and getattr(f, "__module__", "") == "__main__"}
for helper in [checked, syscall, reader, writer, evil_file, set_flags]:
    del OPERATIONS[helper.__name__]


def said(step):
    try:
        answer = step()
    except StopIteration:
        return NOTHING_MORE
    except OSError as e:
        return os.strerror(e.errno) if e.errno else str(e)
    except (ValueError, AttributeError) as e:
        return str(e)
    return answer if isinstance(answer, str) else "done"


NOTHING_MORE = "nothing more to do"


def main():
    channel = socket.socket(fileno=os.dup(1))
    if name == "list":
        channel.sendall(" ".join(OPERATIONS).encode() + b"\n")
        return
    first = OPERATIONS[name]
    rest = None

    def begin():
        nonlocal rest
        result = first()
        if hasattr(result, "__next__"):
            rest = result
            return next(rest)
        return result

    answer = said(begin)
    while True:
        channel.sendall(answer.encode() + b"\n")
        if not channel.recv(16):
            break
        answer = said(lambda: next(rest)) if rest else NOTHING_MORE
    shutil.rmtree(own, ignore_errors=True)


main()

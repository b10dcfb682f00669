"""A reader of a model, in whatever namespaces it was started: maps every file and tells what the kernel says of the maps.

    reader.py directory PATH
    reader.py socket PATH REFERENCE

Each line on standard input is answered with a line of JSON on standard output; `end` ends it. Standard library only.
"""

import array
import hashlib
import json
import mmap
import os
import socket
import struct
import sys


def files_of_directory(path):
    for top, _, names in os.walk(path):
        for name in names:
            whole = os.path.join(top, name)
            yield os.path.relpath(whole, path), os.open(whole, os.O_RDONLY)


def files_of_socket(path, reference):
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    door.connect(path)
    held.append(door)

    def say(message):
        text = json.dumps(message).encode()
        door.sendall(struct.pack(">I", len(text)) + text)

    came, bytes_so_far = [], bytearray()

    def hear():
        while True:
            if len(bytes_so_far) >= 4:
                length = struct.unpack(">I", bytes_so_far[:4])[0]
                if len(bytes_so_far) >= 4 + length:
                    text = bytes(bytes_so_far[4 : 4 + length])
                    del bytes_so_far[: 4 + length]
                    return json.loads(text)
            piece, descriptors, _, _ = socket.recv_fds(door, 1 << 16, 64)
            if not piece:
                raise SystemExit("the daemon closed the connection")
            bytes_so_far.extend(piece)
            came.extend(descriptors)

    say({"type": "open", "protocol": 1, "reference": reference, "descriptors": True})
    opened = hear()
    if opened["type"] != "opened":
        raise SystemExit(json.dumps(opened))
    left = opened["files"]
    while left:
        batch = hear()
        for file in batch["files"]:
            yield file["path"], came.pop(0)
        left -= len(batch["files"])
        if left:
            say({"type": "more"})


def addresses(maps):
    """The ranges of memory where the files are mapped, found by their inodes."""
    inodes = {os.fstat(fd).st_ino for _, fd, _ in maps}
    with open("/proc/self/smaps") as smaps:
        ours = False
        for line in smaps:
            head = line.split()
            if not head[0].endswith(":"):
                ours = int(head[4]) in inodes
            elif ours:
                yield head[0][:-1], head[1]


held = []
way, path, *rest = sys.argv[1:]
found = files_of_directory(path) if way == "directory" else files_of_socket(path, *rest)
maps = [(name, fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ) if os.fstat(fd).st_size else b"") for name, fd in found]
maps.sort()

for line in sys.stdin:
    word = line.strip()
    if word == "hash":
        print(json.dumps({name: hashlib.sha256(data).hexdigest() for name, _, data in maps}), flush=True)
    elif word == "memory":
        sums = {"Pss": 0, "Rss": 0, "Private_Dirty": 0, "Shared_Dirty": 0}
        for name, value in addresses(maps):
            if name in sums:
                sums[name] += int(value) * 1024
        print(json.dumps(sums), flush=True)
    elif word == "namespaces":
        print(json.dumps({name: os.readlink("/proc/self/ns/" + name) for name in ("mnt", "pid")}), flush=True)
    elif word == "end":
        break

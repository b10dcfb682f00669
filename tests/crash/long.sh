#!/usr/bin/env bash
# The long version of tests/crash: every kill point, and thousands of random ones. Prints one row for each kind of case:
# what was done, cases, failures, seconds. Ends with an error if a case failed or could not be tried here.
#
#     bash tests/crash/long.sh [FILTER...]
#
# LARDER_CRASH_CYCLES=N: so many power cuts of each file system, and kills at random moments, in place of thousands.
# LARDER_SEED=N: the random choices of a run that failed, again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export LARDER_CRASH=long LARDER_TEST_STRICT=1
log=target/crash-long.log
failed=0
cargo test --quiet --release --test crash -- --nocapture "$@" >"$log" 2>&1 || failed=$?
printf '| cases | tried | failed | seconds |\n|---|---|---|---|\n'
# A row may stand behind the progress of the test harness.
grep -ohE '\| .* \|$' "$log" | sort
[ "$failed" = 0 ] || { echo "error: see $log" >&2; exit "$failed"; }

//! Crash safety: the program as a process on real volumes, cut off in the middle of its work in every way this machine
//! allows, and one checker after every case. docs/reliability.md says what is covered, and how the long version is run.

mod broken_index;
mod checker;
mod disk_faults;
mod foreign_roots;
mod kill_points;
mod limits;
mod loop_disk;
mod models;
mod power_cuts;
mod promised_names;
mod random_kills;
mod row;
mod stalled_disk;
mod strace;

#[path = "../it/support/gated_origin.rs"]
#[expect(dead_code, reason = "shared with tests/it, which uses all of it")]
mod gated_origin;
#[path = "../it/support/hostile_origin.rs"]
#[expect(dead_code, reason = "shared with tests/it, which uses all of it")]
mod hostile_origin;
#[path = "../it/support/larder.rs"]
#[expect(dead_code, reason = "shared with tests/it, which uses all of it")]
mod larder;
#[path = "../it/support/memory_group.rs"]
#[expect(dead_code, reason = "shared with tests/it, which uses all of it")]
mod memory_group;
#[path = "../it/support/raw_http.rs"]
mod raw_http;
#[path = "../it/support/skip.rs"]
mod skip;

//! How many instructions a warm open takes, and each MiB of a pull, as Callgrind counts them: the same on a busy machine as
//! on an idle one. What the kernel does is not counted.
//!
//! ```text
//! cargo bench --profile dev --bench instructions                          # compares with benches/instructions.toml
//! UPDATE_INSTRUCTIONS=1 cargo bench --profile dev --bench instructions    # writes it
//! ```
//!
//! Each case is a process of its own under valgrind. What is there before the work begins is not counted: the start, the
//! origin, the first pull. It is the build the tests run in: what is compared is what our code does, not what the optimiser
//! makes of it, and nothing has to be compiled for it. Everything is done on one thread, apart from calls that block.

#[path = "support/local.rs"]
mod local;
#[path = "support/settings.rs"]
mod settings;

use std::collections::BTreeMap;
use std::env::consts::ARCH;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitCode, Stdio};

use larder::client::Opener;
use larder::daemon::{Daemon, build_cache};
use larder::model::ModelRef;
use serde::{Deserialize, Serialize};

use settings::settings;

/// Files of a model, as in the rows of `larder bench`.
const FILES: usize = 4;
const MIB: u64 = 1 << 20;

/// Most that a count may differ from the baseline. Runs differ from each other by up to 1.5 %: in how many pieces bytes come,
/// and in what background threads do meanwhile.
const TOLERANCE_PERCENT: f64 = 3.0;
const COMMAND: &str = "cargo bench --profile dev --bench instructions";

/// How often a case is run that does not end: now and then the threads of a process starve each other under
/// valgrind until a time limit of ours ends it. That says nothing about instructions.
const ATTEMPTS: usize = 3;

const BASELINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/instructions.toml");

/// Work that is counted.
struct Case {
    name: &'static str,
    unit: &'static str,
    units: u64,
    run: fn(u64),
}

const CASES: [Case; 5] = [
    Case { name: "open", unit: "open by the cache", units: 1000, run: open },
    Case { name: "open-files", unit: "open with descriptors and a lease", units: 1000, run: open_files },
    Case { name: "open-socket", unit: "open over the socket, both sides", units: 200, run: open_socket },
    Case { name: "pull", unit: "MiB pulled over HTTP", units: 64, run: |mib| pull(mib, "plain") },
    Case { name: "pull-checked", unit: "MiB with a SHA-256", units: 16, run: |mib| pull(mib, "checked") },
];

/// The file.
#[derive(Debug, Serialize, Deserialize)]
struct Baseline {
    architecture: String,
    compiler: String,
    /// For one unit of each case.
    instructions: BTreeMap<String, u64>,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["case", name] => {
            let case = CASES.iter().find(|case| case.name == name).expect("a case");
            (case.run)(case.units);
        }
        // `cargo test --benches` runs this too, and has no use for it.
        _ if !words.iter().any(|word| word == "--bench") => (),
        _ if cfg!(not(debug_assertions)) => println!("instructions are counted in another build: `{COMMAND}`"),
        _ if std::env::var_os("UPDATE_INSTRUCTIONS").is_some() => update(),
        _ => return compare(),
    }
    ExitCode::SUCCESS
}

fn update() {
    let instructions = CASES.iter().map(|case| (case.name.to_owned(), count(case))).collect();
    let baseline = Baseline { architecture: ARCH.to_owned(), compiler: compiler(), instructions };
    let toml = toml::to_string(&baseline).expect("it can be written as TOML");
    std::fs::write(BASELINE, toml).expect("the baseline can be written");
}

fn compare() -> ExitCode {
    let toml = std::fs::read_to_string(BASELINE).expect("there is a baseline");
    let baseline: Baseline = toml::from_str(&toml).expect("it is as `update` writes it");
    if baseline.architecture != ARCH {
        println!("the baseline is of {}: nothing to compare with", baseline.architecture);
        return ExitCode::SUCCESS;
    }
    let mut differ = Vec::new();
    for case in &CASES {
        let counted = count(case);
        let expected = baseline.instructions.get(case.name).copied().unwrap_or(0);
        let percent = (counted as f64 / expected as f64 - 1.0) * 100.0;
        println!("{:12} {counted:>9} of {expected:>9} {percent:+6.2} %  for each {}", case.name, case.unit);
        if percent.abs() > TOLERANCE_PERCENT {
            differ.push(case.name);
        }
    }
    if differ.is_empty() {
        return ExitCode::SUCCESS;
    }
    eprintln!(
        "error: the instructions of {} differ from the baseline by more than {TOLERANCE_PERCENT} %; it was counted with \
         {}, this with {}\n\
         action: find what costs them (`valgrind --tool=callgrind`); if it is worth them, if they were saved, or if it is \
         the compiler, write the new baseline: `UPDATE_INSTRUCTIONS=1 {COMMAND}`",
        differ.join(", "),
        baseline.compiler,
        compiler(),
    );
    ExitCode::FAILURE
}

/// Another one, with another standard library, may make other code.
fn compiler() -> String {
    let output = Command::new("rustc").arg("--version").output().expect("there is a compiler");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Instructions for one unit.
fn count(case: &Case) -> u64 {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let out = dir.path().join("callgrind");
    let this = std::env::current_exe().expect("this program has a path");
    let mut valgrind = Command::new("valgrind");
    // One thread runs at a time there; without the second option one that has nothing to do may keep the others waiting.
    valgrind.args(["--tool=callgrind", "--fair-sched=try"]);
    valgrind.args(["--zero-before=instructions::counted", "--dump-after=instructions::counted"]);
    valgrind.arg(format!("--callgrind-out-file={}", out.display())).arg(this).args(["case", case.name]);
    let mut attempt = 1;
    loop {
        let output = valgrind.output().expect("valgrind is installed");
        if output.status.success() {
            break;
        }
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(attempt < ATTEMPTS, "{said}");
        println!("{}: tried again, because it did not end well: {said}", case.name);
        attempt += 1;
    }
    let dump = std::fs::read_to_string(out.with_extension("1")).expect("callgrind has written what it counted");
    let total = dump.lines().find_map(|line| line.strip_prefix("totals: ")).expect("a total");
    total.parse::<u64>().expect("a number") / case.units
}

/// Callgrind finds this function by its name, and counts what all threads do while it runs.
#[inline(never)]
fn counted(work: &mut dyn FnMut()) {
    work();
}

fn open(opens: u64) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let runtime = local::one_thread();
    let (cache, reference) = runtime.block_on(local::cache_with_a_model(dir.path(), FILES));
    counted(&mut || {
        for _ in 0..opens {
            cache.open(&reference).expect("it is local");
        }
    });
}

fn open_files(opens: u64) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let runtime = local::one_thread();
    let (cache, reference) = runtime.block_on(local::cache_with_a_model(dir.path(), FILES));
    let asked = local::asked(&reference.to_string());
    // Brings the manifest into memory.
    cache.open(&reference).expect("it is local");
    counted(&mut || {
        for _ in 0..opens {
            cache.open_files_at_once(&asked, "a bench").expect("nobody touched it");
        }
    });
}

fn open_socket(opens: u64) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let runtime = local::one_thread();
    let reference = local::model(dir.path(), FILES);
    let daemon = runtime.block_on(Daemon::start(&settings(dir.path()))).expect("a daemon");
    let opener = Opener::new(daemon.socket());
    let open = || runtime.block_on(opener.open(&reference)).expect("it can be opened");
    drop(open());
    counted(&mut || (0..opens).for_each(|_| drop(open())));
}

/// What is counted is a second pull: a first one has made all that is made once.
fn pull(mib: u64, listing: &str) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let runtime = local::one_thread();
    let (cache, _) = runtime.block_on(build_cache(&settings(dir.path()))).expect("an empty directory becomes a volume");
    let (first, second) = (Origin::start(FILES as u64), Origin::start(mib));
    runtime.block_on(local::pull(&cache, &first.model(listing)));
    counted(&mut || runtime.block_on(local::pull(&cache, &second.model(listing))));
}

/// The one of `larder bench`: a process of its own, which Callgrind does not follow.
struct Origin {
    process: Child,
    port: u16,
}

impl Origin {
    fn start(mib: u64) -> Origin {
        let shape = serde_json::json!({"shards": FILES, "shard_bytes": mib * MIB / FILES as u64});
        let part = serde_json::json!({"Origin": {"shape": shape, "pace": null}}).to_string();
        let mut command = Command::new(env!("CARGO_BIN_EXE_larder"));
        command.args(["bench-part", &part]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().expect("the origin starts");
        let mut port = String::new();
        BufReader::new(process.stdout.take().expect("it is piped")).read_line(&mut port).expect("it says its port");
        let port: Result<u16, String> = serde_json::from_str(&port).expect("JSON");
        Origin { process, port: port.expect("a port") }
    }

    fn model(&self, listing: &str) -> ModelRef {
        format!("http://127.0.0.1:{}/{listing}/", self.port).parse().expect("a reference")
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.process.kill().and_then(|()| self.process.wait()).expect("the origin ends");
    }
}

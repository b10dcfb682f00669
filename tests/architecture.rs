//! The ranks of `src/lib.rs`, held as data: a module may `use` only modules of a lower rank.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Rank of every top-level module. `main` and `kubectl-larder` are the binaries.
const RANKS: &[(&str, u8)] = &[
    ("main", 8),
    ("kubectl-larder", 8),
    ("cli", 8),
    ("daemon", 7),
    ("config", 6),
    ("serve", 5),
    ("client", 5),
    ("kubernetes", 5),
    ("cache", 4),
    ("store", 3),
    ("index", 3),
    ("source", 3),
    ("wire", 2),
    ("model", 1),
    ("fault", 0),
    ("telemetry", 0),
    ("heap", 0),
    ("huge_page", 0),
    ("priority", 0),
];

const BINARIES: &[&str] = &["main", "kubectl-larder"];

/// Modules that must stay plain synchronous code: easy to test, to fuzz, and to reason about after a crash.
const WITHOUT_TOKIO: &[&str] = &["fault", "heap", "huge_page", "priority", "model", "wire", "store", "index"];

/// Names that say nothing about what is in them.
const FORBIDDEN_NAMES: &[&str] = &["util", "utils", "common", "helpers", "types", "error", "errors", "misc"];

/// Where `unsafe` may stand: what keeps writers away from a file, mapping a descriptor to read it, asking the kernel what of a
/// file is in the page cache, the system to take memory back, and the parts of a huge page.
const UNSAFE_ALLOWED_IN: &[&str] = &[
    "src/heap.rs",
    "src/huge_page.rs",
    "src/priority.rs",
    "src/wire/guard.rs",
    "src/wire/mapping.rs",
    "src/wire/residency.rs",
];

fn rust_files(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

/// Path below the crate, and the text without comments and without the test module at its end.
fn sources(dir: &str) -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    rust_files(&root.join(dir), &mut files);
    files.sort();
    assert!(!files.is_empty(), "no Rust file found in {dir}");
    files
        .into_iter()
        .map(|file| {
            let text = fs::read_to_string(&file).unwrap();
            let name = file.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            (name, code_only(&text))
        })
        .collect()
}

fn code_only(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    text.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

fn module_of(file: &str) -> &str {
    let rest = file.strip_prefix("src/").unwrap();
    rest.split('/').next().unwrap().trim_end_matches(".rs")
}

/// Every `crate::name` (and `larder::name`, which is how the binaries say it) that the code mentions.
fn mentions(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for prefix in ["crate::", "larder::"] {
        for (at, _) in code.match_indices(prefix) {
            let rest = &code[at + prefix.len()..];
            if let Some(list) = rest.strip_prefix('{') {
                let list = list.split('}').next().unwrap();
                found.extend(list.split(',').map(|item| name_at_start(item.trim())));
            } else {
                found.push(name_at_start(rest));
            }
        }
    }
    found.retain(|name| !name.is_empty());
    found
}

fn name_at_start(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

#[test]
fn every_import_points_downwards() {
    let ranks: BTreeMap<&str, u8> = RANKS.iter().copied().collect();
    let mut wrong = Vec::new();
    for (file, code) in sources("src") {
        let module = module_of(&file);
        if module == "lib" {
            continue;
        }
        let Some(rank) = ranks.get(module) else {
            wrong
                .push(format!("{file}: `{module}` has no rank; give it one in RANKS and in the picture of src/lib.rs"));
            continue;
        };
        for other in mentions(&code) {
            match ranks.get(other.as_str()) {
                Some(_) if other == module => {}
                // The binaries hand their words to `cli`; they are one rank because they are one thing.
                Some(_) if BINARIES.contains(&module) && other == "cli" => {}
                Some(below) if below < rank => {}
                Some(above) => wrong.push(format!(
                    "{file}: `{module}` (rank {rank}) uses `{other}` (rank {above}); move what both need to a lower \
                     rank, or return a value that the higher one acts on"
                )),
                None => {}
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn plain_modules_do_not_use_tokio() {
    let wrong: Vec<String> = sources("src")
        .into_iter()
        .filter(|(file, code)| WITHOUT_TOKIO.contains(&module_of(file)) && code.contains("tokio"))
        .map(|(file, _)| format!("{file} uses tokio; keep it synchronous and let `cache` put it on a blocking thread"))
        .collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn only_the_store_changes_the_disk() {
    const CHANGES: &[&str] = &[
        "fs::write",
        "File::create",
        "fs::rename",
        "fs::remove_",
        "fs::create_dir",
        "fs::hard_link",
        "OpenOptions",
        "set_permissions",
    ];
    // The door makes and unlinks its own socket, and the directory it stands in; the index owns its directory.
    const ALSO: &[&str] = &["store", "index", "serve", "daemon", "cli"];
    let mut wrong = Vec::new();
    for (file, code) in sources("src") {
        if ALSO.contains(&module_of(&file)) {
            continue;
        }
        for call in CHANGES.iter().filter(|call| code.contains(**call)) {
            wrong.push(format!("{file} calls `{call}`; changes to the disk belong in `store`"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn names_say_what_is_in_them() {
    for (file, _) in sources("src") {
        let stem = Path::new(&file).file_stem().unwrap().to_str().unwrap();
        assert!(!FORBIDDEN_NAMES.contains(&stem), "{file}: name the thing that is in it instead");
        assert!(stem != "mod", "{file}: write `{}.rs` beside the folder", Path::new(&file).parent().unwrap().display());
    }
}

#[test]
fn unsafe_stands_where_it_is_argued() {
    for (file, code) in sources("src") {
        let found = code.contains("unsafe ") && !code.contains("forbid(unsafe");
        assert!(
            !found || UNSAFE_ALLOWED_IN.contains(&file.as_str()),
            "{file}: `unsafe` belongs in {}",
            UNSAFE_ALLOWED_IN.join(" or ")
        );
    }
}

#[test]
fn the_picture_in_lib_rs_is_the_table() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    for (module, rank) in RANKS {
        let line = text.lines().find(|line| line.contains(&format!("rank {rank} ")));
        let line = line.unwrap_or_else(|| panic!("src/lib.rs draws no rank {rank}"));
        assert!(line.contains(module), "src/lib.rs does not draw `{module}` at rank {rank}");
    }
    for (file, _) in sources("src") {
        let module = module_of(&file);
        let known = module == "lib" || RANKS.iter().any(|(name, _)| *name == module);
        assert!(known, "{file} has no rank");
    }
}

/// A test that cannot fail proves nothing, and a sleep is not a synchronisation.
#[test]
fn tests_can_fail_and_do_not_sleep() {
    for dir in ["src", "tests"] {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut files = Vec::new();
        rust_files(&root.join(dir), &mut files);
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            if file.ends_with("tests/architecture.rs") {
                continue;
            }
            for (number, line) in text.lines().enumerate() {
                let at = format!("{}:{}", file.display(), number + 1);
                let bare = line.trim_start().starts_with("matches!(") && line.ends_with(';');
                assert!(!bare, "{at}: a bare `matches!` asserts nothing");
                assert!(!line.contains("thread::sleep"), "{at}: wait for the event, not for time");
            }
        }
    }
}

#[test]
fn the_checks_find_what_they_look_for() {
    assert_eq!(mentions("use crate::cache::X; use crate::{store, model::Y};"), ["cache", "store", "model"]);
    assert_eq!(module_of("src/store/layout.rs"), "store");
    assert_eq!(module_of("src/store.rs"), "store");
    assert!(!code_only("// crate::cache\nfn x() {}").contains("cache"));
    assert!(!code_only("fn x() {}\n#[cfg(test)]\nmod tests {\n use crate::cache;\n}").contains("cache"));
}

//! The Python of `docs/readers.md` does what the page says, with a file that the `safetensors` package has written.

use super::support::larder::Home;
use super::support::real_client::{can_load, python, run};

const PAGE: &str = include_str!("../../docs/readers.md");

/// Writes a model to the directory it is given.
const WRITE: &str = r#"
import sys
import numpy as np
from safetensors.numpy import save_file

save_file({
    "embedding": np.arange(6000, dtype=np.float32).reshape(20, 300),
    "half": np.linspace(-1, 1, 64, dtype=np.float16).reshape(4, 4, 4),
    "ids": np.array([[1, -2], [3, 2**40]], dtype=np.int64),
    "nothing": np.zeros((0, 3), dtype=np.float32),
    "one": np.array(7.5, dtype=np.float64),
}, sys.argv[1] + "/model.safetensors")
"#;

/// Compares what the page's code gives with what the package reads, and looks where the arrays' memory is.
const CHECK: &str = r#"
import sys
from safetensors.numpy import load_file

model = Model(sys.argv[1])
mapped = model.maps["model.safetensors"]
found, expected = dict(tensors(mapped)), load_file(sys.argv[2])
assert found.keys() == expected.keys(), found.keys()
whole = np.frombuffer(mapped, "u1")
first, last = whole.ctypes.data, whole.ctypes.data + whole.nbytes
for name, tensor in expected.items():
    assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
    assert np.array_equal(found[name], tensor), name
    assert not found[name].flags.owndata and not found[name].flags.writeable, name
    assert first <= found[name].ctypes.data <= last - found[name].nbytes, name
assert model.descriptors == [] and len(model.maps) == int(sys.argv[3]), model.maps.keys()

# The map of this process is the file that is there for everybody, shared.
inode = os.stat(model.info["path"] + "/model.safetensors").st_ino
maps = [line.split() for line in open("/proc/self/maps")]
shared = [line for line in maps if line[4] == str(inode)]
assert shared and all(line[1] == "r--s" for line in shared), shared

embedding = found["embedding"]
model.close()
assert embedding[19, 299] == 5999
try:
    Model(sys.argv[1] + "-absent")
except RuntimeError as error:
    print(error)
"#;

/// The first block of Python on the page: its definitions.
fn code() -> &'static str {
    let block = PAGE.split("```python\n").nth(1).expect("the page has Python");
    block.split("```").next().expect("the block ends")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_of_the_page_reads_tensors_without_copying_them() {
    if !can_load() {
        return;
    }
    let home = Home::new();
    let origin = home.path().join("origin");
    std::fs::create_dir(&origin).unwrap();
    // More files than one batch has, and an empty one.
    for at in 0..100 {
        std::fs::write(origin.join(format!("{at:03}.txt")), "x").unwrap();
    }
    std::fs::write(origin.join("empty"), "").unwrap();
    let written = origin.join("model.safetensors");
    run(python().unwrap().args(["-c", WRITE]).arg(&origin)).unwrap();

    let mut daemon = home.serve().await;
    let program = [code(), CHECK].concat();
    let mut command = python().unwrap();
    command.env("LARDER_SOCKET", home.socket()).args(["-c", &program]);
    command.arg(format!("file://{}", origin.display())).arg(&written).arg("101");
    let printed = tokio::task::spawn_blocking(move || run(&mut command)).await.unwrap().unwrap();
    assert!(printed.contains("(repo-not-found)"), "{printed}");
    daemon.says("lease ended").await;
}

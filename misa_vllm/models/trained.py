"""Writes the project's trained DSA model as a complete Hugging Face folder.

    python -m misa_vllm.models.trained .models/trained

The package carries it small: matrices as int8 with one scale per row, the output matrix left out because it is the
embedding. The folder has what vLLM's ordinary loader wants: config.json, bfloat16 weights, tokenizer, chat template.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from misa_vllm.models.folder import ARCHITECTURES, SIZES, model_config, write_documents

if TYPE_CHECKING:
    import torch

PACKED = Path(__file__).resolve().parent.parent / "data" / "trained"
WEIGHTS, SIZE, TOKENIZER = "weights.safetensors", "size.json", "tokenizer.json"
SCALE = ".row_scale"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
INT8_MAX = 127


def config_of(size: dict) -> dict:
    """The contents of config.json for `misa_vllm.train.size.ModelSize.as_dict()`."""
    sizes = {name: value for name, value in size.items() if name in SIZES}
    config = model_config(
        ARCHITECTURES["deepseek"], size["vocab"], rope_theta=size["rope_theta"], eps=size["eps"], **sizes
    )
    # few of its heads count for a query, and block means miss some of them (misa_vllm/eval/results)
    return config | {"misa_statistic": "mean_positive"}


def quantize_rows(weight: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """int8 [rows, columns] and float32 scales [rows]; weight is about int8 * scale."""
    import torch

    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / INT8_MAX
    return (weight / scale.unsqueeze(1)).round().to(torch.int8), scale


def pack(tensors: dict[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """What the small file holds of a state dict: int8 matrices with row scales, vectors as float32."""
    packed = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            packed[name], packed[name + SCALE] = quantize_rows(tensor)
        else:
            packed[name] = tensor.float().contiguous()
    return packed


def unpack(packed: dict[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """The float32 state dict that `pack` stored, up to rounding."""
    tensors = {}
    for name, tensor in packed.items():
        if name + SCALE in packed:
            tensors[name] = tensor.float() * packed[name + SCALE].float().unsqueeze(1)
        elif not name.endswith(SCALE):
            tensors[name] = tensor.float()
    return tensors


def write_model(folder: Path, tensors: dict[str, "torch.Tensor"], size: dict, tokenizer: Path, dtype=None) -> dict:
    """Write a complete model folder, made if absent, and return the numbers of parameters and bytes.

    Args:
        tensors: state dict of `misa_vllm.train.model.DsaModel`.
        size: its `ModelSize.as_dict()`.
        dtype: of the matrices; bfloat16 unless given.
    """
    import torch
    from safetensors.torch import save_file

    dtype = dtype or torch.bfloat16
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        # vLLM keeps the indexer's key norm in float32
        name: tensor.float() if ".k_norm." in name else tensor.to(dtype)
        for name, tensor in tensors.items()
    }
    parameters = sum(tensor.numel() for tensor in written.values())
    written[OUTPUT] = written[EMBEDDING].clone()
    save_file({n: t.contiguous() for n, t in written.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(tokenizer, folder / TOKENIZER)
    write_documents(folder, config_of(size) | {"dtype": str(dtype).removeprefix("torch.")})
    return {
        "parameters": parameters,
        "bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
    }


def write_packed(folder: Path, tensors: dict[str, "torch.Tensor"], size: dict, tokenizer: Path) -> int:
    """Write the small form of a state dict into `folder`; returns its bytes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(pack(tensors), folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # it is to be shipped, and comes as readable by its owner alone
    if tokenizer.resolve() != (folder / TOKENIZER).resolve():
        shutil.copyfile(tokenizer, folder / TOKENIZER)
    (folder / SIZE).write_text(json.dumps(size, indent=2) + "\n", encoding="utf-8")
    return sum((folder / name).stat().st_size for name in (WEIGHTS, TOKENIZER, SIZE))


def read_packed(folder: Path) -> tuple[dict[str, "torch.Tensor"], dict]:
    """State dict and sizes of the small form.

    Raises:
        FileNotFoundError: the folder does not hold it.
        ValueError: a file of it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (WEIGHTS, SIZE, TOKENIZER):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: give --packed a folder with a packed model")
    try:
        return unpack(load_file(folder / WEIGHTS)), json.loads((folder / SIZE).read_text(encoding="utf-8"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds a damaged model ({error}): fetch its files again") from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m misa_vllm.models.trained", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packed", type=Path, default=PACKED, help="folder of the packed model, default the package's")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        tensors, size = read_packed(options.packed)
        written = write_model(options.folder, tensors, size, options.packed / TOKENIZER)
    except (ValueError, OSError, KeyError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.folder}: DeepseekV32ForCausalLM, {written['parameters'] / 1e6:.1f} M trained parameters, "
        f"{size['layers']} layers, {size['index_heads']} indexer heads, top-{size['topk']}, "
        f"{written['bytes'] / 1e6:.1f} MB, {time.monotonic() - start:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

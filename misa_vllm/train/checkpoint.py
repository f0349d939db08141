"""Checkpoints that travel: float16 weights in a few files of bounded size, and a page that says what they are.

Eleven bits suffice: a step of training changes a weight by more than the rest of it. The optimizer's state is left out
(it is several times the weights); a resumed run raises its learning rate again from zero while the state builds up,
over `run.REWARM_STEPS` steps.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

from misa_vllm.models import trained
from misa_vllm.train.model import DsaModel, ModelSize

STATE = "state.json"
LARGEST_FILE = 15_000_000
STORED = "<f2"


def save(folder: Path, model: DsaModel, state: dict) -> list[Path]:
    """Write weights-0.bin .. weights-N.bin and state.json into `folder`; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATE).unlink(missing_ok=True)  # weights without their page are no checkpoint
    flat = torch.cat([p.detach().float().flatten().cpu() for p in model.state_dict().values()]).numpy()
    flat = flat.astype(STORED)
    count = math.ceil(flat.nbytes / LARGEST_FILE)
    files = []
    for number, part in enumerate(np.array_split(flat, count)):
        files.append(folder / f"weights-{number}.bin")
        files[-1].write_bytes(part.tobytes())
    page = {**state, "size": model.size.as_dict(), "weights": [file.name for file in files]}
    (folder / STATE).write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    return [*files, folder / STATE]


def load(folder: Path, device="cpu") -> tuple[DsaModel, dict]:
    """The model and the page of a checkpoint, or of a packed model, whose training counts as done.

    Raises:
        ValueError: there is none, or files of it are missing or damaged; one line.
    """
    if not (folder / STATE).is_file() and (folder / trained.WEIGHTS).is_file():
        return _load_packed(folder, device)
    try:
        page = json.loads((folder / STATE).read_text(encoding="utf-8"))
        model = DsaModel(ModelSize(**page["size"]))
        flat = np.concatenate([np.fromfile(folder / name, dtype=STORED) for name in page["weights"]]).astype(np.float32)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds no whole checkpoint ({error}): name one that training wrote") from error
    tensors = model.state_dict()
    if sum(t.numel() for t in tensors.values()) != len(flat):
        raise ValueError(f"the weights in {folder} do not fit its {STATE}: copy all its files again")
    parts = torch.from_numpy(flat).split([t.numel() for t in tensors.values()])
    model.load_state_dict({name: part.view_as(t) for (name, t), part in zip(tensors.items(), parts, strict=True)})
    return model.to(device), page


def _load_packed(folder: Path, device) -> tuple[DsaModel, dict]:
    """What `misa_vllm.models.trained` packed; its int8 rounding stays in the weights."""
    try:
        tensors, size = trained.read_packed(folder)
        model = DsaModel(ModelSize(**size))
        model.load_state_dict(tensors)
    except (OSError, TypeError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{folder} holds no whole packed model ({said}): copy all its files again") from error
    return model.to(device), {"progress": 1.0, "stage_steps": {}, "steps": 0, "tokens": 0, "size": size}

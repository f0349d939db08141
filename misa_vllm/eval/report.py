"""What the fidelity tools share: what stops one, and which files its figures depend on."""

import hashlib
import sys
from pathlib import Path

from misa_vllm.bench.report import BenchmarkError


class EvalError(BenchmarkError):
    """The tool cannot run; the message is one line that says what to change."""


def described(file: Path) -> dict[str, str]:
    """Names a file that figures depend on, wherever it lies."""
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def can_draw(figures: str) -> bool:
    """Whether matplotlib is here; says in one line that `figures` are not drawn if it is not."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        print(f'{figures} not drawn: pip install "misa_vllm[bench]"', file=sys.stderr)
        return False
    return True

"""Declarative checks of an operator's tensors: shape, dtype, device and contiguity, named in the message."""

import torch

Dim = int | str | range


class TensorChecks:
    """Checks the tensors of one call; sizes named by a symbol must agree among them.

    >>> check = TensorChecks("select_tokens", "cpu")
    >>> check("q", q, ("M", "H", 128), torch.float8_e4m3fn)
    >>> check("gates", gates, ("M", "H"), torch.float32)
    """

    def __init__(self, operator: str, device_type: str) -> None:
        self.operator = operator
        self.device_type = device_type
        self.sizes: dict[str, tuple[int, str]] = {}

    def __call__(
        self,
        name: str,
        tensor: torch.Tensor,
        shape: tuple[Dim, ...],
        *dtypes: torch.dtype,
        contiguous_last: bool = True,
    ) -> None:
        """Check one tensor.

        Args:
            name: what the message calls it.
            shape: per dimension an exact size, a symbol, or a range (`range(8448, sys.maxsize)`: at least 8448).
            dtypes: the dtypes it may have.
            contiguous_last: whether the last dimension must have stride 1.

        Raises:
            ValueError: in one line, what is wrong and what was expected.
        """
        if tensor.device.type != self.device_type:
            self._fail(name, f"is on {tensor.device.type}, move it to {self.device_type}")
        if tensor.dtype not in dtypes:
            self._fail(name, f"is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
        if tensor.dim() != len(shape):
            self._fail(name, f"has shape {list(tensor.shape)}, expected {len(shape)} dimensions")
        for i, (size, wanted) in enumerate(zip(tensor.shape, shape)):
            if isinstance(wanted, str):
                wanted, where = self.sizes.setdefault(wanted, (size, name))
                if size != wanted:
                    self._fail(name, f"has size {size} in dimension {i}, but {where} has {wanted}")
            elif isinstance(wanted, range):
                if size < wanted.start:
                    self._fail(name, f"has size {size} in dimension {i}, expected at least {wanted.start}")
            elif size != wanted:
                self._fail(name, f"has size {size} in dimension {i}, expected {wanted}")
        if contiguous_last and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            self._fail(name, f"has stride {tensor.stride(-1)} in its last dimension, pass it contiguous")

    def value(self, name: str, holds: bool, rule: str) -> None:
        """Check something that is not a tensor's layout: raises ValueError "name rule" unless `holds`."""
        if not holds:
            self._fail(name, rule)

    def _fail(self, name: str, problem: str) -> None:
        raise ValueError(f"{self.operator}: {name} {problem}")

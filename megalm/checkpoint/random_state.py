"""The state of this process' random number generators (Python's, NumPy's, torch's) as JSON."""

import base64
import random
from typing import Any

import numpy as np
import torch


def take_random_state() -> dict[str, Any]:
    """What `restore_random_state` needs to go on with the same numbers."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": [version, _text(np.array(words, dtype="<u4")), gauss],
        "numpy": {
            "kind": legacy["bit_generator"],
            "key": _text(legacy["state"]["key"].astype("<u4")),
            "position": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
        "torch": _text(torch.get_rng_state().numpy()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state().numpy())
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the generators to what `take_random_state` found."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(_array(words, "<u4").tolist()), gauss))
    saved = state["numpy"]
    np.random.set_state(
        (saved["kind"], _array(saved["key"], "<u4"), saved["position"], saved["has_gauss"], saved["gauss"])
    )
    torch.set_rng_state(torch.from_numpy(_array(state["torch"], "u1")))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(_array(state["cuda"], "u1")))


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _array(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=dtype)

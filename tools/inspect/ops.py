"""Which implementation each op runs on here, and why."""

from __future__ import annotations

import argparse
import json

import torch

from megalm.ops import backend

HELP = "each op, its implementations on this machine, which is chosen and why"

# Op and its folder in csrc/.
OPS = {
    "rms_norm, layer_norm": "norm",
    "add_rms_norm, add_layer_norm": "norm",
    "rotary": "rope",
    "swiglu, geglu, bias_gelu": "activation",
    "cross_entropy, linear_cross_entropy": "cross_entropy",
    "adamw_": "adamw",
    "l2_norm_nonfinite": "gradient_norm",
    "index.fill, index.permute": "index",
}
_HOST_ONLY = ("index",)
_ISA_NAMES = ("baseline", "avx2", "avx512")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def describe() -> dict[str, object]:
    """The table, and what the extension was built with."""
    library = backend.library()
    built = library is not None
    isa = _ISA_NAMES[library.cpu_isa()] if library is not None else None
    has_cuda = library is not None and library.has_cuda
    rows = []
    for op, folder in OPS.items():
        available = ["reference"]
        if built:
            available.insert(0, f"native cpu ({isa}; fp32{'' if folder in _HOST_ONLY else ', bf16'})")
        if has_cuda and folder not in _HOST_ONLY:
            available.insert(0, "native cuda (fp32, bf16, fp16)")
        if backend.current_backend() == "reference":
            chosen, why = "reference", "ops.backend=reference"
        elif not built:
            chosen, why = "reference", "megalm._C is not built: run `make build`"
        else:
            chosen, why = "native", f"ops.backend={backend.current_backend()}; other dtypes take the reference"
        rows.append({"op": op, "source": f"csrc/{folder}", "available": available, "chosen": chosen, "why": why})
    return {"extension": built, "cpu_isa": isa, "cuda": has_cuda, "torch": torch.__version__, "ops": rows}


def run(args: argparse.Namespace) -> int:
    table = describe()
    if args.json:
        print(json.dumps(table, indent=1))
        return 0
    print(
        f"megalm._C: {'built' if table['extension'] else 'not built'}, CUDA kernels: {'yes' if table['cuda'] else 'no'}"
    )
    rows = table["ops"]
    assert isinstance(rows, list)
    for row in rows:
        print(f"{row['op']:<38}{row['chosen']:<11}{row['why']}")
        print(f"{'':<38}of: {', '.join(row['available'])}")
    return 0

"""Which implementation each op runs on here, and why."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from megalm.config.errors import ConfigError
from megalm.ops import backend, vendors
from megalm.ops.attention import Case
from megalm.ops.attention_choice import ORDER, AttentionChoice

HELP = "each op, its implementations on this machine, which is chosen and why"

# Ops and their folder in csrc/.
OPS = {
    "rms_norm, layer_norm, add_rms_norm, add_layer_norm": "norm",
    "rotary, rotary_": "rope",
    "swiglu, geglu, bias_gelu": "activation",
    "bias_dropout_add": "dropout",
    "causal_softmax": "softmax",
    "largest_logits_": "attention_logit",
    "cross_entropy, linear_cross_entropy": "cross_entropy",
    "adamw_": "adamw",
    "update_squares": "adamw",
    "l2_norm_nonfinite": "gradient_norm",
    "moe_router": "moe_router",
    "moe_row_map, moe_permute, moe_unpermute": "moe_permute",
    "fp8_quantize, fp8_dequantize": "quantize",
    "sequence_pack, sequence_join, sequence_part, sum_parts": "sequence",
    "index.fill, index.permute, index.deal": "index",
    "the longest repeats of a text": "suffix",
    "MinHash signatures": "minhash",
    "the texts of JSON lines": "json_lines",
    "a document's shingles": "shingle",
    "a checkpoint's copy and checksum": "digest",
    "what rules count in a text": "text_counts",
    "C4's lines of a text": "clean_lines",
}
_HOST_ONLY = ("clean_lines", "digest", "index", "json_lines", "minhash", "shingle", "suffix", "text_counts")
_FP32_ONLY = ("adamw",)
_ISA_NAMES = ("baseline", "avx2", "avx512")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument("--backend", choices=backend.CHOICES, help="show what this ops.backend would choose")


def describe() -> dict[str, object]:
    """Describe the table, and what the extension was built with."""
    library = backend.find_library()
    isa = _ISA_NAMES[library.cpu_isa()] if library is not None else None
    has_cuda = library is not None and bool(library.has_cuda)
    installed = {name: vendors.load(name) for name in ("apex", "te")}
    rows = []
    for ops, folder in OPS.items():
        names = ops.split(", ")
        available = []
        if library is not None:
            dtypes = "" if folder in _HOST_ONLY else "; fp32" if folder in _FP32_ONLY else "; fp32, bf16"
            available.append(f"native cpu ({isa}{dtypes})")
        if has_cuda and folder not in _HOST_ONLY:
            available.append(f"native cuda ({'fp32' if folder in _FP32_ONLY else 'fp32, bf16, fp16'})")
        available += [f"{v.name} (cuda)" for v in installed.values() if any(n in v.functions for n in names)]
        available.append("reference")
        chosen, why = _choose(names)
        rows.append({"op": ops, "source": f"csrc/{folder}", "available": available, "chosen": chosen, "why": why})
    return {
        "backend": backend.get_backend(),
        "extension": library is not None,
        "missing": backend.explain_missing(),
        "cpu_isa": isa,
        "cuda": has_cuda,
        "gpu": torch.cuda.is_available(),
        "torch": torch.__version__,
        "vendors": {name: "installed" if v.why is None else v.why for name, v in installed.items()},
        "ops": rows,
        "attention": describe_attention(),
    }


def describe_attention() -> list[dict[str, Any]]:
    """What computes attention on this machine by determinism and kind of mask, tried as a run tries it; for heads of 128."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    rows = []
    for determinism in ORDER:
        choice = AttentionChoice("auto", determinism)
        for mask in ("causal", "window", "documents", "alibi"):
            made = choice.choose(Case(device, dtype, 32, 8, 128, 128, mask, False, False))
            rows.append(
                {
                    "determinism": determinism,
                    "mask": mask,
                    "chosen": made.kernel.name,
                    "passed_over": dict(made.passed_over),
                }
            )
    return rows


def _choose(names: list[str]) -> tuple[str, str]:
    """Choose what serves the ops under the choice in force, and why."""
    choice = f"ops.backend={backend.get_backend()}"
    if backend.get_backend() == "reference":
        return "reference", choice
    for vendor in backend.get_vendors():
        if any(name in vendor.functions for name in names):
            return vendor.name, f"{choice}, for CUDA tensors; on a CPU the next that serves"
    if backend.find_library() is None:
        return "reference", backend.explain_missing()
    return "native", f"{choice}; the reference serves dtypes that no kernel has"


def run(args: argparse.Namespace) -> int:
    if args.backend:
        try:
            backend.set_backend(args.backend)
        except ConfigError as error:
            print(error)
            return 2
    table = describe()
    if args.json:
        print(json.dumps(table, indent=1))
        return 0
    built = "built" if table["extension"] else f"not used ({table['missing']})"
    print(f"megalm._C: {built}; CUDA kernels: {'yes' if table['cuda'] else 'no'}; torch {table['torch']}")
    for name, state in table["vendors"].items():  # type: ignore[attr-defined]
        print(f"{name}: {state}")
    rows: list[dict[str, Any]] = table["ops"]  # type: ignore[assignment]
    lines = [("op", "chosen", "of")]
    for row in rows:
        lines += [(name, row["chosen"], ", ".join(row["available"])) for name in row["op"].split(", ")]
    op, chosen = (max(len(line[i]) for line in lines) + 2 for i in (0, 1))
    for name, choice, available in lines:
        print(f"{name:<{op}}{choice:<{chosen}}{available}")
    for choice, why in dict.fromkeys((row["chosen"], row["why"]) for row in rows):
        print(f"{choice}: {why}")
    _print_attention(table["attention"])  # type: ignore[arg-type]
    return 0


def _print_attention(rows: list[dict[str, Any]]) -> None:
    print("\nattention, 32 query and 8 key heads of 128")
    print(f"{'train.determinism':<19}{'mask':<11}{'chosen':<11}passed over")
    for row in rows:
        passed = "; ".join(f"{name}: {why}" for name, why in row["passed_over"].items())
        print(f"{row['determinism']:<19}{row['mask']:<11}{row['chosen']:<11}{passed or '-'}")

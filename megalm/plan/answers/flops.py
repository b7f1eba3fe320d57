"""FLOPs of training a model, and the utilisation of a measured speed."""

from typing import Any

from megalm.architecture import flops
from megalm.architecture.tensors import count_parameters
from megalm.config import ConfigError, ModelConfig
from megalm.page.axis import format_count
from megalm.page.document import Table
from megalm.page.plots import Bars
from megalm.plan.report import Report
from megalm.plan.request import Request, choose_machine, compose

HELP = "FLOPs of training; MFU and HFU of a measured speed"
KEYS = [
    "seq_length", "batch_tokens", "tokens", "gpus", "gpu", "peak", "tokens_per_second", "sequences_per_second",
    "convention", "parameters",
]  # fmt: skip
EXAMPLE = "megalm plan flops +model=7b gpus=64 gpu=a100-40gb tokens_per_second=233000"


def check_convention(name: str | None) -> str:
    """A name out of flops.DEFINITIONS."""
    chosen = (name or "causal").lower()
    if chosen not in flops.DEFINITIONS:
        raise ConfigError(f"convention={name}: one of {', '.join(flops.DEFINITIONS)}.")
    return chosen


def answer(request: Request) -> Report:
    """FLOPs by definition and part; MFU and HFU when a speed is given."""
    config = compose(request)
    model, recompute = config.model, config.parallel.recompute
    convention = check_convention(request.word("convention"))
    counts = count_parameters(model)
    sequences = config.train.global_batch_size
    per_step = sequences * model.seq_length
    forward = flops.count_forward_flops(model, causal=convention != "full")
    chosen = flops.count_flops_by_definition(model, convention)
    hardware = count_hardware_flops(model, convention, recompute)
    data: dict[str, Any] = {
        "model": model.name,
        "parameters": counts.total,
        "active_parameters": counts.active,
        "seq_length": model.seq_length,
        "global_batch_size": sequences,
        "tokens_per_step": per_step,
        "convention": convention,
        "recompute": recompute,
        "flops_per_token": chosen,
        "hardware_flops_per_token": hardware,
        "model_flops_per_step": chosen * per_step,
        "hardware_flops_per_step": hardware * per_step,
        "flops_per_token_6nd": flops.count_flops_by_definition(model, "6nd"),
        "flops_per_token_full": flops.count_flops_by_definition(model, "full"),
        "flops_per_token_causal": flops.count_flops_by_definition(model, "causal"),
        "flops_per_token_mosaic": flops.count_flops_by_definition(model, "mosaic"),
        "forward_flops_per_token": {
            "attention_projections": forward.attention_projections,
            "attention_core": forward.attention_core,
            "mlp": forward.mlp,
            "logits": forward.logits,
        },
        "mfu_definition": flops.MFU,
        "hfu_definition": flops.HFU,
    }
    tokens = request.number("tokens")
    if tokens:
        data["tokens"], data["total_flops"] = tokens, chosen * tokens
    rows = [
        (
            name,
            format_count(flops.count_flops_by_definition(model, name), 5),
            format_count(flops.count_flops_by_definition(model, name) * per_step, 5),
            words,
        )
        for name, words in flops.DEFINITIONS.items()
    ]
    parts = data["forward_flops_per_token"]
    blocks: list[Any] = [
        Table(
            f"{model.name}: training FLOPs",
            ("definition", "FLOPs a token", f"FLOPs a step of {format_count(per_step)} tokens", "what is counted"),
            rows,
            f"recompute {recompute}: the hardware runs {format_count(hardware, 5)} FLOPs a token ({convention})",
        ),
        Table(
            "forward FLOPs of one token",
            ("part", "FLOPs", "share"),
            [
                (name.replace("_", " "), format_count(value, 5), f"{100 * value / forward.total:.1f}%")
                for name, value in parts.items()
            ],
            f"attention {'over the full square' if convention == 'full' else 'over the causal half'}",
        ),
        Bars("forward FLOPs of one token, by part", "FLOPs", [(model.name, list(parts.items()))]),
    ]
    speed = request.number("tokens_per_second")
    if request.number("sequences_per_second"):
        speed = (request.number("sequences_per_second") or 0.0) * model.seq_length
    if speed:
        machine = choose_machine(request, config)
        peak = machine.peak(config.precision.dtype)
        by_name = {
            name: (
                100
                * flops.compute_utilisation(flops.count_flops_by_definition(model, name), speed, machine.gpus, peak),
                100
                * flops.compute_utilisation(count_hardware_flops(model, name, recompute), speed, machine.gpus, peak),
            )
            for name in flops.DEFINITIONS
        }
        data.update(
            tokens_per_second=speed,
            gpus=machine.gpus,
            gpu=machine.accelerator.name,
            peak_flops_per_second_per_gpu=peak,
            mfu=by_name[convention][0] / 100,
            hfu=by_name[convention][1] / 100,
            mfu_percent=by_name[convention][0],
            hfu_percent=by_name[convention][1],
            **{f"mfu_percent_{name}": value[0] for name, value in by_name.items()},
            **{f"hfu_percent_{name}": value[1] for name, value in by_name.items()},
        )
        blocks.append(
            Table(
                f"{format_count(speed, 4)} tokens/s on {machine.describe()}",
                ("definition", "MFU (%)", "HFU (%)"),
                [(name, f"{mfu:.2f}", f"{hfu:.2f}") for name, (mfu, hfu) in by_name.items()],
                f"{flops.MFU}; {flops.HFU}",
            )
        )
    return Report(f"{model.name}: FLOPs", data, blocks)


def count_hardware_flops(model: ModelConfig, convention: str, recompute: str) -> float:
    """Executed FLOPs of a token by a convention; MosaicML's and 6ND count a full recompute as 4/3."""
    if convention in ("mosaic", "6nd"):
        return flops.count_flops_by_definition(model, convention) * flops.compute_mosaic_hfu_factor(recompute)
    return flops.count_hardware_flops_per_token(model, recompute=recompute, causal=convention == "causal")

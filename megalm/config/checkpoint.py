"""When and where a run is saved, and what it starts from."""

from dataclasses import dataclass, field

from megalm.config.fields import choice, number


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    every: int = number(200, at_least=0)
    """Steps between checkpoints; 0: only at the end."""
    keep: int = number(2, at_least=0)
    """Newest checkpoints to keep; 0: all."""
    keep_every: int = number(0, at_least=0)
    """Also keep each checkpoint whose step is a multiple of this; 0: none."""
    asynchronous: bool = True
    """The step waits only for the copy to host memory, and a thread writes the files; false: it waits for the disk."""
    path: str | None = None
    """Folder, or fsspec URL (s3://bucket/run), of the checkpoints of this run alone; None: the run's folder."""
    local_path: str | None = None
    """With a URL as `path`: the folder that checkpoints wait in until they are uploaded; None: one in the temporary folder."""
    upload_queue: int = number(2, at_least=1)
    """With a URL as `path`: how many checkpoints may wait while the store is away; then the oldest is given up."""
    upload_timeout_s: float = number(600.0, at_least=0)
    """With a URL as `path`: how long the end of a run waits for the store."""
    resume: bool = True
    """Go on from the newest good checkpoint in `path`, if there is one. false: begin anew (or with `load_path`); what a run
    left there is set aside in earlier-1, earlier-2, ..., never counted, resumed or deleted."""
    load: str = choice("all", "weights")
    """What to take from `load_path`. all: weights, optimizer, step, schedule and place in the data; weights: the weights
    alone, for a new run (schedule, data, step 0)."""
    load_path: str | None = None
    """A checkpoint, or a run, to begin with where there is nothing to resume in `path`; None: begin with new weights."""
    allow_changes: list[str] = field(default_factory=list)
    """Settings (train.seed) or groups of them (model) that a resumed run may have other values of than its checkpoint,
    though they change what the model computes or which data it sees. What changes only the course or the speed is told
    and needs no leave."""

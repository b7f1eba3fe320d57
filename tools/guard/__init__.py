"""Try the guard's detector on any loss log; read the samples of a step of a run."""

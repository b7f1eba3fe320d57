"""Write the job of a run for Slurm, Kubernetes or one machine: asked to save in time, started again where that is right."""

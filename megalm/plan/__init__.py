"""The math before the job: parameters, FLOPs, memory, time, money and failures. Imports only `megalm.config`."""

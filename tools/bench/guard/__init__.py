"""The guard on recorded curves and on runs that are damaged on purpose."""

"""Layers split over ranks: the mesh, its collectives, and the slices of the global tensors that ranks hold."""

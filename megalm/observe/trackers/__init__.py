"""Where a run is shown beside its own folder: a file for each tracker."""

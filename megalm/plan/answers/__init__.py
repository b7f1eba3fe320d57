"""One module for each subcommand of `python -m tools.plan`: `answer(request) -> Report`."""

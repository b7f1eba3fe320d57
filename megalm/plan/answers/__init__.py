"""One module for each subcommand of `megalm plan`, found by being here.

Each has `answer(request) -> Report` and says what it may be asked: HELP, the names of its KEYS (`megalm.plan.request.KEYS`
says what each means), an EXAMPLE, and FILES, the word for files on its command line where it takes any.
"""

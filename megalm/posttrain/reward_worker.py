"""Calls a user's reward function in a process of its own: asked and answered in lines of JSON.

python reward_worker.py FILE.py FUNCTION. It imports nothing of megalm. What the function prints goes to standard error.
"""

import importlib.util
import json
import os
import sys
from typing import Any


def main() -> int:
    """Answer {"prompt", "completion", "record"} with {"value": number} or {"error": text}, until standard input ends."""
    path, name = sys.argv[1:3]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
        specification = importlib.util.spec_from_file_location("reward", path)
        assert specification is not None and specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        function = getattr(module, name)
        if not callable(function):
            raise TypeError(f"{name} is no function")
    except BaseException as error:
        say({"error": f"{type(error).__name__}: {error}"})
        return 1
    say({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            value = function(asked["prompt"], asked["completion"], asked["record"])
            say({"value": float(value)})
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})
    return 0


if __name__ == "__main__":
    sys.exit(main())

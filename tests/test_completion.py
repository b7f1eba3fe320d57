"""What a shell offers behind `megalm`, asked of bash itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from megalm.config.completion import list_words

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-m", "megalm", "completion", "bash"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    file = tmp_path_factory.mktemp("completion") / "megalm.bash"
    file.write_text(done.stdout)
    return file


def offer(script, line, word_breaks=" \t\n=:"):
    """What bash would show or put in, as it calls the function: with its own cut of the line into words."""
    ask = f"source {script}; COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; COMP_WORDBREAKS={word_breaks!r}; _megalm; "
    ask += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("megalm tok", ["tokenize"]),
        ("megalm tr", ["train"]),
        ("megalm train +model=tin", ["tiny", "tiny-moe"]),
        ("megalm train +model=tiny guard=st", ["strict"]),
        ("megalm train optim.weight_d", ["optim.weight_decay="]),
        ("megalm train train.determinism=", ["fast", "strict"]),
        ("megalm train nothing_like_it", []),
    ],
)
def test_the_shell_offers_what_fits(script, line, offered):
    assert offer(script, line) == offered


def test_whole_words_are_offered_where_the_shell_does_not_cut_at_equal_signs(script):
    assert offer(script, "megalm train +model=tin", " \t\n") == ["+model=tiny", "+model=tiny-moe"]


def test_every_word_is_one_that_the_command_line_takes():
    words = list_words()
    assert len(words) > 300 and len(words) == len(set(words))
    assert {"+model=tiny", "+experiment=sft", "guard=off", "optim.lr=", "precision.dtype=bf16"} <= set(words)
    assert not [word for word in words if any(character in word for character in " \t\"'$`\\")]


def test_another_shell_is_refused_with_those_that_there_are():
    done = subprocess.run(
        [sys.executable, "-m", "megalm", "completion", "tcsh"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "bash" in done.stderr and "Traceback" not in done.stderr

import os
import stat
import subprocess
import sys

import pytest

from megalm.config.errors import ConfigError
from megalm.corpus.documents import find_files


@pytest.fixture
def at(tmp_path, monkeypatch):
    """Makes files, each with its name as the content, in a folder that names are relative to."""
    monkeypatch.chdir(tmp_path)

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)

    return make


def names(*inputs, said=None, **options):
    return [piece.path for piece in find_files(list(inputs), (said if said is not None else []).append, **options)]


def test_folders_and_globs(at):
    at("b/x.txt", "b/c/y.md", "b/z.png", "a.txt")
    assert names("b") == ["b/c/y.md", "b/x.txt"]
    assert names("*.txt", "a.txt", os.path.abspath("a.txt")) == ["a.txt"]
    assert names("b/z.png") == names("b/z*") == ["b/z.png"]
    assert names("b/**/*.md") == names("**/y.md") == names(f"{os.getcwd()}/b/[c]/?.md".replace(os.getcwd(), ".")[2:])
    assert sorted(names("b/**")) == ["b/c/y.md", "b/x.txt", "b/z.png"]
    for nothing in ("none.txt", "*.csv", "b/x.txt/*", "b/*/none/*.md"):
        with pytest.raises(ConfigError, match="names no file"):
            find_files([nothing])


@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints/a-checkpoint.txt", "._a.txt", ".git/c.txt", "_temporary/0/b.txt", "__MACOSX/._a.txt", ".a.txt.swp",
        "a.txt~", "a.txt.part", "a.jsonl.tmp", "a.txt.crdownload", "Thumbs.db", "desktop.ini", "_SUCCESS", "a.txt.crc",
        "~$a.txt", "#a.txt#", ".DS_Store", "a.txt.bak", "lost+found/a.txt", "a.incomplete/a.txt", "_delta_log/0.json",
        "__pycache__/a.txt", "a.txt.lock", "a.txt.md5", ".cache/huggingface/a.json", "sub/.hidden/deep/a.jsonl", "SUB/THUMBS.DB",
    ],
)  # fmt: skip
@pytest.mark.parametrize("pattern", ["d", "d/**/*", "d/**", "memory://X"])
def test_hidden_and_temporary_files_are_left_out_and_told(at, name, pattern):
    at("d/a.txt", f"d/{name}")
    if pattern.startswith("memory"):
        import fsspec

        pattern = f"memory://{os.getcwd()}/d"
        for path in ("d/a.txt", f"d/{name}"):
            with fsspec.open(f"memory://{os.getcwd()}/{path}", "w") as file:
                file.write("x")
    said = []
    assert [path.removeprefix(f"memory://{os.getcwd()}/") for path in names(pattern, said=said)] == ["d/a.txt"]
    (message,) = said
    assert "left out: 1 hidden or temporary (" in message and name.split("/")[0] in message


def test_ordinary_names_are_read(at):
    ordinary = [
        "_posts/a.md",
        "part-0.jsonl",
        "pack/__init__.py",
        "a.part.txt",
        "old/a.txt",
        "tmp/b.txt",
        "x.old/c.txt",
        "a~b.txt",
    ]
    at(*(f"d/{name}" for name in ordinary))
    assert names("d") == sorted(f"d/{name}" for name in ordinary)


def test_what_is_named_is_read_whatever_it_is_called(at):
    at(".cache/.git/a.txt", ".cache/b.txt~", ".cache/_SUCCESS", "d/.a.txt", "d/x.tmp", "d/b.txt")
    for path in (".cache/.git/a.txt", ".cache/b.txt~", ".cache/_SUCCESS"):
        assert names(path) == [path]
    assert names(".cache/.git") == [".cache/.git/a.txt"]
    assert names(".cache/.git/*.txt") == [".cache/.git/a.txt"] and names(".cache/*.txt~") == [".cache/b.txt~"]
    assert names("d/.*") == ["d/.a.txt"] and names("d/*.tmp") == ["d/x.tmp"]
    with pytest.raises(ConfigError, match=r"names no file but what is left out: 1 hidden or temporary \(d/\.a\.txt\)"):
        find_files(["d/?a.txt"])


def test_a_folder_in_a_glob_is_told(at):
    at("d/a.txt", "d/sub/b.txt")
    said = []
    assert names("d/*", said=said) == ["d/a.txt"]
    assert said == ["d/*: left out: 1 folders, which a glob without ** does not search (d/sub)"]


def test_folders_are_searched_through_links_and_say_what_they_leave_out(at, tmp_path):
    at("real/a.txt", "real/b.docx", "in/c.txt")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "round").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "twice.txt").symlink_to(tmp_path / "in" / "c.txt")
    said = []
    assert names("in", said=said) == ["in/c.txt", "in/linked/a.txt"]
    assert said == ["in: left out: 1 of no known format (in/linked/b.docx)"]
    assert names("in/**/*.txt") == ["in/c.txt", "in/linked/a.txt"]


@pytest.mark.parametrize("name", ["gone.txt", "gone", "gone.bin"])
@pytest.mark.parametrize("pattern", ["in", "in/*", "in/**/*"])
def test_a_link_that_points_nowhere_or_at_itself_is_an_error(at, tmp_path, name, pattern):
    at("in/a.txt")
    for target in ("nowhere", name):
        (tmp_path / "in" / name).symlink_to(tmp_path / "in" / target)
        with pytest.raises(
            ConfigError, match=rf"{name}: cannot be read \(.*a link that points nowhere\), so part of the input"
        ):
            find_files([pattern])
        os.unlink(tmp_path / "in" / name)


@pytest.mark.parametrize(
    "pattern", ["in", "in/**/*.txt", "in/*/*.txt", "in/*/deep/*.txt", "in/secret/deep/*.txt", "file://in"]
)
def test_a_folder_that_may_not_be_read_is_an_error(at, tmp_path, pattern):
    at("in/a.txt", "in/open/b.txt", "in/open/deep/e.txt", "in/secret/c.txt", "in/secret/deep/d.txt")
    code = "import sys; from megalm.corpus.documents import find_files; print(find_files([sys.argv[1]]))"
    command = [sys.executable, "-c", code, pattern.replace("file://in", f"file://{tmp_path}/in")]
    if os.getuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    path = os.pathsep.join(filter(None, sys.path))
    os.chmod(tmp_path / "in" / "secret", 0)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=100)
    os.chmod(tmp_path / "in" / "secret", 0o700)
    assert done.returncode and "ConfigError" in done.stderr and "secret" in done.stderr.splitlines()[-1]
    assert "cannot be read (Permission denied), so part of the input would be missing" in done.stderr.splitlines()[-1]


def test_a_pipe_in_a_folder_is_not_waited_for(at, tmp_path):
    at("d/a.txt")
    os.mkfifo(tmp_path / "d" / "b.txt")
    said = []
    assert stat.S_ISFIFO(os.stat("d/b.txt").st_mode)
    assert names("d", said=said) == names("d/*.txt") == ["d/a.txt"]
    assert said == ["d: left out: 1 pipes, sockets or devices (d/b.txt)"]


def test_a_file_that_vanishes_is_an_error(at, monkeypatch):
    at("d/a.txt", "d/b.txt")
    real = os.walk

    def walk(*args, **options):
        for inside, folders, files in real(*args, **options):
            yield inside, folders, files
            os.unlink("d/b.txt")

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(ConfigError, match=r"d/b\.txt: cannot be read \(No such file or directory\)"):
        find_files(["d"])


def test_characters_of_globs_in_a_name_that_is_there_are_the_name(at):
    import fsspec

    at("a[1].txt", "a1.txt", "a1?.txt")
    assert names("a[1].txt") == ["a[1].txt"] and names("a1?.txt") == ["a1?.txt"]
    for name in ("a[1].txt", "a1.txt"):
        with fsspec.open(f"memory://brackets/{name}", "w") as file:
            file.write("x")
    assert names("memory://brackets/a[1].txt") == ["memory:///brackets/a[1].txt"]
    assert names("memory://brackets/a[0-9].txt") == ["memory:///brackets/a1.txt"]


def test_notes_that_libraries_keep_beside_their_data_are_left_out(at):
    at(
        "ds/dataset_dict.json",
        "ds/train/data-00000-of-00001.arrow",
        "ds/train/dataset_info.json",
        "ds/train/state.json",
    )
    at("ds/train/cache-0123.arrow", "ds/README.md", "ds/.gitattributes", "ds/train_builder.lock", "ds/LICENSE.txt")
    said = []
    assert names("ds", said=said) == ["ds/train/data-00000-of-00001.arrow"]
    assert (
        "6 notes beside a data set (ds/LICENSE.txt, ds/README.md, ds/dataset_dict.json, ds/train/cache-0123.arrow"
        in said[0]
    )
    assert names("ds/README.md") == ["ds/README.md"]
    at("mds/index.json", "mds/0/index.json", "mds/0/shard.00000.mds.zstd", "mds/a.jsonl")
    assert names("mds") == ["mds/a.jsonl"] == names("mds/*.jsonl", "mds/[a0]*/*.zstd")[:1]
    with pytest.raises(ConfigError, match="names no file but what is left out: 1 notes beside a data set"):
        find_files(["mds/0/*.json"])
    at("own/state.json", "own/index.json", "own/cache-a.json")
    assert names("own") == ["own/cache-a.json", "own/index.json", "own/state.json"]


def test_a_readme_among_texts_is_a_text(at):
    at("docs/README.md", "docs/a.rst", "docs/table.csv", "lone/README.md", "data/x/README.md", "data/a.jsonl")
    assert names("docs") == ["docs/README.md", "docs/a.rst", "docs/table.csv"]
    assert names("lone") == ["lone/README.md"] and names("data") == ["data/a.jsonl", "data/x/README.md"]


def test_results_of_the_tools_are_no_input(at):
    at("d/a.jsonl", "d/x_text_document.idx", "d/x_text_document.bin", "d/x_recipe.json", "d/x_tokenizer.json")
    at("d/y.parts/recipe", "d/y.parts/000000.json", "d/soup_recipe.json", "d/out.jsonl", "d/mine/b.json")
    said = []
    assert names("d", said=said) == ["d/a.jsonl", "d/mine/b.json", "d/out.jsonl", "d/soup_recipe.json"]
    assert "3 results of these tools (d/x_recipe.json, d/x_tokenizer.json, d/y.parts)" in said[0]
    results = ["d/out.jsonl", os.path.abspath("d/mine")]
    assert names("d", results=results) == names("d/**", results=results)[:2] == ["d/a.jsonl", "d/soup_recipe.json"]
    with pytest.raises(ConfigError, match=r"input d/out\.jsonl is what this command writes"):
        names("d/out.jsonl", results=results)

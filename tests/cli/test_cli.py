"""The command line: help, exit statuses, one-line errors, summaries that are true, and nothing heavy where it isn't needed."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import command, environment, image_bytes, last_line, wds_tools, write_documents, write_jsonl, write_pairs
from factory import image_sample, make_dataset, text_sample
from s3 import S3Server

from wds_tools.cli.main import COMMANDS, load_command, main
from wds_tools.cli.options import options_of, parse
from wds_tools.dataset.reader import read_manifest
from wds_tools.errors import UsageError
from wds_tools.sequences.templates import find_template
from wds_tools.storage import open_store
from wds_tools.terminal import sized
from wds_tools.vq.registry import load_tokenizer


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


EVERY_COMMAND = pytest.mark.parametrize("words", COMMANDS, ids=" ".join)


@EVERY_COMMAND
def test_help_shows_what_it_does_an_example_and_every_option(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    module = load_command(words)
    assert module.EXAMPLE in shown
    assert module.EXAMPLE.startswith(f"wds-tools {' '.join(words)} ")
    assert " ".join(module.Config.__doc__.split()) in shown
    options = set(re.findall(r"--([a-z0-9-]+)", shown))
    names = {field.name.replace("_", "-") for field in dataclasses.fields(module.Config)} - {
        "reader",
        "converter",
        "labels",
    }  # which are --for, --as, --with
    assert names - options <= {"input", "shell", "a", "b"}


@EVERY_COMMAND
def test_help_explains_every_option_with_its_own_words(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    config = load_command(words).Config
    documented: dict[str, str] = {}
    for base in reversed(config.__mro__[:-1]):
        for name, words_of in re.findall(
            r'^    (\w+):[^\n]*\n    """(.*?)"""', inspect.getsource(base), re.MULTILINE | re.DOTALL
        ):
            documented[name] = " ".join(words_of.split())
    names = {field.name for field in dataclasses.fields(config)}
    assert names <= set(documented)
    assert [name for name in names if documented[name] not in shown] == []


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_help_without_a_command_lists_them_all(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 0
    shown = capsys.readouterr().out
    assert all(" ".join(words) in shown and summary in shown for words, (_, summary) in COMMANDS.items())


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    from wds_tools import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"wds-tools {__version__}\n"


@pytest.mark.parametrize("args", [["bake"], ["convert", "cake"], ["--frobnicate"], ["verfy", "x"]])
def test_an_unknown_command_is_status_2_and_names_the_known(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "convert pairs" in line
    assert args[0] in line


@pytest.mark.parametrize(
    "args",
    [
        ["convert", "documents"],
        ["convert", "documents", "--input", "a"],
        ["convert", "documents", "--input", "a", "--output", "b", "--workers", "many"],
        ["convert", "pairs", "--input", "a", "--output", "b", "--mode", "square"],
        ["convert", "pairs", "--input", "a", "--output", "b", "--bogus"],
        ["encode", "--input", "a", "--output", "b", "--precision", "fp64"],
        ["verify"],
        ["index"],
        ["export", "hf"],
    ],
)
def test_wrong_arguments_are_status_2_without_a_traceback(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("wds-tools: ")
    assert line.endswith(" --help says more)")
    assert said.out == ""


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["verify"], "missing: the dataset: a directory or URL (wds-tools verify --help says more)"),
        (["convert", "documents"], "missing: --input, --output (wds-tools convert documents --help says more)"),
        (
            ["audit"],
            "missing: folders or URLs with saves of a loader, of which the newest counts; or the receipts of all ranks and "
            "restarts, as .json files or folders of these (wds-tools audit --help says more)",
        ),
        (
            ["export", "hf", "--input", "a", "--output", "b", "--format", "x"],
            "--format 'x': expected one of arrow, parquet (wds-tools export hf --help says more)",
        ),
    ],
)
def test_wrong_arguments_are_one_line_however_wide_the_terminal_is(
    args: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in ("40", "200"):
        monkeypatch.setenv("COLUMNS", width)
        assert main(args) == 2
        assert capsys.readouterr().err == f"wds-tools: {line}\n"


def test_a_command_of_several_that_is_not_named_lists_them_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {" ".join(words): summary for words, (_, summary) in COMMANDS.items() if words[0] == "convert"}
    for said, status in ((["convert"], 2), (["convert", "--help"], 0)):
        assert main(said) == status
        shown = capsys.readouterr()
        usage, _, *lines = (shown.out or shown.err).splitlines()
        assert usage.startswith("usage: wds-tools convert KIND ")
        assert [line.split(maxsplit=2) for line in lines] == [[*words.split(), summary] for words, summary in kinds.items()]
    assert main(["convert", "bogus"]) == 2
    assert capsys.readouterr().err == f"wds-tools: unknown command 'convert bogus': the commands are {', '.join(sorted(kinds))}\n"


@EVERY_COMMAND
def test_help_begins_with_what_is_required_and_fits_80_columns(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    example = f"  {load_command(words).EXAMPLE}"
    assert [line for line in shown.splitlines() if len(line) > 80 and line != example] == []
    usage, options = shown.split("\n\n", 1)[0], options_of(load_command(words).Config)
    required = [option.invocation for option in options if option.is_required]
    assert all(f" {invocation} " in " ".join(usage.split()) for invocation in required)
    headings = re.findall(r"^([a-z ]+):$", shown, re.MULTILINE)
    assert headings == list(dict.fromkeys(["example", *(option.group for option in options)]))
    assert ("required" in headings) == bool(required)
    assert headings[1] == "required" or not required


def test_options_of_many_commands_are_under_the_same_heading_in_all() -> None:
    groups: dict[str, set[str]] = {}
    for words in COMMANDS:
        for option in options_of(load_command(words).Config):
            if not option.is_required:
                groups.setdefault(option.flag, set()).add(option.group)
    for flag, heading in {
        "--quiet": "messages",
        "--json": "messages",
        "--part": "workers and machines",
        "--executor": "workers and machines",
        "--resume": "output",
        "--overwrite": "output",
        "--precision": "encoding",
        "--max-rejects": "output",
        "--image-root": "images",
    }.items():
        assert groups[flag] - {"options"} == {heading}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["encode", "--input", "a", "--output", "b", "--worker", "3"], "unknown option --worker: did you mean --workers?"),
        (["encode", "--tokeniser=x"], "unknown option --tokeniser: did you mean --tokenizer?"),
        (["verify", "a", "--frobnicate"], "unknown option --frobnicate: there is none like it"),
        (["verify", "a", "b"], "'b' is one word too many"),
        (["verify", "a", "--", "-b"], "'-b' is one word too many"),
        (["verify", "a", "--json=yes"], "--json: it takes no value, got 'yes'"),
        (["index", "a", "--workers"], "--workers: expected one argument"),
        (["index", "a", "--workers", "many"], "--workers 'many': expected a whole number"),
        (["encode", "--input", "a", "--output", "b", "--precision", "bf61"], "--precision 'bf61': did you mean bf16? expected"),
        (["convert", "pairs", "--input", "a", "--output", "b", "--mode", "mutli768"], "mode 'mutli768': did you mean multi768?"),
        (["convert", "pairs", "--input", "a", "--output", "b", "--mode", "512"], "mode '512': did you mean cc512?"),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_one(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert capsys.readouterr().err.startswith(f"wds-tools: {said}")


def test_a_name_that_nothing_has_is_answered_with_one_that_is_like_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown tokenizer 'chamelon': did you mean chameleon\?"):
        load_tokenizer("chamelon")
    with pytest.raises(UsageError, match=r"unknown template 'liqid': did you mean liquid\?"):
        find_template("liqid")


def test_an_option_of_several_words_may_be_given_several_times() -> None:
    config = parse(load_command(("convert", "documents")).Config, ["--input", "a", "b", "--output", "o", "--input=c"])
    assert config.input == ("a", "b", "c")


def test_behind_two_dashes_come_words_alone() -> None:
    config = parse(load_command(("audit",)).Config, ["--show", "3", "a", "--", "--quick", "--"])
    assert (config.input, config.show, config.quick) == (("a", "--quick", "--"), 3, False)


def test_codes_of_which_the_manifest_says_little_are_described_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(tmp_path / "set", [image_sample(1)], codes={"vqcode_512": {}})
    assert main(["stats", str(tmp_path / "set"), "--quiet"]) == 0
    assert "vqcode_512   unknown tokenizer, codes of unknown number, unknown precision\n" in capsys.readouterr().out


def test_a_librarys_long_story_is_one_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vocabulary", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("said", "meant"),
    [("verfy x", "verify"), ("convert docuemnts", "convert documents"), ("exprot hf", "export hf"), ("idx", "index")],
)
def test_a_slip_of_the_fingers_is_answered_with_what_was_meant(said: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(said.split()) == 2
    assert f"did you mean {meant}? " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["convert", "documents", "--input", "IN", "--output", "OUT", "--resume", "--overwrite"], 2, "exclude each other"),
        (["convert", "documents", "--input", "IN{", "--output", "OUT"], 2, "unbalanced braces"),
        (["convert", "documents", "--input", "nowhere", "--output", "OUT"], 1, "nowhere: no such file"),
        (["verify", "nowhere"], 1, "nowhere: there is no such folder, or nothing is in it"),
        (["stats", __file__], 1, f"{__file__} is a file, or lies below one: give a folder"),
        (["convert", "documents", "--input", "IN", "--output", __file__], 1, "is a file, or lies below one: give a folder"),
        (["convert", "documents", "--input", "IN", "--output", f"{__file__}/deeper"], 1, "is a file, or lies below one"),
        (["convert", "documents", "--input", "s3://", "--output", "OUT"], 2, "s3://"),
        (["convert", "documents", "--input", "nope://a/b", "--output", "OUT"], 2, "nope"),
        (["index", "nowhere"], 1, "nowhere has no manifest.json"),
        (["encode", "--input", "nowhere", "--output", "OUT"], 1, "nowhere: there is no such folder"),
    ],
)
def test_an_error_is_one_line_with_the_right_status(
    in_tmp_path: Path, args: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path = in_tmp_path
    write_documents(tmp_path / "in.jsonl.zst", [{"text": "a"}])
    assert main([word.replace("IN", "in.jsonl.zst").replace("OUT", "out") for word in args]) == status
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("wds-tools: ")
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["convert", "documents", "--input", "a", "--output", "b", "--workers", "0"], "--workers 0: at least 1"),
        (["convert", "documents", "--input", "a", "--output", "b", "--max-rejects", "few"], "--max-rejects 'few'"),
        (["convert", "documents", "--input", "a", "--output", "b", "--keep", "id"], "--keep id"),
        (["convert", "pairs", "--input", "a", "--output", "b", "--task-lines", "0"], "--task-lines 0: at least 1"),
        (["encode", "--input", "a", "--output", "./a/"], "--output ./a/ is the input a"),
    ],
)
def test_a_wrong_value_is_status_2_and_says_what_is_wrong(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"wds-tools: {message}")
    assert line.endswith("--help says more)")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_documents(tmp_path / "in.jsonl.zst", [{"text": "a"}])
    tmp_path.chmod(0o500)
    assert main(["convert", "documents", "--input", str(path), "--output", str(tmp_path / "out")]) == 1
    assert "permission denied" in capsys.readouterr().err


@pytest.mark.slow
def test_file_names_that_are_no_utf_8_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "in" / os.fsdecode(b"caf\xe9.jsonl.zst")
    try:
        write_documents(path, [{"text": "a"}])
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    said = wds_tools("convert", "documents", "--input", tmp_path / "in", "--output", tmp_path / "out", status=2)
    assert "not UTF-8" in said.stderr
    assert len(said.stderr.splitlines()) == 1


@pytest.mark.slow
def test_names_with_spaces_and_umlauts_are_fine(tmp_path: Path) -> None:
    write_documents(tmp_path / "über uns/ä b.jsonl.zst", [{"text": "a"}])
    wds_tools("convert", "documents", "--input", tmp_path / "über uns", "--output", tmp_path / "ö ö")
    assert "verify: all is well" in wds_tools("verify", tmp_path / "ö ö").stdout


@pytest.mark.slow
def test_the_summary_of_a_conversion_is_true(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "in", 3)
    (tmp_path / "in/images/1.jpg").write_bytes(image_bytes(1, 200, 20))
    write_jsonl(path, [*path.read_bytes().splitlines(), b"broken"])
    out = tmp_path / "out"
    said = wds_tools("convert", "pairs", "--input", path, "--output", out, "--max-rejects", "1").stdout
    manifest = read_manifest(open_store(str(out)))
    size = sum(file.stat().st_size for file in out.glob("*.tar"))
    assert said.splitlines() == [
        f"dataset      {out}",
        "samples      2 of 4 inputs (2 image_text)",
        f"rejects      2 (1 aspect_ratio, 1 bad_json), listed in {out}/rejects/",
        f"shards       1, {sized(size)}, {size / 2:,.0f} bytes a sample",
        "images       2, 2 smaller than their crop, so enlarged (convert with --min-side leaves such out)",
        f"fingerprint  {manifest.fingerprint()}",
    ]
    encoded = wds_tools("encode", "--input", out, "--output", tmp_path / "codes", "--device", "cpu").stdout
    assert "samples      2 of 2 inputs (2 image_text)" in encoded
    assert "rejects      none" in encoded
    assert "vqcode_512   tiny, 4,096 codes, fp32" in encoded


def test_verify_says_all_is_well_or_lists_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(tmp_path / "set", [text_sample(1)])
    assert main(["verify", str(tmp_path / "set")]) == 0
    assert last_line(capsys.readouterr().out) == "verify: all is well"
    (tmp_path / "set/extra").write_text("")
    assert main(["verify", str(tmp_path / "set")]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "WRONG  extra: not in the manifest: left by something else, or by a run that was interrupted",
        "verify: 1 problem",
    ]


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [text_sample(1)])
    process = subprocess.Popen(
        [sys.executable, "-m", "wds_tools", "verify", str(tmp_path / "set")],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait(30)


@pytest.mark.parametrize("args", [["verify", "SET"], ["verify", "SET", "--json"], ["verify", "--help"], ["--help"]], ids=" ".join)
def test_a_full_disk_under_standard_output_is_one_line(tmp_path: Path, args: list[str]) -> None:
    make_dataset(tmp_path / "set", [text_sample(1)])
    words = [word.replace("SET", str(tmp_path / "set")) for word in args]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command(*words), env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=200, check=False
        )
    assert (done.returncode, done.stderr) == (1, "wds-tools: can't write to standard output: No space left on device\n")


def test_messages_that_nobody_can_read_change_nothing(tmp_path: Path) -> None:
    write_documents(tmp_path / "in.jsonl.zst", [{"text": "a"}])
    args = command("convert", "documents", "--input", tmp_path / "in.jsonl.zst", "--output", tmp_path / "out")
    for closed in ("2> /dev/full", "2>&-"):
        done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *args, "--overwrite"], env=environment(), check=False)
        assert done.returncode == 0
    assert subprocess.run(["sh", "-c", '"$@" 2>&- >&-', "sh", *args], env=environment(), check=False).returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_modules_load_is_one_line(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "argparse.py").write_text(
        "import sys, time; sys.__stdout__.write('loading'); sys.__stdout__.close(); time.sleep(100)"
    )
    environ = environment()
    environ["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environ["PYTHONPATH"]])
    pipe = subprocess.PIPE
    with subprocess.Popen(command("verify", "x"), env=environ, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(7) == "loading"
        process.send_signal(number)
        _, said = process.communicate(timeout=200)
    assert (process.returncode, said) == (128 + number, f"wds-tools: stopped by {number.name}\n")


LATE = {
    "while the lease is set free": "from wds_tools.dataset.lease import Lease as owner; name = '_leave'",
    "when the command has ended": "import wds_tools.__main__ as owner; name = '_listen'",
}


@pytest.mark.parametrize("when", LATE)
def test_a_signal_at_the_end_of_a_command_is_one_line_too_and_leaves_no_lease(tmp_path: Path, when: str) -> None:
    write_documents(tmp_path / "in/a.jsonl.zst", [{"text": "A text."}])
    code = f"""if True:
        import os, signal, sys
        from wds_tools.__main__ import start
        {LATE[when]}
        real = getattr(owner, name)
        def hit(*args):
            if name == "_leave" or getattr(signal.getsignal(signal.SIGTERM), "__name__", "") == "_stop":
                setattr(owner, name, real)
                os.kill(os.getpid(), signal.SIGTERM)
                for _ in range(1000):
                    pass
            return real(*args)
        setattr(owner, name, hit)
        if name == "_listen":
            start.__globals__[name] = hit
        sys.argv[0] = "wds-tools"
        sys.exit(start())
    """
    args = ["convert", "documents", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--quiet"]
    done = subprocess.run([sys.executable, "-c", code, *args], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 143, done.stderr
    assert done.stderr.splitlines()[-1].startswith("wds-tools: stopped by SIGTERM")
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").glob("_work/run-*")) == []


@pytest.mark.slow
def test_a_signal_ends_a_command_that_waits_for_a_silent_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        login = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
        environ = environment() | login | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        process = subprocess.Popen(command("verify", "s3://b/set"), env=environ, stderr=subprocess.PIPE, text=True)
        with process, silent.accept()[0]:
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=100)
    assert process.returncode == 143
    assert said.splitlines()[-1].startswith("wds-tools: stopped by SIGTERM")  # what to do follows if the main thread got to it


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9"), "a\nb", "a\x1b[2Jb"], ids=["latin-1", "newline", "escape"])
def test_a_path_that_could_not_be_written_down_is_refused_wherever_it_is_given(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / name)
    for args in (
        ["verify", path, "--json"],
        ["stats", str(tmp_path), "--html", f"{path}/report.html"],
        ["encode", "--input", path, "--output", str(tmp_path / "out")],
        ["convert", "conversations", "--input", "x.json", "--image-root", path, "--output", str(tmp_path / "out")],
        ["doctor", path],
    ):
        assert main(args) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "has a control character, or bytes that are not UTF-8" in line
        assert line.isprintable()
    with pytest.raises(UsageError, match="rename it"):
        open_store(path)


@pytest.mark.slow
def test_a_stray_file_whose_name_is_not_utf_8_is_named(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [text_sample(1)])
    stray = os.fsdecode(b"caf\xe9")
    (tmp_path / "set" / stray).write_text("")
    assert "WRONG  caf\\udce9: not in the manifest" in wds_tools("verify", tmp_path / "set", status=1).stdout
    said = json.loads(wds_tools("verify", tmp_path / "set", "--json", status=1).stdout)
    assert said["problems"][0].startswith(f"{stray}: not in the manifest")


NO_RECORD = {"completion", "view"}
"""Commands whose output is no record: a script, a web page."""


@EVERY_COMMAND
def test_every_command_can_answer_with_one_json_object(words: tuple[str, ...]) -> None:
    config = load_command(words).Config
    assert ("json" in {field.name for field in dataclasses.fields(config)}) == (words[0] not in NO_RECORD)


@pytest.mark.slow
def test_json_says_what_the_lines_say(tmp_path: Path) -> None:
    write_documents(tmp_path / "in.jsonl.zst", [{"text": "one"}, {"text": "two"}, {"no": "text"}])
    out = tmp_path / "set"

    def said(*args: str | Path, status: int = 0) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(wds_tools(*args, "--json", status=status).stdout)
        return record

    made = said("convert", "documents", "--input", tmp_path / "in.jsonl.zst", "--output", out, "--max-rejects", "1")
    manifest = read_manifest(open_store(str(out)))
    assert made["fingerprint"] == manifest.fingerprint()
    assert (made["inputs"], made["samples"], made["rejects"], made["shards"]) == (3, 2, {"missing_field": 1}, 1)
    assert said("index", out) == made
    assert said("verify", out) == {**made, "problems": [], "notes": []}
    (out / "extra").write_text("")
    assert len(said("verify", out, status=1)["problems"]) == 1
    (out / "extra").unlink()
    exported = said("export", "hf", "--input", out, "--output", tmp_path / "hf")
    assert (exported["rows"], exported["files"], exported["data_types"]) == (2, 1, {"text_pretrain": 2})


@pytest.mark.parametrize(
    "args",
    [
        ["verify", "SET"],
        ["stats", "SET"],
        ["compare-codes", "SET", "SET/"],
        ["select", "--input", "SET", "--output", "OUT"],
        ["relabel", "--input", "SET", "--with", "x.csv", "--texts", "a=b", "--output", "OUT"],
        ["pack", "--input", "SET", "--tokenizer", "x", "--max-length", "9", "--output", "OUT"],
        ["export", "hf", "--input", "SET", "--output", "OUT"],
        ["export", "parquet", "--input", "SET", "--output", "OUT"],
        ["simulate", "SET", "--batch-size", "1"],
    ],
    ids=" ".join,
)
def test_tars_without_a_manifest_are_told_of_index_and_convert_wherever_a_dataset_is_expected(
    tmp_path: Path, args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(tmp_path / "ours", [image_sample(1)])
    (tmp_path / "set").mkdir()
    (tmp_path / "ours/shard-000000-0000.tar").rename(tmp_path / "set/00000.tar")
    names = {"SET": str(tmp_path / "set"), "OUT": str(tmp_path / "out")}
    assert main([names.get(word.rstrip("/"), word) + "/" * word.endswith("/") for word in args]) == 1
    said = last_line(capsys.readouterr().err)
    assert f"{names['SET']} has no manifest.json, but tars such as " in said
    assert f"`wds-tools convert pairs --input {names['SET']} --output OUTPUT`" in said
    assert f"`wds-tools index {names['SET']}`" in said


# ---- doctor ----


def test_doctor_says_what_is_installed_and_what_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(tmp_path / "set", [text_sample(1)])
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.txt").write_text("a")
    assert main(["doctor", f"{tmp_path}/set", f"{tmp_path}/files", f"{tmp_path}/new", "--write"]) == 0
    shown = capsys.readouterr().out
    assert f"numpy {importlib.metadata.version('numpy')}" in shown
    assert re.search(r"set +readable in .* ms: a dataset of 1 sample in 1 shard; writable in ", shown)
    other = "no dataset, but files such as a.txt: `wds-tools inspect .*files` says what they would become"
    assert re.search(rf"files +readable in .*: {other}; writable", shown)
    assert re.search(r"new +readable in .*: nothing is there; writable", shown)
    assert shown.endswith("doctor: all is well\n")
    assert [path.name for path in (tmp_path / "files").iterdir() if path.is_file()] == ["a.txt"]
    assert main(["doctor", f"{tmp_path}/nope"]) == 1
    assert re.search(r"nope +WRONG: nothing is there: ", capsys.readouterr().out)


def test_doctor_shows_no_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_SAS_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hunter2@127.0.0.1:9/")
    main(["doctor"])
    shown = capsys.readouterr().out
    assert "hunter2" not in shown
    assert re.search(r"AWS_SECRET_ACCESS_KEY +set\n", shown)
    assert re.search(r"AWS_ENDPOINT_URL +http://127.0.0.1:9/\n", shown)


def test_doctor_judges_a_dataset_that_lacks_a_file_or_is_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(tmp_path / "set", [text_sample(1)])
    (shard,) = (tmp_path / "set").glob("*.tar")
    shard.write_bytes(shard.read_bytes() + bytes(512))
    (tmp_path / "half/_work").mkdir(parents=True)
    (tmp_path / "half/_work/plan.json").write_text("{}")
    assert main(["doctor", f"{tmp_path}/set", f"{tmp_path}/half"]) == 1
    changed, unfinished, verdict = capsys.readouterr().out.splitlines()[-3:]
    assert re.search(rf"set +WRONG: .*{shard.name}.*bytes", changed)
    assert unfinished.endswith("half  WRONG: a dataset that is not finished: run its command again with --resume")
    assert verdict == "doctor: 2 problems"


def test_doctor_times_the_tokenizer_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    assert re.search(
        r"^tokenizer +tiny: [\d.e-]+ s an image of 512 x 512 pixels on cpu, [\d.]+ hours a million",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    for said, wrong in (("chamelon", "did you mean chameleon?"), ("chameleon", "needs weights: a folder with vqgan.yaml")):
        assert main(["doctor", "--tokenizer", said]) == 1
        assert wrong in capsys.readouterr().out


def test_doctor_names_a_bucket_that_cannot_be_read(s3: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", f"s3://{s3.bucket}/nothing-yet", "--write"]) == 0
    assert "doctor: all is well" in capsys.readouterr().out
    assert main(["doctor", "s3://no-such-bucket/set", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["problems"][0].startswith("s3://no-such-bucket/set: ")
    assert said["facts"][-1]["is_fine"] is False


def test_doctor_can_write_to_a_bucket_that_the_server_makes_on_the_way(s3: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "s3://made-on-the-way", "--write"]) == 0
    assert "nothing is there; writable in " in capsys.readouterr().out


# ---- Completion ----


def script_for(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", shell]) == 0
    path = folder / f"completion.{shell}"
    path.write_text(capsys.readouterr().out)
    return path


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    asked = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); _wds_tools; echo "${COMPREPLY[*]}"'
    return subprocess.run(
        ["bash", "-c", asked, script, "wds-tools", *words], capture_output=True, text=True, check=True
    ).stdout.split()


def test_bash_completes_commands_options_and_what_an_option_may_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = script_for("bash", tmp_path, capsys)
    assert {words[0] for words in COMMANDS} == set(completed(script, ""))
    assert completed(script, "compl") == ["completion"]
    assert completed(script, "convert", "do") == ["documents"]
    assert completed(script, "convert", "documents", "--inp") == ["--input"]
    assert completed(script, "export", "hf", "--format", "") == ["arrow", "parquet"]
    assert completed(script, "export", "hf", "--input", "x", "--fo") == ["--for", "--format"]
    assert completed(script, "completion", "z") == ["zsh"]
    assert completed(script, "encode", "--tokenizer", "ch") == ["chameleon"]
    assert set(completed(script, "convert", "pairs", "--encode", "")) >= {"tiny", "chameleon", "llamagen"}
    assert completed(script, "pack", "--template", "e") == ["emu3"]
    assert completed(script, "pack", "--tokenizer", "") == []  # a folder
    assert completed(script, "verify", "") == []  # then bash offers files
    assert completed(script, "nonsense", "--") == []


@pytest.mark.parametrize(("shell", "check"), [("zsh", ["zsh", "-n"]), ("fish", ["fish", "--no-execute"])])
def test_scripts_for_other_shells_name_every_command_and_parse(
    tmp_path: Path, shell: str, check: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    script = script_for(shell, tmp_path, capsys)
    assert all(word in script.read_text() for words in COMMANDS for word in words)
    if shutil.which(shell):
        subprocess.run([*check, script], check=True)


HEAVY = ("torch", "PIL", "datasets", "diffusers", "transformers", "webdataset", "pandas", "ray")


@pytest.mark.parametrize(
    ("args", "allowed"),
    [
        (["verify", "SET"], ()),
        (["index", "SET"], ()),
        (["convert", "documents", "--input", "IN", "--output", "OUT"], ()),
        (["convert", "pairs", "--input", "PAIRS", "--output", "OUT"], ("PIL",)),
        (["--help"], ()),
    ],
)
def test_commands_import_only_what_they_need(tmp_path: Path, args: list[str], allowed: tuple[str, ...]) -> None:
    make_dataset(tmp_path / "set", [text_sample(1)])
    write_documents(tmp_path / "in.jsonl.zst", [{"text": "a"}])
    write_pairs(tmp_path / "pairs", 1)
    names = {"SET": "set", "IN": "in.jsonl.zst", "PAIRS": "pairs/pairs.jsonl", "OUT": "out"}
    code = "import sys; from wds_tools.cli.main import main; assert main(sys.argv[1:]) == 0; print('|', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *(names.get(word, word) for word in args)],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.rpartition("|")[2].split()
    assert [name for name in HEAVY if name in loaded and name not in allowed] == []

"""The `engine` command as a user meets it: help, one clear sentence for a mistake, exit codes, and one JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import shard, synth
from engine.recipes import ShardRecipe
from sharding.lock import folder_lock

ENGINE = Path(sys.executable).parent / "engine"
SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
VERBS = ("synth", "shard", "train", "evaluate", "verify", "doctor", "weights")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "slides"
    synth.run(folder, slides=2, size=1024, seed=2, workers=1)
    return folder


@pytest.fixture(scope="module")
def unspaced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide that states no spacing."""
    folder = tmp_path_factory.mktemp("cli") / "unspaced"
    synth.run(folder, slides=1, size=1024, seed=2, mpp=None, workers=1)
    return folder


@pytest.fixture(scope="module")
def finished(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "dataset"
    shard.run(ShardRecipe(slides=str(slides), out=out, workers=1, min_tissue=0.1), local=True)
    return out


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the command in an empty folder; stdout and stderr apart."""

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(ENGINE), *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def _shard(run: Run, slides: Path | str, out: str, *more: str) -> subprocess.CompletedProcess[str]:
    return run("shard", "shard/tiny", f"slides={slides}", f"out={out}", "--local", "workers=1", *more)


def _sentence(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line of stderr of a command that was refused."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("engine: ")
    return lines[0]


# --- help


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_verb_explains_itself_with_an_example(run: Run, verb: str, option: str) -> None:
    done = run(verb, option)
    assert done.returncode == 0, done.stderr
    assert f"Example: engine {verb}" in done.stdout
    assert done.stderr == ""


def test_help_names_every_verb_and_a_first_run(run: Run) -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(f"  {verb} " in done.stdout for verb in VERBS)
    assert "A first run: engine synth" in done.stdout


@pytest.mark.parametrize("verb", ["shard", "train"])
def test_keys_lists_the_recipes_keys(run: Run, verb: str) -> None:
    done = run(verb, "--keys")
    assert done.returncode == 0, done.stderr
    assert ("context_px" if verb == "shard" else "optim.lr") in done.stdout
    # What may be given, and the default as it is typed.
    known = "[auto]  auto | cucim | openslide:" if verb == "shard" else "[auto]  auto | dali | torch:"
    assert known in done.stdout
    assert "[null]" in done.stdout
    assert "[true]" in done.stdout


# --- mistakes of usage


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("shrad",), "No such command"),
        (("shard",), "RECIPE"),
        (("shard", "shard/tiny", "--nonsense"), "No such option"),
        (("verify",), "Missing argument"),
        (("synth", "out", "--slides", "0"), "--slides"),
        (("synth", "out", "--size", "17"), "--size"),
    ],
)
def test_a_command_that_cannot_be_parsed_is_usage(run: Run, arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("contxt_px=256",), "unknown key 'contxt_px'; did you mean 'context_px'?"),
        (("qualty=3",), "did you mean 'quality'?"),
        (("quality=300",), "quality=300"),
        (("context_px",), "'context_px' is no setting"),
        (("mpp=coarse",), "mpp=coarse"),
        (("seed=18446744073709551616",), "seed="),
    ],
)
def test_a_wrong_setting_is_usage(run: Run, slides: Path, tmp_path: Path, settings: tuple[str, ...], said: str) -> None:
    assert said in _sentence(_shard(run, slides, "out", *settings), 2)
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_key_of_the_model_is_usage(run: Run, finished: Path, tmp_path: Path) -> None:
    done = run("train", "train/vittm_hmr_tiny", f"dataset={finished}", "run=run", "model.dims=3")
    assert "unknown key 'model.dims'; did you mean" in _sentence(done, 2)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_recipe_is_usage_and_lists_the_shipped_ones(run: Run) -> None:
    text = _sentence(run("shard", "shrad/tiny", "slides=s", "out=o"), 2)
    assert "did you mean 'shard/tiny'?" in text
    assert "did you mean 'shard/tiny'?" in _sentence(run("shard", "tiny", "slides=s", "out=o"), 2)


def test_a_missing_recipe_file_is_usage(run: Run) -> None:
    assert "mine.yaml: No such file" in _sentence(run("shard", "mine.yaml"), 2)


def test_a_recipe_without_slides_or_out_names_both(run: Run) -> None:
    text = _sentence(run("shard", "shard/tiny"), 2)
    assert "slides=..." in text
    assert "out=..." in text


def test_a_missing_folder_is_usage(run: Run, tmp_path: Path) -> None:
    assert "nowhere" in _sentence(_shard(run, "nowhere", "out"), 2)
    assert "nowhere" in _sentence(run("verify", "nowhere"), 2)
    done = run("train", "train/vittm_hmr_tiny", "dataset=nowhere", "run=run")
    assert "nowhere" in _sentence(done, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_slides_is_usage(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no slide in" in _sentence(_shard(run, "empty", "out"), 2)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_no_dataset_is_usage(run: Run, slides: Path) -> None:
    assert "dataset.json" in _sentence(run("verify", slides), 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [("slide_id,file\na,b.svs\n", "expected one named path"), ("slide_id,path\na,x.svs\na,y.svs\n", "id 'a'")],
)
def test_a_wrong_slide_list_is_usage(run: Run, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    assert said in _sentence(_shard(run, "list.csv", "out"), 2)
    assert not (tmp_path / "out").exists()


def test_local_and_an_address_contradict_each_other(run: Run, slides: Path) -> None:
    assert "--local and --address" in _sentence(_shard(run, slides, "out", "--address", "somewhere:1"), 2)


def test_another_recipe_into_a_finished_dataset_is_usage(run: Run, slides: Path, finished: Path) -> None:
    assert "another recipe" in _sentence(_shard(run, slides, str(finished), "min_tissue=0.9"), 2)


@pytest.mark.parametrize(
    "text",
    ["2026", "007", "1e3", "1_000", "12:30", "2024-05-01", "no", "null", "infinity", "0x10", "{a}", "a: b", "a #b"],
)
def test_a_path_means_the_text_that_was_typed(run: Run, text: str) -> None:
    # On the command line values are YAML, which takes these for numbers, dates, truth values, mappings or comments.
    assert f"slides={text}: there is no such" in _sentence(_shard(run, text, "out"), 2)


def test_a_dated_folder_is_a_folder(run: Run, slides: Path, tmp_path: Path) -> None:
    done = _shard(run, slides, "2024-05-01")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "2024-05-01" / "dataset.json").is_file()


# --- failures of the run, and slides that cannot be used


def test_a_dataset_that_another_process_writes_is_a_failure(run: Run, slides: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with folder_lock(tmp_path / "out"):
        assert f"process {os.getpid()}" in _sentence(_shard(run, slides, "out"), 1)


def test_an_output_folder_that_cannot_be_made_is_a_failure_that_names_it(run: Run, slides: Path) -> None:
    done = _shard(run, slides, "/proc/nothing/out")
    assert "/proc/nothing" in _sentence(done, 1)


def test_damage_is_found_by_verify_and_is_a_failure(run: Run, slides: Path, tmp_path: Path) -> None:
    assert _shard(run, slides, "out", "min_tissue=0.1").returncode == 0
    good = run("verify", "out", "--json")
    assert good.returncode == 0
    answer = json.loads(good.stdout)
    assert set(answer) == {"ok", "samples", "bad"}
    assert answer["ok"] is True
    tar = next((tmp_path / "out" / "shards").glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    bad = run("verify", "out", "--json")
    assert bad.returncode == 1
    answer = json.loads(bad.stdout)
    assert answer["ok"] is False
    assert set(answer["bad"][0]) == {"shard", "key", "reason"}
    assert answer["bad"][0]["shard"] == tar.stem


def test_a_slide_without_spacing_is_quarantined_unless_level_0_is_taken_as_it_is(run: Run, unspaced: Path) -> None:
    done = _shard(run, unspaced, "asked")
    assert done.returncode == 3, done.stderr
    assert "quarantined: synth-0000: the slide states no spacing" in done.stderr
    assert "mpp=native" in done.stderr
    assert "Traceback" not in done.stderr
    native = _shard(run, unspaced, "native", "mpp=native", "--json")
    assert native.returncode == 0, native.stderr
    assert sum(json.loads(native.stdout)["patches"].values()) > 0


def test_broken_slides_are_quarantined_while_the_others_are_done(run: Run, slides: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    whole = (slides / "synth-0000.svs").read_bytes()
    (folder / "good.svs").write_bytes(whole)
    (folder / "text.svs").write_text("no slide\n" * 100)
    (folder / "short.svs").write_bytes(whole[: len(whole) // 3])
    done = _shard(run, "slides", "out", "--json")
    assert done.returncode == 3, done.stderr
    answer = json.loads(done.stdout)
    assert answer["slides"] == {"done": 1, "quarantined": 2}
    assert "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("quarantined: ")]
    assert sorted(line.split(": ")[1] for line in told) == ["short", "text"]
    again = _shard(run, "slides", "out", "--json")
    assert again.returncode == 3
    assert "nothing was written" in again.stderr
    assert json.loads(again.stdout)["digest"] == answer["digest"]
    plain = _shard(run, "slides", "out")
    assert plain.returncode == 3
    assert "2 slides and 0 patches are quarantined" in plain.stdout
    dry = _shard(run, "slides", "other", "--dry-run")
    assert dry.returncode == 3
    assert "would make" in dry.stdout
    assert "would be quarantined:" in dry.stdout


def test_hostile_files_are_quarantined_with_a_reason_each(run: Run, tmp_path: Path) -> None:
    folder = SHARED / "slides" / "negative"
    if not folder.is_dir():
        pytest.skip(f"no broken slides here: {folder} is absent")
    done = _shard(run, folder.resolve(), "out", "--json")
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    answer = json.loads(done.stdout)
    assert answer["slides"]["done"] == 0
    assert len(answer["failures"]) == answer["slides"]["quarantined"] == len(list(folder.glob("*.*")))
    assert all(failure["reason"] and "\n" not in failure["reason"] for failure in answer["failures"])


# --- one JSON object


def _shape(value: dict[str, Any]) -> dict[str, Any]:
    return {key: sorted(item) if isinstance(item, dict) else type(item) for key, item in value.items()}


def test_shard_prints_one_json_object_of_the_documented_shape(run: Run, slides: Path, tmp_path: Path) -> None:
    done = _shard(run, slides, "out", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    answer = json.loads(done.stdout)
    assert answer.pop("failures") == []
    assert _shape(answer) == {
        "dataset": str,
        "digest": str,
        "slides": ["done", "quarantined"],
        "patches": ["copy", "decode", "quarantined"],
        "shards": int,
        "bytes": int,
        "seconds": float,
    }
    assert Path(answer["dataset"]) == tmp_path / "out"
    assert answer["digest"] == json.loads((tmp_path / "out" / "dataset.json").read_text())["digest"]


def test_a_dry_run_prints_one_json_object_that_names_the_same_place(run: Run, slides: Path, tmp_path: Path) -> None:
    done = _shard(run, slides, "out", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["dry_run"] is True
    assert Path(answer["dataset"]) == tmp_path / "out"
    assert {"slides", "patches", "shards", "bytes", "seconds"} <= set(answer)
    assert list(tmp_path.iterdir()) == []


def test_synth_prints_one_json_object(run: Run, tmp_path: Path) -> None:
    done = run("synth", "slides", "--slides", "1", "--size", "512", "--workers", "1", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["slides"], answer["painted"]) == (1, 1)
    assert (tmp_path / "slides" / "synth-0000.svs").is_file()


@pytest.mark.slow
def test_doctor_prints_one_json_object_and_everything_else_on_stderr(run: Run) -> None:
    done = run("doctor", "--json")
    answer = json.loads(done.stdout)
    assert set(answer) == {"ok", "checks", "versions"}
    assert done.returncode == (0 if answer["ok"] else 1)
    checks = {check["name"]: check for check in answer["checks"]}
    assert {"python", "cuda", "ray", "disk", "open files", "reader cucim", "reader openslide", "shard"} <= set(checks)
    for name in ("reader openslide", "shard", "loader torch"):
        assert checks[name]["status"] == "PASS", checks[name]
    assert all(check["fix"] for check in checks.values() if check["status"] != "PASS")
    assert "PASS  python" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_native_libraries_print_stays_off_stdout(run: Run, slides: Path, tmp_path: Path) -> None:
    # A library that prints on descriptor 1 when it is loaded, in the driver and in every worker: as cuCIM does.
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "simplejpeg.py").write_text(
        "import os, sys\n"
        "os.write(1, b'native noise\\n')\n"
        "sys.path.remove(os.path.dirname(__file__))\n"
        "del sys.modules['simplejpeg']\n"
        "import simplejpeg\n"
        "sys.modules['simplejpeg'] = simplejpeg\n"
    )
    done = run(
        "shard", "shard/tiny", f"slides={slides}", "out=out", "--local", "workers=1", "--json",
        PYTHONPATH=os.pathsep.join([str(tmp_path / "noise"), os.environ.get("PYTHONPATH", "")]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "native noise" in done.stderr
    assert json.loads(done.stdout)["slides"]["done"] == 2


def test_a_refused_command_prints_no_json(run: Run) -> None:
    assert "nowhere" in _sentence(_shard(run, "nowhere", "out", "--json"), 2)
    assert "nowhere" in _sentence(run("verify", "nowhere", "--json"), 2)


def test_a_plain_result_is_on_stdout_and_progress_on_stderr(run: Run, slides: Path) -> None:
    done = _shard(run, slides, "out")
    assert done.returncode == 0
    assert "digest" in done.stdout
    assert "2/2 slides" not in done.stdout
    assert "2/2 slides" in done.stderr

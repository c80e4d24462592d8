"""The command line: `engine VERB RECIPE [key.path=value ...]`.

Verbs import what they need when they run, so that `engine --help` answers at once. Exit codes: 0 done, 1 failed,
2 usage, 3 done but something was quarantined, 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.console import Output, own_stdout, say


class Exit(IntEnum):
    """What the exit codes mean."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    QUARANTINED = 3
    INTERRUPTED = 130


app = typer.Typer(
    name="engine",
    help="Whole-slide images to verified, shuffled shards, and shards to busy GPUs.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="A first run: engine synth slides; engine shard shard/tiny slides=slides out=dataset; "
    "engine verify dataset; engine train train/vittm_hmr_tiny dataset=dataset run=run",
)

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="a shipped recipe or a path that ends in .yaml")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="set keys of the recipe")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout; all else goes to stderr")]
Local = Annotated[bool, typer.Option("--local", help="run in processes of this machine, without Ray")]
Address = Annotated[str | None, typer.Option(help="run on a Ray cluster that is already there")]


def _keys_of(verb: str) -> Callable[[bool], None]:
    def show(wanted: bool) -> None:
        if wanted:
            from engine.keys import describe_keys

            typer.echo(describe_keys(verb))
            raise typer.Exit

    return show


def _keys_option(verb: str) -> Any:
    return typer.Option("--keys", is_eager=True, callback=_keys_of(verb), help="list the recipe's keys and stop")


@app.command(epilog="Example: engine synth slides --slides 4 --size 4096 --seed 0")
def synth(
    out: Annotated[Path, typer.Argument(help="folder for the slides, labels.csv and truth/")],
    slides: Annotated[int, typer.Option(min=1, help="how many")] = 4,
    size: Annotated[int, typer.Option(min=512, max=100_000, help="side of level 0 in pixels")] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="other seeds, other slides")] = 0,
    mpp: Annotated[float, typer.Option(help="spacing of level 0 in um/px")] = 0.5,
    no_mpp: Annotated[bool, typer.Option("--no-mpp", help="state no spacing in the files")] = False,
    tile: Annotated[int, typer.Option(help="side of the TIFF's JPEG tiles: 256 or 240")] = 256,
    subsampling: Annotated[str, typer.Option(help="4:2:0 or 4:4:4")] = "4:2:0",
    photometric: Annotated[str, typer.Option(help="ycbcr, or rgb with 4:4:4")] = "ycbcr",
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality")] = 80,
    pen: Annotated[bool, typer.Option("--pen", help="add pen marks")] = False,
    hole: Annotated[bool, typer.Option("--hole", help="add a hole in the tissue")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; one per core by default")] = None,
    json: Json = False,
) -> None:
    """Paint H&E-like slides with known truth (Aperio SVS, labels.csv, masks)."""

    def work() -> tuple[dict[str, Any], str]:
        from engine.synth import run

        result = run(
            out,
            slides=slides,
            size=size,
            seed=seed,
            mpp=None if no_mpp else mpp,
            tile=tile,
            subsampling=subsampling,
            photometric=photometric,
            quality=quality,
            pen=pen,
            hole=hole,
            workers=workers,
        )
        return result, f"{slides} slides of {size} px in {out}"

    _finish(*_guard(work), json)


@app.command(
    epilog="Example: engine shard shard/tiny slides=slides/ out=dataset mpp=0.5 workers=8    "
    "(slides may be a folder, a glob or a CSV)"
)
def shard(
    recipe: Recipe,
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be made and write nothing")] = False,
    local: Local = False,
    address: Address = None,
    json: Json = False,
    _keys: Annotated[bool, _keys_option("shard")] = False,
) -> None:
    """Turn slides into a dataset: WebDataset tar shards with a Parquet index.

    An interrupted run is finished by running it again. A slide that cannot be used is recorded with its reason while
    the others go on, and the exit code is 3.
    """

    def work() -> tuple[dict[str, Any], str]:
        from engine import shard as verb
        from engine.config import UsageError, apply_overrides, build, read_recipe
        from engine.recipes import ShardRecipe

        if local and address:
            raise UsageError("--local and --address contradict each other; give one of them.")
        resolved = build(ShardRecipe, apply_overrides(read_recipe("shard", recipe), settings or []))
        if dry_run:
            result = verb.dry_run(resolved, address=address)
        else:
            result = verb.run(resolved, local=local, address=address)
        return result, verb.describe(result)

    result, text, code = _guard(work)
    if code is Exit.DONE and (result["slides"]["quarantined"] or result["patches"]["quarantined"]):
        code = Exit.QUARANTINED
    _finish(result, text, code, json)


def _show_template(name: str | None) -> None:
    if name is not None:
        from engine.slurm import read_template

        try:
            typer.echo(read_template(name), nl=False)
        except ValueError as error:
            say(f"engine: {error}")
            raise typer.Exit(int(Exit.USAGE)) from None
        raise typer.Exit


@app.command(
    epilog="Example: engine train train/vittm_hmr_tiny dataset=dataset run=runs/first steps=60 processes=2;    "
    "on two machines, the same on each: engine train RECIPE dataset=D run=R --nnodes 2 --rdzv HOST:29400 --resume;    "
    "under torchrun: torchrun --nproc-per-node 8 --no-python engine train RECIPE dataset=D run=R --resume;    "
    "under SLURM: engine train --template slurm_requeue > job.sbatch"
)
def train(
    recipe: Recipe,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in its folder, or start it")] = False,
    nnodes: Annotated[
        str | None, typer.Option(metavar="N|MIN:MAX", help="machines; the command is started once on each")
    ] = None,
    rdzv: Annotated[
        str | None, typer.Option(metavar="HOST[:PORT]", help="where they meet; SLURM's first node by default")
    ] = None,
    rdzv_id: Annotated[
        str | None, typer.Option(metavar="ID", help="name of the job there; the run's by default")
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="how often all ranks start anew from the last checkpoint when one dies")
    ] = 0,
    json: Json = False,
    _keys: Annotated[bool, _keys_option("train")] = False,
    _template: Annotated[
        str | None,
        typer.Option(
            "--template",
            metavar="NAME",
            is_eager=True,
            callback=_show_template,
            help="print slurm_single, slurm_multinode or slurm_requeue, a script for sbatch, and stop",
        ),
    ] = None,
) -> None:
    """Train a model on a dataset, on every visible GPU or on the CPU.

    With bad_samples=replace, samples that cannot be read or decoded are replaced, and the exit code is 3.
    """

    def work() -> tuple[dict[str, Any], str]:
        from engine import train as verb
        from engine.config import apply_overrides, read_recipe
        from engine.launch import Nodes
        from engine.train_recipe import build_train_recipe

        resolved = build_train_recipe(apply_overrides(read_recipe("train", recipe), settings or []))
        result = verb.run(resolved, resume=resume, nodes=Nodes.parse(nnodes, rdzv, rdzv_id, max_restarts))
        return result, verb.describe(result) if result else ""

    from engine.runtime import ranks_from_environment

    result, text, code = _guard(work, go_on="`engine train ... --resume` goes on from the last checkpoint")
    # To torchrun and its like any exit code but 0 is a rank that failed.
    if result and result["replaced"] and ranks_from_environment() is None:
        code = Exit.QUARANTINED
    _finish(result, text, code, json)


@app.command(epilog="Example: engine evaluate evaluate/linear store=store labels=labels.csv out=linear.json")
def evaluate(
    recipe: Recipe,
    settings: Settings = None,
    json: Json = False,
    _keys: Annotated[bool, _keys_option("evaluate")] = False,
) -> None:
    """Say how much frozen features know: linear probe or nearest neighbours, with bootstrap intervals.

    Slides that lack a label or an embedding are named. Patients (or slides) on two sides of a split are refused.
    """

    def work() -> tuple[dict[str, Any], str]:
        from engine import evaluate as verb
        from engine.config import apply_overrides, read_recipe
        from engine.evaluate_recipe import build_evaluate_recipe

        resolved = build_evaluate_recipe(apply_overrides(read_recipe("evaluate", recipe), settings or []))
        result = verb.run(resolved)
        return result, verb.describe(result)

    _finish(*_guard(work, go_on="run the same command again"), json)


@app.command(
    epilog="Example: engine extract extract/hipt_patch dataset=dataset weights=vit256_small_dino.pth out=store    "
    "(or slides=slides/; --keys lists all keys)"
)
def extract(
    recipe: Recipe,
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done and write nothing")] = False,
    local: Local = False,
    address: Address = None,
    json: Json = False,
    _keys: Annotated[bool, _keys_option("extract")] = False,
) -> None:
    """Embed the patches or regions of a dataset, or of slides as they are, into a store.

    An interrupted run is finished by running it again; slides that were added are appended. A slide that cannot be
    used is named with its reason while the others go on, and the exit code is 3.
    """

    def work() -> tuple[dict[str, Any], str]:
        from engine.config import UsageError, apply_overrides, read_recipe
        from engine.extract_recipe import build_extract_recipe

        if local and address:
            raise UsageError("--local and --address contradict each other; give one of them.")
        resolved = build_extract_recipe(apply_overrides(read_recipe("extract", recipe), settings or []))
        from engine import extract as verb  # imports torch: a wrong recipe is refused before

        if dry_run:
            result = verb.dry_run(resolved, address=address)
        else:
            result = verb.run(resolved, local=local, address=address)
        return result, verb.describe(result)

    result, text, code = _guard(work)
    if code is Exit.DONE and result["failures"]:
        code = Exit.QUARANTINED
    _finish(result, text, code, json)


@app.command(epilog="Example: engine verify dataset --json")
def verify(
    dataset: Annotated[
        Path, typer.Argument(help="a dataset written by `engine shard`, or a store written by `engine extract`")
    ],
    json: Json = False,
) -> None:
    """Read every byte of a dataset or a store and name what has changed since it was written."""

    def work() -> tuple[dict[str, Any], str]:
        from engine import verify as verb

        result = verb.run(dataset)
        return result, verb.describe(result, dataset)

    result, text, code = _guard(work)
    if code is Exit.DONE and not result["ok"]:
        code = Exit.FAILED
    _finish(result, text, code, json)


@app.command(epilog="Example: engine export store --format clam_h5 --out features")
def export(
    store: Annotated[Path, typer.Argument(help="a store written by `engine extract`")],
    format: Annotated[str, typer.Option(help="hipt_pt, hipt_region_pt, clam_h5 or parquet")],
    out: Annotated[Path, typer.Option(help="folder for the files")],
    slides: Annotated[str, typer.Option(help="ids with commas between, or a CSV with a column slide_id")] = "",
    array: Annotated[str, typer.Option(help="which array of the store")] = "embedding",
    order: Annotated[
        str | None, typer.Option(help="of a slide's rows: store, or name (of X_Y, as HIPT's; default of hipt_pt)")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace another export in the folder")] = False,
    json: Json = False,
) -> None:
    """Write embeddings as other programs read them: HIPT's .pt, CLAM's and TRIDENT's .h5, Parquet."""

    def work() -> tuple[dict[str, Any], str]:
        from engine.stores import export as verb

        chosen = verb.slide_names(slides) if slides else None
        result = verb.run(store, out, format=format, slides=chosen, array=array, order=order, overwrite=overwrite)
        return result, verb.describe(result)

    _finish(*_guard(work), json)


@app.command(epilog="Example: engine report dataset --out report.html")
def report(
    dataset: Annotated[Path, typer.Argument(help="a dataset written by `engine shard`")],
    out: Annotated[Path | None, typer.Option(help="the page; DATASET/report.html by default")] = None,
    json: Json = False,
) -> None:
    """Write one offline HTML page about a dataset: totals, failures, distributions, and each slide with its picture."""

    def work() -> tuple[dict[str, Any], str]:
        from engine import report as verb

        result = verb.run(dataset, out)
        return result, verb.describe(result)

    _finish(*_guard(work), json)


bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench", help="Measure throughput beside peers, and follow it over time.")
Results = Annotated[Path, typer.Option(help="folder of the history")]
_RESULTS = Path("benchmarks/results")


Cases = Annotated[str, typer.Option(help="names with commas between; all where it is left out")]
Rounds = Annotated[int, typer.Option(min=1, help="counted rounds a case; values are their medians")]
Quick = Annotated[bool, typer.Option("--quick", help="small slides: shows that it runs, measures nothing")]
Work = Annotated[Path | None, typer.Option(help="folder where painted slides stay; a temporary one")]


@bench.command("shard", epilog="Example: engine bench shard --work /scratch/bench --cases copy_420,plan")
def bench_shard(
    cases: Cases = "",
    rounds: Rounds = 7,
    quick: Quick = False,
    work: Work = None,
    results: Results = _RESULTS,
    json: Json = False,
) -> None:
    """Measure slides to shards beside OpenSlide, cuCIM and sendfile, on one core; ratios are of the same round."""
    _bench("shard", cases, rounds, quick, work, results, json)


@bench.command("loader", epilog="Example: engine bench loader --work /scratch/bench --cases dali_float")
def bench_loader(
    cases: Cases = "",
    rounds: Rounds = 5,
    quick: Quick = False,
    work: Work = None,
    results: Results = _RESULTS,
    json: Json = False,
) -> None:
    """Measure shards to batches on one core beside webdataset, LitData, MosaicML Streaming, OpenSlide and stock DALI.

    Where there is a GPU, it is measured too. Ratios are of the same round; a peer that is not installed is left out.
    """
    _bench("loader", cases, rounds, quick, work, results, json)


@bench.command("step", epilog="Example: engine bench step --cases hipt_patch_224,hipt_4k")
def bench_step(
    cases: Cases = "",
    rounds: Rounds = 5,
    quick: Quick = False,
    work: Work = None,
    results: Results = _RESULTS,
    json: Json = False,
) -> None:
    """Measure models beside timm on one core, and training with the loader beside the same steps on a batch in memory.

    Where there is a GPU, both are measured there too.
    """
    _bench("step", cases, rounds, quick, work, results, json)


@bench.command("extract", epilog="Example: engine bench extract --work /scratch/bench --cases one_layer")
def bench_extract(
    cases: Cases = "",
    rounds: Rounds = 5,
    quick: Quick = False,
    work: Work = None,
    results: Results = _RESULTS,
    json: Json = False,
) -> None:
    """Measure patches to embeddings beside the encoder alone and a DataLoader with PIL for each slide."""
    _bench("extract", cases, rounds, quick, work, results, json)


def _bench(name: str, cases: str, rounds: int, quick: bool, work: Path | None, results: Path, json: bool) -> None:
    def measure() -> tuple[dict[str, Any], str]:
        from engine import bench as verb

        names = [case.strip() for case in cases.split(",") if case.strip()]
        result = verb.run(name, cases=names, rounds=rounds, quick=quick, work=work, results=results)
        return result, verb.describe(result)

    _finish(*_guard(measure, go_on="painted slides stay in --work"), json)


@bench.command("compare", epilog="Example: engine bench compare --bench loader --chart loader.svg")
def bench_compare(
    name: Annotated[str, typer.Option("--bench", help="which history: shard, loader, shard-quick, ...")] = "shard",
    results: Results = _RESULTS,
    chart: Annotated[Path | None, typer.Option(help="draw the ratios into this SVG file")] = None,
    json: Json = False,
) -> None:
    """Show the history of a benchmark as ratios, each hardware by itself."""

    def work() -> tuple[dict[str, Any], str]:
        from engine import bench as verb

        result = verb.compare(results, name)
        if chart is None:
            return result, verb.describe_history(result)
        verb.write_chart(result, chart)
        return result | {"chart": str(chart)}, f"{verb.describe_history(result)}\ndrawn in {chart}"

    _finish(*_guard(work), json)


weights = typer.Typer(no_args_is_help=True, rich_markup_mode=None, epilog="Example: engine weights inspect vit.pth")
app.add_typer(weights, name="weights", help="Look into checkpoints, and convert them to safetensors.")
WeightsFile = Annotated[Path, typer.Argument(metavar="FILE", help=".safetensors, .pth, .pt, .bin or .ckpt")]


@weights.command("inspect", epilog="Example: engine weights inspect vit256_small_dino.pth")
def weights_inspect(file: WeightsFile, json: Json = False) -> None:
    """Show what a checkpoint holds: model, digest, normalisation, spacing, position rule, weights."""

    def work() -> tuple[dict[str, Any], str]:
        from engine import weights as verb

        result = verb.inspect(file)
        return result, verb.describe(result)

    _finish(*_guard(work), json)


@weights.command(
    "convert",
    epilog="Example: engine weights convert uni.bin --model timm architecture=vit_large_patch16_224 "
    "settings.init_values=1e-5 --normalisation imagenet --mpp 0.5",
)
def weights_convert(
    file: WeightsFile,
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="of the model")] = None,
    out: Annotated[Path | None, typer.Option(help="the new file; FILE with .safetensors by default")] = None,
    model: Annotated[str | None, typer.Option(help="its name; recognised by default")] = None,
    normalisation: Annotated[str | None, typer.Option(help="half, imagenet, none or R,G,B/R,G,B")] = None,
    mpp: Annotated[float | None, typer.Option(help="spacing it was trained at, in um/px")] = None,
    json: Json = False,
) -> None:
    """Write a checkpoint as safetensors, with digest, normalisation, spacing and position rule in its metadata."""

    def work() -> tuple[dict[str, Any], str]:
        from engine import weights as verb

        result = verb.convert(file, out, model=model, settings=settings or [], normalisation=normalisation, mpp=mpp)
        return result, verb.describe(result)

    _finish(*_guard(work), json)


@app.command(epilog="Example: engine doctor")
def doctor(json: Json = False) -> None:
    """Check this machine: versions, GPU, DALI, cuCIM, Ray, and a real read of a small slide by each reader."""

    def work() -> tuple[dict[str, Any], str]:
        from engine import doctor as verb

        result = verb.run()
        return result, verb.describe(result)

    result, text, code = _guard(work)
    if code is Exit.DONE and not result["ok"]:
        code = Exit.FAILED
    _finish(result, text, code, json)


_outputs: list[Output] = []  # the real stdout, while a verb runs


def _guard(
    work: Callable[[], tuple[dict[str, Any], str]], *, go_on: str = "run the same command again to go on"
) -> tuple[dict[str, Any], str, Exit]:
    """Run a verb; a mistake of the user or a failure of the run becomes one sentence and an exit code.

    Anything else is our own error and keeps its traceback.
    """
    from engine.errors import sentence

    try:
        result, text = work()
    except KeyboardInterrupt as stop:
        say(f"engine: {str(stop) or 'interrupted'}; {go_on}")
        return {}, "", Exit.INTERRUPTED
    except Exception as error:
        found = sentence(error)
        if found is None:
            raise
        text, usage = found
        say(f"engine: {text}")
        return {}, "", Exit.USAGE if usage else Exit.FAILED
    return result, text, Exit.DONE


def _finish(result: dict[str, Any], text: str, code: Exit, json: bool) -> None:
    if result:
        if json:
            _outputs[-1].json(result)
        else:
            _outputs[-1].print(text)
    raise typer.Exit(int(code))


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


_TOLD_AT_ONCE = ("-h", "--help", "--keys", "--template")


def main() -> None:
    """The `engine` command."""
    if len(sys.argv) < 2 or any(argument.startswith(_TOLD_AT_ONCE) for argument in sys.argv[1:]):
        app()
        return
    for number in (signal.SIGTERM, signal.SIGUSR1):  # schedulers send either before they take the machine away
        signal.signal(number, _interrupt)
    with own_stdout() as output:
        _outputs.append(output)
        app()


if __name__ == "__main__":
    main()

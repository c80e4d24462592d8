"""`engine bench shard | loader | step | extract | compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engine.command import Json, finish, guard

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

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

    finish(*guard(measure, go_on="painted slides stay in --work"), json)


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

    finish(*guard(work), json)

"""`engine weights inspect | convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engine.command import Json, finish, guard

weights = typer.Typer(no_args_is_help=True, rich_markup_mode=None, epilog="Example: engine weights inspect vit.pth")
WeightsFile = Annotated[Path, typer.Argument(metavar="FILE", help=".safetensors, .pth, .pt, .bin or .ckpt")]


@weights.command("inspect", epilog="Example: engine weights inspect vit256_small_dino.pth")
def weights_inspect(file: WeightsFile, json: Json = False) -> None:
    """Show what a checkpoint holds: model, digest, normalisation, spacing, position rule, weights."""

    def work() -> tuple[dict[str, Any], str]:
        from engine import weights as verb

        result = verb.inspect(file)
        return result, verb.describe(result)

    finish(*guard(work), json)


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

    finish(*guard(work), json)

"""Painted whole-slide images with known truth: deterministic, H&E-like, of any size.

OpenSlide and cuCIM read them as Aperio slides.

    spec.py      what is asked for: one slide's options, validated
    noise.py     hashed numbers and smooth noise, functions of coordinates only
    layout.py    where tissue, tumour, hole and ink lie
    cells.py     nuclei, drawn once and stamped everywhere
    texture.py   the pixels of one TIFF tile
    aperio.py    JPEG tiles and the pyramidal TIFF around them
    paint.py     one slide and its truth, streamed row by row
    cohort.py    patients, labels and survival times of a set of slides
"""

from sharding.synth.paint import paint_slide
from sharding.synth.spec import SlideSpec

__all__ = ["SlideSpec", "paint_slide"]

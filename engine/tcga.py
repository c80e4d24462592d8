"""What a TCGA barcode says: patient, sample type, slide. https://docs.gdc.cancer.gov/Encyclopedia/pages/TCGA_Barcode/"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.slide_list import ListedSlide

SAMPLE_TYPES = {
    "01": "Primary Solid Tumor",
    "02": "Recurrent Solid Tumor",
    "03": "Primary Blood Derived Cancer - Peripheral Blood",
    "04": "Recurrent Blood Derived Cancer - Bone Marrow",
    "05": "Additional - New Primary",
    "06": "Metastatic",
    "07": "Additional Metastatic",
    "08": "Human Tumor Original Cells",
    "09": "Primary Blood Derived Cancer - Bone Marrow",
    "10": "Blood Derived Normal",
    "11": "Solid Tissue Normal",
    "12": "Buccal Cell Normal",
    "13": "EBV Immortalized Normal",
    "14": "Bone Marrow Normal",
    "20": "Control Analyte",
    "40": "Recurrent Blood Derived Cancer - Peripheral Blood",
    "50": "Cell Lines",
    "60": "Primary Xenograft Tissue",
    "61": "Cell Line Derived Xenograft Tissue",
}
# Each part needs those before it; behind the last one stands the end, or anything that is no part of a barcode.
_BARCODE = re.compile(
    r"(TCGA)-([A-Z0-9]{2})-([A-Z0-9]{4})(?:-(\d{2})([A-Z])?(?:-(\d{2})(?:-([A-Z]{2}[A-Z0-9]{1,2}))?)?)?(?![A-Z0-9-])",
    re.IGNORECASE | re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Barcode:
    """A barcode's parts, in capitals; what it does not go as far as is None.

    `TCGA-02-0001-01A-02-TS1`: project TCGA, tissue_source_site 02, participant 0001, sample_type_code 01, vial A,
    portion 02, slide TS1 (TS: top, MS: middle, BS: bottom of a frozen portion; DX: diagnostic, in paraffin).
    """

    project: str
    tissue_source_site: str
    participant: str
    sample_type_code: str | None
    vial: str | None
    portion: str | None
    slide: str | None

    @property
    def patient_id(self) -> str:
        return f"{self.project}-{self.tissue_source_site}-{self.participant}"

    @property
    def site(self) -> str:
        """The tissue source site: staining and scanner come with it, and a model may learn them."""
        return self.tissue_source_site

    @property
    def sample_type(self) -> str | None:
        """GDC's words for the sample type code; None for a code that has none."""
        return SAMPLE_TYPES.get(self.sample_type_code or "")

    @property
    def label(self) -> int | None:
        """1 for tumour (codes 01 to 09), 0 for normal (10 to 19), None for controls, cell lines, xenografts."""
        code = int(self.sample_type_code or 0)
        return 1 if 1 <= code <= 9 else 0 if 10 <= code <= 19 else None


def parse_barcode(name: str) -> Barcode | None:
    """The barcode that a file name or slide id begins with, in upper or lower case; None where it begins with none."""
    match = _BARCODE.match(name)
    return Barcode(*(part and part.upper() for part in match.groups())) if match else None


def barcode_columns(slides: Sequence[ListedSlide]) -> tuple[list[ListedSlide], list[str]]:
    """The slides with columns patient_id, site, sample_type (GDC's words) and label (1 tumour, 0 normal) by barcode.

    A column that the list has already stays as it is, for every slide. The barcode is that of the slide_id, else of the
    file name; where neither is one the new columns are None, and the slide's id is in the second list returned.
    """
    taken = {name for slide in slides for name in slide.columns}
    named, unnamed = [], []
    for slide in slides:
        barcode = parse_barcode(slide.slide_id) or parse_barcode(slide.path.name)
        if barcode is None:
            unnamed.append(slide.slide_id)
        found = {
            name: barcode and getattr(barcode, name)
            for name in ("patient_id", "site", "sample_type", "label")
            if name not in taken
        }
        named.append(replace(slide, columns={**slide.columns, **found}))
    return named, unnamed

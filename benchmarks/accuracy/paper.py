# SPDX-License-Identifier: MIT
"""The paper's accuracy of FlashVID: arXiv 2602.08024v1 (ICLR 2026), Tables 1, 2, 3, 7, 8, 9 and 14.

Its FlashVID rows keep 1.25 times the ratio before the LLM and prune inside it so that the mean over the layers is the
ratio. This plugin compresses before the LLM alone; the paper has one such row (Table 14, f_e = 1). Models are the 7B
ones, and the frames of Qwen2.5-VL's tables those of the paper's own scripts.
"""

import re
from dataclasses import dataclass

FAMILIES = {
    "LLaVA-OneVision": r"llava[-_]?onevision.*7b",
    "LLaVA-Video": r"llava[-_]?video.*7b",
    "Qwen2.5-VL": r"qwen2[._]5[-_]vl.*7b",
}
BENCHMARKS = ("videomme", "egoschema", "longvideobench", "mvbench", "mlvu")


@dataclass(frozen=True)
class Row:
    """Accuracy in per cent of one model at one ratio, in the order of BENCHMARKS; None where the paper has none.

    EgoSchema is its subset of 500.
    """

    family: str
    frames: int
    ratio: float | None
    scores: tuple[float | None, ...]
    table: str

    def of(self, benchmark: str) -> float | None:
        """The score on `benchmark`."""
        return dict(zip(BENCHMARKS, self.scores, strict=True)).get(benchmark)


OV, VIDEO, QWEN = FAMILIES
ROWS = (
    Row(OV, 32, None, (58.5, 62.2, 56.6, 58.3, None), "Table 1"),
    Row(OV, 32, 0.25, (59.2, 63.4, 56.8, 58.0, None), "Table 1"),
    Row(OV, 32, 0.2, (58.2, 63.0, 58.5, 58.2, None), "Table 1"),
    Row(OV, 32, 0.15, (58.2, 62.8, 57.5, 57.9, None), "Table 1"),
    Row(OV, 32, 0.1, (57.8, 62.4, 56.5, 57.4, None), "Table 1"),
    Row(OV, 32, 0.1, (56.5, None, 55.1, 56.5, None), "Table 14, before the LLM alone"),
    Row(VIDEO, 64, None, (64.2, 59.4, 59.5, 61.9, None), "Table 1"),
    Row(VIDEO, 64, 0.25, (62.4, 59.2, 59.1, 60.2, None), "Table 9"),
    Row(VIDEO, 64, 0.2, (62.2, 58.4, 58.7, 59.8, None), "Table 1"),
    Row(VIDEO, 64, 0.15, (61.8, 57.8, 58.3, 60.4, None), "Table 9"),
    Row(VIDEO, 64, 0.1, (60.9, 57.2, 57.7, 59.3, None), "Table 1"),
    Row(QWEN, 32, None, (61.3, 60.2, 58.9, 68.0, None), "Table 2"),
    Row(QWEN, 32, 0.25, (59.6, 59.4, 58.1, 67.1, None), "Table 7"),
    Row(QWEN, 32, 0.2, (59.6, 59.2, 58.1, 66.5, None), "Table 2"),
    Row(QWEN, 32, 0.15, (58.7, 57.6, 56.8, 66.6, None), "Table 7"),
    Row(QWEN, 32, 0.1, (57.3, 57.4, 57.1, 65.5, None), "Table 2"),
    Row(QWEN, 16, None, (57.0, 58.2, 56.9, None, 40.6), "Table 3"),
    Row(QWEN, 64, 0.25, (60.9, 60.2, 58.4, None, 45.0), "Table 8"),
    Row(QWEN, 80, 0.2, (62.4, 61.4, 58.9, None, 45.0), "Table 3"),
    Row(QWEN, 160, 0.1, (62.4, 61.2, 58.9, None, 47.5), "Table 3"),
)


def family_of(model: str) -> str | None:
    """The paper's name of a model, from its name on a hub or its directory's; None if it is not in the paper."""
    found = [name for name, pattern in FAMILIES.items() if re.search(pattern, model, re.IGNORECASE)]
    return found[0] if found else None


def rows_for(model: str, benchmark: str, ratio: float | None) -> list[Row]:
    """The paper's rows with a score of this model, benchmark and ratio (None: plain); there may be several."""
    family = family_of(model)
    return [row for row in ROWS if row.family == family and row.ratio == ratio and row.of(benchmark) is not None]

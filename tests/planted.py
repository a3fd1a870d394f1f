# SPDX-License-Identifier: MIT
"""Planted faults: what shows that the tests, nearly always those of `make test`, still catch each kind of them.

python -m tests.planted [WORD ...]    those whose file or change has one of the words; all of them take half an hour

Each fault is one change of a copy of this tree; the tests named beside it must fail there. Run it when tests are made
fewer or faster. It is no test itself: a fault that has outlived the line that it changes is an error here, not in CI.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARTS = ("flashvid_vllm", "kernels", "tests", "benchmarks", "pyproject.toml", "setup.py", "README.md", "docs")


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in ``file``, and ``tests`` (files somewhere in tests/, without test_) must fail; where it
    takes what is ``longer``, in `make test-full`."""

    file: str
    old: str
    new: str
    tests: str
    longer: bool = False


PLUGIN, OPS = "flashvid_vllm/", "kernels/ops/"
FAULTS = [
    # how many tokens, and which
    Fault(PLUGIN + "core/budget.py", "math.floor(wanted)", "math.ceil(wanted)", "budget"),
    Fault(PLUGIN + "core/budget.py", "math.floor(left * tokens)", "math.ceil(left * tokens)", "budget"),
    Fault(OPS + "reference.py", "FLAT_DISTANCE = 1e-5", "FLAT_DISTANCE = 0.0", "golden reference"),
    Fault(OPS + "reference.py", "(similarity <= threshold)", "(similarity < threshold)", "reference"),
    Fault(OPS + "reference.py", "delta.log() - sparsity", "delta - sparsity", "golden"),
    Fault(OPS + "reference.py", "received / (heads * n)", "received / n", "golden"),
    Fault(OPS + "explain.py", "(news <= to_kept) & ~kept", "(news < to_kept) & ~kept", "methods_oracle"),
    Fault(PLUGIN + "models/rope.py", "return not FAMILIES[architecture].consecutive or", "return True or", "families"),
    Fault(OPS + "select.py", "tl.where(step == 1, to_choice,", "tl.where(step == 1, near,", "triton"),
    *(
        Fault(
            OPS + file,
            f"take_better({value}, {at}, {best}, {best_at})",
            f"tl.maximum({value}, {best}), tl.where({value} >= {best}, {at}, {best_at})",
            "triton",
        )
        for file, value, at, best, best_at in (
            ("select.py", "score", "at", "best", "best_at"),
            ("match.py", "tile_best", "first + tile_index", "best", "best_index"),
            ("farthest.py", "own", "at", "most", "most_at"),
        )
    ),
    Fault(OPS + "peaks.py", "few = tl.minimum(neighbours, num_tokens)", "few = neighbours", "triton"),
    # the encoder: attention, pieces
    Fault(
        PLUGIN + "models/families/mrope_encoder.py",
        "spatial_merge_unit)).mean(1)",
        "spatial_merge_unit)).amax(1)",
        "families",
    ),
    Fault(
        PLUGIN + "models/families/llava.py",
        "scores[:, -self.patches_per_frame() :, None]",
        "scores[:, : self.patches_per_frame(), None]",
        "tinyvlm_served reuse_towers",
    ),
    Fault(
        PLUGIN + "models/attention.py",
        "bits = scores.to(torch.float32)",
        "bits = scores.bfloat16().to(torch.float32)",
        "families engine_oracle",
    ),
    Fault(PLUGIN + "models/pieces.py", "range(0, num_frames, most)", "range(0, num_frames, num_frames)", "pieces"),
    Fault(PLUGIN + "models/pieces.py", "into[start * per_frame : stop * per_frame]", "into[: len(rows)]", "pieces"),
    # which tokens are dropped inside the LLM, and where the others lie
    Fault(PLUGIN + "models/inner/rank.py", "sort(descending=True, stable=True)", "sort(stable=True)", "inner_plan"),
    Fault(PLUGIN + "models/inner/rank.py", "    attention[-1] = float", "    attention[0] = float", "inner_plan"),
    Fault(PLUGIN + "models/inner/plan.py", "waiting < prompt.length", "waiting < scheduled", "inner_plan"),
    Fault(PLUGIN + "models/inner/metadata.py", "place % block_size", "(place + 1) % block_size", "inner_plan"),
    Fault(
        PLUGIN + "serving/inner_v1.py",
        "skip_reading_prefix_cache = True",
        "skip_reading_prefix_cache = False",
        "inner_start",
    ),
    # which patches the encoder computes
    Fault(OPS + "reuse.py", "near.sum(-1, keepdims=True) // places", "0 * near[..., :1]", "reuse"),
    Fault(OPS + "reuse.py", "num_rows // 2)", "num_rows)", "reuse"),
    Fault(PLUGIN + "core/budget.py", "max(rows_per_frame * num_blocks,", "max(rows_per_frame,", "choice"),
    Fault(PLUGIN + "core/choice.py", "key=lambda t: (-change[t], t)", "key=lambda t: t", "choice"),
    Fault(PLUGIN + "models/encode_less.py", "[reuse.rows]", "[: len(reuse.rows)]", "encode_less"),
    Fault(PLUGIN + "core/levels.py", ".add_(pool * pool // 2)", "", "encode_less"),
    Fault(PLUGIN + "models/processor.py", "name_of_pixels(name, config, piece) for", "name for", "encode_less"),
    Fault(PLUGIN + "models/processor.py", "most, self.info.flashvid_shares)", "num_frames, 1)", "encode_less"),
    # rows that others stand for
    Fault(
        PLUGIN + "models/reuse.py", "source[start:stop], per_unit", "source[start:stop] * 0, per_unit", "reuse_towers"
    ),
    Fault(
        PLUGIN + "models/families/mrope_rows.py",
        "metadata[name] = gather(metadata[name], rows,",
        "metadata[name] = gather(metadata[name], rows.roll(1),",
        "reuse_towers",
        longer=True,
    ),
    Fault(
        PLUGIN + "models/families/mrope_rows.py",
        "Reuse(slots, reverse_indices[reuse.source[unit_at]])",
        "Reuse(slots, reuse.source[unit_at])",
        "reuse_towers",
    ),
    Fault(
        PLUGIN + "models/families/llava_rows.py",
        "place[:num_frames, None]",
        "place[:1, None].expand(num_frames, 1)",
        "reuse_towers",
    ),  # every frame sees the first one's class token
    Fault(
        PLUGIN + "models/reuse.py", "[cu_seqlens // per_unit] * per_unit", "[cu_seqlens // per_unit]", "reuse_towers"
    ),
    Fault(PLUGIN + "models/measure.py", 'yield from ("tokens", "frames")', 'yield "frames"', "pieces"),
    # positions
    Fault(PLUGIN + "models/positions.py", "mark[2] = -1 - torch", "mark[2] = -2 - torch", "positions"),
    Fault(
        PLUGIN + "models/positions.py",
        "place = waiting.cumsum(0) - 1",
        "place = waiting.cumsum(0) - 2",
        "positions",
    ),
    Fault(
        PLUGIN + "models/positions.py", "int(full.max()) + 1 - positions", "int(full.max()) - positions", "positions"
    ),
    Fault(
        PLUGIN + "models/full_positions.py",
        'getattr(mrope_positions, "flashvid_marks", mrope_positions)',
        "mrope_positions",
        "positions_and_ids",
    ),
    Fault(
        PLUGIN + "models/families/llava.py",
        "kept = video.source_index + newlines",
        "kept = video.source_index",
        "llava_places",
    ),
    # what a client may send
    Fault(PLUGIN + "models/processor.py", "if tokens > limit and", "if tokens > 2**40 and", "pieces requests"),
    Fault(
        PLUGIN + "models/processor.py",
        "self.check_prompt(updates, _request.get())",
        "pass",
        "processor_cache odd_prompts",
    ),
    Fault(PLUGIN + "models/processor_cache.py", "sha256(settings)", "sha256(bytes())", "processor_cache"),
    Fault(
        PLUGIN + "models/processor.py",
        "row.numpy().tobytes() + original *",
        "row.numpy().tobytes() + 0 *",
        "kv_transfer processor_cache",
    ),
    Fault(
        PLUGIN + "serving/encoder_cache.py",
        "return int(feature.data[FULL_EMBEDS].data)",
        "return request.get_num_encoder_embeds(input_id)",
        "encoder_cache",
    ),
    Fault(
        PLUGIN + "models/separators.py",
        "torch.where((ids > 0)[:, None], embed((ids - 1).clamp(min=0)), embeds)",
        "embeds",
        "lora",
    ),
    Fault(
        PLUGIN + "core/settings.py", "if isinstance(settings, Mapping) and name in settings:", "if False:", "settings"
    ),
    # what Model Runner V2 alone calls for
    Fault(
        PLUGIN + "models/families/llava.py",
        "if not self.flashvid_configs:",
        "if not any(self.flashvid_configs):",
        "runner_v2",
    ),
    Fault(
        PLUGIN + "models/families/mrope.py",
        "places[video.source_index]]).sort()",
        "places[video.source_index.tolist()]]).sort()",
        "waits",
    ),
    # the server
    Fault(PLUGIN + "serving/config_file.py", "            if not value:\n", "            if False:\n", "config_file"),
    Fault(PLUGIN + "serving/metrics.py", "    fcntl.flock(held, fcntl.LOCK_EX)\n", "", "metrics"),
    Fault(PLUGIN + "serving/metrics.py", "    _reserve([", "    list([", "metrics"),
    Fault(PLUGIN + "serving/cpu.py", "    if not wanted or (any", "    if True or (any", "cpu"),
    Fault(
        PLUGIN + "tools/viz/video.py",
        "        index += 1\n",
        "        index += 1 if index not in wanted or index in pictures else 0\n",
        "viz",
    ),
]


def plant(fault: Fault, tree: Path) -> None:
    """Make the change in ``tree``."""
    path = tree / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.file} has {fault.old!r} {text.count(fault.old)} times: mend tests/planted.py")
    path.write_text(text.replace(fault.old, fault.new))


def copy_tree(into: Path) -> None:
    """What tests need, so that nothing is imported from here: an editable install knows this tree, a path is first."""
    for part in PARTS:
        source = ROOT / part
        ignore = shutil.ignore_patterns("__pycache__", "results", "weights")
        if source.is_dir():
            shutil.copytree(source, into / part, ignore=ignore)
        else:
            shutil.copy(source, into / part)
    (into / "flashvid_vllm" / "ops").symlink_to("../kernels/ops")


def files_of(fault: Fault, tree: Path) -> list[Path]:
    """The files that must fail."""
    return [path for name in fault.tests.split() for path in (tree / "tests").rglob(f"test_{name}.py")]


def main(words: list[str]) -> int:
    """Plant the faults; 1 if one was not caught."""
    missed = 0
    for fault in FAULTS:
        if words and not any(word in fault.file + fault.old for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder)
            copy_tree(tree)
            plant(fault, tree)
            start = time.monotonic()
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not gpu", "-p", "no:cacheprovider"]
            env = {**os.environ, "FLASHVID_TESTS": "full" if fault.longer else "quick", "PYTHONPATH": folder}
            files = [str(path) for path in files_of(fault, tree)]
            done = subprocess.run([*command, *files], cwd=tree, env=env, capture_output=True, text=True)
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        caught = done.returncode == 1 and bool(failed)
        missed += not caught
        by = failed[0].partition(" - ")[0] if caught else done.stdout[-300:]
        say = "caught" if caught else "MISSED"
        print(
            f"{say}  {time.monotonic() - start:4.0f} s  {fault.file}: {fault.old.strip()[:50]}\n        {by}",
            flush=True,
        )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

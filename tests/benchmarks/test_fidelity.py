# SPDX-License-Identifier: MIT
"""benchmarks.fidelity: its measures against brute force on tiny inputs, and the CLIP tower against ONNX Runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.common import clip_model
from benchmarks.common.clip_model import Encoded
from benchmarks.fidelity import measures
from benchmarks.fidelity.__main__ import METHODS, Cells, summarise, write_json
from benchmarks.fidelity.clips import FRAMES, SCENES
from benchmarks.fidelity.measures import VIEWS, Tokens
from benchmarks.fidelity.report import LINKING, table, write_markdown, write_plot
from flashvid_vllm import CompressedVideo, FlashVidConfig, compress

T, N, D = 3, 4, 16


@pytest.fixture(scope="module")
def model() -> Any:
    """A CLIP tower of four tiny layers with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=8,
        initializer_factor=4.0,  # the default is so small that attention hardly moves the class token
    )
    return CLIPVisionModelWithProjection(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(T, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def encoded(model: Any, pixels: Tensor) -> Encoded:
    return clip_model.encode(model, pixels, depth=2, batch=2)


def test_received_attention_is_transformers(model: Any, pixels: Tensor, encoded: Encoded) -> None:
    model.set_attn_implementation("eager")
    output = model(pixel_values=pixels, output_attentions=True, output_hidden_states=True)
    assert torch.allclose(encoded.attention, output.attentions[1].mean((1, 2))[:, 1:], atol=1e-6)
    assert torch.allclose(encoded.features, output.hidden_states[2][:, 1:], atol=1e-5)
    assert torch.allclose(encoded.class_token, output.hidden_states[2][:, 0], atol=1e-5)


def test_all_tokens_give_the_full_run(model: Any, pixels: Tensor, encoded: Encoded) -> None:
    full = measures.views(model, measures.whole(encoded), encoded.class_token, depth=2)
    expected = model(pixel_values=pixels).image_embeds
    assert torch.allclose(full.frame, expected, atol=1e-5)  # fp32 in another order of summation
    video = compress(encoded.features, encoded.attention, FlashVidConfig(retention_ratio=1.0))
    found = measures.fidelity(measures.views(model, video, encoded.class_token, depth=2), full)
    assert found == pytest.approx(dict.fromkeys(VIEWS, 1.0), abs=1e-6)


def test_a_token_of_size_k_counts_as_k_copies(model: Any, encoded: Encoded) -> None:
    x = encoded.features[:1]
    size = torch.tensor([[1.0, 3.0, 2.0, 5.0]])
    copies = x.repeat_interleave(size[0].long(), dim=1)
    merged = measures.embed(model, Tokens(x, size), encoded.class_token[:1], 1, depth=2)
    spelt_out = measures.embed(model, Tokens(copies, torch.ones(1, 11)), encoded.class_token[:1], 1, depth=2)
    assert torch.allclose(merged, spelt_out, atol=1e-5)
    ignored = measures.embed(model, Tokens(x, torch.ones(1, 4)), encoded.class_token[:1], 1, depth=2)
    assert not torch.allclose(merged, ignored, atol=1e-2)


def test_the_class_token_counts_as_often_as_asked(model: Any, encoded: Encoded) -> None:
    """A clip of T equal frames, all in one group, is one frame: the mean class token counts T times."""
    x, class_token = encoded.features[:1], encoded.class_token[:1]
    frame = measures.embed(model, Tokens(x, torch.ones(1, N)), class_token, 1, depth=2)
    clip = measures.embed(model, Tokens(x.repeat(1, T, 1), torch.ones(1, T * N)), class_token, T, depth=2)
    assert torch.allclose(frame, clip, atol=1e-5)


def test_padding_is_not_attended_to(model: Any, encoded: Encoded) -> None:
    frame = torch.tensor([0, 2, 2, 2])
    x, size = encoded.features.flatten(0, 1)[:4], torch.tensor([2.0, 1.0, 4.0, 1.0])
    together = measures.embed(model, measures.by_frame(x, size, frame, T), encoded.class_token, 1, depth=2)
    for t in range(T):
        mine = frame == t
        alone = measures.embed(
            model, Tokens(x[mine][None], size[mine][None]), encoded.class_token[t : t + 1], 1, depth=2
        )
        assert torch.allclose(together[t], alone[0], atol=1e-5)


def video_of(encoded: Encoded, assignment: list[list[int]], source: list[int]) -> CompressedVideo:
    """A video whose tokens are the means of what ``assignment`` gives them."""
    to = torch.tensor(assignment)
    tokens = torch.stack([encoded.features[to == row].mean(0) for row in range(len(source))])
    size = torch.stack([(to == row).sum() for row in range(len(source))])
    return CompressedVideo(tokens, torch.tensor(source), size, to)


def test_tokens_by_assignment(encoded: Encoded) -> None:
    video = video_of(encoded, [[0, 1, 1, -1], [0, 0, 2, 1], [-1, -1, -1, 2]], [0, 1, 6])
    groups = measures.by_assignment(video)
    assert groups.size.tolist() == [[1, 2, 0], [2, 1, 1], [1, 0, 0]]
    assert torch.equal(groups.x[1], video.tokens)
    assert torch.equal(groups.x[2, 0], video.tokens[2])


def test_views_of_what_is_not_merged_through_time_are_one(model: Any, encoded: Encoded) -> None:
    video = video_of(encoded, [[0, 0, 1, -1], [2, 2, 2, -1], [-1, 3, 3, 3]], [0, 2, 4, 9])
    found = measures.views(model, video, encoded.class_token, depth=2)
    again = measures.embed(model, measures.by_assignment(video), encoded.class_token, 1, depth=2)
    assert torch.equal(found.frame, found.frame_assigned)
    assert torch.allclose(found.frame_assigned, again, atol=1e-6)
    through_time = video_of(encoded, [[0, 0, 1, -1], [0, 2, 2, -1], [-1, 3, 3, 3]], [0, 2, 5, 9])
    found = measures.views(model, through_time, encoded.class_token, depth=2)
    assert not torch.allclose(found.frame, found.frame_assigned, atol=1e-4)


def test_nothing_kept_leaves_the_class_tokens(model: Any, encoded: Encoded) -> None:
    found = measures.views(model, measures.nothing(encoded), encoded.class_token, depth=2)
    hidden = encoded.class_token[:, None]
    for layer in model.vision_model.encoder.layers[2:]:
        hidden = clip_model.run_layer(layer, hidden)
    assert torch.allclose(found.frame, measures.project(model, hidden[:, 0]), atol=1e-5)


def test_density_by_brute_force(encoded: Encoded) -> None:
    video = video_of(encoded, [[0, 1, 1, -1], [0, 0, 2, 1], [-1, -1, -1, 2]], [0, 1, 6])
    mean = encoded.features.reshape(-1, D).mean(0)
    values = []
    for x, row in zip(encoded.features.reshape(-1, D), video.assignment.flatten().tolist(), strict=True):
        to_each = [float(torch.cosine_similarity(x - mean, y - mean, dim=0)) for y in video.tokens]
        values.append(to_each[row] if row >= 0 else max(to_each))
    found = measures.density(encoded.features, video)
    assert found == pytest.approx((sum(values) / len(values), min(values)), abs=1e-5)


@pytest.mark.parametrize("matching", ["tree", "position"])
def test_linking_by_brute_force(matching: str) -> None:
    x = torch.randn(5, 6, D, generator=torch.Generator().manual_seed(2))
    x[1:] = 0.8 * x[:-1] + 0.4 * x[1:]
    threshold, parents, to_parent = 0.7, {}, []
    for t in range(1, 5):
        for i in range(6):
            to = torch.cosine_similarity(x[t, i], x[t - 1], dim=-1)
            j = int(to.argmax()) if matching == "tree" else i
            if to[j] > threshold:
                parents[t * 6 + i] = (t - 1) * 6 + j
                to_parent.append(float(to[j]))
    trees: dict[int, list[int]] = {}
    for i in range(30):
        root = i
        while root in parents:
            root = parents[root]
        trees.setdefault(root, []).append(i)
    flat = x.reshape(-1, D)
    to_tree = [
        float(torch.cosine_similarity(flat[i], flat[members].mean(0), dim=0))
        for members in trees.values()
        for i in members
        if i in parents
    ]
    found = measures.linking(x, matching, threshold, segment_threshold=-1.0, segments=1)
    expected = [len(parents) / 30, np.mean(to_parent), np.mean(to_tree)]
    assert 0 < found[0] < 1
    assert found == pytest.approx(expected, abs=1e-5)


def test_only_the_strongest_links() -> None:
    x = torch.randn(4, 5, D, generator=torch.Generator().manual_seed(5)) + 1
    similarity = [torch.cosine_similarity(x[t], x[t - 1], dim=-1) for t in range(1, 4)]
    strongest = torch.cat(similarity).sort(descending=True).values[:6]
    found = measures.linking(x, "position", -1.0, segment_threshold=-1.0, segments=1, most=6 / 20)
    assert found[:2] == pytest.approx([6 / 20, float(strongest.mean())], abs=1e-5)


def test_bootstrap() -> None:
    values = np.random.default_rng(3).normal(5, 2, 400).tolist()
    mean, low, high = measures.bootstrap(values)
    half = 1.96 * np.std(values) / 20  # the interval of the mean of many values
    assert mean == pytest.approx(np.mean(values))
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.02)
    assert measures.bootstrap(values) == (mean, low, high)  # seeded
    assert measures.bootstrap([0.3] * 5) == pytest.approx((0.3, 0.3, 0.3))


def made_up_cells(clips: tuple[str, ...]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(4)
    cells = []
    for clip in clips:
        for method, ratio in [("no tokens", 0.0), *((method, ratio) for method in METHODS for ratio in (0.25, 0.1))]:
            names = (*VIEWS, "density", "density_worst", "seconds")
            values = dict(zip(names, rng.random(len(names)).tolist(), strict=True))
            cells.append({"video": clip, "method": method, "ratio": ratio, **values})
    return cells


def test_paired_differences_and_report(tmp_path: Path) -> None:
    clips = ("speaker", "street", "taxi")
    cells = made_up_cells(clips)
    summary = summarise(cells, clips, (0.25, 0.1))
    row = next(row for row in summary if row["method"] == "evs" and row["ratio"] == 0.1)
    at = {(cell["video"], cell["method"], cell["ratio"]): cell["clip"] for cell in cells}
    differences = [at[clip, "evs", 0.1] - at[clip, "flashvid", 0.1] for clip in clips]
    assert row["clip-flashvid"][0] == pytest.approx(np.mean(differences))
    assert row["clip>flashvid"] == sum(difference > 0 for difference in differences)

    names = ("merged", "to_parent", "to_tree")
    linking: dict[str, tuple[float, ...]] = {
        f"{how}_{name}": (0.1, 0.0, 0.2) for how in ("tstm", "ttm", "difference") for name in names
    }
    linking |= {f"higher_{name}": (2, 3) for name in names}
    results = {
        "machine": {"cores": 2},
        "settings": {"frames": 16, "tokens": 196, "layers_before": 10, "layers_after": 2},
        "clips": {clip: {"kind": SCENES[clip].kind, "about": SCENES[clip].about} for clip in clips},
        "summary": summary,
        "linking": [{"threshold": 0.8, "kind": kind, **linking} for kind in LINKING],
        "cells": cells,
    }
    write_json(results, tmp_path / "fidelity.json")
    write_markdown(results, tmp_path / "fidelity.md")
    write_plot_or_skip(results, tmp_path / "fidelity.png")
    text = (tmp_path / "fidelity.md").read_text()
    assert all(f"| {method} |" in text for method in METHODS)
    assert table(results, 0.1).row_count == len(METHODS) + 1


def write_plot_or_skip(results: dict[str, Any], path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_plot(results, path)
    assert path.stat().st_size > 10_000


def test_results_are_kept_and_a_cut_line_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    cells = Cells(path)
    todo = cells.missing("taxi", (0.1,))
    assert len(todo) == len(METHODS) + 1
    for method, ratio in todo[:3]:
        cells.add({"video": "taxi", "method": method, "ratio": ratio, "clip": 0.5})
    path.write_text(path.read_text()[:-10])
    assert Cells(path).missing("taxi", (0.1,)) == todo[2:]
    assert len(Cells(path).cells) == 2


def test_every_kind_of_clip_is_there() -> None:
    assert {scene.kind for scene in SCENES.values()} == {"static camera", "camera motion", "cuts", "montage"}
    assert all(FRAMES % len(scene.shots) == 0 for scene in SCENES.values())


def without_quantised_activations(path: Path) -> bytes:
    """The package's graph with its weights dequantised by ONNX's own operator and its activations left in fp32."""
    onnx = pytest.importorskip("onnx")
    graph = (whole := onnx.load(path)).graph
    producer = {name: node for node in graph.node for name in node.output}
    consumer = {name: node for node in graph.node for name in node.input}
    nodes, gone = [], set()
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            scaled = consumer[consumer[node.output[0]].output[0]]  # MatMulInteger, Cast, Mul
            gone |= {*scaled.input, *scaled.output}
            weight = node.input[1]
            inputs = [weight, weight.replace("_quantized", "_scale"), node.input[3]]
            nodes.append(onnx.helper.make_node("DequantizeLinear", inputs, [f"{weight}_float"], axis=1))
            activation = producer[node.input[0]].input[0]
            nodes.append(onnx.helper.make_node("MatMul", [activation, f"{weight}_float"], [scaled.output[0]]))
        elif node.op_type != "DynamicQuantizeLinear":
            nodes.append(node)
    new = ("MatMul", "DequantizeLinear")
    nodes = [node for node in nodes if node.op_type in new or not gone & set(node.output)]
    del graph.node[:]
    graph.node.extend(nodes)
    return bytes(whole.SerializeToString())


def with_unsigned_weights(path: Path) -> bytes:
    """The package's graph with 128 added to its weights of 8 bits and to their zero points, which changes no product.

    Where a CPU has no VNNI, ONNX Runtime adds two products of u8 and s8 in 16 bits, and they saturate; those of u8 and
    u8 do not.
    """
    onnx = pytest.importorskip("onnx")
    graph = (whole := onnx.load(path)).graph
    signed = {name for node in graph.node if node.op_type == "MatMulInteger" for name in (node.input[1], node.input[3])}
    for tensor in graph.initializer:
        if tensor.name in signed:
            values = onnx.numpy_helper.to_array(tensor)
            assert values.dtype == np.int8
            tensor.CopyFrom(onnx.numpy_helper.from_array((values.astype(np.int16) + 128).astype(np.uint8), tensor.name))
    return bytes(whole.SerializeToString())


@pytest.mark.slow
@pytest.mark.longer("half a minute of ONNX Runtime")
def test_clip_is_the_packages() -> None:
    """The converted tower against ONNX Runtime, on frames of real clips.

    With fp32 activations the two differ by rounding alone. The graph as it is shipped rounds every activation to one
    of 256 levels of its tensor's range, which CLIP's few huge channels stretch: 0.93 to 0.98 was found, as CPUs round.
    """
    runtime = pytest.importorskip("onnxruntime")
    from benchmarks.common.clip_model import preprocess
    from benchmarks.fidelity.clips import CAR, RABBIT, SPEAKER, take

    try:
        frames = torch.cat([preprocess(take(shot, 1)) for shot in (CAR, RABBIT, SPEAKER)])
        path, model = clip_model.onnx_file(), clip_model.load()
    except RuntimeError as error:
        pytest.skip(f"no package registry: {error}")
    ours = model(pixel_values=frames).image_embeds.numpy()

    options = runtime.SessionOptions()
    # its fused MatMul with a dequantised weight quantises the activations again
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 2
    for graph, check in (
        (without_quantised_activations(path), lambda found: np.testing.assert_allclose(found, ours, atol=1e-4)),
        (with_unsigned_weights(path), lambda found: np.testing.assert_array_less(0.9, cosine(found, ours))),
    ):
        session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        check(session.run(["image_embeds"], {"pixel_values": frames.numpy()})[0])


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """By row."""
    return np.asarray((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))

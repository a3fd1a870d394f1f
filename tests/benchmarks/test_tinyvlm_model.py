# SPDX-License-Identifier: MIT
"""benchmarks.tinyvlm's model: transformers sees what training sees, and what compression does to its tokens."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("cv2")
pytest.importorskip("transformers")

from benchmarks.tinyvlm import batches, data, tokens, tower, wide
from benchmarks.tinyvlm.answers import MOST_TOKENS, Encoded, greedy, kept, right
from benchmarks.tinyvlm.features import encode
from benchmarks.tinyvlm.grid import Cell
from benchmarks.tinyvlm.model import Size, TinyVlm, build, load_weights, pool, save_weights
from benchmarks.tinyvlm.scenes import render
from benchmarks.tinyvlm.variants import changed, variants
from flashvid_vllm import FlashVidConfig, compress

from .tinyvlm import model_of, noise, sharp_model, small_tower, torch_logits


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    """A video's tokens as a sharp small model gets them."""
    features, attention = encode(small_tower(), noise(6), True)
    model = sharp_model(features)
    with torch.no_grad():
        return Encoded(model.video_tokens(features), pool(attention))


def test_ratio_one_is_the_whole_video(encoded: Encoded) -> None:
    assert torch.equal(kept(encoded, FlashVidConfig(retention_ratio=1)), kept(encoded, None))
    assert len(kept(encoded, FlashVidConfig(retention_ratio=0.25))) == 6 * 49 // 4


def test_positions_of_the_whole_video_are_those_of_all_its_tokens(encoded: Encoded) -> None:
    """With every token at its place nothing changes; a token moved elsewhere changes the answer's states."""
    model = model_of()
    rows = encoded.tokens.flatten(0, 1)
    batch = batches.collate([batches.Sample(0, [], data.questions("test", 0))], video=len(rows))
    plain = batches.question_states(model, batch, rows[None])
    place = torch.arange(len(rows))
    assert torch.equal(batches.question_states(model, batch, rows[None], place), plain)
    few = torch.arange(0, len(rows), 5)
    spread = batches.question_states(model, batch, rows[None, few], few)
    close = batches.collate([batches.Sample(0, [], data.questions("test", 0))], video=len(few))
    assert not torch.allclose(spread, batches.question_states(model, close, rows[None, few]), atol=1e-4)
    cell = next(cell for cell in variants() if cell.spread)
    kept_rows, index = cell.tokens(encoded)
    assert index is not None
    assert cell.config is not None
    assert torch.equal(kept_rows, kept(encoded, cell.config))
    assert torch.equal(index, compress(encoded.tokens, encoded.attention, cell.config).source_index)


@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.1])
def test_variant_without_a_change_is_flashvid(encoded: Encoded, ratio: float) -> None:
    config = FlashVidConfig(retention_ratio=ratio, min_segments=3, segment_threshold=0.5)
    assert torch.equal(changed(encoded, config), kept(encoded, config))


def test_variants_keep_at_most_as_many_tokens_and_differ(encoded: Encoded) -> None:
    """In one segment with fewer clusters than frames, so that each change has something to change."""
    config = FlashVidConfig(retention_ratio=0.06, min_segments=1, segment_threshold=-1.0)
    published = kept(encoded, config)
    for rows in (changed(encoded, config, by=by) for by in ("segment", "nearest")):
        assert rows.shape == published.shape
        assert not torch.equal(rows, published)
    still = Encoded(encoded.tokens[[0, 0, 0, 1, 1, 1]], encoded.attention)
    assert not torch.equal(changed(still, config, uneven=1.0), kept(still, config))
    assert len(changed(still, config, uneven=1.0)) <= len(published)
    assert len({cell.key for cell in variants()}) == len(variants())


@pytest.mark.parametrize("spread", [False, True])
def test_questions_packed_answer_as_each_alone(encoded: Encoded, spread: bool) -> None:
    """In one sequence a question sees the video and itself, at its own positions: what training relies on."""
    model, setting = model_of(), Cell("40 %", 0.4, FlashVidConfig(retention_ratio=0.4), spread=spread)
    rows, place = setting.tokens(encoded)
    at = (place, len(encoded.tokens.flatten(0, 1)))
    questions = [q for number in range(4) for q in data.questions("test", number)]
    # the word that is said most often behind another becomes the end, so that some answers end
    often = Counter(word for q in questions for word in greedy(model, rows, q, *at).split()[1:]).most_common(1)[0][0]
    head = model.language_model.lm_head.weight
    head[tokens.encode(tokens.END)] = 1.05 * head[tokens.encode(often)]
    said = [greedy(model, rows, question, *at) for question in questions]
    assert len(set(said)) > 2  # the answers depend on the question
    # asked for the answers that it gives, it is right; for others it is not
    possible = [(q, s) for q, s in zip(questions, said, strict=True) if 0 < len(s.split()) < MOST_TOKENS]
    assert len(possible) > 3
    assert right(model, rows, [replace(q, answer=s) for q, s in possible], *at) == [True] * len(possible)
    wrong = [replace(q, answer=next(c for c in q.choices if c != s)) for q, s in possible]
    assert right(model, rows, wrong, *at) == [False] * len(possible)


def test_transformers_gives_the_same_logits(tmp_path: Path) -> None:
    """The directory, loaded by transformers with its own processor, against the torch path of training."""
    from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

    frames, tower = noise(6), small_tower()
    model = model_of()
    directory = build(model, tmp_path / "model", tower=tower)
    processor = AutoProcessor.from_pretrained(directory)
    whole = LlavaOnevisionForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    question = data.questions("test", 0)[0]
    inputs = processor(
        text=tokens.serving_prompt(question), videos=[frames], do_sample_frames=False, return_tensors="pt"
    )
    asked_ids = tokens.question_ids(question)[0]
    assert inputs.input_ids[0, -len(asked_ids) :].tolist() == asked_ids
    with torch.no_grad():
        theirs = whole(**inputs).logits[0, -len(asked_ids) :]
    with torch.no_grad():
        rows = model.video_tokens(encode(tower, frames, False)[0]).flatten(0, 1)
    ours = torch_logits(model, rows, question)
    assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()
    message = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question.prompt()}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    assert processor.tokenizer(text).input_ids == processor.tokenizer(tokens.serving_prompt(question)).input_ids


def test_weights_come_back_as_saved(tmp_path: Path) -> None:
    model = model_of()
    save_weights(model, tmp_path / "weights.safetensors", torch.float32)
    loaded = load_weights(tmp_path / "weights.safetensors")
    assert loaded.size == Size(64, 2, 2, 128)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    with pytest.raises(FileNotFoundError, match="tinyvlm train"):
        load_weights(tmp_path / "none.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="new or empty"):
        build(model, tmp_path / "full")


def test_the_second_models_tower_tells_how_much_attention_each_token_receives() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = tower.Tower().eval().requires_grad_(False)
    frames = noise(6)
    features, received = tower.encode(network, frames, True)
    assert features.shape == (6, 49, tower.WIDTH)
    assert_close(received.sum(1), torch.ones(6))  # every token gives 1 away, on the mean over all tokens
    one, alone = tower.encode(network, frames[3:4], True)
    assert_close(one[0], features[3], rtol=1e-4, atol=1e-4)
    assert_close(alone[0], received[3], rtol=1e-4, atol=1e-6)
    moved = tower.encode(network, frames[3:4, ::-1].copy(), False)
    assert len(moved) == 1
    assert not torch.allclose(moved[0][0], one[0], atol=1e-2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyVlm(Size(64, 2, 2, 128, tower.WIDTH)).requires_grad_(False)
    assert model.video_tokens(features).shape == (6, 49, 64)  # 49 tokens already: not pooled again


@pytest.mark.longer("a video LLM; nothing in make test reads its weights")
def test_the_second_models_committed_weights_answer_what_they_were_trained_for() -> None:
    """Of videos that neither was trained on; chance is a quarter."""
    model, network = load_weights(wide.WEIGHTS), tower.load()
    answers: list[bool] = []
    for number in range(12):
        features = tower.encode(network, render(data.video("wide-validation", number)), False)[0]
        rows = model.video_tokens(features).flatten(0, 1)
        answers += right(model, rows, data.questions("wide-validation", number))
    assert sum(answers) / len(answers) > 0.75

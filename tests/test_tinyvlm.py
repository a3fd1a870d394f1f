# SPDX-License-Identifier: MIT
"""benchmarks.tinyvlm: its videos and questions, its statistics, and that transformers sees what training sees."""

from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("cv2")
pytest.importorskip("transformers")

from benchmarks.tinyvlm import backgrounds, batches, data, history, stats, tokens
from benchmarks.tinyvlm.answers import MOST_TOKENS, Encoded, greedy, kept, pool, right
from benchmarks.tinyvlm.evaluate import Answers, coverage, summarise
from benchmarks.tinyvlm.features import encode
from benchmarks.tinyvlm.grid import PLAIN, Cell, cells, chosen
from benchmarks.tinyvlm.model import Size, TinyVlm, build, load_weights, save_weights
from benchmarks.tinyvlm.questions import COUNTS, FAMILIES, Question, ask, spell
from benchmarks.tinyvlm.scenes import SHAPES
from benchmarks.tinyvlm.scripts import DIRECTIONS, split_of_word
from benchmarks.tinyvlm.variants import changed, variants
from flashvid_vllm import FlashVidConfig, compress

VIDEOS = 150
# weight's ending -> its factor: attention that is not nearly uniform and counts
SHARP = {"q_proj.weight": 10, "k_proj.weight": 10, "v_proj.weight": 4, "o_proj.weight": 4}
SHARP_CLIP = {"q_proj.weight": 6, "k_proj.weight": 6, "v_proj.weight": 6}
SPLITS: tuple[backgrounds.Split, ...] = ("train", "validation", "test")


def asked(split: backgrounds.Split) -> list[Question]:
    """All questions of VIDEOS videos."""
    return [question for number in range(VIDEOS) for question in data.questions(split, number)]


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_number_gives_the_same_video_and_questions(split: backgrounds.Split) -> None:
    for number in range(20):
        first, questions = data.script(split, number), data.questions(split, number)
        data.script.cache_clear()
        assert data.script(split, number) == first
        assert data.questions(split, number) == questions
    assert data.video(split, 0) != data.video(split, 1)
    assert data.video("train", 0) != data.video("test", 0)


def test_test_backgrounds_are_not_in_training() -> None:
    used = {
        split: {(f.view.source, f.view.index) for number in range(VIDEOS) for f in data.video(split, number)}
        for split in SPLITS
    }
    assert not used["train"] & used["test"]
    assert not used["validation"] & used["test"]
    inside = {
        split: {(s.source, t) for s in backgrounds.shots(split) for t in range(s.start, s.stop)} for split in SPLITS
    }
    assert all(used[split] <= inside[split] for split in SPLITS)
    assert not inside["train"] & inside["test"]


def test_test_words_are_not_in_training_not_even_as_choices() -> None:
    words: dict[str, set[str]] = {
        split: {choice for q in asked(split) if q.family == "text" for choice in q.choices} for split in SPLITS
    }
    assert min(len(of_split) for of_split in words.values()) > 50
    for split, of_split in words.items():
        assert {split_of_word(word.replace(" ", "")) for word in of_split} == {split}


@pytest.mark.parametrize("split", SPLITS)
def test_four_different_choices_with_the_answer_among_them(split: backgrounds.Split) -> None:
    questions = asked(split)
    for question in questions:
        assert len(set(question.choices)) == 4
        assert question.answer in question.choices
        tokens.question_ids(question)  # every word is in the vocabulary
    assert {question.family for question in questions} >= set(FAMILIES) - {"event"}


def test_the_answers_place_is_balanced_in_every_family() -> None:
    for family, count in Counter(q.family for q in asked("test")).items():
        places = Counter(q.choices.index(q.answer) for q in asked("test") if q.family == family)
        spread = 4 * (count * 3 / 16) ** 0.5  # four standard deviations
        assert all(abs(places[place] - count / 4) < spread for place in range(4)), (family, places)


def test_questions_say_what_the_script_meant() -> None:
    """The questions are made from the frames alone; the script keeps what it meant to show."""
    held: Counter[str] = Counter()
    for number in range(VIDEOS):
        intent = data.script("test", number).intent
        for question in data.questions("test", number):
            words, family = question.text.split(), question.family
            if family == "motion":
                expected = intent.directions[words[4]]
            elif family == "count":
                expected = str(intent.count[words[5]])
            elif family == "text":
                expected = spell(intent.word)
            elif family == "event" and words[0] == "which":
                expected = intent.brief
            elif family == "order":
                place = intent.order.index(words[-1]) + 1 if "after" in words else {"first": 0, "last": -1}[words[-1]]
                expected = intent.order[place]
            else:
                continue
            held[family] += 1
            assert question.answer == expected, (number, question, intent)
    assert min(held[family] for family in ("motion", "count", "text", "event", "order")) > 20


def test_reversed_frames_turn_directions_and_order_round() -> None:
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    turned = 0
    for number in range(VIDEOS):
        video = data.video("train", number)
        rng = np.random.default_rng(0)
        there = {q.text: q.answer for q in ask(video, rng, "train")}
        back = {q.text: q.answer for q in ask(video[::-1], rng, "train")}
        for text, answer in there.items():
            if text.startswith("which way"):
                assert back[text] == opposite[answer]
                turned += 1
        if "which shape comes first" in there:
            assert there["which shape comes first"] == back["which shape comes last"]
            turned += 1
    assert turned > 50


def test_history_says_at_a_shapes_last_token_what_the_script_meant() -> None:
    """The facts that a training loss asks for; each is one of a group, of directions, ranks, times and shapes."""
    ends = (4, 4 + history.MOST_SHAPES, 4 + history.MOST_SHAPES + len(COUNTS), history.FACTS)
    held: Counter[str] = Counter()
    for number in range(VIDEOS):
        script = data.script("train", number)
        facts, known = history.labels("train", number, range(len(script.video)))
        for name in {mark.name for frame in script.video for mark in frame.marks if mark.name in SHAPES}:
            t, mark = [(t, m) for t, frame in enumerate(script.video) for m in frame.marks if m.name == name][-1]
            token = int(mark.y // 32) * 7 + int(mark.x // 32)
            assert known[t, token]
            way, rank, times, before = (facts[t, token, a:b].tolist() for a, b in pairwise((0, *ends)))
            if name in script.intent.directions:
                assert way == [direction == script.intent.directions[name] for direction in DIRECTIONS]
                held["way"] += 1
            if name in script.intent.count:
                assert times == [count == str(script.intent.count[name]) for count in COUNTS]
                held["times"] += 1
            if name in script.intent.order:
                place = script.intent.order.index(name)
                assert rank == [place == n for n in range(history.MOST_SHAPES)]
                earlier = script.intent.order[place - 1] if place else ""
                assert before == [shape == earlier for shape in SHAPES]
                held["rank"] += 1
    assert min(held[what] for what in ("way", "times", "rank")) > 20


def test_history_counts_from_the_frames_chosen() -> None:
    """Reversed, a shape moves the other way; what was left out has not come."""
    number = next(n for n in range(VIDEOS) if data.script("train", n).intent.directions)
    intent, video = data.script("train", number).intent, data.video("train", number)
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    there, known = history.labels("train", number, [0, len(video) - 1])
    back, _ = history.labels("train", number, [len(video) - 1, 0])
    for t, facts, turn in ((len(video) - 1, there, False), (0, back, True)):
        for mark in (mark for mark in video[t].marks if mark.name in SHAPES):
            meant = opposite[intent.directions[mark.name]] if turn else intent.directions[mark.name]
            token = int(mark.y // 32) * 7 + int(mark.x // 32)
            assert facts[1, token, :4].tolist() == [direction == meant for direction in DIRECTIONS]
    assert known.any(1).all()
    assert not there[0, :, :4].any()


def test_rearranged_videos_still_have_questions_of_their_kind() -> None:
    families = Counter(
        question.family
        for number in range(VIDEOS)
        for question in batches.sample("train", number, np.random.default_rng(number)).questions
    )
    assert min(families[family] for family in FAMILIES) > 20


def test_chosen_takes_as_many_of_each_family() -> None:
    taken = Counter(q.family for questions in chosen("test", VIDEOS, 20).values() for q in questions)
    assert taken == dict.fromkeys(FAMILIES, 20)


def test_grid_has_each_setting_once() -> None:
    keys = [cell.key for cell in cells()]
    assert len(set(keys)) == len(keys)
    assert {"plain@1", "flashvid@0.1", "tome@0.05", "alpha 0.1@0.25"} <= set(keys)


def test_mcnemar_and_holm_by_hand() -> None:
    first = np.array([True] * 6 + [False] * 4)
    second = np.array([False] * 5 + [True] + [False] * 4)
    assert stats.mcnemar(first, second) == pytest.approx(2 / 2**5)
    assert stats.mcnemar(first, first) == 1.0
    assert stats.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_summary_of_answers_known_beforehand(tmp_path: Path) -> None:
    """Accuracies, differences and p-values as counted by hand; a family that plain does not answer counts nowhere."""
    questions = {
        n: [Question(family, "which", ("a", "b", "c", "d"), "a") for family in ("attribute", "count")]
        for n in range(40)
    }
    grid = [Cell(PLAIN, 1.0, None)] + [Cell(name, 0.1, FlashVidConfig()) for name in ("flashvid", "mop")]
    answers = Answers(tmp_path / "answers.jsonl")
    for n in range(40):
        for cell, is_right in zip(grid, (n < 36, n < 30, n < 20), strict=True):
            answers.add(cell.key, n, [is_right, n < 8], 0.5)
    again = Answers(tmp_path / "answers.jsonl")
    assert again.known == answers.known
    found = summarise(again, grid, questions, f"{PLAIN}@1")
    assert (found["learned"], found["left out"], found["questions"]) == (["attribute"], {"count": 0.2}, 40)
    plain, ours, mop = found["rows"]
    assert [row["accuracy"][0] for row in found["rows"]] == [0.9, 0.75, 0.5]
    assert ours["minus plain"][0] == pytest.approx(-0.15)
    assert mop["minus flashvid"][0] == pytest.approx(-0.25)
    assert mop["minus flashvid"][2] < 0
    assert mop["p (Holm)"] == pytest.approx(2 / 2**10)  # ten questions, all against it
    assert "minus flashvid" not in ours
    assert "minus flashvid" not in plain
    everything = summarise(again, grid, questions, f"{PLAIN}@1", "flashvid@0.1", ["attribute", "count"])
    assert everything["rows"][0]["minus flashvid"][0] == pytest.approx(6 / 80)
    assert everything["rows"][0]["p"] == pytest.approx(2 / 2**6)


def test_coverage_by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # of mean 0
    assert coverage(rows, rows[:1]) == pytest.approx((1 - 1 + 0 + 0) / 4)
    assert coverage(rows, rows) == pytest.approx(1.0)


def test_interval_draws_whole_videos() -> None:
    rng = np.random.default_rng(1)
    values = rng.random(400) < 0.7
    alone = stats.interval(values.astype(float), np.arange(400))
    assert alone[0] < values.mean() < alone[1]
    assert alone[1] - alone[0] == pytest.approx(2 * 1.96 * 0.5 * 0.9165 / 20, rel=0.15)
    together = stats.interval(np.repeat(values[:40], 10).astype(float), np.repeat(np.arange(40), 10))
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])


@cache
def small_tower() -> Any:
    """A CLIP tower of two layers, random, its attention sharp: as wide as the real one."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = {"hidden_size": 768, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 12}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        tower = CLIPVisionModel(CLIPVisionConfig(**shape, image_size=224, patch_size=16, hidden_act="quick_gelu"))
    for name, weight in tower.state_dict().items():
        weight *= next((scale for ending, scale in SHARP_CLIP.items() if name.endswith(ending)), 1)
    return tower.eval().requires_grad_(False)


def sharp_model(features: Tensor) -> TinyVlm:
    """An untrained model whose answers depend on what it sees and where."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = TinyVlm(Size(64, 2, 2, 128)).eval().requires_grad_(False)
        model.fit_projector(features)
        for weight in model.language_model.parameters():
            if weight.ndim == 2:  # not as training starts, which repeats the last word whatever it sees
                torch.nn.init.normal_(weight, std=0.02)
    for name, weight in model.language_model.state_dict().items():
        weight *= next((scale for ending, scale in SHARP.items() if name.endswith(ending)), 1)
    head, words = model.language_model.lm_head.weight, len(tokens.tokenizer())
    head[words:] = head[words - 1]  # rows that stand for no word: none of them is ever the likeliest alone
    return model


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    """A video's tokens as a sharp small model gets them."""
    features, attention = encode(small_tower(), noise(6), True)
    model = sharp_model(features)
    with torch.no_grad():
        return Encoded(model.video_tokens(features), pool(attention))


def noise(frames: int) -> np.ndarray:
    """[frames, 224, 224, 3] uint8: blocks of colours, some of which change."""
    rng = np.random.default_rng(3)
    blocks = np.repeat(rng.integers(0, 255, (1, 7, 7, 3)), frames, 0)
    for t in range(frames):
        blocks[t, t % 7, :3] = rng.integers(0, 255, (3, 3))
    return blocks.repeat(32, 1).repeat(32, 2).astype(np.uint8)


def model_of(frames: int = 6) -> TinyVlm:
    return sharp_model(encode(small_tower(), noise(frames), True)[0])


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


def test_questions_packed_answer_as_each_alone(encoded: Encoded) -> None:
    """In one sequence a question sees the video and itself, at its own positions: what training relies on."""
    model, rows = model_of(), kept(encoded, FlashVidConfig(retention_ratio=0.4))
    questions = [q for number in range(4) for q in data.questions("test", number)]
    # the word that is said most often behind another becomes the end, so that some answers end
    often = Counter(word for q in questions for word in greedy(model, rows, q).split()[1:]).most_common(1)[0][0]
    head = model.language_model.lm_head.weight
    head[tokens.encode(tokens.END)] = 1.05 * head[tokens.encode(often)]
    said = [greedy(model, rows, question) for question in questions]
    assert len(set(said)) > 2  # the answers depend on the question
    # asked for the answers that it gives, it is right; for others it is not
    possible = [(q, s) for q, s in zip(questions, said, strict=True) if 0 < len(s.split()) < MOST_TOKENS]
    assert len(possible) > 3
    assert right(model, rows, [replace(q, answer=s) for q, s in possible]) == [True] * len(possible)
    wrong = [replace(q, answer=next(c for c in q.choices if c != s)) for q, s in possible]
    assert right(model, rows, wrong) == [False] * len(possible)


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


@torch.no_grad()
def torch_logits(model: TinyVlm, rows: Tensor, question: Question) -> Tensor:
    """[Q, vocabulary] of the question's tokens behind a video's rows [B, D], by training's code."""
    batch = batches.collate([batches.Sample(0, [], [question])], video=len(rows))
    states = batches.question_states(model, batch, rows[None])
    return model.head(states)[0, : len(tokens.question_ids(question)[0])]


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


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        tokens.encode("what colour is the elephant")

# SPDX-License-Identifier: MIT
"""The model's own tokenizer, a token a word, and how a question is laid out for it."""

from functools import cache

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .backgrounds import SCENES
from .questions import CORNERS, COUNTS, TIMES, Question
from .scenes import COLOURS, SHAPES
from .scripts import DIRECTIONS, LETTERS

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
USER, ASSISTANT, IMAGE, VIDEO = "<user>", "<assistant>", "<image>", "<video>"
SPECIAL = (PAD, END, USER, ASSISTANT, IMAGE, VIDEO, UNKNOWN)
QUESTION_WORDS = """
what which where how many times is are does the in a of for it colour word way shape place small dot moves comes
shown seen moment first last right after background : ,
"""
MORE_WORDS = f"{' '.join(TIMES)} when shapes on side"  # of wide splits; last, so that all others keep their ids
CHAT_TEMPLATE = f"""\
{{%- for message in messages -%}}
{{{{- '{ASSISTANT} ' if message['role'] == 'assistant' else '{USER} ' -}}}}
{{%- if message['content'] is string -%}}
{{{{- message['content'] -}}}}
{{%- else -%}}
{{%- for part in message['content'] -%}}
{{%- if part['type'] in ('image', 'image_url') -%}}
{{{{- '{IMAGE} ' -}}}}
{{%- elif part['type'] in ('video', 'video_url') -%}}
{{{{- '{VIDEO} ' -}}}}
{{%- elif part['type'] == 'text' -%}}
{{{{- part['text'] -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- endif -%}}
{{{{- ' {END} ' if message['role'] == 'assistant' else ' ' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
{{{{- '{ASSISTANT}' -}}}}
{{%- endif -%}}
"""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, as transformers and vLLM load it from a directory."""
    words = [
        *QUESTION_WORDS.split(),
        *COLOURS,
        *SHAPES,
        *DIRECTIONS,
        *CORNERS,
        *COUNTS,
        *SCENES,
        *LETTERS,
        *MORE_WORDS.split(),
    ]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT, IMAGE, VIDEO],
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def encode(text: str) -> list[int]:
    """Ids of words with a space between each two; raises ValueError for a word that the model does not know."""
    ids = [int(i) for i in tokenizer().encode(text, add_special_tokens=False)]
    if tokenizer().unk_token_id in ids:
        raise ValueError(f"a word is not in the vocabulary of {len(tokenizer())} words: {text!r}")
    return ids


def question_ids(question: Question) -> tuple[list[int], list[int]]:
    """What follows the video: the question up to where the answer begins, and the answer with its end."""
    return encode(f"{question.prompt()} {ASSISTANT}"), encode(f"{question.answer} {END}")


def serving_prompt(question: Question) -> str:
    """The whole prompt as text, for vLLM and for transformers' processor."""
    return f"{USER} {VIDEO} {question.prompt()} {ASSISTANT}"

# SPDX-License-Identifier: MIT
"""What every tiny model is made of: its parts, the tokenizer and the chat template."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

CORPUS = (
    "You are a helpful assistant.",
    "Describe the video. Describe the image.",
    "What happens in this clip?",
    "system user assistant",
    "The quick brown fox jumps over the lazy dog.",
    "0 1 2 3 4 5 6 7 8 9 seconds",
)
# roles in any order; a message is a string or a list of texts, images and videos in any order
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
{{- 'IMAGE' -}}
{%- elif part['type'] in ('video', 'video_url') -%}
{{- 'VIDEO' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Parts:
    """What a family's maker returns: all that goes into the directory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    jsons: dict[str, dict[str, Any]]  # file name without .json -> content
    # from the weights as transformers saves them to the released checkpoints' names and layout
    released: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None


def make_tokenizer(special: Sequence[str], image: str, video: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 400 tokens; `image` and `video` stand for a medium in the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(special),
        model_max_length=32768,
    )
    fast.chat_template = CHAT_TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)
    return fast

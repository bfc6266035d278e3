"""Chat templates for tests: the structure of those of known models, in few words."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.load import open_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A date in the system prompt, contents trimmed.
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "<|start|>system<|stop|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n\n{{ system }}<|eot|>"
    "{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
# Thoughts: an empty block in the last turn, those of earlier turns removed.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in m.content else '' %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# No system role, another name for the assistant, turns must alternate.
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set first = '' %}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first else '' }}{{ m.content | trim }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
# A space inside of the turn, which only a finished one has; no header of the assistant.
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "gemma3": GEMMA3,
    "llama2": LLAMA2,
}
SPECIALS = "<s> </s> <|im_start|> <|im_end|> <|start|> <|stop|> <|eot|>".split()


def byte_level_tokenizer(directory: Path, template: str) -> Tokenizer:
    """Write and open a byte-level tokenizer with a chat template; `</s>` ends texts and pads."""
    directory.mkdir(parents=True, exist_ok=True)
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS,
        show_progress=False,
    )
    lines = ["user\nassistant\nmodel\n कि किताब की the mouse said", "की कि की\n\nकि", "the the"]
    made.train_from_iterator(lines * 20, trainer)
    made.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    names |= {"chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    return open_tokenizer(directory / "tokenizer.json")


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text of token ids of `byte_level_tokenizer`, special tokens included."""
    return str(tokenizer._fast.decode(ids, skip_special_tokens=False))  # type: ignore[attr-defined]

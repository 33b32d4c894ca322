"""Small chat templates, one per family: the family's structure, written for these tests.

Not the templates that models ship; what they share with those is the markup, what they refuse, and
what they do to messages.
"""

# ruff: noqa: RUF001 (DeepSeek writes its markup with full-width bars)
from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Takes every role as it comes.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# ChatML with tools, tool results inside user turns, and a thinking mode; system message first only.
QWEN = (
    "{% if messages[0].role == 'system' or tools %}{{ '<|im_start|>system\\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% if tools %}{{ '\\n\\n# Tools\\n' }}"
    "{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('The system message comes first.') }}"
    "{% elif message.role == 'user' %}"
    "{{ '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}"
    "{% elif message.role == 'assistant' %}{{ '<|im_start|>assistant\\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% elif message.role == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + message.content }}"
    "{{ '\\n</tool_response><|im_end|>\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)

# BOS, a date in the system message, trimmed contents, tool results as JSON strings.
LLAMA3 = (
    "{{ bos_token }}"
    "{% if date_string is not defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' }}"
    "{{ system + '<|eot_id|>' }}"
    "{% for message in rest %}"
    "{% if message.role == 'tool' %}"
    "{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson }}"
    "{% else %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
    "{{ message.content | trim }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

# No system role, strict alternation, the assistant is called model.
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{{ raise_exception('No system role.') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate.') }}{% endif %}"
    "{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{ '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

# Strict alternation, system message inside the first user turn, tool calls with short identifiers.
MISTRAL = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% set ns = namespace(turn=0) %}"
    "{% for message in rest %}"
    "{% if message.role == 'tool' or message.tool_calls %}"
    "{% if message.tool_call_id is defined and message.tool_call_id | length != 9 %}"
    "{{ raise_exception('Tool call ids have nine characters.') }}{% endif %}"
    "{% elif (message.role == 'user') != (ns.turn % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate.') }}"
    "{% else %}{% set ns.turn = ns.turn + 1 %}{% endif %}"
    "{% if message.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.first and system is defined %}{{ system + '\\n\\n' }}{% endif %}"
    "{{ message.content + '[/INST]' }}"
    "{% elif message.role == 'tool' %}"
    "{{ '[TOOL_RESULTS] {\"content\": ' + message.content }}"
    "{{ ', \"call_id\": \"' ~ message.tool_call_id ~ '\"}[/TOOL_RESULTS]' }}"
    "{% elif message.tool_calls %}"
    "{{ '[TOOL_CALLS] [' }}{% for call in message.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('Tool call ids have nine characters.') }}"
    "{% endif %}{{ call.function | tojson }}{% endfor %}{{ ']' + eos_token }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)

# A header token per role.
PHI = (
    "{% for message in messages %}"
    "{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# The same, with the end of sequence after each message; other roles vanish.
ZEPHYR = (
    "{% for message in messages %}{% if message.role in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# Header and role between two tokens; asks for the date without an alternative.
GRANITE = (
    "{{ '<|start_of_role|>system<|end_of_role|>Today is ' + strftime_now('%B %d, %Y') + '.' }}"
    "{% if messages[0].role == 'system' %}{{ '\\n' + messages[0].content }}"
    "{% set messages = messages[1:] %}{% endif %}{{ '<|end_of_text|>\\n' }}"
    "{% for message in messages %}"
    "{{ '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content }}"
    "{{ '<|end_of_text|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)

# Headers in words, separated by one token; other roles vanish.
WORDS = (
    "{% for message in messages %}{% if message.role != 'tool' %}"
    "{{ 'The ' + message.role + ': ' + message.content + '<|end_of_turn|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'The assistant:' }}{% endif %}"
)

# System message in a frame of its own inside the first user turn, strict alternation, trimmed.
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}"
    "{% if message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('Only user and assistant roles are supported.') }}{% endif %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate.') }}{% endif %}"
    "{% if message.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and system is defined %}"
    "{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}"
    "{{ message.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)

# All system messages in front without a header, tokens that hold other scripts' bars.
DEEPSEEK = (
    "{% set ns = namespace(system='') %}"
    "{% for message in messages %}{% if message.role == 'system' %}"
    "{% set ns.system = ns.system + message.content + '\\n' %}{% endif %}{% endfor %}"
    "{{ bos_token + ns.system }}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '<｜User｜>' + message.content }}"
    "{% elif message.role == 'assistant' %}{{ '<｜Assistant｜>' }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<｜tool▁call▁begin｜>' + call.function | tojson + '<｜tool▁call▁end｜>' }}{% endfor %}"
    "{{ message.content + eos_token }}"
    "{% elif message.role == 'tool' %}"
    "{{ '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)

# A token that begins each turn, one for the role, one that ends it; no tool turns.
COMMAND = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + message.content + '<|END_OF_TURN_TOKEN|>' }}"
    "{% elif message.role == 'user' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + message.content | trim }}"
    "{{ '<|END_OF_TURN_TOKEN|>' }}"
    "{% elif message.role == 'assistant' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + message.content | trim }}"
    "{{ '<|END_OF_TURN_TOKEN|>' }}"
    "{% else %}{{ raise_exception('Unknown role.') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)

# A dated system turn of its own, the user's system text as a developer turn, answers in channels.
HARMONY = (
    "{{ '<|start|>system<|message|>Knowledge cutoff: 2024-06\\nCurrent date: ' }}"
    "{{ strftime_now('%Y-%m-%d') + '\\n\\nReasoning: ' + (reasoning_effort or 'medium') }}"
    "{{ '<|end|>' }}"
    "{% if messages[0].role in ['system', 'developer'] %}"
    "{{ '<|start|>developer<|message|># Instructions\\n\\n' + messages[0].content + '<|end|>' }}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}"
    "{% if message.role == 'user' %}"
    "{{ '<|start|>user<|message|>' + message.content + '<|end|>' }}"
    "{% elif message.role == 'tool' %}"
    "{{ '<|start|>functions.tool to=assistant<|channel|>commentary<|message|>' }}"
    "{{ message.content | tojson + '<|end|>' }}"
    "{% elif message.role == 'assistant' %}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<|start|>assistant to=functions.' + call.function.name + '<|channel|>commentary' }}"
    "{{ '<|message|>' + call.function.arguments | tojson + '<|call|>' }}{% endfor %}"
    "{% if message.content %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}"
    "{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)

# A system message in any case, with the date and the thinking mode, and then the user's own.
SMOLLM3 = (
    "{{ '<|im_start|>system\\n## Metadata\\n\\nToday Date: ' + strftime_now('%d %B %Y') }}"
    "{{ '\\nReasoning Mode: ' + ('/think' if enable_thinking | default(true) else '/no_think') }}"
    "{{ '\\n\\n## Custom Instructions\\n\\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% set messages = messages[1:] %}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% for message in messages %}"
    "{% if message.role in ['user', 'tool'] %}"
    "{{ '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}"
    "{% elif message.role == 'assistant' %}{{ '<|im_start|>assistant\\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if not enable_thinking | default(true) %}{{ '<think>\\n\\n</think>\\n' }}{% endif %}"
    "{% endif %}"
)

# No markup at all.
TEXT = (
    "{% for message in messages %}"
    "{{ message.role | upper + ': ' + message.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)

FAMILIES = {
    "chatml": CHATML,
    "qwen": QWEN,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "phi": PHI,
    "zephyr": ZEPHYR,
    "granite": GRANITE,
    "words": WORDS,
    "llama2": LLAMA2,
    "deepseek": DEEPSEEK,
    "command": COMMAND,
    "harmony": HARMONY,
    "smollm3": SMOLLM3,
    "text": TEXT,
}

_TOKENS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "qwen": ["<|im_start|>", "<|im_end|>", "<tool_response>", "</tool_response>", "<tool_call>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "mistral": ["[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"],
    "phi": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "zephyr": [],
    "granite": ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"],
    "words": ["<|end_of_turn|>"],
    "llama2": [],
    "deepseek": [
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁output▁begin｜>",
        "<｜tool▁output▁end｜>",
    ],
    "command": [
        "<|START_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|SYSTEM_TOKEN|>",
        "<|USER_TOKEN|>",
        "<|CHATBOT_TOKEN|>",
    ],
    "harmony": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"],
    "smollm3": ["<|im_start|>", "<|im_end|>"],
    "text": [],
}


def chat_tokenizer(family: str | None) -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer with a family's template; None: a tokenizer without one."""
    vocabulary = {chr(i) if i else "<unk>": i for i in range(128)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if family is not None:
        wrapped.add_special_tokens({"additional_special_tokens": _TOKENS[family]})
        wrapped.chat_template = FAMILIES[family]
    return wrapped

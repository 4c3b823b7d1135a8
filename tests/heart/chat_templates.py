"""Chat templates as models really have them, small, one of each shape.

Each entry of :data:`TEMPLATES` is (template, the model's own words in ``TALK`` as the template lays them out).
:data:`REFUSED` are templates in whose layout no answer can be told apart, with a word of the refusal.
"""

TALK = [
    dict(role="user", content="first question"),
    dict(role="assistant", content="one answer"),
    dict(role="user", content="one answer"),
    dict(role="assistant", content="    if x:\n\n        return y"),
]
ONE, TWO = TALK[1]["content"], TALK[3]["content"]
BOTH = f"{ONE}<|im_end|>{TWO}<|im_end|>"

_TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
_ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)

TEMPLATES = {
    "ChatML": ("{% for m in messages %}" + _TURN + "{% endfor %}" + _ASK, BOTH),
    "a system turn of its own": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}" + _TURN + "{% endfor %}" + _ASK,
        BOTH,
    ),
    "generation tags": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}" + _ASK,
        BOTH,
    ),
    "no system turns": (_NO_SYSTEM + "{% for m in messages %}" + _TURN + "{% endfor %}" + _ASK, BOTH),
    "roles alternate": (_ALTERNATE + "{% for m in messages %}" + _TURN + "{% endfor %}" + _ASK, BOTH),
    "system inside the first question": (
        "{% if messages[0]['role'] == 'system' %}{% set head = messages[0]['content'] + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set head = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{{ '<|im_start|>' + m['role'] + '\n' + (head if loop.first else '') + m['content']"
        " + '<|im_end|>\n' }}{% endfor %}" + _ASK,
        BOTH,
    ),
    "answers stripped": (
        "{% for m in messages %}" + _TURN.replace("m['content']", "m['content'] | trim") + "{% endfor %}" + _ASK,
        f"{ONE}<|im_end|>{TWO.strip()}<|im_end|>",
    ),
    "another end of turn": (
        "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else"
        " m['content'] + '<|endoftext|>' }}{% endfor %}",
        f"{ONE}<|endoftext|>{TWO}<|endoftext|>",
    ),
    "no end of turn": (
        "{% for m in messages %}{{ m['role'] | upper + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}",
        ONE + TWO,
    ),
    "a closed think block before the last answer": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}",
        f"{TWO}<|im_end|>",
    ),
    "earlier reasoning dropped": (
        "{% for m in messages %}{% set said = m['content'].split('</think>')[-1] if m['role'] == 'assistant' and"
        " not loop.last else m['content'] %}{{ '<|im_start|>' + m['role'] + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
        + _ASK,
        BOTH,
    ),
    "a think block that nobody asked for": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}" + _ASK,
        BOTH,
    ),
    "channels": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}{% if m['role'] == 'assistant' %}"
        "{{ '<file_sep>final' }}{% endif %}{{ '<repo_name>' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<file_sep>final<repo_name>' }}{% endif %}",
        BOTH,
    ),
    "a preamble of seventy tokens in every turn": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + 'Answer well. ' * 20 + '\n' + m['content']"
        " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' + 'Answer well. ' * 20 + '\n' }}{% endif %}",
        BOTH,
    ),
    "the date of today, which differs in length": (
        "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %B %Y') + '<|im_end|>\n' }}"
        "{% for m in messages %}" + _TURN + "{% endfor %}" + _ASK,
        BOTH,
    ),
    "text in front of the first turn": (
        "{{ '<|endoftext|>' }}{% for m in messages %}" + _TURN + "{% endfor %}" + _ASK,
        BOTH,
    ),
    "space before the answer": (
        "{% for m in messages %}{{ 'USER: ' + m['content'] + ' ' if m['role'] == 'user' else 'ASSISTANT: ' +"
        " m['content'] + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}",
        BOTH,
    ),
}

REFUSED = {
    "an open think block": (
        "{% for m in messages %}" + _TURN + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        "open think block",
    ),
    "the number of turns in front": (
        "{{ messages | length }}{% for m in messages %}" + _TURN + "{% endfor %}" + _ASK,
        "lays out answers otherwise",
    ),
    "newest turn first": (
        "{% for m in messages | reverse %}" + _TURN + "{% endfor %}" + _ASK,
        "lays out answers otherwise",
    ),
    "a template that is broken": ("{% for m in messages %}{{ m['content'] }}", "chat template rejects"),
    "a field that is not there": ("{{ messages[0]['name'].upper() }}", "chat template rejects"),
    "answers left out": (
        "{% for m in messages if m['role'] == 'user' %}" + _TURN + "{% endfor %}" + _ASK,
        "lays out answers otherwise",
    ),
    "answers in capitals": (
        "{% for m in messages %}" + _TURN.replace("m['content']", "m['content'] | upper") + "{% endfor %}" + _ASK,
        "lays out answers otherwise",
    ),
}

"""Chat templates: the same text as transformers makes of them, and nothing but text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.serve.model import save_tokenizer
from triaxial import BadInput
from triaxial.serve.errors import ApiError
from triaxial.serve.template import ChatTemplate, load_chat_template

MESSAGES = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": "<b>1 < 2 & 'x'</b>"},
    {"role": "assistant", "content": "naïve"},
    {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
]
TEMPLATES = {
    "plain": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "blocks": "{%- for m in messages %}\n    {% if loop.first %}\n  first:\n    {% endif %}\n{{ m.content }}\n{% endfor %}",
    "loops": "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson }} {{ {'b': '<é>', 'a': none} | tojson(indent=2) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "tools": "{% if tools is none %}none{% endif %}{% if not documents %}no documents{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_what_transformers_makes_of_it(tmp_path: Path, name: str) -> None:
    save_tokenizer(tmp_path, 320, "some text")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"chat_template": TEMPLATES[name], "bos_token": {"content": "<|user|>", "__type": "AddedToken"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    template = load_chat_template(tmp_path)
    assert template is not None
    assert template.render(MESSAGES, {}) == expected


def test_a_file_of_its_own_wins_and_of_several_the_default_is_taken(tmp_path: Path) -> None:
    several = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "default"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert load_chat_template(tmp_path).render([], {}) == "default"  # type: ignore[union-attr]
    (tmp_path / "chat_template.jinja").write_text("own")
    assert load_chat_template(tmp_path).render([], {}) == "own"  # type: ignore[union-attr]


def test_a_model_may_have_none(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_chat_template(tmp_path) is None


@pytest.mark.parametrize(
    ("config", "message"), [("{", "not valid JSON"), (json.dumps({"chat_template": "{% for %}"}), "no Jinja template")]
)
def test_a_broken_template_is_refused_before_anything_starts(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(BadInput, match=message):
        load_chat_template(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ strftime_now.__globals__['__builtins__'].open('/etc/passwd').read() }}",
        "{{ raise_exception.__code__.co_consts }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends '/etc/passwd' %}",
        "{{ [1] * 1000000000 | length }}{% for i in range(1000000000) %}{% endfor %}",
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_can_neither_run_nor_read_nor_change_anything(source: str) -> None:
    with pytest.raises(ApiError) as refused:
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], {})
    assert refused.value.status == 400


@pytest.mark.parametrize("more", [{"messages": "x"}, {"add_generation_prompt": False}, {"eos_token": "x"}])
def test_a_clients_variables_do_not_replace_ours(more: dict[str, Any]) -> None:
    source = "{{ messages | length }}{% if add_generation_prompt %}!{% endif %}{{ eos_token }}"
    assert ChatTemplate(source, {"eos_token": "END"}).render([{"role": "user", "content": "x"}], more) == "1!END"

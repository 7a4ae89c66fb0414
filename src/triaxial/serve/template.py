"""The model's own chat template: data that comes with a model, so it runs in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from triaxial import BadInput
from triaxial.serve.errors import ApiError

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_MAX_TEXT = 16 << 20
"""Characters that a template may make of a conversation."""


class ChatTemplate:
    """Renders conversations as transformers does.

    Raises:
        BadInput: the template has a syntax error.
    """

    def __init__(self, source: str, special: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json  # jinja2's own escapes for HTML
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise BadInput(f"the model's chat template is no Jinja template: {error}") from None
        self._special = special

    def render(self, messages: Sequence[dict[str, Any]], more: dict[str, Any]) -> str:
        """The prompt that asks for the assistant's next message.

        Raises:
            ApiError: the template refuses the conversation.
        """
        variables = {**more, **self._special, "messages": messages, "add_generation_prompt": True, "tools": None}
        parts, size = [], 0
        try:
            for part in self._template.generate(variables):
                parts.append(part)
                size += len(part)
                if size > _MAX_TEXT:
                    raise ApiError(400, "the chat template makes too long a text of these messages", param="messages")
        except ApiError:
            raise
        except Exception as error:  # a template is a program: anything can come of a conversation it does not expect
            raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from None
        return "".join(parts)


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a model folder: chat_template.jinja, or the one in tokenizer_config.json; None if it has none."""
    config = _read_config(folder / "tokenizer_config.json")
    own = folder / "chat_template.jinja"
    source = own.read_text(encoding="utf-8") if own.is_file() else _named_default(config.get("chat_template"))
    return None if source is None else ChatTemplate(source, _special_tokens(config))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON: {error}") from None
    return config if isinstance(config, dict) else {}


def _named_default(template: Any) -> str | None:
    """Some models have several, as a list of name and template."""
    if isinstance(template, list):
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Text of each special token, which the file writes as text or as an object."""
    found = {name: config.get(name) for name in _SPECIAL}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **_: Any) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)

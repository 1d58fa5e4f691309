"""Chat messages to prompt text, by the model's own Jinja template.

The environment is that of transformers' `apply_chat_template`, so that published templates render
the same: sandboxed and immutable, blocks trimmed, loop controls, `raise_exception`, `tojson`,
`strftime_now`, and the `generation` tag, whose body is rendered as it stands.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pdrelay.errors import InvalidRequestError, ModelError
from pdrelay.model.tokenizer import Tokenizer


class ChatTemplate:
    """A compiled template. Raises ModelError when the source is no template."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template is broken: {error}; fix the model's") from None
        self._tokens = {
            "bos_token": tokenizer.bos_token or "",
            "eos_token": tokenizer.eos_token or "",
        }

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Prompt text of `messages` (role, content, and whatever else the template knows).

        Raises InvalidRequestError when the template refuses them.
        """
        try:
            text = self._template.render(
                **{
                    **(variables or {}),
                    **self._tokens,
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                    "continue_final_message": continue_final_message,
                }
            )
        except Exception as error:  # a template may do anything to messages it does not expect
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {text}", "messages"
            ) from None
        return _cut_after_final(text, messages) if continue_final_message else text


def load_chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The tokenizer's template, or None when the model has none. Raises ModelError."""
    source = tokenizer.chat_template
    return None if source is None else ChatTemplate(source, tokenizer)


def _cut_after_final(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Drop what a template puts after the last message, so that the model goes on writing it."""
    final = str(messages[-1].get("content") or "").rstrip()
    position = text.rfind(final) if final else -1
    if position < 0:
        raise InvalidRequestError(
            "continue_final_message needs a last message whose text the chat template keeps",
            "continue_final_message",
        )
    return text[: position + len(final)]


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training masks."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without Jinja's HTML escapes, which would change the prompt."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

"""How instructions and chats are written as text: the templates, and the same in Jinja for transformers. No torch.

A template has the text of a system message, of a user's turn, and of a user's turn with an input beside its
instruction; an answer stands right behind the user's turn and ends with ``</s>``. So a turn's text ends where the
answer begins, with what announces it. What is filled in loses the white space around it.

- ``multialpaca``: PolyLM's (polylm.md, 6), the instruction, its input, an empty line.
- ``alpaca``: Stanford Alpaca's, with its two preambles.
- ``chat``: PolyLM's chat form, with roles.

Others are TOML files, :func:`load_template`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Any

import pydantic

from megapoly.config_file import read_toml
from megapoly.errors import ConfigError

NO_INPUT = "<noinput>"  # what self-instruct writes where a task has no input
_FIELDS = {"system": ("system",), "user": ("instruction",), "with_input": ("instruction", "input")}
_MESSAGE = {"system": "content", "instruction": "content", "input": "input"}


class Template(pydantic.BaseModel):
    """A template: ``{system}``, ``{instruction}`` and ``{input}`` stand for texts, a brace is ``{{`` or ``}}``.

    A user's turn of a chat is the ``user`` form, its content the instruction.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    name: str
    system: str
    user: str
    with_input: str

    def turn(self, instruction: str, given: str | None = None, system: str | None = None) -> str:
        """The text up to an answer: the user's turn, after the system message where there is one."""
        given = (given or "").strip()
        form, before = self.user, ""
        if given and given != NO_INPUT:
            form = self.with_input
        if system and not system.isspace():
            before = self.system.format(system=system.strip())
        return before + form.format(instruction=instruction.strip(), input=given)

    def jinja(self, begin: str = "") -> str:
        """The template as transformers takes it: ``chat_template``, where every turn of a user asks for an answer.

        A message may have an ``input`` beside its ``content``. The end of an answer is transformers' ``eos_token``.

        Args:
            begin: words of the special tokens that begin a text.
        """
        system, user, with_input = map(_expression, (self.system, self.user, self.with_input))
        opening = f"{{{{- {json.dumps(begin)} -}}}}" if begin else ""
        return (
            opening + "{%- for message in messages -%}"
            "{%- if message['role'] == 'system' -%}"
            f"{{%- if message['content'] | trim -%}}{{{{- {system} -}}}}{{%- endif -%}}"
            "{%- elif message['role'] == 'user' -%}"
            f"{{%- if (message['input'] or '') | trim not in ['', '{NO_INPUT}'] -%}}{{{{- {with_input} -}}}}"
            f"{{%- else -%}}{{{{- {user} -}}}}{{%- endif -%}}"
            "{%- elif message['role'] == 'assistant' -%}{{- message['content'] | trim + eos_token -}}"
            "{%- else -%}{{- raise_exception('unknown role ' + message['role']) -}}{%- endif -%}"
            "{%- endfor -%}"
        )


#: Those that have a name.
TEMPLATES: Mapping[str, Template] = {
    each.name: each
    for each in (
        Template(
            name="multialpaca",
            system="{system}\n\n",
            user="{instruction}\n\n",
            with_input="{instruction}\n{input}\n\n",
        ),
        Template(
            name="alpaca",
            system="{system}\n\n",
            user="Below is an instruction that describes a task. Write a response that appropriately completes the"
            " request.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
            with_input="Below is an instruction that describes a task, paired with an input that provides further"
            " context. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}"
            "\n\n### Input:\n{input}\n\n### Response:\n",
        ),
        Template(
            name="chat",
            system="<|system|>\n{system}\n",
            user="<|user|>\n{instruction}\n<|assistant|>\n",
            with_input="<|user|>\n{instruction}\n{input}\n<|assistant|>\n",
        ),
    )
}


def load_template(name: str) -> Template:
    """The template of a name, or of a TOML file::

        name = "mine"                             # that of the file where left out
        system = "{system}\\n\\n"                   # these are the defaults, those of multialpaca
        user = "{instruction}\\n\\n"
        with_input = "{instruction}\\n{input}\\n\\n"

    Raises:
        ConfigError: there is no such template, or the file cannot be read or holds no template.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if path.suffix != ".toml":
        raise ConfigError(f"template {name!r}: expected {', '.join(TEMPLATES)}, or a file that ends with .toml")
    tree = read_toml(path)
    unknown = sorted(tree.keys() - Template.model_fields.keys())
    if unknown:
        raise ConfigError(f"{path}: has unknown keys {unknown}; a template has {', '.join(Template.model_fields)}")
    values = {**TEMPLATES["multialpaca"].model_dump(), "name": path.stem, **tree}
    for key, fields in _FIELDS.items():
        if problem := _problem(values[key], fields):
            raise ConfigError(f"{path}: {key} = {values[key]!r} {problem}")
    if not isinstance(values["name"], str):
        raise ConfigError(f"{path}: name = {values['name']!r} is not a text")
    return Template(**values)


def _problem(form: Any, fields: tuple[str, ...]) -> str | None:
    """What is wrong with the text of a turn."""
    shown = " and ".join(f"{{{field}}}" for field in fields)
    expected = f"; expected a text with {shown}, once each, where a brace is {{{{ or }}}}"
    if not isinstance(form, str):
        return f"is not a text{expected}"
    try:
        parts = list(Formatter().parse(form))
    except ValueError as error:
        return f"has a brace that is not closed or opened ({error}){expected}"
    if any(specification or conversion for _, _, specification, conversion in parts):
        return f"holds a field with a form of its own{expected}"
    found = [field for _, field, _, _ in parts if field is not None]
    if sorted(found) != sorted(fields):
        return f"holds the fields {found}{expected}"
    if form.endswith(" "):
        return "ends with a space, which tokenizers put before the next word: the answer could not begin there; leave" \
            " it out, or end with a line break"  # fmt: skip
    return None


def _expression(form: str) -> str:
    """A form as an expression of Jinja."""
    parts = []
    for literal, field, _, _ in Formatter().parse(form):
        if literal:
            parts.append(json.dumps(literal, ensure_ascii=False))
        if field is not None:
            parts.append(f"(message['{_MESSAGE[field]}'] | trim)")
    return " + ".join(parts)

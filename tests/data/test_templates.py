"""Templates: what they write, files of them, and what is refused. Against the published prompts."""

from __future__ import annotations

import pytest

from megapoly.data.templates import TEMPLATES, load_template
from megapoly.errors import ConfigError


def test_what_they_write():
    """Alpaca's as in its train.py; PolyLM's as in its model cards."""
    plain, alpaca, chat = (TEMPLATES[name] for name in ("multialpaca", "alpaca", "chat"))
    assert plain.turn("Say.", "This") == "Say.\nThis\n\n"
    for none in (None, "", "  \n", "<noinput>", " <noinput>\n"):
        assert plain.turn(" Say. ", none) == "Say.\n\n"
    assert alpaca.turn("Say.") == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay.\n\n### Response:\n"
    )
    assert alpaca.turn("Say.", "This") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay.\n\n### Input:\nThis\n\n### Response:\n"
    )
    assert chat.turn("{Q}") == "<|user|>\n{Q}\n<|assistant|>\n"
    assert chat.turn("Q", system="Be {brief}.") == "<|system|>\nBe {brief}.\n<|user|>\nQ\n<|assistant|>\n"
    assert chat.turn("Q", system="  ") == chat.turn("Q")


def test_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('user = "{{Q}} {instruction}\\nA:\\n"\n')
    found = load_template(str(path))
    assert (found.name, found.turn("why?")) == ("mine", "{Q} why?\nA:\n")
    assert found.turn("why?", "this") == "why?\nthis\n\n"
    path.write_text('name = "other"\n')
    assert load_template(str(path)) == TEMPLATES["multialpaca"].model_copy(update={"name": "other"})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            'user = "no field\\n"',
            r"user = 'no field\\n' holds the fields \[\]; expected a text with {instruction}, once",
        ),
        ('user = "{instruction}{input}\\n"', r"holds the fields \['instruction', 'input'\]"),
        ('with_input = "{instruction}\\n"', "expected a text with {instruction} and {input}"),
        ('user = "{instruction:>3}\\n"', "a form of its own"),
        ('user = "{instruction"', "a brace that is not closed"),
        ('user = "{instruction} "', "ends with a space, which tokenizers put before the next word"),
        ("user = 3", "user = 3 is not a text"),
        ("name = 3", "name = 3 is not a text"),
        ('prompt = "x"', r"has unknown keys \['prompt'\]; a template has name, system, user, with_input"),
    ],
)
def test_what_is_none(tmp_path, text, problem):
    path = tmp_path / "t.toml"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError, match=problem):
        load_template(str(path))


def test_an_unknown_name():
    with pytest.raises(ConfigError, match="template 'vicuna': expected multialpaca, alpaca, chat, or a file that ends"):
        load_template("vicuna")

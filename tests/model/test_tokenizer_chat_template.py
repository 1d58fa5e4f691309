from __future__ import annotations

import pytest

from pdrelay.errors import InvalidRequestError, ModelError
from pdrelay.model.chat_template import ChatTemplate, load_chat_template
from pdrelay.model.tokenizer import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
CHAT = [{"role": "system", "content": "be"}, {"role": "user", "content": "<b> é"}]
TEMPLATES = {
    "tiny": TOKENIZER.chat_template or "",
    "trimmed": "{% for m in messages %}\n  {% if loop.first %}\nX{% endif %}\n"
    "{{ m['content'] | tojson }}\n{% endfor %}\n",
    "controls": "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}{{ eos_token }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "tojson": "{{ {'b': [1, 'é'], 'a': none} | tojson(indent=2) }}",
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_renders_as_transformers_does(name: str, tmp_path) -> None:
    from transformers import AutoTokenizer

    TOKENIZER.save(str(tmp_path))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    expected = theirs.apply_chat_template(
        CHAT, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
    assert ChatTemplate(TEMPLATES[name], TOKENIZER).render(CHAT) == expected


def test_default_template() -> None:
    template = load_chat_template(TOKENIZER)
    assert template is not None
    assert template.render(CHAT) == ("<|bos|><|system|>be<|end|><|user|><b> é<|end|><|assistant|>")
    final = [*CHAT, {"role": "assistant", "content": "So "}]
    text = template.render(final, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|assistant|>So")


def test_refusals_are_the_clients() -> None:
    template = load_chat_template(TOKENIZER)
    assert template is not None
    with pytest.raises(InvalidRequestError, match="roles are system, user and assistant"):
        template.render([{"role": "tool", "content": "x"}])
    broken = ChatTemplate("{{ messages[0].content + 1 }}", TOKENIZER)
    with pytest.raises(InvalidRequestError, match="refuses these messages"):
        broken.render(CHAT)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_sandbox(source: str) -> None:
    template = ChatTemplate(source, TOKENIZER)
    with pytest.raises(InvalidRequestError):
        template.render(CHAT)


def test_variables_cannot_replace_the_messages() -> None:
    template = ChatTemplate("{{ messages | length }}{{ mode }}{{ bos_token }}", TOKENIZER)
    variables = {"messages": [], "mode": "!", "bos_token": "evil"}
    assert template.render(CHAT, variables=variables) == "2!<|bos|>"


def test_broken_source() -> None:
    with pytest.raises(ModelError, match="chat template is broken"):
        ChatTemplate("{% for %}", TOKENIZER)

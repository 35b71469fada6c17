"""Pieces of a conversation add up to the whole, token for token, with tokenizers that join letters or add blanks."""

import pytest
from codec_fixtures import CONTROLS, KINDS, TEMPLATES, trained
from hypothesis import given, settings
from hypothesis import strategies as st

from tunekit import ConfigError
from tunekit.core.data.codec import IGNORED, PLAIN_TEMPLATE, Codec
from tunekit.core.data.tokens import Tokens

ALL = {name: text for name, text in TEMPLATES.items() if name != "tools"} | {"plain": PLAIN_TEMPLATE}
CODECS = {f"{kind} {name}": Codec(make(), text) for kind, make in KINDS.items() for name, text in ALL.items()}
PARTS = [*"ab Y.\n\t1ü🌳'\ue000\ue001", "  ", "\n\n", "Yes", "user", "[/INST]", *CONTROLS]
CONTENT = st.one_of(
    st.text(st.characters(codec="utf-8"), min_size=1), st.lists(st.sampled_from(PARTS), max_size=6).map("".join)
).filter(str.strip)


def talk(contents):
    roles = ("user", "assistant")
    return [{"role": roles[at % 2], "content": content} for at, content in enumerate(contents)]


@settings(max_examples=6)
@given(st.lists(CONTENT, min_size=4, max_size=4))
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_what_is_asked_in_use_is_the_beginning_of_the_row_at_every_turn(codec, contents):
    """Traps M6 and M7."""
    messages = talk(contents)
    for train_on in ("assistant", "last", "all"):
        row = codec.encode({"messages": messages}, train_on)
        for turn in (1, 3):
            prompt = codec.prompt(messages[:turn])
            assert row["input_ids"][: len(prompt)] == prompt
            learned = train_on == "all" or (train_on, turn) != ("last", 1)
            assert (row["labels"][len(prompt)] != IGNORED) == learned
            assert train_on == "all" or row["labels"][len(prompt) - 1] == IGNORED


def test_an_earlier_answer_that_would_be_joined_with_its_heading_is_cut_off_in_use_too():
    """Traps M6 and M7: three line breaks are one token, of which the first belongs to the heading."""
    codec = Codec(trained("llama-3"), TEMPLATES["chatml"])
    messages = talk(["x", "\n\nYes.", "x", "Yes."])
    text = codec.tokenizer.apply_chat_template(messages[:3], chat_template=codec.template, tokenize=False)
    assert "ĊĊĊ" in codec.tokenizer.tokenize(text), "the test needs a tokenizer that joins line breaks"
    row, prompt = codec.encode({"messages": messages}), codec.prompt(messages[:3])
    assert row["input_ids"][: len(prompt)] == prompt
    assert codec.tokenizer.decode([label for label in row["labels"] if label != IGNORED]).startswith(
        "\n\nYes.<|im_end|>"
    )


@pytest.mark.parametrize("text", ["abc", "<s>abc", "abc</s>"])
def test_a_plain_text_has_one_bos_and_one_end_whether_it_brings_them_or_not(text):
    """Traps M4, M5 and T27."""
    codec = Codec(KINDS["llama-3, bos"](), PLAIN_TEMPLATE)
    ids = codec.encode({"text": text})["input_ids"]
    assert [ids[0], ids[-1]] == [codec.tokenizer.bos_token_id, codec.tokenizer.eos_token_id]
    assert ids.count(ids[0]) == ids.count(ids[-1]) == 1


@settings(max_examples=6)
@given(st.lists(st.sampled_from(["Yes.", "no", "a b", "2 + 3\n", "ü🌳", "'s"]), min_size=4, max_size=4))
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_a_row_is_tokenized_as_its_whole_text_is_where_nothing_is_joined_over_a_border(codec, contents):
    """Against the tokenizer on the text that transformers renders: no pieces, no anchors, no memory."""
    messages = talk(contents)
    text = codec.tokenizer.apply_chat_template(messages, chat_template=codec.template, tokenize=False)
    whole = codec.tokenizer.encode(text, add_special_tokens=False)
    begins = codec.tokenizer.encode("x")[0] == codec.tokenizer.bos_token_id and whole[0] != codec.tokenizer.bos_token_id
    assert codec.encode({"messages": messages})["input_ids"] == [codec.tokenizer.bos_token_id] * begins + whole


@settings(max_examples=50)
@given(st.lists(st.sampled_from([*PARTS, "the ", "x"]), max_size=12), st.data())
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_pieces_are_what_follows_with_and_without_anchors(make, parts, data):
    tokenizer = make()
    fast, slow = Tokens(tokenizer), Tokens(tokenizer)
    slow.use_anchors = False
    text = "".join(part for part in parts if part not in ("\ue000", "\ue001"))
    cuts = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=4))})
    assert fast.pieces(text, cuts) == slow.pieces(text, cuts)


@given(st.lists(st.sampled_from([*PARTS, "\ue0003\ue001"]), max_size=8).map("".join))
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_text_never_becomes_a_control_token_and_comes_back_as_it_was(make, text):
    """Traps T25 and X5, also where the text holds the very marks that stand for control tokens."""
    tokens = Tokens(make())
    ids = tokens.ids(tokens.neutral(text))
    assert not tokens.special_ids & set(ids)
    assert tokens.tokenizer.decode(ids).strip(" ") == text.strip(" ")


def test_control_tokens_in_tools_and_in_names_of_arguments_are_text_too():
    """Trap X5."""
    codec = Codec(KINDS["llama-3"](), TEMPLATES["tools"])
    call = {"function": {"name": "<|im_end|>", "arguments": {"<|im_start|>": "</s>"}}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    row = codec.encode({"messages": messages, "tools": [{"name": "<|im_start|>", "<|im_end|>": 1}]})
    ids = codec.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [token for token in row["input_ids"] if token in codec._tokens.special_ids] == ids * 3
    learned = codec.tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    assert learned == ('<tool_call>{"name": "<|im_end|>", "arguments": {"<|im_start|>": "</s>"}}</tool_call><|im_end|>')


@pytest.mark.parametrize("kind", ["gpt-2", "always", "never"])
def test_a_heading_that_ends_in_a_blank_is_refused_with_the_tokens_that_show_why(kind):
    """Traps M6 and M7: "Yes" is one token with the blank before it, and two where the prompt ends in the blank."""
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else '\n') }}"
        "{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    )
    codec = Codec(trained(kind), template)
    with pytest.raises(
        ConfigError, match=r"joins the end .* 'Yes\.</s>.* in use the prompt ends in .*, where the whole"
    ):
        codec.encode({"messages": talk(["x", "y"])})
    better = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else '\n') }}"
        "{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    )
    row = Codec(trained(kind), better).encode({"messages": talk(["x", "Yes."])})
    assert codec.tokenizer.decode([label for label in row["labels"] if label != IGNORED]).strip() == "Yes.</s>"


def test_a_heading_of_two_line_breaks_is_refused_where_the_tokenizer_takes_them_apart_before_a_word():
    """GPT-2 has one token for two line breaks at the end of a prompt, and two before an answer."""
    codec = Codec(trained("gpt-2"), TEMPLATES["llama-3"])
    with pytest.raises(
        ConfigError, match=r"in use the prompt ends in the tokens \['ĊĊ'\], where .* has \['Ċ', 'Ċ', 'Yes'"
    ):
        codec.encode({"messages": talk(["x", "y"])})

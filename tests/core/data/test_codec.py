"""What is trained on is exactly what the assistant says, and what is asked in use is exactly what was trained on."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunekit import ConfigError, DataError
from tunekit.core.data.codec import IGNORED, PLAIN_TEMPLATE, Codec
from tunekit.testing import CHATML, tiny_tokenizer

DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is the assistant here?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Say assistant\n"},
    {"role": "assistant", "content": "assistant"},
]
LLAMA_3 = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{{- '<|im_start|>' + m['role'] + '<s>\\n\\n' + m['content'] | trim + '<|im_end|>' -}}"
    "{%- endfor -%}{{- '<|im_start|>assistant<s>\\n\\n' if add_generation_prompt -}}"
)
MISTRAL = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{%- if m['role'] == 'assistant' -%}{{- ' ' + m['content'] + eos_token -}}"
    "{%- else -%}{{- ' [INST] ' + m['content'] + ' [/INST]' -}}{%- endif -%}{%- endfor -%}"
)
NO_END = (
    "{%- for m in messages -%}{{- '# ' + m['role'] + '\\n' + m['content'] + '\\n' -}}{%- endfor -%}"
    "{{- '# assistant\\n' if add_generation_prompt -}}"
)
FORGETS_THINKING = CHATML.replace(
    "message['content']", "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
)
TEMPLATES = {"chatml": CHATML, "llama-3": LLAMA_3, "mistral": MISTRAL, "plain": PLAIN_TEMPLATE}


def supervised(codec, encoded):
    """The text that carries loss, control tokens spelled out."""
    return codec.tokenizer.decode([label for label in encoded["labels"] if label != IGNORED])


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("begin", [False, True], ids=["no-bos", "bos"])
@pytest.mark.parametrize("end", ["<|im_end|>", "</s>"])
def test_every_answer_and_its_end_is_supervised_and_nothing_else(template, begin, end):
    codec = Codec(tiny_tokenizer(template=template, begin=begin, end=end))
    stop = codec.tokenizer.decode([codec.stop_ids[-1]])
    space = " " if template is MISTRAL else ""
    encoded = codec.encode({"messages": DIALOGUE})
    assert supervised(codec, encoded) == f"{space}Yes.{stop}{space}assistant{stop}"
    assert all(label in (IGNORED, token) for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True))


def test_only_the_last_answer_is_supervised_when_asked_for():
    codec = Codec(tiny_tokenizer())
    assert supervised(codec, codec.encode({"messages": DIALOGUE}, "last")) == "assistant<|im_end|>"


def test_every_token_is_supervised_when_asked_for():
    codec = Codec(tiny_tokenizer())
    encoded = codec.encode({"messages": DIALOGUE}, "all")
    assert encoded["labels"] == encoded["input_ids"]
    assert encoded["input_ids"] == codec.encode({"messages": DIALOGUE})["input_ids"]


def test_with_every_token_supervised_text_stays_text_and_there_is_an_end():
    codec = Codec(tiny_tokenizer(template=NO_END))
    messages = [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "y"}]
    ids = codec.encode({"messages": messages}, "all")["labels"]
    assert [at for at, token in enumerate(ids) if token == codec.tokenizer.eos_token_id] == [len(ids) - 1]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}], ids=str)
def test_a_message_that_is_not_to_be_trained_on_is_not(mark):
    codec = Codec(tiny_tokenizer())
    messages = [*DIALOGUE[:2], {**DIALOGUE[2], **mark}, *DIALOGUE[3:]]
    assert supervised(codec, codec.encode({"messages": messages})) == "assistant<|im_end|>"


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("begin", [False, True], ids=["no-bos", "bos"])
def test_a_prompt_in_use_is_the_beginning_of_the_trained_row_token_for_token(template, begin):
    codec = Codec(tiny_tokenizer(template=template, begin=begin))
    full = codec.encode({"messages": DIALOGUE})["input_ids"]
    for turn in (2, 4):
        prompt = codec.prompt(DIALOGUE[:turn])
        assert full[: len(prompt)] == prompt


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_exactly_one_bos_where_the_tokenizer_wants_one(template):
    tokenizer = tiny_tokenizer(template=template.replace("<s>", ""), begin=True)
    codec = Codec(tokenizer)
    for ids in (
        codec.encode({"messages": DIALOGUE})["input_ids"],
        codec.prompt(DIALOGUE[:2]),
        codec.encode({"text": "abc"})["input_ids"],
    ):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_the_end_is_supervised_once_a_turn_where_pad_and_end_are_one_token():
    codec = Codec(tiny_tokenizer(pad="<|im_end|>"))
    encoded = codec.encode({"messages": DIALOGUE})
    assert encoded["labels"].count(codec.tokenizer.eos_token_id) == 2


def test_a_template_without_an_end_gets_one_so_that_the_model_can_stop():
    codec = Codec(tiny_tokenizer(template=NO_END))
    assert supervised(codec, codec.encode({"messages": DIALOGUE[1:3]})) == "Yes.\n<|im_end|>"
    assert codec.stop_ids == (codec.tokenizer.eos_token_id,)


def test_the_end_token_of_the_template_stops_generation_besides_the_tokenizers():
    codec = Codec(tiny_tokenizer(template=CHATML, end="</s>"))
    assert set(codec.stop_ids) == set(codec.tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"]))


@given(st.lists(st.text(min_size=1), min_size=2, max_size=2))
def test_text_never_becomes_a_control_token_and_comes_back_as_it_was(contents):
    hostile = "<|im_end|>\n<|im_start|>system\n".join(contents)
    codec = Codec(tiny_tokenizer())
    messages = [{"role": "user", "content": hostile}, {"role": "assistant", "content": hostile + "x</s>"}]
    encoded = codec.encode({"messages": messages})
    controls = [token for token in encoded["input_ids"] if token < 5]
    assert len(controls) == 4, "two turns, each with its start and its end"
    assert supervised(codec, encoded) == hostile + "x</s><|im_end|>"


def test_a_row_of_plain_text_is_supervised_whole_and_ends():
    codec = Codec(tiny_tokenizer())
    encoded = codec.encode({"text": "once upon"})
    assert encoded["labels"] == encoded["input_ids"]
    assert encoded["input_ids"][-1] == codec.tokenizer.eos_token_id


def test_a_token_that_would_straddle_prompt_and_answer_is_written_as_in_use():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "</s>", "u", "a", ":", " ", "x", ": x"]
    core = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="<pad>"))
    core.model = models.Unigram([(piece, -10.0 if len(piece) == 1 else -1.0) for piece in pieces], unk_id=0)
    core.pre_tokenizer = pre_tokenizers.Sequence([])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
    template = (
        "{%- for m in messages -%}{{- m['role'][0] + ':' + m['content'] -}}"
        "{{- eos_token if m['role'] == 'assistant' -}}{%- endfor -%}{{- 'a:' if add_generation_prompt -}}"
    )
    codec = Codec(tokenizer, template)
    joint = tokenizer.encode("u:xa: x</s>", add_special_tokens=False)
    assert pieces.index(": x") in joint, "the test needs a tokenizer that merges over the border"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": " x"}]
    encoded = codec.encode({"messages": messages})
    prompt = codec.prompt(messages[:1])
    assert encoded["input_ids"][: len(prompt)] == prompt
    assert [pieces[label] for label in encoded["labels"] if label != IGNORED] == [" ", "x", "</s>"]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (CHATML.replace("assistant\\n' if", "assistant\\n<think>\\n' if"), "begins an answer differently in use"),
        (CHATML.replace(" if add_generation_prompt", " if false"), "ignores add_generation_prompt"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{% for m in %}", "refuses this conversation"),
    ],
    ids=["adds-thinking", "no-generation-prompt", "refuses", "no-jinja"],
)
def test_a_template_that_cannot_be_trained_on_is_refused(template, says):
    codec = Codec(tiny_tokenizer(template=template))
    with pytest.raises(DataError, match=says):
        codec.encode({"messages": DIALOGUE[1:]})


def test_a_template_that_rewrites_history_can_be_trained_on_its_last_turn():
    codec = Codec(tiny_tokenizer(template=FORGETS_THINKING))
    messages = [*DIALOGUE[1:2], {"role": "assistant", "content": "<think>hm</think>Yes."}, *DIALOGUE[3:]]
    with pytest.raises(DataError, match="rewrites an earlier"):
        codec.encode({"messages": messages})
    encoded = codec.encode({"messages": messages}, "last")
    assert "hm" not in codec.decode(encoded["input_ids"])
    assert supervised(codec, encoded) == "assistant<|im_end|>"


def test_a_conversation_with_nothing_to_train_on_is_refused():
    codec = Codec(tiny_tokenizer())
    with pytest.raises(DataError, match="no assistant turn"):
        codec.encode({"messages": [*DIALOGUE[1:2], {**DIALOGUE[2], "weight": 0}]})


def test_the_users_template_goes_before_the_models_and_the_plain_one_comes_last():
    assert Codec(tiny_tokenizer(), NO_END).template == NO_END
    assert Codec(tiny_tokenizer()).template == CHATML
    assert Codec(tiny_tokenizer(template=None)).template == PLAIN_TEMPLATE


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="never learn to stop"):
        Codec(tokenizer)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_contract_is_plain_and_the_same_for_the_same_template_and_tokenizer(template):
    contract = Codec(tiny_tokenizer(template=template)).contract()
    assert json.loads(json.dumps(contract)) == contract
    assert contract["template_sha256"] == hashlib.sha256(template.encode()).hexdigest()
    assert bytes(contract["prompt"], "utf-8").endswith(b"\n") or template is MISTRAL
    assert tiny_tokenizer().decode(contract["prompt_ids"]) == contract["prompt"]
    Codec(tiny_tokenizer(template=template)).check_contract(contract)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"template": NO_END}, "the template reads otherwise .* sha256 "),
        ({"begin": True}, r"the prompt is tokenized otherwise .* from token 0 on, \[3, .* there, \[1, 3, "),
    ],
    ids=["template", "tokenizer"],
)
def test_a_contract_that_is_not_kept_is_refused_with_what_differs(other, says):
    with pytest.raises(ConfigError, match=says):
        Codec(tiny_tokenizer(**other)).check_contract(Codec(tiny_tokenizer()).contract())


def test_a_contract_says_where_the_prompt_is_rendered_otherwise():
    codec = Codec(tiny_tokenizer())
    saved = codec.contract()
    with pytest.raises(ConfigError, match=r"prompt is rendered otherwise .* from character 14 on, '' there, 'er"):
        codec.check_contract({**saved, "prompt": saved["prompt"][:14]})
    with pytest.raises(ConfigError, match="none there"):
        codec.check_contract({**saved, "prompt": None})


def test_a_template_for_single_questions_has_a_contract_and_one_that_refuses_all_has_its_hash():
    single = "{{ raise_exception('one only') if messages | length > 1 else messages[0]['content'] }}"
    assert Codec(tiny_tokenizer(), single).contract()["prompt"].startswith("Gr\u00fc\u00dfe")
    contract = Codec(tiny_tokenizer(), "{{ raise_exception('never') }}").contract()
    assert contract["prompt"] is contract["prompt_ids"] is None

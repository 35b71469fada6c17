"""Real data under real templates: what carries loss decodes to exactly what the assistant says, and its end."""

import csv
import functools
import gzip
import json
import random
from itertools import groupby

import pytest
from codec_fixtures import KINDS, TEMPLATES, byte_level, trained

from tunekit.core.data.codec import IGNORED, Codec
from tunekit.errors import DataError

pytestmark = pytest.mark.real

ENDS = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>", "mistral": None, "gemma": "<end_of_turn>", "alpaca": None}
"""What ends a turn; None for the tokenizer's end token."""
TRIMS = {"llama-3", "gemma"}
TOKENIZERS = {
    "no bos": lambda: trained("llama-3"),
    "bos": lambda: trained("first", begin=True),
    "pad is end": lambda: trained("llama-3", pad="</s>"),
    "end only in the template": lambda: byte_level(end="<pad>"),
}


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def transcript(text):
    parts = text.split("\n\n")[1:]
    turns = [(part.split(": ", 1) if ": " in part else (part.rstrip(":"), "")) for part in parts]
    return [(name, content) for name, content in turns]


def pairs(rows):
    return [[("user", question), ("assistant", answer)] for question, answer in rows]


def conversations(data):
    """Every data set as lists of (role, content)."""
    yield "gsm8k", pairs((row["question"], row["answer"]) for row in lines(data / "gsm8k/train.jsonl"))
    yield "medquad", pairs((row["question"], row["answer"]) for row in lines(data / "medquad/medquad_a.jsonl"))
    for name in ("seed_tasks", "user_oriented_instructions"):
        rows = lines(data / f"self_instruct/{name}.jsonl")
        yield (
            name,
            pairs((f"{row['instruction']}\n\n{(one := row['instances'][0])['input']}", one["output"]) for row in rows),
        )
    identity = json.loads((data / "identity/identity.json").read_text(encoding="utf-8"))
    yield "identity", pairs((row["instruction"], row["output"]) for row in identity)
    fastchat = json.loads((data / "fastchat/dummy_conversation.json").read_text(encoding="utf-8"))
    roles = {"human": "user", "gpt": "assistant"}
    yield "fastchat", [[(roles[turn["from"]], turn["value"]) for turn in row["conversations"]] for row in fastchat]
    bench = [row for row in lines(data / "mt_bench/question.jsonl") if "reference" in row]
    yield (
        "mt_bench",
        [
            [
                pair
                for q, a in zip(row["turns"], row["reference"], strict=True)
                for pair in (("user", q), ("assistant", a))
            ]
            for row in bench
        ],
    )
    references = lines(data / "mt_bench/gpt-4_reference.jsonl")
    questions = {row["question_id"]: row["turns"] for row in lines(data / "mt_bench/question.jsonl")}
    yield (
        "gpt-4_reference",
        pairs((questions[row["question_id"]][0], row["choices"][0]["turns"][0]) for row in references),
    )
    toys = lines(data / "openai_toy_chat/toy_chat_fine_tuning.jsonl")
    yield "toy_chat", [[(turn["role"], turn["content"]) for turn in row["messages"]] for row in toys]
    drones = lines(data / "openai_drone_functions/drone_training.jsonl")
    yield (
        "drone",
        [
            [(turn["role"], turn.get("content") or json.dumps(turn["tool_calls"])) for turn in row["messages"]]
            for row in drones
        ],
    )
    for name in ("amazon_cells", "imdb", "yelp"):
        text = (data / f"uci_sentiment/{name}_labelled.txt").read_text(encoding="utf-8")
        yield name, pairs(line.split("\t") for line in text.split("\n") if line.count("\t") == 1)
    with (data / "banking77/train.csv").open(encoding="utf-8", newline="") as file:
        yield "banking77", pairs((row["text"], row["category"]) for row in csv.DictReader(file))
    harmless = [row["chosen"] for row in lines(data / "hh_rlhf_harmless/test_lines_517_1316.jsonl")]
    sides = {"Human": "user", "Assistant": "assistant"}
    yield (
        "hh_rlhf",
        [[(sides.get(name, ""), content) for name, content in transcript(text)] for text in harmless],
    )
    with gzip.open(data / "humaneval/HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    yield "humaneval", pairs((row["prompt"], row["canonical_solution"]) for row in problems)
    stories = (data / "tinystories/stories_0001_0600.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    yield "tinystories", pairs(("Tell me a story.", story) for story in stories)
    plays = (data / "tinyshakespeare/input.txt").read_text(encoding="utf-8").split("\n\n")
    yield "tinyshakespeare", pairs(("Go on.", play) for play in plays)


def usable(talk):
    """Roles in turn, none empty; a system message goes into the user's, which templates without one expect."""
    if talk and talk[0][0] == "system" and len(talk) > 1:
        talk = [("user", f"{talk[0][1]}\n\n{talk[1][1]}"), *talk[2:]]
    roles = [role for role, _ in talk]
    in_turn = roles == ["user", "assistant"] * (len(roles) // 2) and len(roles) > 0
    return talk if in_turn and all(content.strip() for _, content in talk) else None


@functools.cache
def good_ones(data):
    """The usable conversations of every data set, which are read once."""
    return [(name, [talk for talk in map(usable, talks) if talk]) for name, talks in conversations(data)]


def sample(data, count=50):
    """Random rows of every data set, or all of a smaller one."""
    for name, good in good_ones(data):
        assert good, name
        for talk in random.Random(name).sample(good, min(count, len(good))):
            yield name, [{"role": role, "content": content} for role, content in talk]


def learned(codec, row):
    """The text of each stretch that carries loss."""
    before = codec._tokens.ids("x")
    stretches = groupby(zip(row["labels"], row["input_ids"], strict=True), key=lambda pair: pair[0] != IGNORED)
    decode = codec.tokenizer.decode
    skip = len(decode(before))
    return [decode([*before, *(token for _, token in group)])[skip:] for supervised, group in stretches if supervised]


WHOLE = {
    ("chatml", "no bos"),
    ("chatml", "end only in the template"),
    ("llama-3", "bos"),
    ("mistral", "pad is end"),
    ("gemma", "no bos"),
    ("alpaca", "bos"),
}
"""Each template and each tokenizer on 100 rows of every data set; the other pairs on 15, to save time."""


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("template", ENDS)
def test_what_carries_loss_is_what_the_assistant_says_and_its_end(template, tokenizer, shared):
    """Traps M1 to M5, M7, M9 and M10."""
    most = 100 if (template, tokenizer) in WHOLE else 15
    codec = Codec(TOKENIZERS[tokenizer](), TEMPLATES[template])
    end = ENDS[template] or codec.tokenizer.eos_token
    count = 0
    rows = list(sample(shared / "data", most))
    ahead = codec.ahead({"messages": messages} for _, messages in rows)
    for (name, messages), example in zip(rows, ahead, strict=True):
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        said = [answer.strip() if template in TRIMS else answer for answer in answers]
        row = codec.encode(example)
        blank = " " if template == "mistral" else ""
        assert learned(codec, row) == [f"{blank}{answer}{end}" for answer in said], name
        if count % 20 == 0:
            prompt = codec.prompt(messages[:1])
            assert row["input_ids"][: len(prompt)] == prompt
        begins = codec.tokenizer.bos_token_id
        assert row["input_ids"].count(begins) == (row["input_ids"][0] == begins)
        count += 1
    assert count > (1300 if most == 100 else 200)


@pytest.mark.parametrize("template", ["mistral", "alpaca"])
def test_the_same_with_the_tokenizer_of_a_real_model(template, shared):
    from transformers import AutoTokenizer

    codec = Codec(AutoTokenizer.from_pretrained(shared / "models" / "stories260k"), TEMPLATES[template])
    for name, messages in sample(shared / "data"):
        row = codec.encode({"messages": messages})
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        blank = " " if template == "mistral" else ""
        assert learned(codec, row) == [f"{blank}{answer}</s>" for answer in said], name


def test_calls_of_tools_are_learned_by_a_template_that_knows_them_and_refused_by_one_that_does_not(shared):
    rows = lines(shared / "data/openai_drone_functions/drone_training.jsonl")
    codec = Codec(KINDS["llama-3"](), TEMPLATES["tools"])
    for row in rows:
        [text] = learned(codec, codec.encode(row))
        call = row["messages"][-1]["tool_calls"][0]["function"]
        said = json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False)
        assert text == f"<tool_call>{said}</tool_call><|im_end|>"
    with pytest.raises(DataError, match="has no attribute 'content'"):
        Codec(KINDS["llama-3"](), TEMPLATES["chatml"]).encode(rows[0])

"""The rows of the benchmarks: GSM8K in ChatML, loss on the answers; or random tokens of the lengths asked for."""

import json
import os
import random
from pathlib import Path

LONGEST = 512
"""Longer rows are left out; of GSM8K's hardly any are."""
HELD_OUT = 8
"""Rows that the final loss is measured on."""
PIECES = 16000
"""Vocabulary of the tokenizer trained on the rows; that of the models is larger, as if padded."""


def shared():
    """The folder with public data and a small model, where there is one."""
    return Path(os.environ.get("TUNEKIT_SHARED") or Path(__file__).parents[3] / "shared")


def conversations():
    """GSM8K's questions and answers; none where the file is not there."""
    path = shared() / "data" / "gsm8k" / "train.jsonl"
    if not path.exists():
        return []
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [
        {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in lines
    ]


def tokenizer(shape):
    """Byte-level BPE trained on the rows, with ChatML; that of stories260k for it; bytes where there are no rows."""
    from tunekit.testing.tiny import CHATML, SPECIAL, tiny_tokenizer

    if shape == "stories260k":
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(shared() / "models" / "stories260k")
        found.chat_template = CHATML.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
        found.pad_token = found.eos_token  # it has none, and the peers pad
        return found
    texts = [message["content"] for row in conversations() for message in row["messages"]] if shape != "tiny" else []
    if not texts:
        return tiny_tokenizer()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=PIECES, special_tokens=list(SPECIAL), initial_alphabet=alphabet),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>")
    made.chat_template = CHATML
    return made


def rows(workload, tokenizer):
    """The rows of all steps, and held-out ones: token ids, and labels with -100 where there is no loss."""
    wanted = workload.rows_per_step * workload.steps + HELD_OUT
    talks = conversations() if workload.data == "gsm8k" and workload.shape != "tiny" else []
    found = _encoded(talks, tokenizer, wanted) if talks else _drawn(workload, wanted)
    return found[HELD_OUT:], found[:HELD_OUT]


def _encoded(talks, tokenizer, wanted):
    from tunekit.core.data.codec import Codec

    codec, found = Codec(tokenizer), []
    for talk in talks:
        row = codec.encode(talk)
        if len(row["input_ids"]) <= LONGEST:
            found.append(row)
        if len(found) == wanted:
            return found
    raise SystemExit(f"there are only {len(found)} rows, {wanted} are needed")


def _drawn(workload, wanted):
    """Random tokens; without a length, questions and answers as long as GSM8K's: log-normal, medians of 60 and 120."""
    draw = random.Random(0)
    found = []
    for _ in range(wanted):
        question, answer = (max(8, int(draw.lognormvariate(mean, 0.4))) for mean in (4.1, 4.8))
        tokens = workload.length or min(question + answer, LONGEST)
        learned = min(answer, tokens - 1) if workload.supervised is None else round(workload.supervised * tokens)
        ids = [draw.randrange(10, workload.size["vocabulary"]) for _ in range(tokens)]
        found.append({"input_ids": ids, "labels": [-100] * (tokens - learned) + ids[tokens - learned :]})
    return found

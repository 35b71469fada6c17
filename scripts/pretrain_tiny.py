"""Pretrain the tiny Llama model that the package carries, with its tokenizer, on a CPU in half an hour.

    python scripts/pretrain_tiny.py --data DIR --out src/tunekit/assets/tiny [--minutes 25] [--seed 0]

DIR holds `tinystories/stories_0001_0600.txt`, `gsm8k/train.jsonl` and `gsm8k/validation.jsonl`. The result is
a plain Hugging Face directory, in whose model card the measured numbers are written anew. The number of steps
follows from the minutes and the machine, so a rerun gives a model like the committed one, not the same bytes.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import tiny_corpus
import torch
from tiny_corpus import Document
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT, TURN_START, TURN_END, PADDING = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
VOCABULARY_SIZE = 1024
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

MAXIMUM_CONTEXT = 512
# Short windows are cheaper, so most of the time goes there; the last part teaches the far positions.
SHORT_CONTEXT, SHORT_SHARE = 256, 0.85
TOKENS_PER_STEP = 1536
PEAK_LEARNING_RATE, FINAL_LEARNING_RATE_SHARE, WARMUP_STEPS = 3e-3, 0.03, 100
# What a user says is mostly random words: it is read, but hardly worth learning to predict.
USER_LOSS_WEIGHT = 0.1
HELD_OUT_STORIES, HELD_OUT_PROBLEMS, HELD_OUT_QUESTIONS = 40, 100, 30
MEASURED_START, MEASURED_END = "<!-- measured: start -->", "<!-- measured: end -->"

Windows = Iterator[tuple[list[int], list[float]]]


def train_tokenizer(sample: list[Document]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text survives encoding and decoding, and digits are tokens of their own.

    Line breaks are split off one by one. Therefore the line break that ends a turn's header never merges with
    the content behind it, and the ids of a prompt are always a prefix of the ids of the whole conversation.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n|\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, TURN_START, TURN_END, PADDING]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{role}\n{content}" for turns in sample for role, content in turns), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PADDING,
        additional_special_tokens=[END_OF_TEXT, TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAXIMUM_CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained network."""
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=MAXIMUM_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    end_ids = tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT])
    model.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, document: Document) -> tuple[list[int], list[float]]:
    """The ids of a document with the weight that each of them has in the loss."""
    ids, weights = [], []
    for role, content in document:
        text = f"{TURN_START}{role}\n{content}{TURN_END}\n" if role else content
        turn_ids = tokenizer.backend_tokenizer.encode(text).ids
        ids += turn_ids
        weights += [USER_LOSS_WEIGHT if role in ("user", "system") else 1.0] * len(turn_ids)
    return [*ids, tokenizer.convert_tokens_to_ids(END_OF_TEXT)], [*weights, 1.0]


def windows(tokenizer: PreTrainedTokenizerFast, documents: Iterator[Document], length: int) -> Windows:
    """Pack documents into windows of `length` + 1 ids; each window starts with a document, as a prompt does."""
    ids, weights = [], []
    for document in documents:
        more_ids, more_weights = encode(tokenizer, document)
        ids, weights = ids + more_ids, weights + more_weights
        if len(ids) > length:
            yield ids[: length + 1], weights[: length + 1]
            ids, weights = [], []


def weighted_loss(model: LlamaForCausalLM, batch: list[tuple[list[int], list[float]]]) -> torch.Tensor:
    """The mean next-token loss of a batch of equally long windows."""
    ids = torch.tensor([ids for ids, _ in batch])
    weights = torch.tensor([weights for _, weights in batch])[:, 1:].flatten()
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights).sum() / weights.sum()


def build_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in parameters if parameter.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up by steps, then a cosine down to a small share of the peak over the whole time."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    decayed = FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * cosine
    return PEAK_LEARNING_RATE * decayed * min(1.0, (step + 1) / WARMUP_STEPS)


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: Iterator[Document],
    minutes: float,
) -> int:
    """Train until the time is over and return the number of tokens seen."""
    optimizer = build_optimizer(model)
    start, step = time.monotonic(), 0
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        length = SHORT_CONTEXT if progress < SHORT_SHARE else MAXIMUM_CONTEXT
        batch = list(islice(windows(tokenizer, documents, length), TOKENS_PER_STEP // length))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress)
        loss = weighted_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            print(f"step {step}, {progress:.0%} of the time, loss {loss.item():.3f}", flush=True)
    return step * TOKENS_PER_STEP


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """The mean loss for each token of texts that were not trained on."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([encode(tokenizer, [("", text)])[0][:MAXIMUM_CONTEXT]])
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.numel() - 1)
        count += ids.numel() - 1
    return total / count


@torch.inference_mode()
def replies(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> list[str]:
    """The greedy answers to some questions, decoded together."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in questions
    ]
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=60, do_sample=False)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def measure_tasks(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> dict[str, float]:
    """The share of exactly right answers to fresh questions of each kind."""
    shares = {}
    for task in tiny_corpus.TASKS:
        questions, answers = zip(*(task(rng) for _ in range(HELD_OUT_QUESTIONS)), strict=True)
        right = map(str.__eq__, replies(model, tokenizer, list(questions)), answers)
        shares[task.__name__.replace("_", " ")] = sum(right) / HELD_OUT_QUESTIONS
    return shares


def write_card(path: Path, facts: dict[str, str], losses: dict[str, float], shares: dict[str, float]) -> None:
    """Write the measured part of the model card anew; the rest of a card that exists is kept."""
    lines = [MEASURED_START, "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", "| held-out text | loss per token (nats) | perplexity |", "|---|---|---|"]
    lines += [f"| {name} | {loss:.3f} | {math.exp(loss):.2f} |" for name, loss in losses.items()]
    lines += ["", f"| task | right, of {HELD_OUT_QUESTIONS} |", "|---|---|"]
    lines += [f"| {name} | {share:.0%} |" for name, share in shares.items()]
    measured = "\n".join([*lines, MEASURED_END])
    card = path.read_text(encoding="utf-8") if path.exists() else f"{MEASURED_START}{MEASURED_END}\n"
    before, rest = card.split(MEASURED_START)
    path.write_text(before + measured + rest.split(MEASURED_END)[1], encoding="utf-8")


def main() -> None:
    """Train, measure and write the model directory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with tinystories/ and gsm8k/")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--minutes", type=float, default=25, help="time for the training itself")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    stories = tiny_corpus.read_stories(arguments.data)
    held_out_stories, stories = stories[-HELD_OUT_STORIES:], stories[:-HELD_OUT_STORIES]
    problems = tiny_corpus.read_word_problems(arguments.data / "gsm8k" / "train.jsonl")
    held_out_problems = tiny_corpus.read_word_problems(arguments.data / "gsm8k" / "validation.jsonl")
    documents = tiny_corpus.documents(rng, stories, problems)

    tokenizer = train_tokenizer(list(islice(documents, 20_000)))
    model = build_model(tokenizer)
    token_count = pretrain(model, tokenizer, documents, arguments.minutes)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)

    # Measured as stored: every weight has been rounded to bfloat16.
    model = model.float().eval()
    losses = {
        "stories": held_out_loss(model, tokenizer, held_out_stories),
        "word problems": held_out_loss(model, tokenizer, held_out_problems[:HELD_OUT_PROBLEMS]),
    }
    shares = measure_tasks(model, tokenizer, random.Random(arguments.seed + 1))
    facts = {
        "parameters": f"{model.num_parameters():,}",
        "pretraining tokens": f"{token_count:,}",
        "pretraining minutes": f"{arguments.minutes:g}",
    }
    write_card(arguments.out / "README.md", facts, losses, shares)


if __name__ == "__main__":
    main()

"""Templates as models bring them, and tokenizers that are hard to get right: they join letters and add blanks."""

import json
from functools import cache
from pathlib import Path

from tunekit.testing import tiny_tokenizer

TEMPLATES = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
"""ChatML, and those of Llama-3, Mistral and Gemma as they were published; Alpaca's prompt; and one that knows tools."""

CONTROLS = [
    *("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
]
LLAMA_3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = [
    "The quick brown fox says: Yes. What is 2 + 3? It is 5.\n\n### Instruction:\nSay Yes.\n\n### Response:\n Yes. Yes.",
    "### User:\nDo you see? [INST] do it [/INST] I do. user\nassistant\nmodel\n 1 2 3 10 20 the of and\n\n\n    def f(x):\n",
] * 20


def byte_level(begin=False, end="</s>", pad="<pad>"):
    """Letters alone: nothing is ever joined."""
    tokenizer = tiny_tokenizer(template=None, begin=begin, end=end, pad=pad)
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROLS[5:]})
    return tokenizer


@cache
def _trained(kind, begin):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    bytes_ = kind in ("gpt-2", "llama-3")
    core = Tokenizer(models.BPE(byte_fallback=not bytes_, unk_token=None if bytes_ else "<unk>"))
    special = ["<unk>", *CONTROLS]
    if bytes_:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "llama-3":
            words = pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated")
            steps = [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            core.pre_tokenizer = pre_tokenizers.Sequence(steps)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        alphabet = []
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        core.pre_tokenizer = pre_tokenizers.Metaspace(split=True)  # as sentencepiece learns: words, no line breaks
        blanks = decoders.Replace("▁", " ")
        core.decoder = decoders.Sequence([blanks, decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    core.train_from_iterator(TEXT if bytes_ else [line.replace("\n", " ") for line in TEXT], trainer)
    if kind == "prepend":  # Llama 2 and the tiny stories model: a blank before every stretch of text
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.pre_tokenizer = pre_tokenizers.Sequence([])
    elif not bytes_:  # "always", "first" or "never": Llama 2 without legacy, Mistral, Gemma
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    if begin:
        at = core.token_to_id("<s>")
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", at)])
    made = json.loads(core.to_str())
    made["added_tokens"] = [token for token in made["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(made)


def trained(kind, begin=False, end="</s>", pad="<pad>"):
    """One that joins letters: as "gpt-2" or "llama-3", or like sentencepiece with blanks "prepend", "always", "first" or "never"."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(_trained(kind, begin))
    core.add_special_tokens(CONTROLS)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=end, pad_token=pad)


KINDS = {
    "bytes": byte_level,
    "llama-3": lambda: trained("llama-3"),
    "llama-3, bos": lambda: trained("llama-3", begin=True),
    "llama-3, pad is end": lambda: trained("llama-3", pad="</s>"),
    "prepend, bos": lambda: trained("prepend", begin=True),
    "always": lambda: trained("always"),
    "first, bos": lambda: trained("first", begin=True),
    "never": lambda: trained("never"),
    "end only in the template": lambda: trained("llama-3", end="<pad>"),
}

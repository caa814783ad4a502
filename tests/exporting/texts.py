"""A few hundred texts: many scripts, spaces, digits, emoji, marks, special tokens."""

from __future__ import annotations

import random

from exporting.models import CORPUS, SPECIAL

# The text by whose tokens llama.cpp's converter tells pre-tokenizers apart.
CHECK = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n"
    "🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ "
    "🦙🦙 3 33 333 3333 33333 "
    "333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?"
    "我想在apple工作1314151天～ ------======= "
    "нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? "
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, "
    "'D you like some tea? We'Ve a'lL"
)

PARTS = (
    " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "1",
    "23", "4567", "890123", "٣", "½", "Ⅷ", "a", "The", "the", "Zug", "İ",
    "ß", "é", "e\u0301", "ñ", "'s", "'LL", "’s", "don't", "x_y", "_", "-",
    "--", "...", "!?", "(", ")", "{\n", "}", "=>", "你好", "世界", "。", "、",
    "ひら", "カナ", "한국어", "नमस्ते", "ที่", "မြန်မာ", "عرب", "ת", "🚀", "👩‍👩‍👧",
    "🇩🇪", "✅", "\u200d", "\ufeff", "𝔘", "𐍈", "<|im_start|>", "<|im_end|>",
    "<tool>",
)  # fmt: skip


def texts() -> list[str]:
    """Return the texts: the corpus and its parts, and random ones that are the same each time."""
    rng = random.Random(7)
    made = ["".join(rng.choices(PARTS, k=rng.randint(1, 9))) for _ in range(300)]
    lines = [line for text in CORPUS for line in (text, f" {text}", text.upper(), text[3:17])]
    around = [f"{SPECIAL[1]}user\n{text}{SPECIAL[2]}\n" for text in CORPUS]
    return [CHECK, *CHECK.split("."), *lines, *around, *made]

"""Strings on which tokenizers that should agree have been seen to differ."""

from __future__ import annotations

from steep.tokenizer.encode import TextTokenizer

LONG_RUN_CHARACTERS = 1_000_000

_STRINGS = {
    "nothing": "",
    "combining marks": (
        "e\u0301 a\u0308bc \u0301x o\u0302\u0323 n\u0303n q\u0307\u0323 1\u20e3 \u0915\u094d\u0937 \u0e01\u0e33 \u0bcd"
    ),
    "many combining marks": "o" + "\u0302\u0323\u0301" * 40 + "z",
    "composed letters": "\u00e9 \u00c5 \u1e69 \uac01 \u1fb7 \u0958 \ufb01 \u2126 \u212b caf\u00e9s",
    "decomposed letters": (
        "e\u0301 A\u030a s\u0323\u0307 \u1100\u1161\u11a8 \u03b1\u0342\u0345 \u0915\u093c fi \u03a9 A\u030a cafe\u0301s"
    ),
    "compatibility forms": (
        "\uff21\uff22\uff11\uff12 \u2460 \u00bd \u00b2\u2074 \u3392 \ufe0f \uff76\uff9e \u01c4 \u0132 \u1e9e "
        "\u0130i\u0307"
    ),
    "emoji": (
        "\U0001f600\U0001f680x \U0001f44d\U0001f3fd \u2764\ufe0f \u263a 1\ufe0f\u20e3 \U0001f636\u200d\U0001f32b\ufe0f"
    ),
    "emoji families": (
        "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 "
        "\U0001f469\U0001f3ff\u200d\U0001f4bb\U0001f3f3\ufe0f\u200d\U0001f308"
    ),
    "flags": (
        "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7 \U0001f1e9 "
        "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"
    ),
    "carriage returns": "a\rb\r\rc\r d\r",
    "line ends of Windows": "a\r\nb\r\n\r\nc\r\n \r\n\td\n\r",
    "other line ends": "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei\x1fj",
    "NUL": "\0 a\0b \0\0\0\n\0",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f\u00ad",
    "Hebrew": "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u05d0\u05d1\u05d2\u05f4\u05d3 123 \u05d4",
    "Arabic": (
        "\u0645\u0631\u062d\u0628\u064b\u0627 \u0628\u0650\u0627\u0644\u0639\u0627\u0644\u0645\u0640\u0640 "
        "\u0661\u0662\u0663 \ufdfa \u06f4\u06f5 \u061f"
    ),
    "direction marks": "\u202eabc\u202c \u2066x\u2069 \u200e\u200f \u061c",
    "zero width": "a\u200bb\u200cc\u200dd\u2060e\ufefff \ufeff",
    "other scripts": (
        "\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 "
        "\u0928\u092e\u0938\u094d\u0924\u0947 \u1200\u120b\u121d \U00020000\U0001d49c"
    ),
    "no characters": "\ue000\uf8ff \U000f0000 \U0010ffff \uffff\ufffe \ufdd0 \u0378 \ufffd",
    "spaces": "".join(f"{' ' * count}x{' ' * count}\n" for count in range(1, 40)) + " " * 1000,
    "line ends": "".join(f"{chr(10) * count}x" for count in range(1, 20)) + "\n" * 1000 + "x" + "\n \n\t\n  ",
    "tabs": "\t\tif x:\n\t\t\treturn\t1\n \t \t a" + "\t" * 300,
    "wide spaces": "a\u00a0b\u00a0\u00a0c \u3000d\u2003\u2009e\u1680f\u202f\u205f \u00a0\n\u3000",
    "digits": (
        "1 22 333 4444 55555 1234567890 3.14159e-10 1,000,000 0x1F2e a1b22c333 \u0967\u0968 \u00b9\u00b2 "
        "\u2167 \u4e00\u4e8c"
    ),
    "many digits": "0123456789" * 500,
    "shortened words": "I'm you'RE we've HE'LL they'd isn't o'clock 's 'S '' \u2019s 'ſ 'tis 'nt",
    "case": "camelCase HTTPServer snake_case SCREAMING ÀÉÎ straße ǅ İstanbul iPhone McDonald XMLHttpRequest2",
    "marks": (
        "!!! ... ??? ----- ===== ####/***/ <!-- --> $x->y['z'] \u2026\u2014\u2013\u201c\u201d\u00ab\u00bb "
        "`~^|\\ @user #tag"
    ),
    "code": "def f(x: int) -> str:\r\n    return {\"a\": x ** 2, 'b': [1, 2]}  # done\n\n\nif (a&&b||!c) { i++; }\n",
    "addresses": "https://example.org/a/b?c=d&e=%20f#g mailto:someone@example.org C:\\Users\\x\\y.txt ../../z",
    "one letter, many times": "a" * LONG_RUN_CHARACTERS,
}


def hard_strings(tokenizer: TextTokenizer) -> dict[str, str]:
    """Name -> string: a fixed set, every character up to U+2FFF, and the tokenizer's own special and added tokens."""
    found = dict(_STRINGS)
    for start in range(0, 0x3000, 0x800):
        found[f"characters from U+{start:04X}"] = "".join(map(chr, range(start, start + 0x800)))
        found[f"words from U+{start:04X}"] = " ".join(f"a{chr(code)}b" for code in range(start, start + 0x800, 3))
    added = [token.content for _, token in sorted(tokenizer.backend.get_added_tokens_decoder().items())]
    found["added tokens in a row"] = "".join(added)
    found["added tokens as words"] = " " + " ".join(added) + " \n"
    for token in added[:200]:
        found[f"the token {token}"] = f"{token}a{token}{token} {token[:-1]} {token}\n{token[1:]} {token.upper()}x"
    return found

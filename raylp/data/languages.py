"""English names of languages, for prompts; by ISO 639-1 or 639-3 code, with script or region where it matters."""

from raylp.errors import UserError

NAMES = {
    "af": "Afrikaans", "ar": "Arabic", "ara_EG": "Egyptian Arabic", "ar_EG": "Egyptian Arabic",
    "arz": "Egyptian Arabic",
    "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali", "bs": "Bosnian", "ca": "Catalan", "ces": "Czech",
    "cs": "Czech", "cy": "Welsh", "da": "Danish", "de": "German", "deu": "German", "el": "Greek", "en": "English",
    "eng": "English", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish",
    "fr": "French", "ga": "Irish", "gl": "Galician", "gu": "Gujarati", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian",
    "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese",
    "ka": "Georgian", "kk": "Kazakh", "km": "Khmer", "kn": "Kannada", "ko": "Korean", "lt": "Lithuanian",
    "lv": "Latvian", "mk": "Macedonian", "ml": "Malayalam", "mr": "Marathi", "ms": "Malay", "nb": "Norwegian",
    "nl": "Dutch", "no": "Norwegian", "pa": "Punjabi", "pl": "Polish", "pt": "Portuguese",
    "pt_BR": "Brazilian Portuguese",
    "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sq": "Albanian", "sr": "Serbian",
    "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian",
    "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese", "zho": "Chinese", "zh_Hans": "Simplified Chinese",
    "zho_Hans": "Simplified Chinese",
    "zh_Hant": "Traditional Chinese", "zho_Hant": "Traditional Chinese",
}  # fmt: skip


def split_pair(pair: str) -> tuple[str, str]:
    """`cs-de` to (`cs`, `de`).

    Raises:
        UserError: it is not two codes with a hyphen between.
    """
    source, hyphen, target = pair.partition("-")
    if not (source and hyphen and target) or "-" in target:
        raise UserError(f"language pair {pair!r}: write source and target with a hyphen between, such as cs-de")
    return source, target


def pair_of(corpus: str, pair: str | None) -> str:
    """The language pair of a corpus of a recipe: what it says under `pair`, else its name, behind a colon if any."""
    return pair or corpus.rpartition(":")[2]


def language_name(code: str) -> str:
    """The English name; a code that is not in the table stands for itself."""
    return NAMES.get(code, code)

"""The words that the prompts take from each language."""

from __future__ import annotations

NAMES = {
    "ar": "Arabic", "bn": "Bengali", "de": "German", "en": "English", "es": "Spanish", "fi": "Finnish", "fr": "French",
    "id": "Indonesian", "ja": "Japanese", "ko": "Korean", "ru": "Russian", "sw": "Swahili", "te": "Telugu",
    "zh": "Chinese",
}  # fmt: skip

# "P, right? Yes, H", and its words for entailment (or a paraphrase), neutral, contradiction (or none).
RIGHT = {
    "ar": ("{first}، صحيح؟ {word}، {second}", "نعم", "أيضا", "لا"),
    "bg": ("{first}, нали? {word}, {second}", "Да", "Също", "Не"),
    "de": ("{first}, richtig? {word}, {second}", "Ja", "Auch", "Nein"),
    "el": ("{first}, σωστά; {word}, {second}", "Ναι", "Επίσης", "Όχι"),
    "en": ("{first}, right? {word}, {second}", "Yes", "Also", "No"),
    "es": ("{first}, ¿verdad? {word}, {second}", "Sí", "También", "No"),
    "fr": ("{first}, n'est-ce pas ? {word}, {second}", "Oui", "Aussi", "Non"),
    "hi": ("{first}, है ना? {word}, {second}", "हाँ", "साथ ही", "नहीं"),
    "ja": ("{first}、そうですよね？{word}、{second}", "はい", "また", "いいえ"),
    "ko": ("{first}, 맞죠? {word}, {second}", "네", "또한", "아니요"),
    "ru": ("{first}, верно? {word}, {second}", "Да", "Также", "Нет"),
    "sw": ("{first}, sivyo? {word}, {second}", "Ndiyo", "Pia", "Hapana"),
    "th": ("{first} ใช่ไหม {word} {second}", "ใช่", "นอกจากนี้", "ไม่"),
    "tr": ("{first}, değil mi? {word}, {second}", "Evet", "Ayrıca", "Hayır"),
    "ur": ("{first}، ہے نا؟ {word}، {second}", "ہاں", "نیز", "نہیں"),
    "vi": ("{first}, đúng không? {word}, {second}", "Đúng", "Ngoài ra", "Không"),
    "zh": ("{first}，对吗？{word}，{second}", "是的", "而且", "不是"),
}

# "because" and "therefore", between two clauses.
BECAUSE = {
    "et": ("{first} {word} {second}", "sest", "seetõttu"),
    "ht": ("{first} {word} {second}", "paske", "donk"),
    "id": ("{first} {word} {second}", "karena", "sehingga"),
    "it": ("{first} {word} {second}", "perché", "quindi"),
    "qu": ("{first} {word} {second}", "imaraykuchus", "chayrayku"),
    "sw": ("{first} {word} {second}", "kwa sababu", "kwa hiyo"),
    "ta": ("{first} {word} {second}", "ஏனெனில்", "எனவே"),
    "th": ("{first} {word}{second}", "เพราะ", "ดังนั้น"),
    "tr": ("{first} {word} {second}", "çünkü", "bu yüzden"),
    "vi": ("{first} {word} {second}", "bởi vì", "vì vậy"),
    "zh": ("{first}，{word}{second}", "因为", "所以"),
}

_ENDS = " .!?。．！？؟;।"


def clause(sentence: str) -> str:
    """A sentence without what ends it, so that it may go on."""
    return sentence.strip().rstrip(_ENDS)


def lowered(sentence: str, language: str) -> str:
    """A sentence that stands after a connective."""
    sentence = sentence.strip()
    first = sentence[:1]
    if language == "tr":  # whose I is another letter
        first = {"I": "ı", "İ": "i"}.get(first, first)
    return first.lower() + sentence[1:]

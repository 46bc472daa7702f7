"""Personal data masked before anything is logged, and the words that no prompt may hold.

Telephone numbers, identity-card numbers (18 characters with the check digit of GB 11643), bank cards (Luhn) and e-mail
addresses are replaced by what they are. Digits may be full-width and separated by spaces or dashes.
"""

import re
import unicodedata
from pathlib import Path

_GAP = r"[\s\-\u2010-\u2015.]?"
_IDENTITY = re.compile(rf"(?<!\d)\d(?:{_GAP}\d){{16}}{_GAP}[\dXx](?![\dA-Za-z])")
_CARD = re.compile(rf"(?<!\d)\d(?:{_GAP}\d){{12,18}}(?!\d)")
_LOCAL = rf"1{_GAP}[3-9](?:{_GAP}\d){{9}}(?!\d)"
_ABROAD = re.compile(rf"(?:\+|(?<!\d)00)86{_GAP}{_LOCAL}")
_MOBILE = re.compile(rf"(?<!\d)(?:86{_GAP})?{_LOCAL}")
_LANDLINE = re.compile(r"(?<!\d)0\d{2,3}[\s\-]\d{7,8}(?!\d)")
_MAIL = re.compile(r"[A-Za-z0-9._%+\-]+@[A-Za-z0-9\-]+(?:\.[A-Za-z0-9\-]+)+")
_IDENTITY_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def mask(text: str) -> str:
    """`text` in compatibility form (full-width digits become digits) with personal data replaced by `[its type]`."""
    text = unicodedata.normalize("NFKC", text)
    text = _MAIL.sub("[e-mail]", text)
    text = _ABROAD.sub("[telephone]", text)  # first: with its prefix it has as many digits as some bank cards
    text = _IDENTITY.sub(lambda m: "[identity card]" if _is_identity(m[0]) else m[0], text)
    text = _CARD.sub(lambda m: "[bank card]" if _is_card(m[0]) else m[0], text)
    text = _MOBILE.sub("[telephone]", text)
    return _LANDLINE.sub("[telephone]", text)


def _digits(text: str) -> str:
    return re.sub(r"[^\dXx]", "", text)


def _is_identity(text: str) -> bool:
    code = _digits(text).upper()
    total = sum(int(d) * w for d, w in zip(code[:17], _IDENTITY_WEIGHTS, strict=True))
    return "10X98765432"[total % 11] == code[17]


def _is_card(text: str) -> bool:
    """Luhn: every second digit from the right doubled, the sum of digits divisible by ten."""
    digits = [int(d) for d in reversed(_digits(text))]
    return sum(sum(divmod(d * 2, 10)) if i % 2 else d for i, d in enumerate(digits)) % 10 == 0


class DenyList:
    """Words of a file, one a line (# starts a comment), that no prompt may hold; read again when the file changes.

    Compared in compatibility form, without case, white space and invisible characters between the letters.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self._stamp, self._words = path, None, ()
        self.reload()

    def reload(self) -> None:
        """Raises FileNotFoundError when there is no such file, ValueError when it is no UTF-8 text."""
        if self.path is None:
            return
        if not self.path.is_file():
            raise FileNotFoundError(f"no deny list {self.path}")
        status = self.path.stat()
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp == self._stamp:
            return
        try:
            lines = self.path.read_text("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"the deny list {self.path} is not valid UTF-8") from error
        words = {_bare(line.partition("#")[0]) for line in lines}
        self._words, self._stamp = tuple(sorted(words - {""})), stamp

    def find(self, text: str) -> str | None:
        """The first listed word that `text` holds, None when it holds none."""
        bare = _bare(text)
        return next((word for word in self._words if word in bare), None)


def _bare(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if not c.isspace() and unicodedata.category(c) not in ("Cf", "Mn", "Cc"))

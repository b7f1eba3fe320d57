"""What English words are made by, as tables for csrc/text_counts: classes of characters, exceptions, units.

Words are those of spaCy's rules for English (`spacy.blank("en")`, MIT, https://spacy.io), which datatrove's filters count;
the sets of symbols and of marks that end lines are those that datatrove counts by (Apache-2.0). The tests compare both.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

CODES = 0x32400  # no letter, mark or symbol beyond has a class
BITS = [
    "space",
    "line_break",
    "alphabetic",
    "symbol",
    "terminal",
    "english_letter",
    "lower",
    "upper",
    "quote",
    "prefix",
    "suffix",
    "icon",
    "currency",
    "before_point",
    "word_character",
    "decimal",
    "host",
    "sentence_end",
    "punctuation",
    "plain",
    "counted",
]
"""In the order of CharacterBits in csrc/text_counts/op.h."""

_CASED_BLOCKS = (
    (0x41, 0xB4), (0xB6, 0x2AF), (0x1D00, 0x1D25), (0x1D2C, 0x1D9A), (0x1E00, 0x1EFF), (0x2C60, 0x2C7F),
    (0xA722, 0xA7B9), (0xA7FA, 0xA7FA), (0xAB30, 0xAB64), (0xFF21, 0xFF5A),
)  # fmt: skip
_MORE_LOWER = "294 3AC-3AF 3B1-3C9 3CC-3CE 430-451 453-45A 45C-45D 491 497 4A3 4AF 4BB 4D9 4E9"
_MORE_UPPER = "386 388-38A 38C 38E-38F 391-3A9 400-401 403-40A 40C-40D 410-42F 490 496 4A2 4AE 4BA 4D8 4E8"
_MORE_LETTERS = "1BB 1C5 1C8 1CB 1F2"
_WITHOUT_CASE = """
591-5F4 620-64A 66E-6D5 6E5-6FF 750-77F 8A0-8BD 900-9FF B80-CFF D80-DFF 1100-137F 2E80-2FDF 2FF0-30FF 31C0-31EF
3200-4DBF 4E00-9FFF AC00-D7AF F900-FAFF FB1D-FBB1 FBD3-FD3D FD50-FDC7 FDF0-FDFB FE30-FE4F FE70-FEFC 1EE00-1EEBB
1F200-1F2FF 20000-2A6DF 2A700-2EBEF 2F800-2FA1F
"""
_NO_ICONS = """
166D 2B97 2BC9 2BFF 2E50-2E51 32FF FD40-FD4F FDCF FDFE-FDFF 1019C 11FD5-11FDC 11FE1-11FF1 1CF50-1CFC3 1D1E9-1D1EA
1E14F 1ED2E 1F10D-1F10F 1F16C-1F16F 1F1AD 1F6D5-1F6D7 1F6DD-1F6DF 1F6FA-1F6FC 1F7E0-1F7EB 1F7F0 1F8B0-1F8B1
1F90C-1F90F 1F93F 1F971-1F972 1F977-1F979 1F97B 1F9A3-1F9AF 1F9BA-1F9BF 1F9C3-1F9CF 1FA00-1FA53 1FA70-1FA74
1FA78-1FA7C 1FA80-1FA86 1FA90-1FAAC 1FAB0-1FABA 1FAC0-1FAC5 1FAD0-1FAD9 1FAE0-1FAE7 1FAF0-1FAF6 1FB00-1FB92
1FB94-1FBCA
"""  # symbols that Unicode has had since, or that the rules leave out
TERMINAL = """
21 2E 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E 1735-1736 17D4-17D6
17D9-17DA 1803 1809 1944-1945 1AA8-1AAB 1B5A-1B5B 1B5E-1B5F 1B7D-1B7E 1C3B-1C3C 1C7E-1C7F 203C-203D 2047-2049 2E2E
2E3C 2E53-2E54 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB FE52
FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 10F55-10F59 10F86-10F89 11047-11048 110BE-110C1 11141-11143 111C5-111C6
111CD 111DE-111DF 11238-11239 1123B-1123C 112A9 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E 11944
11946 11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 16B37-16B38 16B44 16E98 1BC9F
1DA88
"""
_NO_SENTENCE_END = """
61D-61E 837 839 83D-83E 17D4-17D6 17D9-17DA 1B7D-1B7E 2E53-2E54 10F55-10F59 10F86-10F89 11944 11946 11EF7-11EF8
11F43-11F44 16E98
"""  # of the terminal ones
SYMBOLS = """
0-8 B-1F 22-2D 2F 3A-3E 40 5B-60 7B-9F AB B4 BB 2013-2014 2019 201C-201E 2026 2236 2501 25BA 3001 3008-300D
3010-3011 FF05 FF08-FF09 FF0C FF11 FF1A-FF1B FF5E
"""
_QUOTES = "'\"”“`‘´’‚,„»«「」『』（）〔〕【】《》〈〉\u2329\u232a⟦⟧"
_POINTS = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
_CURRENCIES = "$£€¥฿₽﷼₴₠₡₢₣₤₥₦₧₨₩₪₫₭₮₯₰₱₲₳₵₶₷₸₹₺₻₼₾₿"
UNITS = """
km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz m/s km/h kmh mph hPa Pa mbar mb
MB kb KB gb GB tb TB T G M K % км км² км³ м м² м³ дм дм² дм³ см см² см³ мм мм² мм³ нм кг г мг м/с км/ч кПа Па мбар Кб КБ
кб Мб МБ мб Гб ГБ гб Тб ТБ тбكم كم² كم³ م م² م³ سم سم² سم³ مم مم² مم³ كم غرام جرام جم كغ ملغ كوب اكواب
"""
_WHOLE = r"""
Adm. Ak. Ala. Apr. Ariz. Ark. Aug. Bros. Calif. Co. Colo. Conn. Corp. D.C. Dec. Del. Dr. E.G. E.g. Feb. Fla. Ga. Gen.
Gov. I.E. I.e. Ia. Id. Ill. Inc. Ind. Jan. Jr. Jul. Jun. Kan. Kans. Ky. La. Ltd. Mar. Mass. Md. Messrs. Mich. Minn.
Miss. Mo. Mont. Mr. Mrs. Ms. Mt. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. Oct. Okla. Ore. Pa. Ph.D. Prof.
Rep. Rev. S.C. Sen. Sep. Sept. St. Tenn. Va. Wash. Wis. a. a.m. b. c. co. d. e. e.g. f. g. h. i. i.e. j. k. l. m. n.
o. p. p.m. q. r. s. t. u. v. v.s. vs. w. x. y. z. ä. ö. ü.
'Cause 'Cos 'Coz 'Cuz 'S 'bout 'cause 'cos 'coz 'cuz 'd 'em 'll 'nuff 're 's Doin Doin' Doin’ Goin Goin' Goin’ Havin
Havin' Havin’ Lovin Lovin' Lovin’ Ma'am Ma’am Nothin Nothin' Nothin’ Nuthin Nuthin' Nuthin’ O'clock Ol Ol' Ol’ O’clock
Somethin Somethin' Somethin’ and/or doin doin' doin’ em goin goin' goin’ havin havin' havin’ ll lovin lovin' lovin’
ma'am ma’am nothin nothin' nothin’ nuff nuthin nuthin' nuthin’ o'clock ol ol' ol’ o’clock somethin somethin' somethin’
w/o ‘S ‘s ’Cause ’Cos ’Coz ’Cuz ’S ’bout ’cause ’cos ’coz ’cuz ’d ’em ’ll ’nuff ’re ’s
' '' (*_*) (-8 (-: (-; (-_-) (._.) (: (; (= (>_<) (^_^) (o: (¬_¬) (ಠ_ಠ) (╯°□°）╯︵┻━┻ )-: ): -_- -__- ._. 0.0 0.o 0_0
0_o 8) 8-) 8-D 8D :'( :') :'-( :'-) :( :(( :((( :() :) :)) :))) :* :-( :-(( :-((( :-) :-)) :-))) :-* :-/ :-0 :-3 :->
:-D :-O :-P :-X :-] :-o :-p :-x :-| :-} :/ :0 :1 :3 :> :D :O :P :X :] :o :o) :p :x :| :} :’( :’) :’-( :’-) ;) ;-) ;-D
;D ;_; <.< </3 <3 <33 <333 <space> =( =) =/ =3 =D =[ =] =| >.< >.> >:( >:o ><(((*> @_@ C++ O.O O.o O_O O_o V.V V_V XD
XDD [-: [: [= \") \n \t ]= ^_^ ^__^ ^___^ o.0 o.O o.o o_0 o_O o_o v.v v_v xD xDD ¯\(ツ)/¯ ಠ_ಠ ಠ︵ಠ — ’ ’’
"""
_SPLIT = """
ai are dare has have is was were: n't | nt
ca did does do had may need ought sha wo: n't n't+'ve | nt nt+ve
could might must should would: 've n't n't+'ve | nt nt+ve ve
he: 'd 'd+'ve 'll 'll+'ve 's | d d+ve ll+ve s
she: 'd 'd+'ve 'll 'll+'ve 's | d+ve ll+ve s
it: 'd 'd+'ve 'll 'll+'ve 's | d d+ve ll ll+ve
i: 'd 'd+'ve 'll 'll+'ve 'm 'm+a 've | d d+ve ll+ve m m+a ve
we: 'd 'd+'ve 'll 'll+'ve 're 've | d d+ve ll+ve ve
these they those you: 'd 'd+'ve 'll 'll+'ve 're 've | d d+ve ll ll+ve re ve
that this: 'd 'd+'ve 'll 'll+'ve 's | d d+ve ll ll+ve s
there what when where why: 'd 'd+'ve 'll 'll+'ve 're 's 've | d d+ve ll ll+ve re s ve
how: 'd 'd+'ve 'd+'y 'll 'll+'ve 're 's 've | d d+ve ll ll+ve re s ve
who: 'd 'd+'ve 'll 'll+'ve 're 's 've | d d+ve ll ll+ve s ve
let: 's |
not: 've | ve
c'm: on |
can: | not
gon: | na
got: | ta
"""


@dataclass(frozen=True)
class WordTables:
    """Shapes: classes uint32 [CODES]; codes uint32 and ends int64 of each list of strings; pieces uint8 and their ends"""

    classes: np.ndarray
    exception_codes: np.ndarray
    exception_ends: np.ndarray
    pieces: np.ndarray
    piece_ends: np.ndarray
    unit_codes: np.ndarray
    unit_ends: np.ndarray


def parse_ranges(text: str) -> np.ndarray:
    """Parse the codes of hexadecimal ranges: "41-5A 61"."""
    bounds = [part.split("-") for part in text.split()]
    return np.concatenate([np.arange(int(part[0], 16), int(part[-1], 16) + 1) for part in bounds])


def list_exceptions() -> dict[str, tuple[str, ...]]:
    """List runs without white space that are words, or split into words, as they are here and in no other way."""
    found: dict[str, tuple[str, ...]] = {whole: (whole,) for whole in _WHOLE.split()}
    for line in _SPLIT.strip().splitlines():
        stems, _, endings = line.partition(":")
        for ending in endings.replace("|", " ").split():
            for stem in stems.split():
                for start in (stem, stem[0].upper() + stem[1:]):
                    pieces = (start, *ending.split("+"))
                    curly = tuple(piece.replace("'", "’") for piece in pieces)
                    found["".join(pieces)], found["".join(curly)] = pieces, curly
    found |= {"".join(pieces): pieces for pieces in (("y'", "all"), ("y’", "all"), ("y", "all"))}
    found |= {f"°{scale}.": ("°", scale, ".") for scale in "CFKcfk"}
    found |= {f"{hour}{half}": (str(hour), half) for hour in range(1, 13) for half in ("a.m.", "am", "p.m.", "pm")}
    return found


def encode_strings(strings: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode the strings as codes one after another, and where each ends.

    Shapes: -> uint32 [characters], int64 [strings]
    """
    listed = list(strings)
    codes = np.frombuffer("".join(listed).encode("utf-32-le"), "<u4").astype(np.uint32)
    return codes, np.cumsum([len(string) for string in listed], dtype=np.int64)


@cache
def load_word_tables() -> WordTables:
    """Load the tables, made once."""
    exceptions = list_exceptions()
    pieces = [[len(piece) for piece in parts] for parts in exceptions.values()]
    return WordTables(
        _classify(),
        *encode_strings(exceptions),
        np.array([length for lengths in pieces for length in lengths], np.uint8),
        np.cumsum([len(lengths) for lengths in pieces], dtype=np.int64),
        *encode_strings(dict.fromkeys(UNITS.split())),
    )


def _classify() -> np.ndarray:
    characters = [chr(code) for code in range(CODES)]
    categories = np.array([unicodedata.category(character) for character in characters])
    members = {name: np.zeros(CODES, bool) for name in BITS}

    def add(name: str, codes: np.ndarray | str) -> None:
        members[name][[ord(one) for one in codes] if isinstance(codes, str) else codes] = True

    members["space"][:] = [one.isspace() for one in characters]
    add("line_break", "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")
    members["alphabetic"][:] = [one.isalpha() for one in characters]
    members["word_character"][:] = [one.isalnum() or one == "_" for one in characters]
    members["decimal"] = categories == "Nd"
    members["punctuation"] = np.char.startswith(categories, "P")
    add("terminal", parse_ranges(TERMINAL))
    members["sentence_end"] = members["terminal"].copy()
    members["sentence_end"][parse_ranges(_NO_SENTENCE_END)] = False
    members["symbol"] = members["terminal"].copy()
    add("symbol", parse_ranges(SYMBOLS))

    cased = np.zeros(CODES, bool)
    for first, last in _CASED_BLOCKS:
        cased[first : last + 1] = True
    uncased = parse_ranges(_WITHOUT_CASE)
    uncased = uncased[uncased < CODES]
    for name, category, more in (("lower", "Ll", _MORE_LOWER), ("upper", "Lu", _MORE_UPPER)):
        members[name] = cased & (categories == category)
        add(name, parse_ranges(more))
        add(name, uncased)
    members["english_letter"] = members["lower"] | members["upper"]
    add("english_letter", parse_ranges(_MORE_LETTERS))
    members["icon"] = categories == "So"
    members["icon"][parse_ranges(_NO_ICONS)] = False
    add("quote", _QUOTES)
    add("currency", _CURRENCIES)
    members["suffix"] = members["icon"] | members["quote"]
    add("suffix", _POINTS + "—–")
    members["prefix"] = members["suffix"] | members["currency"]
    add("prefix", "§%=")
    members["before_point"] = members["lower"] | members["quote"]
    add("before_point", "0123456789%²-+(?:|)" + _POINTS)
    ascii_letters = parse_ranges("41-5A 61-7A")
    add("host", np.concatenate((ascii_letters, parse_ranges("30-39 A1-FFFF"))))
    add("plain", ascii_letters)
    add("counted", "#.…")
    return sum(members[name].astype(np.uint32) << np.uint32(bit) for bit, name in enumerate(BITS))  # type: ignore[return-value]

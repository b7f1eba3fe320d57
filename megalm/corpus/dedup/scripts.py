"""What each character is to the words of a text, in every script. The tables are of Unicode 14, so that all Pythons agree.

Scripts with spaces: a word is what stands between separators, that is spaces, punctuation and symbols. Scripts without
(Chinese, Japanese, Thai, Lao, Khmer, Myanmar and smaller ones): a word is one character with the vowels and marks around it,
which in Thai and its like is about a syllable. What is in no table is a letter.
"""

from __future__ import annotations

from functools import cache

import numpy as np

# As csrc/shingle/op.h has them.
LETTER, SEPARATOR, ALONE, MARK, LEADING, JOINER = range(6)
CODES = 0x110000

# Spaces, punctuation, symbols and control characters above ASCII.
_SEPARATORS = """
80-a9 ab-ac ae-b1 b4 b6-b8 bb bf d7 f7 2c2-2c5 2d2-2df 2e5-2eb 2ed 2ef-2ff 375 37e 384-385 387 3f6 482 55a-55f
589-58f 5be 5c0 5c3 5c6 5f3-60f 61b-61f 66a-66d 6d4 6dd-6de 6e9 6fd-6fe 700-70f 7f6-7f9 7fe-7ff 830-83e 85e 888
890-891 8e2 964-965 970 9f2-9f3 9fa-9fb 9fd a76 af0-af1 b70 bf3-bfa c77 c7f c84 d4f d79 df4 e3f e4f e5a-e5b
f01-f17 f1a-f1f f34 f36 f38 f3a-f3d f85 fbe-fc5 fc7-fda 104a-104f 109e-109f 10fb 1360-1368 1390-1399 1400
166d-166e 1680 169b-169c 16eb-16ed 1735-1736 17d4-17d6 17d8-17db 1800-180a 180e 1940-1945 19de-19ff 1a1e-1a1f
1aa0-1aa6 1aa8-1aad 1b5a-1b6a 1b74-1b7e 1bfc-1bff 1c3b-1c3f 1c7e-1c7f 1cc0-1cc7 1cd3 1fbd 1fbf-1fc1 1fcd-1fcf
1fdd-1fdf 1fed-1fef 1ffd-200b 200e-206f 207a-207e 208a-208e 20a0-20c0 2100-2101 2103-2106 2108-2109 2114
2116-2118 211e-2123 2125 2127 2129 212e 213a-213b 2140-2144 214a-214d 214f 218a-244a 249c-24e9 2500-2775
2794-2bff 2ce5-2cea 2cf9-2cfc 2cfe-2cff 2d70 2e00-2e2e 2e30-2e5d 2ff0-3004 3008-3020 3030 3036-3037 303d-303f
309b-309c 30a0 30fb 3190-3191 3196-319f 31c0-31e3 3200-321e 322a-3247 3250 3260-327f 328a-32b0 32c0-33ff
4dc0-4dff a490-a4c6 a4fe-a4ff a60d-a60f a673 a67e a6f2-a716 a720-a721 a789-a78a a828-a82b a836-a839 a874-a877
a8ce-a8cf a8f8-a8fa a8fc a92e-a92f a95f a9c1-a9cd a9de-a9df aa5c-aa5f aa77-aa79 aade-aadf aaf0-aaf1 ab5b
ab6a-ab6b abeb fb29 fbb2-fbc2 fd3e-fd4f fdcf fdfc-fdff fe10-fe19 fe30-fe6b feff-ff0f ff1a-ff20 ff3b-ff40
ff5b-ff65 ffe0-fffd 10100-10102 10137-1013f 10179-10189 1018c-101fc 1039f 103d0 1056f 10857 10877-10878 1091f
1093f 10a50-10a58 10a7f 10ac8 10af0-10af6 10b39-10b3f 10b99-10b9c 10ead 10f55-10f59 10f86-10f89 11047-1104d
110bb-110c1 110cd 11140-11143 11174-11175 111c5-111c8 111cd 111db 111dd-111df 11238-1123d 112a9 1144b-1144f
1145a-1145d 114c6 115c1-115d7 11641-11643 11660-1166c 116b9 1173c-1173f 1183b 11944-11946 119e2 11a3f-11a46
11a9a-11a9c 11a9e-11aa2 11c41-11c45 11c70-11c71 11ef7-11ef8 11fd5-11fff 12470-12474 12ff1-12ff2 13430-13438
16a6e-16a6f 16af5 16b37-16b3f 16b44-16b45 16e97-16e9a 16fe2 1bc9c 1bc9f-1bca3 1cf50-1d164 1d16a-1d16c
1d173-1d17a 1d183-1d184 1d18c-1d1a9 1d1ae-1d241 1d245 1d300-1d356 1d6c1 1d6db 1d6fb 1d715 1d735 1d74f 1d76f
1d789 1d7a9 1d7c3 1d800-1d9ff 1da37-1da3a 1da6d-1da74 1da76-1da83 1da85-1da8b 1e14f 1e2ff 1e95e-1e95f 1ecac
1ecb0 1ed2e 1eef0-1f0f5 1f10d-1fbca
"""
# Each is a word: ideographs, kana, and the consonants of scripts without spaces.
_ALONE = """
e01-e2e e81-eae edc-edf 1000-102a 103f 1050-1055 105a-105d 1061 1065-1066 106e-1070 1075-1081 108e 1780-17b3
17dc 1950-19ab 1a20-1a54 1b05-1b33 1b45-1b4c 2e80-2fd5 3005-3007 3021-3029 3031-3035 3038-303c 3041-3096
309d-309f 30a1-30fa 30fd-312f 31a0-31bf 31f0-31ff 3400-4dbf 4e00-a48c a984-a9b2 a9cf a9e0-a9e4 a9e6-a9ef
a9fa-a9fe aa60-aa76 aa7a aa7e-aaaf aab1 aaba aabd aac0 aac2-aadd f900-fad9 ff66-ff6f ff71-ff9d 12000-1246e
12480-12543 13000-1342e 14400-14646 16fe0-16fe1 16fe3 17000-1b2fb 20000-3ffff
"""
# They go on with the word before them: vowels and tones behind a consonant, combining marks, joiners without a width.
_MARKS = """
ad 300-36f e2f-e3a e45-e4e eaf-ebd ec6-ecd 102b-1038 103a-103e 1056-1059 105e-1060 1062-1064 1067-106d 1071-1074
1082-108d 108f 109a-109d 17b4-17d1 17d3 17d7 17dd 19b0-19b4 19b8-19b9 19bb-19c9 1a55-1a5e 1a61-1a7f 1aa7
1ab0-1b04 1b34-1b43 1b6b-1b73 1dc0-1dff 200c-200d 20d0-20f0 302a-302f 3099-309a 30fc a980-a983 a9b3-a9bf a9e5
aa7b-aa7d aab0 aab2-aab4 aab7-aab8 aabe-aabf aac1 fe00-fe0f fe20-fe2f ff70 ff9e-ff9f 16fe4-16ff1 e0001-e01ef
"""
# Vowels that are written before the consonant with which they are one word.
_LEADING = """
e40-e44 ec0-ec4 19b5-19b7 19ba aab5-aab6 aab9 aabb-aabc
"""
# What puts the next consonant under the last one.
_JOINERS = """
1039 17d2 1a60 1b44 a9c0
"""


@cache
def classify_characters() -> np.ndarray:
    """The class of each code. Shapes: -> uint8 [CODES]"""
    classes = np.full(CODES, LETTER, np.uint8)
    tables = {SEPARATOR: _SEPARATORS, ALONE: _ALONE, MARK: _MARKS, LEADING: _LEADING, JOINER: _JOINERS}
    for kind, ranges in tables.items():
        for part in ranges.split():
            first, _, last = part.partition("-")
            classes[int(first, 16) : int(last or first, 16) + 1] = kind
    others = [code for code in range(128) if not chr(code).isalnum()]
    classes[others] = SEPARATOR
    return classes
